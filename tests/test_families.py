"""What Quest owes every model family: its own dense attention where the budget covers the context, the pages that the
query needs where it does not, and one clear error where neither can be had.

All models are tiny, of random weights that make attention peaked: a wrong page, mask, window, cap or sink shows.
"""

import math
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from small_llama import on_any_device
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)
from transformers.masking_utils import eager_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_quest import CACHE_NAME, H2OCache, QuestCache, QuestError, StreamingLLMCache, TOVACache
from hf_quest.methods.quest import Quest

PAGE_SIZE = 4
SMALL_BUDGET = 4 * PAGE_SIZE
LENGTHS = (45, 38)  # tokens of two prompts; their difference is no multiple of the page size
NEW_TOKENS = 8
WINDOW = 12  # tokens, of sliding windows and chunks; 48, where the fifth chunk begins, is crossed while decoding
POSITIONS = 256

# Float32 sums in another order differ by up to 6e-6 of the largest logit here. What a small budget leaves out moves
# logits by a tenth, and every test of a small budget asserts at least a hundredth.
TOLERANCE = 1e-4
FAR = 1e-2

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HEAD_DIM = {"head_dim": 16}
ROTARY = {"n_embd": 64, "n_head": 4, "n_layer": 3, "rotary_dim": 8}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


@dataclass
class Family:
    """A model type, the size of its tiny model, and what Quest should make of it with one dense layer."""

    model_type: str
    config: dict = field(default_factory=dict)
    sparse: tuple[int, ...] = (1, 2)  # the layers that select pages
    dense: str = "sdpa"  # the implementation of its own that leaves nothing out


def alternating(model_type, local="sliding_attention", dense="sdpa", **config):
    """A family with local attention in the layers 0 and 2 and full attention in 1 and 3."""
    window = "sliding_window" if local == "sliding_attention" else "attention_chunk_size"
    config = {window: WINDOW, **config, "num_hidden_layers": 4, "layer_types": [local, "full_attention"] * 2}
    return Family(model_type, {**HEAD_DIM, **config}, (1, 3), dense)


