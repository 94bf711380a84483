"""Long documents with something to find in them: the paper's passkey, scattered facts, and a digest of key points.

Every document is plain English and has an exact length in tokens, question included, so that documents of one length
can be batched. The same library, length and seed give the same document.
"""

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

# Where the tokenizer never joins two pieces: before a space that begins a word, around digits and around newlines.
PIECE = re.compile(r"\n|\d| (?=\d)| ?[^ \n\d]+| ")
SENTENCE_END = re.compile(r"(?<=[.!?]) ")
SENTENCE = re.compile(r"[A-Z][a-z]*(?: [A-Za-z0-9',;()-]+){7,24}\.")


@dataclass(frozen=True)
class Document:
    """A prompt of an exact length, what a right answer says, and where it stands.

    `ids` are the tokens of `context + question`; `depths` are the places of what must be found, as shares of the
    text from 0 (the beginning) to 1.
    """

    ids: list[int]
    context: str
    question: str
    answer: str
    depths: tuple[float, ...]


class Library:
    """Real text, as tokens, from which documents are made.

    The tokenizer must keep newlines and digits as tokens of their own, as the tiny model's does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str):
        self.tokenizer = tokenizer
        self.pieces: dict[str, list[int]] = {}
        lines = [line + "\n" for line in text.splitlines()]
        self.ids, lengths = encode_lines(tokenizer, lines)
        self.line_starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.sentences = find_sentences(lines)
        self.begins_word = words_begin(tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, from pieces kept since their first use."""
        ids: list[int] = []
        for piece in PIECE.findall(text):
            if piece not in self.pieces:
                self.pieces[piece] = self.tokenizer.encode(piece, add_special_tokens=False)
            ids += self.pieces[piece]
        return ids

    def passage(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens in a row that end with a newline, and the offsets at which their lines start.

        The last line is cut before a word, so that the text of the tokens encodes to the same tokens.
        """
        last = np.searchsorted(self.line_starts, len(self.ids) - length)
        if last == 0:
            raise ValueError(f"the library holds {len(self.ids)} tokens, too few for a passage of {length}")
        line = int(rng.integers(last))
        while not self.begins_word[self.ids[self.line_starts[line] + length - 1]]:
            line = (line + 1) % int(last)
        start = self.line_starts[line]
        end = np.searchsorted(self.line_starts, start + length - 1)
        ids = np.append(self.ids[start : start + length - 1], self.encode("\n"))
        return ids, self.line_starts[line:end] - start


def encode_lines(tokenizer: PreTrainedTokenizerBase, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All lines' tokens in one array, and each line's number of tokens."""
    ids, lengths = [], []
    for first in range(0, len(lines), 50_000):
        batch = tokenizer(lines[first : first + 50_000], add_special_tokens=False, return_attention_mask=False)
        lengths += map(len, batch["input_ids"])
        ids.append(np.concatenate([np.array(line, np.uint16) for line in batch["input_ids"]]))
    return np.concatenate(ids), np.array(lengths)


def words_begin(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """For each token id, whether it opens a word after a space or ends a line."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return np.array([re.fullmatch("Ġ[A-Za-z]+|Ċ", token) is not None for token in tokens])


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
    return Document(context_ids + library.encode(question), context, question, answer, tuple(depths))


def garbage_words(library: Library, tokens: int, depth: float) -> tuple[str, str]:
    """Two runs of the paper's garbage that hold `tokens` tokens together, the first about `depth` of them."""
    words = GARBAGE.split()
    lengths = [len(library.encode(words[0]))] + [len(library.encode(" " + word)) for word in words[1:] + words[:1]]
    ends = np.cumsum([lengths[0]] + [lengths[1 + index % len(words)] for index in range(tokens)])
    for prefix in np.argsort(np.abs(ends - depth * tokens), kind="stable"):
        suffix = np.searchsorted(ends, tokens - ends[prefix])
        if tokens > ends[prefix] and ends[suffix] == tokens - ends[prefix]:
            return tuple(" ".join(words[index % len(words)] for index in range(n + 1)) for n in (prefix, suffix))
    raise ValueError(f"{tokens} tokens are too few for the garbage of a passkey prompt")


def passkey(library: Library, length: int, depth: float, rng: np.random.Generator) -> Document:
    """The Quest paper's passkey prompt: a number between 1 and 50,000 hidden at `depth` in five sentences repeated."""
    key = str(rng.integers(1, 50_001))
    needle = PASSKEY_LINE.format(key=key)
    fixed = INTRODUCTION + "\n" + needle + "\n" + PASSKEY_QUESTION
    prefix, suffix = garbage_words(library, length - len(library.encode(fixed)), depth)
    before = library.encode(INTRODUCTION + prefix + "\n")
    context_ids = before + library.encode(needle + suffix + "\n")
    return document(library, context_ids, PASSKEY_QUESTION, f" {key}", [len(before) / len(context_ids)])


def facts(library: Library, length: int, depth: float, rng: np.random.Generator, count: int = 8) -> Document:
    """Real text with the secret codes of `count` people in it; the question asks for the one at `depth`."""
    people = draw_people(count, rng)
    lines = [FACT_LINE.format(name=name, code=code) for name, code in people]
    depths = rng.random(count)
    depths[0] = depth
    question = FACT_QUESTION.format(name=people[0][0])
    context_ids, places = compose(library, length - len(library.encode(question)), lines, depths, rng)
    return document(library, context_ids, question, f" {people[0][1]}", places[:1])


def digest(library: Library, length: int, depth: float, rng: np.random.Generator, count: int = 7) -> Document:
    """Real text with `count` numbered key points, the first in the first `depth`; the answer lists them in order."""
    lines = draw_points(library, count, rng)
    depths = np.sort(rng.random(count))
    depths[0] *= depth
    context_ids, places = compose(library, length - len(library.encode(DIGEST_QUESTION)), lines, depths, rng)
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
