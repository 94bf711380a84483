"""`hf-quest demo`: a comparison in the terminal, or as JSON."""

import json
import time
from itertools import groupby

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hf_quest import comparison, demo, tiny
from hf_quest.reading import read_document

FRAME_SECONDS = 0.1
READING = {"reading": "Prefill", "rereading": "Prefill, CritiPrefill"}
PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("tokens"),
    TimeElapsedColumn(),
)


def show(file, question, budget, model_name, max_new_tokens, device, is_critical, as_json):
    console = Console(stderr=as_json)
    demo.make_cache(budget)  # says what is wrong with a budget
    device = demo.choose_device(device)
    document = demo.make_document() if file is None else read_document(file)
    with console.status(f"Loading {model_name or 'the tiny model inside'}"):
        model, tokenizer = demo.load(model_name or tiny.PATH, device)
    models = (model, comparison.dense_twin(model), tokenizer)
    critical = demo.CRITICAL if is_critical else None
    runs = comparison.compare(models, document.text, question, budget, max_new_tokens, critical)
    run = next(runs)
    lines = [("Document ", f"{len(run.document_ids):,} tokens, {document.name}")]
    lines += [*((" " * 9, note) for note in document.notes), ("Question ", question)]
    for label, line in lines:
        console.print(Text.assemble((label, "bold"), line), soft_wrap=True)
    run = watched(runs, run, console)
    points = document.key_points if question == demo.QUESTION else ()
    if as_json:
        print(json.dumps(as_dict(run, document, question, critical, points), indent=1))
        return
    console.print(panels(run, console))
    console.print(table(run, critical, points))


def watched(runs, run, console):
    """The last state of a comparison, shown while it goes on."""
    for phase, states in groupby(chained(run, runs), key=lambda state: state.phase):
        if phase in READING:
            with Progress(*PROGRESS_COLUMNS, console=console) as progress:
                task = progress.add_task(READING[phase], total=len(run.document_ids))
                for _ in states:
                    progress.update(task, completed=run.num_read)
        else:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                shown = 0.0
                for _ in states:
                    if time.monotonic() - shown > FRAME_SECONDS:
                        live.update(panels(run, console, console.height - 4), refresh=True)
                        shown = time.monotonic()
    return run


def chained(run, runs):
    yield run
    yield from runs


def panels(run, console, height=None):
    """The answers side by side, of each the last `height` lines."""
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    both = (("Dense (DynamicCache)", run.dense), ("Quest", run.quest))
    grid.add_row(*(panel(title, answer, console, height) for title, answer in both))
    return grid


def panel(title, answer, console, height):
    lines = Text(answer.text.strip()).wrap(console, console.width // 2 - 4)
    footer = f"{len(answer.token_ids)} tokens"
    if answer.is_settled and answer.milliseconds:
        footer += f", {answer.milliseconds:.1f} ms each"
    return Panel(Text("\n").join(lines[-height:] if height else lines), title=title, subtitle=footer)


def table(run, critical, points):
    """What the two answers cost, and whether they agree."""
    rows = Table("", "Dense", f"Quest, budget {run.budget:,}")
    if critical is not None:
        kind = f"of the products q·k in a prompt, layers {critical.dense_layers} on"
        rows.add_row(kind, "100 %", f"{100 * run.critical_share:.1f} %")
        rows.add_row("s to read the document", f"{run.prefill_seconds:.1f}", f"{run.critical_seconds:.1f}")
    num_tokens = f"{len(run.document_ids):,}"
    rows.add_row("tokens in the document", num_tokens, num_tokens)
    for layers, (in_dense, in_quest) in layer_kinds(run.attended):
        rows.add_row(f"tokens attended per step, {layers}", f"{in_dense:,}", f"{in_quest:,}")
    rows.add_row("share of the KV cache read", "100 %", f"{100 * run.read_share:.1f} %")
    rows.add_row("ms per token, median", *(number(each.milliseconds) for each in (run.dense, run.quest)))
    rows.add_row("speedup", "1.0×", f"{run.speedup:.1f}×" if run.speedup else "too short to time")
    if points:
        rows.add_row(
            "key points right", *(f"{right(run, each, points)} of {len(points)}" for each in ("dense", "quest"))
        )
    num_common, num_longer = run.common
    rows.add_row("answers agree", "", "yes" if num_common == num_longer else f"for {num_common} of {num_longer} tokens")
    return rows


def number(milliseconds):
    return f"{milliseconds:.1f}" if milliseconds else "–"


def right(run, side, points):
    """How many of the lines `points` an answer has, word for word."""
    return len(set(points) & set(getattr(run, side).text.splitlines()))


def layer_kinds(attended):
    """(name, tokens) of every run of layers that attend equally many tokens."""
    first = 0
    for tokens, run in groupby(attended):
        last = first + len(list(run)) - 1
        yield (f"layers {first} to {last}" if last > first else f"layer {first}"), tokens
        first = last + 1


def as_dict(run, document, question, critical, points):
    num_common, num_longer = run.common
    sides = {"dense": run.prefill_seconds, "quest": run.critical_seconds or run.prefill_seconds}
    return {
        "document": {"name": document.name, "tokens": len(run.document_ids), "notes": list(document.notes)},
        "question": question,
        "budget": run.budget,
        "critical_prefill_share": run.critical_share if critical is not None else None,
        "read_share": run.read_share,
        "tokens_attended": [{"dense": in_dense, "quest": in_quest} for in_dense, in_quest in run.attended],
        **{side: answer(run, side, seconds, points) for side, seconds in sides.items()},
        "speedup": run.speedup,
        "common_tokens": num_common,
        "answers_agree": num_common == num_longer,
    }


def answer(run, side, prefill_seconds, points):
    contestant = getattr(run, side)
    found = {
        "answer": contestant.text,
        "tokens": len(contestant.token_ids),
        "ms_per_token": contestant.milliseconds,
        "prefill_s": prefill_seconds,
        "first_token_s": prefill_seconds + contestant.first_token_seconds,
    }
    return {**found, "key_points_right": right(run, side, points)} if points else found
