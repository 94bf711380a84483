"""Microseconds per layer of Quest's stages on a GPU, one by one and together, beside dense decode attention.

    python benchmarks/bench_stages.py

A measurement is one CUDA graph of up to 32 layers, each on buffers of its own, so that nothing is warm in L2 and the
start of a graph is shared as in a real decode step. Its time is the median over the replays, divided by the layers.
Keys and queries are random, so the selected pages lie scattered. `chain` is estimate, select and attend as a
decode step runs them, fused where the GPU can, the self-attention of the paper; `append`, which a dense cache needs
too, stands beside it, and `chain with append` is both as a recorded step has them, in one kernel where the GPU can. All
with bounds of 8 bits, but for `chain with wide bounds`, whose are in the dtype of the keys. What depends on the score
has the default one, and in a table of its own the published one beside it, the replays of both in turns; `chain by sums
of shares` is what the default is not, since it costs more. `chain by codes` is what `QuestCache(512, codes=2)` runs,
one kernel again: tokens of eight times the budget's pages are chosen by their codes; `of larger pages` are those of 32
tokens, and `with append` is a recorded step, whose token ends a page. `find candidates`, `refine` and `attend tokens`
are its stages by themselves. `append with codes` ends a page, whose codes it makes; `append amid a page` does not, as
15 of 16 tokens do not. `append a prompt`, without codes and with them, stores all tokens at once.
FlashInfer is among the baselines where it is installed (`pip install flashinfer-python`).
"""

import argparse
import functools
import json
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from environment import describe
from rich.console import Console
from rich.table import Table
from tables import RESULTS, markdown
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_quest.kernels import ops
from hf_quest.reference import DEFAULT, PUBLISHED, Score

try:
    import flashinfer
except ImportError:
    flashinfer = None

HEADS = ((1, 32, 32), (1, 32, 8), (8, 32, 8))
CASES = [(*heads, context) for heads in HEADS for context in (512, 2048, 32768, 131072)]
SDPA = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
FLASHINFER = {"FlashInfer": False, "FlashInfer, tensor cores": True}
BASELINES = (*SDPA, *FLASHINFER) if flashinfer else tuple(SDPA)
HEAD_DIM, PAGE_SIZE = 128, 16
BY_SCORE = ("estimate", "select", "chain", "chain with append", "chain with wide bounds")  # what depends on the score
CODE_BITS, CODE_BUDGET, CANDIDATES = 2, 512, 8
LARGER_PAGE = 32  # tokens
SUMS_OF_SHARES = Score(width=0.5, keeps_first=True, group="sum")
MAX_LAYERS, MAX_BYTES = 32, 60e9
DTYPE = torch.bfloat16


