"""Whether a model is the one that read a document: what its config says, and samples of its weights."""

import hashlib
import json

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import DynamicCache

from ..errors import QuestError

# What a config says that decides nothing about keys and values; nor do names that begin with "_" or end with these.
IGNORED = frozenset(
    "architectures attention_dropout chunk_size_feed_forward dtype id2label initializer_range label2id "
    "output_attentions output_hidden_states pretraining_tp problem_type quantization_config return_dict "
    "tie_word_embeddings transformers_version use_cache".split()
)
IGNORED_ENDS = ("_token_id", "_dropout", "_pdrop")
NUM_SAMPLES = 64  # values of each weight
NUM_SHOWN = 3  # differences in a message
MOST_SHOWN = 80  # characters of a setting
WRAPPERS = ("base_model.model.", "_orig_mod.")  # of names of weights, in a model of peft or one that is compiled
AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def described(model):
    """What JSON can hold of a model, for `check`."""
    return {
        "name": getattr(model, "name_or_path", "") or type(model).__name__,
        "settings": settings_of(model),
        "weights": weights_of(model),
    }


def check(known, model, folder):
    """Raise if a model is not the one that was `described`."""
    found = settings_of(model)
    names = [name for name in known["settings"] if name in found and known["settings"][name] != found[name]]
    others = [f"{name}={shown(known['settings'][name])} there and {shown(found[name])} here" for name in names]
    if not others:
        others = other_weights(known["weights"], weights_of(model))
    if others:
        more = f" and {len(others) - NUM_SHOWN} more" if len(others) > NUM_SHOWN else ""
        raise QuestError(
            f"{folder} was saved with {known['name']}, and this model is another one: {'; '.join(others[:NUM_SHOWN])}"
            f"{more}. Load the model that read the document, in the same way, or let this one read it. If it is the "
            "same for your purpose, pass check_model=False."
        )


def shown(value):
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def settings_of(model):
    """The model's dtype, and what its config says of keys and values."""
    config = text_config(model)
    settings = json.loads(config.to_json_string(use_diff=False))
    kept = {
        name: value
        for name, value in settings.items()
        if name not in IGNORED and not name.startswith("_") and not name.endswith(IGNORED_ENDS)
    }
    return {"model_type": config.model_type, "dtype of the model": str(model.dtype).removeprefix("torch."), **kept}


def text_config(model):
    return model.config.get_text_config(decoder=True)


def num_caching_layers(config):
    """Layers of a model that cache keys and values of their own, by its config."""
    config = config.get_text_config(decoder=True)
    num_own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    return min(len(DynamicCache(config=config).layers), num_own)  # which counts them in some versions


def weights_of(model):
    """A hash of NUM_SAMPLES values of each weight by its name; None for one that is elsewhere.

    It tells a model from one whose weights were drawn, trained, merged or quantised otherwise, which moves values
    everywhere. It does not see a change of values between the samples, nor one of code.
    """
    found = {}
    for name, tensor in sorted(named_tensors(model)):
        parts = [hash_of_samples(part) for part in plain(tensor)]
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        found[name] = None if None in parts else "".join(parts)
    return found


def named_tensors(model):
    """Parameters, and the buffers that belong to the weights."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, tensor in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", tensor


def plain(tensor):
    """What a quantised or distributed tensor is made of, or the tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.detach().as_subclass(torch.Tensor)
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain(getattr(tensor, name))


@torch.no_grad()
def hash_of_samples(tensor):
    is_here = tensor.device.type != "meta" and tensor.layout == torch.strided
    if not is_here or tensor.element_size() not in AS_INTEGERS:
        return None
    num_samples = min(NUM_SAMPLES, tensor.numel())
    place = torch.linspace(0, tensor.numel() - 1, num_samples, dtype=torch.float64, device="cpu").long()
    integers = tensor.view(AS_INTEGERS[tensor.element_size()])
    samples = integers[torch.unravel_index(place, tensor.shape)] if tensor.dim() else integers
    content = f"{tuple(tensor.shape)} {samples.flatten().tolist()}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def other_weights(known, found):
    """What is different between weights, in words; of those that either does not have at hand nothing is known."""
    if known.keys() != found.keys():
        names = sorted(known.keys() ^ found.keys())
        return [f"weights of other names, {', '.join(names[:NUM_SHOWN])}{', ...' if len(names) > NUM_SHOWN else ''}"]
    others = [name for name in known if None not in (known[name], found[name]) and known[name] != found[name]]
    return [f"other weights in {len(others)} of {len(known)} places, as in {others[0]}"] if others else []


def devices_of(model, num_layers):
    """The device of each layer, where its attention computes."""
    found = {}
    for module in model.modules():
        layer_idx = getattr(module, "layer_idx", None)
        if isinstance(layer_idx, int):
            found.setdefault(layer_idx, device_of(module))
    return [found.get(layer_idx) or model.device for layer_idx in range(num_layers)]


def device_of(module):
    """Where a module computes, or None. Its weights may lie elsewhere until then, which hooks of accelerate know."""
    for each in module.modules():
        device = getattr(getattr(each, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((parameter.device for parameter in module.parameters()), None)
