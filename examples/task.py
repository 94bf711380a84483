"""What the examples ask: a question about a document, by default a number in a haystack."""

import argparse
from pathlib import Path

import hf_quest.tiny

HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 60
NEEDLE = "The pass key is 48213. Remember it. 48213 is the pass key."
QUESTION = "What is the pass key? The pass key is"


def parse_arguments(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, nargs="?", help="a text file")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--model", default=hf_quest.tiny.PATH, help="of the hub, or a folder")
    parser.add_argument("--budget", type=int, default=256, help="tokens")
    parser.add_argument("--max-new-tokens", type=int, default=6)
    return parser.parse_args()


def prompt_of(arguments, tokenizer):
    document = arguments.document.read_text() if arguments.document else f"{HAY}\n{NEEDLE}\n{HAY}"
    text = f"{document}\n{arguments.question}"
    if tokenizer.chat_template is None:
        return text
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
