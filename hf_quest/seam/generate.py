"""What `generate` and models do not tell a cache, and their stack frames do; each function names what it leans on."""

import inspect
import sys
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from ..errors import say_once


def codes_of(*functions):
    """The identities of their code objects, whose own hash takes longer than all else that a step asks of its stack."""
    return frozenset(id(inspect.unwrap(function).__code__) for function in functions)


ASSISTED = codes_of(GenerationMixin._assisted_decoding)
PREFILL = codes_of(GenerationMixin._prefill)
# Where the mask of the next token is the last one's and a column of ones: the loops of `generate`.
LOOPS = codes_of(GenerationMixin._sample, GenerationMixin._beam_search, GenerationMixin._assisted_decoding)
GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
PREPARE = inspect.unwrap(GenerationMixin.prepare_inputs_for_generation).__code__
# In assisted decoding from Transformers 5.24 on, which calls what these decide may be compiled.
CRITERIA = inspect.unwrap(GenerationMixin._valid_auto_compile_criteria).__code__
CALLS_COMPILED = "get_compiled_call" in inspect.unwrap(GenerationMixin._assisted_decoding).__code__.co_names
MODULE_CALL = codes_of(torch.nn.Module._call_impl)
DRAFTS_OR_GENERATE = ASSISTED | {id(GENERATE)}
WHO_ASKS = DRAFTS_OR_GENERATE | PREFILL | MODULE_CALL


def innermost(codes):
    """That of the functions `codes` which is innermost in the stack, or None."""
    frame = sys._getframe(1)
    while frame is not None and id(frame.f_code) not in codes:
        frame = frame.f_back
    return None if frame is None else id(frame.f_code)


def continues_its_masks():
    """Whether `generate` runs the forward, past its prompt, with the mask of its own, to which it only appends ones.

    In `_prefill` a prompt may come in chunks of one token, each with its own part of the caller's mask. A model, a hook
    or a processor of logits may give another mask than the loop's `model_kwargs` hold.
    """
    given, frame = [], sys._getframe(1)
    while frame is not None and id(frame.f_code) not in PREFILL:
        if id(frame.f_code) in LOOPS:
            own = [frame.f_locals.get(name, {}).get("attention_mask") for name in ("model_kwargs", "candidate_kwargs")]
            return all(any(mask is each for each in own) for mask in given)
        if frame.f_code is PREPARE:
            given.append(frame.f_locals["attention_mask"])
        elif id(frame.f_code) in MODULE_CALL and "attention_mask" in frame.f_locals["kwargs"]:
            given.append(frame.f_locals["kwargs"]["attention_mask"])
        frame = frame.f_back
    return False


def is_assisted():
    """Whether `generate` is in assisted decoding, in which several new tokens may be drafts."""
    return innermost(ASSISTED) is not None


def verifies_drafts():
    """Whether the innermost `generate` is in assisted decoding, and not an assistant's that writes the drafts."""
    return innermost(DRAFTS_OR_GENERATE) in ASSISTED


def called_by_module():
    """Whether a model calls, and not somebody who fills a cache by hand."""
    return innermost(MODULE_CALL) is not None


def calling_model():
    """The outermost model of Transformers whose forward calls, or None."""
    model, frame = None, sys._getframe(1)
    while frame is not None:
        if id(frame.f_code) in MODULE_CALL and isinstance(frame.f_locals["self"], PreTrainedModel):
            model = frame.f_locals["self"]
        frame = frame.f_back
    return model


def prompt_length_of_caller():
    """Tokens in the inputs of the function that called ours, `_assisted_decoding`: its `input_ids`, or the embeddings
    that were given instead, `inputs_tensor`. 0 if it has none.
    """
    # Its first forward feeds the prompt and the first drafts together, and nothing that a cache is given tells where
    # the prompt ends.
    caller = sys._getframe(2).f_locals
    inputs = [caller.get("input_ids"), caller.get("inputs_tensor")]
    return max((tensor.shape[1] for tensor in inputs if isinstance(tensor, torch.Tensor)), default=0)


def empty_before_assisted(cache):
    """Empty a cache that is filled, where the assisted decoding under way is given the whole text.

    Its first forward feeds all of its inputs, whatever the cache holds. A mask that is longer than they are tells of
    tokens before them; from Transformers 5.24 on one of ones is known by its length only.
    """
    frame = sys._getframe(1)
    while frame is not None and id(frame.f_code) not in ASSISTED:
        frame = frame.f_back
    names = {} if frame is None else frame.f_locals
    ids, mask = names.get("input_ids"), names.get("model_kwargs", {}).get("attention_mask")
    known = getattr(names.get("generation_config"), "_mask_length", None)
    is_whole = isinstance(ids, torch.Tensor) and ids.shape[1] == (known if mask is None else mask.shape[1])
    if is_whole and 0 < cache.get_seq_length() < ids.shape[1]:
        say_once("Assisted decoding reads all of its text, stored or not: the cache was emptied for it.")
        cache.reset()


def prompt_under_way():
    """Tokens of the prompt that `generate` has read, in chunks as it may be; 0 where it reads none or does not know."""
    frame = sys._getframe(1)
    while frame is not None and id(frame.f_code) not in PREFILL:
        frame = frame.f_back
    ids = None if frame is None else frame.f_locals.get("input_ids")
    return ids.shape[1] if isinstance(ids, torch.Tensor) and ids.dim() == 2 else 0