FAMILIES = {
    "llama": Family("llama", HEAD_DIM),
    "mistral": Family("mistral", {**HEAD_DIM, "sliding_window": None}),
    "mistral-window": Family("mistral", {**HEAD_DIM, "sliding_window": WINDOW}, sparse=()),
    "mistral-window-crossed-while-decoding": Family("mistral", {**HEAD_DIM, "sliding_window": 48}, sparse=()),
    "mixtral": Family("mixtral", {**HEAD_DIM, **EXPERTS}),
    "ministral3": Family("ministral3", HEAD_DIM),
    "qwen2": Family("qwen2"),
    "qwen2_moe": Family("qwen2_moe", EXPERTS),
    "qwen3": Family("qwen3", HEAD_DIM),
    "qwen3_moe": Family("qwen3_moe", {**HEAD_DIM, **EXPERTS}),
    "phi": Family("phi"),
    "phi3": Family("phi3"),
    "phi3-window": Family("phi3", {"sliding_window": WINDOW}, sparse=()),
    "phi3-window-beyond-all-positions": Family("phi3", {"sliding_window": 2 * POSITIONS}),
    "phimoe": Family("phimoe", EXPERTS),
    "gemma": Family("gemma", HEAD_DIM),
    "gemma2": alternating("gemma2", dense="eager", attn_logit_softcapping=2.0),
    "gemma3": alternating("gemma3_text"),
    "gemma3n": alternating(
        "gemma3n_text",
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=96,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=8,
    ),
    "gemma4": alternating("gemma4_text", hidden_size_per_layer_input=16, vocab_size_per_layer_input=96),
    "gemma4-shared-kv": alternating(
        "gemma4_text", num_kv_shared_layers=2, hidden_size_per_layer_input=16, vocab_size_per_layer_input=96
    ),
    "gemma4-layers-of-several-shapes": alternating(
        "gemma4_text",
        num_global_key_value_heads=1,
        global_head_dim=32,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=96,
    ),
    "vaultgemma": alternating("vaultgemma", dense="eager", attn_logit_softcapping=2.0),
    "olmo": Family("olmo"),
    "olmo2": Family("olmo2"),
    "olmo3": alternating("olmo3"),
    "olmoe": Family("olmoe", EXPERTS),
    "granite": Family("granite"),
    "granitemoe": Family("granitemoe", EXPERTS),
    "smollm3": Family("smollm3"),
    "glm": Family("glm", HEAD_DIM),
    "glm4": Family("glm4", HEAD_DIM),
    "glm4_moe": Family("glm4_moe", {**HEAD_DIM, **EXPERTS}),
    "cohere": Family("cohere"),
    "cohere2": alternating("cohere2"),
    "gpt_oss": alternating("gpt_oss", dense="eager", num_local_experts=4, num_experts_per_tok=2),
    "starcoder2": Family("starcoder2", {"sliding_window": None}),
    "starcoder2-window": Family("starcoder2", {"sliding_window": WINDOW}, sparse=()),
    "stablelm": Family("stablelm"),
    "llama4": alternating(
        "llama4_text",
        local="chunked_attention",
        num_local_experts=4,
        intermediate_size_mlp=48,
    ),
    "llama4-chunk-crossed-while-decoding": alternating(
        "llama4_text",
        local="chunked_attention",
        attention_chunk_size=50,
        num_local_experts=4,
        intermediate_size_mlp=48,
    ),
    "nemotron": Family("nemotron", HEAD_DIM),
    "seed_oss": Family("seed_oss", HEAD_DIM),
    "ernie4_5": Family("ernie4_5", HEAD_DIM),
    "ernie4_5_moe": Family("ernie4_5_moe", {**HEAD_DIM, **EXPERTS}),
    "exaone4": alternating("exaone4"),
    "afmoe": alternating("afmoe", **EXPERTS),
    "helium": Family("helium", HEAD_DIM),
    "doge-masks-of-its-own": Family("doge", HEAD_DIM, sparse=()),
    "gpt2": Family("gpt2"),
    "gpt_bigcode-one-kv-head": Family("gpt_bigcode"),
    "gpt_neox": Family("gpt_neox"),
    "opt": Family("opt", {"word_embed_proj_dim": 64, "ffn_dim": 48}),
    "codegen": Family("codegen", ROTARY),
    "gptj": Family("gptj", ROTARY),
}
SERVED_SINCE = {"codegen": Version("5.24"), "gptj": Version("5.24")}  # with attention that can be replaced
every_family = pytest.mark.parametrize("family", FAMILIES)


OTHERWISE = {
    ("5.17", "doge-masks-of-its-own"): "its own SDPA attention is not causal without padding",
    ("5.17", "llama4-static"): "TypeError in Transformers: create_chunked_causal_mask has no block_sequence_ids",
    ("5.17", "recurrent_gemma"): "IndexError in Transformers: it asks an empty cache for its first attention layer",
}


def is_served(model_type):
    """Whether a model type that some Transformers serve is served by this one."""
    return model_type in SERVED_SINCE and Version(transformers.__version__) >= SERVED_SINCE[model_type]


def skip_what_transformers_does_otherwise(name):
    version = ".".join(transformers.__version__.split(".")[:2])
    if (version, name) in OTHERWISE:
        pytest.skip(f"{name} in transformers {version}: {OTHERWISE[version, name]}")


def config_of(model_type, options):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return CONFIG_MAPPING[model_type](**{**COMMON, **options})


