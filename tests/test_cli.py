"""`hf-quest demo` really reads a document and answers twice, or says in one line why it does not."""

import re
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM
from typer.testing import CliRunner

import hf_quest
from hf_quest import CritiPrefill, QuestCache, demo, tiny
from hf_quest.cli import app, layer_kinds
from hf_quest.evaluation.documents import heldout_text
from hf_quest.prompts import segments
from hf_quest.seam import attention

BUDGET = 64
NUM_NEW = 12
POINTS = [
    "Key point 1 of 2: The grass of the garden is green all through the year.",
    "Key point 2 of 2: There is a path that goes to the sea and back again.",
]
CHAT_TEMPLATE = "{% for m in messages %}<|end|>{{ m.role }}\n{{ m.content }}{% endfor %}{{ '\nAssistant:' }}"


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """A text of a few hundred tokens that marks two key points."""
    lines = heldout_text()[:2500].splitlines()
    path = tmp_path_factory.mktemp("demo") / "document.txt"
    path.write_text("\n".join([*lines[:4], POINTS[0], *lines[4:8], POINTS[1], *lines[8:]]))
    return path


@pytest.fixture(scope="module")
def loaded():
    return demo.load(tiny.PATH, "cpu")


@pytest.fixture(scope="module")
def encoded(loaded, document):
    return demo.encode(loaded[1], document.read_text(), demo.QUESTION)


@pytest.fixture
def prefilled(loaded, encoded):
    cache = QuestCache(budget=BUDGET)
    demo.prefill(loaded[0], cache, encoded[0])
    return cache


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_demo_answers_twice_and_compares(document):
    result = run("demo", document, "--budget", BUDGET, "--max-new-tokens", NUM_NEW)
    assert result.exit_code == 0, result.output
    row = re.compile(r"│ (.+?) +│ (.*?) +│ (.*?) +│")
    rows = {name: (dense, quest) for name, dense, quest in row.findall(result.output)}
    num_tokens = rows["tokens in the document"][0]
    assert f"Document {num_tokens} tokens" in result.output
    assert f"{num_tokens}/{num_tokens} tokens" in result.output  # the progress bar
    assert rows["tokens attended per step, layers 2 to 5"][1] == str(BUDGET)
    assert int(rows["tokens attended per step, layers 0 to 1"][1]) > int(num_tokens)
    assert float(rows["share of the KV cache read"][1].rstrip(" %")) < 75
    dense_ms, quest_ms = map(float, rows["ms per token, median"])
    speedup = float(rows["speedup"][1].rstrip("×"))
    assert speedup == pytest.approx(dense_ms / quest_ms, abs=0.1)
    assert re.fullmatch(r"yes|for \d+ of \d+ tokens", rows["answers agree"][1])


def test_demo_runs_as_a_program(document):
    command = [sys.executable, "-m", "hf_quest.cli", "demo", document, "--budget", str(BUDGET), "--max-new-tokens", "4"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "answers agree" in result.stdout
    assert "\x1b" not in result.stdout  # a pipe gets plain text


def test_version():
    assert run("--version").output == f"hf-quest {hf_quest.__version__}\n"


def test_import_of_the_package_is_lean():
    heavy = "{'rich', 'typer', 'matplotlib', 'datasets', 'torchmetrics', 'hf_quest.cli', 'hf_quest.demo'} | "
    heavy += "{'hf_quest.evaluation', 'hf_quest.tiny'}"
    needed = (
        "transformers, transformers.cache_utils, transformers.models.auto.modeling_auto, transformers.masking_utils"
    )
    code = f"import sys, {needed}; before = set(sys.modules); import hf_quest; "
    code += f"print(sorted(({heavy}) & (set(sys.modules) - before)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_the_dense_answer_is_stock_generate(loaded, encoded, prefilled):
    model, tokenizer = loaded
    answer = demo.Answer(tokenizer)
    demo.answer_dense(model, demo.stock_copy(prefilled, model.config), *encoded, answer, NUM_NEW)
    prompt = torch.cat(encoded, dim=1)
    stock = model.generate(prompt, max_new_tokens=NUM_NEW, do_sample=False)
    assert answer.token_ids == stock[0, prompt.shape[1] :].tolist()


def test_quest_decodes_everything_after_the_document(loaded, encoded, prefilled, monkeypatch):
    attended = []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args: attended.append(args[0]) or attend(*args))
    model, tokenizer = loaded
    answer = demo.Answer(tokenizer)
    demo.answer_quest(model, prefilled, *encoded, answer, NUM_NEW)
    num_sparse = model.config.num_hidden_layers - prefilled.dense_layers
    assert len(attended) == num_sparse * (encoded[1].shape[1] + len(answer.token_ids) - 1)


def test_critical_prefill_is_refused_for_a_document_that_it_would_read_dense(document):
    message = r"The document has [\d,]+ tokens, and CritiPrefill reads everything below 4,096 dense\. .*"
    assert_error(run("demo", document, "--budget", BUDGET, "--prefill", "critical"), message)


def test_both_halves_at_work(document, monkeypatch):
    critical = CritiPrefill(budget=64, segment_size=64, block_size=16, threshold=128)
    monkeypatch.setattr(demo, "CRITICAL", critical)
    slabs = []
    select = segments.select
    monkeypatch.setattr(segments, "select", lambda *args, **kwargs: slabs.append(1) or select(*args, **kwargs))
    result = run("demo", document, "--budget", BUDGET, "--prefill", "critical", "--max-new-tokens", NUM_NEW)
    assert result.exit_code == 0, result.output
    assert slabs
    assert re.search(r"of the products q·k in a prompt, layers 1 on\s+│ 100 %\s+│ \d\d\.\d %", result.output), (
        result.output
    )
    assert "Prefill, CritiPrefill" in result.output


