"""A causal language model as one module: a packed row in, the token log-probabilities of its
responses out.

Body and head are called inside this module's forward, so that ZeRO-3's hooks see both.
"""

import contextlib

import torch
from torch import nn

from train.models import attention, layers
from train.models.lm_head import LOGITS_BYTES, token_logps

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
STATEFUL = ("linear_attention", "mamba", "recurrent", "conv", "chunked_attention")


class Backbone(nn.Module):
    """Wraps a causal LM of transformers. `layout`: "packed" (shared prompts, no padding) or
    "padded" (plain).
    """

    def __init__(self, lm, layout="packed", logits_bytes=LOGITS_BYTES, autocast=None):
        """`autocast`: a dtype that the forward pass computes in over the module's own weights, or
        None.

        Raises ValueError where the model cannot be trained packed, with the reason and the flag
        that helps.
        """
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
        self.lm, self.layout, self.logits_bytes, self.autocast = lm, layout, logits_bytes, autocast
        no_dropout(lm)
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

    def forward(self, row, log_p2=False):
        """Log-probabilities of the row's scored tokens, (T,) nats in fp32 (fp64 for fp64 weights).

        With `log_p2` a second (T,) beside them, without gradient: log sum_v p_v^2 of each token's
        distribution.
        """
        kind = row.input_ids.device.type
        with torch.autocast(kind, self.autocast) if self.autocast else contextlib.nullcontext():
            return (
                self._packed(row, log_p2) if self.layout == "packed" else self._padded(row, log_p2)
            )

    def _packed(self, row, log_p2):
        hidden = self.body(
            input_ids=row.input_ids[None],
            position_ids=row.positions[None],
            use_cache=False,
            segments=attention.Segments(row),
        ).last_hidden_state[0]  # (L, H)
        head = self.lm.get_output_embeddings()
        scored = hidden.index_select(0, row.hidden_index)  # (T, H): prompts never reach the head
        return token_logps(
            scored, head.weight, row.target, getattr(head, "bias", None), self.logits_bytes, log_p2
        )

    def _padded(self, row, log_p2):
        """One padded sequence a response, all logits: what the other layout is measured against."""
        alone = list(row.sequences()) or [(row.input_ids, len(row.input_ids))]
        longest = max(len(ids) for ids, _ in alone)
        ids = row.input_ids.new_zeros(len(alone), longest)
        mask = torch.zeros_like(ids)
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for i, (sequence, first) in enumerate(alone):
            ids[i, : len(sequence)] = sequence
            mask[i, : len(sequence)] = 1
            scored[i, first : len(sequence)] = True
        logits = self.lm(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (N, P+R, V)
        logps = torch.log_softmax(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1
        )
        found = logps[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)[scored[:, 1:]]
        return (
            (found, logps[:, :-1][scored[:, 1:]].detach().mul(2).logsumexp(1)) if log_p2 else found
        )


@contextlib.contextmanager
def plain_forward(backbone):
    """The same weights the plain way: transformers' own layers, one padded sequence a response. For
    checks.
    """
    layout, backbone.layout = backbone.layout, "padded"
    layers.swap_back(backbone.lm)
    name = backbone.lm.config._attn_implementation
    backbone.lm.set_attn_implementation("sdpa" if backbone.lm._supports_sdpa else "eager")
    try:
        yield backbone
    finally:
        backbone.layout = layout
        layers.swap(backbone.lm)
        backbone.lm.set_attn_implementation(name)


def no_dropout(model):
    """Set every dropout probability to 0: policy and reference must agree, whatever mode the module
    is in.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def refuse_unsupported(lm):
    """Raise ValueError for a model that the packed path would compute wrongly; see also the check
    at a run's start.
    """
    config = lm.config.get_text_config()
    kind = type(lm).__name__

    def no(reason):
        raise ValueError(
            f"{kind} has {reason}, which packed rows do not support: pass --layout padded"
        )

    for field, reason in UNSUPPORTED.items():
        value = getattr(config, field, None)
        if value is not None and value is not False and value != 1.0:
            no(reason)
    for layer in getattr(config, "layer_types", None) or ():
        if any(word in layer for word in STATEFUL):
            no(f"{layer} layers")
    if not lm._supports_attention_backend:
        no("an attention of its own")
    if any(hasattr(module, "sinks") for module in lm.modules()):
        no("attention sinks")
    if lm.get_output_embeddings() is None:
        raise ValueError(f"{kind} has no output head: not a causal language model")
