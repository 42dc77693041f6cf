"""Rewards for what a model writes: scores that a reward model gives to finished conversations.

The reward model is anybody's: a directory that transformers loads for sequence classification,
with a tokenizer and a chat template of its own, which need not be the policy's. A conversation is
therefore passed as messages and text, not as the policy's token ids.
"""

import contextlib
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from train.data.chat import Chat, tail_ids, tokenise
from train.data.errors import DataError, RowError
from train.engine import dist, ds_config, loading, preemption
from train.engine.offload import Offloaded
from train.models.heads import HEAD, Score
from train.models.pretrained import load_score_model, load_tokenizer
from train.run import card

SHOWN = 200  # characters of a prompt or an answer in an error
AT_ONCE = 4096  # tokens of texts that are scored together, padding included


class Prompt(NamedTuple):
    """A prompt to be answered."""

    row: int  # number of the first data row that has it
    ids: tuple[int, ...]  # as training sees it, the assistant's header included
    messages: list  # [{"role": ..., "content": ...}], ends with a user's turn
    template_args: dict | None = None  # what else the chat template gets: tools, documents, ...


def prompts_of(data) -> list[Prompt]:
    """All of a data.prompts.Prompts."""
    asked = map(data.asked, range(len(data)))
    return [
        Prompt(int(data.data.rows[i]), data.ids(i), each.messages, each.template_args)
        for i, each in enumerate(asked)
    ]


