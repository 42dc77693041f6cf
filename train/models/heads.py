"""A language model with one number for a head: a packed batch in, scores of its responses or values
of its tokens out.

Reward model and value model are the same module, and what it wraps is transformers' own class for
sequence classification with one label, so that its save_pretrained is the export. Where the
checkpoint has no head (a causal language model has the same body), the head is drawn.

Legend: L tokens, T scored tokens, N responses, P the longest prompt with its response, H hidden size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from train.models.backbone import PackedModel, Padded, rows
from train.models.pretrained import load_score_model

HEAD = "score"  # transformers' name for it, a linear layer (1, H) without bias
PLACES = ("last", "before")


class Score(nn.Linear):
    """The head, computed in fp32 at least whatever the body computes in: the last digits of bf16
    scores of a hundredth would be the difference that a pair is judged by.

    Its weight is read in here alone, for under ZeRO-3 that is where it is whole.
    """

    @classmethod
    def take(cls, head: nn.Linear):
        """Let a head that is there compute so."""
        head.__class__ = cls

    def forward(self, hidden):
        """(..., H) -> (..., 1)"""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), self.weight.to(wide), bias)


class ScoreModel(PackedModel):
    """A model of transformers for sequence classification with one label; see PackedModel.

    Raises ValueError where its head is of another kind.
    """

    gives = "scores"
    unit = "of their mean size"
    gap_name = "export_gap_of_scores"  # of `distance` between it and its export, in run.json
    # Values too: what few scores come to is a matter of luck, in bf16 where they happen to be small
    # a relative difference of several times that of the hidden states.
    compared_with = ({"at": "last"}, {"at": "before"})

    def __init__(self, lm, layout="packed", autocast=None, shift: float = 0.0):
        """shift: subtracted from what the head gives, which has no bias."""
        head = getattr(lm, HEAD, None)
        if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
            raise ValueError(f"{type(lm).__name__} has no head {HEAD} of one output without bias")
        Score.take(head)
        super().__init__(lm, layout, autocast)
        self.shift = shift

    @property
    def head(self):
        """The layer behind the body, and with `head_rows` what it costs."""
        return getattr(self.lm, HEAD)

    def head_rows(self, batch) -> int:
        """Tokens that the head is computed for, in training."""
        return batch.num_responses

    @staticmethod
    def distance(scores, other) -> float:
        """How far two (C,) of scores are from each other, in `unit`: a score has no scale of its
        own, and the larger they are, the more their last digits are worth.
        """
        return float((scores - other).abs().mean() / other.abs().mean().clamp(min=1))

    def load_again(self, folder, trust_remote_code, device) -> "ScoreModel":
        """The model in `folder`, in the weights' type and computed in the same way."""
        dtype = next(self.parameters()).dtype
        lm, _ = load_score_model(folder, dtype, trust_remote_code)
        return ScoreModel(lm.to(device), self.layout, self.autocast, self.shift)

    def forward(self, batch, at="last"):
        """In fp32 or wider; at="last": (N,), the score at each response's last token; at="before":
        (T,), the value of the state before each scored token, where that has not been chosen yet.
        """
        if at not in PLACES:
            raise ValueError(f"at {at!r} is none of {', '.join(PLACES)}")
        scores = super().forward(batch, at=at)
        return scores - self.shift if self.shift else scores

    def packed(self, batch, at):
        """`forward` without padding."""
        if at == "before":
            index = batch.hidden_index  # (T,)
        else:
            # a segment ends with its response; the empty batch has one of dummy tokens
            index = batch.cu_q[1 : 1 + batch.num_responses] - 1  # (N,)
        hidden = rows(self.packed_hidden(batch), index)  # (T or N, H)
        return self.head(hidden).squeeze(1)

    def padded(self, batch, at):
        """`forward` with one padded sequence a response."""
        input_ids, mask, scored = Padded.of(batch)
        hidden = self.body(
            input_ids=input_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state  # (N, P, H)
        if at == "before":  # position i is the state before token i + 1
            hidden = hidden[:, :-1][scored[:, 1:]]  # (T, H)
        else:
            rows = torch.arange(batch.num_responses, device=mask.device)
            hidden = hidden[rows, mask.sum(1)[rows] - 1]  # (N, H)
        return self.head(hidden).squeeze(1)


@torch.no_grad()
def draw_head(weight, seed: int | None):
    """Fill a head's weight (1, H) from N(0, 1 / sqrt(H + 1)), the second number a standard
    deviation: scores then begin at about the size of one hidden dimension. seed None: with zeros.

    Stiennon et al. 2020 (arXiv 2009.01325), whose code draws it so; Huang et al. 2024 (arXiv
    2403.17031) list it among the details that matter. The same values on every rank, whatever the
    weight's type, and torch's generator stays as it was.
    """
    if seed is None:
        weight.zero_()
        return
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(weight.shape, generator=random) / math.sqrt(weight.shape[-1] + 1)
    weight.copy_(values)
