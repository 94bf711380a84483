"""`hf-quest plan`: what a context takes of a device's memory, before a model is loaded."""

import dataclasses
import json
from enum import Enum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import JsonOption

GIB = 2**30
UNITS = {"GiB": GIB, "MiB": 2**20}


class Bounds(str, Enum):
    int8 = "int8"
    keys = "keys"


def plan_command(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of context in each row.")],
    model: Annotated[
        str | None, typer.Option(help="A model on the Hugging Face hub, or a folder. By default the tiny one inside.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the prompt that are read at a time: prefill_chunk_size.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GiB of the device to plan for. By default what is free on the GPU.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Of QuestCache, as all options below.")] = 2048,
    page_size: Annotated[int, typer.Option(help="Tokens in a page.")] = 16,
    dense_layers: Annotated[int, typer.Option(min=0, help="Layers at the start that attend everything.")] = 2,
    max_cache_len: Annotated[int | None, typer.Option(min=1, help="Tokens to allocate at once.")] = None,
    bounds: Annotated[Bounds, typer.Option(help="In 8 bits, or in the dtype of the keys.")] = Bounds.int8,
    codes: Annotated[int | None, typer.Option(help="Bits per channel of codes: 1, 2, 4 or 8.")] = None,
    offloading: Annotated[bool, typer.Option("--offloading", help="Keys and values in the host's memory.")] = False,
    pool: Annotated[
        int | None, typer.Option(min=0, help="With --offloading and --codes: tokens of each KV head on the device.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. By default what the config says.")
    ] = None,
    as_json: JsonOption = False,
):
    """Print what a context will take of the GPU's memory, Quest beside stock, from a model's config alone."""
    import torch

    from hf_quest import QuestCache, tiny
    from hf_quest.planning import longest_context, plan_of
    from hf_quest.sketch import Sketch

    dtypes = {Bounds.int8: torch.int8, Bounds.keys: None}
    options = {"page_size": page_size, "dense_layers": dense_layers, "max_cache_len": max_cache_len, "codes": codes}
    cache = QuestCache(budget, **options, bounds_dtype=dtypes[bounds], offloading=offloading, pool=pool)
    sketch = Sketch(model or str(tiny.PATH), dtype)
    plan = plan_of(sketch, tokens, cache, batch_size, chunk)
    has, device = (int(memory * GIB), "of --memory") if memory is not None else free_memory()
    longest = None
    if has is not None and not plan.fits(has):
        longest = longest_context(lambda count: plan_of(sketch, count, cache, batch_size, chunk), has, tokens)
    if as_json:
        totals = {"total": plan.total, "stock_total": plan.stock_total}
        verdict = {"memory": has, "fits": None if has is None else plan.fits(has), "longest": longest}
        print(json.dumps({**dataclasses.asdict(plan), **totals, **verdict}, indent=1))
        return
    show(plan, model or "The tiny model inside", has, device, longest)


def free_memory():
    """(bytes, where), or (None, ...) without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None, "There is no GPU here to compare with: say --memory and its GiB."
    return torch.cuda.mem_get_info()[0], f"free on {torch.cuda.get_device_name()}"


def show(plan, name, has, device, longest):
    console, unit = Console(), "GiB" if plan.total >= GIB else "MiB"
    rows = "1 row" if plan.batch_size == 1 else f"{plan.batch_size} rows"
    chunks = f", read {plan.chunk_size:,} at a time" if plan.chunk_size else ""
    line = f"{name}, {plan.dtype}: {plan.num_tokens:,} tokens, {rows}{chunks}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(table(plan, unit))
    for line in [*plan.notes, *verdict(plan, has, device, longest, unit), *of_host(plan, unit)]:
        console.print(f"→ {line}", highlight=False, markup=False, soft_wrap=True)


def table(plan, unit):
    found = Table(unit, "QuestCache", "DynamicCache")
    for column in found.columns[1:]:
        column.justify = "right"
    found.add_row("weights", *[number(plan.weights, unit)] * 2)
    for kind in {**plan.cache, **plan.stock}:
        sizes = (each.get(kind) for each in (plan.cache, plan.stock))
        found.add_row(kind, *("–" if size is None else number(size, unit) for size in sizes))
    found.add_row("while the prompt is read", *[number(plan.prompt, unit)] * 2)
    found.add_row("at most", number(plan.total, unit), number(plan.stock_total, unit))
    for kind, size in plan.host.items():
        found.add_row(f"on the host: {kind}", number(size, unit), "–")
    return found


def of_host(plan, unit):
    """What there is to say of the host's memory."""
    from hf_quest.storage import host

    if plan.host:
        room, needed = host.available(), sum(plan.host.values())
        is_enough = "so it fits" if needed <= room else "so it does not fit"
        yield f"Of the host {number(needed, unit)} {unit}; here {number(room, unit)} can be had, {is_enough}."


def number(num_bytes, unit):
    return f"{num_bytes / UNITS[unit]:,.2f}"


def verdict(plan, has, device, longest, unit):
    if has is None:
        return [device]
    room = f"{number(has, unit)} {unit} {device}"
    if plan.fits(has):
        return [f"It fits the {room}: {number(has - plan.total, unit)} are left."]
    lines = [f"It does not fit the {room}: {number(plan.total - has, unit)} are missing."]
    if plan.weights > has:
        return [*lines, "The weights alone are more."]
    if longest:
        lines.append(f"About {longest:,} tokens would fit.")
    if plan.chunk_size is None and plan.fits(has + plan.prompt):
        lines.append("Read the prompt in parts, as with --chunk 4096 and generate(prefill_chunk_size=4096).")
    return lines
