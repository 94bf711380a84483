"""A document is read once, then dense attention and Quest answer the same question, each on its own stopwatch.

The demo and the app run models in this one way.
"""

import copy
import statistics
import threading
import time
from dataclasses import dataclass, field
from itertools import chain

import torch

from . import CACHE_NAME, demo
from .watch import PageReads

SETTLED = 10  # decode steps after which a median may be worth showing
STEADY = 0.1  # by which the medians of their first and second half may differ
WEIGHED = 16  # selections, between two looks at whether to stop


class Contestant:
    """One greedy answer, token by token, with a stopwatch that runs only while its own forwards do."""

    def __init__(self, model, cache, pending, tokenizer, max_new_tokens):
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
        self.max_new_tokens = max_new_tokens
        self.has_ended = False
        self.is_steady = False  # once, and then for good: a number that is shown stays

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
            self.is_steady = self.is_steady or is_steady(self.step_seconds)
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

    @property
    def is_done(self):
        return self.has_ended or len(self.token_ids) >= self.max_new_tokens

    @property
    def is_settled(self):
        """Whether the median is worth showing: it will not move any more, or hardly."""
        return self.has_ended or self.is_steady or (self.is_done and len(self.step_seconds) >= SETTLED)


def is_steady(seconds):
    """Whether there are enough decode steps, and the later ones take as long as the earlier."""
    if len(seconds) < SETTLED:
        return False
    earlier, later = (statistics.median(half) for half in (seconds[: len(seconds) // 2], seconds[len(seconds) // 2 :]))
    return abs(earlier - later) <= STEADY * max(earlier, later)


@dataclass
class Run:
    """What is seen of a comparison. Only `dense.cache` and `quest.cache` are large, and they go when it ends."""

    budget: int
    phase: str = "loading"  # then reading, rereading by CritiPrefill, answering, weighing; at last finished or stopped
    page_size: int = 16
    document_ids: list = field(default_factory=list)
    num_read: int = 0
    prefill_seconds: float = 0.0
    critical_seconds: float | None = None  # CritiPrefill's
    critical_share: float | None = None  # of the products of a prompt, by CritiPrefill
    dense: Contestant | None = None
    quest: Contestant | None = None
    reads: PageReads = field(default_factory=PageReads)
    read_share: float | None = None  # of the KV cache, by one step of Quest
    share_weighed: float = 0.0  # of what was read
    attended: list = field(default_factory=list)  # (dense, Quest) tokens in one step of each layer

    @property
    def num_pages(self):
        """Pages of the document."""
        return -(-len(self.document_ids) // self.page_size)

    @property
    def speedup(self):
        """How much faster Quest's decode step is, or None before both have settled."""
        pair = (self.dense, self.quest)
        if not all(each and each.is_settled and each.milliseconds for each in pair):
            return None
        return self.dense.milliseconds / self.quest.milliseconds

    @property
    def common(self):
        """How many tokens both answers share from their beginning on, and how many the longer one has."""
        return demo.num_common(self.dense, self.quest), max(len(self.dense.token_ids), len(self.quest.token_ids))

    def answer_slots(self, first, last):
        """The slots of the queries that chose the answer's tokens `first` to `last - 1`."""
        return range(self.quest.first_slot + first - 1, self.quest.first_slot + last - 1)


def compare(models, text, question, budget, max_new_tokens, critical=None, is_recorded=False, stopped=None):
    """Yield one Run again and again, after every forward, until both answers have ended or `stopped` is set.

    Args:
        models: (model, its dense twin, tokenizer).
        critical: a CritiPrefill by which Quest's side reads the document, a second time.
        is_recorded: whether to keep what Quest reads, and to weigh it at the end.

    Raises:
        DemoError: for a document, question or budget that the model cannot take.
    """
    run = Run(budget)
    stopped = stopped or threading.Event()
    try:
        caches, question_ids = yield from read_document(run, models, text, question, max_new_tokens, critical, stopped)
        if not stopped.is_set():
            yield from answer(run, models, caches, question_ids, max_new_tokens, is_recorded, stopped)
        if is_recorded and not stopped.is_set():
            yield from weigh(run, caches[1], stopped)
    finally:
        caches = None
        for contestant in filter(None, (run.dense, run.quest)):
            contestant.model = contestant.cache = contestant.pending = None
    run.phase = "stopped" if stopped.is_set() else "finished"
    yield run


def read_document(run, models, text, question, max_new_tokens, critical, stopped):
    """Read the document; returns (a stock cache, a QuestCache), and the question's tokens."""
    model, _, tokenizer = models
    cache = demo.make_cache(run.budget)
    document_ids, question_ids = demo.encode(tokenizer, text, question, demo.context_of(model.config))
    num_document = document_ids.shape[1]
    num_total = num_document + question_ids.shape[1] + max_new_tokens
    demo.check_length(num_document, num_total, run.budget, model.config)
    demo.check_prefill(num_document, critical)
    run.document_ids, run.page_size, run.phase = document_ids[0].tolist(), cache.page_size, "reading"
    yield run
    document_ids, question_ids = document_ids.to(model.device), question_ids.to(model.device)
    for seconds in read(run, model, cache, document_ids, stopped):
        run.prefill_seconds = seconds
        yield run
    if stopped.is_set():
        return None, question_ids
    stock = demo.stock_copy(cache, model.config)
    if critical is not None:
        cache, run.phase = demo.make_cache(run.budget, critical), "rereading"
        for seconds in read(run, model, cache, document_ids, stopped):
            run.critical_seconds = seconds
            yield run
        run.critical_share = critical.read_share(num_document)
    return (stock, cache), question_ids


def answer(run, models, caches, question_ids, max_new_tokens, is_recorded, stopped):
    """Let both answer."""
    model, dense_model, tokenizer = models
    stock, cache = caches
    run.dense = Contestant(dense_model, stock, [question_ids], tokenizer, max_new_tokens)
    # Token by token, so that finding what the question is about is Quest's work too.
    run.quest = Contestant(model, cache, list(question_ids.split(1, dim=1)), tokenizer, max_new_tokens)
    cache.watcher = run.reads if is_recorded else None
    run.phase = "answering"
    for _ in race((run.quest, run.dense)):
        run.read_share = cache.read_share
        yield run
        if stopped.is_set():
            return
    in_dense = demo.tokens_attended([cache.get_seq_length()] * len(cache), model.config)
    in_quest = demo.tokens_attended(cache.tokens_attended, model.config)
    run.attended = list(zip(in_dense, in_quest, strict=True))


def weigh(run, cache, stopped):
    """Add up the attention that was paid to each page that was read."""
    run.phase = "weighing"
    pieces = list(parts(run.reads))
    for index, part in enumerate(pieces):
        run.share_weighed = index / len(pieces)
        yield run
        if stopped.is_set():
            return
        part.weigh(cache)


def read(run, model, cache, document_ids, stopped):
    """Read the document into the cache, chunk by chunk; yields the seconds that it has taken."""
    run.num_read, seconds = 0, 0.0
    for chunk in demo.chunks(document_ids):
        if stopped.is_set():
            return
        began = time.perf_counter()
        demo.read(model, cache, chunk)
        if chunk.is_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        run.num_read += chunk.shape[1]
        yield seconds


def race(contestants):
    """Yield after every forward, until all are done.

    They share the machine and not a stopwatch: the one whose own is behind goes next, so that both texts appear in
    proportion to what their own forwards take.
    """
    while racing := [each for each in contestants if not each.is_done]:
        min(racing, key=lambda contestant: contestant.seconds).step()
        yield


def parts(reads):
    """What was read, as PageReads of few selections, which are weighed one after the other."""
    for layer_idx, selections in list(reads.selections.items()):
        for first in range(0, len(selections), WEIGHED):
            part = PageReads()
            part.selections[layer_idx] = selections[first : first + WEIGHED]
            yield part


def dense_twin(model):
    """The same weights, not a copy of them, with the attention that Transformers takes by default."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    try:
        twin.set_attn_implementation("sdpa")
    except ValueError:  # GPT-OSS, for one, has no SDPA
        twin.set_attn_implementation("eager")
    return twin
