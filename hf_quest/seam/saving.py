"""Saving: caches in folders, and back in another process."""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedModel
from typing_extensions import Self

from .. import methods
from ..errors import QuestError
from ..methods import Method
from ..prompts import CritiPrefill
from ..reference import Score
from ..storage import folder as folders
from .forwards import Forwards
from .layer import Layer
from .same_model import check, described, devices_of, num_caching_layers, text_config

INPUTS = "inputs"  # the file with the document's ids


class Saving(Forwards):
    """Saved documents. See `MethodCache`."""

    compile: bool

    @property
    def method(self) -> Method:
        raise NotImplementedError

    def save(self, folder: str | Path, model: PreTrainedModel | None = None, *, inputs: Any = None) -> None:
        """Write all that the cache holds to a new folder, from which `load` brings it back in another process.

        The folder is there when it is whole: what was interrupted, or found no room, leaves none.

        Args:
            folder: one that does not exist, or is empty.
            model: the model that read what is stored. May be left out where this cache was in its forward; a copy or a
                cache from `from_cache` was in none.
            inputs: what the tokenizer gave for the document, with "input_ids" [B, N]. It is saved too, for
                `saved_inputs`. N is the number of tokens that are stored, or one more after `generate`.

        Raises:
            ValueError: for an empty cache, and for inputs of other tokens.
            QuestError: for what cannot be saved, such as a forward that did not end.
            OSError: where something is there already, or there is no room. In all cases the cache is as it was.
        """
        model = self._check_can_be_saved(model)
        layers = [of_layer(layer) for layer in self.layers]
        content = {
            "cache": type(self).__name__,
            "hf_quest": sys.modules[__package__.partition(".")[0]].__version__,
            "transformers": transformers.__version__,
            "tokens": self.get_seq_length(),
            "rows": len(self.left_padding),
            "settings": self._settings(),
            "state": self.shared.saved(),
            "model": described(model),
            "layers": [facts for _, facts in layers],
        }
        of_inputs = {} if inputs is None else {INPUTS: checked_inputs(inputs, content["rows"], content["tokens"])}
        files = ((file_of(layer.layer_idx), layer.saved()[0]) for layer in self.layers)
        num_bytes = sum(size for size, _ in layers) + sum(
            tensor.nbytes for each in of_inputs.values() for tensor in each.values()
        )
        folders.write(Path(folder), content, num_bytes, itertools.chain(files, of_inputs.items()))

    def _check_can_be_saved(self, model):
        """Raise if there is nothing whole to save; return the model that read it."""
        self._settle()
        self._check_last_forward_was_whole()
        if not self.layers or not self.get_seq_length():
            raise ValueError("The cache is empty, so there is nothing to save: let a model read a document with it.")
        model = self.reading_model() if model is None else model
        if model is None:
            raise ValueError(
                "No model that is still there has used this cache itself, so it is not known which one read what it "
                "holds. Say so: cache.save(folder, model)."
            )
        refuse(model)
        if num_caching_layers(model.config) != len(self.layers):
            raise QuestError(
                f"{type(model).__name__} caches keys and values in {num_caching_layers(model.config)} layers, and this "
                f"cache holds those of {len(self.layers)}: its first forward did not end, or another model read it. "
                "Call cache.reset() and let the model read the document, or name the model that did."
            )
        return model

    def _settings(self):
        shared = self.shared
        return {
            "method": {"name": type(self.method).__name__, "settings": as_json(self.method)},
            "dense_layers": shared.dense_layers,
            "max_cache_len": shared.max_cache_len,
            "prefill": None if shared.prefill is None else as_json(shared.prefill),
            "compile": self.compile,
            "offloading": shared.offloading,
            "pool": shared.pool,
        }

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: PreTrainedModel,
        *,
        method: Method | None = None,
        check_model: bool = True,
        offloading: bool | None = None,
    ) -> Self:
        """A cache as it was when it was saved, on the devices of the model. It keeps nothing of the folder.

        Args:
            folder: one that `save` wrote.
            model: the one that read the document, or the same one loaded again, in the same dtype.
            method: that of a MethodCache with a method of one's own, which is not saved.
            check_model: whether to refuse a model whose config or weights are not those of the one that read the
                document. Of each weight 64 values are compared.
            offloading: where keys and values are to lie; None: as in the cache that was saved.

        Raises:
            FileNotFoundError: where there is no such folder.
            QuestError: for a folder that is something else, not whole or damaged, of a newer version, of another class
                of caches or another model. Nothing is loaded then.
        """
        folder = Path(folder)
        content = folders.read(folder)
        if content["cache"] != cls.__name__:
            raise QuestError(
                f"{folder} was saved by a {content['cache']}: use {content['cache']}.load, and not {cls.__name__}.load."
            )
        refuse(model)
        if check_model:
            check(content["model"], model, folder)
        if len(content["layers"]) != num_caching_layers(model.config):
            raise QuestError(
                f"{type(model).__name__} caches keys and values in {num_caching_layers(model.config)} layers, and "
                f"{folder} holds those of {len(content['layers'])}. Load the model that read the document."
            )
        place: dict[str, Any] = {} if offloading is None else {"offloading": offloading}
        if offloading is False:
            place["pool"] = None
        cache = cls._with_method(**arguments_of({**content["settings"], **place}, method, folder))
        cache._restore(folder, content, model)
        return cache

    @classmethod
    def _with_method(cls, method: Method, **options: Any) -> Self:
        """An empty cache of the class that chooses by a method."""
        raise NotImplementedError

    def _restore(self, folder, content, model):
        self.shared.restore(content["state"])
        devices = devices_of(model, len(content["layers"]))
        for layer_idx, (facts, device) in enumerate(zip(content["layers"], devices, strict=True)):
            self.layers.append(Layer(self.shared, layer_idx))
            tensors = folders.tensors_in(folder, file_of(layer_idx), content)
            self.layers[layer_idx].restore(tensors, facts, device)
        self.was_read_by(model)


