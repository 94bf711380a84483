"""Trains the tiny model that ships in `hf_quest/tiny`, from nothing, on one GPU in under ten minutes.

    python demos/corpus.py .corpus
    python demos/train_tiny.py .corpus/train.txt.xz --output hf_quest/tiny

Every row of a batch is a lesson: real text with facts, key points and a pass key in it, then the questions. The loss
is the mean over the text, plus the mean over the answers' digits, plus the mean over the digests.
"""

import argparse
import lzma
import pickle
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.logging import disable_progress_bar

from hf_quest import reference
from hf_quest.evaluation.documents import (
    DIGEST_QUESTION,
    FACT_LINE,
    FACT_QUESTION,
    PASSKEY_LINE,
    PASSKEY_QUESTION,
    Library,
    compose,
    digest_answer,
    draw_people,
    draw_points,
    heldout_text,
    passkey,
)

END = "<|end|>"
MAX_POSITIONS = 40_960
TEXT, CODE, DIGEST = range(3)


@dataclass(frozen=True)
class Stage:
    """Part of the curriculum: batches whose rows have each of `lengths` tokens in turn.

    With a `selection_weight` the loss holds `selection_loss`, times that, and only the projections to queries and keys
    of the layers that Quest makes sparse are trained.
    """

    lengths: tuple[int, ...]
    steps: int
    first_lr: float
    last_lr: float
    selection_weight: float = 0.0


CURRICULUM = (
    Stage((1024,), 3000, 2e-3, 2e-3),
    Stage((4096,), 2000, 2e-3, 1.5e-3),
    Stage((16_384, 16_384, 4096), 2000, 1.5e-3, 7e-4),
    Stage((33_792, 33_792, 16_384, 4096), 1600, 7e-4, 2e-5),
)
# Moves the queries and keys of the sparse layers until Quest's page bounds tell the pages apart that the model needs.
LAST_STAGE = Stage((16_384, 16_384, 33_792, 4096), 300, 1e-3, 1e-5, selection_weight=4.0)
WARMUP_STEPS = 100
DENSE_LAYERS = 2
PAGE_SIZE = 16
QUERIES_PER_KIND = 128
BATCH_TOKENS = 67_584
TOKENIZER_CHARACTERS = 40_000_000


