"""What each process of test_parallel.py runs: python tensor_parallel_ranks.py FOLDER

On GPUs the example, at the end, is a captured decode; what comes before it would be compiled for a minute.
"""

import sys
from pathlib import Path

import tensor_parallel
import torch
import torch.distributed as dist
from small_llama import BUDGET, PROMPT, generate, tokens
from test_parallel import padded_batch
from transformers import AutoModelForCausalLM

from hf_quest import QuestCache, QuestError

folder = Path(sys.argv.pop())
model, odd_model = (
    AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto", attn_implementation="quest").eval()
    for name in ("even", "odd")
)
input_ids, attention_mask = (tensor.to(model.device) for tensor in padded_batch())
outputs = {}
for budget in (BUDGET, 2048):
    cache = QuestCache(budget=budget, compile=False)
    outputs[f"budget {budget}"] = generate(model, input_ids, cache, attention_mask=attention_mask).cpu()
lookup = tokens(PROMPT // 2).repeat(1, 2).to(model.device)
outputs["assisted"] = generate(model, lookup, QuestCache(budget=BUDGET), prompt_lookup_num_tokens=4).cpu()
outputs["kv_heads"] = [layer.keys.shape[1] for layer in cache.layers]
try:
    generate(odd_model, lookup, QuestCache(budget=BUDGET, compile=False))
except QuestError as error:
    outputs["error"] = str(error)
torch.save(outputs, folder / f"rank{dist.get_rank()}.pt")
tensor_parallel.main()
