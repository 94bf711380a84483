"""Where the milliseconds of a token go: what the GPU does in decoding steps of `generate`, and how long it waits.

    python benchmarks/profile_step.py
    python benchmarks/profile_step.py --cases llama-3.1-8b:1:131072 --ways quest quest-recorded
    python benchmarks/profile_step.py --before EARLIER.json    # bars of an earlier result beside those of this one
    python benchmarks/profile_step.py --only-draw --before EARLIER.json

Models, contexts and ways are those of bench_generate.py, which also says what `ms per token` is. After its rounds one
more answer is written under PyTorch's profiler, by which CUPTI records every copy and every kernel, also those of CUDA
graphs. A step goes from where the GPU begins to choose one token to where it begins to choose the next, and figures are
means of the last steps of that answer. The profiler makes steps longer, so `ms per token` without it stands beside.

`busy` is how long at least one kernel or copy runs. Where several run at once, what began first has the time, so that
kinds add up to `busy`. The rest of a step are gaps: the short ones, below 5 µs, are between kernels of a graph or of
one queue; in longer ones the GPU waits for the host. Kernels are listed with their full durations, those that run at
once counted each. The least that products take are the bytes of their weights over the rate of a large copy, read and
written, in the same run.
"""

import argparse
import gc
import json
import re
import statistics
import textwrap
from pathlib import Path

import torch
from bench_generate import AHEAD, SHAPES, SHORT, WAYS, Models, answer, decoding_by, fill, parts_of, time_answers
from bench_stages import copy_bandwidth
from chart import GREEN, GREY, LIGHT
from environment import describe
from rich.console import Console
from tables import RESULTS, kernels_table, markdown, step_table
from torch.autograd import DeviceType

from hf_quest.evaluation.plots import figure, save

CASES = ["llama-3.1-8b:1:131072", "llama-3.1-8b:1:1024"]
DEFAULT_WAYS = ["quest", "quest-compiled-ahead", "quest-codes-ahead"]
GREEDY = [name for name, way in WAYS.items() if way.options in ({}, AHEAD)]  # one choice a token, as CHOICE takes it
TIMED, ROUNDS = 128, 3  # tokens of a round, and rounds, without the profiler: those of bench_generate.py
SHORT_GAP = 5.0  # µs
CHOICE = re.compile("ArgMax")
WAITS = re.compile(r"^(Event|Stream|Context|Unknown) (Sync|Wait)")  # which CUPTI may record as well
REST = "sampling and the rest"
# By the name of a kernel, the first that fits. A product that Inductor writes is a reduction, with `mm` in its name.
PATTERNS = {
    "copies": r"^Mem(cpy|set)",
    "attention": r"hf_quest|flash|fmha|sdpa",
    "products with weights": r"gemv|gemm|cutlass|cublas|nvjet|splitK|^triton_(tem_|mm)"
    r"|^triton_(red|per)_fused_(.*_)?(add|b)?mm(_|$)",
    REST: r"ArgM(ax|in)|softmax|multinomial|topk|sort|cub::",
    "elementwise and norms": r"^triton_|at::native",
}
COLORS = {
    "products with weights": GREEN,
    "attention": LIGHT,
    "elementwise and norms": "#475569",
    REST: GREY,
    "copies": "#cbd5e1",
}
KINDS = list(COLORS)
GAPS = {"short": ("gaps below 5 µs", "#fde68a"), "longer": ("longer gaps, for the host", "#f59e0b")}
ON_DARK = (GREEN, "#475569")  # text is white
LEAST_LABELLED = 0.045  # of the longest bar, or a number has no room


def kind_of(name):
    """The kind of a kernel or copy."""
    return next((kind for kind, pattern in PATTERNS.items() if re.search(pattern, name, re.IGNORECASE)), REST)


