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
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

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
    """Part of the curriculum: batches whose rows have each of `lengths` tokens in turn."""

    lengths: tuple[int, ...]
    steps: int
    first_lr: float
    last_lr: float


CURRICULUM = (
    Stage((1024,), 3000, 2e-3, 2e-3),
    Stage((4096,), 2000, 2e-3, 1.5e-3),
    Stage((16_384, 16_384, 4096), 2000, 1.5e-3, 7e-4),
    Stage((33_792, 33_792, 16_384, 4096), 1600, 7e-4, 2e-5),
)
WARMUP_STEPS = 100
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


def update(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor, kinds: Tensor, lr: float) -> Tensor:
    """One optimizer step; returns the mean losses of text, codes and digests."""
    means = kind_means(token_losses(next_token_logits(model, ids), ids), kinds)
    means.sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means.detach()


def train(
    model: LlamaForCausalLM, lessons: Lessons, heldout: Lessons, stages: tuple[Stage, ...], workers: int
) -> Iterator[int]:
    """Trains `model` in place and yields the number of each stage when it is done."""
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda")
    stage_ends = np.cumsum([stage.steps for stage in stages]).tolist()
    started, tokens = time.perf_counter(), 0
    for step, (ids, kinds) in enumerate(make_loader(lessons, workers), start=1):
        ids, kinds = ids.to(device, non_blocking=True).long(), kinds.to(device, non_blocking=True)
        means = update(model, optimizer, ids, kinds, learning_rate(stages, step - 1))
        tokens += ids.numel()
        if step == 1 or step % 100 == 0:
            text, code, digest = means.tolist()
            print(
                f"step {step:5d}  {tokens / 1e6:6.1f} M tokens  {time.perf_counter() - started:5.1f} s  "
                f"rows of {ids.shape[1]:5d}  loss: text {text:.3f}  codes {code:.4f}  digests {digest:.4f}"
            )
        if step % 500 == 0:
            print(f"step {step:5d}  {examine(model, heldout, ids.shape[1], batches=4)}")
        if step in stage_ends:
            yield stage_ends.index(step)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the training text, xz-compressed")
    parser.add_argument("--output", type=Path, required=True, help="the folder for weights, config and tokenizer")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12, help="processes that make lessons")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--steps", type=int, nargs=len(CURRICULUM), help="steps of each stage, for a shorter trial")
    parser.add_argument("--rows", type=int, help="rows of every batch, for a machine without a GPU")
    arguments = parser.parse_args()
    steps = arguments.steps or [stage.steps for stage in CURRICULUM]
    arguments.stages = tuple(replace(stage, steps=count) for stage, count in zip(CURRICULUM, steps, strict=True))
    return arguments


def prepare(text_file: Path, folder: Path) -> tuple[PreTrainedTokenizerFast, Path, Path]:
    """The tokenizer, and below `folder` a library of the training text and one of the held-out text."""
    with lzma.open(text_file, "rt") as file:
        text = file.read()
    tokenizer = train_tokenizer(text[:TOKENIZER_CHARACTERS])
    files = folder / "training.pickle", folder / "heldout.pickle"
    for path, content in zip(files, (text, heldout_text()), strict=True):
        library = Library(tokenizer, content)
        path.write_bytes(pickle.dumps(library))
        print(f"{path.stem}: {len(library.ids) / 1e6:.1f} M tokens, {len(library.sentences)} sentences")
    return tokenizer, *files


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
    with TemporaryDirectory() as folder:
        tokenizer, training_file, heldout_file = prepare(arguments.text, Path(folder))
        print(f"tokenizer and text ready after {time.perf_counter() - started:.0f} s")
        lessons = Lessons(training_file, arguments.stages, arguments.seed, arguments.rows)
        heldout = Lessons(heldout_file, arguments.stages, arguments.seed + 1, arguments.rows)
        model = LlamaForCausalLM(tiny_config(tokenizer)).to(arguments.device)
        print(f"{model.num_parameters() / 1e6:.2f} M parameters")
        for layer in model.model.layers if arguments.compile else ():
            layer.compile(dynamic=False)
        for stage_idx in train(model, lessons, heldout, arguments.stages, arguments.workers):
            save(model, tokenizer, arguments.output)
            print(f"stage {stage_idx} saved after {time.perf_counter() - started:.0f} s")
        for length in sorted(set(lessons.lengths)):
            print(examine(model, heldout, length, batches=16))
    print(f"done after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
