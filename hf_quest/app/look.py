"""Where Quest looked in one run, without a tensor of the model: what stays when the caches are freed."""

import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import torch

NUM_SOURCES = 3  # passages named for each sentence
FAINT = 0.25  # of the best passage's attention: less is not named
SENTENCE = re.compile(r"\n+|(?<=[.!?])\s+")


@dataclass(frozen=True)
class Sentence:
    text: str
    sources: tuple  # of (passage, attention beyond the average of question and answer), most first


@dataclass(frozen=True)
class Look:
    """A passage is what Quest calls a page: the tokens that are read together.

    `shares` and `sentences` are by layer, None for all of them. `marks` are the (passage, name) at which PDF pages
    begin, `headings` the (passage, title) of headings.
    """

    texts: tuple
    shares: dict
    sentences: dict
    marks: tuple = ()
    headings: tuple = ()

    def mark_of(self, passage):
        """The PDF page of a passage, as a name, or None."""
        index = bisect_right(self.marks, passage, key=lambda mark: mark[0]) - 1
        return self.marks[index][1] if index >= 0 else None


def look(run, tokenizer, document):
    """A run's reads as passages, layers and sentences."""
    size = run.page_size
    pieces = [run.document_ids[first : first + size] for first in range(0, len(run.document_ids), size)]
    texts = tuple(tokenizer.batch_decode(pieces))
    shares = {None: run.reads.share(run.num_pages).tolist()}
    for layer_idx in run.reads.layers:
        shares[layer_idx] = run.reads.share(run.num_pages, layer_idx=layer_idx).tolist()
    # A run that was stopped did not weigh what it read, which takes time.
    found = sentences(run, tokenizer) if run.phase == "finished" else dict.fromkeys(shares, ())
    find = passage_finder(texts, document.text)
    marks = tuple((find(start), f"PDF page {number}") for start, number in document.pages)
    return Look(texts, shares, found, marks, tuple((find(start), title) for start, title in document.headings))


def passage_finder(texts, document_text):
    """A function from a character of the document to the passage that it is in.

    The tokens may begin with a chat template, and their text may have a few characters more or less than the document.
    """
    whole = "".join(texts)
    first = max(whole.find(document_text.strip()[:40]), 0)
    leading = len(document_text) - len(document_text.lstrip())
    ends = list(accumulate(map(len, texts)))
    scale = (len(whole) - first) / max(len(document_text.strip()), 1)
    scale = scale if abs(scale - 1) > 0.01 else 1.0
    return lambda start: min(bisect_right(ends, first + scale * max(start - leading, 0)), len(texts) - 1)


def sentences(run, tokenizer):
    """By layer, the sentences of Quest's answer, each with the passages that it attended more than all the rest did."""
    spans = list(sentence_spans(run.quest.token_ids, tokenizer))
    found, beyond = {}, []
    for layer_idx in run.reads.layers:
        # What every token attends, like a document's first passage, is no source of this one.
        everywhere = run.reads.attention(run.num_pages, layer_idx)
        more = [
            run.reads.attention(run.num_pages, layer_idx, run.answer_slots(first, last)) - everywhere
            for first, last, _ in spans
        ]
        beyond.append(more)
        found[layer_idx] = tuple(map(sentence, spans, more))
    # Every layer reads equally often, so that all of them are their average.
    averages = [torch.stack(more).mean(dim=0) for more in zip(*beyond, strict=True)]
    return {None: tuple(map(sentence, spans, averages)), **found}


def sentence(span, more):
    most = more.topk(min(NUM_SOURCES, len(more)))
    least = max(FAINT * most.values[0].item(), 0)
    pairs = zip(most.indices.tolist(), most.values.tolist(), strict=True)
    return Sentence(span[2], tuple((passage, value) for passage, value in pairs if value > least))


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
