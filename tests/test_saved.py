"""A saved cache goes on as the one that was saved, with the model that read it, in a process of its own. What is not
whole, or is of another model, is refused; what is there already stays.
"""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from exact_top_k import ExactTopK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_llama import ANSWER, BUDGET, PROMPT, generate, make_model, on_any_device, tokens
from test_families import (
    FAMILIES,
    SERVED_SINCE,
    config_of,
    is_served,
    randomize,
    skip_what_transformers_does_otherwise,
)
from test_local import build
from test_methods import METHODS, Interrupted, forward, interrupted, read
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, EncoderDecoderCache
from transformers import DynamicCache as Stock

import hf_quest.tiny
from hf_quest import CACHE_NAME, CritiPrefill, H2OCache, MethodCache, QuestCache, QuestError, saved_inputs
from hf_quest.storage import folder as folders

ROOT = Path(__file__).parent.parent
QUESTION = tokens(9, seed=5)
SETTINGS = {
    "default": {},
    "bounds of the keys' dtype": {"bounds_dtype": None},
    "codes": {"codes": 2, "candidates": 2},
    "offloaded": {"codes": 2, "offloading": True},
    "all candidates": {"codes": 4, "candidates": None},
    "small pages": {"page_size": 4},
    "another score": {"score": "published"},
    "all layers sparse": {"dense_layers": 0},
    "allocated at once": {"max_cache_len": 400},
    "not compiled": {"compile": False},
    "CritiPrefill": {
        "prefill": CritiPrefill(budget=32, segment_size=32, block_size=16, threshold=64, layer_fusion=0.3)
    },
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "saved"


@pytest.fixture
def saved(model, folder):
    """A folder with a cache of PROMPT and four further tokens."""
    read(model, QuestCache(BUDGET)).save(folder)
    return folder


def reloaded(cache, folder, model, **options):
    cache.save(folder, model)
    return type(cache).load(folder, model, **options)


def assert_same_state(cache, other):
    """All that is stored and remembered is equal, bit by bit."""
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        (tensors, facts), (right, right_facts) = layer.saved(), expected.saved()
        assert facts == right_facts
        assert tensors.keys() == right.keys()
        assert all(torch.equal(tensors[name], right[name]) for name in right)


def assert_goes_on(cache, other, model, batch_size=1):
    """The same logits, bit by bit, of some tokens at once and one by one."""
    for count in (9, 1, 1, 1):
        ids = tokens(count, seed=count, batch_size=batch_size)
        assert torch.equal(forward(model, cache, ids), forward(model, other, ids))
    assert_same_state(cache, other)


class TestGoesOn:
    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
    def test_of_every_method(self, model, method, folder):
        cache = read(model, method(budget=20))
        own = {"method": cache.method} if type(cache) is MethodCache else {}
        loaded = reloaded(cache, folder, model, **own)
        assert (repr(loaded), loaded.method, loaded.read_share) == (repr(cache), cache.method, cache.read_share)
        assert_same_state(loaded, cache)
        shutil.rmtree(folder)  # of which it keeps nothing
        assert_goes_on(loaded, cache, model)
        if not cache.method.evicts:
            for each in (loaded, cache):
                each.crop(-7)
            assert_goes_on(loaded, cache, model)
        for each in (loaded, cache):
            each.batch_repeat_interleave(3)
            each.reorder_cache(torch.tensor([2, 0, 0]))
        assert_goes_on(loaded, cache, model, batch_size=3)
        for each in (loaded, cache):
            each.budget = 12
        assert_goes_on(loaded, cache, model, batch_size=3)

    @pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
    def test_with_every_setting(self, model, options, folder):
        cache = QuestCache(BUDGET, **options)
        generate(model, tokens(PROMPT), cache, prefill_chunk_size=64)
        loaded = reloaded(cache, folder, model)
        assert vars(loaded.shared.method) == vars(cache.shared.method)
        for name in ("dense_layers", "max_cache_len", "compile", "prefill"):
            assert getattr(loaded, name) == getattr(cache, name)
        assert_goes_on(loaded, cache, model)
        prompt = tokens(100, seed=3)
        assert torch.equal(forward(model, loaded, prompt), forward(model, cache, prompt))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_every_family(self, family, folder):
        skip_what_transformers_does_otherwise(family)
        config = config_of(FAMILIES[family].model_type, FAMILIES[family].config)
        if config.model_type in SERVED_SINCE and not is_served(config.model_type):
            pytest.skip("not served with this version of Transformers")
        model = AutoModelForCausalLM.from_config(config, attn_implementation="quest")
        randomize(model)
        document, question = (torch.randint(2, 96, (1, count)) for count in (45, 5))
        cache = QuestCache(16, page_size=4, dense_layers=1)
        forward(model, cache, document)
        loaded = reloaded(cache, folder, model)
        options = {"max_new_tokens": 12, "do_sample": False}
        ids = torch.cat([document, question], dim=1)
        answers = [model.generate(ids, **{CACHE_NAME: each}, **options) for each in (loaded, cache)]
        assert torch.equal(*answers)
        assert_same_state(loaded, cache)

    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
    def test_of_a_padded_batch(self, model, method, folder):
        ids, mask = tokens(PROMPT, batch_size=3), torch.ones(3, PROMPT, dtype=torch.long)
        mask[1, :37], mask[2, :149] = 0, 0
        cache = method(budget=20)
        forward(model, cache, ids, mask)
        own = {"method": cache.method} if type(cache) is MethodCache else {}
        loaded = reloaded(cache, folder, model, **own)
        assert loaded.left_padding == cache.left_padding == (0, 37, 149)
        inputs = torch.cat([ids, QUESTION.expand(3, -1)], dim=1)
        options = {"attention_mask": torch.cat([mask, torch.ones(3, QUESTION.shape[1], dtype=torch.long)], dim=1)}
        answers = [generate(model, inputs, each, **options) for each in (loaded, cache)]
        assert torch.equal(*answers)
        assert_same_state(loaded, cache)

    @pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss"])
    @pytest.mark.parametrize("counts", [(20,), (300,), (300, 1, 1), (40, 300), (40, 300, 1)], ids=str)
    def test_of_local_layers_and_takes_back_as_many_tokens(self, name, counts, folder):
        model, cache = build(name), QuestCache(BUDGET)
        for step, count in enumerate(counts):
            forward(model, cache, tokens(count, seed=step))
        loaded = reloaded(cache, folder, model)
        taken_back = [0]
        for num_removed in (1, 200, 290, 300, 301):
            outcomes = []
            for each in (copy.deepcopy(loaded), copy.deepcopy(cache)):
                try:
                    each.crop(-num_removed)
                except (QuestError, ValueError) as error:
                    outcomes.append(str(error))
                else:
                    outcomes.append(forward(model, each, tokens(3)))
            if isinstance(outcomes[0], str):
                assert outcomes[0] == outcomes[1]
            else:
                assert torch.equal(*outcomes)
                taken_back.append(num_removed)
        assert (max(taken_back) == 300) == (counts in [(300,), (40, 300)])
        assert_goes_on(loaded, cache, model)

    def test_with_drafts_after_a_window(self, folder):
        model = build("gemma3")
        prompt = tokens(PROMPT // 2).repeat(1, 2)
        cache = QuestCache(BUDGET)
        forward(model, cache, prompt)
        loaded = reloaded(cache, folder, model)
        ids = torch.cat([prompt, QUESTION, prompt[:, :40]], dim=1)
        answers = [generate(model, ids, each, prompt_lookup_num_tokens=4) for each in (loaded, cache)]
        assert torch.equal(*answers)
        assert_same_state(loaded, cache)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_in_16_bits(self, dtype, folder):
        model = make_model(dtype=dtype)
        cache = read(model, QuestCache(BUDGET))
        assert_goes_on(reloaded(cache, folder, model), cache, model)

    def test_after_autocast(self, model, folder):
        cache = QuestCache(BUDGET)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            read(model, cache)
        loaded = reloaded(cache, folder, model)
        assert_goes_on(loaded, cache, model)  # in float32, which such a cache takes

    @pytest.mark.parametrize("inside", ["save", "load", "both"])
    def test_in_inference_mode(self, model, inside, folder):
        cache = QuestCache(BUDGET)
        with torch.inference_mode(inside != "load"):
            read(model, cache)
            cache.save(folder)
        with torch.inference_mode(inside != "save"):
            loaded = QuestCache.load(folder, model)
        expected = read(model, QuestCache(BUDGET))
        assert_goes_on(loaded, expected, model)

    def test_after_a_compiled_generate(self, model, folder):
        cache = QuestCache(BUDGET)
        answer = generate(model, tokens(PROMPT), cache, compile_config=on_any_device(backend="aot_eager", mode=None))
        assert cache.get_seq_length() == PROMPT + ANSWER - 1
        loaded = reloaded(cache, folder, model)
        ids = torch.cat([answer, QUESTION], dim=1)
        assert torch.equal(*(generate(model, ids, each) for each in (loaded, cache)))

    def test_while_its_layers_are_offloaded(self, model, folder):
        cache = read(model, QuestCache(BUDGET))
        for layer in cache.layers:
            layer.offload()
        assert_goes_on(reloaded(cache, folder, model), cache, model)

    def test_of_clusters_that_were_made_of_the_document(self, model, folder):
        cache = hf_quest.SqueezedAttentionCache(20, share=0.3, num_newest=3)
        forward(model, cache, tokens(PROMPT))
        cache.squeeze()
        assert_goes_on(reloaded(cache, folder, model), cache, model)

    def test_of_another_caches_tokens(self, model, folder):
        stock = Stock()
        forward(model, stock, tokens(PROMPT))
        cache = QuestCache.from_cache(stock, BUDGET)
        assert_goes_on(reloaded(cache, folder, model), cache, model)

    def test_more_than_once(self, model, tmp_path):
        cache = read(model, QuestCache(BUDGET))
        loaded = reloaded(cache, tmp_path / "one", model)
        forward(model, loaded, QUESTION)
        again = reloaded(loaded, tmp_path / "two", model)
        assert_goes_on(again, loaded, model)
        assert_goes_on(QuestCache.load(tmp_path / "one", model), cache, model)


IN_A_PROCESS = """
    import sys
    import torch, hf_quest.tiny
    from hf_quest import CACHE_NAME, QuestCache, saved_inputs

    model, tokenizer = hf_quest.tiny.load(attn_implementation="quest")
    document = saved_inputs(sys.argv[1])
    question = tokenizer(sys.argv[2], return_tensors="pt")
    inputs = {name: torch.cat([document[name], question[name]], dim=1) for name in document}
    cache = QuestCache.load(sys.argv[1], model)
    model.forward_tokens = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: model.forward_tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    output = model.generate(**inputs, **{CACHE_NAME: cache}, max_new_tokens=12, do_sample=False)
    assert model.forward_tokens[0] == question.input_ids.shape[1], "the document was read again"
    print(output[0].tolist())
"""


def with_tests(**options):
    """The environment of a process that imports from tests, too."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests", *sys.path[1:]])), **options}


def in_a_process(script, *arguments, **options):
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, env=with_tests(), capture_output=True, text=True, **options)


def test_a_document_is_asked_in_another_process_without_its_prompt(folder):
    model, tokenizer = hf_quest.tiny.load(attn_implementation="quest")
    document = "The secret code of Dorlin is 402717. The secret code of Melvan is 935048.\n" * 30
    question = "Question: what is the secret code of Melvan? Answer:"
    inputs, cache = tokenizer(document, return_tensors="pt"), QuestCache(256)
    with torch.no_grad():
        model(**inputs, **{CACHE_NAME: cache})
    cache.save(folder, inputs=inputs)
    ids = torch.cat([inputs.input_ids, tokenizer(question, return_tensors="pt").input_ids], dim=1)
    expected = model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=12, do_sample=False)
    assert "935048" in tokenizer.decode(expected[0, ids.shape[1] :])
    result = in_a_process(IN_A_PROCESS, folder, question)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected[0].tolist()


class TestFolder:
    def test_holds_no_pickle_and_no_more_than_its_tokens(self, model, saved):
        cache = QuestCache.load(saved, model)
        names = {f"layer-00{index}.safetensors" for index in range(4)} | {"cache.json"}
        assert {path.name for path in saved.iterdir()} == names
        stored = sum(tensor.nbytes for layer in cache.layers for tensor in layer.saved()[0].values())
        on_disk = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
        assert stored <= on_disk < stored + 4 * 1024
        assert cache.layers[2].keys.shape[2] > PROMPT + 4  # with room for more, which is not in the files

    def test_what_a_window_left_behind_is_not_written(self, folder):
        """Slots of a ring that hold tokens of a former text."""
        model, cache = build("mistral"), QuestCache(BUDGET)
        forward(model, cache, tokens(PROMPT))
        cache.reset()
        forward(model, cache, tokens(5))
        cache.save(folder)
        assert folders.tensors_in(folder, "layer-000", folders.read(folder))["keys"].shape[2] == 5

    def test_files_are_mapped_and_not_read_before_they_are_used(self, saved):
        tensors = folders.tensors_in(saved, "layer-000", folders.read(saved))
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("Linux tells what is mapped")
        assert str(saved / "layer-000.safetensors") in maps.read_text()
        assert tensors["keys"].shape == (1, 2, PROMPT + 4, 16)

    def test_others_may_read_it_as_they_may_the_folder(self, saved):
        assert {path.stat().st_mode & 0o666 for path in saved.iterdir()} == {saved.stat().st_mode & 0o666}

    def test_an_empty_folder_and_parents_that_are_missing_are_filled(self, model, tmp_path):
        cache = read(model, QuestCache(BUDGET))
        (tmp_path / "empty").mkdir()
        cache.save(tmp_path / "empty")
        cache.save(str(tmp_path / "some" / "where"))
        for folder in (tmp_path / "empty", str(tmp_path / "some" / "where")):
            assert_same_state(QuestCache.load(folder, model), cache)

    def test_inputs_come_back(self, model, folder):
        ids, mask = tokens(PROMPT, batch_size=2), torch.ones(2, PROMPT, dtype=torch.long)
        mask[1, :37] = 0
        cache = QuestCache(BUDGET)
        forward(model, cache, ids, mask)
        cache.save(folder, inputs={"input_ids": ids, "attention_mask": mask, "length": 3, "pixels": torch.zeros(2)})
        inputs = saved_inputs(folder)
        assert set(inputs) == {"input_ids", "attention_mask"}
        assert torch.equal(inputs["input_ids"], ids)
        assert torch.equal(inputs.to("cpu").attention_mask, mask)

    def test_inputs_may_have_the_token_that_generate_wrote_last(self, model, folder):
        cache = QuestCache(BUDGET)
        answer = generate(model, tokens(PROMPT), cache)
        cache.save(folder, inputs={"input_ids": answer})
        assert torch.equal(saved_inputs(folder)["input_ids"], answer)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            (tokens(PROMPT), r'inputs are what the tokenizer gave with return_tensors="pt"'),
            ({}, r'inputs are what the tokenizer gave with return_tensors="pt"'),
            ({"input_ids": [[1, 2]]}, r'inputs are what the tokenizer gave with return_tensors="pt"'),
            ({"input_ids": tokens(PROMPT)}, "inputs are 1 rows of 150 tokens, and the cache holds 1 of 154"),
            ({"input_ids": tokens(154, batch_size=2)}, "inputs are 2 rows of 154 tokens, and the cache holds 1 of 154"),
        ],
        ids=["a tensor", "none", "a list", "too few", "other rows"],
    )
    def test_inputs_of_other_tokens_are_refused(self, model, inputs, message, folder):
        with pytest.raises(ValueError, match=message):
            read(model, QuestCache(BUDGET)).save(folder, inputs=inputs)
        assert list(folder.parent.iterdir()) == []

    def test_without_inputs_there_are_none(self, saved):
        with pytest.raises(QuestError, match="was saved without inputs"):
            saved_inputs(saved)


class TestSaveRefuses:
    def test_an_empty_cache(self, model, folder):
        for cache in (QuestCache(BUDGET), read(model, QuestCache(BUDGET))):
            cache.reset()
            with pytest.raises(ValueError, match="The cache is empty, so there is nothing to save"):
                cache.save(folder, model)

    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
    def test_a_forward_that_did_not_end(self, model, method, folder):
        cache = read(model, method(budget=20))
        with pytest.raises(Interrupted):
            interrupted(model, cache, tokens(3), 16)
        with pytest.raises(QuestError, match=r"did not end.*put back to the 154 tokens before"):
            cache.save(folder)
        assert not folder.exists()
        own = {"method": cache.method} if type(cache) is MethodCache else {}
        assert_same_state(reloaded(cache, folder, model, **own), read(model, method(budget=20)))

    def test_a_first_forward_that_did_not_end(self, model, folder):
        cache = QuestCache(BUDGET)
        with pytest.raises(Interrupted):
            interrupted(model, cache, tokens(PROMPT), 11)
        with pytest.raises(
            QuestError, match=r"LlamaForCausalLM caches .* in 4 layers, .* of 1: its first forward did not"
        ):
            cache.save(folder)

    def test_a_cache_of_which_no_model_is_known(self, model, folder):
        cache = copy.deepcopy(read(model, QuestCache(BUDGET)))
        with pytest.raises(ValueError, match=r"not known which one read .*cache\.save\(folder, model\)"):
            cache.save(folder)
        other = make_model()
        read(other, cache := QuestCache(BUDGET))
        del other
        with pytest.raises(ValueError, match="not known which one read"):
            cache.save(folder)

    @pytest.mark.parametrize("name", ["there", "file", "link", "dangling"])
    def test_a_target_that_is_there(self, model, name, tmp_path):
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "note").write_text("mine")
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to("there")
        (tmp_path / "dangling").symlink_to("nothing")
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(FileExistsError, match=r"exists, and nothing is written over\. Name another folder"):
            read(model, QuestCache(BUDGET)).save(tmp_path / name)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert (tmp_path / "there" / "note").read_text() == (tmp_path / "file").read_text() == "mine"

    def test_a_target_that_comes_up_meanwhile(self, model, folder, monkeypatch):
        def write_file(*arguments):
            folder.mkdir(exist_ok=True)
            (folder / "note").write_text("mine")
            return original(*arguments)

        original = folders.write_file
        monkeypatch.setattr(folders, "write_file", write_file)
        with pytest.raises(OSError, match=r"was not written.*Nothing is left of it"):
            read(model, QuestCache(BUDGET)).save(folder)
        assert [path.name for path in folder.parent.iterdir()] == ["saved"]
        assert [path.name for path in folder.iterdir()] == ["note"]

    def test_a_disk_without_room_before_anything_is_written(self, model, folder, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20))
        with pytest.raises(OSError, match=r"takes [\d,]+ bytes, and there are 1,048,576 free.*Nothing was written"):
            read(model, QuestCache(BUDGET)).save(folder / "deep")
        assert not folder.exists()

    def test_an_encoder_decoder_model(self, folder):
        config = BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, attn_implementation="quest",
        )  # fmt: skip
        model, cache = BartForConditionalGeneration(config).eval(), QuestCache(BUDGET)
        ids = tokens(20) % 60
        with torch.no_grad():
            both = EncoderDecoderCache(cache, Stock())
            model(input_ids=ids, decoder_input_ids=ids, **{CACHE_NAME: both})
        with pytest.raises(QuestError, match="what it writes depends on its encoder's output"):
            cache.save(folder)

    def test_a_part_of_the_heads(self, model, folder):
        cache, other = read(model, QuestCache(BUDGET)), copy.deepcopy(model)
        other.config.distributed_config = type("Config", (), {"tp_size": 2})()
        with pytest.raises(QuestError, match="every process holds some of the KV heads"):
            cache.save(folder, other)

    def test_settings_that_json_cannot_hold(self, model, folder):
        class Odd(ExactTopK):
            pass

        cache = read(model, MethodCache(Odd(budget=20)))
        object.__setattr__(cache.method, "budget", 20 + 0j)
        with pytest.raises(QuestError, match="budget of Odd is a complex, and settings that can be saved are numbers"):
            cache.save(folder)
        assert not folder.exists()


SAVE = """
    import json, os, resource, signal, sys
    import torch
    from small_llama import make_model, tokens
    from hf_quest import CACHE_NAME, QuestCache
    from hf_quest.storage import folder as folders

    model, cache = make_model(), QuestCache(48)
    for ids in (tokens(150), *(tokens(1, seed=step) for step in range(4))):
        model(ids, **{CACHE_NAME: cache})
"""
CUT_SHORT = """
    def killed(folder, call):
        calls, sync = [], folders.sync

        def counted(path):
            calls.append(path)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)

        folders.sync = counted
        cache.save(folder)

    def full(folder, limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            cache.save(folder)
        except OSError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        cache.save(folder)
        print(QuestCache.load(folder, model))

    for line in sys.stdin:
        name, *arguments = json.loads(line)
        if os.fork() == 0:
            {"killed": killed, "full": full}[name](*arguments)
            sys.exit()
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="class")
def cut_short():
    """What ends a process that saves, and what it printed: each has its own, of one that has imported everything."""
    command = [sys.executable, "-c", textwrap.dedent(SAVE) + textwrap.dedent(CUT_SHORT)]
    with subprocess.Popen(
        command, env=with_tests(OMP_NUM_THREADS="1"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(*arguments):
            print(json.dumps(arguments), file=process.stdin, flush=True)
            said = []
            while re.fullmatch(r"-?\d+\n", line := process.stdout.readline()) is None:
                assert line, "it has ended, and said why on stderr"
                said.append(line)
            return int(line), "".join(said)

        yield run
        process.stdin.close()


class TestCutShort:
    """What a process that is killed, and a disk that is full, leave behind."""

    @pytest.mark.parametrize("call", [1, 4, 5, 6])
    def test_killed_while_saving(self, model, call, folder, cut_short):
        """Before a file has reached the disk: of four layers, the index, the folder."""
        assert cut_short("killed", str(folder), call) == (-signal.SIGKILL, "")
        assert not folder.exists()
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            QuestCache.load(folder, model)
        (part,) = folder.parent.iterdir()
        if call < 5:
            with pytest.raises(QuestError, match=r"Saving it did not end: it is a part, which can be removed"):
                QuestCache.load(part, model)
        read(model, QuestCache(BUDGET)).save(folder)  # what is left of another process is in nobody's way
        assert_same_state(QuestCache.load(folder, model), read(model, QuestCache(BUDGET)))
        assert part.exists()

    def test_killed_at_any_moment(self, model, folder):
        """By another process, while it saves again and again."""
        script = (
            textwrap.dedent(SAVE) + "print(flush=True)\nwhile True: cache.save(f'{sys.argv[1]}{len(os.listdir())}')"
        )
        command = [sys.executable, "-c", script, str(folder)]
        with subprocess.Popen(command, cwd=folder.parent, env=with_tests(), stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            while len(list(folder.parent.glob("saved*"))) < 3:
                assert process.poll() is None
            process.kill()
        for path in folder.parent.glob("saved*"):
            assert QuestCache.load(path, model).get_seq_length() == PROMPT + 4

    @pytest.mark.parametrize("limit", [0, 20_000], ids=lambda limit: f"{limit} bytes a file")
    def test_a_file_that_may_not_grow(self, limit, folder, cut_short):
        status, said = cut_short("full", str(folder), limit)
        assert status == 0
        message, loaded = said.strip().rsplit("\n", 1)
        assert "File too large" in message
        assert "Nothing is left of it, and the cache is unchanged. Make room" in message
        assert "tokens=154" in loaded
        assert list(folder.parent.iterdir()) == [folder]

    def test_a_disk_that_fills_up(self, model, tmp_path, monkeypatch):
        disk = tmp_path / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("a small file system needs the right to mount one")
        try:
            cache = read(model, QuestCache(BUDGET))
            with pytest.raises(OSError, match="Make room, or name a folder on another disk"):
                cache.save(disk / "saved")
            monkeypatch.setattr(folders, "check_target", lambda *arguments: None)  # others write meanwhile
            with pytest.raises(OSError, match=r"was not written: .*No space left.*Make room"):
                cache.save(disk / "saved")
            assert list(disk.iterdir()) == []
            assert_same_state(cache, read(model, QuestCache(BUDGET)))
        finally:
            subprocess.run(["umount", disk], check=True)

    def test_interrupted_by_hand(self, model, folder, monkeypatch):
        def interrupt(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(folders, "index_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(model, QuestCache(BUDGET)).save(folder)
        assert list(folder.parent.iterdir()) == []


class TestLoadRefuses:
    def test_what_is_not_there(self, model, folder):
        with pytest.raises(FileNotFoundError, match=r"There is no folder .*saved\. Name one that a cache was saved to"):
            QuestCache.load(folder, model)

    @pytest.mark.parametrize("path", [hf_quest.tiny.PATH, hf_quest.tiny.PATH / "config.json"], ids=["model", "file"])
    def test_what_is_something_else(self, model, path):
        with pytest.raises(QuestError, match=r"is no saved cache\. It has no cache\.json"):
            QuestCache.load(path, model)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", "5", '{"format": 1}', '{"format": "other", "version": 1}'])
    def test_an_index_that_is_something_else(self, model, saved, text):
        (saved / "cache.json").write_text(text)
        with pytest.raises(QuestError, match=r"cache\.json is damaged, or was changed"):
            QuestCache.load(saved, model)

    def test_a_newer_format(self, model, saved):
        index = json.loads((saved / "cache.json").read_text())
        (saved / "cache.json").write_text(json.dumps({**index, "version": 2, "sha256": None, "content": {"new": 1}}))
        with pytest.raises(QuestError, match=r"version 2 of the format.*reads 1\. Update hf_quest: pip install"):
            QuestCache.load(saved, model)

    def test_content_that_was_changed_by_hand(self, model, saved):
        text = (saved / "cache.json").read_text()
        (saved / "cache.json").write_text(text.replace('"budget": 48', '"budget": 64'))
        with pytest.raises(QuestError, match=r"cache\.json is damaged, or was changed"):
            QuestCache.load(saved, model)

    @pytest.mark.parametrize("kept", [0, 7, 8, 100, 50_000, -1])
    def test_a_file_that_was_cut_short(self, model, saved, kept):
        path = saved / "layer-002.safetensors"
        size = path.stat().st_size
        os.truncate(path, kept if kept >= 0 else size - 1)
        with pytest.raises(
            QuestError, match=rf"layer-002\.safetensors has [\d,]+ of {size:,} bytes.*nothing of it was"
        ):
            QuestCache.load(saved, model)

    def test_a_file_that_is_missing(self, model, saved):
        (saved / "layer-003.safetensors").unlink()
        with pytest.raises(QuestError, match=r"layer-003\.safetensors is missing: the saved cache is damaged"):
            QuestCache.load(saved, model)

    def test_files_that_were_exchanged(self, model, saved):
        (saved / "layer-002.safetensors").rename(saved / "other")
        (saved / "layer-003.safetensors").rename(saved / "layer-002.safetensors")
        (saved / "other").rename(saved / "layer-003.safetensors")
        with pytest.raises(QuestError, match="is not what was written"):
            QuestCache.load(saved, model)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), is_header=st.booleans(), data=st.data())
    def test_a_flipped_bit_anywhere(self, model, saved, where, bit, is_header, data):
        path = data.draw(st.sampled_from(sorted(saved.iterdir())))
        content = path.read_bytes()
        is_header = is_header and path.suffix == ".safetensors"
        size = 8 + int.from_bytes(content[:8], "little") if is_header else len(content)
        changed = bytearray(content)
        changed[int(where * size)] ^= 1 << bit
        path.write_bytes(changed)
        try:
            is_same = path.suffix == ".json" and as_read(changed) == as_read(content)  # only the space between words
            if is_same:
                assert QuestCache.load(saved, model).get_seq_length() == PROMPT + 4
            else:
                with pytest.raises(QuestError, match=r"damaged|Update hf_quest|was saved by"):
                    QuestCache.load(saved, model)
        finally:
            path.write_bytes(content)

    @pytest.mark.parametrize("bit", range(64))
    def test_a_flipped_bit_in_the_length_of_a_header(self, model, saved, bit):
        path = saved / "layer-001.safetensors"
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(QuestError, match="has another header than was written"):
            QuestCache.load(saved, model)

    def test_another_class_of_caches(self, model, saved):
        with pytest.raises(
            QuestError, match=r"was saved by a QuestCache: use QuestCache\.load, and not H2OCache\.load"
        ):
            H2OCache.load(saved, model)

    def test_a_method_of_ones_own_that_is_not_given_or_another(self, model, folder):
        read(model, MethodCache(ExactTopK(budget=20))).save(folder)
        with pytest.raises(QuestError, match=r"method of one's own, ExactTopK.*method=ExactTopK"):
            MethodCache.load(folder, model)
        with pytest.raises(QuestError, match=r"'budget': 20.* and the method given is .*'budget': 21.*Give the same"):
            MethodCache.load(folder, model, method=ExactTopK(budget=21))

    def test_settings_of_another_version(self, model, saved, monkeypatch):
        def of_another_version(*arguments):
            content = original(*arguments)
            content["settings"]["method"]["settings"]["invented"] = 1
            return content

        original = folders.read
        monkeypatch.setattr(folders, "read", of_another_version)
        with pytest.raises(QuestError, match=r"settings that this version of hf_quest does not know: .*'invented'"):
            QuestCache.load(saved, model)

    def test_tensors_of_another_version(self, model, saved, monkeypatch):
        monkeypatch.setattr(hf_quest.methods.Quest, "beside_pages", lambda *arguments: {"bounds": ((3,), torch.int8)})
        with pytest.raises(QuestError, match=r"A layer was saved as .* this version of hf_quest keeps"):
            QuestCache.load(saved, model)


def as_read(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


class TestAnotherModel:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_hidden_layers": 5}, "num_hidden_layers=4 there and 5 here"),
            ({"num_hidden_layers": 3}, "num_hidden_layers=4 there and 3 here"),
            ({"num_key_value_heads": 4}, "num_key_value_heads=2 there and 4 here"),
            ({"num_attention_heads": 8}, "num_attention_heads=4 there and 8 here"),
            ({"head_dim": 32}, "head_dim=16 there and 32 here"),
            ({"dtype": torch.bfloat16}, "dtype of the model='float32' there and 'bfloat16' here"),
            (
                {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
                "rope_parameters=.*10000.* there and .*5",
            ),
            ({"vocab_size": 300}, "vocab_size=256 there and 300 here"),
            ({"max_position_embeddings": 4096}, "max_position_embeddings=2048 there and 4096 here"),
            ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-06 there and 1e-05 here"),
            ({"seed": 1}, r"other weights in \d+ of 39 places, as in "),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_of_another_config_or_other_weights_is_refused(self, saved, options, message):
        with pytest.raises(QuestError, match=message) as error:
            QuestCache.load(saved, make_model(**options))
        assert "Load the model that read the document, in the same way" in str(error.value)

    def test_of_another_type_or_with_a_window(self, folder):
        cache = read(build("mistral", sliding_window=None), QuestCache(BUDGET))
        mistral = build("mistral", sliding_window=None)
        cache.save(folder, mistral)
        with pytest.raises(QuestError, match="sliding_window=None there and 32 here"):
            QuestCache.load(folder, build("mistral"))
        with pytest.raises(QuestError, match="model_type='mistral' there and 'llama' here"):
            QuestCache.load(folder, make_model())

    def test_of_other_kinds_of_layers(self, folder):
        model = build("gemma3")
        reloaded(read(model, QuestCache(BUDGET)), folder, model)
        with pytest.raises(QuestError, match="layer_types="):
            QuestCache.load(folder, build("gemma3", layer_types=["full_attention", "sliding_attention"] * 2))

    @pytest.mark.parametrize("name", ["model.layers.3.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"])
    def test_with_one_layer_trained_further(self, saved, name):
        other = make_model()
        with torch.no_grad():  # by a product of rank one, as an adapter that was merged
            weight = other.get_submodule(name).weight
            weight += 1e-3 * torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])
        with pytest.raises(QuestError, match=rf"other weights in 1 of 39 places, as in {name}\.weight"):
            QuestCache.load(saved, other)

    def test_with_an_adapter(self, saved):
        other = make_model()
        other.model.layers[0].mlp.adapter = torch.nn.Linear(4, 4)
        with pytest.raises(QuestError, match=r"weights of other names, model\.layers\.0\.mlp\.adapter\.bias"):
            QuestCache.load(saved, other)

    def test_a_value_between_the_samples_is_not_seen(self, model, saved):
        """What it cannot tell."""
        other = make_model()
        with torch.no_grad():
            other.lm_head.weight[0, 1] += 1
        QuestCache.load(saved, other)

    def test_loaded_again_from_files_is_the_same(self, model, saved, tmp_path):
        model.save_pretrained(tmp_path / "model")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="quest")
        assert_goes_on(QuestCache.load(saved, again), read(model, QuestCache(BUDGET)), again)

    def test_that_is_wrapped_by_peft_is_the_same(self, saved):
        class PeftModel(torch.nn.Module):  # as peft names what it wraps
            def __init__(self, model):
                super().__init__()
                self.base_model = torch.nn.Module()
                self.base_model.model = model
                self.config, self.dtype, self.device = model.config, model.dtype, model.device

        QuestCache.load(saved, PeftModel(make_model()))

    def test_that_is_none_is_said(self, saved):
        with pytest.raises(TypeError, match="model is the model that read the document, loaded again, not a str"):
            QuestCache.load(saved, "Qwen/Qwen3-8B")

    def test_that_is_compiled_is_the_same(self, model, saved):
        QuestCache.load(saved, torch.compile(make_model()))

    def test_whose_weights_are_elsewhere_is_not_told(self, saved):
        """Nor is it taken for another one: weights that wait on a disk, or on the CPU, are not at hand."""
        other = make_model()
        other.model.layers[0].mlp.to("meta")
        QuestCache.load(saved, other)

    def test_quantised_in_the_same_way_is_the_same(self, tmp_path):
        torchao = pytest.importorskip("torchao.quantization")
        models = [make_model(dtype=torch.bfloat16) for _ in range(3)]
        for each in models[:2]:
            torchao.quantize_(each, torchao.Int8WeightOnlyConfig())
        cache = read(models[0], QuestCache(BUDGET))
        assert_goes_on(reloaded(cache, tmp_path / "saved", models[1]), cache, models[1])
        with pytest.raises(QuestError, match="other weights in"):
            QuestCache.load(tmp_path / "saved", models[2])

    def test_is_taken_at_ones_word_if_its_layers_are_as_many(self, saved):
        other = make_model(seed=1)
        loaded = QuestCache.load(saved, other, check_model=False)
        assert forward(other, loaded, QUESTION).isfinite().all()
        with pytest.raises(QuestError, match=r"LlamaForCausalLM caches .* in 5 layers, and .*saved holds those of 4"):
            QuestCache.load(saved, make_model(num_hidden_layers=5), check_model=False)
        other = make_model(head_dim=32)
        loaded = QuestCache.load(saved, other, check_model=False)
        with pytest.raises(ValueError, match="it is another model's cache"):
            forward(other, loaded, QUESTION)


def test_layers_go_to_the_devices_where_they_compute(saved):
    """The second half's weights wait elsewhere; its hooks know where it computes."""
    model = make_model()
    for layer in model.model.layers[2:]:
        layer.self_attn._hf_hook = type("Hook", (), {"execution_device": torch.device("meta")})()
    loaded = QuestCache.load(saved, model, check_model=False)
    assert [layer.keys.device.type for layer in loaded.layers] == ["cpu", "cpu", "meta", "meta"]
    assert [layer.padding.device.type for layer in loaded.layers] == ["cpu", "cpu", "meta", "meta"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16, "head_dim": 64}], ids=["PyTorch", "kernels"])
def test_between_a_gpu_and_the_cpu(tmp_path, options):
    models = {device: make_model(**options).to(device) for device in ("cuda", "cpu")}
    ids = tokens(600)
    for name, model in models.items():
        cache = QuestCache(BUDGET)
        with torch.no_grad():
            model(ids.to(model.device), **{CACHE_NAME: cache})
        cache.save(tmp_path / name)
        same = QuestCache.load(tmp_path / name, model)
        question = torch.cat([ids, QUESTION], dim=1).to(model.device)
        answers = [generate(model, question, each) for each in (same, cache)]
        assert torch.equal(*answers)
    across = QuestCache.load(tmp_path / "cpu", models["cuda"])
    here = QuestCache.load(tmp_path / "cpu", models["cpu"])
    for layer, other in zip(across.layers, here.layers, strict=True):
        (tensors, facts), (right, right_facts) = layer.saved(), other.saved()
        assert facts == right_facts
        assert all(torch.equal(tensors[name].cpu(), right[name]) for name in right)
    generate(models["cuda"], torch.cat([ids, QUESTION], dim=1).to("cuda"), across)
