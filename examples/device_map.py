"""A model over several GPUs, and over the CPU where they are too small: each layer's cache lives where its layer runs.

python examples/device_map.py --model meta-llama/Llama-3.1-70B-Instruct report.txt
"""

from task import parse_arguments, prompt_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_quest import CACHE_NAME, QuestCache


def main():
    arguments = parse_arguments(__doc__)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype="auto", device_map="auto", attn_implementation="quest"
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    inputs = tokenizer(prompt_of(arguments, tokenizer), return_tensors="pt").to(model.device)
    cache = QuestCache(budget=arguments.budget)
    output = model.generate(**inputs, **{CACHE_NAME: cache}, max_new_tokens=arguments.max_new_tokens)
    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
