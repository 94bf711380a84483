"""A cache under test: what it is fed, and the check of what it answers."""

import contextlib
import copy
import functools
from dataclasses import dataclass

import torch
from fuzz_truth import Truth, TruthAlone, build_in, positions_of
from test_families import FAMILIES, POSITIONS

from hf_quest import (
    CACHE_NAME,
    CascadingCache,
    CritiPrefill,
    H2OCache,
    PageReads,
    QuestCache,
    RecycledAttentionCache,
    SqueezedAttentionCache,
    StreamingLLMCache,
    SubGenCache,
    ThinKCache,
    TokenSelectCache,
    TOVACache,
    compile_prompts,
)
from hf_quest.reference import Score

EVICTING = {
    "h2o": H2OCache,
    "tova": TOVACache,
    "streaming_llm": StreamingLLMCache,
    "cascading": CascadingCache,
    "think": ThinKCache,
    "subgen": SubGenCache,
}
REMEMBERING = {  # which read everything for masks that are more than causal, in all rows of a batch
    "recycled": functools.partial(RecycledAttentionCache, stride=4, similarity=0.3),
    "token_select": functools.partial(TokenSelectCache, similarity=0.3),
    "squeezed": functools.partial(SqueezedAttentionCache, share=0.3, num_newest=3),
}
CACHES = {"quest": QuestCache, **EVICTING, **REMEMBERING}
BY_CODES = ("codes", "candidates", "mass")
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
        self.evicts, self.remembers = (self.config["cache"] in kinds for kinds in (EVICTING, REMEMBERING))
        self.is_exact = self.config["precision"] == "float32"
        self.dtype = torch.bfloat16 if self.config["precision"] == "bfloat16" else torch.float32
        self.model = (compiled if self.config["compiles_prompts"] else build_in)(self.family, "quest", self.dtype)
        self.is_local = FAMILIES[self.family].sparse == () or "layer_types" in FAMILIES[self.family].config
        prefill = self.config["prefill"]
        self.settings = {
            "family": self.family,
            "page_size": self.config["page_size"],
            "dense_layers": self.config["dense_layers"],
            "bounds_dtype": torch.int8 if self.config["int8"] else None,
            "prefill": CritiPrefill(**prefill) if prefill else None,
            "budget": self.config["budget"],
            "score": Score(*self.config["score"]),
            **{name: self.config[name] for name in BY_CODES},
        }
        self.cache = self.new_cache()
        rows = self.config["rows"]
        self.is_alone = not self.is_quest and self.config["budget"] is not None
        cache_class = CACHES[self.config["cache"]]
        self.truth = TruthAlone(self.settings, rows, cache_class) if self.is_alone else Truth(self.settings, rows)

    def new_cache(self, make=None):
        budget = BEYOND if self.config["budget"] is None else self.config["budget"]
        options = {"budget": budget, "dense_layers": self.config["dense_layers"]}
        if self.is_quest:
            options |= {
                name: self.settings[name] for name in ("page_size", "bounds_dtype", "prefill", "score", *BY_CODES)
            }
            options |= {name: self.config[name] for name in ("max_cache_len", "compile")}
            options["offloading"] = self.config["offloading"]
        cache = (make or CACHES[self.config["cache"]])(**options)
        cache.watcher = PageReads() if self.config["is_watched"] and self.is_quest else None
        return cache

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

    def new_ids(self, num_new):
        """[B, T] tokens of few kinds, so that a lookup finds drafts."""
        return torch.randint(3, 12, (self.num_rows, num_new))

    def own_mask(self, shown):
        """[B, N + T]: what is a token of its row, and of the new slots those of `shown` [B, T]."""
        return torch.cat([self.truth.text.is_token.long(), shown.long()], dim=1)

    def shown_of(self, tokens, padding):
        """[B, T] of a prompt: all ones, or at the start of a text with padding in every row but the first."""
        shown = torch.ones(self.num_rows, tokens, dtype=torch.long)
        for row in range(1, self.num_rows if self.is_first else 0):
            shown[row, : int(padding[row % len(padding)] * (tokens - 1))] = 0
        return shown

    def check_alike(self, mask):
        """Skip if a method that remembers reads a row of this mask otherwise in a batch than alone."""
        if self.remembers and self.num_rows > 1 and not mask.bool().all():
            raise Skip

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

    @contextlib.contextmanager
    def refused(self, kinds, message):
        try:
            yield
        except kinds as error:
            if message not in str(error):
                raise
        else:
            raise Wrong("what must be refused was done")


@functools.cache
def compiled(family, implementation, dtype):
    """A model whose prompts run in graphs of the same operations, which give the same bits."""
    return compile_prompts(copy.deepcopy(build_in(family, implementation, dtype)), backend="eager")


def far(logits, expected):
    """The largest difference, in shares of the largest logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item() if logits.numel() else 0.0
