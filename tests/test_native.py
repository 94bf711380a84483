"""csrc/cpu_step.cpp, the stages of a decode step on a CPU, against the specification; and what happens without it."""

import ctypes
import re
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_llama import BUDGET, PROMPT, generate, make_model, tokens

from hf_quest import QuestCache, reference
from hf_quest.kernels import build, cpu, native
from hf_quest.reference import DEFAULT, PUBLISHED, Score
from hf_quest.rounding import to_8_bits

PAGE_SIZE = 16
LENGTHS = (1, 15, 16, 17, 31, 1000)
SHAPES = ((1, 2, 3, 64), (2, 3, 1, 80), (1, 1, 6, 128), (2, 1, 4, 256), (1, 2, 5, 16))  # B, Hkv, G, D
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_PADDING = torch.zeros(2, dtype=torch.int64)

needs_compiler = pytest.mark.skipif(native.functions() is None, reason="needs a C++ compiler")
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_length = pytest.mark.parametrize("length", LENGTHS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(shape, length, dtype=torch.float32):
    """Query, keys and values, NaN in the slots that hold no token."""
    torch.manual_seed(length)
    batch_size, num_kv_heads, group_size, head_dim = shape
    slots = (batch_size, num_kv_heads, -(-length // PAGE_SIZE) * PAGE_SIZE + 32, head_dim)
    query = torch.randn(batch_size, num_kv_heads * group_size, 1, head_dim).to(dtype)
    keys, values = (torch.randn(slots).to(dtype) for _ in range(2))
    keys[:, :, length:] = values[:, :, length:] = torch.nan
    return query, keys, values


def in_float64(query, keys, values, ids, length, size):
    """Attention in float64 over what the ids name."""
    batch_size, num_kv_heads, _, head_dim = keys.shape
    grouped = query.double().view(batch_size, num_kv_heads, -1, head_dim)
    output = torch.empty_like(grouped)
    for row in range(batch_size):
        for head in range(num_kv_heads):
            slots = (ids[row, head, 0, :, None] * size + torch.arange(size)).flatten()
            slots = slots[(slots >= 0) & (slots < length)]
            stored = keys[row, head, slots].double(), values[row, head, slots].double()
            weights = (grouped[row, head] @ stored[0].T * head_dim**-0.5).softmax(dim=-1)
            output[row, head] = weights @ stored[1]
    return output.view(query.shape)


def assert_within_the_yardstick(found, query, keys, values, ids, length, size):
    """At most twice the error of the same computation by PyTorch's operators."""
    where, scaling = (length, NO_PADDING[: len(keys)], size), keys.shape[-1] ** -0.5
    exact = in_float64(query, keys, values, ids, length, size)
    error = (found.double() - exact).abs().max()
    in_pytorch = reference.attend(query, keys, values, ids, *where, scaling)
    assert found.dtype == query.dtype
    assert found.shape == in_pytorch.shape
    # Where there is a single token, PyTorch's error may be none: half a unit of the last place is allowed beside it.
    assert error <= 2 * (in_pytorch.double() - exact).abs().max() + torch.finfo(query.dtype).eps / 2


@needs_compiler
@by_dtype
@by_shape
@by_length
def test_attend_is_right_and_reads_what_is_chosen(length, shape, dtype):
    query, keys, values = random(shape, length, dtype)
    num_pages = -(-length // PAGE_SIZE)
    ids = torch.arange(num_pages).repeat(*shape[:2], 1, 1)
    clean = keys.clone(), values.clone()
    if num_pages > 3:
        ids = torch.stack([torch.randperm(num_pages - 1)[:3].sort().values for _ in range(shape[0] * shape[1])])
        ids = torch.cat([ids, torch.full_like(ids[:, :1], num_pages - 1)], dim=1).view(*shape[:2], 1, -1)
        for row in range(shape[0]):
            for head in range(shape[1]):
                is_left_out = ~torch.isin(torch.arange(keys.shape[2]) // PAGE_SIZE, ids[row, head])
                keys[row, head, is_left_out] = values[row, head, is_left_out] = torch.nan
    found = native.attend(query, keys, values, ids, length, PAGE_SIZE, shape[-1] ** -0.5)
    assert_within_the_yardstick(found, query, *clean, ids, length, PAGE_SIZE)
    padded = torch.cat([ids, ids.new_full((*ids.shape[:3], 2), -1)], dim=-1)
    assert torch.equal(native.attend(query, keys, values, padded, length, PAGE_SIZE, shape[-1] ** -0.5), found)


@needs_compiler
@by_dtype
@by_shape
@by_length
def test_attention_to_everything_and_to_all_tokens_one_by_one_is_dense(length, shape, dtype):
    query, keys, values = random(shape, length, dtype)
    scaling = shape[-1] ** -0.5
    one_by_one = torch.arange(length).repeat(*shape[:2], 1, 1)
    everything = native.attend(query, keys[:, :, :length], values[:, :, :length], None, length, 1, scaling)
    assert_within_the_yardstick(everything, query, keys, values, one_by_one, length, 1)
    assert torch.equal(native.attend(query, keys, values, one_by_one, length, 1, scaling), everything)


@needs_compiler
def test_values_may_have_another_head_dim_and_any_strides():
    torch.manual_seed(0)
    query, keys = torch.randn(2, 6, 1, 96), torch.randn(2, 50, 3, 96).transpose(1, 2)
    values = torch.randn(2, 50, 3, 2, 48).transpose(1, 2)[..., 1, :]
    assert native.serves(query, keys, values)
    found = native.attend(query, keys, values, None, 50, 1, 0.1)
    grouped = query.view(2, 3, 2, 96)
    expected = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, scale=0.1).view(2, 6, 1, 48)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # sums in another order


@needs_compiler
@pytest.mark.parametrize("key", [-3e38, -1e37], ids=["infinite", "finite"])
def test_logits_lower_than_all_others(key):
    """-inf, which attends nothing, and -1.6e38, which attends all alike."""
    query, keys = torch.ones(1, 1, 1, 16), torch.full((1, 1, 3, 16), key)
    values = torch.arange(48.0).view(1, 1, 3, 16)
    output = native.attend(query, keys, values, None, 3, 1, 1.0)
    expected = F.scaled_dot_product_attention(query, keys, values, scale=1.0)
    torch.testing.assert_close(output, expected.nan_to_num(0.0))


def test_no_rows_are_none():
    query, keys = torch.empty(0, 4, 1, 16), torch.empty(0, 2, 5, 16)
    assert native.attend(query, keys, keys, None, 5, 1, 1.0).shape == (0, 4, 1, 16)


def test_what_is_not_finite_is_what_it_is_in_the_reference():
    query, keys, values = random((1, 1, 2, 16), 40)
    ids = torch.arange(3).view(1, 1, 1, 3)
    everything = (ids, 40, NO_PADDING[:1], PAGE_SIZE, 1.0)
    query[0, 0], query[0, 1] = 1.0, -1.0
    for value in (torch.inf, -torch.inf, torch.nan):
        keys[0, 0, 7] = value
        found = native.attend(query, keys, values, ids, 40, PAGE_SIZE, 1.0)
        expected = reference.attend(query, keys, values, *everything)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert found.isnan().any()


@needs_compiler
@by_shape
@pytest.mark.parametrize("dtype", [torch.int8, *DTYPES], ids=str)
@pytest.mark.parametrize("score", [DEFAULT, PUBLISHED, Score(0.0, False, "max")], ids=str)
def test_estimate_is_that_of_the_reference(score, dtype, shape):
    for num_pages in (1, 2, 63, 300):
        torch.manual_seed(num_pages)
        query = torch.randn(shape[0], shape[1] * shape[2], 1, shape[3])
        bounds = torch.randn(*shape[:2], num_pages + 3, 2, shape[3]).sort(dim=-2).values * 5
        bounds, scales = to_8_bits(bounds) if dtype == torch.int8 else (bounds.to(dtype), None)
        of_pages = [None if each is None else each[:, :, :num_pages] for each in (bounds, scales)]
        expected = reference.estimate(query, *of_pages, 0.125, score)
        found = native.estimate(query, bounds, scales, num_pages, 0.125, score.width)
        # The same sums of 32 to 512 products in float32, in another order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("keeps_first", [True, False])
@pytest.mark.parametrize("num_pages", [1, 2, 3, 15, 16, 17, 31, 1000])
def test_select_is_that_of_the_reference_bit_for_bit(num_pages, keeps_first):
    torch.manual_seed(num_pages)
    scores = torch.randn(2, 3, 1, num_pages)
    scores[1] = scores[1].round()  # most are equal, and some 0.0 and -0.0
    scores[1, 2] = -torch.inf
    scores[0, 2, 0, 1::3] = torch.inf
    for num_selected in {1, 2, 7, num_pages}:
        expected = reference.select(scores, num_pages * PAGE_SIZE - 5, NO_PADDING, num_selected, PAGE_SIZE, keeps_first)
        found = native.select(scores, num_selected, keeps_first)
        assert torch.equal(found, expected[..., : found.shape[-1]])
        assert (expected[..., found.shape[-1] :] == -1).all()


@needs_compiler
def test_pages_without_bounds_are_selected_first():
    """Keys that are not numbers have no bounds, and their pages score as high as can be."""
    scores = torch.full((1, 1, 1, 40), -torch.nan)
    scores[..., 5:30] = 7.0
    assert native.select(scores, 4, False).flatten().tolist() == [0, 1, 2, 39]


@needs_compiler
@by_dtype
@by_shape
def test_bounds_of_a_page_are_those_of_the_reference_bit_for_bit(shape, dtype):
    _, keys, _ = random(shape, 1000, dtype)
    keys[..., 2, :] *= 1e-6  # some are subnormal in float16
    keys[..., 20, 0], keys[..., 36, 1], keys[..., 52, 2] = torch.nan, torch.inf, -torch.inf
    keys[:, :, 64:80] = 0.0
    capacity = keys.shape[2] // PAGE_SIZE
    bounds = torch.full((*shape[:2], capacity, 2, shape[3]), 99, dtype=torch.int8)
    scales = torch.full((*shape[:2], capacity, -(-shape[3] // 32)), 99, dtype=torch.uint8)
    expected = [bounds.clone(), scales.clone()]
    for page in (0, 1, 2, 3, 4, 17):
        native.bound(keys, bounds, scales, page, PAGE_SIZE)
        where = (1, (page + 1) * PAGE_SIZE, NO_PADDING[: shape[0]], PAGE_SIZE)
        reference.refresh_bounds(keys, *expected, *where)
        assert torch.equal(bounds, expected[0])  # and no other page is touched
        assert torch.equal(scales, expected[1])


@needs_compiler
def test_several_threads_give_what_one_gives():
    query, keys, values = random((1, 3, 3, 64), 20000)
    bounds = torch.randint(-99, 99, (1, 3, 5000, 2, 64), dtype=torch.int8)
    scales = torch.randint(120, 124, (1, 3, 5000, 2), dtype=torch.uint8)
    num_threads, answers = torch.get_num_threads(), []
    try:
        for num in (1, 3):
            torch.set_num_threads(num)
            scores = native.estimate(query, bounds, scales, 5000, 0.125, 0.5)
            output = native.attend(query, keys[:, :, :20000], values[:, :, :20000], None, 20000, 1, 0.125)
            answers.append((scores, native.select(scores, 300, True), output))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])
    # What more items have is put together in another order.
    torch.testing.assert_close(answers[0][2], answers[1][2], rtol=1e-5, atol=1e-7)


@needs_compiler
def test_a_query_gets_the_gradients_of_pytorchs_operators():
    query, keys, values = random((1, 2, 3, 64), 100)
    ids = torch.tensor([0, 3, 6]).repeat(1, 2, 1, 1)
    grads = []
    for serves in (True, False):
        leaf = query.clone().requires_grad_()
        what = (leaf, keys, values, ids, 100, PAGE_SIZE, 0.125)
        by_kernel = native.with_gradients(native.attend(*what), what[:1], lambda what=what: cpu.attend(*what))
        output = by_kernel if serves else cpu.attend(*what)
        output.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(by_kernel.detach(), native.attend(query, *what[1:]))
    torch.testing.assert_close(*grads)


@pytest.fixture(scope="module")
def model():
    return make_model()


@needs_compiler
def test_the_answer_is_that_of_pytorchs_operators(model, monkeypatch):
    called = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *members: (called.append(name), call(name, *members)))
    for options in ({}, {"bounds_dtype": None}, {"codes": 2, "candidates": 2}, {"score": "published"}):
        found = generate(model, tokens(PROMPT), QuestCache(BUDGET, **options))
        assert {"attend"} < set(called)
        called.clear()
        with monkeypatch.context() as patch:
            patch.setattr(native, "serves", lambda *tensors: False)
            expected = generate(model, tokens(PROMPT), QuestCache(BUDGET, **options))
        assert not called
        assert torch.equal(found, expected)


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Nothing is built or loaded; afterwards it is again."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv(build.SWITCH, raising=False)
    build.load_for_cpu.cache_clear()
    native.functions.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    build.load_for_cpu.cache_clear()
    native.functions.cache_clear()


def test_without_a_compiler_pytorchs_operators_serve_and_that_is_said_once(model, monkeypatch, anew):
    expected = generate(model, tokens(PROMPT), QuestCache(BUDGET))
    build.load_for_cpu.cache_clear()
    native.functions.cache_clear()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(anew / "empty"))
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answers = [generate(model, tokens(PROMPT), QuestCache(BUDGET)) for _ in range(2)]
    said = [str(each.message) for each in said if "for this CPU" in str(each.message)]
    assert len(said) == 1
    assert re.search(r"(?s)there is no C\+\+ compiler.*What helps: .*HF_QUEST_CPU_KERNELS=0", said[0])
    assert all(torch.equal(answer, expected) for answer in answers)


def test_the_environment_can_ask_for_pytorchs_operators(model, monkeypatch, anew):
    monkeypatch.setenv(build.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, tokens(PROMPT), QuestCache(BUDGET))
    assert native.functions() is None
    assert not list(anew.iterdir())


@needs_compiler
def test_what_a_compiler_complains_of_is_said_and_leaves_nothing(monkeypatch, anew):
    path, command = build.plan_for_cpu()
    monkeypatch.setattr(build, "plan_for_cpu", lambda: (path, [*command[:-1], "-DkBlock=;", "-o"]))
    with pytest.warns(UserWarning, match="error: "):
        assert build.load_for_cpu() is None
    assert not list(path.parent.iterdir())


@needs_compiler
def test_several_can_build_at_once(anew):
    path, command = build.plan_for_cpu()
    threads = [threading.Thread(target=build.build_for_cpu, args=(path, command)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(path.parent.iterdir()) == [path]
    assert ctypes.CDLL(str(path)).hf_quest_attend


@needs_compiler
def test_a_part_of_a_library_is_built_anew(anew):
    """To load it would end the process."""
    path, _ = build.plan_for_cpu()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert build.load_for_cpu().hf_quest_attend
    content = path.read_bytes()
    assert build.is_whole(path)
    for num_bytes in (0, 20, 5000, len(content) - 1):
        path.write_bytes(content[:num_bytes])
        assert not build.is_whole(path)


@needs_compiler
def test_a_cpu_with_other_instructions_has_a_library_of_its_own(monkeypatch, anew):
    path, _ = build.plan_for_cpu()
    assert build.plan_for_cpu()[0] == path
    monkeypatch.setattr(build, "instructions", lambda: "flags : fpu")
    assert build.plan_for_cpu()[0] != path
