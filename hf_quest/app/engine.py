"""One model, and what happens in a visitor's run: a document is read once, then dense attention and Quest race."""

import copy
import re
import statistics
import threading
import time
from dataclasses import dataclass, field
from itertools import chain

import torch

from .. import CACHE_NAME, demo, tiny
from ..watch import PageReads

MAX_NEW_TOKENS = 512
NUM_SOURCES = 3  # pages named for each sentence
FAINT = 0.25  # of the best page's attention: less is not named
SENTENCE = re.compile(r"\n+|(?<=[.!?])\s+")


class Contestant:
    """One greedy answer, token by token, with a stopwatch that runs only while its own forwards do."""

    def __init__(self, model, cache, pending, tokenizer):
        self.model = model
        self.cache = cache
        self.pending = pending  # list of [1, T] token ids, one forward each; the last one's logits choose a token
        self.tokenizer = tokenizer
        stop_ids = model.generation_config.eos_token_id
        self.stop_ids = set(stop_ids if isinstance(stop_ids, list) else [stop_ids])
        self.first_slot = cache.get_seq_length() + sum(ids.shape[1] for ids in pending)  # of the answer
        self.token_ids = []
        self.step_seconds = []
        self.seconds = 0.0
        self.first_token_seconds = None  # without the document's prefill
        self.has_ended = False

    @torch.inference_mode()
    def step(self):
        """One forward."""
        began = time.perf_counter()
        logits = self.model(self.pending.pop(0), **{CACHE_NAME: self.cache}, use_cache=True).logits
        if self.pending:
            self.seconds += time.perf_counter() - began
            return
        next_ids = logits[:, -1:].argmax(dim=-1)
        token_id = next_ids.item()  # waits for the device
        seconds = time.perf_counter() - began
        self.seconds += seconds
        if self.first_token_seconds is None:
            self.first_token_seconds = self.seconds
        else:
            self.step_seconds.append(seconds)
        self.pending = [next_ids]
        if token_id in self.stop_ids:
            self.has_ended = True
        else:
            self.token_ids.append(token_id)

    @property
    def text(self):
        return self.tokenizer.decode(self.token_ids, skip_special_tokens=True)

    @property
    def milliseconds(self):
        """The median of a decode step, or None before the second token."""
        return 1000 * statistics.median(self.step_seconds) if self.step_seconds else None


