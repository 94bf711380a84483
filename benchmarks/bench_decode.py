"""Milliseconds per generated token of the tiny model, stock and with QuestCache, at several context lengths.

    python benchmarks/bench_decode.py
    python benchmarks/bench_decode.py --device cuda

Every context is held-out text that the model has really read, and every token goes through stock `generate`. The ways
take turns, round after round, so that a disturbance of the machine meets all of them. A result is the median over the
rounds of each round's median.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from environment import describe
from rich.console import Console
from rich.progress import track
from tables import RESULTS, decode_table, markdown
from transformers.generation.streamers import BaseStreamer

from hf_quest import CACHE_NAME, QuestCache, demo, tiny
from hf_quest.evaluation.documents import Library, heldout_text


class Stopwatch(BaseStreamer):
    """A streamer for `generate` that keeps the seconds of each new token."""

    def __init__(self):
        self.seconds = []
        self.last = None

    def put(self, value):
        now = time.perf_counter()
        if self.last is not None:  # the first call brings the prompt
            self.seconds.append(now - self.last)
        self.last = time.perf_counter()

    def end(self):
        pass

    @property
    def milliseconds(self):
        """The median. The first token is left out, as it can come with a prompt."""
        return 1000 * statistics.median(self.seconds[1:])


class Way:
    """One way to decode: a prefilled cache, the attention that goes with it, and what each round measured."""

    def __init__(self, name, attn_implementation, cache, budget=None):
        self.name = name
        self.attn_implementation = attn_implementation
        self.cache = cache
        self.budget = budget
        self.round_ms = []

    def run(self, model, input_ids, num_steps):
        """Decode `num_steps` tokens on top of the context, time each, and put the cache back."""
        model.set_attn_implementation(self.attn_implementation)
        if self.budget is not None:
            self.cache.budget = self.budget
        stopwatch = Stopwatch()
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            **{CACHE_NAME: self.cache},
            streamer=stopwatch,
            max_new_tokens=num_steps + 1,
            min_new_tokens=num_steps + 1,
            do_sample=False,
        )
        self.read_share = getattr(self.cache, "read_share", 1.0)
        self.round_ms.append(stopwatch.milliseconds)
        self.cache.crop(input_ids.shape[1] - 1 - self.cache.get_seq_length())

    def result(self):
        return {
            "way": self.name,
            "budget": self.budget,
            "ms_per_token": round(statistics.median(self.round_ms), 2),
            "round_ms": [round(ms, 2) for ms in self.round_ms],
            "read_share": round(self.read_share, 4),
        }


def measure(model, token_ids, budgets, num_steps, num_rounds):
    """One context: a dict with its length in tokens and the results of every way."""
    cache = QuestCache()
    demo.prefill(model, cache, token_ids[:, :-1])
    num_tokens = token_ids.shape[1]
    beyond = 2 * num_tokens
    ways = [
        Way("DynamicCache, sdpa", "sdpa", demo.stock_copy(cache, model.config)),
        Way("QuestCache, everything", "quest", cache, beyond),
        *(Way(f"QuestCache, budget {budget}", "quest", cache, budget) for budget in budgets),
    ]
    for _ in track(range(num_rounds), f"{num_tokens} tokens", transient=True):
        for way in ways:
            way.run(model, token_ids, num_steps)
    return {"context": num_tokens, "results": [way.result() for way in ways]}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="tokens of context")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--steps", type=int, default=24, help="tokens timed per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for .json, .md")
    return parser.parse_args()


def write(report, path):
    """The report as JSON, and its table and conditions as Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    title = "Decoding with the tiny model: ms per token, and the speedup over the stock way"
    conditions = "".join(f"- {name}: {value}\n" for name, value in report["environment"].items())
    path.with_suffix(".md").write_text(f"# {title}\n\n{markdown(decode_table(report))}\n{conditions}")
    print(f"written to {path} and {path.with_suffix('.md').name}")


def main():
    arguments = parse_arguments()
    model, tokenizer = demo.load(tiny.PATH, arguments.device)
    text_ids = torch.tensor(Library(tokenizer, heldout_text()).ids.astype("int64"), device=arguments.device)
    contexts = [
        measure(model, text_ids[None, :length], arguments.budgets, arguments.steps, arguments.rounds)
        for length in arguments.lengths
    ]
    report = {"environment": describe(arguments.device), "contexts": contexts}
    Console().print(decode_table(report))
    write(report, arguments.output / f"decode_{arguments.device}.json")


if __name__ == "__main__":
    main()
