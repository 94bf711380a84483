"""Names of version 0.1 that work in 0.2, for users, their scripts and their pickles. This file goes with 0.3."""

import sys
import types

import torch

from .errors import QuestError
from .watch import PageReads, SegmentsRead

# Former modules that are whole modules elsewhere, and former modules whose names are in several.
MOVED = {
    "_build": "kernels.build",
    "attention": "seam.attention",
    "fingerprint": "seam.capture.fingerprint",
    "generation": "seam.generate",
    "graphs": "seam.capture.graphs",
    "masks": "seam.masks",
    "ops": "kernels.ops",
    "recording": "seam.capture.recording",
    "rehearsal": "seam.capture.rehearsal",
    "stock": "seam.stock",
}
GATHERED = {
    "baselines": ("seam.caches",),
    "cache": ("seam.cache", "seam.caches", "seam.step", "storage.rows", "errors"),
    "layers": (),
    "local": (),
    "pages": ("watch",),
    "prefill": ("prompts.dense", "prompts.segments", "prompts.critiprefill", "seam.progress"),
    "settings": ("seam.state", "seam.step", "storage.rows"),
}


def keep_names():
    """Have `hf_quest.ops` and its like be what they were."""
    package = sys.modules[__package__]
    for name, place in MOVED.items():
        keep(package, name, sys.modules[f"{__package__}.{place}"])
    for name, places in GATHERED.items():
        module = types.ModuleType(f"{__package__}.{name}", "See `hf_quest.former`.")
        for place in places:
            found = vars(sys.modules[f"{__package__}.{place}"])
            vars(module).update({key: value for key, value in found.items() if not key.startswith("__")})
        keep(package, name, module)
    for module, name, kind in (
        ("layers", "QuestLayer", Layer),
        ("local", "LocalLayer", Layer),
        ("settings", "Settings", Pickled),
    ):
        vars(sys.modules[f"{__package__}.{module}"])[name] = kind


def keep(package, name, module):
    sys.modules[f"{package.__name__}.{name}"] = module
    setattr(package, name, module)


class Pickled:
    """The settings of a QuestCache in a pickle of version 0.1."""


class Layer:
    """A layer of a QuestCache in a pickle of version 0.1: what it held, by name."""

    def tokens(self):
        """(keys, values, tokens seen, reach), as a `stock.Tokens` has them: the newest that it holds."""
        slots = torch.arange(getattr(self, "first", 0), self.length, device=self.keys.device) % self.keys.shape[2]
        return (
            self.keys.index_select(2, slots),
            self.values.index_select(2, slots),
            self.length,
            getattr(self, "reach", None),
        )


PICKLED = (("layers", "QuestLayer", Layer), ("local", "LocalLayer", Layer), ("settings", "Settings", Pickled))


class Cache:
    """What caches had in version 0.1."""

    def __setstate__(self, state):
        """Go on from a copy or a pickle, of version 0.1 too."""
        if "shared" in state or "settings" not in state:
            self.__dict__.update(state)
        else:
            self.take_former(vars(state["settings"]), state["layers"], state["compile"])

    @property
    def settings(self):
        return Settings(self)

    @property
    def recorder(self):
        watcher = self.watcher
        return watcher.recorder if isinstance(watcher, Watcher) else watcher

    @recorder.setter
    def recorder(self, recorder):
        self.watcher = recorder if recorder is None or isinstance(recorder, PageReads) else Watcher(recorder=recorder)

    def watch_prefill(self, watch):
        self.watcher = None if watch is None else Watcher(watch=watch)


class Watcher:
    """A watcher that tells a recorder, or who watched a prompt, of version 0.1."""

    def __init__(self, recorder=None, watch=None):
        self.recorder, self.watch = recorder, watch

    def __call__(self, read):
        if isinstance(read, SegmentsRead):
            if self.watch is not None:
                self.watch(read.layer.layer_idx, read.position, read.query, read.keys, read.block_ids)
        elif self.recorder is not None and read.choice is not None:
            if read.choice.size != read.layer.method.page_size:
                raise QuestError("A recorder knows pages, and this cache chooses single tokens: use cache.watcher.")
            self.recorder(read.layer, read.query, read.choice.ids, *read.logits)


class Settings:
    """What `cache.settings` of version 0.1 told, and took, of a cache."""

    def __init__(self, cache):
        object.__setattr__(self, "_cache", cache)
        object.__setattr__(self, "_places", (cache.shared.step, cache.shared, cache.shared.rows, cache.method))

    def __getattr__(self, name):
        name = {"step": "state"}.get(name, name)
        for place in self._places:
            if hasattr(place, name):
                return getattr(place, name)
        raise AttributeError(name)

    def __setattr__(self, name, value):
        name = {"step": "state"}.get(name, name)
        if name == "budget":
            type(self._cache).budget.fset(self._cache, value)
            return
        place = next(place for place in self._places if hasattr(place, name))
        setattr(place, name, value)