@torch.no_grad()
def randomize(model):
    """Weights that keep activations near one, the same for every implementation."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.2, generator=generator))
    return model.eval()


@cache
@torch.inference_mode(False)  # or its weights had no gradients, and other kernels, for who asks for it next
def build(family, implementation, num_layers=None):
    """`num_layers` of its layers, the first ones, are enough to be compiled."""
    skip_what_transformers_does_otherwise(family)
    if family in SERVED_SINCE and not is_served(family):
        pytest.skip(f"{family} has an attention of its own in transformers {transformers.__version__}")
    torch.manual_seed(0)
    options = dict(FAMILIES[family].config)
    if num_layers is not None:
        options |= {"num_hidden_layers": num_layers, "layer_types": options["layer_types"][:num_layers]}
    config = config_of(FAMILIES[family].model_type, options)
    model = randomize(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))
    model.generation_config.eos_token_id = None
    return model


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (1, length), generator=generator) for length in LENGTHS]


def left_padded():
    return torch.cat([F.pad(prompt, (max(LENGTHS) - prompt.shape[1], 0)) for prompt in prompts()])


def unpadded():
    return torch.cat([prompt[:, : min(LENGTHS)] for prompt in prompts()])


def quest_cache(budget, **options):
    return QuestCache(budget, page_size=PAGE_SIZE, dense_layers=1, **options)


def generate(model, input_ids, past_key_values=None, **options):
    """Greedy tokens [B, new] and the logits [B, new, V] that they come from."""
    output = model.generate(
        input_ids=input_ids,
        attention_mask=(input_ids != 0).long(),
        past_key_values=past_key_values,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return output.sequences[:, input_ids.shape[1] :], torch.stack(output.logits, dim=1)


def distance(logits, expected):
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def assert_same(result, expected):
    tokens, logits = result
    assert torch.equal(tokens, expected[0])
    assert distance(logits, expected[1]) < TOLERANCE


@pytest.fixture
def selections(monkeypatch):
    """The length at which each selection of pages was made."""
    choose, lengths = Quest.choose, []

    def counting_choose(method, pages, query, logits, length):
        lengths.append(length)
        return choose(method, pages, query, logits, length)

    monkeypatch.setattr(Quest, "choose", counting_choose)
    return lengths


@pytest.fixture
def warnings_said(caplog):
    """The messages of Quest, which are said once in a process, from the start."""
    transformers.utils.logging.warning_once.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_quest")]
    transformers.utils.logging.warning_once.cache_clear()


class Oracle:
    """Attention of one row written down plainly: in `sparse` layers a token after the prompt attends, for each KV head,
    its own page and the earlier ones where Σ_d max(q_d·min_d, q_d·max_d) is the largest for any of its queries. By the
    default score it is the mean of that and of q·k in the page's middle, and the first page is attended, too.
    """

    def __init__(self, sparse, prompt_length, bounds_dtype, score):
        self.sparse = sparse
        self.prompt_length = prompt_length
        self.bounds_dtype = bounds_dtype
        self.score = score

    def __call__(self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        num_tokens, group = key.shape[2], query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(group, dim=1).transpose(-1, -2) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if module.layer_idx in self.sparse and num_tokens > self.prompt_length:
            for head in range(key.shape[1]):
                heads = range(head * group, (head + 1) * group)
                pages = self.pages(query[0, heads, 0], key[0, head])
                is_left_out = torch.tensor([slot // PAGE_SIZE not in pages for slot in range(num_tokens)])
                logits[:, heads] = logits[:, heads].masked_fill(is_left_out, -torch.inf)
        elif attention_mask is not None:
            logits = logits + attention_mask
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=-1)
        weights = logits.softmax(dim=-1)[..., :num_tokens]
        return (weights @ value.repeat_interleave(group, dim=1)).transpose(1, 2).contiguous(), None

    def pages(self, queries, keys):
        newest, scores = (len(keys) - 1) // PAGE_SIZE, {}
        for page in range(newest):
            page_keys = keys[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            low, high = page_keys.amin(dim=0), page_keys.amax(dim=0)
            if self.bounds_dtype == torch.int8:
                scale = self.scale(torch.maximum(-low, high))
                low, high = (low / scale).floor() * scale, (high / scale).ceil() * scale
            of_queries = torch.stack([torch.maximum(query * low, query * high).sum() for query in queries])
            if self.score == "default":
                of_queries = (of_queries + torch.stack([query @ (low + high) / 2 for query in queries])) / 2
            scores[page] = of_queries.max().item()
        kept = {newest} if self.score == "published" else {newest, 0}
        best = sorted(set(scores) - kept, key=lambda page: (-scores[page], page))
        return {*kept, *best[: SMALL_BUDGET // PAGE_SIZE - len(kept)]}

    def scale(self, largest):
        """[D]: for every 32 channels the smallest power of two that makes none of `largest` more than 127."""
        powers = [2.0 ** math.ceil(math.log2(block.max() / 127)) for block in largest.split(32)]
        return torch.tensor(powers).repeat_interleave(32)[: len(largest)]


@pytest.fixture
def oracle():
    """A family's model that attends by the oracle."""

    def build_oracle(family, prompt_length, bounds_dtype, score):
        AttentionInterface.register("oracle", Oracle(FAMILIES[family].sparse, prompt_length, bounds_dtype, score))
        AttentionMaskInterface.register("oracle", eager_mask)
        return build(family, "oracle")

    return build_oracle


