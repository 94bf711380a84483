"""Milliseconds per token of stock `generate` on a GPU, with QuestCache and with Transformers' own caches.

    python benchmarks/bench_generate.py
    python benchmarks/bench_generate.py --cases llama-3.1-8b:1:32768 --ways quest static
    python benchmarks/bench_generate.py --cases llama-3.1-8b:1:131072 --ways text text-lookup text-lookup-recorded

Weights are random. A context is not computed but put into the cache layer by layer as random keys and values, which the
cache stores as it would store a prompt's. Then `generate` goes on from there: a way's time per token is the difference
of a long and a short answer over the difference of their tokens, so that what comes once per call is left out; the
median over the rounds. `start` is the first call of `generate`, with whatever it compiles, and depends on what earlier
ways have compiled: each way is measured in the order given. `verify` is one forward of five drafted tokens and their
removal, as assisted decoding does it, which `generate` never compiles.

Weights that are random accept no drafts. The ways on a text that repeats are therefore told what comes next, by a
processor of logits that leaves only the text's next token: every draft of prompt lookup is then accepted, which is the
most that it can gain. `text` is plain decoding by the same processor. Assisted decoding would read a context that is in
the cache once more, so here each answer reads the whole prompt, by CritiPrefill, and so does `start`.
"""

import argparse
import gc
import json
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from environment import describe
from rich.console import Console
from tables import RESULTS, generate_table, markdown
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, StaticCache

from hf_quest import CACHE_NAME, CritiPrefill, QuestCache, capture, compile_prompts, decode_ahead

SHAPES = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "yi-9b": {
        "vocab_size": 64000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
CASES = [
    "llama-3.1-8b:1:1024",
    "llama-3.1-8b:1:32768",
    "llama-3.1-8b:1:131072",
    "llama-3.1-8b:4:131072",
    "llama-2-7b:1:32768",
    "llama-2-7b:1:131072",
]
HEADROOM = 1024  # tokens that all rounds together may write
SHORT = 8  # tokens
NUM_DRAFTS = 5
PERIOD = 512  # tokens after which the text that repeats does so
STEPS_OF_TEXT = 220  # tokens timed at least, over seconds of reading
LOOKUP = 10  # drafts of prompt lookup; a forward makes one token more, and answers are whole numbers of forwards


class Forced(LogitsProcessor):
    """Leaves only the next token of a text that repeats."""

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).scatter(1, input_ids[:, -PERIOD, None], 0.0)


@dataclass(frozen=True)
class Way:
    """One way to decode: a cache, the attention that goes with it, and how `generate` may compile its step."""

    title: str
    attn_implementation: str
    make_cache: object  # from the model's config, the length of the context and the budget
    options: dict


def quest(title, budget=None, options=None, **cache_options):
    def make_cache(config, context, default_budget):
        return QuestCache(default_budget if budget is None else budget, **cache_options)

    return Way(title, "quest", make_cache, options or {})


