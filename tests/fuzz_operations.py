"""What a fuzzer does to a cache, step by step, and what each step must give."""

import contextlib
import copy
import functools
import io
import pickle
import re
from dataclasses import dataclass

import torch
from fuzz_truth import Truth, TruthAlone, build_in, positions_of
from test_families import FAMILIES, POSITIONS, build

from hf_quest import CritiPrefill, QuestCache, QuestError
from hf_quest.baselines import H2OCache, StreamingLLMCache, TOVACache
from hf_quest.cache import CACHE_NAME

CACHES = {"quest": QuestCache, "h2o": H2OCache, "tova": TOVACache, "streaming_llm": StreamingLLMCache}
BEYOND = 4096  # tokens of budget, more than any context here
LONGEST = POSITIONS - 40
MAX_ROWS = 4
# Float32 sums in another order differ by up to 6e-6 of the largest logit; what is read otherwise, by a hundredth.
TOLERANCE = 3e-4
# 16 bits round by 2^-8 in every layer, and the same weights in another order of sums may err as much again.
YARDSTICK = 3.0


class Wrong(Exception):
    """The cache did not do what it must."""


class Skip(Exception):
    """This step cannot be made here."""


class Interrupted(Exception):
    """Raised in the middle of a forward, on purpose."""


@dataclass
class Run:
    """A cache under test, and what is known of it."""

    config: dict  # JSON, see `fuzz.new_config`
    checks: int = 0
    longest: int = 0  # slots that were filled at a time

    def __post_init__(self):
        self.family, self.is_quest = self.config["family"], self.config["cache"] == "quest"
        self.is_exact = self.config["precision"] == "float32"
        self.dtype = torch.bfloat16 if self.config["precision"] == "bfloat16" else torch.float32
        self.model = build_in(self.family, "quest", self.dtype)
        self.is_local = FAMILIES[self.family].sparse == () or "layer_types" in FAMILIES[self.family].config
        prefill = self.config["prefill"]
        self.settings = {
            "family": self.family,
            "page_size": self.config["page_size"],
            "dense_layers": self.config["dense_layers"],
            "bounds_dtype": torch.int8 if self.config["int8"] else None,
            "prefill": CritiPrefill(**prefill) if prefill else None,
            "budget": self.config["budget"],
            "score": self.config["score"],
        }
        self.cache = self.new_cache()
        rows = self.config["rows"]
        self.is_alone = not self.is_quest and self.config["budget"] is not None
        truth = TruthAlone(self.settings, rows, self.new_cache) if self.is_alone else Truth(self.settings, rows)
        self.truth = truth

    def new_cache(self, make=None):
        budget = BEYOND if self.config["budget"] is None else self.config["budget"]
        options = {"budget": budget, "dense_layers": self.config["dense_layers"]}
        if self.is_quest:
            options |= {name: self.settings[name] for name in ("page_size", "bounds_dtype", "prefill", "score")}
            options |= {name: self.config[name] for name in ("max_cache_len", "compile")}
        return (make or CACHES[self.config["cache"]])(**options)

    @property
    def num_rows(self):
        return self.truth.text.ids.shape[0]

    @property
    def num_slots(self):
        return len(self.truth.text)

    @property
    def is_first(self):
        return self.num_slots == 0

    def do(self, operation):
        """Make one step, a dict with its kind, seed and numbers; Skip if it cannot be made here."""
        torch.manual_seed(operation["seed"])
        act = getattr(self, f"do_{operation['kind']}")
        arguments = {name: value for name, value in operation.items() if name not in ("kind", "seed", "mode")}
        with self.mode(operation["mode"]):
            act(**arguments)
        self.longest = max(self.longest, self.num_slots)
        found, expected = self.cache.get_seq_length(), self.num_slots
        if type(found) is not int or found != expected:
            raise Wrong(f"the cache says that it holds {found} tokens, and was fed {expected}")

    @contextlib.contextmanager
    def mode(self, mode):
        grad = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}[mode]
        is_autocast = self.config["precision"] == "autocast"
        with grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            yield

    # What is fed.

    def new_ids(self, num_new):
        """[B, T] tokens of few kinds, so that a lookup finds drafts."""
        return torch.randint(3, 12, (self.num_rows, num_new))

    def own_mask(self, shown):
        """[B, N + T]: what is a token of its row, and of the new slots those of `shown` [B, T]."""
        return torch.cat([self.truth.text.is_token.long(), shown.long()], dim=1)

    def check_room(self, num_new):
        if self.num_slots + num_new > LONGEST:
            raise Skip
        max_cache_len = self.config.get("max_cache_len")
        if self.is_quest and max_cache_len is not None and self.num_slots + num_new > max_cache_len:
            raise Skip

    def forward(self, ids, mask, positions=None, pieces=None, leave_out=False, call=None):
        """Forwards of `pieces` tokens each under a mask [B, N + T], and the check of their logits."""
        self.check_room(ids.shape[1])
        positions = positions_of(mask)[:, -ids.shape[1] :] if positions is None else positions
        pieces, first, logits = pieces or [ids.shape[1]], self.num_slots, []
        dtype = (torch.long, torch.bool, torch.float32)[int(torch.randint(3, ()))]
        for num_new in pieces:
            done = sum(piece.shape[1] for piece in logits)
            new = slice(done, done + num_new)
            options = {"position_ids": positions[:, new], CACHE_NAME: self.cache}
            if not leave_out:
                options["attention_mask"] = mask[:, : first + done + num_new].to(dtype)
            logits.append((call or self.model)(ids[:, new], **options).logits)
        self.check(torch.cat(logits, dim=1), self.truth.extend(ids, mask, positions, pieces), first)

    def check(self, logits, expected, first, slots=None):
        """Compare logits [B, T, V] of the queries in `slots`, by default from `first` on, where they are of tokens."""
        self.checks += 1
        slots = slice(first, None) if slots is None else slots
        is_token = self.truth.text.is_token[:, slots]
        logits, expected = logits.float(), expected.float()
        if logits.shape != expected.shape:
            raise Wrong(f"logits are {tuple(logits.shape)} and not {tuple(expected.shape)}")
        logits, expected = logits[is_token], expected[is_token]
        if not logits.isfinite().all():
            raise Wrong("logits are not finite")
        if not self.is_exact:
            if self.config["budget"] is None and self.settings["prefill"] is None:
                self.check_by_yardstick(logits, expected, first, is_token, slots)
            return
        distance = far(logits, expected)
        if distance > TOLERANCE:
            self.truth.check_sure(first, lambda noisy, exact: far(noisy, exact) > TOLERANCE)
            raise Wrong(f"logits differ by {distance:.2g} of the largest")

    def check_by_yardstick(self, logits, expected, first, is_token, slots):
        stock = self.truth.stock(first, self.dtype, self.config["precision"] == "autocast").float()
        if isinstance(slots, slice) and slots.start != first:
            stock = stock[:, slots.start - first :]
        error, allowed = (logits - expected).norm().item(), (stock[is_token] - expected).norm().item()
        if error > YARDSTICK * allowed + 1e-3 * expected.norm().item():
            raise Wrong(f"in {self.config['precision']} the error is {error / allowed:.2g} times that of stock")

    def do_prompt(self, tokens, padding, leave_out=False):
        """Several tokens; at the start of a text rows may be padded."""
        shown = torch.ones(self.num_rows, tokens, dtype=torch.long)
        if self.is_first:
            for row in range(1, self.num_rows):  # the first is the longest
                shown[row, : int(padding[row % len(padding)] * (tokens - 1))] = 0
        mask = self.own_mask(shown)
        self.forward(self.new_ids(tokens), mask, leave_out=leave_out and bool(mask.all()))

    def do_pieces(self, tokens, padding, piece):
        """The same in pieces, which may be single tokens."""
        shown = torch.ones(self.num_rows, tokens, dtype=torch.long)
        if self.is_first:
            for row in range(1, self.num_rows):
                shown[row, : int(padding[row % len(padding)] * (tokens - 1))] = 0
        pieces = [min(piece, tokens - done) for done in range(0, tokens, piece)]
        self.forward(self.new_ids(tokens), self.own_mask(shown), pieces=pieces)

    def do_steps(self, tokens, leave_out=False):
        """Single tokens."""
        mask = self.own_mask(torch.ones(self.num_rows, tokens))
        options = {"pieces": [1] * tokens, "leave_out": leave_out and bool(mask.all())}
        self.forward(self.new_ids(tokens), mask, **options)

    def do_hide(self, tokens, begin, end, row):
        """A part of the text is hidden from new tokens, in some rows."""
        mask = self.own_mask(torch.ones(self.num_rows, tokens))
        positions = positions_of(mask)[:, -tokens:]
        hidden = slice(int(begin * self.num_slots), int(end * self.num_slots))
        mask[slice(None) if row is None else row % self.num_rows, hidden] = 0
        self.forward(self.new_ids(tokens), mask, positions)

    def do_pause(self, tokens, rows, where):
        """Some rows have no token in the new slots, or none in the first or the last of several."""
        shown = torch.ones(self.num_rows, tokens)
        for row in {row % self.num_rows for row in rows}:
            shown[row, {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}[where]] = 0
        if not shown.any() or self.is_first or (self.is_alone and self.is_local):
            raise Skip  # windows count slots, with pauses, in the batch
        self.forward(self.new_ids(tokens), self.own_mask(shown))

    def do_own_mask(self, tokens, share):
        """A mask of four dimensions, which hides what it likes."""
        if self.is_local or self.is_alone:
            raise Skip
        self.check_room(tokens)
        first, ids = self.num_slots, self.new_ids(tokens)
        own = self.own_mask(torch.ones_like(ids))
        causal = torch.ones(tokens, first + tokens, dtype=torch.bool).tril(first)
        sees = own.bool()[:, None] & causal & (torch.rand(self.num_rows, tokens, first + tokens) > share)
        sees[:, torch.arange(tokens), torch.arange(first, first + tokens)] = True
        mask = torch.zeros(sees.shape, dtype=self.dtype).masked_fill(~sees, torch.finfo(self.dtype).min)[:, None]
        options = {"attention_mask": mask, "position_ids": positions_of(own)[:, first:], CACHE_NAME: self.cache}
        logits = self.model(ids, **options).logits
        expected = self.truth.extend_by_own_mask(ids, sees, positions_of(own)[:, first:])
        self.check(logits, expected, first)

    # generate

    def generate(self, tokens, padding, answer, hide=None, copies=1, pieces=None, **options):
        """Answers [B · copies, answer] to `tokens` more tokens, and the check of the logits that they come from."""
        if not self.is_first and self.num_slots + tokens + answer > LONGEST:
            raise Skip
        self.check_room(tokens + answer)
        shown = torch.ones(self.num_rows, tokens, dtype=torch.long)
        if self.is_first:
            for row in range(1, self.num_rows):
                shown[row, : int(padding[row % len(padding)] * (tokens - 1))] = 0
        mask, new = self.own_mask(shown), self.new_ids(tokens)
        if hide is not None:
            mask[:, int(hide[0] * self.num_slots) : int(hide[1] * self.num_slots)] = 0
        ids = torch.cat([self.truth.text.ids, new], dim=1)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=answer,
            return_dict_in_generate=True,
            output_logits=True,
            **{CACHE_NAME: self.cache, "do_sample": False, **options},
        )
        first, rows = self.num_slots, torch.arange(self.num_rows).repeat_interleave(copies)
        self.truth.rows(rows)
        fed = torch.cat([new[rows], output.sequences[:, ids.shape[1] : -1]], dim=1)
        positions = positions_of(mask)[rows, first:]
        later = positions[:, -1:] + torch.arange(1, answer)
        mask = torch.nn.functional.pad(mask[rows], (0, answer - 1), value=1)
        pieces = [*(pieces or [tokens]), *[1] * (answer - 1)]
        expected = self.truth.extend(fed, mask, torch.cat([positions, later], dim=1), pieces)
        logits = torch.stack(output.logits, dim=1)
        self.check(logits[:, :answer], expected[:, tokens - 1 :], first, slice(first + tokens - 1, None))

    def do_greedy(self, hide=None, **arguments):
        self.generate(hide=hide, **arguments)

    def do_sample(self, copies, **arguments):
        if not self.is_first:
            copies = 1
        copies = min(copies, MAX_ROWS // self.num_rows)
        self.generate(copies=copies, do_sample=True, top_k=20, num_return_sequences=copies, **arguments)

    def do_chunked(self, chunk, tokens, **arguments):
        """A prompt that `generate` itself cuts into chunks."""
        if not self.is_first:
            raise Skip  # Transformers 5.17 slices such a prompt from the start of the text
        pieces = [min(chunk, tokens - done) for done in range(0, tokens, chunk)]
        self.generate(tokens=tokens, pieces=pieces, prefill_chunk_size=chunk, **arguments)

    def drafted(self, **arguments):
        if self.num_rows != 1 or not self.is_first:
            raise Skip  # Transformers feeds a text again that the cache holds, with a stock cache too
        if self.is_quest:
            self.generate(**arguments)
            return
        with self.refused(QuestError, "cannot take tokens back"):
            self.generate(**arguments)

    def do_lookup(self, drafts, **arguments):
        self.drafted(prompt_lookup_num_tokens=drafts, **arguments)

    def do_assistant(self, **arguments):
        self.drafted(assistant_model=build("qwen3", "sdpa"), **arguments)

    def do_beams(self, tokens, padding, beams, answer):
        """The scores of beams; the cache itself stays as it was."""
        beams = min(beams, MAX_ROWS // self.num_rows)
        if beams < 2:
            raise Skip
        self.check_room(tokens + answer)
        kept_cache, kept_truth = copy.deepcopy(self.cache), copy.deepcopy(self.truth)
        if not self.is_first:
            self.cache.batch_repeat_interleave(beams)
        shown = torch.ones(self.num_rows, tokens, dtype=torch.long)
        mask, new, first = self.own_mask(shown), self.new_ids(tokens), self.num_slots
        ids = torch.cat([self.truth.text.ids, new], dim=1)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=answer,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
            **{CACHE_NAME: self.cache, "do_sample": False},
        )
        rows = torch.arange(self.num_rows).repeat_interleave(beams)
        self.truth.rows(rows)
        answers = output.sequences[:, ids.shape[1] :]
        fed, positions = torch.cat([new[rows], answers[:, :-1]], dim=1), positions_of(mask)[rows, first:]
        positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, answer)], dim=1)
        mask = torch.nn.functional.pad(mask[rows], (0, answer - 1), value=1)
        expected = self.truth.extend(fed, mask, positions, [tokens, *[1] * (answer - 1)])

        def scores(logits):
            log_probs = logits[:, tokens - 1 :].float().log_softmax(dim=-1)
            return log_probs.gather(2, answers[..., None]).sum(dim=(1, 2))

        def is_far(logits, others):  # a sum of `answer` differences of logits, each of a few roundings
            return (scores(logits) - scores(others)).abs().max().item() > TOLERANCE * 10 * answer

        self.checks += 1
        if self.is_exact:
            found = (output.sequences_scores - scores(expected)).abs().max().item()
            if found > TOLERANCE * 10 * answer:
                self.truth.check_sure(first, is_far)
                raise Wrong(f"scores of beams differ by {found:.2g}")
        self.cache, self.truth = kept_cache, kept_truth

    # What is done to a cache.

    def do_crop(self, share):
        length = int(share * self.num_slots)
        removed = length - self.num_slots
        if not self.is_quest:
            if self.is_first:
                raise Skip
            with self.refused(QuestError, "cannot take tokens back"):
                self.cache.crop(removed - 1)
            return
        if not self.truth.can_crop(length):
            raise Skip
        try:
            self.cache.crop(removed)
        except QuestError as error:
            most = re.search(r"crop cannot take back.* Take back (\d+) at most", str(error))
            if not self.is_local or most is None:
                raise
            if -removed <= int(most[1]) or self.longest - length <= self.config["room"]:
                raise Wrong(f"crop({removed}) was refused: {error}") from error
            length = self.num_slots - int(most[1])
            if not self.truth.can_crop(length):
                raise Skip from error
            self.cache.crop(length - self.num_slots)
        self.truth.crop(length)

    def do_reorder(self, rows):
        rows = torch.tensor([row % self.num_rows for row in rows][: self.num_rows])
        rows = torch.nn.functional.pad(rows, (0, self.num_rows - len(rows)))
        self.cache.reorder_cache(rows)
        self.truth.rows(rows)

    def do_repeat(self, repeats):
        repeats = min(repeats, MAX_ROWS // self.num_rows)
        self.cache.batch_repeat_interleave(repeats)
        self.truth.rows(torch.arange(self.num_rows).repeat_interleave(repeats))

    def do_select(self, rows, by_mask):
        rows = torch.tensor([row % self.num_rows for row in rows][:MAX_ROWS])
        if by_mask:
            rows = torch.arange(self.num_rows)[:, None].eq(rows).any(dim=1)
        self.cache.batch_select_indices(rows)
        self.truth.rows(rows)

    def do_deepcopy(self, spoil):
        self.go_on_with(copy.deepcopy(self.cache), spoil)

    def do_pickle(self, spoil, by_torch):
        buffer = io.BytesIO()
        (torch.save if by_torch else pickle.dump)(self.cache, buffer)
        buffer.seek(0)
        self.go_on_with(torch.load(buffer, weights_only=False) if by_torch else pickle.load(buffer), spoil)

    def go_on_with(self, cache, spoil):
        """Use a copy from here on; `spoil` the original, which must not be part of it."""
        if spoil and not self.is_first:
            self.model(self.new_ids(1), **{CACHE_NAME: self.cache})
            self.cache.reset()
        self.cache = cache

    def do_reset(self, rows):
        self.cache.reset()
        self.truth.reset(rows)
        self.longest = 0

    def do_budget(self, pages):
        if self.config["budget"] is None and not self.is_quest:
            raise Skip  # what is evicted from then on depends on all that was seen
        budget = pages * self.config["page_size"]
        self.cache.budget = budget
        self.config = {**self.config, "budget": budget}
        self.truth.set_budget(budget)

    def do_offload(self):
        for layer in self.cache.layers:
            layer.offload()
            layer.prefetch()

    def do_by_hand(self):
        """A new cache, filled with the keys and values of this one."""
        if self.is_alone or self.is_local:
            raise Skip
        cache = self.new_cache()
        for layer_idx, layer in enumerate(self.cache.layers):
            keys, values = (stored[:, :, : self.num_slots] for stored in (layer.keys, layer.values))
            if self.num_slots:
                cache.update(keys.clone(), values.clone(), layer_idx)
        self.cache = cache

    def do_from_cache(self):
        """A QuestCache that takes over what this one holds."""
        if not self.is_quest or self.is_first:
            raise Skip
        self.cache = self.new_cache(functools.partial(QuestCache.from_cache, self.cache))

    def do_interrupted(self, tokens, layer, place):
        """A forward that does not come through; the next one says so, if it must, and can be repeated."""
        if self.is_first:
            raise Skip
        self.check_room(tokens)
        layers = self.model.model.layers
        module = getattr(layers[layer % len(layers)], place)

        def interrupt(*_):
            raise Interrupted

        hook = module.register_forward_pre_hook(interrupt)
        mask, ids = self.own_mask(torch.ones(self.num_rows, tokens)), self.new_ids(tokens)
        with contextlib.suppress(Interrupted):
            self.forward(ids, mask)
        hook.remove()
        layer = layer % len(layers)
        has_begun = (layer, place) > (0, "self_attn") or place == "mlp"
        if place == "mlp" and layer == len(layers) - 1:  # for the cache this forward has ended
            self.truth.extend(ids, mask, positions_of(mask)[:, -tokens:], [tokens])
        elif has_begun:
            with self.refused(QuestError, "put back"):
                self.forward(ids, mask)

    def do_refused(self, what):
        """What must be refused, and change nothing."""
        if self.is_first:
            raise Skip
        ids = torch.randint(3, 12, (self.num_rows + 1, 1))
        if what == "rows":
            with self.refused(ValueError, "rows and this batch has"):
                self.model(ids, **{CACHE_NAME: self.cache})
        elif what == "budget":
            with self.refused(ValueError, "budget"):
                self.cache.budget = -1
        elif what == "crop":
            with self.refused((ValueError, QuestError), "crop"):
                self.cache.crop(-self.num_slots - 1)

    @contextlib.contextmanager
    def refused(self, kinds, message):
        try:
            yield
        except kinds as error:
            if message not in str(error):
                raise
        else:
            raise Wrong("what must be refused was done")


def far(logits, expected):
    """The largest difference, in shares of the largest logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item() if logits.numel() else 0.0
