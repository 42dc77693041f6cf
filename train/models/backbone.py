"""A causal language model as one module: a packed batch in, the token log-probabilities of its
responses out.

Body and head are called inside this module's forward, so that ZeRO-3's hooks see both.

Legend: L tokens, T scored tokens, N responses, P the longest prompt with its response, V
vocabulary, H hidden size.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from train.models import attention, buckets, layers
from train.models.lm_head import default_logits_bytes, token_logps
from train.models.pretrained import load_causal_lm

LAYOUTS = ("packed", "padded")

# Configuration fields that change logits or attention in a way that the packed path does not
# compute.
UNSUPPORTED = {
    "attn_logit_softcapping": "soft-capped attention",
    "final_logit_softcapping": "soft-capped logits",
    "logit_scale": "scaled logits",
    "logits_scaling": "scaled logits",
    "alibi": "ALiBi position biases",
    "attention_chunk_size": "chunked attention",
    "is_encoder_decoder": "an encoder-decoder",
}
# Words in a configuration's layer_types, of layers that carry a state along the sequence or attend
# in chunks of it: a packed batch would run one response into the next.
STATEFUL = ("linear_attention", "mamba", "recurrent", "conv", "chunked_attention")


class PackedModel(nn.Module):
    """Wraps a model of transformers, whose body it runs over packed batches: what models with a
    vocabulary's head (Backbone) and with a scalar's (heads.ScoreModel) share.

    `layout`: "packed" (shared prompts, no padding) or "padded" (plain). `autocast`: a dtype that
    the forward pass computes in over the module's own weights, or None.

    Raises ValueError where the model cannot be trained packed, with the reason and the flag that
    helps.
    """

    # Gives the module again with its weights in fp32, where those of this one are rounded: what a
    # trained model's fp32 masters begin from (engine/loading.py).
    load_in_fp32: Callable | None = None
    # Whether gradients on CUDA are the same bits each time, those of long segments too.
    deterministic = False
    # Whether the body gets batches in the shapes of a few buckets (buckets.py), as compiled layers
    # need them (compiled.py).
    static_shapes = False
    # Options of the forward passes that are compared at a run's start and after its export.
    compared_with: tuple[dict, ...] = ({},)

    def __init__(self, lm, layout="packed", autocast=None):
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
        self.lm = lm
        self.layout = layout
        self.autocast = autocast
        disable_dropout(lm)
        layers.swap(lm)
        if layout == "packed":
            refuse_unsupported(lm)
            attention.register()
            lm.set_attn_implementation(attention.NAME)

    @property
    def body(self):
        """The model without its head: token ids in, final hidden states out."""
        return getattr(self.lm, self.lm.base_model_prefix)

    def checkpoint_activations(self):
        """Keep each layer's input only, and run the layer again in the backward pass."""
        self.lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.lm.train()  # transformers recomputes in training mode only; dropout is 0 either way

    def forward(self, batch, **options):
        """What the layout's `packed` or `padded` makes of the batch, under autocast if there is one."""
        compute = self.packed if self.layout == "packed" else self.padded
        if self.autocast is None:
            return compute(batch, **options)
        with torch.autocast(batch.input_ids.device.type, self.autocast):
            return compute(batch, **options)

    def packed_hidden(self, batch):
        """(L, H): the final hidden states of a packed batch."""
        row, num_tokens = batch, len(batch.input_ids)
        if self.static_shapes:
            has_flash = attention.has_flash(batch.input_ids.device)
            segments = buckets.static_segments(batch, has_flash, self.deterministic)
            row = segments.batch
        else:
            segments = attention.Segments(batch, self.deterministic)
        hidden = self.body(
            input_ids=row.input_ids[None],
            position_ids=row.positions[None],
            use_cache=False,
            segments=segments,
        ).last_hidden_state[0]
        return hidden[:num_tokens] if self.static_shapes else hidden  # the junk ends here


def rows(hidden, index):
    """hidden[index], (L, H), (n,) -> (n, H), with a gradient that adds up in a fixed order: the last
    position of a prompt is there for each of its responses.
    """
    if hidden.is_cuda:
        return hidden[index]  # that of index_select is added up with atomics there
    return hidden.index_select(0, index)


class Padded(NamedTuple):
    """A batch as one padded sequence a response: what packing is measured against."""

    input_ids: torch.Tensor  # (N, P), padded on the right
    mask: torch.Tensor  # (N, P) 1 where there is a token
    scored: torch.Tensor  # (N, P) bool: the tokens whose log-probability counts

    @classmethod
    def of(cls, batch):
        """The batch's responses, each with its prompt. Of the empty batch its dummy tokens, of which
        none is scored, since they are run too.
        """
        sequences = list(batch.sequences()) or [(batch.input_ids, len(batch.input_ids))]
        longest = max(len(ids) for ids, _ in sequences)
        input_ids = batch.input_ids.new_zeros(len(sequences), longest)
        mask = torch.zeros_like(input_ids)
        scored = torch.zeros_like(input_ids, dtype=torch.bool)
        for i, (ids, first_scored) in enumerate(sequences):
            input_ids[i, : len(ids)] = ids
            mask[i, : len(ids)] = 1
            scored[i, first_scored : len(ids)] = True
        return cls(input_ids, mask, scored)