AHEAD = {"custom_generate": decode_ahead}
FORCED = {"logits_processor": LogitsProcessorList([Forced()])}
BY_LOOKUP = {**FORCED, "prompt_lookup_num_tokens": LOOKUP}
OVERLAPPED = {"triton.enable_pdl": True}  # programmatic dependent launch of the kernels that Inductor makes
BEYOND = 2**22  # a budget beyond every context
WAYS = {
    "dynamic": Way("DynamicCache, sdpa", "sdpa", lambda config, context, budget: DynamicCache(), {}),
    "static": Way(
        "StaticCache, sdpa, compiled",
        "sdpa",
        lambda config, context, budget: StaticCache(config, max_cache_len=context + HEADROOM),
        {},
    ),
    "quest": quest("QuestCache"),
    "quest-dense": quest("QuestCache, everything", BEYOND),
    "quest-recorded": quest("QuestCache, capture(model)"),
    "quest-compiled": quest("QuestCache, capture(model, compile=True)"),
    "quest-ahead": quest("QuestCache, decode_ahead", options=AHEAD),
    "quest-recorded-ahead": quest("QuestCache, capture(model), decode_ahead", options=AHEAD),
    "quest-compiled-ahead": quest("QuestCache, capture(model, compile=True), decode_ahead", options=AHEAD),
    "quest-overlapped-ahead": quest(f"QuestCache, capture(model, compile={OVERLAPPED}), decode_ahead", options=AHEAD),
    "quest-codes": quest("QuestCache(512, codes=2)", 512, codes=2),
    "quest-codes-ahead": quest(
        "QuestCache(512, codes=2), capture(model, compile=True), decode_ahead", 512, AHEAD, codes=2
    ),
    "quest-eager": quest("QuestCache, eager", compile=False),
    "quest-codes-overlapped-ahead": quest(
        f"QuestCache(512, codes=2), capture(model, compile={OVERLAPPED}), decode_ahead", 512, AHEAD, codes=2
    ),
    "dynamic-beams": Way(
        "DynamicCache, 4 beams", "sdpa", lambda config, context, budget: DynamicCache(), {"num_beams": 4}
    ),
    "quest-beams": quest("QuestCache, 4 beams", options={"num_beams": 4}),
    "text": quest("QuestCache, text that repeats", options=FORCED, prefill=CritiPrefill()),
    "text-lookup": quest("QuestCache, prompt lookup, all drafts accepted", options=BY_LOOKUP, prefill=CritiPrefill()),
    "text-lookup-compiled": quest(
        "QuestCache, compile_prompts(model), prompt lookup, all drafts accepted",
        options=BY_LOOKUP,
        prefill=CritiPrefill(),
    ),
    "text-lookup-recorded": quest(
        "QuestCache, capture(model), prompt lookup, all drafts accepted", options=BY_LOOKUP, prefill=CritiPrefill()
    ),
    "dynamic-text-lookup": Way(
        "DynamicCache, sdpa, prompt lookup, all drafts accepted",
        "sdpa",
        lambda config, context, budget: DynamicCache(),
        BY_LOOKUP,
    ),
}
CAPTURED = {  # and how the captured step is compiled first, if it is
    "quest-recorded": False,
    "quest-recorded-ahead": False,
    "quest-compiled": True,
    "quest-compiled-ahead": True,
    "quest-overlapped-ahead": OVERLAPPED,
    "quest-codes-ahead": True,
    "quest-codes-overlapped-ahead": OVERLAPPED,
    "text-lookup-recorded": False,
}
VERIFYING = ("dynamic", "quest-eager")  # also measured at drafts


