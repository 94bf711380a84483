"""A way to choose of your own, in one file: the tokens with the largest logits. It reads every key to know them, so it
is no faster than dense attention; it shows what the best choice of `budget` tokens would lose.

    python examples/exact_top_k.py
"""

from dataclasses import dataclass

import torch

from hf_quest import CACHE_NAME, Method, MethodCache, reference, tiny
from hf_quest.reference import Choice


@dataclass(frozen=True)
class ExactTopK(Method):
    """Each KV head attends the `budget` tokens with the largest logit of any of its query heads."""

    def choose(self, pages, query, logits, length):
        stored = pages.keys.shape[2] if torch.is_tensor(length) else length
        keys = pages.aligned(pages.keys[:, :, :stored]).float()  # [B, Hkv, N, D], each row from its first token on
        grouped = query.float().unflatten(1, (keys.shape[1], -1))  # [B, Hkv, G, T, D]
        scores = (grouped @ keys[:, :, None].transpose(-1, -2)).amax(dim=2) * logits.scaling  # [B, Hkv, T, N]
        return Choice(reference.select(scores, length, pages.padding, self.budget, page_size=1), size=1)


if __name__ == "__main__":
    model, tokenizer = tiny.load(attn_implementation="quest")
    inputs = tokenizer("The harbour code of Lisbon is 4417. " + "Boats come and go. " * 200, return_tensors="pt")
    cache = MethodCache(ExactTopK(budget=64))
    output = model.generate(**inputs, **{CACHE_NAME: cache}, max_new_tokens=16, do_sample=False)
    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
    print(f"attended per step: {cache.tokens_attended}")
