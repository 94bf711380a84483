"""How often a model finds what a long document holds: dense attention beside Quest at several budgets.

The protocol is the paper's: the document is prefilled dense, the question is fed token by token, so that Quest selects
pages for it too, and the answer is greedy, through stock `generate` on the same cache. On request the same is done
after a prefill by CritiPrefill, beside held-out perplexity and the attention mass that its segments keep.
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

from .. import CritiPrefill, QuestCache, __version__, prefill, tiny
from .documents import JOBS, Document, Library, documents, heldout_text


@dataclass(frozen=True)
class Result:
    """The mean score of one job at one length.

    `budget` is None for dense attention, and `prefill_budget`, CritiPrefill's, for a dense prefill.
    """

    job: str
    length: int
    budget: int | None
    accuracy: float
    scores: list[float]
    depths: list[tuple[float, ...]]
    seconds: float
    prefill_budget: int | None = None


def score(job: str, answer: str, document: Document) -> float:
    """1 or 0 for a code; for a digest the share of its key points that `answer` gives verbatim."""
    if job == "digest":
        points = document.answer.strip().splitlines()
        return len(set(points) & set(answer.splitlines())) / len(points)
    number = re.search(r"\d+", answer)
    return float(number is not None and number.group() == document.answer.strip())


def read(model: PreTrainedModel, ids: Tensor, cache: DynamicCache | QuestCache) -> None:
    """Runs `ids`, `[batch, length]`, through the model and keeps nothing but the cache."""
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def answer(
    model: PreTrainedModel, ids: Tensor, question_len: int, cache: DynamicCache | QuestCache, max_new_tokens: int
) -> Tensor:
    """Feeds the last `question_len` tokens of `ids` one by one and returns the greedy answers, `[batch, new]`.

    `cache` already holds the tokens before them, and grows.
    """
    for position in range(ids.shape[1] - question_len, ids.shape[1] - 1):
        read(model, ids[:, position : position + 1], cache)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return output[:, ids.shape[1] :]


class Examiner:
    """Asks one model about batches of documents, dense and at each of `budgets`, after each kind of prefill."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budgets: Sequence[int],
        prefill_budgets: Sequence[int] = (),
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.budgets = list(budgets)
        self.prefill_budgets = [None, *prefill_budgets] if self.budgets else []

    @torch.no_grad()
    def ask(self, batch: list[Document]) -> Iterator[tuple[tuple[int | None, int | None], list[str]]]:
        """Yields ((None, None), answers) for dense attention, then ((budget, prefill_budget), answers)."""
        ids = torch.tensor([document.ids for document in batch], device=self.model.device)
        question_len = max(len(self.encode(document.question)) for document in batch)
        max_new_tokens = max(len(self.encode(document.answer)) for document in batch) + 8
        context = ids[:, :-question_len]
        self.model.set_attn_implementation("sdpa")
        cache = DynamicCache(config=self.model.config)
        read(self.model, context, cache)
        yield (None, None), self.decode(answer(self.model, ids, question_len, cache, max_new_tokens))
        self.model.set_attn_implementation("quest")
        for prefill_budget in self.prefill_budgets:
            prefilled = new_cache(prefill_budget, self.budgets[0])
            read(self.model, context, prefilled)
            for budget in self.budgets:
                cache = copy.deepcopy(prefilled)
                cache.budget = budget
                answers = self.decode(answer(self.model, ids, question_len, cache, max_new_tokens))
                yield (budget, prefill_budget), answers

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def examine(self, job: str, papers: list[Document], batch_size: int) -> list[Result]:
        """The results of one job over documents of one length."""
        asked = [(budget, prefill_budget) for prefill_budget in self.prefill_budgets for budget in self.budgets]
        scores: dict[tuple[int | None, int | None], list[float]] = {key: [] for key in [(None, None), *asked]}
        seconds = dict.fromkeys(scores, 0.0)
        for first in track(range(0, len(papers), batch_size), f"{job}, {len(papers[0].ids)} tokens", transient=True):
            batch = papers[first : first + batch_size]
            started = time.perf_counter()
            for key, answers in self.ask(batch):
                scores[key] += [score(job, text, document) for text, document in zip(answers, batch, strict=True)]
                seconds[key] += time.perf_counter() - started
                started = time.perf_counter()
        depths = [document.depths for document in papers]
        return [
            Result(job, len(papers[0].ids), key[0], sum(values) / len(values), values, depths, seconds[key], key[1])
            for key, values in scores.items()
        ]


def new_cache(prefill_budget: int | None, budget: int = 2048, **settings) -> QuestCache:
    """A cache that reads prompts dense, or by CritiPrefill with this budget."""
    critical = None if prefill_budget is None else CritiPrefill(budget=prefill_budget, **settings)
    return QuestCache(budget=budget, prefill=critical)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, library: Library, window: int = 4096, prefill_budget: int | None = None
) -> float:
    """exp of the mean loss per token of the library's text, read in windows of `window` tokens, dense by default."""
    ids = torch.from_numpy(library.ids.astype("int64")).to(model.device)
    total, count = 0.0, 0
    for chunk in track(ids.split(window), "perplexity", transient=True):
        if len(chunk) > 1:
            cache = {} if prefill_budget is None else {"past_key_values": new_cache(prefill_budget)}
            logits = model(chunk[None], use_cache=bool(cache), **cache).logits[0, :-1]
            for part, targets in zip(logits.split(4096), chunk[1:].split(4096), strict=True):
                total += cross_entropy(part.float(), targets, reduction="sum").item()
            count += len(chunk) - 1
    return math.exp(total / count)