def make_model(shape, max_positions):
    """A model with random bfloat16 weights, made on the GPU."""
    config = LlamaConfig(
        **SHAPES[shape],
        head_dim=128,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="quest",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def free():
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()


class Models:
    """The model of one shape at a time. Whoever keeps it keeps its memory from the next one."""

    shape = model = None

    def of(self, shape):
        if shape != self.shape:
            self.model = None
            free()
            self.model, self.shape = make_model(shape, 2**18), shape
        return self.model


def parts_of(case):
    """(model shape, rows, tokens of context) of a case as it is written."""
    shape, batch_size, context = case.split(":")
    return shape, int(batch_size), int(context)


def fill(cache, config, batch_size, num_tokens):
    """Put `num_tokens` random keys and values into every layer."""
    shape = (batch_size, config.num_key_value_heads, num_tokens, config.head_dim)
    for layer_idx in range(config.num_hidden_layers):
        keys, values = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
        handed_over, _ = cache.update(keys, values, layer_idx)
        if isinstance(cache, QuestCache):
            handed_over.quest_layer.handed.is_under_way = False  # no attention follows


def answer(model, cache, input_ids, num_tokens, options):
    """`generate` on the GPU to its end: the tokens with the answer's, and seconds."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **{CACHE_NAME: cache},
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    torch.cuda.synchronize()
    return output, time.perf_counter() - start


@torch.no_grad()
def verify_ms(model, cache, num_rounds):
    """Milliseconds of a forward of drafted tokens, and of their removal."""
    if isinstance(cache, QuestCache):
        cache.shared.draft_start = cache.get_seq_length()
    drafts = torch.randint(1, model.config.vocab_size, (cache.layers[0].keys.shape[0], NUM_DRAFTS), device="cuda")
    times = []
    for _ in range(2 + 3 * num_rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with mock.patch("hf_quest.seam.generate.is_assisted", return_value=True):
            model(drafts, **{CACHE_NAME: cache})
        cache.crop(-NUM_DRAFTS)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times[2:]), 2)


def time_answers(model, way, cache, ids, num_steps, num_rounds):
    """Seconds of a first answer on a filled cache, and of each round the ms per token of answers that go on from it."""
    ids, start_s = answer(model, cache, ids, SHORT, way.options)
    ids, _ = answer(model, cache, ids, SHORT, way.options)
    round_ms = []
    for _ in range(num_rounds):
        ids, short_s = answer(model, cache, ids, SHORT, way.options)
        ids, long_s = answer(model, cache, ids, SHORT + num_steps, way.options)
        round_ms.append((long_s - short_s) / num_steps * 1e3)
    return start_s, round_ms


def time_texts(model, way, context, budget, num_steps, num_rounds):
    """`time_answers` of a text that repeats, which every answer reads from its beginning."""
    text = torch.randint(1, model.config.vocab_size, (1, PERIOD), device="cuda")
    ids = text.repeat(1, -(-context // PERIOD))[:, :context]
    num_steps = -(-max(num_steps, STEPS_OF_TEXT) // (LOOKUP + 1)) * (LOOKUP + 1)
    kept = way.make_cache(model.config, context, budget)

    def seconds(num_tokens):
        if isinstance(kept, QuestCache):  # with which recordings stay
            kept.reset()
        cache = kept if isinstance(kept, QuestCache) else way.make_cache(model.config, context, budget)
        return answer(model, cache, ids, num_tokens, way.options)[1]

    start_s, _ = seconds(LOOKUP + 1), seconds(LOOKUP + 1 + num_steps)
    round_ms = []
    for _ in range(num_rounds):
        short_s, long_s = seconds(LOOKUP + 1), seconds(LOOKUP + 1 + num_steps)
        round_ms.append((long_s - short_s) / num_steps * 1e3)
    return start_s, round_ms


@contextmanager
def decoding_by(model, name):
    """Within it, `generate` decodes as a way does: captured, compiled, and by its attention."""
    compiled = model.__dict__.pop("_compiled_call", None) if name in CAPTURED else None
    if name in CAPTURED:
        capture(model, compile=CAPTURED[name])
    compile_prompts(model, name == "text-lookup-compiled")
    model.set_attn_implementation(WAYS[name].attn_implementation)
    try:
        yield
    finally:
        if name in CAPTURED:
            del model._compiled_call, model.get_compiled_call
            if compiled is not None:
                model._compiled_call = compiled


def measure(model, name, batch_size, context, budget, num_steps, num_rounds):
    """A dict of one way at one context: ms per token and of the start, and bytes of memory at its peak."""
    way = WAYS[name]
    with decoding_by(model, name):
        if "logits_processor" in way.options:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            start_s, round_ms = time_texts(model, way, context, budget, num_steps, num_rounds)
        else:
            cache = way.make_cache(model.config, context, budget)
            fill(cache, model.config, batch_size * way.options.get("num_beams", 1), context - 1)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            ids = torch.randint(1, model.config.vocab_size, (batch_size, context), device="cuda")
            start_s, round_ms = time_answers(model, way, cache, ids, num_steps, num_rounds)
    result = {
        "ms_per_token": round(statistics.median(round_ms), 2),
        "round_ms": [round(ms, 2) for ms in round_ms],
        "start_s": round(start_s, 1),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }
    if name in VERIFYING:
        result["verify_ms"] = verify_ms(model, cache, num_rounds)
    return result


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="model shape:rows:tokens of context")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--steps", type=int, default=128, help="tokens timed per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "generate_gpu.json")
    return parser.parse_args()


def write(report, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    conditions = "".join(f"- {name}: {value}\n" for name, value in report["environment"].items())
    path.with_suffix(".md").write_text(
        f"# Decoding through `generate`: ms per token\n\n{markdown(generate_table(report))}\n{conditions}"
    )


def main():
    arguments = parse_arguments()
    report = {"environment": describe("cuda"), "budget": arguments.budget, "results": []}
    models = Models()
    for shape, batch_size, context in map(parts_of, arguments.cases):
        for name in arguments.ways:
            result = {"shape": shape, "batch_size": batch_size, "context": context, "way": WAYS[name].title}
            try:
                steps = (arguments.steps, arguments.rounds)
                result |= measure(models.of(shape), name, batch_size, context, arguments.budget, *steps)
            except torch.OutOfMemoryError as error:
                result["error"] = str(error).splitlines()[0]
            report["results"].append(result)
            print(json.dumps(result), flush=True)
            write(report, arguments.output)
            gc.collect()
            torch.cuda.empty_cache()
    Console(width=160).print(generate_table(report))


if __name__ == "__main__":
    main()
