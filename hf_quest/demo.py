"""What `hf-quest demo` does: a document is read once, then dense attention and Quest answer a question about it."""

import statistics
import time
from itertools import takewhile
from pathlib import Path

import torch
from transformers import AutoTokenizer, DynamicCache
from transformers.generation.streamers import BaseStreamer

from . import CritiPrefill, QuestCache, models, tiny
from .cache import CACHE_NAME
from .evaluation.documents import Library, documents, heldout_text
from .models import first_line

DOCUMENT_LENGTH = 24_000  # tokens
PREFILL_CHUNK = 512  # tokens
CRITICAL = CritiPrefill(budget=1024)
QUESTION = "what are the key points of this document, in order?"
# Stands between document and question while a chat template is applied.
SEPARATOR = "<<the document ends here>>"


class DemoError(Exception):
    """Why the demo cannot go on, in one line."""


class Answer(BaseStreamer):
    """A streamer for `generate` that keeps the new tokens and the seconds that each took, and shows the text so far."""

    def __init__(self, tokenizer, show=lambda: None):
        self.tokenizer = tokenizer
        self.show = show
        self.token_ids = []
        self.seconds = []
        self.last = None

    def put(self, value):
        now = time.perf_counter()
        if self.last is not None:  # the first call brings the prompt
            self.token_ids += value.tolist()
            self.seconds.append(now - self.last)
            self.show()
        self.last = time.perf_counter()  # what it takes to show the text is not the model's time

    def end(self):
        if len(self.seconds) < 2:
            raise DemoError(f"The model's whole answer is {self.text!r}, too short to time. Ask another question.")

    @property
    def text(self):
        return self.tokenizer.decode(self.token_ids, skip_special_tokens=True)

    def count(self, points):
        """How many of the lines `points` the answer has, word for word."""
        return len(set(points) & set(self.text.splitlines()))

    @property
    def milliseconds(self):
        """The median of a decode step. The first token is left out: its forward may have read the question too."""
        return 1000 * statistics.median(self.seconds[1:] or self.seconds)


def read_document(path):
    """The text of a UTF-8 file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DemoError(f"{path} is not UTF-8 text. The demo reads .txt and .md files.") from None
    except OSError as error:
        raise DemoError(f"{path} cannot be read: {error.strerror}.") from None
    if "\0" in text:
        raise DemoError(f"{path} is a binary file. The demo reads .txt and .md files.")
    if not text.strip():
        raise DemoError(f"{path} is empty.")
    return text


def make_document():
    """Real text that was held out of the tiny model's training, and the lines in it that mark a key point."""
    library = Library(AutoTokenizer.from_pretrained(tiny.PATH), heldout_text())
    (document,) = documents(library, "digest", DOCUMENT_LENGTH, 1, seed=1)
    return document.context, document.answer.split("\n")[1:]


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


def encode(tokenizer, document, question):
    """Token ids of the document and of the question, each [1, N], in the model's chat template if it has one."""
    if tokenizer.chat_template is None:
        document, question = document.rstrip() + "\n", f"Question: {question} Answer:"
    else:
        message = {"role": "user", "content": f"{document.rstrip()}\n\n{SEPARATOR}{question}"}
        chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        document, question = chat.split(SEPARATOR)
    # A template writes its own special tokens.
    document_ids = tokenizer(
        document, add_special_tokens=tokenizer.chat_template is None, return_tensors="pt"
    ).input_ids
    question_ids = tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
    return document_ids, question_ids


def check_length(num_document, num_total, budget, config):
    """Raise for a document that leaves no room in the model's context, or nothing for Quest to leave out."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
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
    for layer_idx, layer in enumerate(cache.layers):
        stock.update(layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length], layer_idx)
    return stock


def tokens_attended(tokens, config):
    """`tokens` per layer, no more than a local layer's window reaches."""
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    windows += [None] * (len(tokens) - len(windows))
    return [min(number, window or number) for number, window in zip(tokens, windows, strict=True)]


def answer_dense(model, cache, document_ids, question_ids, answer, max_new_tokens):
    """Stream a greedy answer into `answer` the way Transformers does it by default."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # GPT-OSS, for one, has no SDPA
        model.set_attn_implementation("eager")
    generate(model, cache, torch.cat([document_ids, question_ids], dim=1), answer, max_new_tokens)


def answer_quest(model, cache, document_ids, question_ids, answer, max_new_tokens):
    """Stream a greedy answer into `answer`, with everything after the document decoded by Quest."""
    model.set_attn_implementation("quest")
    # `generate` would feed the question in one forward, which is dense as every prompt is, and finding what it is about
    # would not be Quest's work. Fed one by one, its tokens select their pages as those of the answer do.
    with torch.inference_mode():
        for token in question_ids[:, :-1].split(1, dim=1):
            model.base_model(token, **{CACHE_NAME: cache}, use_cache=True)
    generate(model, cache, torch.cat([document_ids, question_ids], dim=1), answer, max_new_tokens)


def generate(model, cache, input_ids, answer, max_new_tokens, **kwargs):
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **{CACHE_NAME: cache},
        streamer=answer,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **kwargs,
    )


def num_common(answer, other):
    """How many tokens two answers share from their beginning on."""
    pairs = zip(answer.token_ids, other.token_ids, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
