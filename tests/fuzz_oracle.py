"""What a cache must answer by the specification: one fresh forward over all that each row was fed."""

import math
from dataclasses import dataclass, fields

import torch
from test_families import FAMILIES, WINDOW, build
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hf_quest import reference, stripes
from hf_quest.codes import find_candidates, refine, refresh_codes
from hf_quest.prompts import segments


@dataclass
class Text:
    """What the slots of a cache's rows hold, and how each was read. All grow by slots and are indexed by rows."""

    ids: torch.Tensor  # [B, N]
    positions: torch.Tensor  # [B, N]
    sees: torch.Tensor  # [B, N, N] bool: the query in a slot, by its mask, and the slots before it and its own
    start: torch.Tensor  # [B, N] slots at the start of the row that the query's mask hides
    pages: torch.Tensor  # [B, N] how many pages the query selects, 0 for all
    segment: (
        torch.Tensor
    )  # [B, N] where the query's sparse segment of a prompt begins, in tokens of the row, -1 for none

    @classmethod
    def empty(cls, batch_size):
        slots = torch.zeros(batch_size, 0, dtype=torch.long)
        return cls(slots, slots, slots[..., None].expand(-1, -1, 0).bool(), slots, slots, slots)

    def __len__(self):
        return self.ids.shape[1]

    @property
    def is_token(self):
        """[B, N] bool: neither padding nor a pause."""
        return self.sees.diagonal(dim1=1, dim2=2)

    def grown(self, ids, positions, mask, pages, segment):
        """With T more slots, [B, T] each, that were read by one forward under a mask [B, N + T]."""
        num_old, num_new = len(self), ids.shape[1]
        causal = torch.ones(num_new, num_old + num_new, dtype=torch.bool).tril(num_old)
        old = torch.nn.functional.pad(self.sees, (0, num_new))
        start = leading_zeros(mask)[:, None].expand(-1, num_new)
        new = (ids, positions, torch.cat([old, mask.bool()[:, None] & causal], dim=1), start, pages, segment)
        parts = {}
        for part, values in zip(fields(self), new, strict=True):
            is_square = part.name == "sees"
            parts[part.name] = values if is_square else torch.cat([getattr(self, part.name), values], dim=1)
        return Text(**parts)

    def rows(self, rows):
        return Text(*(getattr(self, part.name)[rows] for part in fields(self)))

    def cropped(self, num_slots):
        parts = (getattr(self, part.name)[:, :num_slots] for part in fields(self))
        return Text(*(part[:, :, :num_slots] if part.dim() == 3 else part for part in parts))


def leading_zeros(mask):
    """[B]: of a [B, N] mask."""
    return (mask.cumsum(dim=-1) == 0).sum(dim=-1)


def is_left_padding(mask):
    """Whether a [B, N] mask hides nothing after a row's first one."""
    return bool((mask.long().sum(dim=-1) + leading_zeros(mask) == mask.shape[1]).all())


