"""Tensor parallelism: every GPU has its share of the heads, and selects pages for them alone.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py --model meta-llama/Llama-3.1-70B-Instruct report.txt

Without arguments it asks the model that ships inside, also where there is no GPU.
"""

import torch.distributed as dist
from task import parse_arguments, prompt_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quest import CACHE_NAME, QuestCache, capture


def main():
    arguments = parse_arguments(__doc__)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype="auto", tp_plan="auto", attn_implementation="quest"
    )
    capture(model)  # on GPUs each step is a replay, communication included
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    inputs = tokenizer(prompt_of(arguments, tokenizer), return_tensors="pt").to(model.device)
    # The cache ends with the call, and with it what is recorded, for which the process group would wait.
    output = model.generate(
        **inputs, **{CACHE_NAME: QuestCache(budget=arguments.budget)}, max_new_tokens=arguments.max_new_tokens
    )
    if dist.get_rank() == 0:
        print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