@dataclass
class Layer:
    """What one layer holds at a decode step, with the results of every stage as input for the next."""

    keys: torch.Tensor
    values: torch.Tensor
    bounds: tuple  # with scales
    wide_bounds: tuple  # without
    query: torch.Tensor
    new_key: torch.Tensor
    new_value: torch.Tensor
    counters: torch.Tensor
    where: tuple  # length, padding
    before_the_last: torch.Tensor  # the length of one token less
    num_selected: int
    codes: torch.Tensor
    larger_pages: tuple  # bounds with scales, and codes
    prompt: tuple  # keys and values of as many tokens as are stored, of all layers
    addresses: torch.Tensor  # [1, NUM_ADDRESSES], of this layer's storage
    work: torch.Tensor  # scores that lie there
    scores: torch.Tensor = None
    page_ids: torch.Tensor = None
    candidates: torch.Tensor = None
    token_ids: torch.Tensor = None

    def append(self):
        tokens = (self.new_key, self.new_value)
        ops.append(self.keys, self.values, *self.bounds, *tokens, *self.where, PAGE_SIZE)

    def estimate(self, score=DEFAULT):
        self.scores = ops.estimate(self.query, *self.bounds, *self.where, PAGE_SIZE, HEAD_DIM**-0.5, score)

    def select(self, score=DEFAULT):
        self.page_ids = ops.select(self.scores, *self.where, self.num_selected, PAGE_SIZE, score.keeps_first)

    def attend(self):
        self._attend(self.page_ids)

    def dense(self):
        self._attend(None)

    def chain(self, score=DEFAULT):
        self._chain(self.bounds, score)

    def chain_with_wide_bounds(self, score=DEFAULT):
        self._chain(self.wide_bounds, score)

    def chain_with_append(self, score=DEFAULT):
        self._decode(self.num_selected, score=score)

    def chain_by_sums_of_shares(self):
        self.chain(SUMS_OF_SHARES)

    def append_with_codes(self):
        tokens = (self.new_key, self.new_value)
        ops.append(self.keys, self.values, *self.bounds, *tokens, *self.where, PAGE_SIZE, self.codes)

    def append_amid_a_page(self):
        where = (self.before_the_last, self.where[1])
        ops.append(self.keys, self.values, *self.bounds, self.new_key, self.new_value, *where, PAGE_SIZE, self.codes)

    def append_a_prompt(self):
        ops.append(self.keys, self.values, *self.bounds, *self.prompt, *self.where, PAGE_SIZE)

    def append_a_prompt_with_codes(self):
        ops.append(self.keys, self.values, *self.bounds, *self.prompt, *self.where, PAGE_SIZE, self.codes)

    def find_candidates(self):
        where = (*self.where, CANDIDATES * CODE_BUDGET // PAGE_SIZE, PAGE_SIZE, DEFAULT.keeps_first)
        self.candidates = ops.find_candidates(self.scores, *where)

    def refine(self):
        where = (*self.where, PAGE_SIZE, HEAD_DIM**-0.5)
        self.token_ids = ops.refine(self.query, *self.bounds, self.codes, self.candidates, *where, CODE_BUDGET)

    def attend_tokens(self):
        where = (*self.where, 1, HEAD_DIM**-0.5)
        ops.attend(self.query, self.keys, self.values, self.token_ids, *where, counters=self.counters)

    def chain_by_codes(self):
        self._chain_by_codes((*self.bounds, self.codes), PAGE_SIZE)

    def chain_by_codes_of_larger_pages(self):
        self._chain_by_codes(self.larger_pages, LARGER_PAGE)

    def chain_by_codes_with_append(self):
        by_codes = {"code_bits": CODE_BITS, "num_tokens": CODE_BUDGET}
        self._decode(CANDIDATES * CODE_BUDGET // PAGE_SIZE, score=DEFAULT, **by_codes)

    def _decode(self, num_selected, **how):
        where = (self.addresses, *self.where, 0, self.keys.shape[1], num_selected, PAGE_SIZE, HEAD_DIM**-0.5)
        ops.decode(self.query, self.new_key, self.new_value, *where, **how)

    def _chain_by_codes(self, beside, page_size):
        *bounds, codes = beside
        where = (*self.where, CANDIDATES * CODE_BUDGET // page_size, page_size, HEAD_DIM**-0.5)
        by_codes = {"codes": codes, "num_tokens": CODE_BUDGET}
        ops.chain(self.query, self.keys, self.values, *bounds, *where, score=DEFAULT, **by_codes)

    def sdpa(self):
        has_groups = self.query.shape[1] != self.keys.shape[1]
        F.scaled_dot_product_attention(self.query, self.keys, self.values, enable_gqa=has_groups)

    def flashinfer(self, plan):
        # Its pages are of all heads: the same memory, cut in another way.
        pages = [stored.view(-1, stored.shape[1], PAGE_SIZE, HEAD_DIM) for stored in (self.keys, self.values)]
        plan.run(self.query[:, :, 0], tuple(pages))

    def _chain(self, bounds, score):
        where = (*self.where, self.num_selected, PAGE_SIZE, HEAD_DIM**-0.5)
        ops.chain(self.query, self.keys, self.values, *bounds, *where, score=score)

    def _attend(self, page_ids):
        where = (*self.where, PAGE_SIZE, HEAD_DIM**-0.5)
        ops.attend(self.query, self.keys, self.values, page_ids, *where, counters=self.counters)


def make_layer(batch_size, num_heads, num_kv_heads, context, budget, prompt=()):
    def normal(*shape):
        return torch.empty(*shape, HEAD_DIM, dtype=DTYPE, device="cuda").normal_()

    keys, values = (normal(batch_size, num_kv_heads, context) for _ in range(2))
    heads, num_pages = (batch_size, num_kv_heads), context // PAGE_SIZE

    def narrow_bounds(num_pages):
        scales = keys.new_empty(*heads, num_pages, HEAD_DIM // ops.SCALE_BLOCK, dtype=torch.uint8)
        return keys.new_empty(*heads, num_pages, 2, HEAD_DIM, dtype=torch.int8), scales

    bounds = narrow_bounds(num_pages)
    wide_bounds = (keys.new_empty(*heads, num_pages, 2, HEAD_DIM), None)
    query = normal(batch_size, num_heads, 1)
    new_key, new_value = (normal(batch_size, num_kv_heads, 1) for _ in range(2))
    length = torch.tensor([context], device="cuda")
    where = (length, torch.zeros(batch_size, dtype=torch.int64, device="cuda"))
    codes = keys.new_empty(*keys.shape[:3], HEAD_DIM * CODE_BITS // 8, dtype=torch.uint8)
    larger_pages = (*narrow_bounds(context // LARGER_PAGE), torch.empty_like(codes))
    ops.append(keys, values, *wide_bounds, keys, values, *where, PAGE_SIZE)
    ops.append(keys, values, *bounds, keys, values, *where, PAGE_SIZE, codes)
    ops.append(keys, values, *larger_pages[:2], keys, values, *where, LARGER_PAGE, larger_pages[2])
    tokens = (query, new_key, new_value)
    work = keys.new_empty(*heads, 1, num_pages, dtype=torch.float32)
    row = [tensor.data_ptr() for tensor in (keys, values, *bounds, work)] + [context, codes.data_ptr()]
    row += [0] * (ops.NUM_ADDRESSES - len(row))  # no pool
    choice = (min(budget, context) // PAGE_SIZE, codes, larger_pages, prompt)
    found = (torch.tensor([row], device="cuda"), work)
    counters = ops.new_counters(keys)
    layer = Layer(keys, values, bounds, wide_bounds, *tokens, counters, where, length - 1, *choice, *found)
    for stage in (layer.estimate, layer.select, layer.find_candidates, layer.refine):
        stage()
    return layer


def plan_flashinfer(case, use_tensor_cores):
    """FlashInfer's decode over pages, planned once for all layers, as engines that serve models do."""
    batch_size, num_heads, num_kv_heads, context = case
    num_pages = context // PAGE_SIZE
    starts = torch.arange(batch_size + 1, dtype=torch.int32) * num_pages
    page_ids = torch.arange(batch_size * num_pages, dtype=torch.int32, device="cuda")
    last_page_lens = torch.full((batch_size,), PAGE_SIZE, dtype=torch.int32)
    plan = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(1 << 28, dtype=torch.uint8, device="cuda"),
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=use_tensor_cores,
        paged_kv_indptr_buffer=starts.cuda(),
        paged_kv_indices_buffer=page_ids,
        paged_kv_last_page_len_buffer=last_page_lens.cuda(),
        backend="fa2",
    )
    shape = (num_heads, num_kv_heads, HEAD_DIM, PAGE_SIZE)
    plan.plan(starts, page_ids, last_page_lens, *shape, q_data_type=DTYPE, kv_data_type=DTYPE)
    return plan


def microseconds(layers, run, num_replays):
    """Median time of one layer in a graph of all of them."""
    return compare(layers, [run], num_replays)[0]


def compare(layers, runs, num_replays):
    """The same of several, whose graphs are replayed in turns, each as often before another as after it."""
    graphs = [record(layers, run) for run in runs]
    times = [[] for _ in runs]
    for replay_idx in range(num_replays + 3):
        in_turn = list(zip(graphs, times, strict=True))
        for graph, of_graph in in_turn[:: 1 if replay_idx % 2 else -1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay_idx >= 3:
                of_graph.append(start.elapsed_time(end) * 1e3 / len(layers))
    return [statistics.median(of_graph) for of_graph in times]


def record(layers, run):
    for layer in layers[:2]:
        run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            run(layer)
    return graph


def measure(case, budget, num_replays):
    """A dict of one case: microseconds and bytes of every stage and baseline."""
    batch_size, num_heads, num_kv_heads, context = case
    token_bytes = 2 * HEAD_DIM * DTYPE.itemsize * batch_size * num_kv_heads  # of keys and values
    page_bytes = (2 * HEAD_DIM + HEAD_DIM // ops.SCALE_BLOCK) * batch_size * num_kv_heads  # of bounds
    num_layers = min(MAX_LAYERS, int(MAX_BYTES / (token_bytes * context)))
    shape = (batch_size, num_kv_heads, context, HEAD_DIM)
    prompt = tuple(torch.empty(shape, dtype=DTYPE, device="cuda").normal_() for _ in range(2))
    layers = [make_layer(*case, budget, prompt) for _ in range(num_layers)]
    num_pages = context // PAGE_SIZE
    score_bytes = 4 * batch_size * num_kv_heads * num_pages
    moved = {
        "append": 2 * token_bytes + 2 * page_bytes,
        "estimate": page_bytes * num_pages + score_bytes,
        "select": score_bytes,
        "attend": token_bytes * min(budget, context),
        "dense": token_bytes * context,
    }
    moved["chain"] = moved["estimate"] + moved["select"] + moved["attend"]
    moved["chain with append"] = moved["chain"] + moved["append"]
    moved["chain with wide bounds"] = moved["chain"] + (token_bytes - page_bytes) * num_pages
    moved["chain by sums of shares"] = moved["chain"]
    num_looked_at = min(CANDIDATES * CODE_BUDGET, context)
    code_bytes = HEAD_DIM * CODE_BITS // 8 * batch_size * num_kv_heads  # of a token
    moved["append with codes"] = moved["append"]  # a page's are written with its last token
    moved["append amid a page"] = moved["append"]
    moved["append a prompt"] = 2 * token_bytes * context + page_bytes * num_pages
    moved["append a prompt with codes"] = moved["append a prompt"] + code_bytes * context
    moved["find candidates"] = score_bytes
    moved["refine"] = code_bytes * num_looked_at + page_bytes * (num_looked_at // PAGE_SIZE)
    moved["attend tokens"] = token_bytes * min(CODE_BUDGET, context)
    moved["chain by codes"] = page_bytes * num_pages + moved["refine"] + moved["attend tokens"]
    moved["chain by codes with append"] = moved["chain by codes"] + moved["append"]
    larger = page_bytes * (num_pages + num_looked_at // PAGE_SIZE) * PAGE_SIZE // LARGER_PAGE
    moved["chain by codes of larger pages"] = larger + code_bytes * num_looked_at + moved["attend tokens"]
    stages = {}
    for name, num_bytes in moved.items():
        run = getattr(Layer, name.replace(" ", "_"))
        if name in BY_SCORE:
            by_scores = [functools.partial(run, score=score) for score in (DEFAULT, PUBLISHED)]
            times = dict(zip(("us", "published_us"), compare(layers, by_scores, num_replays), strict=True))
        else:
            times = {"us": microseconds(layers, run, num_replays)}
        stages[name] = times | {"bytes": num_bytes}
    for name in BASELINES:
        stages[name] = measure_baseline(name, case, layers, num_replays) | {"bytes": moved["dense"]}
    best_dense = min(stages[name]["us"] for name in BASELINES if "us" in stages[name])
    return {
        "batch_size": batch_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "context": context,
        "num_layers": num_layers,
        "speedup": best_dense / stages["chain"]["us"],
        "stages": stages,
    }


def measure_baseline(name, case, layers, num_replays):
    """{"us": ...} of somebody else's dense attention, or {"error": ...} where it doesn't take the case."""
    try:
        if name in FLASHINFER:
            plan = plan_flashinfer(case, FLASHINFER[name])
            return {"us": microseconds(layers, lambda layer: layer.flashinfer(plan), num_replays)}
        with sdpa_kernel(SDPA[name]):
            return {"us": microseconds(layers, Layer.sdpa, num_replays)}
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}


def copy_bandwidth(num_bytes=4 * 2**30):
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * num_bytes / statistics.median(times) * 1e3


def speed_table(report):
    names = list(report["cases"][0]["stages"])
    table = Table("B, Hq, Hkv", "tokens", *names, "chain over best dense")
    for case in report["cases"]:
        times = [f"{case['stages'][name]['us']:.1f}" if "us" in case["stages"][name] else "-" for name in names]
        heads = f"{case['batch_size']}, {case['num_heads']}, {case['num_kv_heads']}"
        table.add_row(heads, f"{case['context']:,}", *times, f"{case['speedup']:.2f}×")
    return table


def score_table(report):
    """Microseconds with the published score, and how much longer the default one takes."""
    table = Table("B, Hq, Hkv", "tokens", *BY_SCORE)
    for case in report["cases"]:
        stages = [case["stages"][name] for name in BY_SCORE]
        cells = [f"{stage['published_us']:.2f} ({stage['us'] / stage['published_us'] - 1:+.1%})" for stage in stages]
        heads = f"{case['batch_size']}, {case['num_heads']}, {case['num_kv_heads']}"
        table.add_row(heads, f"{case['context']:,}", *cells)
    return table


def bandwidth_table(report):
    """GB/s of every stage, and in brackets the percentage of what a large copy reaches in this run."""
    names = list(report["cases"][0]["stages"])
    table = Table("B, Hq, Hkv", "tokens", *names)
    for case in report["cases"]:
        cells = []
        for name in names:
            stage = case["stages"][name]
            if "us" not in stage:
                cells.append("-")
                continue
            speed = stage["bytes"] / stage["us"] * 1e6
            cells.append(f"{speed / 1e9:.0f} ({100 * speed / report['copy_bytes_per_second']:.0f} %)")
        heads = f"{case['batch_size']}, {case['num_heads']}, {case['num_kv_heads']}"
        table.add_row(heads, f"{case['context']:,}", *cells)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--contexts", type=int, nargs="*", help="measure these context lengths only")
    parser.add_argument("--no-write", action="store_true", help="print the tables and keep no result")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    keys = torch.empty(1, 1, 1, HEAD_DIM, dtype=DTYPE, device="cuda")
    if not ops.serves(keys, keys, PAGE_SIZE):
        raise SystemExit("This benchmark needs the CUDA kernels.")
    console = Console(width=200)
    gpu = torch.cuda.get_device_name()
    report = {
        "gpu": gpu,
        **describe("cuda"),
        "cuda": torch.version.cuda,
        "flashinfer": flashinfer and flashinfer.__version__,
        "budget": arguments.budget,
        "head_dim": HEAD_DIM,
        "page_size": PAGE_SIZE,
        "dtype": str(DTYPE).removeprefix("torch."),
        "copy_bytes_per_second": copy_bandwidth(),
        "cases": [],
    }
    for case in CASES:
        if arguments.contexts and case[-1] not in arguments.contexts:
            continue
        report["cases"].append(measure(case, arguments.budget, arguments.replays))
        torch.cuda.empty_cache()
        latest = {name: round(stage.get("us", 0.0), 2) for name, stage in report["cases"][-1]["stages"].items()}
        console.print(f"{case}: {latest}", soft_wrap=True)
    console.print(speed_table(report))
    console.print(score_table(report))
    console.print(bandwidth_table(report))
    if not arguments.no_write:
        path = RESULTS / f"stages_{gpu.removeprefix('NVIDIA ').replace(' ', '_').lower()}"
        path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(as_markdown(report))


def as_markdown(report):
    compared = f"FlashInfer {report['flashinfer']}, " if report["flashinfer"] else ""
    return (
        f"# Quest's stages on one {report['gpu']}\n\n"
        f"{report['dtype']}, head dim {report['head_dim']}, pages of {report['page_size']}, a budget of "
        f"{report['budget']} tokens; torch {report['torch']}, CUDA {report['cuda']}, {compared}"
        f"commit {report['commit']}, "
        f"`{report['command']}`. A large copy reaches {report['copy_bytes_per_second'] / 1e12:.2f} TB/s.\n\n"
        f"Microseconds per layer:\n\n{markdown(speed_table(report))}\n"
        f"With the published score, and how much longer the default one takes:\n\n{markdown(score_table(report))}\n"
        f"GB/s, and in brackets the percentage of that copy:\n\n{markdown(bandwidth_table(report))}"
    )


if __name__ == "__main__":
    main()