class Oracle:
    """Attention over a whole Text at once, each query under its mask and over what it selects, and nothing stored."""

    def __init__(self):
        self.noise = 0.0  # of what selections are made by, in shares of its size
        AttentionInterface.register("fuzz_oracle", self)
        AttentionMaskInterface.register("fuzz_oracle", eager_mask)

    @torch.no_grad()
    def logits(self, family, text, first, config, noise=0.0):
        """[B, N - first, V]: of the queries from slot `first` on."""
        self.text, self.config, self.noise, self.earlier = text, config, noise, {}
        self.full_layers = full_layers(family)
        self.generator = torch.Generator().manual_seed(int(noise * 1e9))
        model = build(family, "fuzz_oracle")
        return model(text.ids, attention_mask=masks(family, text.sees), position_ids=text.positions).logits[:, first:]

    def __call__(
        self, module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, sinks=None, **kwargs
    ):
        group = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        visible = attention_mask
        if module.layer_idx in self.full_layers:
            chosen = self.chosen(module.layer_idx, query, key, scaling)
            visible = visible & chosen.repeat_interleave(group, dim=1)
        logits = logits.masked_fill(~visible, -torch.inf)
        sinks = s_aux if sinks is None else sinks
        if sinks is not None:
            logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=-1)
        weights = logits.softmax(dim=-1)[..., : key.shape[2]].nan_to_num(0.0)
        return (weights @ value.repeat_interleave(group, dim=1)).transpose(1, 2).contiguous(), None

    def chosen(self, layer_idx, query, key, scaling):
        """[B, Hkv, N, N] bool: which slots each query attends by its pages or by its segment's blocks."""
        chosen = torch.ones(key.shape[0], key.shape[1], len(self.text), len(self.text), dtype=torch.bool)
        query, key = self.blurred(query), self.blurred(key)
        prefill = self.config["prefill"]
        for row in range(len(key)):
            if layer_idx >= self.config["dense_layers"]:
                self.choose_pages(chosen[row], row, query[row], key[row], scaling)
            if prefill is not None and layer_idx >= prefill.dense_layers:
                self.choose_blocks(chosen[row], row, query[row], key[row], scaling)
        return chosen

    def blurred(self, tensor):
        if not self.noise:
            return tensor
        size = tensor.square().mean().sqrt()
        return tensor + self.noise * size * torch.randn(tensor.shape, generator=self.generator)

    def choose_pages(self, chosen, row, query, key, scaling):
        text, page_size = self.text, self.config["page_size"]
        for start in text.start[row][text.pages[row] > 0].unique().tolist():
            slots = ((text.pages[row] > 0) & (text.start[row] == start)).nonzero()[:, 0]
            padding = torch.tensor([start])
            bounds, scales = bounds_of(key, padding, page_size, self.config["bounds_dtype"])
            codes = self.codes_of(key, bounds, scales, padding)
            token = torch.arange(len(text)) - start
            for slot in slots.tolist():
                where = (slot + 1, padding, page_size)
                alone = (query[None, :, slot : slot + 1], bounds, scales)
                scores = reference.estimate(*alone, scaling, self.config["score"], where)
                ids, size = self.ids_of(scores, alone, codes, scaling, text.pages[row, slot].item(), where)
                number = token.div(size, rounding_mode="floor")
                chosen[:, slot] = (number[None, :, None] == ids[0, :, 0, None]).any(dim=-1)

    def codes_of(self, key, bounds, scales, padding):
        """Of one row's keys, [Hkv, N, D], or None."""
        bits, num_tokens, page_size = self.config["codes"], key.shape[1], self.config["page_size"]
        if bits is None:
            return None
        codes = torch.zeros(1, *key.shape[:2], -(-key.shape[2] * bits // 8), dtype=torch.uint8)
        refresh_codes(key[None], bounds, scales, codes, num_tokens, num_tokens, padding, page_size, bits)
        return codes

    def ids_of(self, scores, alone, codes, scaling, num_pages, where):
        """(ids [1, Hkv, 1, K] of what one query attends, tokens that each stands for)."""
        length, padding, page_size = where
        bits, keeps_first = self.config["codes"], self.config["score"].keeps_first
        if bits is None:
            return reference.select(scores, length, padding, num_pages, page_size, keeps_first), page_size
        times = math.inf if self.config["candidates"] is None else self.config["candidates"]
        num_stripes = stripes.count(num_pages * page_size, page_size)
        found = (length, padding, times * num_pages, page_size, keeps_first, num_stripes)
        candidates = find_candidates(scores, *found)
        how = (bits, scaling, num_pages * page_size, "sum", self.config["mass"])
        return refine(*alone, codes, candidates, *where, *how), 1

    def choose_blocks(self, chosen, row, query, key, scaling):
        text, prefill = self.text, self.config["prefill"]
        for begin in text.segment[row].unique().tolist():
            if begin < 0:
                continue
            slots = (text.segment[row] == begin).nonzero()[:, 0]
            start = text.start[row, slots[0]].item()
            tokens = key[:, start : slots[-1] + 1]
            scores = segments.estimate(query[:, slots], tokens, begin, scaling, prefill)
            scores = segments.fuse(scores, self.earlier, (row, begin), prefill.layer_fusion)
            block_ids = segments.select(scores, prefill.num_selected, prefill.score == "mass")[:, 0]  # [Hkv, K]
            position = torch.arange(len(text)) - start
            block = position.div(prefill.block_size, rounding_mode="floor")
            is_chosen = (block[None, :, None] == block_ids[:, None]).any(dim=-1) | (position >= begin)
            chosen[:, slots] = is_chosen[:, None]


def bounds_of(key, padding, page_size, bounds_dtype):
    """Bounds and scales of one row's keys, [Hkv, N, D], as `reference.append` would have them."""
    num_kv_heads, num_tokens, head_dim = key.shape
    num_pages = -(-num_tokens // page_size)
    bounds, scales = torch.zeros(1, num_kv_heads, num_pages, 2, head_dim, dtype=bounds_dtype or key.dtype), None
    if bounds_dtype is not None:
        num_scales = -(-head_dim // reference.SCALE_BLOCK)
        scales = torch.zeros(1, num_kv_heads, num_pages, num_scales, dtype=torch.uint8)
    reference.refresh_bounds(key[None], bounds, scales, num_tokens, num_tokens, padding, page_size)
    return bounds, scales


def full_layers(family):
    """The layers that attend everything: those that may select, and the first, as it is of their kind."""
    sparse = FAMILIES[family].sparse
    is_first = "layer_types" not in FAMILIES[family].config and sparse
    return (0, *sparse) if is_first else sparse


def masks(family, sees, dtype=None):
    """What a model takes for its mask, of the bool [B, N, N] one of its full layers; added if there is a `dtype`."""
    num_slots = sees.shape[1]
    local = sees & torch.ones(num_slots, num_slots, dtype=torch.bool).triu(1 - WINDOW)
    by_type = {"full_attention": sees[:, None], "sliding_attention": local[:, None]}
    if dtype is not None:
        lowest = torch.finfo(dtype).min
        by_type = {
            name: torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest) for name, mask in by_type.items()
        }
    if "layer_types" in FAMILIES[family].config:
        return by_type
    return by_type["full_attention" if FAMILIES[family].sparse else "sliding_attention"]