@torch.no_grad()
def attention_mass(model: PreTrainedModel, ids: Tensor, cache: QuestCache) -> dict[int, float]:
    """For each layer with sparse segments, the share of dense attention mass that they keep while reading `ids` [1, N].

    Mean over their queries and heads: of the softmax over all keys, what falls on the attended blocks and the segment.
    """
    shares: dict[int, list[float]] = {}

    def watch(layer_idx: int, position: int, query: Tensor, keys: Tensor, block_ids: Tensor) -> None:
        segment_size, block_size = query.shape[2], cache.prefill.block_size
        scaling = query.shape[-1] ** -0.5
        chosen = prefill.gather(keys, block_ids, block_size)
        for segment in range(query.shape[0]):
            start = position + segment * segment_size
            own, before = keys[None, :, start : start + segment_size], keys[None, :, :start]
            logsumexp = {}
            for name, part in (("own", own), ("before", before), ("chosen", chosen[segment, None])):
                one = query[segment, None]
                logsumexp[name] = prefill.attention(one, part, part, name == "own", scaling, None)[1]
            kept, whole = (torch.logaddexp(logsumexp["own"], logsumexp[name]) for name in ("chosen", "before"))
            shares.setdefault(layer_idx, []).append((kept - whole).exp().mean().item())

    model.set_attn_implementation("quest")
    cache.watch_prefill(watch)
    read(model, ids, cache)
    return {layer_idx: sum(values) / len(values) for layer_idx, values in shares.items()}


def measure_prefill(
    model: PreTrainedModel, library: Library, lengths: Sequence[int], prefill_budgets: Sequence[int]
) -> list[dict]:
    """Held-out perplexity and attention mass at every length, dense and for every budget of CritiPrefill."""
    model.set_attn_implementation("quest")
    ids = torch.from_numpy(library.ids.astype("int64")).to(model.device)
    measured = []
    for length in lengths:
        dense = perplexity(model, library, length)
        for budget in prefill_budgets:
            measured.append(
                {
                    "length": length,
                    "prefill_budget": budget,
                    "dense_perplexity": dense,
                    "perplexity": perplexity(model, library, length, budget),
                    "attention_mass": {
                        name: attention_mass(model, ids[None, :length], new_cache(budget, score=name))
                        for name in prefill.SCORES
                    },
                }
            )
    return measured


def prefill_table(measured: list[dict]) -> Table:
    """One row for each length and budget: perplexity beside dense, and each score's attention mass by layer."""
    names = [f"attention mass, {name}" for name in prefill.SCORES]
    table = Table("tokens", "prefill budget", "perplexity", "dense perplexity", *names)
    for row in measured:
        masses = [" ".join(f"{mass:.3f}" for mass in row["attention_mass"][name].values()) for name in prefill.SCORES]
        cells = (f"{row['length']:,}", f"{row['prefill_budget']:,}", f"{row['perplexity']:.3f}")
        table.add_row(*cells, f"{row['dense_perplexity']:.3f}", *masses)
    return table


def results_table(results: list[Result]) -> Table:
    """One row for each job, length and prefill: dense accuracy, each budget's, and its share of dense in brackets."""
    budgets = sorted({result.budget for result in results if result.budget})
    found = {(result.job, result.length, result.budget, result.prefill_budget): result.accuracy for result in results}
    prefills = sorted({result.prefill_budget for result in results}, key=lambda budget: budget or 0)
    has_prefill = prefills != [None]
    named = ["prefill"] if has_prefill else []
    table = Table("job", "tokens", "documents", *named, "dense", *(f"budget {budget}" for budget in budgets))
    for dense in (result for result in results if result.budget is None):
        for prefill_budget in prefills:
            cells = [found[dense.job, dense.length, budget, prefill_budget] for budget in budgets]
            shares = [
                f"{value:.1%} ({value / dense.accuracy:.1%})" if dense.accuracy else f"{value:.1%}" for value in cells
            ]
            kind = ["dense" if prefill_budget is None else f"{prefill_budget:,}"] if has_prefill else []
            cells = (f"{dense.length:,}", str(len(dense.scores)), *kind, f"{dense.accuracy:.1%}")
            table.add_row(dense.job, *cells, *shares)
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
    prefill_budgets: Sequence[int] = (),
) -> list[Result]:
    """Measures recall on held-out text, prints a table and writes everything to `output` as JSON.

    Each length is the whole prompt's in tokens, each budget the tokens that a KV head attends in a decode step, each
    prefill budget CritiPrefill's, beside a dense prefill. The model's tokenizer must keep digits and newlines as tokens
    of their own, as the tiny model's does.
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
        "prefill_budgets": list(prefill_budgets),
    }
    console = Console()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    library = Library(tokenizer, heldout_text())
    examiner = Examiner(model, tokenizer, budgets, prefill_budgets)
    heldout_perplexity = perplexity(model, library)
    measured = measure_prefill(model, library, lengths, prefill_budgets)
    results = []
    for job in jobs:
        for length in lengths:
            papers = list(documents(library, job, length, documents_per_length, seed))
            results += examiner.examine(job, papers, batch_size)
    console.print(f"{processor(model.device)}, {dtype}, torch {torch.__version__}, hf_quest {__version__}, seed {seed}")
    console.print(f"held-out perplexity per token, 4,096 at a time: {heldout_perplexity:.2f}")
    console.print(results_table(results))
    if measured:
        console.print(prefill_table(measured))
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
            "prefill": measured,
            "results": [asdict(result) for result in results],
        }
        output.write_text(json.dumps(report, indent=1) + "\n")
    return results
