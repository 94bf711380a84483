"""What a fuzzer does to a cache by `generate`, in each of its modes."""

import copy

import torch
from fuzz_run import LONGEST, MAX_ROWS, TOLERANCE, Run, Skip, Wrong
from fuzz_truth import positions_of
from test_families import build

from hf_quest import CACHE_NAME, QuestError, decode_ahead
from hf_quest.seam import ahead


class Generating(Run):
    def generate(self, tokens, padding, answer, hide=None, copies=1, pieces=None, **options):
        """Answers [B · copies, answer] to `tokens` more tokens, and the check of the logits that they come from."""
        if not self.is_first and self.num_slots + tokens + answer > LONGEST:
            raise Skip
        self.check_room(tokens + answer)
        shown = self.shown_of(tokens, padding)
        mask, new = self.own_mask(shown), self.new_ids(tokens)
        if hide is not None:
            mask[:, int(hide[0] * self.num_slots) : int(hide[1] * self.num_slots)] = 0
            self.check_alike(mask)
        ids = torch.cat([self.truth.text.ids, new], dim=1)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=answer,
            return_dict_in_generate=True,
            output_logits=True,
            **{CACHE_NAME: self.cache, "do_sample": False, **options},
        )
        first, rows = self.num_slots, torch.arange(self.num_rows).repeat_interleave(copies)
        self.truth.rows(rows)
        fed = torch.cat([new[rows], output.sequences[:, ids.shape[1] : -1]], dim=1)
        positions = positions_of(mask)[rows, first:]
        later = positions[:, -1:] + torch.arange(1, answer)
        mask = torch.nn.functional.pad(mask[rows], (0, answer - 1), value=1)
        pieces = [*(pieces or [tokens]), *[1] * (answer - 1)]
        expected = self.truth.extend(fed, mask, torch.cat([positions, later], dim=1), pieces)
        logits = torch.stack(output.logits, dim=1)
        self.check(logits[:, :answer], expected[:, tokens - 1 :], first, slice(first + tokens - 1, None))

    def do_greedy(self, hide=None, **arguments):
        self.generate(hide=hide, **arguments)

    def do_sample(self, copies, **arguments):
        if not self.is_first:
            copies = 1
        copies = min(copies, MAX_ROWS // self.num_rows)
        self.generate(copies=copies, do_sample=True, top_k=20, num_return_sequences=copies, **arguments)

    def do_ahead(self, late, **arguments):
        """The loop that looks at a token some steps late."""
        steps_late, ahead.steps_late = ahead.steps_late, lambda device: late
        try:
            self.generate(custom_generate=decode_ahead, **arguments)
        finally:
            ahead.steps_late = steps_late

    def do_chunked(self, chunk, tokens, **arguments):
        """A prompt that `generate` itself cuts into chunks."""
        if not self.is_first:
            raise Skip  # Transformers 5.17 slices such a prompt from the start of the text
        pieces = [min(chunk, tokens - done) for done in range(0, tokens, chunk)]
        self.check_alike(self.shown_of(tokens, arguments["padding"]))
        self.generate(tokens=tokens, pieces=pieces, prefill_chunk_size=chunk, **arguments)

    def drafted(self, **arguments):
        if self.num_rows != 1 or not self.is_first:
            raise Skip  # Transformers feeds a text again that the cache holds, with a stock cache too
        if not self.evicts:
            self.generate(**arguments)
            return
        with self.refused(QuestError, "cannot take tokens back"):
            self.generate(**arguments)

    def do_lookup(self, drafts, **arguments):
        self.drafted(prompt_lookup_num_tokens=drafts, **arguments)

    def do_assistant(self, **arguments):
        self.drafted(assistant_model=build("qwen3", "sdpa"), **arguments)

    def do_beams(self, tokens, padding, beams, answer):
        """The scores of beams; the cache itself stays as it was."""
        beams = min(beams, MAX_ROWS // self.num_rows)
        if beams < 2:
            raise Skip
        self.check_room(tokens + answer)
        kept_cache, kept_truth = copy.deepcopy(self.cache), copy.deepcopy(self.truth)
        if not self.is_first:
            self.cache.batch_repeat_interleave(beams)
        shown = torch.ones(self.num_rows, tokens, dtype=torch.long)
        mask, new, first = self.own_mask(shown), self.new_ids(tokens), self.num_slots
        ids = torch.cat([self.truth.text.ids, new], dim=1)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=answer,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
            **{CACHE_NAME: self.cache, "do_sample": False},
        )
        rows = torch.arange(self.num_rows).repeat_interleave(beams)
        self.truth.rows(rows)
        answers = output.sequences[:, ids.shape[1] :]
        fed, positions = torch.cat([new[rows], answers[:, :-1]], dim=1), positions_of(mask)[rows, first:]
        positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, answer)], dim=1)
        mask = torch.nn.functional.pad(mask[rows], (0, answer - 1), value=1)
        expected = self.truth.extend(fed, mask, positions, [tokens, *[1] * (answer - 1)])

        def scores(logits):
            log_probs = logits[:, tokens - 1 :].float().log_softmax(dim=-1)
            return log_probs.gather(2, answers[..., None]).sum(dim=(1, 2))

        def is_far(logits, others):  # a sum of `answer` differences of logits, each of a few roundings
            return (scores(logits) - scores(others)).abs().max().item() > TOLERANCE * 10 * answer

        self.checks += 1
        if self.is_exact:
            found = (output.sequences_scores - scores(expected)).abs().max().item()
            if found > TOLERANCE * 10 * answer:
                self.truth.check_sure(first, is_far)
                raise Wrong(f"scores of beams differ by {found:.2g}")
        self.cache, self.truth = kept_cache, kept_truth
