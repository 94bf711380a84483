"""benchmarks/profile_step.py without a GPU: steps, kinds and gaps of made-up events, their table and picture."""

import json
import re
import sys

import profile_step
import pytest
import tables
from pages import ROOT
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

CHOICE = (
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>, unsigned int, "
    "long, 4, 4> >(at::native::ReduceOp<float, at::native::ArgMaxOps<float>, unsigned int, long, 4, 4>)"
)
CHAIN = "void hf_quest::(anonymous namespace)::chain_kernel<__nv_bfloat16, 128>(hf_quest::AttendParams)"
PRODUCT = "nvjet_tst_64x8_64x16_4x1_v_bz_TNT"
NORM = "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3"
COPY = "Memcpy DtoD (Device -> Device)"
NAMES = {
    COPY: "copies",
    "Memset (Device)": "copies",
    PRODUCT: "products with weights",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16>": (
        "products with weights"
    ),
    "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16>": "products with weights",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas": "products with weights",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "products with weights",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "products with weights",
    "triton_tem_fused_mm_7": "products with weights",
    "triton_red_fused_mm_t_0": "products with weights",
    "triton_per_fused__to_copy_addmm_mul_silu_5": "products with weights",
    NORM: "elementwise and norms",
    "triton_poi_fused_bmm_cat_cos_sin_1": "elementwise and norms",
    "triton_poi_fused_comma_2": "elementwise and norms",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<long>>": "elementwise and norms",
    CHOICE: "sampling and the rest",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float>": "sampling and the rest",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>": "sampling and the rest",
    "a kernel that nobody knows": "sampling and the rest",
    "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)": "attention",
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_kernels_are_of_a_kind_by_their_names(name, kind):
    assert profile_step.kind_of(name) == kind


def test_every_kernel_of_csrc_is_attention():
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc").glob("*.cu*")))
    kernels = re.findall(r"__global__[^{;]*?\b(\w+_kernel)\(", sources)
    assert len(kernels) == sources.count("__global__")
    for kernel in kernels:
        assert profile_step.kind_of(f"void hf_quest::(anonymous namespace)::{kernel}<float>") == "attention"


def step(start, wait):
    """Events of 1 ms: a choice, 10 µs of a copy that another runs beside, a wait, a norm, and a short gap."""
    after = start + 40 + wait
    return [
        (CHOICE, start, 20),
        (COPY, start + 20, 10),
        (CHAIN, start + 25, 15),  # of which 5 µs are the copy's
        (NORM, after, 50),
        (PRODUCT, after + 53, start + 1000 - after - 53),
    ]


def test_a_step_is_split_into_kinds_and_gaps():
    events = [*step(0, 500), *step(1000, 100), *step(2000, 300), *step(3000, 0)]
    found = profile_step.split(events[::-1], num_tokens=4, num_steps=2)
    assert found["span_ms"] == 1
    assert found["gaps_ms"] == {"short": 0.003, "longer": 0.2}
    assert found["kinds_ms"] == {
        "products with weights": 0.707,
        "attention": 0.01,
        "elementwise and norms": 0.05,
        "sampling and the rest": 0.02,
        "copies": 0.01,
    }
    assert (found["busy_ms"], found["waiting_ms"]) == (0.797, 0.203)
    longest, *_ = found["kernels"]
    assert longest == {"name": PRODUCT, "kind": "products with weights", "calls": 1, "us": 707}
    (chain,) = (kernel for kernel in found["kernels"] if kernel["name"].startswith("chain_kernel"))
    assert chain["us"] == 15


def test_what_runs_over_the_ends_counts_within_them_only():
    events = [(PRODUCT, -50, 60), (CHOICE, 0, 5), (CHAIN, 5, 90), (PRODUCT, 90, 100), (CHOICE, 100, 5)]
    found = profile_step.split(events, num_tokens=2, num_steps=1)
    assert found["waiting_ms"] == 0
    assert (found["span_ms"], found["busy_ms"]) == (0.1, 0.1)
    assert found["kinds_ms"]["products with weights"] == 0.015  # 10 µs at the beginning, 5 beyond the attention
    assert found["kinds_ms"]["attention"] == 0.085


