"""The registered mask function, and what the attention masks of a forward mean to a cache and its layers."""

import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers.masking_utils import causal_mask_function, eager_mask, or_masks, sdpa_mask

from . import generate
from .served import check_model, supports_sdpa

EITHER = or_masks(causal_mask_function).__code__
COMPARED = 1 << 26  # elements of a mask that are compared at a time


class MaskLength(int):
    """How many keys an attention mask is asked for, and by which cache: its own way to the mask function."""

    cache: Any  # a seam.forwards.Forwards

    def __new__(cls, num_keys, cache):
        length = super().__new__(cls, num_keys)
        length.cache = cache
        return length


@dataclass
class Made:
    """A mask that the mask function made for the forward under way."""

    mask: weakref.ref
    shape: tuple
    left_padding: tuple | None  # slots without a token at the start of each row; None: more than causal, or local


@dataclass
class Masks:
    """What a cache knows of the masks of the forward under way and of the last one.

    Transformers copies masks on their way to the attention (`.contiguous()`, `.to()`), and attributes of a tensor are
    lost then. So the meaning of a mask is kept here, and is found by the tensor itself or, for a copy, by its content.
    """

    num_known: int | None = None  # keys of the last forward whose mask was causal with left padding
    asked: int | None = None  # keys for which the forward under way was asked for a mask, whatever it says
    decided: tuple | None = None  # (keys, left padding or None) of the forward under way
    empty_rows: tuple = ()  # of the forward under way, if it is of one token: rows that have no token yet
    is_begun: bool = False  # the forward under way has reached the cache; the next mask is for another one
    made: list = field(default_factory=list)  # of Made
    are_changed: bool = False  # the attention gets other masks than the mask function made

    def __getstate__(self):
        return {**self.__dict__, "made": []}  # weak references are not copied, and no copy is in a forward

    def forget(self):
        """The rows or tokens of the cache changed: the next mask has to be looked at."""
        self.num_known, self.decided, self.made = None, None, []

    def prepare(self):
        """The first mask of a forward is asked for, or it goes without."""
        if self.is_begun:
            self.asked, self.decided, self.empty_rows, self.made, self.is_begun = None, None, (), [], False

    def ask(self, num_keys):
        """A mask of the forward under way is asked for."""
        self.prepare()
        self.asked = num_keys

    def begin(self):
        """The forward has reached the cache: the next mask is for another one."""
        self.prepare()
        self.is_begun = True

    def go_on(self, num_keys, left_padding):
        """The next forward is of one token, and its mask, which nobody makes, goes on as the last one."""
        self.ask(num_keys)
        self.num_known, self.decided = num_keys, (num_keys, left_padding)

    @property
    def left_padding(self):
        """What was decided for the forward under way, or None."""
        return None if self.decided is None else self.decided[1]

    def decide(self, num_new, num_keys, attention_mask, batch_size, left_padding):
        """The left padding, a tuple of B ints, of a causal forward, or None if its mask hides anything else.

        Args:
            attention_mask: [B, N] bool or int, or None for one that hides nothing.
            left_padding: that of the last forward, which a mask known to go on as the last one needs no look for.
        """
        is_next = num_new == 1 and self.num_known is not None and self.num_known <= num_keys <= self.num_known + 1
        if attention_mask is None:
            # Asked again by a model for which `generate` has made the masks, and none was needed.
            is_decided = self.decided is not None and self.decided[0] == num_keys
            found = self.decided[1] if is_decided else (0,) * batch_size
        elif is_next and len(left_padding) == batch_size and generate.continues_its_masks():
            found = left_padding
        else:
            found = count_left_padding(attention_mask, num_keys)
        if found is not None and num_new == 1:  # a row that has no token yet has to see something: its newest slot
            self.empty_rows = tuple(row for row, padding in enumerate(found) if padding >= num_keys)
            found = tuple(min(padding, num_keys - 1) for padding in found)
        self.decided = (num_keys, found)
        self.num_known = None if found is None or self.empty_rows else num_keys
        return found

    def remember(self, mask, left_padding):
        self.made.append(Made(weakref.ref(mask), tuple(mask.shape), left_padding))

    def is_plain(self, mask):
        """Whether a mask that the attention got is no more than causal with the left padding that was decided."""
        if mask is None:
            return True
        shape = tuple(mask.shape)
        for made in self.made:
            if made.mask() is mask:
                return made.left_padding is not None
        alike = [made for made in self.made if made.shape == shape]
        for made in alike:
            if made.left_padding is not None and is_causal(mask, made.left_padding):
                self.remember(mask, made.left_padding)
                return True
        if alike and mask.dtype == torch.bool:  # a copy of a local layer's
            self.remember(mask, None)
        elif self.decided is not None:
            self.are_changed = True
        return False