@every_family
class TestQuestCache:
    @pytest.mark.parametrize(
        "inputs", [prompts()[0], unpadded(), left_padded()], ids=["row", "batch", "left-padded-batch"]
    )
    def test_a_budget_beyond_the_context_is_the_familys_dense_attention(self, family, inputs, selections):
        expected = generate(build(family, FAMILIES[family].dense), inputs)
        assert_same(generate(build(family, "quest"), inputs, quest_cache(POSITIONS)), expected)
        assert selections == []

    @pytest.mark.parametrize(
        ("bounds_dtype", "score"),
        [(None, "published"), (torch.int8, "published"), (torch.int8, "default")],
        ids=["wide, published", "8 bits, published", "8 bits, default"],
    )
    def test_a_small_budget_selects_as_the_oracle_in_full_layers_and_nowhere_else(
        self, family, bounds_dtype, score, oracle, selections
    ):
        prompt = prompts()[0]
        cache = quest_cache(SMALL_BUDGET, bounds_dtype=bounds_dtype, score=score)
        sparse = generate(build(family, "quest"), prompt, cache)
        decoded = range(max(LENGTHS) + 1, max(LENGTHS) + NEW_TOKENS)
        assert selections == [length for length in decoded for _ in FAMILIES[family].sparse]
        assert_same(sparse, generate(oracle(family, prompt.shape[1], bounds_dtype, score), prompt))
        dense = generate(build(family, FAMILIES[family].dense), prompt)
        if FAMILIES[family].sparse:
            assert distance(sparse[1], dense[1]) > FAR
        else:
            assert_same(sparse, dense)

    def test_a_left_padded_row_is_the_row_alone_at_a_small_budget(self, family):
        model = build(family, "quest")
        tokens, logits = generate(model, left_padded(), quest_cache(SMALL_BUDGET))
        for row, prompt in enumerate(prompts()):
            alone = generate(model, prompt, quest_cache(SMALL_BUDGET))
            assert_same((tokens[row : row + 1], logits[row : row + 1]), alone)


@every_family
def test_without_a_quest_cache_it_is_the_familys_dense_attention_to_the_bit(family):
    quest, dense = build(family, "quest"), build(family, FAMILIES[family].dense)
    inputs = {"input_ids": left_padded(), "attention_mask": (left_padded() != 0).long()}
    with torch.no_grad():
        for options in ({}, {"use_cache": False}):
            assert torch.equal(quest(**inputs, **options).logits, dense(**inputs, **options).logits)
    tokens, logits = generate(quest, left_padded())
    expected_tokens, expected_logits = generate(dense, left_padded())
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits, expected_logits)


