"""4-bit weights: torchao quantises the linear layers while the model is loaded.

pip install torchao accelerate
python examples/int4.py --model meta-llama/Llama-3.1-8B-Instruct report.txt
"""

import torch
from task import parse_arguments, prompt_of
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from hf_quest import CACHE_NAME, QuestCache, capture


def weights():
    """On a GPU PyTorch's own int4 matrix product. It has none for a CPU, where the 4 bits are unpacked."""
    if torch.cuda.is_available():
        return Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def main():
    arguments = parse_arguments(__doc__)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=torch.bfloat16,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        quantization_config=TorchAoConfig(weights()),
        attn_implementation="quest",
    )
    capture(model)  # for long answers: capture(model, compile=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    inputs = tokenizer(prompt_of(arguments, tokenizer), return_tensors="pt").to(model.device)
    cache = QuestCache(budget=arguments.budget)
    output = model.generate(**inputs, **{CACHE_NAME: cache}, max_new_tokens=arguments.max_new_tokens)
    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
