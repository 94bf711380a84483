"""Which models can be served, by their classes and configs."""

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ..errors import QuestError
from .local import kv_heads_of


def class_of(config, auto_class):
    """The class that an auto class of Transformers makes of a config, or None."""
    model_class = auto_class._model_mapping.get(type(config), None) if config is not None else None
    # Some models name several classes, by architecture.
    return model_class[0] if isinstance(model_class, tuple) else model_class


def supports_sdpa(config):
    """Whether the model is made for SDPA: one that is not may have layers that do not say whether they are causal."""
    for auto_class in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel):
        model_class = class_of(config, auto_class)
        if model_class is not None:
            return model_class._supports_sdpa
    return True


def check_model(config):
    """Raise for a model that cannot be served, whatever its cache."""
    check_has_attention_interface(class_of(config, AutoModelForCausalLM), config)
    check_heads_split(config)


def check_has_attention_interface(model_class, config):
    """Raise for a model that never calls the registered attention: it would get this mask and lose causality."""
    if model_class is not None and not model_class._can_set_attn_implementation():
        raise QuestError(
            f'{config.model_type} has an attention of its own and does not use attn_implementation="quest". Load it '
            "with another attn_implementation and without QuestCache."
        )


def check_heads_split(config):
    """Raise for tensor parallelism over a number of processes that the KV heads cannot be split among."""
    num_ranks = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
    plan = getattr(config, "base_model_tp_plan", None) or {}
    if num_ranks == 1 or not any(name.endswith(".k_proj") and style == "colwise" for name, style in plan.items()):
        return
    for num_kv_heads in kv_heads_of(config):
        if num_kv_heads % num_ranks:
            counts = [count for count in range(1, num_kv_heads + 1) if num_kv_heads % count == 0]
            raise QuestError(
                f"Tensor parallelism gives every process whole KV heads, and the {num_kv_heads} of this model do not "
                f"split evenly over {num_ranks} processes. Start torchrun with one of {counts} as --nproc-per-node."
            )
