"""Six tasks of RULER (arXiv 2404.06654), made here after the paper's definitions and in its words, of any length.

What is found in a haystack of sentences (`niah_single_1`) or of needles (`niah_multikey_2`, `niah_multikey_3`),
variables traced over assignments (`vt`), the commonest words of a list (`cwe`) and of a coded text (`fwe`).
"""

import itertools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from .documents import GARBAGE

MIN_UNITS = 12  # of sentences, needles or words
LETTERS = list("abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True)
class Sample:
    """`text` and `question` are asked of the model, whose answer begins with `prefix` and should name all `answers`."""

    text: str
    question: str
    prefix: str
    answers: tuple[str, ...]


@cache
def words(kinds: str = "noun adjective verb") -> list[str]:
    """The word lists of the package wonderwords, by name and in alphabetical order.

    Raises:
        ValueError: where that is not installed.
    """
    try:
        folder = files("wonderwords").joinpath("assets")
    except ImportError:
        raise ValueError('RULER\'s word lists need wonderwords: pip install "hf-quest[eval]"') from None
    lists = (folder.joinpath(f"{kind}list.txt").read_text(encoding="utf-8") for kind in kinds.split())
    return sorted({word.strip() for text in lists for word in text.splitlines() if word.strip()})


def draw_word(rng: np.random.Generator) -> str:
    return "-".join(words(kind)[rng.integers(len(words(kind)))] for kind in ("adjective", "noun"))


def draw_number(rng: np.random.Generator) -> str:
    return str(rng.integers(10**6, 10**7))


def draw_uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def insert(lines: list[str], others: list[str], rng: np.random.Generator) -> list[str]:
    """`lines` with `others` among them, in their order, at places drawn."""
    places = np.sort(rng.choice(len(lines) + 1, len(others), replace=len(others) > len(lines) + 1))
    merged_lines = list(lines)
    for place, line in reversed(list(zip(places, others, strict=True))):
        merged_lines.insert(place, line)
    return merged_lines


def needle(
    num_units: int, rng: np.random.Generator, kind: str, draw_key: Callable, draw_value: Callable, in_needles: bool
) -> Sample:
    """One needle among sentences that say nothing or among needles that are not asked for."""
    line = f"One of the special magic {kind}s for {{key}} is: {{value}}."
    key, value = draw_key(rng), draw_value(rng)
    if in_needles:
        hay = [line.format(key=draw_key(rng), value=draw_value(rng)) for _ in range(num_units)]
    else:
        hay = [GARBAGE] * num_units
    lines = insert(hay, [line.format(key=key, value=value)], rng)
    opening = (
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the {kind} afterwards.\n"
    )
    question = f"What is the special magic {kind} for {key} mentioned in the provided text?"
    prefix = f" The special magic {kind} for {key} mentioned in the provided text is"
    return Sample(opening + "\n".join(lines) + "\n", question, prefix, (value,))


def variables(num_units: int, rng: np.random.Generator, num_hops: int = 4, size: int = 5) -> Sample:
    """A chain of assignments among sentences that say nothing: which variables have the first one's value?"""
    names: dict[str, None] = {}
    while len(names) <= num_hops:
        names["".join(rng.choice(LETTERS, size)).upper()] = None
    value, chain = str(rng.integers(10_000, 100_000)), list(names)
    assignments = [f"VAR {chain[0]} = {value}"]
    assignments += [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(chain)]
    lines = insert([GARBAGE] * num_units, assignments, rng)
    opening = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    question = f"Question: Find all variables that are assigned the value {value} in the text above."
    prefix = (
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(chain)} variables are "
        f"assigned the value {value}, they are: "
    )
    return Sample(opening + "\n".join(lines) + "\n", question, prefix, tuple(chain))


def common_words(num_units: int, rng: np.random.Generator, common: int = 30, others: int = 3) -> Sample:
    """A numbered list in which ten words stand more often than the rest."""
    drawn = rng.choice(words(), 10 + num_units, replace=False).tolist()
    listed = rng.permutation(drawn[:10] * common + drawn[10:] * others)
    text = " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
    opening = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    question = "Question: What are the 10 most common words in the above list?"
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    return Sample(f"{opening}{text}\n", question, prefix, tuple(drawn[:10]))


def few_common_words(num_units: int, rng: np.random.Generator) -> Sample:
    """`common_words` as the paper has it below 4,096 tokens."""
    return common_words(num_units, rng, 6, 1)


def frequent_words(num_units: int, rng: np.random.Generator, alpha: float = 2.0) -> Sample:
    """A text of coded words, the n-th of which stands in it as often as n^-alpha says; dots are the first."""
    coded = ["...."] + ["".join(rng.choice(LETTERS, 6)) for _ in range(max(10, num_units // 10))]
    shares = np.arange(1, 10**6, dtype=float) ** -alpha
    counts = (num_units * shares[: len(coded)] / shares.sum()).astype(int)
    text = " ".join(rng.permutation(np.repeat(coded, counts)))
    opening = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. "
    )
    question = (
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?"
    )
    prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return Sample(f"{opening}{text}\n", question, prefix, tuple(coded[1:4]))


def with_example(make: Callable[..., Sample], num_units: int, rng: np.random.Generator, example: Sample) -> Sample:
    """A sample behind another one of its task, solved."""
    sample = make(num_units, rng)
    if make is variables:
        solution = " ".join(example.answers)
    else:
        solution = " ".join(f"{number}. {word}" for number, word in enumerate(example.answers, start=1))
    solved = f"{example.text}{example.question}{example.prefix.rstrip()} {solution}\n\n"
    return Sample(solved + sample.text, sample.question, sample.prefix, sample.answers)


def make_vt(num_units: int, rng: np.random.Generator, length: int) -> Sample:
    return with_example(variables, num_units, rng, variables(5, rng, size=3))


def make_cwe(num_units: int, rng: np.random.Generator, length: int) -> Sample:
    if length < 4096:
        return with_example(few_common_words, num_units, rng, common_words(10, rng, 3, 1))
    return with_example(common_words, num_units, rng, common_words(30, rng, 10, 3))


# By name: how a sample of so many units is made, and how many tokens the paper gives the answer.
TASKS: dict[str, tuple[Callable[[int, np.random.Generator, int], Sample], int]] = {
    "niah_single_1": (lambda n, rng, _: needle(n, rng, "number", draw_word, draw_number, False), 128),
    "niah_multikey_2": (lambda n, rng, _: needle(n, rng, "number", draw_word, draw_number, True), 128),
    "niah_multikey_3": (lambda n, rng, _: needle(n, rng, "uuid", draw_uuid, draw_uuid, True), 128),
    "vt": (make_vt, 30),
    "cwe": (make_cwe, 120),
    "fwe": (lambda n, rng, _: frequent_words(n, rng), 50),
}
