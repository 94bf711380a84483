"""Pool: of tokens in the host's memory those that were attended lately, on the device: most are attended again."""

import torch

from ..kernels import ops

TOKEN = 2**24 - 1  # of a tag, which token its slot holds


class Pool:
    """`keys`, `values` [B, Hkv, N, D] of tokens of each row and head, which the kernels put there and read there.

    `tags` [B, Hkv, N] int64 tell of each slot which token it holds, 0 that it holds none (csrc/pool.cuh). A token is
    counted from its row's first one. In `counts` [B, Hkv, 2] int64 are how many tokens were looked up, and how many of
    them were there.

    Args:
        keys, values: of the storage, any number of slots.
        num_tokens: N, which is rounded up.
    """

    def __init__(self, keys, values, num_tokens):
        rows = (*keys.shape[:2], -(-num_tokens // ops.POOL_STEP) * ops.POOL_STEP)
        with torch.inference_mode(False):  # or they could not be written outside of it
            self.keys, self.values = (like.new_empty(*rows, like.shape[3]) for like in (keys, values))
            self.tags = keys.new_zeros(rows, dtype=torch.int64)
            self.counts = keys.new_zeros(*rows[:2], 2, dtype=torch.int64)

    def tensors(self):
        return self.keys, self.values, self.tags, self.counts

    def addresses(self):
        return [*(tensor.data_ptr() for tensor in self.tensors()), self.tags.shape[2]]

    def forget(self, slot, padding):
        """Empty the slots that hold tokens of the storage's slots from `slot` on, whose rows have such padding, [B]."""
        if slot == 0:
            self.tags.zero_()
        else:
            self.tags.masked_fill_((self.tags & TOKEN) >= (slot - padding)[:, None, None], 0)