def split(events, num_tokens, num_steps):
    """What the last `num_steps` steps of an answer are made of, per token, from (name, start, duration) in µs.

    Raises:
        ValueError: where the events are not those of `num_tokens` tokens, so that steps cannot be told apart.
    """
    events = sorted(events, key=lambda event: event[1])
    choices = [start for name, start, _ in events if CHOICE.search(name)]
    if len(choices) != num_tokens:
        raise ValueError(f"Of {num_tokens} choices of a token {len(choices)} were profiled.")
    begin, end = choices[-1 - num_steps], choices[-1]
    reached = begin  # by what has run so far
    kinds, gaps, kernels = dict.fromkeys(KINDS, 0.0), {"short": 0.0, "longer": 0.0}, {}
    for name, start, duration in events:
        if start >= end:
            break
        if start >= begin:
            kernels.setdefault(name, []).append(duration)
        gap = max(0.0, start - reached)
        gaps["short" if gap < SHORT_GAP else "longer"] += gap
        reached += gap
        stop = max(reached, min(start + duration, end))
        kinds[kind_of(name)] += stop - reached
        reached = stop
    gaps["short" if end - reached < SHORT_GAP else "longer"] += end - reached

    def ms(microseconds):
        return round(microseconds / num_steps / 1e3, 4)

    return {
        "span_ms": ms(end - begin),
        "busy_ms": ms(sum(kinds.values())),
        "waiting_ms": ms(sum(gaps.values())),
        "gaps_ms": {name: ms(gap) for name, gap in gaps.items()},
        "kinds_ms": {kind: ms(busy) for kind, busy in kinds.items()},
        "kernels": [
            {
                "name": readable(name),
                "kind": kind_of(name),
                "calls": len(times) / num_steps,
                "us": round(statistics.mean(times), 2),
            }
            for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))
        ],
    }


def readable(name):
    """The beginning of a kernel's name, without what all names have."""
    return re.sub(r"^void |\(anonymous namespace\)::|hf_quest::|at::native::", "", name)[:200]


def on_gpu(events):
    """(name, start, duration) in µs of the events of a profiler that are work of the GPU."""
    return [
        (event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation and not WAITS.match(event.name)
    ]


def measure(model, name, batch_size, context, budget, num_steps):
    """A dict of one way at one context: ms per token without the profiler, and what it splits into with it."""
    way = WAYS[name]
    with decoding_by(model, name):
        cache = way.make_cache(model.config, context, budget)
        fill(cache, model.config, batch_size, context - 1)
        ids = torch.randint(1, model.config.vocab_size, (batch_size, context), device="cuda")
        start_s, round_ms = time_answers(model, way, cache, ids, TIMED, ROUNDS)
        # Of what was written, only the length is of interest now.
        ids = torch.randint(1, model.config.vocab_size, (batch_size, int(cache.get_seq_length()) + 1), device="cuda")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            answer(model, cache, ids, SHORT + num_steps, way.options)
    return {
        "ms_per_token": round(statistics.median(round_ms), 2),
        "round_ms": [round(ms, 2) for ms in round_ms],
        "start_s": round(start_s, 1),
        **split(on_gpu(profile.events()), SHORT + num_steps, num_steps),
    }


def weight_bytes(model):
    """Bytes of the weights that every token is multiplied with."""
    return sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear))


def measure_all(arguments):
    """The report of all cases and ways, written as it grows."""
    report = {
        "environment": describe("cuda"),
        "budget": arguments.budget,
        "steps": arguments.steps,
        "copy_bytes_per_second": copy_bandwidth(),
        "results": [],
    }
    models = Models()
    for shape, batch_size, context in map(parts_of, arguments.cases):
        for name in arguments.ways:
            result = {"shape": shape, "batch_size": batch_size, "context": context, "way": WAYS[name].title}
            try:
                result |= measure(models.of(shape), name, batch_size, context, arguments.budget, arguments.steps)
                floor_s = weight_bytes(models.of(shape)) / report["copy_bytes_per_second"]
                result["weights_floor_ms"] = round(floor_s * 1e3, 4)
            except (torch.OutOfMemoryError, ValueError) as error:  # or the profiler has lost events
                result["error"] = str(error).splitlines()[0]
            report["results"].append(result)
            print(json.dumps({key: value for key, value in result.items() if key != "kernels"}), flush=True)
            write(report, arguments.output)
            gc.collect()
            torch.cuda.empty_cache()
    return report