def train_tokenizer(text: str, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that keeps every digit and every newline as a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Row:
    """A lesson as it grows: tokens, and for each the mean that it counts in."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.kinds: list[int] = []

    def add(self, ids: list[int], kind: int = TEXT) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)


def make_lesson(library: Library, length: int, rng: np.random.Generator) -> Row:
    """Real text with up to 24 facts, up to 12 key points and perhaps a pass key, and questions about them."""
    end = [library.tokenizer.eos_token_id]
    people = draw_people(int(rng.integers(1, min(24, length // 128) + 1)), rng)
    lines = [FACT_LINE.format(name=name, code=code) for name, code in people]
    asked = people[: int(rng.integers(1, min(12, len(people)) + 1))]
    exams = [(FACT_QUESTION.format(name=name), f" {code}", CODE) for name, code in asked]
    depths = rng.random(len(lines))
    if rng.random() < 0.25:
        key = rng.integers(1, 50_001)
        lines.append(PASSKEY_LINE.format(key=key))
        depths = np.append(depths, rng.random())
        exams.append((PASSKEY_QUESTION, f" {key}", CODE))
    if rng.random() < 0.75:
        count = int(rng.integers(2, min(12, length // 256) + 1))
        points = draw_points(library, count, rng)
        lines += points
        depths = np.concatenate([depths, np.sort(rng.random(count))])
        exams.append((DIGEST_QUESTION, digest_answer(points), DIGEST))
    tail = Row()
    for index in rng.permutation(len(exams)):
        question, answer, kind = exams[index]
        tail.add(library.encode(question))
        tail.add(library.encode(answer) + end, kind)
        tail.add(library.encode("\n"))
    row = Row()
    row.add(compose(library, length - len(tail.ids), lines, depths, rng)[0])
    row.ids += tail.ids
    row.kinds += tail.kinds
    return row


def make_passkey_lesson(library: Library, length: int, rng: np.random.Generator) -> Row:
    """The paper's passkey prompt with its answer."""
    document = passkey(library, length - 8, rng.random(), rng)
    row = Row()
    row.add(document.ids)
    row.add([*library.encode(document.answer), library.tokenizer.eos_token_id], CODE)
    row.add(library.encode("\n") * (length - len(row.ids)))
    return row


class Lessons(Dataset):
    """Batches by number: the same number gives the same (ids, kinds), each `[rows, length]`.

    The library is read from a file by each process that makes lessons, once.
    """

    def __init__(self, library_file: Path, stages: tuple[Stage, ...], seed: int, rows: int | None = None):
        self.library_file = library_file
        self.seed = seed
        self.rows = rows
        self.lengths = [stage.lengths[step % len(stage.lengths)] for stage in stages for step in range(stage.steps)]

    @cached_property
    def library(self) -> Library:
        return pickle.loads(self.library_file.read_bytes())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.batch(self.lengths[step], step)

    def batch(self, length: int, number: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, number])
        rows = []
        for _ in range(self.rows or BATCH_TOKENS // length):
            make = make_passkey_lesson if rng.random() < 0.1 else make_lesson
            rows.append(make(self.library, length, rng))
        ids = torch.tensor([row.ids for row in rows], dtype=torch.int16)
        return ids, torch.tensor([row.kinds for row in rows], dtype=torch.uint8)


def next_token_logits(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """The logits of every token but the first, `[rows, length - 1, vocabulary]`."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        return model(ids, use_cache=False).logits[:, :-1]


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Each token's cross-entropy, `[rows, length - 1]`."""
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(logits.shape[:2])


def recorded_attention(module: nn.Module, query: Tensor, key: Tensor, *inputs: Any, **options: Any) -> tuple:
    """SDPA that leaves its queries and keys, `[rows, heads, length, head_dim]`, on the module."""
    module.recorded = query, key
    return sdpa_attention_forward(module, query, key, *inputs, **options)


AttentionInterface.register("recorded", recorded_attention)
AttentionMaskInterface.register("recorded", sdpa_mask)


def selection_loss(query: Tensor, key: Tensor, positions: Tensor) -> Tensor:
    """How far Quest's page scores are from pointing at the pages that the query heads attend, in nats per head.

    A cross-entropy between the square of a head's attention mass in every page and the softmax of the scores, over the
    pages before the query's own, which is always attended. By the square a head that attends one page counts most, and
    one that attends a little of everything counts nothing, since no selection could serve it.

    Args:
        query: `[rows, query heads, length, head_dim]`.
        key: `[rows, KV heads, length, head_dim]`, the length a multiple of PAGE_SIZE.
        positions: `[rows, queries]` int64, the queries that count.
    """
    num_kv_heads, length, head_dim = key.shape[1:]
    scaling = head_dim**-0.5
    query = query.gather(2, positions[:, None, :, None].expand(-1, query.shape[1], -1, head_dim)).float()
    key = key.float()
    pages = key.unflatten(2, (-1, PAGE_SIZE))
    bounds = torch.stack([pages.amin(dim=3), pages.amax(dim=3)], dim=3)
    scores = reference.estimate(query, bounds, None, scaling)  # [rows, KV heads, queries, pages]
    with torch.no_grad():
        logits = query.unflatten(1, (num_kv_heads, -1)) @ key[:, :, None].transpose(-1, -2) * scaling
        is_later = torch.arange(length, device=key.device) > positions[:, None, None, :, None]
        weights = logits.masked_fill_(is_later, -torch.inf).softmax(dim=-1)
        focus = weights.unflatten(-1, (-1, PAGE_SIZE)).sum(dim=-1).square().mean(dim=2)
    is_earlier = torch.arange(scores.shape[-1], device=key.device) < (positions // PAGE_SIZE)[:, None, :, None]
    log_shares = scores.masked_fill(~is_earlier, torch.finfo(scores.dtype).min).log_softmax(dim=-1)
    return -(focus * log_shares).masked_fill(~is_earlier, 0).sum(dim=-1).mean()


def draw_queries(kinds: Tensor) -> Tensor:
    """Of each row QUERIES_PER_KIND positions before tokens of codes and as many before those of digests.

    At random, and before other tokens where a row has too few; `[rows, 2 * QUERIES_PER_KIND]`.
    """
    is_kind = one_hot(kinds[:, 1:].long(), 3)[..., [CODE, DIGEST]].transpose(1, 2)
    chances = is_kind + torch.rand(is_kind.shape, device=kinds.device)
    return chances.topk(QUERIES_PER_KIND, dim=-1).indices.flatten(1)


def kind_means(values: Tensor, kinds: Tensor) -> Tensor:
    """The mean of `values` over the tokens of each kind, `[3]`; 0 for a kind that does not occur."""
    members = one_hot(kinds[:, 1:].long(), 3).to(values.dtype)
    return (members * values[..., None]).sum((0, 1)) / members.sum((0, 1)).clamp(min=1)


@torch.no_grad()
def examine(model: LlamaForCausalLM, heldout: Lessons, length: int, batches: int) -> str:
    """The share of held-out answers that are right in every token, and the loss on held-out text."""
    right, total, text_losses = Counter(), Counter(), []
    for number in range(batches):
        ids, kinds = heldout.batch(length, number)
        ids = ids.to(model.device).long()
        logits = next_token_logits(model, ids)
        text_losses.append(kind_means(token_losses(logits, ids), kinds.to(model.device))[TEXT].item())
        hits = (logits.argmax(-1) == ids[:, 1:]).cpu()
        for row_hits, row_kinds in zip(hits, kinds[:, 1:], strict=True):
            for kind, span in answer_spans(row_kinds):
                right[kind] += bool(row_hits[span].all())
                total[kind] += 1
    shares = [f"{right[kind]} of {total[kind]}" for kind in (CODE, DIGEST)]
    return f"held out, {length} tokens: loss {np.mean(text_losses):.3f}, codes {shares[0]}, whole digests {shares[1]}"


def answer_spans(kinds: Tensor) -> list[tuple[int, slice]]:
    """The runs of answer tokens in one row, as (kind, slice)."""
    edges = [0, *(torch.nonzero(kinds.diff()).flatten() + 1).tolist(), len(kinds)]
    runs = [(int(kinds[start]), slice(start, stop)) for start, stop in pairwise(edges)]
    return [(kind, run) for kind, run in runs if kind != TEXT]


def learning_rate(stages: tuple[Stage, ...], step: int) -> float:
    """Linear within each stage, after a short warm-up."""
    position = step
    for stage in stages:
        if position < stage.steps:
            progress = position / stage.steps
            lr = stage.first_lr + (stage.last_lr - stage.first_lr) * progress
            return lr * min(1.0, (step + 1) / WARMUP_STEPS)
        position -= stage.steps
    return stages[-1].last_lr


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes weights in bf16, config and tokenizer; the model in training stays float32."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_loader(lessons: Lessons, workers: int) -> DataLoader:
    """Batches in order; processes are spawned, since forked ones can hang beside CUDA and tokenizers."""
    parallel = {"num_workers": workers, "prefetch_factor": 4, "multiprocessing_context": "spawn"} if workers else {}
    return DataLoader(lessons, batch_size=None, pin_memory=torch.cuda.is_available(), **parallel)


def update(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor, kinds: Tensor, lr: float, stage: Stage
) -> Tensor:
    """One optimizer step; returns the mean losses of text, codes, digests and, where the stage has it, selection."""
    losses = kind_means(token_losses(next_token_logits(model, ids), ids), kinds)
    weights = losses.new_ones(3)
    if stage.selection_weight:
        positions = draw_queries(kinds)
        sparse_layers = model.model.layers[DENSE_LAYERS:]
        selection = torch.stack([selection_loss(*layer.self_attn.recorded, positions) for layer in sparse_layers])
        losses = torch.cat([losses, selection.mean()[None]])
        weights = torch.cat([weights, weights.new_tensor([stage.selection_weight])])
    (losses @ weights).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses.detach()


def trained_parameters(model: LlamaForCausalLM, stages: tuple[Stage, ...]) -> list[nn.Parameter]:
    """The parameters that `stages` train; the others are frozen from here on."""
    if any(stage.selection_weight for stage in stages):
        model.requires_grad_(False)
        for layer in model.model.layers[DENSE_LAYERS:]:
            layer.self_attn.q_proj.requires_grad_(True)
            layer.self_attn.k_proj.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: LlamaForCausalLM, lessons: Lessons, heldout: Lessons, stages: tuple[Stage, ...], workers: int
) -> Iterator[int]:
    """Trains `model` in place and yields the number of each stage when it is done."""
    device = model.device
    parameters = trained_parameters(model, stages)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda")
    started, tokens, step = time.perf_counter(), 0, 0
    batches = iter(make_loader(lessons, workers))
    for stage_idx, stage in enumerate(stages):
        model.set_attn_implementation("recorded" if stage.selection_weight else "sdpa")
        for ids, kinds in islice(batches, stage.steps):
            ids, kinds = ids.to(device, non_blocking=True).long(), kinds.to(device, non_blocking=True)
            losses = update(model, optimizer, ids, kinds, learning_rate(stages, step), stage)
            step += 1
            tokens += ids.numel()
            if step == 1 or step % 100 == 0:
                names = ("text", "codes", "digests", "selection")
                parts = "  ".join(f"{name} {loss:.4f}" for name, loss in zip(names, losses.tolist(), strict=False))
                print(
                    f"step {step:5d}  {tokens / 1e6:6.1f} M tokens  {time.perf_counter() - started:5.1f} s  "
                    f"rows of {ids.shape[1]:5d}  loss: {parts}"
                )
            if step % 500 == 0:
                print(f"step {step:5d}  {examine(model, heldout, ids.shape[1], batches=4)}")
        yield stage_idx


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the training text, xz-compressed")
    parser.add_argument("--output", type=Path, required=True, help="the folder for weights, config and tokenizer")
    parser.add_argument("--from", dest="start", type=Path, help="a folder with the model to run only the last stage on")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12, help="processes that make lessons")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--steps", type=int, nargs="+", help="steps of each stage that runs, for a shorter trial")
    parser.add_argument("--rows", type=int, help="rows of every batch, for a machine without a GPU")
    arguments = parser.parse_args()
    if not arguments.text.is_file():
        parser.error(f"{arguments.text} is not there: demos/corpus.py writes it")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no CUDA GPU; for a trial on a CPU: --device cpu --rows 1 --no-compile --steps and numbers"
        )
    stages = (LAST_STAGE,) if arguments.start else (*CURRICULUM, LAST_STAGE)
    steps = arguments.steps or [stage.steps for stage in stages]
    if len(steps) != len(stages):
        parser.error(f"--steps needs {len(stages)} numbers, one for each stage that runs")
    arguments.stages = tuple(replace(stage, steps=count) for stage, count in zip(stages, steps, strict=True))
    return arguments


