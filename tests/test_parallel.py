"""A model over several processes or devices writes what it writes on one."""

import copy
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from small_llama import ANSWER, BUDGET, PROMPT, generate, make_model, on_any_device, tokens
from torch._dynamo.utils import counters
from transformers import BitsAndBytesConfig, Gemma3ForCausalLM, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from hf_quest import QuestCache, QuestError, tiny

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
THREE_KV_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}


def padded_batch():
    """Two rows of tokens, the second with left padding, and their mask."""
    input_ids = tokens(PROMPT, batch_size=2)
    input_ids[1, :37] = 0
    return input_ids, (input_ids > 0).long()


def run_example(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.syspath_prepend(EXAMPLES)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*past_key_values", FutureWarning)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


class TestTensorParallel:
    def test_two_processes_write_what_one_does(self, tmp_path):
        """In one start of both: small and covering budgets, assisted decoding, heads that do not split, the example."""
        make_model().save_pretrained(tmp_path / "even")
        make_model(**THREE_KV_HEADS).save_pretrained(tmp_path / "odd")
        script = ROOT / "tests" / "tensor_parallel_ranks.py"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLES), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }
        result = subprocess.run([*command, tmp_path], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "capture does not record" not in result.stderr  # which it says on GPUs alone
        assert result.stdout.strip().startswith("48213")
        ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
        input_ids, attention_mask = padded_batch()
        expected = {
            f"budget {budget}": generate(
                make_model(), input_ids, QuestCache(budget=budget), attention_mask=attention_mask
            )
            for budget in (BUDGET, 2048)
        }
        lookup = tokens(PROMPT // 2).repeat(1, 2)
        expected["assisted"] = generate(make_model(), lookup, QuestCache(budget=BUDGET), prompt_lookup_num_tokens=4)
        assert not torch.equal(expected[f"budget {BUDGET}"], expected["budget 2048"])
        for rank in ranks:
            assert rank["kv_heads"] == [1, 1, 1, 1]
            assert "Start torchrun with one of [1, 3] as --nproc-per-node" in rank["error"]
            for name, output in expected.items():
                assert torch.equal(rank[name], output), name

    def test_no_token_is_stored_where_heads_do_not_split(self):
        model, cache = make_model(**THREE_KV_HEADS), QuestCache(budget=BUDGET)
        model.config.distributed_config = DistributedConfig(tp_size=2)
        with pytest.raises(QuestError, match="the 3 of this model do not split evenly over 2 processes"):
            generate(model, tokens(PROMPT), cache)
        assert cache.get_seq_length() == 0


class TestDevices:
    """The layers from the third on get a copy of the mask, as layers on a second device do."""

    @pytest.mark.parametrize(
        ("model_class", "options"),
        [
            (LlamaForCausalLM, {}),
            (Gemma3ForCausalLM, {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ],
        ids=["llama", "gemma3"],
    )
    @pytest.mark.parametrize("compile", [True, False])
    def test_layers_that_get_a_copy_of_the_mask(self, model_class, options, compile):
        model = make_model(model_class, **options)
        input_ids, attention_mask = padded_batch()
        expected_cache, cache = (QuestCache(BUDGET, dense_layers=0, compile=compile) for _ in range(2))
        expected = generate(model, input_ids, expected_cache, attention_mask=attention_mask)
        cache.shared.rows.on(torch.device("meta"))  # stands for the second device
        num_copies = 0

        def copy_mask(layer, args, kwargs):
            nonlocal num_copies
            mask = kwargs.get("attention_mask")
            if mask is not None:
                num_copies += 1
                kwargs = {**kwargs, "attention_mask": mask.to(mask.device, copy=True)}
            return args, kwargs

        for layer in model.model.layers[2:]:
            layer.register_forward_pre_hook(copy_mask, with_kwargs=True)
        output = generate(model, input_ids, cache, attention_mask=attention_mask)
        assert num_copies >= 2
        assert len(cache.shared.rows.devices) > 1
        assert torch.equal(output, expected)
        assert cache.tokens_attended == expected_cache.tokens_attended
        for layer in cache.layers:
            assert layer.left_padding == ((0, 37) if layer.selects else layer.left_padding)

    @pytest.mark.parametrize("num_devices", [1, 2])
    def test_a_step_on_several_devices_is_not_compiled(self, num_devices):
        model = make_model(num_hidden_layers=2)
        model.hf_device_map = {"model": 0, "lm_head": num_devices - 1}
        torch._dynamo.reset()
        counters.clear()
        options = {"max_new_tokens": 3, "compile_config": on_any_device(backend="eager", mode=None)}
        generate(model, tokens(PROMPT), QuestCache(BUDGET), **options)
        assert counters["stats"]["unique_graphs"] == (num_devices == 1)

    def test_offloaded_weights(self, tmp_path):
        accelerate = pytest.importorskip("accelerate")
        model = make_model()
        input_ids, attention_mask = padded_batch()
        expected = generate(model, input_ids, QuestCache(BUDGET), attention_mask=attention_mask)
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        device_map |= {f"model.layers.{idx}": "cpu" if idx < 2 else "disk" for idx in range(4)}
        offloaded = accelerate.dispatch_model(
            copy.deepcopy(model), device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
        )
        assert offloaded.model.layers[3].mlp.up_proj.weight.is_meta
        output = generate(offloaded, input_ids, QuestCache(BUDGET), attention_mask=attention_mask)
        assert torch.equal(output, expected)

    def test_the_example(self, monkeypatch, capsys):
        pytest.importorskip("accelerate")
        run_example("device_map.py", monkeypatch)
        assert capsys.readouterr().out.strip().startswith("48213")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
class TestTwoGPUs:
    @pytest.mark.parametrize("compile", [True, False])
    @pytest.mark.parametrize("budget", [BUDGET, 2048])
    def test_each_layers_cache_lives_where_the_layer_runs(self, budget, compile):
        accelerate = pytest.importorskip("accelerate")
        model = make_model()
        input_ids, attention_mask = padded_batch()
        expected = generate(model, input_ids, QuestCache(budget), attention_mask=attention_mask)
        device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
        device_map |= {f"model.layers.{idx}": idx // 2 for idx in range(4)}
        model = accelerate.dispatch_model(model, device_map)
        cache = QuestCache(budget, compile=compile)
        output = generate(model, input_ids.cuda(), cache, attention_mask=attention_mask.cuda())
        assert torch.equal(output.cpu(), expected)
        assert [layer.keys.device.index for layer in cache.layers] == [0, 0, 1, 1]
        assert [layer.padding.device.index for layer in cache.layers] == [0, 0, 1, 1]
        assert output.shape[1] == PROMPT + ANSWER


class TestInt4:
    def test_the_example(self, monkeypatch, capsys):
        pytest.importorskip("torchao")
        run_example("int4.py", monkeypatch)
        assert capsys.readouterr().out.strip().startswith("48213")

    @pytest.mark.parametrize("compile", [True, False])
    def test_bitsandbytes(self, compile, monkeypatch):
        pytest.importorskip("bitsandbytes")
        monkeypatch.syspath_prepend(EXAMPLES)
        from task import HAY, NEEDLE, QUESTION

        weights = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        model, tokenizer = tiny.load(attn_implementation="quest", quantization_config=weights, device_map="cpu")
        assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
        input_ids = tokenizer(f"{HAY}\n{NEEDLE}\n{HAY}\n{QUESTION}", return_tensors="pt").input_ids
        config = on_any_device(backend="eager", mode=None) if compile else None
        output = generate(model, input_ids, QuestCache(budget=256), max_new_tokens=6, compile_config=config)
        assert tokenizer.decode(output[0, input_ids.shape[1] :]).strip().startswith("48213")
