"""How far a prompt has been read, while a model reads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@contextmanager
def prefill_progress(model: PreTrainedModel, num_tokens: int, **options: Any) -> Iterator[tqdm]:
    """A tqdm bar of the prompt's tokens while `model` reads them, chunk by chunk with `prefill_chunk_size`.

    Args:
        model: the model on which `generate` is called inside this context.
        num_tokens: tokens in the prompt.
        options: for tqdm.
    """
    with tqdm(total=num_tokens, unit="tokens", **options) as bar:

        def advance(module, args, kwargs, output):
            if bar.n < num_tokens:
                if output.last_hidden_state.is_cuda:
                    torch.cuda.synchronize(output.last_hidden_state.device)
                bar.update(min(output.last_hidden_state.shape[1], num_tokens - bar.n))

        hook = model.base_model.register_forward_hook(advance, with_kwargs=True)
        try:
            yield bar
        finally:
            hook.remove()