def prepare(text: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> tuple[Path, Path]:
    """Below `folder` a library of the training text and one of the held-out text."""
    files = folder / "training.pickle", folder / "heldout.pickle"
    for path, content in zip(files, (text, heldout_text()), strict=True):
        library = Library(tokenizer, content)
        path.write_bytes(pickle.dumps(library))
        print(f"{path.stem}: {len(library.ids) / 1e6:.1f} M tokens, {len(library.sentences)} sentences")
    return files


def main() -> None:
    started = time.perf_counter()
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    disable_progress_bar()
    device_name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    print(
        f"{Path(sys.argv[0]).name}, torch {torch.__version__}, transformers {transformers.__version__}, {device_name}"
    )
    print(*arguments.stages, f"seed {arguments.seed}", sep="\n")
    with lzma.open(arguments.text, "rt") as file:
        text = file.read()
    if arguments.start:
        tokenizer = AutoTokenizer.from_pretrained(arguments.start)
        model = LlamaForCausalLM.from_pretrained(arguments.start, dtype=torch.float32)
        print(f"goes on from {arguments.start}")
    else:
        tokenizer = train_tokenizer(text[:TOKENIZER_CHARACTERS])
        model = LlamaForCausalLM(tiny_config(tokenizer))
    model.to(arguments.device)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters")
    for layer in model.model.layers if arguments.compile else ():
        layer.compile(dynamic=False)
    with TemporaryDirectory() as folder:
        training_file, heldout_file = prepare(text, tokenizer, Path(folder))
        print(f"tokenizer and text ready after {time.perf_counter() - started:.0f} s")
        heldout = Lessons(heldout_file, arguments.stages, arguments.seed + 1, arguments.rows)
        first = 0
        # The last stage has an optimizer and a warm-up of its own, as where it runs alone.
        for stages in filter(None, (arguments.stages[:-1], arguments.stages[-1:])):
            lessons = Lessons(training_file, stages, arguments.seed + 2 * first, arguments.rows)
            for stage_idx in train(model, lessons, heldout, stages, arguments.workers):
                save(model, tokenizer, arguments.output)
                print(f"stage {first + stage_idx} saved after {time.perf_counter() - started:.0f} s")
            first += len(stages)
        lengths = sorted({length for stage in arguments.stages if stage.steps for length in stage.lengths})
        for length in lengths:
            print(examine(model, heldout, length, batches=16))
    print(f"done after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
