"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: a few matrices are trained beside frozen
weights, and with them switched off the model is its own reference.

An adapted layer computes W x + alpha / rank * B A x (its equation 3 with section 4.1's scaling),
A (rank, I), B (O, rank).
"""

import contextlib

import torch

from train.models.heads import HEAD

ADAPTER_NAME = "default"  # peft's name for the one adapter there is


def add(lm, rank: int, alpha: float, targets: list[str] | None, seed: int = 0):
    """Freeze `lm` and put adapters of `rank` beside its linear layers, scaled by alpha / rank. A
    score's head, which has nothing to begin from, is trained as a whole.

    B begins at 0; `seed` draws A, and leaves torch's generator as it was.

    `targets`: ends of the layers' names, None for all but the head. Raises ValueError without peft,
    and where no such layer is there. Before the model is wrapped in a Backbone, which swaps layers.
    """
    try:
        # an extra that most installations do without
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--lora_rank needs peft: pip install -e '.[lora]'") from error
    of_scores = lm.get_output_embeddings() is None
    head = getattr(lm, HEAD) if of_scores else lm.get_output_embeddings()
    linear = {
        name
        for name, module in lm.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    endings = sorted({name.rpartition(".")[2] for name in linear})
    # Every module that peft would match, so that one beside the linear layers is refused here.
    matched = {
        name
        for name, _ in lm.named_modules()
        for target in targets or endings
        if name == target or name.endswith(f".{target}")
    }
    if not matched or matched - linear:
        raise ValueError(
            f"--lora_targets {', '.join(targets or ['(none)'])}: adapters go beside linear layers other "
            f"than the head; this model has: {', '.join(endings) or 'none'}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets or endings,
        task_type="SEQ_CLS" if of_scores else "CAUSAL_LM",
    )
    lm.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # adapters are drawn on the CPU
        torch.manual_seed(seed)
        inject_adapter_in_model(config, lm, adapter_name=ADAPTER_NAME)
    for name, p in lm.named_parameters():
        p.requires_grad_("lora_" in name)
    if of_scores:
        head.requires_grad_(True)
        # for whoever reads the file: injected by name above, it would be wrapped
        config.modules_to_save = [HEAD]
    lm.lora_config = config


def adapted_layers(lm) -> dict:
    """The layers that have an adapter, by name; none for a model without."""
    return {name: module for name, module in lm.named_modules() if hasattr(module, "lora_A")}


@contextlib.contextmanager
def switched_off(lm):
    """Inside, the model computes what it did before `add`, bit for bit."""
    layers = list(adapted_layers(lm).values())
    for layer in layers:
        # peft's own switch also changes requires_grad, which DeepSpeed must not see
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_state_dict(lm, state: dict) -> dict:
    """A plain model's state dict out of `state`, that of `lm` with its adapters: W + alpha / rank *
    B A, computed in fp32.
    """
    plain = {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_" not in name
    }
    for name, layer in adapted_layers(lm).items():
        a = state[f"{name}.lora_A.{ADAPTER_NAME}.weight"].float()  # (rank, I)
        b = state[f"{name}.lora_B.{ADAPTER_NAME}.weight"].float()  # (O, rank)
        weight = plain[f"{name}.weight"]  # (O, I)
        merged = weight.float() + layer.scaling[ADAPTER_NAME] * (b @ a)
        plain[f"{name}.weight"] = merged.to(weight.dtype)
    return plain


def adapter_state_dict(state: dict) -> dict:
    """The adapters out of a state dict, and a score's head, under the names that peft gives them in
    a file.
    """
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER_NAME}.', '.')}": value.contiguous()
        for name, value in state.items()
        if ".lora_" in name or name == f"{HEAD}.weight"
    }
