"""Long documents with something to find in them: the paper's passkey, scattered facts, and a digest of key points.

Every document is plain English and has an exact length in tokens of any tokenizer, question and beginning-of-sequence
token included, so that documents of one length can be batched. The same library, length and seed give the same one.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

HELDOUT_TEXT = Path(__file__).with_name("heldout.txt")

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSKEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
PASSKEY_QUESTION = "What is the pass key? The pass key is"

FACT_LINE = "The secret code of {name} is {code}.\n"
FACT_QUESTION = "Question: what is the secret code of {name}? Answer:"

POINT = "Key point {number} of {count}: {sentence}\n"
DIGEST_QUESTION = "Question: what are the key points of this document, in order? Answer:"

FIRST_SYLLABLES = (
    "Bar Bel Cal Cor Dal Dor Fal Fen Gal Gor Hal Hol Jal Jor Kal Kel Lan Lor Mar Mel Nor Nal Pal Pel Ral Ros Sal Sel "
    "Tal Tor Val Vor Wal Wen Yal Yor Zan Zel"
).split()
SECOND_SYLLABLES = (
    "bin bur dan dor fin fer gan gil hem hin jan jor kan kin lan lin mar min nan nor pan pin ran rin san sen tan tin "
    "van vin wan win yan yor zan zin"
).split()
NAMES = [first + second for first in FIRST_SYLLABLES for second in SECOND_SYLLABLES]

# Where most tokenizers never join two pieces: before a space that begins a word, around digits and around newlines.
PIECE = re.compile(r"\n|\d| (?=\d)| ?[^ \n\d]+| ")
# Pieces of most kinds.
PROBE = "The secret code of Barbin is 123456.\nKey point 12 of 12: it's (nearly) 3.5 times, a-b.\n"
WORD_OR_LINE = re.compile("[Ġ▁][A-Za-z]+|Ċ|\n|<0x0A>")  # as byte-level and SentencePiece vocabularies write them
SENTENCE_END = re.compile(r"(?<=[.!?]) ")
SENTENCE = re.compile(r"[A-Z][a-z]*(?: [A-Za-z0-9',;()-]+){7,24}\.")


@dataclass(frozen=True)
class Document:
    """A prompt of an exact length, what a right answer says, and where it stands.

    `ids` are the tokens of `context + question`, behind what the tokenizer begins a text with; `depths` are the places
    of what must be found, as shares of the text from 0 (the beginning) to 1.
    """

    ids: list[int]
    context: str
    question: str
    answer: str
    depths: tuple[float, ...]


class Library:
    """Real text, as tokens, from which documents are made.

    `first` are the tokens that the tokenizer begins every text with: its beginning-of-sequence token, or none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str):
        self.tokenizer = tokenizer
        self.first = first_tokens(tokenizer)
        self.pieces: dict[str, list[int]] = {}
        self.opening = opening_of(tokenizer)
        self.is_piecewise = self.encode_pieces(PROBE) == self.encode_whole(PROBE)
        lines = [line + "\n" for line in text.splitlines()]
        self.ids, lengths = encode_lines(tokenizer, lines, self.opening)
        self.line_starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.sentences = find_sentences(lines)
        self.begins_word = words_begin(tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens of `text` inside of a document, behind the end of a line."""
        return self.encode_pieces(text) if self.is_piecewise else self.encode_whole(text)

    def encode_whole(self, text: str) -> list[int]:
        return encode_inside(self.tokenizer, [text], self.opening)[0]

    def encode_pieces(self, text: str) -> list[int]:
        """As `encode_whole` where the tokenizer joins no pieces, from pieces kept since their first use."""
        ids: list[int] = []
        for piece in PIECE.findall(text):
            if piece not in self.pieces:
                self.pieces[piece] = self.encode_whole(piece)
            ids += self.pieces[piece]
        return ids

    def passage(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens in a row that end with a newline, and the offsets at which their lines start.

        The last line is cut before a word where there is one to cut at, so that the text of the tokens encodes to the
        same tokens.
        """
        newline = self.encode("\n")
        num_text = length - len(newline)
        last = int(np.searchsorted(self.line_starts, len(self.ids) - length))
        if last == 0 or num_text < 1:
            raise ValueError(f"the library holds {len(self.ids)} tokens, too few for a passage of {length}")
        drawn = int(rng.integers(last))
        line = next((line for line in in_turn(drawn, last) if self.can_cut(line, num_text)), drawn)
        start = self.line_starts[line]
        end = np.searchsorted(self.line_starts, start + num_text)
        return np.append(self.ids[start : start + num_text], newline), self.line_starts[line:end] - start

    def can_cut(self, line: int, num_tokens: int) -> bool:
        """Whether a word or a line begins `num_tokens` behind the start of a line."""
        return self.begins_word[self.ids[self.line_starts[line] + num_tokens]]


def in_turn(first: int, count: int) -> Iterator[int]:
    """The numbers below `count`, from `first` on and round."""
    yield from range(first, count)
    yield from range(first)


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before every text."""
    ids = tokenizer.encode("a")
    begins = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return ids[:1] if begins else []


def opening_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of the line's end that has to stand before a text, for a tokenizer that puts a space before its first
    word (Llama 2, Mistral); none for others."""
    newline, word, both = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n", "a", "\na"))
    return [] if both == newline + word else newline


def encode_inside(tokenizer: PreTrainedTokenizerBase, texts: list[str], opening: list[int]) -> list[list[int]]:
    """The tokens that each text has behind the end of a line; `opening` is the tokenizer's `opening_of`."""
    if opening:
        texts = ["\n" + text for text in texts]
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [row[len(opening) :] for row in rows]


def encode_lines(
    tokenizer: PreTrainedTokenizerBase, lines: list[str], opening: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """All lines' tokens in one array, and each line's number of tokens."""
    ids, lengths = [], []
    for first in range(0, len(lines), 50_000):
        batch = encode_inside(tokenizer, lines[first : first + 50_000], opening)
        lengths += map(len, batch)
        ids.append(np.concatenate([np.array(line, np.int32) for line in batch]))
    return np.concatenate(ids), np.array(lengths)


def words_begin(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """For each token id, whether it opens a word after a space or ends a line."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return np.array([isinstance(token, str) and WORD_OR_LINE.fullmatch(token) is not None for token in tokens])


def find_sentences(lines: list[str]) -> list[str]:
    """The sentences of 8 to 25 plain words in `lines`, each once."""
    sentences = (sentence for line in lines for sentence in SENTENCE_END.split(line.strip()))
    return list(dict.fromkeys(sentence for sentence in sentences if SENTENCE.fullmatch(sentence)))


def compose(
    library: Library, length: int, lines: list[str], depths: np.ndarray, rng: np.random.Generator
) -> tuple[list[int], list[float]]:
    """`length` tokens of the library's text with each of `lines` put between two of its lines, near its depth.

    Returns the tokens and the depth at which each line stands. Lines keep their order where depths are ascending.
    """
    inserts = [library.encode(line) for line in lines]
    passage, line_starts = library.passage(length - sum(map(len, inserts)), rng)
    targets = np.asarray(depths) * len(passage)
    places = line_starts[np.searchsorted(line_starts, targets, side="right") - 1]
    ids: list[int] = []
    position = 0
    for index in np.argsort(places, kind="stable"):
        ids += passage[position : places[index]].tolist() + inserts[index]
        position = places[index]
    return ids + passage[position:].tolist(), (places / len(passage)).tolist()


def document(library: Library, context_ids: list[int], question: str, answer: str, depths: list[float]) -> Document:
    context = library.tokenizer.decode(context_ids)
    ids = library.first + context_ids + library.encode(question)
    return Document(ids, context, question, answer, tuple(depths))


def context_length(library: Library, length: int, question: str) -> int:
    return length - len(library.first) - len(library.encode(question))


def garbage_words(library: Library, num_tokens: int, depth: float) -> tuple[list[int], list[int]]:
    """Two runs of the paper's garbage that hold `num_tokens` tokens together, the first about `depth` of them."""
    words = GARBAGE.split()
    cycle = [library.encode(" " + word) for word in words[1:] + words[:1]]
    run = [library.encode(words[0]), *(cycle[index % len(words)] for index in range(max(0, num_tokens)))]
    ends = np.cumsum([len(word) for word in run])
    for prefix in np.argsort(np.abs(ends - depth * num_tokens), kind="stable"):
        suffix = np.searchsorted(ends, num_tokens - ends[prefix])
        if num_tokens > ends[prefix] and ends[suffix] == num_tokens - ends[prefix]:
            return tuple(list(itertools.chain(*run[: num_words + 1])) for num_words in (prefix, suffix))
    raise ValueError(f"{num_tokens} tokens are too few for the garbage of a passkey prompt")


def passkey(library: Library, length: int, depth: float, rng: np.random.Generator) -> Document:
    """The Quest paper's passkey prompt: a number between 1 and 50,000 hidden at `depth` in five sentences repeated."""
    key = str(rng.integers(1, 50_001))
    opening, needle = library.encode(INTRODUCTION), library.encode(PASSKEY_LINE.format(key=key))
    newline, question = library.encode("\n"), library.encode(PASSKEY_QUESTION)
    num_fixed = sum(map(len, (library.first, opening, newline, needle, newline, question)))
    prefix, suffix = garbage_words(library, length - num_fixed, depth)
    before = opening + prefix + newline
    context_ids = before + needle + suffix + newline
    return document(library, context_ids, PASSKEY_QUESTION, f" {key}", [len(before) / len(context_ids)])


def facts(library: Library, length: int, depth: float, rng: np.random.Generator, count: int = 8) -> Document:
    """Real text with the secret codes of `count` people in it; the question asks for the one at `depth`."""
    people = draw_people(count, rng)
    lines = [FACT_LINE.format(name=name, code=code) for name, code in people]
    depths = rng.random(count)
    depths[0] = depth
    question = FACT_QUESTION.format(name=people[0][0])
    context_ids, places = compose(library, context_length(library, length, question), lines, depths, rng)
    return document(library, context_ids, question, f" {people[0][1]}", places[:1])


def digest(library: Library, length: int, depth: float, rng: np.random.Generator, count: int = 7) -> Document:
    """Real text with `count` numbered key points, the first in the first `depth`; the answer lists them in order."""
    lines = draw_points(library, count, rng)
    depths = np.sort(rng.random(count))
    depths[0] *= depth
    context_ids, places = compose(library, context_length(library, length, DIGEST_QUESTION), lines, depths, rng)
    return document(library, context_ids, DIGEST_QUESTION, digest_answer(lines), places)


def draw_people(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`count` different names, each with a code of six digits."""
    names = [NAMES[index] for index in rng.choice(len(NAMES), count, replace=False)]
    return [(name, str(rng.integers(100_000, 1_000_000))) for name in names]


def draw_points(library: Library, count: int, rng: np.random.Generator) -> list[str]:
    """`count` lines that each mark a sentence of the library as a key point."""
    sentences = [library.sentences[index] for index in rng.choice(len(library.sentences), count, replace=False)]
    return [
        POINT.format(number=number, count=count, sentence=sentence)
        for number, sentence in enumerate(sentences, start=1)
    ]


def digest_answer(lines: list[str]) -> str:
    """The digest of a document that marks these key points."""
    return "\n" + "".join(lines).rstrip("\n")


JOBS: dict[str, Callable[..., Document]] = {"passkey": passkey, "facts": facts, "digest": digest}


def documents(library: Library, job: str, length: int, count: int, seed: int) -> Iterator[Document]:
    """`count` documents of `length` tokens for one of JOBS, their depths spread evenly from 0 to 1."""
    for index in range(count):
        rng = np.random.default_rng([seed, length, index, *job.encode()])
        yield JOBS[job](library, length, index / max(1, count - 1), rng)


@cache
def heldout_text() -> str:
    """The text that ships with the package, from files that the tiny model never saw."""
    return HELDOUT_TEXT.read_text()
