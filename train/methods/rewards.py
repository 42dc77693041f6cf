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

from train.data.chat import Chat
from train.engine import dist
from train.engine.offload import Offloaded
from train.models.pretrained import load_score_model, load_tokenizer
from train.run import card


class Prompt(NamedTuple):
    """A prompt to be answered."""

    row: int  # number of the first data row that has it
    ids: tuple[int, ...]  # as training sees it, the assistant's header included
    messages: list  # [{"role": ..., "content": ...}], ends with a user's turn


class RewardModel:
    """A directory that AutoModelForSequenceClassification loads, with one output, and its own
    tokenizer and template.

    A finished answer is scored as everybody renders it, the template's tail behind the end token
    included; one that was cut has neither. The class reads its score off the rightmost token that
    is not pad. `description` names that token.
    """

    def __init__(
        self,
        path,
        device: torch.device,
        autocast: torch.dtype | None = None,
        trust_remote_code: bool = False,
        offload: bool = False,
    ):
        """offload: it lies in main memory between uses. ValueError: not loadable, no head in it, more
        than one output, no chat template.
        """
        self.model, _ = load_score_model(path, torch.float32, trust_remote_code)
        self.tokenizer = load_tokenizer(path, trust_remote_code)
        # A model's own text is judged as the template renders it, whatever is in it.
        self.chat = Chat(
            self.tokenizer,
            allow_control_tokens=True,
            allow_template_changes=True,
            keep_tail=True,
        )
        # what the template writes behind an answer: the end token, and a tail
        ids = self.chat.whole_ids([{"role": "user", "content": "question"}], "answer")
        self.ending = []
        if self.chat.end_id in ids:
            self.ending = ids[len(ids) - 1 - ids[::-1].index(self.chat.end_id) :]
        self.model.eval()
        self.device, self.autocast, self.path = device, autocast, path
        if offload:
            self._place = Offloaded(self.model, device)
        else:
            self.model.to(device)
            self._place = contextlib.nullcontext()
        with self._place:
            self._check_pooling()

    def _check_pooling(self):
        """Warn where a finished answer's score is not read off its last token.

        A causal model's hidden states do not depend on what follows them: where another token is
        read, the score is the same without the last. A model that sees both ways passes, rightly.
        """
        ids = self.ids([{"role": "user", "content": "question"}], "answer", ended=True)
        if math.isclose(self._score(ids), self._score(ids[:-1]), rel_tol=1e-5, abs_tol=1e-6):
            logging.getLogger("zeropref").warning(
                "--reward_model %s reads its scores off %r, not off the last token of a finished "
                "answer, %r: its pad token, id %s, is what the chat template ends with",
                self.path,
                self.description["reads"],
                self.tokenizer.convert_ids_to_tokens(ids[-1]),
                self.model.config.get_text_config().pad_token_id,
            )

    def check(self, prompts: Sequence[Prompt], max_new_tokens: int):
        """ValueError where a conversation may outrun the model's positions."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max((len(self.chat.prompt_ids(prompt.messages)) for prompt in prompts), default=0)
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

    def ids(self, messages, text: str, ended: bool) -> list[int]:
        """The conversation's token ids as everybody renders it; an answer that was cut gets neither
        end token nor tail.
        """
        if not text.strip():  # Chat refuses an empty response, but its end can be read
            return [*self.chat.prompt_ids(messages), *self.ending]
        ids = self.chat.whole_ids(messages, text)
        return ids if ended else ids[: len(ids) - len(self.ending)]

    def score(
        self, conversations: Sequence[list], texts: Sequence[str], ended: Sequence[bool]
    ) -> np.ndarray:
        """(N,) fp64 scores of N answers, in the reward model's own unit, on every rank. Every rank
        calls this.

        conversations: the messages that each answer follows. ended: whether it ends by itself. One
        conversation is scored at a time, so that no score depends on its neighbours; the ranks deal
        them out.
        """
        mine = []  # (number of the answer, score)
        with self._place:
            for i in range(dist.rank(), len(texts), dist.world_size()):
                mine.append((i, self._score(self.ids(conversations[i], texts[i], ended[i]))))
        everyone = sorted(pair for part in dist.all_gather(mine) for pair in part)
        return np.array([score for _, score in everyone])

    @torch.no_grad()
    def _score(self, ids: list[int]) -> float:
        """The score of one text."""
        device = self.device
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            batch = torch.tensor([ids], device=device)
            logits = self.model(input_ids=batch, use_cache=False).logits  # (1, 1)
        return float(logits[0, 0])