def quest_mask(*, kv_length, config=None, **arguments):
    """The mask function behind `attn_implementation="quest"`: SDPA's, and what Quest needs to know about it.

    How long the context is does not make a layer local (a window, chunks), but whether positions of the model lie
    beyond its reach, `local_size`: a row is longer in a batch than alone, and must have the same sparse layers.

    With a QuestCache the mask of one new token does not grow with the context, since a captured graph could not have
    that: there is none where it is causal with left padding and nothing else, and that of a local layer is [B, 1, 1,
    local_size], for the newest slots.
    """
    if isinstance(kv_length, MaskLength):
        return mask_of_cache(kv_length.cache, {**arguments, "kv_length": int(kv_length), "config": config})
    check_model(config)
    arguments = {**arguments, "kv_length": kv_length, "config": config}
    _, is_plain = is_local_is_plain(**arguments)
    if is_plain and kv_length == 0:  # in a captured step of a QuestCache
        return None
    if not supports_sdpa(config):  # it may have attention of its own, which adds masks
        return eager_mask(**arguments)
    return sdpa_mask(**{**arguments, "allow_is_causal_skip": may_be_left_out(**arguments)})


def is_local_is_plain(*, q_length, kv_length, config, mask_function=causal_mask_function, local_size=None, **others):
    """(Whether a mask is of a local layer, whether it is causal with left padding at most)."""
    is_local = local_size is not None and local_size < max_positions_of(config)
    if local_size is None:
        return is_local, mask_function is causal_mask_function or (q_length == 1 and shows_all_before(mask_function))
    return is_local, not is_local and kv_length <= local_size


def shows_all_before(mask_function):
    """Whether a token attends all before it, and some of what is to come: for the newest one that is causal."""
    if getattr(mask_function, "__code__", None) is not EITHER:
        return mask_function is causal_mask_function
    return any(shows_all_before(part) for cell in mask_function.__closure__ for part in cell.cell_contents)


def max_positions_of(config):
    return getattr(config, "max_position_embeddings", None) or math.inf


def may_be_left_out(*, q_length, kv_length, config, allow_is_causal_skip=True, **others):
    """Whether the model may go without a mask that hides nothing but what is to come."""
    # It is causal over the queries' own keys, and only so in a model that is made for SDPA. A local layer without its
    # mask could not be told from a full one.
    is_local, _ = is_local_is_plain(q_length=q_length, kv_length=kv_length, config=config, **others)
    is_causal_without = q_length == 1 or (q_length == kv_length and supports_sdpa(config))
    return allow_is_causal_skip and not is_local and is_causal_without


@torch.compiler.disable(reason="what a mask means to a QuestCache is known outside of graphs")
def mask_of_cache(cache, arguments):
    """`quest_mask` for a forward with a QuestCache: its meaning is decided, then it is built and marked."""
    num_new, num_keys, config = arguments["q_length"], arguments["kv_length"], arguments["config"]
    if cache.config is not config:
        check_model(config)
    is_own_chunk = 1 < num_new < num_keys and arguments.get("allow_is_causal_skip", True)
    arguments["allow_is_causal_skip"] = may_be_left_out(**arguments)
    cache.masks.ask(num_keys)
    if arguments.get("use_vmap"):  # which Transformers sets for a pattern of the caller's
        return sdpa_mask(**arguments)
    cache.take_config(config, max_positions_of(config))
    is_local, is_plain = is_local_is_plain(**arguments)
    left_padding = decide(cache, arguments) if is_plain else None
    mask = build(cache, arguments, left_padding, is_local, is_own_chunk)
    mark(cache, mask, left_padding, num_new)
    return mask


