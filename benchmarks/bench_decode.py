"""Milliseconds per generated token, stock and with QuestCache, at several context lengths.

    python benchmarks/bench_decode.py
    python benchmarks/bench_decode.py --model build/models/smollm2 --lengths 1024 2048 4096 8000 --budgets 256 512 2048
    python benchmarks/bench_decode.py --device cuda

The model is the one inside, or that of a folder. Every context is held-out text that it has really read, and every
token goes through stock `generate`. The ways take turns, round after round, so that a disturbance of the machine meets
all of them. A round has as many tokens as a page, of which one fills a page, and every round has the same ones. A
result is the mean over these tokens of the fastest that each was in any round, as the machine has others to serve, too.
Beside it stand the median of the rounds' means and, as the result, the time that the process computed in all threads.
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
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

from hf_quest import CACHE_NAME, QuestCache, demo, tiny
from hf_quest.evaluation.documents import Library, heldout_text

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]


class Stopwatch(BaseStreamer):
    """A streamer for `generate` that keeps, of each new token, the seconds and those in which the process computed."""

    def __init__(self):
        self.seconds = []
        self.last = None

    def put(self, value):
        now = (time.perf_counter(), time.process_time())
        if self.last is not None:  # the first call brings the prompt
            self.seconds.append([after - before for after, before in zip(now, self.last, strict=True)])
        self.last = (time.perf_counter(), time.process_time())

    def end(self):
        pass

    @property
    def milliseconds(self):
        """Both, for each token. The first is left out, as it can come with a prompt."""
        return [[1000 * each for each in seconds] for seconds in zip(*self.seconds[1:], strict=True)]


class Way:
    """One way to decode: a prefilled cache, the attention that goes with it, and what each round measured."""

    def __init__(self, name, attn_implementation, cache, budget=None):
        self.name = name
        self.attn_implementation = attn_implementation
        self.cache = cache
        self.budget = budget
        self.round_ms, self.round_cpu_ms = [], []

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
        milliseconds, cpu_milliseconds = stopwatch.milliseconds
        self.round_ms.append(milliseconds)
        self.round_cpu_ms.append(cpu_milliseconds)
        num_new = self.cache.get_seq_length() - input_ids.shape[1] + 1
        if isinstance(self.cache, StaticCache):
            rewind(self.cache, input_ids.shape[1] - 1)
        else:
            self.cache.crop(-int(num_new))

    def result(self):
        return {
            "way": self.name,
            "budget": self.budget,
            "ms_per_token": fastest(self.round_ms),
            "median_ms": round(statistics.median(map(statistics.mean, self.round_ms)), 2),
            "cpu_ms": fastest(self.round_cpu_ms),
            "round_ms": [round(statistics.mean(ms), 2) for ms in self.round_ms],
            "read_share": round(self.read_share, 4),
        }


def fastest(rounds):
    """The mean over a round's tokens of the least that each took."""
    return round(statistics.mean(map(min, zip(*rounds, strict=True))), 2)


def rewind(cache, length):
    """Have a StaticCache hold its first `length` tokens, which it has no way to be asked for."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def static_copy(cache, config, num_new):
    """A StaticCache, with room for `num_new` more, of the keys and values of a QuestCache."""
    stock = StaticCache(config=config, max_cache_len=cache.get_seq_length() + num_new)
    for layer_idx, layer in enumerate(cache.layers):
        stock.update(layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length], layer_idx)
    return stock


def measure(model, token_ids, arguments):
    """One context: a dict with its length in tokens and the results of every way."""
    budgets, num_steps, num_rounds = arguments.budgets, arguments.steps, arguments.rounds
    cache = QuestCache(codes=arguments.codes)
    demo.prefill(model, cache, token_ids[:, :-1])
    num_tokens = token_ids.shape[1]
    beyond = 2 * num_tokens
    ways = [
        Way("DynamicCache, sdpa", "sdpa", demo.stock_copy(cache, model.config)),
        Way("StaticCache, sdpa", "sdpa", static_copy(cache, model.config, num_steps + 2)),
        Way("QuestCache, everything", "quest", cache, beyond),
        *(Way(f"QuestCache, budget {budget}", "quest", cache, budget) for budget in budgets),
    ]
    for _ in track(range(num_rounds), f"{num_tokens} tokens", transient=True):
        for way in ways:
            way.run(model, token_ids, num_steps)
    return {"context": num_tokens, "results": [way.result() for way in ways]}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of context")
    parser.add_argument("--model", default=str(tiny.PATH), help="a folder, or a name on the hub")
    parser.add_argument("--name", help="of the results, beside the device")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--codes", type=int, help="bits of the codes by which tokens are chosen")
    parser.add_argument("--steps", type=int, default=16, help="tokens timed per round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for .json, .md")
    return parser.parse_args()


def write(report, path):
    """The report as JSON, and its table and conditions as Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    title = "Decoding: ms per token, and the speedup over the first way"
    conditions = "".join(f"- {name}: {value}\n" for name, value in report["environment"].items())
    path.with_suffix(".md").write_text(f"# {title}\n\n{markdown(decode_table(report))}\n{conditions}")
    print(f"written to {path} and {path.with_suffix('.md').name}")


def main():
    arguments = parse_arguments()
    model, tokenizer = demo.load(arguments.model, arguments.device)
    text_ids = torch.tensor(Library(tokenizer, heldout_text()).ids.astype("int64"), device=arguments.device)
    contexts = [measure(model, text_ids[None, :length], arguments) for length in arguments.lengths]
    report = {"environment": describe(arguments.device), "contexts": contexts}
    Console().print(decode_table(report))
    name = "_".join(filter(None, ("decode", arguments.device, arguments.name)))
    write(report, arguments.output / f"{name}.json")


if __name__ == "__main__":
    main()
