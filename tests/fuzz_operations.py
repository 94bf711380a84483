"""What a fuzzer does to a cache, step by step, and what each step must give: `do_` and the kind of operation."""

import contextlib
import copy
import functools
import io
import pickle
import re
import tempfile

import torch
from fuzz_generate import Generating
from fuzz_run import MAX_ROWS, Interrupted, Skip, Wrong
from fuzz_truth import positions_of

from hf_quest import CACHE_NAME, QuestCache, QuestError


class Operations(Generating):
    """A cache under test, and all that can be done to it."""

    def do_prompt(self, tokens, padding, leave_out=False):
        """Several tokens; at the start of a text rows may be padded."""
        shown = self.shown_of(tokens, padding)
        mask = self.own_mask(shown)
        self.forward(self.new_ids(tokens), mask, leave_out=leave_out and bool(mask.all()))

    def do_pieces(self, tokens, padding, piece):
        """The same in pieces, which may be single tokens."""
        shown = self.shown_of(tokens, padding)
        self.check_alike(shown)
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
        self.check_alike(mask)
        self.forward(self.new_ids(tokens), mask, positions)

    do_window = do_hide  # of its beginning, which is as left padding

    def do_pause(self, tokens, rows, where):
        """Some rows have no token in the new slots, or none in the first or the last of several."""
        shown = torch.ones(self.num_rows, tokens)
        for row in {row % self.num_rows for row in rows}:
            shown[row, {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}[where]] = 0
        if not shown.any() or self.is_first or (self.is_alone and (self.is_local or self.remembers)):
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

    def do_crop(self, share):
        length = int(share * self.num_slots)
        removed = length - self.num_slots
        if self.evicts:
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
            if most is None or not (self.is_local or self.remembers):
                raise
            is_near = not self.remembers and self.longest - length <= self.config["room"]
            if -removed <= int(most[1]) or is_near:
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

    def do_saved(self, spoil):
        if self.is_first:
            raise Skip
        with tempfile.TemporaryDirectory() as parent:
            self.cache.save(f"{parent}/saved", self.model)
            loaded = type(self.cache).load(f"{parent}/saved", self.model)
        self.go_on_with(loaded, spoil)

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