def test_a_budget_that_covers_everything_answers_like_dense(loaded, encoded, prefilled):
    model, tokenizer = loaded
    dense, quest = demo.Answer(tokenizer), demo.Answer(tokenizer)
    demo.answer_dense(model, demo.stock_copy(prefilled, model.config), *encoded, dense, NUM_NEW)
    prefilled.budget = 10_000
    demo.answer_quest(model, prefilled, *encoded, quest, NUM_NEW)
    assert demo.num_common(dense, quest) == len(dense.token_ids) == len(quest.token_ids)


def test_time_to_show_an_answer_is_not_counted(loaded):
    answer = demo.Answer(loaded[1], show=lambda: time.sleep(0.1))
    for token in range(5):
        answer.put(torch.tensor([token]))
    assert max(answer.seconds) < 0.05


def test_the_question_is_the_one_that_the_tiny_model_learned(loaded, encoded):
    question = "Question: what are the key points of this document, in order? Answer:"
    assert loaded[1].decode(encoded[1][0]) == question


def test_document_and_question_are_one_chat(document):
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    tokenizer.chat_template = CHAT_TEMPLATE
    text = document.read_text().rstrip()
    document_ids, question_ids = demo.encode(tokenizer, text, "Why?")
    assert tokenizer.decode(torch.cat([document_ids, question_ids], dim=1)[0]) == (
        f"<|end|>user\n{text}\n\nWhy?\nAssistant:"
    )


def test_the_made_document_is_long_and_marks_its_key_points():
    text, points = demo.make_document()
    num_tokens = len(AutoTokenizer.from_pretrained(tiny.PATH)(text).input_ids)
    assert 0.99 * demo.DOCUMENT_LENGTH < num_tokens <= demo.DOCUMENT_LENGTH
    assert len(points) >= 5
    assert set(points) <= set(text.splitlines())


def test_layer_kinds_are_runs():
    assert list(layer_kinds([9, 9, 4, 4, 4, 9])) == [("layers 0 to 1", 9), ("layers 2 to 4", 4), ("layer 5", 9)]


def assert_error(result, message):
    """One line that says why, and exit code 1."""
    assert result.exit_code == 1
    assert re.fullmatch(f"Error: {message}\n", result.stderr), result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r".*document\.md cannot be read: No such file or directory\."),
        (b"", r".*document\.md is empty\."),
        (b" \n\n", r".*document\.md is empty\."),
        (b"\x89PNG\r\n\xff\x00", r".*document\.md is not UTF-8 text\. The demo reads \.txt and \.md files\."),
        (b"PK\x03\x04\x00\x00", r".*document\.md is a binary file\. The demo reads \.txt and \.md files\."),
    ],
    ids=["missing", "empty", "blank", "not UTF-8", "binary"],
)
def test_unreadable_file(tmp_path, content, message):
    path = tmp_path / "document.md"
    if content is not None:
        path.write_bytes(content)
    assert_error(run("demo", path), message)


def test_folder_as_file(tmp_path):
    assert_error(run("demo", tmp_path), ".* cannot be read: Is a directory.")


def test_document_beyond_the_models_context(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(heldout_text()[:400_000])
    message = (
        r"The document has [\d,]+ tokens, [\d,]+ with the question and the answer, and the model's context ends at "
        r"40,960\. Give a shorter document or another model\."
    )
    assert_error(run("demo", path), message)


def test_budget_below_two_pages(document):
    assert_error(
        run("demo", document, "--budget", 31), "budget is a number of tokens and at least two pages.* It is 31."
    )


def test_budget_that_leaves_nothing_out(document):
    message = (
        "The document has .* tokens, which a budget of 4,096 covers: .* Give a longer document or a smaller budget."
    )
    assert_error(run("demo", document, "--budget", 4096), message)


def test_answer_too_short_to_time(document, monkeypatch):
    monkeypatch.setattr(demo, "generate", lambda model, cache, input_ids, answer, max_new_tokens: answer.end())
    message = "The model's whole answer is '', too short to time. Ask another question."
    assert_error(run("demo", document, "--budget", BUDGET), message)


def test_device_that_is_not_there(document, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "This machine, or this build of PyTorch, has no CUDA GPU. Use --device cpu."
    assert_error(run("demo", document, "--device", "cuda"), message)


def test_model_that_cannot_be_loaded(document, tmp_path):
    assert_error(run("demo", document, "--model", tmp_path), f"{tmp_path} cannot be loaded: .+")


def test_model_that_cannot_be_served(document, tmp_path):
    config = DeepseekV2Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=8,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
    )
    DeepseekV2ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny.PATH).save_pretrained(tmp_path)
    result = run("demo", document, "--model", tmp_path, "--budget", BUDGET)
    assert_error(result, r"The model cannot read the document: .* Quest cannot serve it.*")


def test_prefill_checks_every_budget_first():
    assert_error(run("eval", "prefill", "--prefill-budget", 8192), "threshold=4096 is under the budget.*")


@pytest.mark.parametrize("arguments", [["--budget", "many"], ["--device", "tpu"], ["--max-new-tokens", "1"]], ids=str)
def test_wrong_use(arguments):
    assert run("demo", *arguments).exit_code == 2