@dataclass
class Run:
    """What a visitor sees of a run. Only `dense.cache` and `quest.cache` are large, and they go when it ends."""

    budget: int
    phase: str = "loading"  # then reading, answering, weighing, and at last finished or stopped
    page_size: int = 16
    document_ids: list = field(default_factory=list)
    num_read: int = 0
    prefill_seconds: float = 0.0
    dense: Contestant | None = None
    quest: Contestant | None = None
    reads: PageReads = field(default_factory=PageReads)
    read_share: float | None = None  # of the KV cache, by one step of Quest

    @property
    def num_pages(self):
        """Pages of the document."""
        return -(-len(self.document_ids) // self.page_size)

    @property
    def speedup(self):
        """How much faster Quest's decode step is, or None before both have made one."""
        if self.dense is None or self.dense.milliseconds is None or self.quest.milliseconds is None:
            return None
        return self.dense.milliseconds / self.quest.milliseconds

    def answer_slots(self, first, last):
        """The slots of the queries that chose the answer's tokens `first` to `last - 1`."""
        return range(self.quest.first_slot + first - 1, self.quest.first_slot + last - 1)


class Engine:
    """The model that all visitors share. Another name replaces it, where `may_change`."""

    def __init__(self, name=None, device="auto", may_change=True):
        self.device = demo.choose_device(device)
        self.may_change = may_change
        self.name = None
        self.use(name or str(tiny.PATH))

    @property
    def is_tiny(self):
        return self.name == str(tiny.PATH)

    def use(self, name):
        """Load the model `name` unless it is loaded. If that fails the one before stays."""
        if name == self.name:
            return
        if not name:
            raise demo.DemoError("There is no model name. Write one of the hub, or a folder.")
        if self.name is not None and not self.may_change:
            raise demo.DemoError("The model is fixed while this page is open to other machines.")
        model, tokenizer = demo.load(name, self.device)
        self.name, self.tokenizer = name, tokenizer
        self.model, self.dense_model = model, dense_twin(model)

    def run(self, text, question, budget, max_new_tokens=MAX_NEW_TOKENS, stopped=None):
        """Yield one Run again and again, after every forward, until both answers have ended or `stopped` is set.

        Raises DemoError for a document, question or budget that the model cannot take.
        """
        run = Run(budget)
        stopped = stopped or threading.Event()
        model, dense_model, tokenizer = self.model, self.dense_model, self.tokenizer
        try:
            cache = demo.make_cache(budget)
            document_ids, question_ids = demo.encode(tokenizer, text, question)
            num_document, num_question = document_ids.shape[1], question_ids.shape[1]
            demo.check_length(num_document, num_document + num_question + max_new_tokens, budget, model.config)
            run.document_ids, run.page_size, run.phase = document_ids[0].tolist(), cache.page_size, "reading"
            yield run
            for chunk in demo.chunks(document_ids):
                if stopped.is_set():
                    break
                began = time.perf_counter()
                demo.read(model, cache, chunk.to(self.device))
                self.wait()
                run.prefill_seconds += time.perf_counter() - began
                run.num_read += chunk.shape[1]
                yield run
            else:
                question_ids = question_ids.to(self.device)
                stock = demo.stock_copy(cache, model.config)
                run.dense = Contestant(dense_model, stock, [question_ids], tokenizer)
                # Token by token, so that finding what the question is about is Quest's work too.
                run.quest = Contestant(model, cache, list(question_ids.split(1, dim=1)), tokenizer)
                del stock
                cache.watcher = run.reads
                run.phase = "answering"
                for _ in race((run.quest, run.dense), max_new_tokens):
                    run.read_share = cache.read_share
                    yield run
                    if stopped.is_set():
                        break
            if not stopped.is_set():
                run.phase = "weighing"
                yield run
                run.reads.weigh(cache)
        finally:
            cache = None
            for contestant in filter(None, (run.dense, run.quest)):
                contestant.model = contestant.cache = contestant.pending = None
        run.phase = "finished" if run.phase == "weighing" else "stopped"
        yield run

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def race(contestants, max_new_tokens):
    """Yield after every forward, until all have ended.

    They share the machine and not a stopwatch: the one whose own is behind goes next, so that both texts appear in
    proportion to what their own forwards take.
    """
    while racing := [each for each in contestants if not each.has_ended and len(each.token_ids) < max_new_tokens]:
        min(racing, key=lambda contestant: contestant.seconds).step()
        yield


def dense_twin(model):
    """The same weights, not a copy of them, with the attention that Transformers takes by default."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    try:
        twin.set_attn_implementation("sdpa")
    except ValueError:  # GPT-OSS, for one, has no SDPA
        twin.set_attn_implementation("eager")
    return twin


@dataclass(frozen=True)
class Sentence:
    text: str
    sources: tuple  # of (page, attention beyond the average of question and answer), most first


@dataclass(frozen=True)
class Look:
    """Where Quest looked in one run, without a tensor of the model: what stays when the caches are freed."""

    page_texts: tuple
    shares: dict  # of a layer, or None for all of them: a share of reads for each page
    sentences: tuple


def look(run, tokenizer):
    """A run's reads as pages, layers and sentences."""
    size = run.page_size
    pieces = [run.document_ids[first : first + size] for first in range(0, len(run.document_ids), size)]
    shares = {None: run.reads.share(run.num_pages).tolist()}
    for layer_idx in run.reads.layers:
        shares[layer_idx] = run.reads.share(run.num_pages, layer_idx=layer_idx).tolist()
    # A run that was stopped did not weigh what it read, which takes time.
    found = sentences(run, tokenizer) if run.phase == "finished" else ()
    return Look(tuple(tokenizer.batch_decode(pieces)), shares, tuple(found))


def sentences(run, tokenizer):
    """The sentences of Quest's answer, each with the pages that it attended more than question and answer do."""
    token_ids = run.quest.token_ids
    everywhere = run.reads.attention(run.num_pages)
    for first, last, text in sentence_spans(token_ids, tokenizer):
        attention = run.reads.attention(run.num_pages, slots=run.answer_slots(first, last))
        # What every token attends, like a document's first page, is no source of this one.
        most = (attention - everywhere).topk(min(NUM_SOURCES, run.num_pages))
        most = zip(most.indices.tolist(), most.values.tolist(), strict=True)
        sources = [(page, more) for page, more in most if more > max(FAINT * (attention - everywhere).max().item(), 0)]
        yield Sentence(text, tuple(sources))


def sentence_spans(token_ids, tokenizer):
    """(first, last, text) of every sentence, as a range of tokens: a token belongs where its text begins."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    ends = [len(tokenizer.decode(token_ids[: count + 1], skip_special_tokens=True)) for count in range(len(token_ids))]
    first = start = 0
    for cut in [*(match.end() for match in SENTENCE.finditer(text)), len(text)]:
        last = next((index + 1 for index, end in enumerate(ends) if end >= cut), len(ends))
        if text[start:cut].strip() and last > first:
            yield first, last, text[start:cut].strip()
        first, start = max(first, last), cut