class OwnClass:
    """A model for sequence classification as its own class computes it: a packed batch in, the
    scores of its responses out.
    """

    def __init__(self, lm, batch_tokens: int, autocast: torch.dtype | None, forward=None):
        """batch_tokens: padding included, that are computed at once. forward: runs `lm`, where it does
        not do that itself.
        """
        self.lm, self.batch_tokens, self.autocast = lm, batch_tokens, autocast
        self._forward = forward or lm

    def __call__(self, batch) -> torch.Tensor:
        """(N,) scores, without gradient."""
        sequences = [ids for ids, _ in batch.sequences()]
        scores = torch.zeros(len(sequences), device=batch.input_ids.device)
        for part in self.parts([len(ids) for ids in sequences]):
            scores[part] = self.together([sequences[i] for i in part])
        return scores

    def together(self, sequences: list[torch.Tensor]) -> torch.Tensor:
        """(n,): the scores of n sequences, (L,) each, padded on the right to the longest."""
        longest = max(map(len, sequences))
        pad = self.lm.config.get_text_config().pad_token_id
        input_ids = sequences[0].new_full((len(sequences), longest), pad or 0)
        mask = torch.zeros_like(input_ids)
        for place, ids in enumerate(sequences):
            input_ids[place, : len(ids)] = ids
            mask[place, : len(ids)] = 1
        return self.scores(input_ids, mask)

    def parts(self, lengths: list[int]) -> list[list[int]]:
        """Sequences by number, computed at once: neighbours in length, within the budget; one at a
        time for a class without pad token, which takes no more.
        """
        alone = self.lm.config.get_text_config().pad_token_id is None
        parts = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            if alone or not parts or (len(parts[-1]) + 1) * lengths[i] > self.batch_tokens:
                parts.append([])
            parts[-1].append(i)
        return parts

    @torch.no_grad()
    def scores(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, L) token ids and 1 where there is one -> (n,) fp32."""
        kind = input_ids.device.type
        with torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            logits = self._forward(input_ids=input_ids, attention_mask=mask).logits  # (n, 1)
        return logits[:, 0].float()

    def alone(self, ids: torch.Tensor) -> torch.Tensor:
        """(1,): the score of one sequence (L,)."""
        return self.scores(ids[None], torch.ones_like(ids)[None])

    def reads_last(self, ids: torch.Tensor) -> bool | None:
        """Whether the score of a sequence (L,) is read at its last token; None where the class does
        not show it: it has no head over every token.
        """
        seen = []
        head = getattr(self.lm, HEAD, None)
        if not isinstance(head, torch.nn.Module):
            return None
        hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            score = self.alone(ids)
        finally:
            hook.remove()
        if len(seen) != 1 or not torch.is_tensor(seen[0]) or seen[0].shape != (1, len(ids), 1):
            return None
        if not score.isfinite().all():  # which equals nothing
            return None
        return bool(torch.equal(seen[0][0, -1].float(), score))


class RewardModel:
    """A directory that AutoModelForSequenceClassification loads, with one output, and its own
    tokenizer and template.

    A finished answer is scored as everybody renders it, the template's tail behind the end token
    included; one that was cut has neither, and is cut again where it takes more of this model's
    tokens than it has positions. The class reads its score off the rightmost token that is not pad.
    `description` names that token.
    """

    def __init__(
        self,
        path,
        device: torch.device,
        autocast: torch.dtype | None = None,
        trust_remote_code: bool = False,
        offload: bool = False,
        batch_tokens: int = AT_ONCE,
        config: dict | None = None,
    ):
        """offload: it lies in main memory between uses. batch_tokens: as OwnClass's. config: a resolved
        DeepSpeed configuration; with stage 3 the weights stay in shards, in bf16 where it says so, and
        else each rank has them all. ValueError: not loadable, no head in it, more than one output, no
        chat template, shards to be offloaded. Every rank calls this.
        """
        config = config or {}
        self.sharded = ds_config.zero_stage(config) == 3
        if offload and self.sharded:
            raise ValueError(
                "--offload_frozen is for a reward model that stands whole on each rank; a sharded one "
                "is offloaded by offload_param in its --reward_ds_config"
            )
        narrow = self.sharded and "bf16" in config
        with loading.sharded_load(config):
            self.model, _ = load_score_model(
                path, torch.bfloat16 if narrow else torch.float32, trust_remote_code
            )
        self.model.requires_grad_(False)
        head = getattr(self.model, HEAD, None)
        if type(head) is torch.nn.Linear:
            Score.take(head)  # in bf16, answers of about the same worth would be worth the same
        self.tokenizer = load_tokenizer(path, trust_remote_code)
        # A model's own text is judged as the template renders it, whatever is in it.
        self.chat = Chat(
            self.tokenizer,
            allow_control_tokens=True,
            allow_template_changes=True,
            keep_tail=True,
        )
        self._warned = set()  # of what
        # what the template writes behind an answer: the end token, and a tail
        self.ending = tail_ids(self.tokenizer)
        self.model.eval()
        self.model.config.get_text_config().use_cache = False
        forward = loading.frozen_forward(self.model, config)
        self.own = OwnClass(self.model, batch_tokens, None if narrow else autocast, forward)
        self.device, self.path = device, path
        if offload:
            self._place = Offloaded(self.model, device)
        else:
            if not self.sharded:
                self.model.to(device)
            self._place = contextlib.nullcontext()
        with self._place:
            self._check_pooling()

    def _check_pooling(self):
        """Warn where a finished answer's score is not read off its last token."""
        ids = self.ids([{"role": "user", "content": "question"}], "answer", ended=True)
        self._check_ids(ids)
        if self.own.reads_last(torch.tensor(ids, device=self.device)) is False:
            logging.getLogger("zeropref").warning(
                "--reward_model %s reads its scores off %r, not off the last token of a finished "
                "answer, %r: its pad token, id %s, is what the chat template ends with",
                self.path,
                self.description["reads"],
                self.tokenizer.convert_ids_to_tokens(ids[-1]),
                self.model.config.get_text_config().pad_token_id,
            )

    def check(self, prompts: Sequence[Prompt], max_new_tokens: int):
        """ValueError where a conversation may outrun the model's positions, or has a token that it
        lacks.
        """
        positions = self.positions
        longest = 0
        for prompt in prompts:
            ids = self._prompt_ids(prompt.messages, prompt.template_args)
            self._check_ids(ids)
            longest = max(longest, len(ids))
        longest += max(len(self.ending) - 1, 0)  # the end token is a new one, the tail is not
        if positions and longest + max_new_tokens > positions:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {positions} "
                f"positions of --reward_model {self.path}: lower --max_new_tokens, or leave out long prompts"
            )

    @property
    def description(self) -> dict:
        """The model's name, and the token off which a finished answer's score is read."""
        ids = self.ids([{"role": "user", "content": "question"}], "answer", ended=True)
        pad = self.model.config.get_text_config().pad_token_id
        pooled = next(token for token in reversed(ids) if token != pad)
        return {
            "name": card.shown(self.path),
            "reads": self.tokenizer.convert_ids_to_tokens(pooled),
        }

    @property
    def positions(self) -> int | None:
        """The most tokens of a text; None: no bound is known."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def ids(self, messages, text: str, ended: bool, template_args: dict | None = None) -> list[int]:
        """The conversation's token ids as everybody renders it; an answer that was cut gets neither
        end token nor tail. template_args: what else the template gets.

        An answer that the template refuses, and models write anything, follows the prompt as it is.
        """
        if not text.strip():  # some templates leave out the turn of an empty answer
            return [*self._prompt_ids(messages, template_args), *(self.ending if ended else ())]
        try:
            ids = self.chat.finished_ids(messages, text, template_args)
        except RowError as error:
            self._warn_once(
                "refused",
                "an answer is scored as it stands behind its prompt, since %s",
                error,
            )
            [ids] = tokenise(self.tokenizer, [text])
            ids = [*self._prompt_ids(messages, template_args), *ids, *self.ending]
        is_whole = ended or ids[len(ids) - len(self.ending) :] != self.ending
        return ids if is_whole else ids[: len(ids) - len(self.ending)]

    def _prompt_ids(self, messages, template_args: dict | None) -> list[int]:
        try:
            return self.chat.prompt_ids(messages, template_args)
        except RowError as error:
            raise ValueError(
                f"--reward_model {self.path}: a prompt of the data cannot be rendered: {error}; leave "
                "such rows out, or put a chat_template.jinja that takes them into its folder"
            ) from error

    def _warn_once(self, what: str, line: str, *args):
        """A warning about `what`, with the model's name before it."""
        if what not in self._warned:
            self._warned.add(what)
            logging.getLogger("zeropref").warning(f"--reward_model %s: {line}", self.path, *args)

    def score(
        self,
        conversations: Sequence[list],
        texts: Sequence[str],
        ended: Sequence[bool],
        template_args: Sequence[dict | None] | None = None,
    ) -> np.ndarray:
        """(N,) fp64 scores of N answers, in the reward model's own unit, on every rank. Every rank
        calls this.

        conversations: the messages that each answer follows. ended: whether it ends by itself.
        template_args: what the chat template gets besides for each; None: nothing. Texts of about the
        same length are scored at once; which, is planned for the whole job and dealt to the ranks, so
        that no digit depends on their number.
        """
        besides = template_args or [None] * len(texts)
        every = zip(conversations, texts, ended, besides, strict=True)
        of_answers = [tuple(self._fitting(self.ids(*each))) for each in every]
        # Each text once: two of a group would else differ by what padding rounds, and a deviation of
        # nothing else is what advantages are divided by.
        ids = list(dict.fromkeys(of_answers))
        try:
            for each in ids:
                self._check_ids(each)
        except ValueError as error:  # of an answer: the run is under way
            raise DataError(str(error)) from error
        parts = self.own.parts([len(each) for each in ids])
        mine = []  # (number of the text, score)
        with self._place:
            for first in range(0, len(parts), dist.world_size()):
                preemption.raise_if_preempted()
                number = first + dist.rank()
                if number >= len(parts) and not self.sharded:
                    continue
                # ranks gather shards together: one that has nothing to do computes the shortest again
                part = parts[number] if number < len(parts) else parts[0]
                sequences = [torch.tensor(ids[i], device=self.device) for i in part]
                scores = self.own.together(sequences).tolist()
                if number < len(parts):
                    mine += zip(part, scores, strict=True)
        preemption.raise_if_preempted()
        everyone = sorted(pair for part in dist.all_gather(mine) for pair in part)
        score_of = {ids[i]: score for i, score in everyone}
        scores = [score_of[each] for each in of_answers]
        for messages, text, score in zip(conversations, texts, scores, strict=True):
            if not math.isfinite(score):
                raise DataError(
                    f"--reward_model {self.path} gives {score} for the answer {text[:SHOWN]!r} to "
                    f"{messages[-1]['content'][:SHOWN]!r}: try --precision fp32, or another model"
                )
        return np.array(scores)

    def _fitting(self, ids: list[int]) -> list[int]:
        """As many ids as the model has positions for. `check` cannot know how many of them an answer
        takes: the policy counts its length in tokens of its own.
        """
        if self.positions is None or len(ids) <= self.positions:
            return ids
        self._warn_once(
            "positions",
            "it has %s positions, and a conversation takes %s of its tokens: such answers are scored as if "
            "they were cut there; lower --max_new_tokens",
            self.positions,
            len(ids),
        )
        return ids[: self.positions]

    def _check_ids(self, ids: Sequence[int]):
        """ValueError for a token that the model has no embedding for."""
        size = self.model.config.get_text_config().vocab_size
        if max(ids, default=0) >= size:
            raise ValueError(
                f"the tokenizer of --reward_model {self.path} makes token {max(ids):,}, and the model "
                f"has {size:,}: they are not of one model"
            )