def of_layer(layer):
    """(bytes, facts) of what is saved of a layer, whose tensors are made again when it is written: one layer's only."""
    tensors, facts = layer.saved()
    return sum(tensor.nbytes for tensor in tensors.values()), facts


def file_of(layer_idx):
    return f"layer-{layer_idx:03}"


def saved_inputs(folder: str | Path) -> BatchEncoding:
    """What was given to `save` as `inputs`: "input_ids" [B, N] and what has their shape, such as "attention_mask".

    Raises:
        FileNotFoundError, QuestError: as `QuestCache.load`, and where none were given.
    """
    folder = Path(folder)
    content = folders.read(folder)
    if INPUTS not in content["files"]:
        raise QuestError(
            f"{folder} was saved without inputs. Tokenize the document as before, or save it with "
            "cache.save(folder, inputs=inputs)."
        )
    tensors = folders.tensors_in(folder, INPUTS, content)
    return BatchEncoding({name: tensor.clone() for name, tensor in tensors.items()})


def checked_inputs(inputs, num_rows, num_tokens):
    """The ids among the inputs, and what has their shape."""
    ids = inputs.get("input_ids") if hasattr(inputs, "get") else None
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise ValueError(
            'inputs are what the tokenizer gave with return_tensors="pt": "input_ids" are a tensor [rows, tokens]. '
            "Nothing was saved."
        )
    if ids.shape[0] != num_rows or ids.shape[1] not in (num_tokens, num_tokens + 1):
        raise ValueError(
            f"inputs are {ids.shape[0]} rows of {ids.shape[1]} tokens, and the cache holds {num_rows} of {num_tokens}. "
            "Give those that are stored, or one more, which `generate` has written last. Nothing was saved."
        )
    return {name: each for name, each in inputs.items() if getattr(each, "shape", None) == ids.shape}


def refuse(model):
    """Raise for a model whose caches hold a part of what it takes to go on."""
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise TypeError(f"model is the model that read the document, loaded again, not a {type(model).__name__}.")
    config = text_config(model)
    if (getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1) > 1:
        raise QuestError(
            "Under tensor parallelism every process holds some of the KV heads, and a saved cache holds all. Save it "
            "from, and load it into, a model that one process runs."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise QuestError(
            f"{type(model).__name__} is an encoder-decoder model: what it writes depends on its encoder's output, too, "
            "which is not in this cache. Save the text, and let the model read it again."
        )


def as_json(settings):
    """The fields of a dataclass of settings, as JSON can hold them."""
    found = {each.name: getattr(settings, each.name) for each in dataclasses.fields(settings) if each.init}
    for name, value in found.items():
        if isinstance(value, torch.dtype):
            found[name] = {"dtype": str(value).removeprefix("torch.")}
        elif isinstance(value, Score):
            found[name] = {"score": value._asdict()}
        elif value is not None and not isinstance(value, (bool, int, float, str)):
            raise QuestError(
                f"{name} of {type(settings).__name__} is a {type(value).__name__}, and settings that can be saved are "
                "numbers, names, dtypes and scores."
            )
    return found


def from_json(value):
    if not isinstance(value, dict):
        return value
    return getattr(torch, value["dtype"]) if "dtype" in value else Score(**value["score"])


def arguments_of(saved, method, folder):
    """The arguments of a MethodCache that were saved."""
    try:
        prefill = None if saved["prefill"] is None else CritiPrefill(**saved["prefill"])
        return {**saved, "method": method_of(saved["method"], method, folder), "prefill": prefill}
    except (TypeError, ValueError) as error:
        raise QuestError(
            f"{folder} has settings that this version of hf_quest does not know: {error} Load it with the version that "
            "saved it, or let the model read the document again."
        ) from error


def method_of(saved, given, folder):
    """The method that was saved, or the one that is given if it is the same."""
    known = {name: getattr(methods, name) for name in methods.__all__}.get(saved["name"])
    known = known if known is not None and issubclass(known, Method) else None
    if given is None and known is None:
        raise QuestError(
            f"{folder} was saved with a method of one's own, {saved['name']}, of which the settings are known and not "
            f"the code. Give it: load(folder, model, method={saved['name']}(...))."
        )
    if given is None:
        return known(**{name: from_json(value) for name, value in saved["settings"].items()})
    own = {"name": type(given).__name__, "settings": as_json(given)}
    if own != saved:
        raise QuestError(f"{folder} was saved with {saved}, and the method given is {own}. Give the same.")
    return given
