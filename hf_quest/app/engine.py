"""The model that all visitors share, and where Quest looked in a run."""

import re
from dataclasses import dataclass

from .. import demo, tiny
from ..comparison import compare, dense_twin

MAX_NEW_TOKENS = 512
NUM_SOURCES = 3  # pages named for each sentence
FAINT = 0.25  # of the best page's attention: less is not named
SENTENCE = re.compile(r"\n+|(?<=[.!?])\s+")


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
        """Yield one comparison.Run after every forward, until both answers have ended or `stopped` is set."""
        models = (self.model, self.dense_model, self.tokenizer)
        return compare(models, text, question, budget, max_new_tokens, is_recorded=True, stopped=stopped)


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
