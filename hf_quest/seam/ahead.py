"""decode_ahead: `generate`'s loop of one token after the other, in which the GPU does not wait for the host."""

from collections import deque
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from ..errors import say_once
from . import generate
from .cache import CACHE_NAME, MethodCache


def decode_ahead(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    **model_kwargs,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """`model.generate(..., custom_generate=decode_ahead)`: the tokens of `generate`, greedy or sampled, sooner.

    Transformers' loop waits for every token before it prepares the next step. This one looks at a token one step late,
    so that a step is in the GPU's queue before the last one has ended, and what a text runs on beyond its end is taken
    back: one step, which draws a random number more. From the third token on it spares the preparation of inputs, too,
    where that of the second has shown that they are those of the step before, one position later.

    It is for greedy and sampled decoding with a cache of this package that can take tokens back. With other caches, for
    models that encode, across processes that wait for each other, and where attentions or hidden states are asked for,
    Transformers' own loop decodes, and that is said once. `stop_strings` is what `generate` itself refuses with a
    `custom_generate`; give a `StopStringCriteria` in `stopping_criteria`.

    Args:
        model: loaded with `attn_implementation="quest"`; best after `hf_quest.capture`. The others are what `generate`
            gives to a `custom_generate`, and mean what they do there.

    Returns:
        What `generate` returns: [B, tokens] int64, or with `return_dict_in_generate` a `GenerateDecoderOnlyOutput`.

    Raises:
        ValueError: for beams and assisted decoding, before anything is computed.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"decode_ahead decodes greedily or samples, one sequence for each row. For {mode.value.replace('_', ' ')} "
            "call generate without custom_generate."
        )
    loops: Any = model  # whose methods from `GenerationMixin` are typed for a protocol
    streamer = generate.given_to_generate("streamer")
    reason = why_not(model, generation_config, model_kwargs)
    if reason is not None:
        say_once(f"decode_ahead leaves decoding to Transformers' own loop, since {reason}.")
        return loops._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=is_synced(model),
            streamer=streamer,
            **model_kwargs,
        )
    text = Text(input_ids, logits_processor, stopping_criteria, generation_config)
    notes = Notes(streamer, steps_late(input_ids.device))
    steps = Steps(model, generation_config, model_kwargs)
    output = steps.read_prompt(input_ids)
    with loops._optimize_model_for_decode():
        while True:
            tokens = text.add(output.logits)
            notes.add(text.is_unfinished, tokens)
            if notes.is_over() or text.is_full:
                break
            inputs = steps.next_inputs(text.sequence, output)
            del output  # or a compiled step would have to leave its logits where they are, and write elsewhere
            output = steps.take(inputs)
    num_kept = notes.finish()
    text.keep(num_kept)
    steps.keep(num_kept - 1)
    if not generation_config.return_dict_in_generate:
        return text.sequence
    return GenerateDecoderOnlyOutput(
        sequences=text.sequence, scores=text.scores, logits=text.logits, **{CACHE_NAME: steps.cache}
    )


def is_synced(model):
    """Whether processes that share the model have to take as many steps as each other."""
    given = generate.given_to_generate("synced_gpus")
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model) if given is None else given


def why_not(model, generation_config, model_kwargs):
    """Why Transformers' own loop has to decode, or None."""
    cache, config = model_kwargs.get(CACHE_NAME), generation_config
    if model.config.is_encoder_decoder:
        return "the model has an encoder"
    if is_synced(model):
        return "processes wait for each other (synced_gpus)"
    if not isinstance(cache, MethodCache):
        return f"the cache is a {type(cache).__name__}, not one of hf_quest"
    if cache.method.evicts:
        return f"a {type(cache).__name__} cannot take tokens back"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states are asked for"
    return None


def steps_late(device):
    """How many steps the host may be behind the device."""
    return 1 if device.type == "cuda" else 0


class Text:
    """The tokens chosen so far, on the device: what `generate` does with logits, and nothing that waits for them."""

    def __init__(self, input_ids, logits_processor, stopping_criteria, config):
        self.sequence, self.logits_processor, self.stopping_criteria = input_ids, logits_processor, stopping_criteria
        self.do_sample = config.do_sample
        self.num_given = input_ids.shape[1]
        self.is_unfinished = torch.ones(len(input_ids), dtype=torch.int64, device=input_ids.device)
        has_end = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        self.padding = config._pad_token_tensor.to(input_ids.device) if has_end else None
        self.scores = () if config.return_dict_in_generate and config.output_scores else None
        self.logits = () if config.return_dict_in_generate and config.output_logits else None

    def add(self, logits):
        """Choose a token for each row, [B], of [B, T, V] logits."""
        logits = logits[:, -1].to(copy=True, dtype=torch.float32, device=self.sequence.device)
        scores = self.logits_processor(self.sequence, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self.do_sample:
            tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self.padding is not None:
            tokens = tokens * self.is_unfinished + self.padding * (1 - self.is_unfinished)
        self.sequence = torch.cat([self.sequence, tokens[:, None]], dim=-1)
        self.is_unfinished = self.is_unfinished & ~self.stopping_criteria(self.sequence, self.scores)
        return tokens

    @property
    def is_full(self):
        """Whether it has as many tokens as it may."""
        most = self.stopping_criteria.max_length
        return most is not None and self.sequence.shape[1] >= most

    def keep(self, num_tokens):
        """Drop what was chosen after the first `num_tokens`."""
        self.sequence = self.sequence[:, : self.num_given + num_tokens]
        self.scores, self.logits = (None if each is None else each[:num_tokens] for each in (self.scores, self.logits))


class Notes:
    """What the host is told of the steps that the device does: in order, and `steps_late`."""

    def __init__(self, streamer, steps_late):
        self.streamer, self.steps_late = streamer, steps_late
        self.waiting = deque()
        self.num_kept = 0  # steps until all rows were finished, or until the last that was heard of
        self.all_finished = False

    def add(self, is_unfinished, tokens):
        """Have a copy of both, [B], made for the host once the device has them."""
        both, done = torch.stack([is_unfinished, tokens]), None
        if both.is_cuda:
            on_host = torch.empty(both.shape, dtype=both.dtype, device="cpu", pin_memory=True)
            on_host.copy_(both, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(both.device))
            both = on_host
        self.waiting.append((both, done))

    def is_over(self):
        """Whether all rows were finished `steps_late` steps ago."""
        self._hear(self.steps_late)
        return self.all_finished

    def finish(self):
        """How many of the steps count."""
        self._hear(0)
        if self.streamer is not None:
            self.streamer.end()
        return self.num_kept

    def _hear(self, num_left):
        while len(self.waiting) > num_left:
            (is_unfinished, tokens), done = self.waiting.popleft()
            if done is not None:
                done.synchronize()
            if self.all_finished:  # before this step
                continue
            self.num_kept += 1
            self.all_finished = not is_unfinished.any()
            if self.streamer is not None:
                self.streamer.put(tokens)


class Steps:
    """The model's forwards: the prompt, and then a token at a time."""

    def __init__(self, model, config, model_kwargs):
        self.model, self.config, self.model_kwargs = model, config, model_kwargs
        self.cache = model_kwargs[CACHE_NAME]
        is_compiled = model._valid_auto_compile_criteria(model_kwargs, config)
        self.forward = model.get_compiled_call(config.compile_config) if is_compiled else model.__call__
        self.inputs = None  # of the last step
        # Whether those of a step follow from the ones before; None: not known yet.
        self.can_be_foreseen = False if generate.has_own_preparation(model) else None
        self.num_taken = 0

    def read_prompt(self, input_ids):
        return self.model._prefill(input_ids, self.config, self.model_kwargs, is_first_iteration=True)

    def next_inputs(self, sequence, output):
        """What the model is given for the last token of a [B, tokens] sequence, after `output` for the one before."""
        foreseen = self.foresee(sequence)
        if self.can_be_foreseen:
            self.cache.go_on()
            inputs = foreseen
        else:
            inputs = self.prepare(sequence, output)
            if foreseen is not None:
                self.can_be_foreseen = self.cache.can_go_on and are_equal(foreseen, inputs)
        self.inputs = inputs
        return inputs

    def take(self, inputs):
        self.num_taken += 1
        return self.forward(**inputs, return_dict=True)

    def prepare(self, sequence, output):
        model = self.model
        self.model_kwargs = model._update_model_kwargs_for_generation(output, self.model_kwargs)
        return model.prepare_inputs_for_generation(sequence, next_sequence_length=1, **self.model_kwargs)

    def foresee(self, sequence):
        """The inputs of the next step, if they are those of the last one with another token one position later."""
        if self.inputs is None or self.can_be_foreseen is False or has_other_tensors(self.inputs):
            return None
        inputs = {**self.inputs, "input_ids": sequence[:, -1:]}
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + 1
        return inputs

    def keep(self, num_steps):
        """Have the cache forget the steps after the first `num_steps`."""
        if self.num_taken > num_steps:
            self.cache.crop(num_steps - self.num_taken)


def has_other_tensors(inputs):
    """Whether there is a tensor among a step's inputs beside its tokens and their positions: of a mask, say, which the
    next steps may share and some later one may not.
    """
    others = [value for name, value in inputs.items() if name not in ("input_ids", "position_ids")]
    return any(torch.is_tensor(value) for value in tree_leaves(others))


def are_equal(first, second):
    """Whether two steps have equal inputs, of which those that are no tensors are the same objects or equal numbers."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(are_equal(first[name], second[name]) for name in first)
    if torch.is_tensor(first) and torch.is_tensor(second):
        return first.shape == second.shape and first.dtype == second.dtype and bool((first == second).all())
    is_plain = isinstance(first, (bool, int, float, str, type(None))) and type(first) is type(second)
    return first is second or (is_plain and first == second)
