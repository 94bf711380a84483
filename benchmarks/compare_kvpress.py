"""Our StreamingLLM and TOVA against kvpress's, in an environment of its own (kvpress pins another Transformers).

python -m venv /tmp/kvpress && /tmp/kvpress/bin/pip install kvpress
python benchmarks/compare_kvpress.py /tmp/kvpress/bin/python

A small Llama with random weights reads the same prompts; compared are the tokens that every layer keeps of a prompt, by
their keys, and the logits of the next step. kvpress's TOVA never drops the last token of a prompt, which the authors'
and ours may: it is compared as it is, and with the last token protected in ours too.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

# As hf_quest.cache has it, which is not installed beside kvpress.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
NUM_PROMPTS, NUM_TOKENS = 20, 200
BUDGETS = (20, 50, 100)
PROTECTED = "TOVA, last token protected"
CASES = [(method, budget) for method in ("StreamingLLM", "TOVA", PROTECTED) for budget in BUDGETS]


def prompt(seed):
    return torch.randint(256, (1, NUM_TOKENS + 1), generator=torch.Generator().manual_seed(seed))


def outcome(model, cache, ids):
    """The keys that each layer keeps of all but the last token, and the logits after that one."""
    keys = [layer.keys for layer in cache.layers]
    position = torch.tensor([[NUM_TOKENS]])
    logits = model(ids[:, -1:], **{CACHE_NAME: cache}, position_ids=position, cache_position=position[0]).logits
    return {"keys": keys, "logits": logits[0, -1]}


def theirs(folder):
    """Runs where kvpress is installed; writes what it keeps."""
    from kvpress import StreamingLLMPress, TOVAPress

    presses = {"StreamingLLM": StreamingLLMPress, "TOVA": TOVAPress, PROTECTED: TOVAPress}
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    outcomes = {}
    for method, budget in CASES:
        press = presses[method](compression_ratio=1 - (budget + 0.5) / NUM_TOKENS)  # it rounds down
        for seed in range(NUM_PROMPTS):
            cache = DynamicCache()
            with press(model):
                model(prompt(seed)[:, :-1], **{CACHE_NAME: cache})
            outcomes[method, budget, seed] = outcome(model, cache, prompt(seed))
    torch.save({"versions": versions("kvpress"), "outcomes": outcomes}, folder / "theirs.pt")


def ours(folder):
    from hf_quest import StreamingLLMCache, TOVACache

    caches = {"StreamingLLM": StreamingLLMCache, "TOVA": TOVACache, PROTECTED: TOVACache}
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="quest").eval()
    outcomes = {}
    for method, budget in CASES:
        for seed in range(NUM_PROMPTS):
            cache = caches[method](budget=NUM_TOKENS, dense_layers=0)
            model(prompt(seed)[:, :-1], **{CACHE_NAME: cache})
            if method == PROTECTED:
                for layer in cache.layers:
                    scores = layer.storage.beside["scores"]
                    scores[:, :, NUM_TOKENS - 1] = torch.inf
            cache.budget = budget
            outcomes[method, budget, seed] = outcome(model, cache, prompt(seed))
    return outcomes


def versions(*packages):
    return ", ".join(f"{package} {version(package)}" for package in (*packages, "transformers", "torch"))


def num_common(keys, other):
    """How many of the keys [1, H, n, D] are among the other's, for each head."""
    distance = torch.cdist(keys[0], other[0], compute_mode="donot_use_mm_for_euclid_dist")
    is_same = distance < 1e-3  # float32 of two versions of PyTorch; no two of the random keys lie so near
    return is_same.any(dim=-1).sum(dim=-1)


@torch.no_grad()
def main(python):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LlamaForCausalLM(config).save_pretrained(folder)
        subprocess.run([python, __file__, "--theirs", folder], check=True)
        found = torch.load(folder / "theirs.pt")
        mine = ours(folder)
    print(f"{found['versions']} against hf_quest, {versions()}")
    print(f"{NUM_PROMPTS} prompts of {NUM_TOKENS} tokens, 4 layers, 2 KV heads\n")
    print(
        "| method | budget | tokens kept by both | prompts with the same tokens | largest difference of their logits |"
    )
    print("| --- | --- | --- | --- | --- |")
    for method, budget in CASES:
        common, difference, num_same = 0, 0.0, 0
        for seed in range(NUM_PROMPTS):
            our, their = mine[method, budget, seed], found["outcomes"][method, budget, seed]
            counts = torch.stack([num_common(*pair) for pair in zip(our["keys"], their["keys"], strict=True)])
            common += counts.sum().item()
            if (counts == budget).all():
                num_same += 1
                difference = max(difference, (our["logits"] - their["logits"]).abs().max().item())
        share = common / (NUM_PROMPTS * counts.numel() * budget)
        largest = f"{difference:.1e}" if num_same else "-"
        print(f"| {method} | {budget} | {share:.2%} | {num_same} of {NUM_PROMPTS} | {largest} |")


if __name__ == "__main__":
    if sys.argv[1] == "--theirs":
        with torch.no_grad():
            theirs(Path(sys.argv[2]))
    else:
        main(sys.argv[1])