VARIED = ["llama", "mistral-window", "gemma2", "gemma3", "gpt_oss", "llama4"]


@pytest.mark.parametrize("evicting", [H2OCache, TOVACache, StreamingLLMCache])
@pytest.mark.parametrize("family", [*VARIED, "gemma3n", "gemma4-shared-kv", "cohere2", "doge-masks-of-its-own"])
class TestCachesThatEvict:
    def test_a_budget_beyond_the_context_is_the_familys_dense_attention(self, family, evicting):
        for inputs in (prompts()[0], left_padded()):
            expected = generate(build(family, FAMILIES[family].dense), inputs)
            assert_same(generate(build(family, "quest"), inputs, evicting(POSITIONS, dense_layers=1)), expected)

    def test_a_left_padded_row_is_the_row_alone_at_a_small_budget(self, family, evicting):
        model = build(family, "quest")
        if family == "doge-masks-of-its-own":  # of the values that were kept
            with pytest.raises(QuestError, match="would hide others than it means"):
                generate(model, left_padded(), evicting(SMALL_BUDGET, dense_layers=1))
            return
        tokens, logits = generate(model, left_padded(), evicting(SMALL_BUDGET, dense_layers=1))
        for row, prompt in enumerate(prompts()):
            alone = generate(model, prompt, evicting(SMALL_BUDGET, dense_layers=1))
            assert_same((tokens[row : row + 1], logits[row : row + 1]), alone)


@pytest.mark.parametrize("inputs", [prompts()[0], left_padded()], ids=["row", "left-padded-batch"])
@pytest.mark.parametrize("family", VARIED)
def test_static_cache_is_the_familys_dense_attention(family, inputs):
    skip_what_transformers_does_otherwise(f"{family}-static")
    expected = generate(build(family, FAMILIES[family].dense), inputs, cache_implementation="static")
    assert_same(generate(build(family, "quest"), inputs, cache_implementation="static"), expected)


@pytest.mark.parametrize("inputs", [unpadded(), left_padded()], ids=["batch", "left-padded-batch"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "cohere2", "olmo3"])
def test_compiled_steps_of_several_rows_are_the_familys_dense_attention(family, inputs):
    torch._dynamo.reset()
    config = on_any_device(backend="eager", mode=None)
    quest, dense = (build(family, implementation, num_layers=2) for implementation in ("quest", FAMILIES[family].dense))
    output = generate(quest, inputs, quest_cache(POSITIONS), compile_config=config)
    assert_same(output, generate(dense, inputs))


@pytest.mark.parametrize("budget", [None, SMALL_BUDGET], ids=["no-quest-cache", "small-budget"])
@pytest.mark.parametrize("family", [*VARIED, "gemma3n", "gemma4-shared-kv", "phi3-window-beyond-all-positions"])
def test_assisted_decoding_writes_what_greedy_decoding_writes(family, budget):
    """Drafts bring several queries at once, windows and the models that skip work for a prompt notwithstanding."""
    model, prompt = build(family, "quest"), prompts()[0].repeat(1, 2)

    def answer(**options):
        past_key_values = None if budget is None else quest_cache(budget)
        return generate(model, prompt, past_key_values, **options)

    assert_same(answer(prompt_lookup_num_tokens=3), answer())


@pytest.mark.parametrize("family", VARIED)
def test_loss_and_gradients_of_training_are_the_familys_own(family):
    losses, gradients = [], []
    for implementation in ("quest", FAMILIES[family].dense):
        model = build(family, implementation).train()
        loss = model(input_ids=prompts()[0], labels=prompts()[0]).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        model.zero_grad()
        model.eval()
    assert torch.equal(*losses)
    assert gradients[0]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", VARIED)
def test_packed_sequences_do_not_see_each_other(family):
    packed = torch.cat(prompts(), dim=1)
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        logits, expected = (
            build(family, implementation)(packed, position_ids=position_ids, use_cache=False).logits
            for implementation in ("quest", FAMILIES[family].dense)
        )
    assert torch.equal(logits, expected)


