"""A small Llama with random weights, and generation with it in plain forwards, for the tests to compare with."""

import torch
from transformers import LlamaForCausalLM

from hf_quest.cache import CACHE_NAME

VOCABULARY = 256
PROMPT, ANSWER = 150, 24  # tokens
BUDGET = 48  # three pages: the newest and two of the nine or more before it


def make_model(model_class=LlamaForCausalLM, seed=0, dtype=torch.float32, **options):
    """A model whose random attention is peaked, so that what is attended decides what is written."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "quest",
        **options,
    }
    return model_class(model_class.config_class(**config)).to(dtype).eval()


def tokens(num_tokens, seed=1, batch_size=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch_size, num_tokens), generator=generator)


def generate(model, input_ids, cache, **options):
    options = {"max_new_tokens": ANSWER, "pad_token_id": 0, "do_sample": False, **options}
    options.setdefault("attention_mask", torch.ones_like(input_ids))
    return model.generate(input_ids, **{CACHE_NAME: cache}, **options)


@torch.no_grad()
def feed(model, cache, input_ids, answer):
    """The prompt in one forward, the answer token by token: [1, answer, V] logits, each before its answer token."""
    logits = [model(input_ids, **{CACHE_NAME: cache}).logits[:, -1:]]
    for token in answer[0, :-1]:
        logits.append(model(token.view(1, 1), **{CACHE_NAME: cache}).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def greedy(model, cache, input_ids, num_tokens=ANSWER):
    """Greedy decoding by plain forwards: [1, prompt + answer] tokens."""
    sequence = input_ids
    for _ in range(num_tokens):
        logits = model(input_ids, **{CACHE_NAME: cache}).logits
        input_ids = logits[:, -1:].argmax(dim=-1)
        sequence = torch.cat([sequence, input_ids], dim=1)
    return sequence
