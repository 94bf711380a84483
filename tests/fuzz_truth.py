"""Two ways to know what a cache must answer: a fresh forward over all that it was fed, or each row in a cache alone."""

import copy
import functools

import torch
from fuzz_oracle import Oracle, Text, is_left_padding, leading_zeros, masks
from test_families import COMMON, FAMILIES, build

from hf_quest import CACHE_NAME, QuestError

NOISE = 1e-6  # of weights or of what selects, in shares of its size: the rounding of float32 and some more

oracle = Oracle()


class Unsure(Exception):
    """Noise no larger than rounding decides what is read: no cache can be judged by it."""


def positions_of(mask):
    """As `generate` numbers the tokens of a [B, N] mask."""
    return (mask.long().cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)


class Truth:
    """What the cache was fed and what it should answer, by one fresh forward over all of it."""

    def __init__(self, config, batch_size):
        self.config = config
        self.reset(batch_size)

    def reset(self, batch_size):
        self.text = Text.empty(batch_size)

    def rows(self, rows):
        self.text = self.text.rows(rows)

    def crop(self, num_slots):
        self.text = self.text.cropped(num_slots)

    def can_crop(self, num_slots):
        """Whether no segment of a prompt is cut, whose blocks were chosen by all its queries."""
        segment = self.text.segment
        is_cut = torch.zeros(())
        if 0 < num_slots < len(self.text):
            is_cut = (segment[:, num_slots - 1] >= 0) & (segment[:, num_slots - 1] == segment[:, num_slots])
        return not is_cut.any()

    def set_budget(self, budget):
        self.config = {**self.config, "budget": budget}

    def extend(self, ids, mask, positions, pieces):
        """Take over T more slots, [B, T], read in forwards of `pieces` tokens under a mask [B, N + T].

        Returns:
            [B, T, V] logits.
        """
        first = len(self.text)
        for num_new in pieces:
            old, end = len(self.text), len(self.text) + num_new
            new = slice(old - first, end - first)
            how = self.how_read(mask[:, :end], num_new)
            self.text = self.text.grown(ids[:, new], positions[:, new], mask[:, :end], *how)
        return self.expected(first)

    def extend_by_own_mask(self, ids, sees, positions):
        """The same under a mask of each query's own, [B, T, N + T] bool, with which nothing is selected."""
        first = len(self.text)
        dense = torch.zeros_like(ids)
        self.text = self.text.grown(ids, positions, torch.ones(ids.shape[0], first + ids.shape[1]), dense, dense - 1)
        self.text.sees[:, first:] = sees
        return self.expected(first)

    def how_read(self, mask, num_new):
        """[B, T] pages and segments of the queries of one forward, as the documentation has it."""
        pages = torch.zeros(mask.shape[0], num_new, dtype=torch.long)
        segment = pages - 1
        prefill, end = self.config["prefill"], mask.shape[1]
        if not is_left_padding(mask):
            return pages, segment
        if num_new == 1:
            return pages + self.num_pages(), segment
        if prefill is not None:
            for row, padding in enumerate(leading_zeros(mask).tolist()):
                start, stop = prefill.segments(max(0, end - num_new - padding), end - padding)
                position = torch.arange(end - num_new, end) - padding
                begin = position.div(prefill.segment_size, rounding_mode="floor") * prefill.segment_size
                segment[row] = begin.masked_fill((position < start) | (position >= stop), -1)
        return pages, segment

    def num_pages(self):
        budget, page_size = self.config["budget"], self.config["page_size"]
        return 0 if budget is None else -(-budget // page_size)

    def expected(self, first):
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            return oracle.logits(self.config["family"], self.text, first, self.config)

    def check_sure(self, first, is_far):
        """Raise Unsure if a little noise where pages and blocks are chosen makes other answers."""
        exact = self.expected(first)
        for seed in range(1, 5):
            if is_far(oracle.logits(self.config["family"], self.text, first, self.config, noise=seed * NOISE), exact):
                raise Unsure

    def stock(self, first, dtype, autocast):
        """What stock Transformers answers in this precision."""
        model = build_in(self.config["family"], FAMILIES[self.config["family"]].dense, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
            mask = masks(self.config["family"], self.text.sees, dtype)
            return model(self.text.ids, attention_mask=mask, position_ids=self.text.positions).logits[:, first:]


class TruthAlone(Truth):
    """The same by a cache of its own for every row, fed what is a token of the row: for caches that are no Quest's."""

    def __init__(self, config, batch_size, cache_class):
        self.cache_class = cache_class
        super().__init__(config, batch_size)

    def reset(self, batch_size):
        super().reset(batch_size)
        options = {name: self.config[name] for name in ("budget", "dense_layers")}
        self.caches = [tuple(self.cache_class(**options) for _ in range(2)) for _ in range(batch_size)]

    def rows(self, rows):
        super().rows(rows)
        self.caches = [copy.deepcopy(self.caches[row]) for row in torch.arange(len(self.caches))[rows].tolist()]

    def crop(self, num_slots):
        for row, caches in enumerate(self.caches):
            removed = int(self.text.is_token[row, num_slots:].sum())
            for cache in caches if removed else ():
                try:
                    cache.crop(-removed)
                except QuestError as error:  # that of another row, or with noise, may remember more
                    raise Unsure from error
        super().crop(num_slots)

    def set_budget(self, budget):
        super().set_budget(budget)
        for cache in sum(self.caches, ()):
            cache.budget = budget

    def extend(self, ids, mask, positions, pieces):
        first, logits = len(self.text), []
        for num_new in pieces:
            old, end = len(self.text), len(self.text) + num_new
            new = slice(old - first, end - first)
            dense = torch.zeros_like(ids[:, new])
            self.text = self.text.grown(ids[:, new], positions[:, new], mask[:, :end], dense, dense - 1)
            logits.append(self.read(old, mask[:, :end]))
        self.logits, self.noisy_logits = torch.cat(logits, dim=2)
        return self.logits

    def read(self, old, mask):
        """[2, B, T, V] logits, of the family and of one with a little noise in its weights."""
        text = self.text
        logits = torch.zeros(2, len(self.caches), mask.shape[1] - old, COMMON["vocab_size"])
        for row, caches in enumerate(self.caches):
            slots = text.is_token[row].nonzero()[:, 0]
            new = slots[slots >= old]
            for idx, (cache, model) in enumerate(zip(caches, self.models(), strict=True)):
                if len(new) == 0:
                    continue
                options = {"attention_mask": mask[row : row + 1, slots], "position_ids": text.positions[None, row, new]}
                with torch.no_grad(), torch.autocast("cpu", enabled=False):
                    output = model(text.ids[None, row, new], **options, **{CACHE_NAME: cache}).logits[0]
                logits[idx, row, new - old] = output
        return logits

    def models(self):
        return build(self.config["family"], "quest"), noisy(self.config["family"])

    def check_sure(self, first, is_far):
        if is_far(self.noisy_logits, self.logits):
            raise Unsure


@functools.cache
def noisy(family):
    """The family with noise of no more than a few roundings of float32 in its weights."""
    model, generator = copy.deepcopy(build(family, "quest")), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + NOISE * torch.randn(parameter.shape, generator=generator))
    return model


@functools.cache
def build_in(family, implementation, dtype):
    model = build(family, implementation)
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