def blockwise_mask(num_queries, num_keys):
    """Causal, and the first twenty tokens hidden from those after them: [1, 1, T, N]."""
    query = torch.arange(num_keys - num_queries, num_keys)[:, None]
    key = torch.arange(num_keys)
    return ((key <= query) & ((key >= 20) | (query < 20)))[None, None]


@pytest.mark.parametrize("family", VARIED)
@pytest.mark.parametrize("with_quest_cache", [False, True], ids=["no-quest-cache", "small-budget"])
def test_a_mask_of_the_users_own_is_obeyed(family, with_quest_cache, selections):
    prompt, results = prompts()[0], []
    for implementation in ("quest", FAMILIES[family].dense):
        model = build(family, implementation)
        is_quest = implementation == "quest" and with_quest_cache
        past_key_values = quest_cache(SMALL_BUDGET) if is_quest else transformers.DynamicCache()
        for tokens in (prompt[:, :-1], prompt[:, -1:]):  # a prompt and a decode step
            num_keys = past_key_values.get_seq_length() + tokens.shape[1]
            mask = torch.zeros(1, 1, tokens.shape[1], num_keys)
            mask = mask.masked_fill(~blockwise_mask(*mask.shape[2:]), torch.finfo(mask.dtype).min)
            with torch.no_grad():
                logits = model(tokens, attention_mask=mask, past_key_values=past_key_values).logits
        results.append(logits)
    assert distance(*results) < TOLERANCE
    assert selections == []


@pytest.mark.parametrize("with_quest_cache", [False, True], ids=["no-quest-cache", "budget-beyond-the-context"])
def test_a_model_that_takes_its_causality_from_the_mask_alone_gets_one(with_quest_cache):
    """BigBird-Pegasus is not made for SDPA: its attention does not say that it is causal."""
    size = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    size = {**size, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    results = []
    for implementation in ("quest", "eager"):
        torch.manual_seed(0)
        config = config_of("bigbird_pegasus", size)
        model = randomize(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))
        is_quest = implementation == "quest" and with_quest_cache
        results.append(generate(model, prompts()[0], quest_cache(POSITIONS) if is_quest else None))
    assert_same(*results)


@pytest.mark.parametrize("with_quest_cache", [False, True], ids=["no-quest-cache", "budget-beyond-the-context"])
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("bigbird_pegasus", {}),
        ("nllb-moe", {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}),
        ("pegasus_x", {}),
    ],
    ids=["bigbird_pegasus", "nllb-moe", "pegasus_x"],
)
def test_an_encoder_decoder_that_is_not_made_for_sdpa_is_its_own_eager_attention(model_type, sizes, with_quest_cache):
    """Its decoder's attention does not say that it is causal, and its encoder's may add its mask to the logits."""
    half = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
    sizes = {"d_model": 64, **{f"{of}_{name}": half[name] for of in ("encoder", "decoder") for name in half}, **sizes}
    source = {"input_ids": left_padded().flip(1), "attention_mask": (left_padded().flip(1) != 0).long()}
    target = unpadded()
    logits = []
    for implementation in ("quest", "eager"):
        torch.manual_seed(0)
        config = config_of(model_type, {**sizes, "decoder_start_token_id": 1})
        model = randomize(AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation))
        halves = [quest_cache(POSITIONS) if implementation == "quest" else None, transformers.DynamicCache()]
        cache = transformers.EncoderDecoderCache(*[half or transformers.DynamicCache() for half in halves])
        given = {CACHE_NAME: cache} if with_quest_cache else {"use_cache": False}
        with torch.no_grad():
            logits.append(model(**source, decoder_input_ids=target, **given).logits)
    assert distance(*logits) < TOLERANCE


