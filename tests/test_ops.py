"""What of the CUDA path can be tested without a GPU: schemas, fakes, checks, and how its build begins and fails."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import cpp_extension

from hf_quest.kernels import build, ops
from hf_quest.reference import GROUPS, Score

B, Hkv, G, D, S, P, K = 2, 3, 4, 128, 16, 10, 4
C, W = 40, 4  # candidates, and the most of a stripe


@pytest.fixture
def fake():
    """Tensors that say they are on a GPU and have no data."""
    with FakeTensorMode():
        yield {
            "keys": torch.empty(B, Hkv, P * S, D, dtype=torch.bfloat16, device="cuda"),
            "values": torch.empty(B, Hkv, P * S, D, dtype=torch.bfloat16, device="cuda"),
            "bounds": torch.empty(B, Hkv, P, 2, D, dtype=torch.int8, device="cuda"),
            "scales": torch.empty(B, Hkv, P, D // 32, dtype=torch.uint8, device="cuda"),
            "new_keys": torch.empty(B, 5, Hkv, D, dtype=torch.bfloat16, device="cuda").transpose(1, 2),
            "new_values": torch.empty(B, 5, Hkv, D, dtype=torch.bfloat16, device="cuda").transpose(1, 2),
            "query": torch.empty(B, 1, Hkv * G, D, dtype=torch.bfloat16, device="cuda").transpose(1, 2),
            "codes": torch.empty(B, Hkv, P * S, D // 4, dtype=torch.uint8, device="cuda"),
            "scores": torch.empty(B, Hkv, 1, P, device="cuda"),
            "page_ids": torch.empty(B, Hkv, 1, K, dtype=torch.int64, device="cuda"),
            "candidates": torch.empty(B, Hkv, 1, 16, W, dtype=torch.int64, device="cuda"),
            "length": torch.empty(1, dtype=torch.int64, device="cuda"),
            "padding": torch.empty(B, dtype=torch.int64, device="cuda"),
            "page_size": S,
        }


ARGUMENTS = {
    "append": ["keys", "values", "bounds", "scales", "new_keys", "new_values", "length", "padding", "page_size"],
    "estimate": ["query", "bounds", "scales", "length", "padding", "page_size"],
    "select": ["scores", "length", "padding", "page_size"],
    "find_candidates": ["scores", "length", "padding", "page_size"],
    "refine": ["query", "bounds", "scales", "codes", "candidates", "length", "padding", "page_size"],
    "chain": ["query", "keys", "values", "bounds", "scales", "length", "padding", "page_size"],
    "attend": ["query", "keys", "values", "page_ids", "length", "padding", "page_size"],
}
OPTIONS = {
    "append": {},
    "estimate": {"scaling": 0.1},
    "select": {"num_selected": K},
    "find_candidates": {"num_candidates": C},
    "refine": {"scaling": 0.1, "num_tokens": 24},
    "attend": {"scaling": 0.1},
    "chain": {"num_selected": K, "scaling": 0.1, "page_ids": None},
}


def call(op, tensors, **changes):
    arguments = {name: tensors[name] for name in ARGUMENTS[op]}
    return getattr(ops, op)(**{**arguments, **OPTIONS[op], **changes})


@pytest.mark.parametrize(
    ("op", "shape", "dtype"),
    [
        ("estimate", (B, Hkv, 1, P), torch.float32),
        ("select", (B, Hkv, 1, K), torch.int64),
        ("find_candidates", (B, Hkv, 1, 16, W), torch.int64),
        ("refine", (B, Hkv, 1, 24), torch.int64),
        ("attend", (B, Hkv * G, 1, D), torch.bfloat16),
        ("chain", (B, Hkv * G, 1, D), torch.bfloat16),
    ],
)
def test_fakes_have_the_shape_of_the_results(fake, op, shape, dtype):
    result = call(op, fake)
    assert (tuple(result.shape), result.dtype, result.device.type) == (shape, dtype, "cuda")
    assert op in ("attend", "chain") or result.is_contiguous()


def test_append_returns_nothing_and_takes_no_bounds(fake):
    assert call("append", fake) is None
    assert call("append", fake, bounds=None, scales=None) is None
    assert call("append", fake, codes=fake["codes"]) is None
    with pytest.raises(ValueError, match="there must be bounds"):
        call("append", fake, bounds=None, scales=None, codes=fake["codes"])


def test_a_chain_by_codes_tells_tokens(fake):
    told = torch.empty(B, Hkv, 1, 24, dtype=torch.int64, device="cuda")
    by_codes = {"codes": fake["codes"], "num_tokens": 24}
    assert call("chain", fake, page_ids=told, **by_codes).shape == (B, Hkv * G, 1, D)
    with pytest.raises(ValueError, match="page_ids must have the shape"):
        call("chain", fake, page_ids=fake["page_ids"], **by_codes)
    with pytest.raises(ValueError, match="4 candidates of 16 tokens do not hold num_tokens=65"):
        call("chain", fake, codes=fake["codes"], num_tokens=K * S + 1)


def test_attend_takes_tokens_for_pages_of_one(fake):
    assert call("attend", fake, page_size=1).shape == (B, Hkv * G, 1, D)
    with pytest.raises(ValueError, match="page_size"):
        call("attend", fake, page_size=1, page_ids=None)


def test_attend_takes_no_pages(fake):
    assert call("attend", fake, page_ids=None).shape == (B, Hkv * G, 1, D)


def test_schemas_declare_what_is_mutated():
    assert {op: mutated(op) for op in [*ARGUMENTS, "prompt_estimate", "prompt_attend"]} == {
        "append": ["keys", "values", "bounds", "scales", "codes"],
        "estimate": [],
        "select": [],
        "find_candidates": [],
        "refine": [],
        "attend": ["counters"],
        "chain": ["page_ids", "pool_keys", "pool_values", "pool_tags", "pool_counts"],
        "prompt_estimate": [],
        "prompt_attend": ["output"],
    }


def mutated(op):
    arguments = getattr(torch.ops.hf_quest, op).default._schema.arguments
    return [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]


@pytest.mark.parametrize("op", ["estimate", "chain"])
@pytest.mark.parametrize(
    "score", [Score(-0.1, True, "max"), Score(1.1, True, "max"), Score(0.5, True, "mean")], ids=str
)
def test_scores_are_checked(fake, op, score):
    with pytest.raises(ValueError, match="score must have a width from 0 to 1 and a group of"):
        call(op, fake, score=score)


@pytest.mark.parametrize(("op", "shape"), [("estimate", (B, Hkv, 1, P)), ("chain", (B, Hkv * G, 1, D))])
def test_scores_of_every_kind_are_taken(fake, op, shape):
    for group in GROUPS:
        assert call(op, fake, score=Score(0.5, True, group)).shape == shape
    assert call("select", fake, keeps_first=True).shape == (B, Hkv, 1, K)


WRONG = {
    "cpu": lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype),
    "dtype": lambda tensor: torch.empty(tensor.shape, dtype=torch.float64, device="cuda"),
    "shape": lambda tensor: torch.empty((7, *tensor.shape), dtype=tensor.dtype, device="cuda"),
    "stride": lambda tensor: torch.empty_strided(
        tensor.shape, [2 * stride for stride in tensor.stride()], dtype=tensor.dtype, device="cuda"
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in ARGUMENTS.items() for name in names[:-1]])
def test_every_argument_is_checked(fake, op, name, wrong):
    if name == "length" and wrong == "stride":
        pytest.skip("one element has no stride")
    with pytest.raises(ValueError, match=r"must|too many values"):
        call(op, fake, **{name: WRONG[wrong](fake[name])})


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("append", {"page_size": 24}, "page_size"),
        ("select", {"num_selected": 0}, "num_selected"),
        ("select", {"num_selected": 2**32}, "1 to 16777216"),
        ("find_candidates", {"num_candidates": 0}, "1 to 16777216"),
        ("refine", {"num_tokens": S - 1}, "num_tokens is 16 or more"),
        ("refine", {"group": "mean"}, "group must be one of"),
        ("refine", {"codes": torch.uint8}, "codes of .2, 4. bits, not 8"),
        ("chain", {"codes": torch.uint8, "num_tokens": 24}, "codes of .2, 4. bits, not 8"),
        ("attend", {"query": (B, Hkv * G + 1, 1, D)}, "heads"),
        ("attend", {"query": (B, Hkv * 33, 1, D)}, "heads"),
        ("attend", {"query": (B, Hkv * G, 2, D)}, "one query per row"),
        ("estimate", {"bounds": (B, Hkv, P, 2, 80), "query": (B, Hkv * G, 1, 80)}, "head dim of 80"),
        ("append", {"new_keys": (B, Hkv, P * S + 1, D), "new_values": (B, Hkv, P * S + 1, D)}, "capacity"),
        ("attend", {"keys": (B, Hkv, 2**24, D)}, "16777216 slots"),
    ],
)
def test_what_the_kernels_do_not_serve_is_said(fake, op, changes, message):
    changes = {
        name: torch.empty(value, dtype=torch.bfloat16, device="cuda") if isinstance(value, tuple) else value
        for name, value in changes.items()
    }
    if "codes" in changes:  # of 8 bits
        changes["codes"] = torch.empty(B, Hkv, P * S, D, dtype=changes["codes"], device="cuda")
    with pytest.raises(ValueError, match=message):
        call(op, fake, **changes)


@pytest.mark.parametrize("op", ["append", "chain"])
@pytest.mark.parametrize("shape", [(B, Hkv, S, D // 4), (B, Hkv, P * S, D // 4 + 1), (B, Hkv, P * S - 1, D // 4)])
def test_codes_are_those_of_all_slots(fake, op, shape):
    options = {} if op == "append" else {"num_tokens": 24}
    with pytest.raises(ValueError, match="codes must"):
        call(op, fake, codes=torch.empty(shape, dtype=torch.uint8, device="cuda"), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_idx": 3}, "those of 3 layers, and layer_idx is 3"),
        ({"layer_idx": -1}, "layer_idx is -1"),
        ({"new_values": None}, "a key and a value, or neither"),
        ({"new_keys": None}, "a key and a value, or neither"),
        ({"num_selected": 2**32}, "1 to 16777216"),
        ({"num_selected": -1}, "1 to 16777216"),
        ({"sinks": torch.float32}, "sinks must"),
    ],
    ids=str,
)
def test_a_step_that_finds_its_storage_is_checked(fake, changes, message):
    def step(**changes):
        new = {
            name: torch.empty(B, Hkv, 1, D, dtype=torch.bfloat16, device="cuda") for name in ("new_keys", "new_values")
        }
        where = {name: fake[name] for name in ("query", "length", "padding", "page_size")}
        addresses = torch.empty(3, ops.NUM_ADDRESSES, dtype=torch.int64, device="cuda")
        of_layer = {"layer_idx": 2, "num_kv_heads": Hkv, "num_selected": K, "scaling": 0.1}
        return ops.decode(**new | where | {"addresses": addresses} | of_layer | changes)

    if "sinks" in changes:
        changes = {"sinks": torch.empty(Hkv * G, dtype=changes["sinks"], device="cuda")}
    assert step().shape == fake["query"].shape
    with pytest.raises(ValueError, match=message):
        step(**changes)


PROMPT = {"query": (8, 256, 128), "keys": (2, 512, 128), "values": (2, 512, 128), "output": (256, 8, 128)}


def prompt(**changes):
    """Arguments of the operators for prompts: two segments from position 256 on, each of which attends 3 blocks."""
    shapes = PROMPT | {name: value for name, value in changes.items() if isinstance(value, tuple)}
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="cuda") for name, shape in shapes.items()}
    block_ids = torch.empty(2, 2, 3, dtype=torch.int64, device="cuda")
    settings = {"first_position": 256, "segment_size": 128, "block_size": 16, "sample_stride": 4}
    arguments = {**tensors, "block_ids": block_ids, **settings, "sinks": None}
    return arguments | {name: value for name, value in changes.items() if not isinstance(value, tuple)}


def estimate_prompt(query, keys, first_position, segment_size, sample_stride, block_size, **others):
    return ops.prompt_estimate(query, keys, first_position, segment_size, sample_stride, block_size, 0.1)


def attend_prompt(query, keys, values, block_ids, output, first_position, segment_size, block_size, sinks, **others):
    place = (first_position, segment_size, block_size)
    return ops.prompt_attend(query, keys, values, block_ids, output, *place, 0.1, sinks)


@pytest.mark.usefixtures("fake")
class TestPrompts:
    @pytest.mark.parametrize("run", [estimate_prompt, attend_prompt])
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"query": (8, 256, 64)}, "query must"),
            ({"keys": (2, 512, 64)}, "keys must"),
            ({"query": (7, 256, 128)}, "1 to 32 heads"),
            ({"query": (8, 200, 128)}, "not segments of 128"),
            ({"segment_size": 64}, "not segments of 64"),
            ({"block_size": 8}, "blocks of 8 tokens"),
            ({"first_position": 192}, "first position of 192"),
            ({"keys": (2, 500, 128), "values": (2, 500, 128)}, "500 keys"),
        ],
    )
    def test_what_their_kernels_do_not_serve_is_said(self, run, changes, message):
        with pytest.raises(ValueError, match=message):
            run(**prompt(**changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sample_stride": 3}, "sample_stride=3"),
            ({"query": (8, 128, 128), "first_position": 0}, "no blocks before the first"),
            ({"query": (64, 256, 128), "sample_stride": 1}, "4096 queries"),
        ],
    )
    def test_what_the_estimate_does_not_serve_is_said(self, changes, message):
        with pytest.raises(ValueError, match=message):
            estimate_prompt(**prompt(**changes))

    @pytest.mark.parametrize("name", ["values", "output"])
    def test_what_attention_does_not_serve_is_said(self, name):
        with pytest.raises(ValueError, match=f"{name} must"):
            attend_prompt(**prompt(**{name: (2, 256, 64)}))
        with pytest.raises(ValueError, match="block_ids must"):
            attend_prompt(**prompt() | {"block_ids": torch.empty(2, 3, 3, dtype=torch.int64, device="cuda")})

    def test_shapes(self):
        assert estimate_prompt(**prompt()).shape == (2, 2, (256 + 128) // 16)
        assert attend_prompt(**prompt()) is None


def test_rows_off_16_bytes_are_refused(fake):
    strides = (Hkv * G * (D + 4), D + 4, D + 4, 1)
    query = torch.empty_strided((B, Hkv * G, 1, D), strides, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="16 bytes"):
        call("attend", fake, query=query)


@pytest.mark.parametrize(
    ("keys", "page_size", "reason"),
    [
        ({"dtype": torch.float32}, 16, "float32"),
        ({"head_dim": 80}, 16, "head dim of 80"),
        ({}, 128, "page_size=128"),
        ({"num_slots": 2**24}, 16, "16777216 slots"),
    ],
)
def test_a_layer_that_is_not_served_is_announced(keys, page_size, reason):
    with FakeTensorMode():
        shape = (1, 1, keys.get("num_slots", 1), keys.get("head_dim", D))
        keys = torch.empty(shape, dtype=keys.get("dtype", torch.bfloat16), device="cuda")
    with pytest.warns(UserWarning, match=reason):
        assert not ops.serves(keys, keys, page_size)


def test_a_layer_on_the_cpu_is_not_served_and_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keys = torch.empty(1, 1, 1, D, dtype=torch.bfloat16)
        assert not ops.serves(keys, keys, S)


class TestBuild:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (9, 0))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
        build.load.cache_clear()
        yield
        build.load.cache_clear()

    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []

        def built(name, **options):
            calls.append((name, options))
            (Path(options["build_directory"]) / f"{name}.so").write_text("a library")

        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/toolkit")
        monkeypatch.setattr("torch.utils.cpp_extension.load", built)
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
        return calls

    def test_without_nvcc_one_warning_says_why_and_what_to_do(self, monkeypatch):
        monkeypatch.setattr(build, "find_cuda_from_pip", lambda: None)
        with pytest.warns(UserWarning, match=r"(?s)no nvcc.*pip install"):
            assert not build.load()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not build.load()

    def test_an_older_gpu_is_refused(self, monkeypatch, calls):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (7, 5))
        with pytest.warns(UserWarning, match="compute capability 8"):
            assert not build.load()
        assert not calls

    def test_a_failed_build_is_one_warning(self, monkeypatch, calls):
        def fail(name, **options):
            raise RuntimeError("Error building extension: no compiler")

        monkeypatch.setattr("torch.utils.cpp_extension.load", fail)
        with pytest.warns(UserWarning, match="no compiler"):
            assert not build.load()

    @pytest.mark.parametrize(
        "line",
        [
            "CUDAContextLight.h:10:10: fatal error: cusparse.h: No such file or directory",
            "chain.cu(12): error: identifier is undefined",
            "/usr/bin/ld: cannot find -lcudart: No such file or directory",
            "nvcc fatal   : Unsupported gpu architecture 'compute_120'",
        ],
    )
    def test_the_reason_is_what_a_compiler_complains_of(self, line):
        output = "\n".join(("Error building extension: [1/9] c++ -c", line, 200 * "[2/9] nvcc -O3 ", "ninja: stopped."))
        assert build.complaints_of(output) == line

    def test_every_kernel_is_built_once_for_the_gpu_at_hand(self, calls, capsys):
        assert build.load()
        assert build.load()
        ((name, options),) = calls
        assert "sm90" in name
        assert [flag for flag in options["extra_cuda_cflags"] if "arch" in flag] == [
            "-gencode=arch=compute_90a,code=sm_90a"
        ]
        sources = {Path(source).name for source in options["sources"]}
        stages = {"append.cu", "attend.cu", "chain.cu", "chain_by_codes.cu", "estimate.cu", "refine.cu", "select.cu"}
        assert sources == {
            *stages,
            "chain_by_codes_pooled.cu",
            "prompt_attend.cu",
            "prompt_estimate.cu",
            "bindings.cpp",
        }
        assert re.fullmatch(
            r"hf_quest builds its CUDA kernels for sm_90a in \S+, once ... done in \d+ s\n", capsys.readouterr().err
        )

    def test_a_built_extension_is_found_and_nothing_said(self, calls, capsys):
        build.load()
        build.load.cache_clear()
        capsys.readouterr()
        assert build.load()
        assert len(calls) == 1
        assert capsys.readouterr().err == ""

    def test_other_sources_are_built_beside(self, calls, monkeypatch, tmp_path):
        build.load()
        build.load.cache_clear()
        sources = shutil.copytree(build.find_sources(), tmp_path / "csrc")
        (sources / "common.cuh").write_text((sources / "common.cuh").read_text() + "// newer\n")
        monkeypatch.setattr(build, "find_sources", lambda: sources)
        assert build.load()
        (_, first), (_, second) = calls
        assert first["build_directory"] != second["build_directory"]

    @pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja, with which PyTorch builds")
    def test_what_a_stopped_build_left_is_in_nobodys_way(self, monkeypatch, tmp_path):
        sources = tmp_path / "csrc"
        sources.mkdir()
        (sources / "bindings.cpp").write_text("int hf_quest_of_this_test() { return 7; }\n")
        monkeypatch.setattr(build, "find_sources", lambda: sources)
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/toolkit")
        loads = []
        monkeypatch.setattr(torch.ops, "load_library", loads.append)
        assert build.load()
        library = loads[-1]
        assert ctypes.CDLL(str(library))._Z21hf_quest_of_this_testv() == 7
        whole = library.read_bytes()
        for content in (whole[: len(whole) // 2], b""):
            library.unlink()
            library.write_bytes(content)
            (library.parent / "lock").touch()
            build.load.cache_clear()
            torch.utils.cpp_extension.JIT_EXTENSION_VERSIONER.entries.clear()  # as in another process
            assert build.load()
            assert not (library.parent / "lock").exists()
            assert library.read_bytes() == whole

    @pytest.fixture
    def from_pip(self, monkeypatch, tmp_path):
        folder = tmp_path / "site" / "nvidia" / "cu13"
        (folder / "lib").mkdir(parents=True)
        (folder / "lib" / "libcudart.so.13").touch()
        monkeypatch.syspath_prepend(tmp_path / "site")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        return folder

    def test_a_toolkit_from_pip_is_used_where_there_is_no_other(self, monkeypatch, calls, from_pip):
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
        with pytest.warns(UserWarning, match="no nvcc"):
            assert not build.load()
        build.load.cache_clear()
        (from_pip / "bin").mkdir()
        (from_pip / "bin" / "nvcc").touch()
        assert build.load()
        assert str(from_pip) == torch.utils.cpp_extension.CUDA_HOME

    def test_what_a_toolkit_lacks_is_taken_from_pip(self, calls, from_pip):
        assert build.load()
        assert torch.utils.cpp_extension.CUDA_HOME == "/toolkit"
        ((_, options),) = calls
        assert f"-idirafter{from_pip / 'include'}" in options["extra_cflags"]
        link = Path(options["build_directory"]) / "libcudart.so"
        assert link.resolve() == from_pip / "lib" / "libcudart.so.13"


# All of them, which takes a few minutes on two cores, unless the environment asks for fewer.
ARCHITECTURES = os.environ.get("HF_QUEST_ARCHITECTURES", "80 86 89 90a 100 120").split()


def what_nvcc_says(source, architecture, folder, known):
    """Of a source that it compiles. It is asked once about the same text: `known` is what pytest remembers."""
    flags = [
        "-O3",
        "-std=c++20",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-Xptxas=-v",
        "-c",  # and not what runs on a GPU alone: the host's compiler reads all of it, too
    ]
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    asked, headers = hashlib.sha256(repr((flags, version)).encode()), sorted(source.parent.glob("*.*h"))
    for file in (source, *headers):
        asked.update(file.name.encode() + b"\0" + file.read_bytes())
    place = f"hf_quest/nvcc/{source.stem}-{architecture}"
    if (answer := known.get(place, None)) and answer["asked"] == asked.hexdigest():
        return answer["said"]
    result = subprocess.run(["nvcc", *flags, "-o", folder / "kernels", source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    known.set(place, {"asked": asked.hexdigest(), "said": result.stderr})
    return result.stderr


@pytest.mark.csrc
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stage", sorted(path.stem for path in build.find_sources().glob("*.cu")))
def test_kernels_compile_and_keep_to_their_registers(stage, architecture, tmp_path, request):
    said = what_nvcc_says(build.find_sources() / f"{stage}.cu", architecture, tmp_path, request.config.cache)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert stacks
    assert set(stacks) == {("0", "0", "0")}


# Types of CUDA's libraries that PyTorch's headers name and bindings.cpp uses nothing of. They stand in for headers
# that a toolkit without those libraries, and a PyTorch built for CPUs, lack.
STAND_IN_HEADERS = {
    "cublas_v2.h": "typedef struct cublasContext* cublasHandle_t; typedef int cublasStatus_t;",
    "cublasLt.h": "typedef struct cublasLtContext* cublasLtHandle_t;",
    "cusparse.h": "typedef struct cusparseContext* cusparseHandle_t; typedef int cusparseStatus_t;",
    "cusolverDn.h": "typedef struct cusolverDnContext* cusolverDnHandle_t;",
    "cusolver_common.h": "typedef int cusolverStatus_t;",
    "c10/cuda/impl/cuda_cmake_macros.h": "",
}


@pytest.mark.csrc
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, which knows where CUDA's headers are")
def test_bindings_compile(tmp_path):
    for name, text in STAND_IN_HEADERS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    folders = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    command = ["nvcc", "-std=c++20", "-x", "c++", "-DUSE_CUDA", "-Xcompiler", "-fsyntax-only", "-c"]
    command += [f"-I{folder}" for folder in folders] + ["-isystem", str(tmp_path)]
    source = build.find_sources() / "bindings.cpp"
    result = subprocess.run([*command, source], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