class Backbone(PackedModel):
    """A causal LM as one module: see PackedModel. `logits_bytes`: see `token_logps`."""

    gives = "log-probabilities"
    unit = "nats a token"
    gap_name = "export_gap_nats_per_token"  # of `distance` between it and its export, in run.json

    def __init__(self, lm, layout="packed", logits_bytes=None, autocast=None):
        if lm.get_output_embeddings() is None:
            raise ValueError(f"{type(lm).__name__} has no output head: not a causal language model")
        super().__init__(lm, layout, autocast)
        self._logits_bytes = logits_bytes

    @property
    def logits_bytes(self) -> int:
        """Bytes of logits that are made at once."""
        return self._logits_bytes or default_logits_bytes(self.head.weight.device)

    @property
    def head(self):
        """The layer behind the body, and with `head_rows` what it costs."""
        return self.lm.get_output_embeddings()

    def head_rows(self, batch) -> int:
        """Tokens that the head is computed for."""
        return batch.target.shape[0]

    @staticmethod
    def distance(logps, other) -> float:
        """How far two (T,) of log-probabilities are from each other, in `unit`."""
        return float((logps - other).abs().mean())

    def load_again(self, folder, trust_remote_code, device) -> "Backbone":
        """The model in `folder`, in the weights' type and computed in the same way."""
        dtype = next(self.parameters()).dtype
        lm = load_causal_lm(folder, dtype, trust_remote_code).to(device)
        return Backbone(lm, self.layout, self._logits_bytes, self.autocast)

    def forward(self, batch, log_p2=False, temperature=1.0, entropy=False):
        """Log-probabilities of the batch's scored tokens, (T,) nats in fp32 (fp64 for fp64
        weights), of distributions whose logits are divided by `temperature`.

        With `log_p2` a second (T,) beside them, without gradient: log sum_v p_v^2 of each token's
        distribution; with `entropy` its entropy, in nats.
        """
        return super().forward(batch, log_p2=log_p2, temperature=temperature, entropy=entropy)

    def packed(self, batch, log_p2, temperature, entropy):
        """`forward` without padding."""
        hidden = self.packed_hidden(batch)  # (L, H)
        return token_logps(
            rows(hidden, batch.hidden_index),  # (T, H): prompts never reach the head
            self.head.weight,  # (V, H)
            batch.target,  # (T,)
            bias=getattr(self.head, "bias", None),  # (V,)
            logits_bytes=self.logits_bytes,
            log_p2=log_p2,
            temperature=temperature,
            entropy=entropy,
        )

    def padded(self, batch, log_p2, temperature, entropy):
        """`forward` with one padded sequence a response, all logits."""
        input_ids, mask, scored = Padded.of(batch)
        logits = self.lm(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        # position i predicts token i + 1
        # (N, P - 1, V) nats
        all_logps = torch.log_softmax(logits.to(wide) / temperature, dim=-1)[:, :-1]
        scored = scored[:, 1:]  # (N, P - 1)
        logps = all_logps.gather(2, input_ids[:, 1:, None]).squeeze(2)[scored]  # (T,) nats
        if log_p2:
            return logps, all_logps[scored].detach().mul(2).logsumexp(1)
        if entropy:
            all_logps = all_logps[scored].detach()
            return logps, torch.special.entr(all_logps.exp()).sum(1)
        return logps


def outputs_to_compare(call, module, batch):
    """What `call`, a PackedModel or what wraps it, gives for a batch under each of the options that
    `module`, the model itself, is compared with: (C,).
    """
    return torch.cat([call(batch, **options) for options in module.compared_with])


@contextlib.contextmanager
def plain_forward(model):
    """Inside, the same weights of a PackedModel the plain way: transformers' own layers, one padded
    sequence a response. For checks.
    """
    lm = model.lm
    layout = model.layout
    attention_name = lm.config._attn_implementation
    model.layout = "padded"
    layers.swap_back(lm)
    lm.set_attn_implementation(own_attention(lm))
    try:
        yield model
    finally:
        model.layout = layout
        layers.swap(lm)
        lm.set_attn_implementation(attention_name)


def own_attention(lm):
    """The name of the attention that transformers itself would run `lm` with."""
    return "sdpa" if lm._supports_sdpa else "eager"


def disable_dropout(model):
    """Set every dropout probability to 0: policy and reference must agree, whatever mode the module
    is in.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # attention modules keep theirs as a number, under various names
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def refuse_unsupported(lm):
    """Raise ValueError for a model that the packed path would compute wrongly; see also the check
    at a run's start.
    """
    kind = type(lm).__name__
    reason = _unsupported(lm)
    if reason is not None:
        raise ValueError(
            f"{kind} has {reason}, which packed batches do not support: pass --layout padded"
        )


def _unsupported(lm):
    """What the packed path does not compute of a model, in words; None where there is nothing."""
    config = lm.config.get_text_config()
    for field, reason in UNSUPPORTED.items():
        value = getattr(config, field, None)
        # None, False and a scale of 1: the field is there and off
        if value is not None and value is not False and value != 1.0:
            return reason
    for layer_type in getattr(config, "layer_types", None) or ():
        if any(word in layer_type for word in STATEFUL):
            return f"{layer_type} layers"
    if not lm._supports_attention_backend:
        return "an attention of its own"
    if any(hasattr(module, "sinks") for module in lm.modules()):
        return "attention sinks"
    return None