def bars(report, before):
    """(label, result) of every case and way, each behind what it was before where an earlier report has it."""

    def key(result):
        return tuple(result[name] for name in ("shape", "batch_size", "context", "way"))

    earlier = {} if before is None else {key(result): result for result in before["results"] if "kinds_ms" in result}
    for result in report["results"]:
        if "kinds_ms" in result:
            label = f"{result['way']}\n{result['shape']}, {result['batch_size']} × {result['context']:,} tokens"
            label = "\n".join(textwrap.fill(line, 44) for line in label.splitlines())
            if key(result) in earlier:
                yield f"{label}, before", earlier[key(result)]
                label = "after"
            yield label, result


def picture(report, before=None):
    """A horizontal bar for each case and way, of ms per token."""
    shown = list(bars(report, before))
    longest = max(result["span_ms"] for _, result in shown)
    # A bar stands close to the one that it is compared with.
    gaps = [0.0, *(0.8 if label == "after" else 1.25 for label, _ in shown[1:])]
    places = [sum(gaps[: place + 1]) for place in range(len(gaps))]
    drawing = figure(figsize=(10.4, 1.6 + 0.62 * (places[-1] + 1)))
    axes = drawing.subplots()
    for place, (_, result) in zip(places, shown, strict=True):
        left = 0.0
        parts = [(kind, color, result["kinds_ms"][kind]) for kind, color in COLORS.items()]
        parts += [(*GAPS[name], ms) for name, ms in result["gaps_ms"].items()]
        for name, color, ms in parts:
            axes.barh(place, ms, 0.7, left=left, color=color, label=None if place else name, zorder=2)
            if ms > LEAST_LABELLED * longest:
                on_it = "white" if color in ON_DARK else "black"
                axes.text(left + ms / 2, place, f"{ms:.2f}", ha="center", va="center", fontsize=8.5, color=on_it)
            left += ms
        total = f"{result['span_ms']:.2f} ({result['ms_per_token']:.2f})"
        axes.text(left + 0.008 * longest, place, total, va="center", fontsize=8.5)
    axes.set_yticks(places, [label for label, _ in shown], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * longest)
    axes.set_xlabel("ms per token under the profiler (in brackets: without it)")
    axes.set_title(f"What a GPU does for one token, {report['environment']['processor']}", fontsize=11)
    axes.grid(visible=False, axis="y")
    drawing.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9, handlelength=1.2)
    return drawing


def write(report, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    parts = [f"# Where the milliseconds of a token go\n\nms per token:\n\n{markdown(step_table(report))}"]
    for result in report["results"]:
        if "kernels" in result:
            title = f"{result['shape']}, {result['batch_size']} × {result['context']:,} tokens, {result['way']}"
            parts.append(f"## {title}\n\n{markdown(kernels_table(result))}")
    rate = f"A large copy reaches {report['copy_bytes_per_second'] / 1e12:.2f} TB/s, read and written."
    conditions = "".join(f"- {name}: {value}\n" for name, value in report["environment"].items())
    steps = f"Means of {report['steps']} steps; a budget of {report['budget']:,} tokens where the way has no other."
    path.with_suffix(".md").write_text("\n".join([*parts, f"{steps} {rate}\n\n{conditions}"]))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ", ".join(SHAPES)
    parser.add_argument("--cases", nargs="+", default=CASES, help=f"shape:rows:tokens of context; shapes are {shapes}")
    parser.add_argument("--ways", nargs="+", choices=GREEDY, default=DEFAULT_WAYS)
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--steps", type=int, default=8, help="tokens profiled")
    parser.add_argument("--before", type=Path, help="an earlier result, whose bars the picture has beside")
    parser.add_argument("--only-draw", action="store_true", help="measure nothing: table and picture of --output")
    parser.add_argument("--output", type=Path, default=RESULTS / "profile_step.json")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    before = None if arguments.before is None else json.loads(arguments.before.read_text())
    report = json.loads(arguments.output.read_text()) if arguments.only_draw else measure_all(arguments)
    write(report, arguments.output)
    Console(width=200).print(step_table(report))
    if any("kinds_ms" in result for result in report["results"]):
        save(picture(report, before), arguments.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