class TestAPrefixThatIsReadInBothDirections:
    """PaliGemma's layers do not say that they are causal, and the mask of its prompt is more than that."""

    @staticmethod
    def build(implementation):
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.PaliGemmaConfig(
            text_config=config_of("gemma", HEAD_DIM),
            vision_config=transformers.SiglipVisionConfig(**size, image_size=16, patch_size=8),
            projection_dim=64,
            image_token_id=95,
        )
        model = transformers.PaliGemmaForConditionalGeneration._from_config(config, attn_implementation=implementation)
        model.generation_config.eos_token_id = None
        return randomize(model)

    @staticmethod
    def inputs():
        image = torch.full((1, 4), 95)
        padded = F.pad(torch.cat([image, prompts()[1] % 95], dim=1), (len(prompts()[0][0]) - len(prompts()[1][0]), 0))
        input_ids = torch.cat([torch.cat([image, prompts()[0] % 95], dim=1), padded])
        pixel_values = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return input_ids, {"pixel_values": pixel_values, "token_type_ids": torch.zeros_like(input_ids)}

    def test_at_a_budget_beyond_the_context_it_is_the_models_dense_attention(self):
        input_ids, others = self.inputs()
        expected = generate(self.build("sdpa"), input_ids, **others)
        for budgeted in (quest_cache(POSITIONS), H2OCache(POSITIONS, dense_layers=1)):
            assert_same(generate(self.build("quest"), input_ids, budgeted, **others), expected)

    def test_a_left_padded_row_is_the_row_alone_at_a_small_budget(self, selections):
        input_ids, others = self.inputs()
        tokens, logits = generate(self.build("quest"), input_ids, quest_cache(SMALL_BUDGET), **others)
        assert selections
        for row, num_padding in enumerate((0, max(LENGTHS) - min(LENGTHS))):
            alone = {"pixel_values": others["pixel_values"][row : row + 1]}
            alone["token_type_ids"] = others["token_type_ids"][row : row + 1, num_padding:]
            ids = input_ids[row : row + 1, num_padding:]
            expected = generate(self.build("quest"), ids, quest_cache(SMALL_BUDGET), **alone)
            assert_same((tokens[row : row + 1], logits[row : row + 1]), expected)

    @pytest.mark.parametrize("budget", [SMALL_BUDGET, POSITIONS])
    def test_compiled_steps_are_the_others(self, budget):
        torch._dynamo.reset()
        input_ids, others = self.inputs()
        expected = generate(self.build("quest"), input_ids, quest_cache(budget), **others)
        config = on_any_device(backend="eager", mode=None)
        compiled = generate(self.build("quest"), input_ids, quest_cache(budget), compile_config=config, **others)
        assert_same(compiled, expected)


def test_softcapped_encoder_decoder_is_its_own_dense_attention():
    """Neither an encoder nor cross-attention is causal, and both come without a mask."""
    layers = {
        **{name: COMMON[name] for name in COMMON if name != "eos_token_id"},
        **HEAD_DIM,
        "num_hidden_layers": 2,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
    }
    logits = []
    for implementation in ("quest", "eager"):
        torch.manual_seed(0)
        config = CONFIG_MAPPING["t5gemma"](encoder=layers, decoder=layers, vocab_size=96)
        model = randomize(AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation))
        source, target = prompts()
        with torch.no_grad():
            logits.append(model(input_ids=source, decoder_input_ids=target).logits)
    assert torch.equal(*logits)


class TestWhatIsSaid:
    def test_dense_without_a_quest_cache_once(self, warnings_said):
        for _ in range(2):
            generate(build("llama", "quest"), prompts()[0])
        assert warnings_said() == [
            'attn_implementation="quest" runs dense attention: the forward was given no QuestCache.'
        ]

    def test_nothing_where_all_layers_are_served(self, warnings_said):
        generate(build("llama", "quest"), left_padded(), quest_cache(SMALL_BUDGET))
        assert warnings_said() == []

    @pytest.mark.parametrize("family", [family for family in FAMILIES if not FAMILIES[family].sparse])
    def test_dense_layers_of_a_family_once(self, family, warnings_said):
        for _ in range(2):
            generate(build(family, "quest"), prompts()[0], quest_cache(SMALL_BUDGET))
        (message,) = warnings_said()
        assert "leaves those layers dense" in message


