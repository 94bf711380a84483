"""What a comparison of dense attention and Quest needs: a document, its tokens, checks, and the reading of it."""

import math
from itertools import takewhile

import torch
from torch.nn.functional import pad
from transformers import AutoTokenizer, DynamicCache

from . import CACHE_NAME, CritiPrefill, QuestCache, models, tiny
from .evaluation.documents import Library, documents, heldout_text
from .models import first_line
from .reading import Document
from .seam.stock import tokens_of

DOCUMENT_LENGTH = 24_000  # tokens
PREFILL_CHUNK = 512  # tokens
CRITICAL = CritiPrefill(budget=1024)
QUESTION = "what are the key points of this document, in order?"
# Stands between document and question while a chat template is applied.
SEPARATOR = "<<the document ends here>>"
PIECE = 4  # characters that a token has, at about


class DemoError(Exception):
    """Why the demo cannot go on, in one line."""


def make_document():
    """Real text that was held out of the tiny model's training, with lines in it that mark a key point."""
    library = Library(AutoTokenizer.from_pretrained(tiny.PATH), heldout_text())
    (made,) = documents(library, "digest", DOCUMENT_LENGTH, 1, seed=1)
    name = "real text that the model never saw, with key points marked in it"
    return Document(name, made.context, key_points=tuple(made.answer.split("\n")[1:]))


def make_cache(budget, prefill=None):
    try:
        return QuestCache(budget=budget, prefill=prefill)
    except ValueError as error:
        raise DemoError(first_line(error)) from None


def choose_device(device):
    """The torch device for `auto`, `cpu` or `cuda`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DemoError("This machine, or this build of PyTorch, has no CUDA GPU. Use --device cpu.")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def load(name, device):
    """A model with `attn_implementation="quest"` and its tokenizer, from the hub or a folder."""
    try:
        return models.load(name, device)
    except ValueError as error:
        raise DemoError(str(error)) from error


def encode(tokenizer, document, question, limit=None):
    """Token ids of the document and of the question, each [1, N], in the model's chat template if it has one.

    A document that has surely more than `limit` tokens is refused before it is made into tokens as a whole.
    """
    if not question.strip():
        raise DemoError("There is no question. Write one.")
    check_is_short(tokenizer, document, limit)
    if tokenizer.chat_template is None:
        document_ids = token_ids(tokenizer, "", document.rstrip() + "\n", add_special_tokens=True)
        return document_ids, token_ids(tokenizer, "", f"Question: {question} Answer:")
    document, separator = document.rstrip() + "\n\n", unused(SEPARATOR, document + question)
    message = {"role": "user", "content": separator.join(["", document, question, ""])}
    chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True).split(separator)
    if chat[1:-1] != [document, question]:
        raise DemoError("The model's chat template does not write a message once, as it is. Give another model.")
    # A template writes its own special tokens.
    return token_ids(tokenizer, chat[0], document), token_ids(tokenizer, "", question, chat[-1])


def token_ids(tokenizer, before, text, after="", add_special_tokens=False):
    """[1, N] ids of a text between two parts of a template. What looks like a special token in the text is text."""
    if not any(token in text for token in tokenizer.get_added_vocab()):
        return tokenizer(before + text + after, add_special_tokens=add_special_tokens, return_tensors="pt").input_ids
    options = {"add_special_tokens": False, "split_special_tokens": True}
    ids = tokenizer(before, add_special_tokens=add_special_tokens).input_ids
    ids = ids + tokenizer(text, **options).input_ids + tokenizer(after, add_special_tokens=False).input_ids
    return torch.tensor([ids])


def unused(separator, text):
    """The separator, with as many more brackets as make it one that the text does not have."""
    while separator in text:
        separator = f"<{separator}>"
    return separator


def check_is_short(tokenizer, document, limit):
    """Raise for a document of more than `limit` tokens, of which only the first are made into tokens."""
    if limit is None or len(document) <= PIECE * limit:
        return
    num_tokens = 0
    for first in range(0, len(document), PIECE * 4096):
        num_tokens += len(tokenizer(document[first : first + PIECE * 4096], add_special_tokens=False).input_ids)
        if num_tokens > limit:
            share = min(first + PIECE * 4096, len(document)) / len(document)
            about = 100 * math.ceil(num_tokens / share / 100)
            raise DemoError(
                f"The document has about {about:,} tokens, and the model's context ends at {limit:,}. "
                "Give a shorter document or another model."
            )


def context_of(config):
    """The most tokens that the model takes, or None."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_length(num_document, num_total, budget, config):
    """Raise for a document that leaves no room in the model's context, or nothing for Quest to leave out."""
    limit = context_of(config)
    if limit is not None and num_total > limit:
        raise DemoError(
            f"The document has {num_document:,} tokens, {num_total:,} with the question and the answer, and the "
            f"model's context ends at {limit:,}. Give a shorter document or another model."
        )
    if num_document <= budget:
        raise DemoError(
            f"The document has {num_document:,} tokens, which a budget of {budget:,} covers: Quest would read "
            "everything, like dense attention. Give a longer document or a smaller budget."
        )


def check_prefill(num_document, prefill):
    """Raise for a document that CritiPrefill would read as dense attention does."""
    if prefill is not None and not prefill.is_sparse(num_document, num_document):
        raise DemoError(
            f"The document has {num_document:,} tokens, and CritiPrefill reads everything below {prefill.threshold:,} "
            "dense. Give a longer document or leave out --prefill."
        )


def prefill(model, cache, document_ids, advance=lambda num_tokens: None):
    """Read the document into the cache, by chunks: the attention mask of all of it at once could be gigabytes."""
    model.set_attn_implementation("quest")
    for chunk in chunks(document_ids):
        read(model, cache, chunk)
        advance(chunk.shape[1])


def chunks(document_ids):
    """[1, N] token ids in pieces for one forward each."""
    pieces = list(document_ids.split(PREFILL_CHUNK, dim=1))
    if len(pieces) > 1 and pieces[-1].shape[1] == 1:  # alone, it would be a decode step
        pieces[-2:] = [torch.cat(pieces[-2:], dim=1)]
    return pieces


@torch.inference_mode()
def read(model, cache, chunk):
    """One forward of the document: token ids [1, T] into the cache."""
    try:
        model.base_model(chunk, **{CACHE_NAME: cache}, use_cache=True)
    except (RuntimeError, ValueError) as error:  # QuestError is a RuntimeError, and so is running out of memory
        raise DemoError(f"The model cannot read the document: {first_line(error)}") from error


def stock_copy(cache, config):
    """A DynamicCache as a dense prefill leaves it, with the keys and values of a QuestCache after one."""
    stock = DynamicCache(config=config)
    for layer_idx, tokens in enumerate(tokens_of(cache)):
        # A layer with a window has dropped what it cannot reach any more, and counts it.
        gone = (0, 0, tokens.length - tokens.keys.shape[2], 0)
        stock.update(pad(tokens.keys, gone), pad(tokens.values, gone), layer_idx)
    return stock


def tokens_attended(tokens, config):
    """`tokens` per layer, no more than a local layer's window reaches."""
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    windows += [None] * (len(tokens) - len(windows))
    return [min(number, window or number) for number, window in zip(tokens, windows, strict=True)]


def num_common(answer, other):
    """How many tokens two answers share from their beginning on."""
    pairs = zip(answer.token_ids, other.token_ids, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
