"""How often a model finds what a long document holds: dense attention beside Quest at several budgets.

The protocol is the paper's: the document is prefilled dense, the question is fed token by token, so that Quest selects
pages for it too, and the answer is greedy, through stock `generate` on the same cache.
"""

import copy
import json
import math
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import QuestCache, __version__, tiny
from .documents import JOBS, Document, Library, documents, heldout_text


@dataclass(frozen=True)
class Result:
    """The mean score of one job at one length; `budget` is None for dense attention."""

    job: str
    length: int
    budget: int | None
    accuracy: float
    scores: list[float]
    depths: list[tuple[float, ...]]
    seconds: float


def score(job: str, answer: str, document: Document) -> float:
    """1 or 0 for a code; for a digest the share of its key points that `answer` gives verbatim."""
    if job == "digest":
        points = document.answer.strip().splitlines()
        return len(set(points) & set(answer.splitlines())) / len(points)
    number = re.search(r"\d+", answer)
    return float(number is not None and number.group() == document.answer.strip())


def prefill(model: PreTrainedModel, ids: Tensor, cache: DynamicCache | QuestCache) -> None:
    """Runs `ids`, `[batch, length]`, through the model and keeps nothing but the cache."""
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def answer(
    model: PreTrainedModel, ids: Tensor, question_len: int, cache: DynamicCache | QuestCache, max_new_tokens: int
) -> Tensor:
    """Feeds the last `question_len` tokens of `ids` one by one and returns the greedy answers, `[batch, new]`.

    `cache` already holds the tokens before them, and grows.
    """
    for position in range(ids.shape[1] - question_len, ids.shape[1] - 1):
        prefill(model, ids[:, position : position + 1], cache)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return output[:, ids.shape[1] :]


class Examiner:
    """Asks one model about batches of documents, dense and at each of `budgets`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, budgets: Sequence[int]):
        self.model = model
        self.tokenizer = tokenizer
        self.budgets = list(budgets)

    @torch.no_grad()
    def ask(self, batch: list[Document]) -> Iterator[tuple[int | None, list[str]]]:
        """Yields (None, answers) for dense attention, then (budget, answers) for each budget."""
        ids = torch.tensor([document.ids for document in batch], device=self.model.device)
        question_len = max(len(self.encode(document.question)) for document in batch)
        max_new_tokens = max(len(self.encode(document.answer)) for document in batch) + 8
        context = ids[:, :-question_len]
        self.model.set_attn_implementation("sdpa")
        cache = DynamicCache(config=self.model.config)
        prefill(self.model, context, cache)
        yield None, self.decode(answer(self.model, ids, question_len, cache, max_new_tokens))
        if self.budgets:
            self.model.set_attn_implementation("quest")
            prefilled = QuestCache(budget=self.budgets[0])
            prefill(self.model, context, prefilled)
        for budget in self.budgets:
            cache = copy.deepcopy(prefilled)
            cache.budget = budget
            yield budget, self.decode(answer(self.model, ids, question_len, cache, max_new_tokens))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def examine(self, job: str, papers: list[Document], batch_size: int) -> list[Result]:
        """The results of one job over documents of one length."""
        scores: dict[int | None, list[float]] = {budget: [] for budget in [None, *self.budgets]}
        seconds = dict.fromkeys(scores, 0.0)
        for first in track(range(0, len(papers), batch_size), f"{job}, {len(papers[0].ids)} tokens", transient=True):
            batch = papers[first : first + batch_size]
            started = time.perf_counter()
            for budget, answers in self.ask(batch):
                scores[budget] += [score(job, text, document) for text, document in zip(answers, batch, strict=True)]
                seconds[budget] += time.perf_counter() - started
                started = time.perf_counter()
        depths = [document.depths for document in papers]
        return [
            Result(job, len(papers[0].ids), budget, sum(values) / len(values), values, depths, seconds[budget])
            for budget, values in scores.items()
        ]


@torch.no_grad()
def perplexity(model: PreTrainedModel, library: Library, window: int = 4096) -> float:
    """exp of the mean loss per token of the library's text, read dense in windows of `window` tokens."""
    ids = torch.from_numpy(library.ids.astype("int64")).to(model.device)
    total, count = 0.0, 0
    for chunk in track(ids.split(window), "perplexity", transient=True):
        if len(chunk) > 1:
            logits = model(chunk[None], use_cache=False).logits[0, :-1].float()
            total += cross_entropy(logits, chunk[1:], reduction="sum").item()
            count += len(chunk) - 1
    return math.exp(total / count)


def results_table(results: list[Result]) -> Table:
    """One row for each job and length: dense accuracy, then each budget's, and its share of dense in brackets."""
    budgets = sorted({result.budget for result in results if result.budget})
    found = {(result.job, result.length, result.budget): result.accuracy for result in results}
    table = Table("job", "tokens", "documents", "dense", *(f"budget {budget}" for budget in budgets))
    for dense in (result for result in results if result.budget is None):
        cells = [found[dense.job, dense.length, budget] for budget in budgets]
        shares = [
            f"{value:.1%} ({value / dense.accuracy:.1%})" if dense.accuracy else f"{value:.1%}" for value in cells
        ]
        table.add_row(dense.job, f"{dense.length:,}", str(len(dense.scores)), f"{dense.accuracy:.1%}", *shares)
    return table


def processor(device: torch.device) -> str:
    """The name of the GPU or CPU behind `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def run(
    model_path: str | Path = tiny.PATH,
    jobs: Sequence[str] = tuple(JOBS),
    lengths: Sequence[int] = (10_240,),
    budgets: Sequence[int] = (64, 256, 512),
    documents_per_length: int = 100,
    seed: int = 1,
    device: str = "cpu",
    dtype: str = "bfloat16",
    batch_size: int = 8,
    output: Path | None = None,
) -> list[Result]:
    """Measures recall on held-out text, prints a table and writes everything to `output` as JSON.

    Each length is the whole prompt's in tokens, each budget the tokens that a KV head attends in a decode step. The
    model's tokenizer must keep digits and newlines as tokens of their own, as the tiny model's does.
    """
    configuration = {
        "model": "hf_quest.tiny" if model_path == tiny.PATH else str(model_path),
        "jobs": list(jobs),
        "lengths": list(lengths),
        "budgets": list(budgets),
        "documents_per_length": documents_per_length,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "batch_size": batch_size,
    }
    console = Console()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    library = Library(tokenizer, heldout_text())
    examiner = Examiner(model, tokenizer, budgets)
    heldout_perplexity = perplexity(model, library)
    results = []
    for job in jobs:
        for length in lengths:
            papers = list(documents(library, job, length, documents_per_length, seed))
            results += examiner.examine(job, papers, batch_size)
    console.print(f"{processor(model.device)}, {dtype}, torch {torch.__version__}, hf_quest {__version__}, seed {seed}")
    console.print(f"held-out perplexity per token, 4,096 at a time: {heldout_perplexity:.2f}")
    console.print(results_table(results))
    if output:
        report = {
            "command": shlex.join(["hf-quest", *sys.argv[1:]]),
            "configuration": configuration,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "hf_quest": __version__,
            },
            "processor": processor(model.device),
            "heldout_perplexity": heldout_perplexity,
            "results": [asdict(result) for result in results],
        }
        output.write_text(json.dumps(report, indent=1) + "\n")
    return results