MLA = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
}
LINEAR = {
    **HEAD_DIM,
    **EXPERTS,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
LATENTS = r"caches latents \(MLA\).*another attn_implementation and without QuestCache"
STATES = "keeps states beside keys and values.*Use the model without QuestCache"
CHANGED = "never reached Quest's attention.*changes keys and values on the way.*cannot serve it"
OWN_ATTENTION = "has an attention of its own.*another attn_implementation and without QuestCache"
UNSUPPORTED = {
    "deepseek_v2": (MLA, LATENTS),
    "deepseek_v3": (MLA, LATENTS),
    "minicpm3": (MLA, LATENTS),
    "glm4_moe_lite": (MLA, LATENTS),
    "youtu": (MLA, LATENTS),
    # Transformers 5.17 caches whole keys of these two, and the states of an indexer beside them.
    "deepseek_v32": (MLA, f"{LATENTS}|{STATES}"),
    "glm_moe_dsa": (MLA, f"{LATENTS}|{STATES}"),
    "jamba": ({**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1}, STATES),
    "bamba": ({**MAMBA, "attn_layer_indices": [1]}, STATES),
    "falcon_h1": ({**MAMBA, "mamba_d_ssm": 128}, STATES),
    "qwen3_next": (LINEAR, STATES),
    "qwen3_5_text": (LINEAR, STATES),
    "granitemoehybrid": (
        {**EXPERTS, **MAMBA, "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 32},
        STATES,
    ),
    "nemotron_h": (
        {
            **HEAD_DIM,
            "hybrid_override_pattern": "M*-*",
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
        STATES,
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, STATES),
    "recurrent_gemma": ({"lru_width": 64, "attention_window_size": WINDOW}, "caches no keys and values"),
    "diffllama": (HEAD_DIM, CHANGED),
    "jetmoe": ({}, CHANGED),
    "cpmant": ({"dim_head": 16, "dim_ff": 48}, f"({OWN_ATTENTION}|{CHANGED})"),
    "bloom": ({}, OWN_ATTENTION),
    "mpt": ({"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": POSITIONS}, OWN_ATTENTION),
    "codegen": (ROTARY, OWN_ATTENTION),
    "xglm": ({"d_model": 64, "ffn_dim": 48, "attention_heads": 4, "num_layers": 3}, OWN_ATTENTION),
    "gpt_neox_japanese": ({}, OWN_ATTENTION),
    "big_bird": ({"is_decoder": True}, OWN_ATTENTION),
}


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_a_model_that_cannot_be_served_says_why_and_what_to_do(model_type):
    skip_what_transformers_does_otherwise(model_type)
    if is_served(model_type):
        pytest.skip(f"transformers {transformers.__version__} lets {model_type} be served")
    options, message = UNSUPPORTED[model_type]
    model = AutoModelForCausalLM.from_config(config_of(model_type, options), attn_implementation="quest").eval()
    with pytest.raises(QuestError, match=f"(?s){message}"):
        generate(model, prompts()[0], quest_cache(SMALL_BUDGET))


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("falcon", {}),
        ("gptj", ROTARY),
        ("gpt_neo", {"num_layers": 3, "attention_types": [[["global"], 3]]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_with_a_list_of_its_own_implementations_cannot_be_loaded(model_type, options):
    if is_served(model_type):
        pytest.skip(f"transformers {transformers.__version__} lets {model_type} be served")
    with pytest.raises(KeyError, match="quest"):
        AutoModelForCausalLM.from_config(config_of(model_type, options), attn_implementation="quest")