@pytest.mark.parametrize("num_tokens", [2, 4, 6])
def test_steps_that_are_not_those_of_the_answer_are_not_split(num_tokens):
    events = [*step(0, 0), *step(1000, 0), *step(2000, 0)]
    with pytest.raises(ValueError, match=f"Of {num_tokens} choices of a token 3 were profiled"):
        profile_step.split(events, num_tokens, 1)


def test_events_are_work_of_the_gpu():
    def event(name, device_type, **options):
        return FunctionEvent(1, name, 0, 2.5, 4.0, device_type=device_type, **options)

    events = [
        event("cudaGraphLaunch", DeviceType.CPU),
        event("a span of the user's", DeviceType.CUDA, is_user_annotation=True),
        event("Stream Wait Event", DeviceType.CUDA),
        event("Context Sync", DeviceType.CUDA),
        event(NORM, DeviceType.CUDA),
    ]
    assert profile_step.on_gpu(events) == [(NORM, 2.5, 1.5)]


def made_up(wait):
    """A report of two ways at two contexts, and one that had no room."""
    results = []
    for context in (1024, 131072):
        for way in ("quest", "quest-codes-ahead"):
            events = [*step(0, 0), *step(1000, wait), *step(2000, 0)]
            case = {"shape": "llama-3.1-8b", "batch_size": 1, "context": context}
            case |= {"way": profile_step.WAYS[way].title, "ms_per_token": 0.9, "weights_floor_ms": 0.6}
            results.append(case | profile_step.split(events, num_tokens=3, num_steps=2))
    results.append({**case, "way": "QuestCache, eager", "error": "CUDA out of memory."})
    del results[-1]["ms_per_token"], results[-1]["weights_floor_ms"]
    environment = {"processor": "a GPU", "commit": "abc"}
    return {
        "environment": environment,
        "budget": 2048,
        "steps": 2,
        "copy_bytes_per_second": 4.28e12,
        "results": results,
    }


def draw(monkeypatch, folder, *options):
    """Run the script on results that are there; the text of its page, and what its picture says."""
    output = folder / "profile_step.json"
    output.write_text(json.dumps(made_up(100)))
    monkeypatch.setattr(sys, "argv", ["profile_step.py", "--only-draw", "--output", str(output), *options])
    profile_step.main()
    assert json.loads(output.read_text()) == made_up(100)
    svg = output.with_suffix(".svg").read_text()
    assert svg.count("<svg") == 1
    return output.with_suffix(".md").read_text(), re.findall(r">([^<>]+)</text>", svg)


def test_results_make_a_table_and_a_picture(monkeypatch, tmp_path):
    page, texts = draw(monkeypatch, tmp_path)
    cells = "0.90 | 1.00 | 0.95 | 0.86 | 0.01 | 0.05 | 0.02 | 0.01 | 0.60 | 0.00 | 0.05"
    assert f"| llama-3.1-8b | 1 | 131,072 | QuestCache | {cells} |" in page
    assert f"| llama-3.1-8b | 1 | 131,072 | QuestCache, eager |{' - |' * 11}" in page
    assert f"| `{PRODUCT}` | products with weights | 1 | 857.0 | 0.86 |" in page
    assert page.count("\n## ") == 4
    assert "A large copy reaches 4.28 TB/s" in page
    assert {*profile_step.KINDS, *(title for title, _ in profile_step.GAPS.values())} <= set(texts)
    assert [text for text in texts if "(0.90)" in text] == ["1.00 (0.90)"] * 4
    assert not [text for text in texts if "before" in text or text == "after"]


def test_bars_of_an_earlier_result_stand_beside(monkeypatch, tmp_path):
    earlier = made_up(400)
    del earlier["results"][0]
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(earlier))
    page, texts = draw(monkeypatch, tmp_path, "--before", str(path))
    assert page.startswith("# Where the milliseconds of a token go\n")
    assert [sum(text.endswith(label) for text in texts) for label in ("tokens, before", "after")] == [3, 3]
    assert texts.count("0.86") == 4
    assert texts.count("0.71") == 3  # of the earlier products


def test_results_are_found_for_the_docs():
    assert tables.KINDS["profile_step"] is tables.step_table


def test_ways_choose_each_token_once():
    assert set(profile_step.DEFAULT_WAYS) <= set(profile_step.GREEDY)
    assert not [name for name in profile_step.GREEDY if "beams" in name or "text" in name]