def compiles_on_cpu():
    """Whether the `generate` under way compiles its steps on a CPU, too, as a private flag of CompileConfig says."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not GENERATE:  # whose loop may be ours
        frame = frame.f_back
    config = None if frame is None else frame.f_locals["generation_config"].compile_config
    return config is not None and config._compile_all_devices


def may_compile_for_caller(is_on_cpu):
    """Whether the function that asks our caller, a method of a model, would do well to compile.

    `generate` would compile the chunks of a prompt too. They are dense, and have all to lose from a graph that cannot
    know how many keys there are. From Transformers 5.24 on it would compile what verifies drafts, too, of which every
    layer would become several graphs: it is recorded only. A model on several devices is not one graph. Llama 4
    is never compiled, and the masks that Transformers 5.17 would make for that fail. On a CPU `generate` compiles
    nothing, and would make the masks of each step for it all the same.
    """
    caller = sys._getframe(2)
    is_in_vain = is_on_cpu and caller.f_code is PREPARE and not compiles_on_cpu()
    asks = None if is_in_vain else innermost(WHO_ASKS)
    if is_in_vain or asks in PREFILL:
        return False
    if asks in ASSISTED or (asks in MODULE_CALL and verifies_drafts()):
        return may_record_drafts(caller)
    model = caller.f_locals.get("self")
    is_one_graph = len(set(getattr(model, "hf_device_map", {}).values())) < 2
    return is_one_graph and "llama4" not in getattr(getattr(model, "config", None), "model_type", "")


def may_record_drafts(frame):
    """Whether this frame, of assisted decoding, is of a model that records what verifies drafts, past its prompt."""
    is_past_prompt = frame.f_code is CRITERIA or (frame.f_code is PREPARE and not frame.f_locals["is_first_iteration"])
    if not CALLS_COMPILED or not is_past_prompt:
        return False
    return getattr(vars(frame.f_locals["self"]).get("_compiled_call"), "records_drafts", False)


def prepares_drafts():
    """Whether assisted decoding asks for the mask of drafts, outside of the model, that may be verified in a graph."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not PREPARE:
        if id(frame.f_code) in MODULE_CALL:
            return False
        frame = frame.f_back
    return frame is not None and verifies_drafts() and may_record_drafts(frame)


def given_to_generate(name):
    """An argument of the `generate` that is under way, or None: it keeps some from a `custom_generate`."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not GENERATE:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get(name)


def rows_of_generate():
    """(rows that were given to the `generate` that is under way, sequences that it makes of each)."""
    rows, config = given_to_generate("batch_size"), given_to_generate("generation_config")
    return rows, 1 if config is None else max(config.num_beams or 1, config.num_return_sequences or 1)


def has_own_preparation(model):
    """Whether a model prepares the inputs of a step in a way of its own."""
    method = vars(model).get("prepare_inputs_for_generation", type(model).prepare_inputs_for_generation)
    return getattr(inspect.unwrap(method), "__code__", None) is not PREPARE


def limit_to_read_again(length):
    """The number of tokens up to which the model that asks a cache for its length would drop it, if `length` is not
    more and the input is; or None.

    Phi-3 and its like have one set of rotary factors for texts of up to `original_max_position_embeddings` tokens and
    another for longer ones. At the crossing their `prepare_inputs_for_generation` lets the cache go (`cache = None`,
    later steps attend a cache of Transformers' own), if `get_seq_length` tells of no more than that many tokens. Where
    the input is longer, its slicing to the new tokens is undone here, in the dict of its arguments, so that a cache
    that is too short can be emptied and keep its place, and the model reads all of the input into it.
    """
    caller = sys._getframe(3)  # of length_or_read_again and get_seq_length
    names = caller.f_code.co_names
    if caller.f_code.co_name != "prepare_inputs_for_generation" or "original_max_position_embeddings" not in names:
        return None
    model, ids = caller.f_locals["self"], caller.f_locals.get("input_ids")
    limit = model.config.original_max_position_embeddings
    if not isinstance(ids, torch.Tensor) or not length <= limit < ids.shape[1]:
        return None
    caller.f_locals["kwargs"]["next_sequence_length"] = None
    return limit


def length_or_read_again(cache, length):
    """`length`, that of `cache`, for who asks; or what makes a model keep the cache, which is emptied, and fill it
    again with all of its text, where it would drop it.
    """
    limit = limit_to_read_again(length)
    if limit is None:
        return length
    if length:
        say_once(
            f"The text has grown beyond {limit} tokens, from which on this model has other rotary factors for all "
            "of its tokens. The cache was emptied and is filled again with the whole text."
        )
    cache.reset()
    return limit + 1


class Events:
    """What `generate` does to a cache, of which it tells nothing else: a cache takes it for events."""

    layers: list[Any]  # of Layer

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        """Every call of `generate` sets this first, and may bring another mask than the last one."""
        self.generate_begins()

    def activate_past_recording(self) -> None:
        """`generate` enters assisted decoding."""
        self.assisted_begins(prompt_length_of_caller())

    @property
    def is_compileable(self) -> bool:
        """`generate` and models ask whether to compile the next forward."""
        is_on_cpu = len(self.layers) > 0 and self.layers[0].storage.device == torch.device("cpu")
        return self.can_be_compiled() and may_compile_for_caller(is_on_cpu)

    def generate_begins(self) -> None:
        """A `generate` begins that was given this cache."""
        raise NotImplementedError

    def assisted_begins(self, num_prompt: int) -> None:
        """Several new tokens after `num_prompt` tokens of a prompt, 0 where that is not known, may be drafts."""
        raise NotImplementedError

    def can_be_compiled(self) -> bool:
        """Whether the cache can be part of a graph."""
        raise NotImplementedError