def decide(cache, arguments):
    """The left padding of a causal forward, a tuple of B ints, or None if its mask hides anything else."""
    num_new, num_keys, batch_size = (arguments[name] for name in ("q_length", "kv_length", "batch_size"))
    return cache.masks.decide(num_new, num_keys, arguments.get("attention_mask"), batch_size, cache.left_padding)


def build(cache, arguments, left_padding, is_local, is_own_chunk):
    """The mask, or None where the cache knows what it would say."""
    if is_local:
        return local_mask(**arguments)
    if left_padding is not None and not cache.masks.are_changed:
        # A chunk of a prompt needs none where the attention is this package's own. It could be gigabytes.
        is_on_gpu = torch.device(arguments.get("device") or "cpu").type == "cuda"
        is_without = is_on_gpu or cache.shared.step.is_prepared_for(arguments["q_length"])  # drafts for a graph
        if arguments["q_length"] == 1 or (is_own_chunk and is_without and not any(left_padding)):
            return None
    return sdpa_mask(**arguments)


def mark(cache, mask, left_padding, num_new):
    """Have the cache know the mask, wherever it turns up, by what it means."""
    if mask is not None:
        cache.masks.remember(mask, left_padding)
    if left_padding is not None and (num_new == 1 or cache.shared.step.is_prepared_for(num_new)):  # for a graph
        cache.set_left_padding(left_padding)


def local_mask(q_length, kv_length, local_size, kv_offset=0, **arguments):
    """The mask of a local layer; for one new token that of the newest `local_size` slots, filled or not."""
    num_keys, num_missing = kv_length, 0
    if q_length == 1:
        num_missing = max(0, local_size - num_keys)
        kv_offset += max(0, num_keys - local_size)
        num_keys = min(num_keys, local_size)
    place = {"q_length": q_length, "kv_length": num_keys, "kv_offset": kv_offset, "local_size": local_size}
    mask = sdpa_mask(**place, **arguments)
    return F.pad(mask, (num_missing, 0), value=False) if num_missing else mask


def count_left_padding(attention_mask, num_keys):
    """A tuple with the zeros at the start of each row of a [B, N] mask, or None if it has zeros elsewhere.

    What a mask is short of `num_keys` is hidden, as in Transformers, and what is beyond is not looked at.
    """
    attention_mask = attention_mask[:, :num_keys]
    if attention_mask.shape[1] < num_keys:
        return None
    left_padding = num_keys - attention_mask.sum(dim=-1)
    is_token = torch.arange(num_keys, device=attention_mask.device) >= left_padding[:, None]
    is_left = (is_token == attention_mask.bool()).all()
    *left_padding, is_left = torch.cat([left_padding, is_left.to(left_padding.dtype)[None]]).tolist()  # one wait
    return tuple(left_padding) if is_left else None


def is_causal(mask, left_padding):
    """Whether a [B or 1, 1, T, N] mask lets the newest T of N tokens attend what is before them, and no padding."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return False
    batch_size, _, num_queries, num_keys = mask.shape
    slot = torch.arange(num_keys, device=mask.device)
    is_token = slot >= torch.tensor(left_padding, device=mask.device)[:, None, None]
    num_together = max(1, COMPARED // (batch_size * num_keys))
    for first in range(0, num_queries, num_together):
        part = mask[:, 0, first : first + num_together]
        newest = torch.arange(part.shape[1], device=mask.device)[:, None] + (num_keys - num_queries + first)
        if not torch.equal(part.expand(len(left_padding), -1, -1), (slot <= newest) & is_token):
            return False
    return True
