"""The six sets of LongBench (arXiv 2308.14508) that Quest's paper reports, by Quest's protocol (its figure 7).

Prompts, answer lengths and metrics are LongBench's. A prompt longer than `max_length` keeps its first and last half.
The question is fed token by token: what follows its marker, at most 100 characters. No chat template is applied, as
Quest's repository has it for Llama 3.1 and Mistral.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import first_line
from .methods import METHODS, answer, check_length, make_ways, read
from .report import Results, comparison, mean, merged, spread

HUB_DATA = ("THUDM/LongBench", "data.zip")
TAIL = 100  # characters, at most, that are fed token by token


@dataclass(frozen=True)
class Set:
    prompt: str
    marker: str  # where in the prompt the question begins
    max_new_tokens: int
    metric: str
    takes_first_line: bool = False  # of an answer


SETS = {
    "qasper": Set(
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
        'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as "
        "concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
        'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
        '"no", or "unanswerable". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:',
        "Question:",
        128,
        "f1",
    ),
    "hotpotqa": Set(
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only "
        "give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        "Question:",
        32,
        "f1",
    ),
    "multifieldqa_en": Set(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        "Now,",
        64,
        "f1",
    ),
    "gov_report": Set(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}"
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        "Now,",
        512,
        "rouge-l",
    ),
    "narrativeqa": Set(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: "
        "{context}\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if "
        "possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        "Do not provide",
        128,
        "f1",
    ),
    "triviaqa": Set(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        "Answer the question",
        32,
        "f1",
        takes_first_line=True,
    ),
}


def load_set(name: str, folder: Path | str | None = None) -> list[dict[str, Any]]:
    """The samples of a set: dicts with `context`, `input` and `answers`.

    `folder` has NAME.jsonl in it, or is LongBench's data.zip; without one it comes from the hub.

    Raises:
        ValueError: in one line, where it cannot be had or is not of LongBench's format.
    """
    if name not in SETS:
        raise ValueError(f"There is no set {name!r}. The sets are {', '.join(SETS)}.")
    try:
        source = Path(hf_hub_download(*HUB_DATA, repo_type="dataset") if folder is None else folder)
        if source.is_dir():
            text = (source / f"{name}.jsonl").read_text(encoding="utf-8")
        else:
            with zipfile.ZipFile(source) as archive, archive.open(f"data/{name}.jsonl") as file:
                text = io.TextIOWrapper(file, encoding="utf-8").read()
    except Exception as error:  # whatever the hub, the network, the zip file or the disk raise
        remedy = " Or give a folder with its files." if folder is None else ""
        raise ValueError(f"LongBench's {name} cannot be read: {first_line(error).rstrip('.')}.{remedy}") from None
    try:
        samples = [json.loads(line) for line in text.splitlines() if line.strip()]
        samples = [{field: sample[field] for field in ("context", "input", "answers")} for sample in samples]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{source} has no {name} in LongBench's format: context, input and answers a line.") from None
    if not samples:
        raise ValueError(f"{source} has no samples of {name}.")
    return samples


def encode(
    tokenizer: PreTrainedTokenizerBase, chosen: Set, sample: dict[str, Any], max_length: int
) -> tuple[list, list]:
    """Token ids of what is prefilled and of what is fed token by token."""
    prompt = chosen.prompt.format(context=sample["context"], input=sample["input"])
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if len(ids) > max_length:
        half = max_length // 2
        halves = (ids[:half], ids[len(ids) - half :])
        prompt = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in halves)
    split = max(len(prompt) - TAIL, prompt.rfind(chosen.marker))
    return tokenizer.encode(prompt[:split]), tokenizer.encode(prompt[split:], add_special_tokens=False)


def score(metric: str, prediction: str, references: Sequence[str]) -> float:
    """From 0 to 1, the best over the references.

    F1 is SQuAD's, of the bags of words without case, punctuation and articles, by torchmetrics; ROUGE-L is the F
    measure of Google's `rouge-score`, without stemming. (LongBench uses the package `rouge`, which cuts words
    otherwise.)
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from torchmetrics.functional.text import squad
    except ImportError:
        raise ValueError('LongBench needs metrics: pip install "hf-quest[eval]"') from None
    if metric == "rouge-l":
        return RougeScorer(["rougeL"]).score_multi(references, prediction)["rougeL"].fmeasure
    target = {"answers": {"answer_start": [0] * len(references), "text": list(references)}, "id": "0"}
    return squad([{"prediction_text": prediction, "id": "0"}], [target])["f1"].item() / 100


def evaluate_longbench(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sets: Sequence[str] = tuple(SETS),
    folder: Path | str | None = None,
    max_length: int | None = None,
    methods: Sequence[str] = METHODS,
    budgets: Sequence[int] = (512, 1024, 2048),
    fraction: float = 1.0,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """The mean score of greedy answers, one document at a time.

    Args:
        model, tokenizer: as `methods.load` brings them.
        sets: of SETS.
        folder: a folder of JSONL files, or LongBench's data.zip. By default from the hub.
        max_length: tokens of a prompt, its middle left out where it is longer. By default what the model's context
            leaves beside the answer.
        methods, budgets: what to compare; budgets are tokens. Those of a document's length or more are dense for it.
        fraction: the share of each set to run.
        output: a JSON file, with which an interrupted run goes on.

    Returns:
        The report: configuration, environment and records, each with one answer and its score.

    Raises:
        ValueError: for what cannot be evaluated, before anything is.
    """
    ways = make_ways(methods, budgets)
    score("f1", "", [""])  # raises without the metrics
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest_answer = max((SETS[name].max_new_tokens for name in sets if name in SETS), default=0)
    if max_length is None:
        max_length = (limit or 32_768) - longest_answer
    check_length(model, max_length + longest_answer, ways)
    configuration = {
        "evaluation": "longbench",
        "sets": list(sets),
        "folder": None if folder is None else str(folder),
        "max_length": max_length,
        "methods": list(methods),
        "budgets": list(budgets),
        "fraction": fraction,
    }
    results = Results(model, configuration, output)
    units = {}
    for name in sets:
        samples = load_set(name, folder)
        for index in spread(range(len(samples)), fraction):
            units[f"{name} {index + 1}"] = (name, samples[index])

    def evaluate(unit: str) -> Iterator[dict[str, Any]]:
        name, sample = units[unit]
        chosen = SETS[name]
        context, tail = encode(tokenizer, chosen, sample, max_length)
        ids = torch.tensor([context + tail], device=model.device)
        for way, cache in read(model, ways, ids[:, : len(context)], None):
            output = answer(model, cache, ids, None, chosen.max_new_tokens)
            text = tokenizer.decode(output[0], skip_special_tokens=True)
            if chosen.takes_first_line:
                text = next(iter(text.lstrip("\n").split("\n")))
            yield {
                "set": name,
                **way._asdict(),
                "scores": [score(chosen.metric, text, sample["answers"])],
                "answer": text,
                "tokens": ids.shape[1],
            }

    results.run(units, evaluate)
    return results.report


def longbench_table(report: dict[str, Any]) -> Table:
    """Scores out of 100."""
    scores = merged(report["records"], ("set",), "scores")
    cells = (((name, SETS[name].metric), way, f"{100 * mean(values):.2f}") for ((name,), way), values in scores.items())
    return comparison(("set", "metric"), cells)
