"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: a few matrices are trained beside frozen
weights, and with them switched off the model is its own reference.
"""

import contextlib

import torch

DEFAULT = "default"  # peft's name for the one adapter there is


def add(lm, rank: int, alpha: float, targets: list[str] | None):
    """Freeze `lm` and put adapters of `rank` beside its linear layers, scaled by alpha / rank; B
    begins at 0.

    `targets`: ends of the layers' names, None for all but the head. ValueError without peft or a
    layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--lora_rank needs peft: pip install -e '.[lora]'") from error
    head = lm.get_output_embeddings()
    linear = {
        name
        for name, module in lm.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    found = sorted({name.rpartition(".")[2] for name in linear})
    ends = lambda name, target: name == target or name.endswith(f".{target}")
    meant = {
        name for name, _ in lm.named_modules() for target in targets or found if ends(name, target)
    }
    if not meant or meant - linear:
        raise ValueError(
            f"--lora_targets {', '.join(targets or ['(none)'])}: adapters go beside linear layers other "
            f"than the head; this model has: {', '.join(found) or 'none'}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets or found,
        task_type="CAUSAL_LM",
    )
    lm.requires_grad_(False)
    inject_adapter_in_model(config, lm, adapter_name=DEFAULT)
    for name, p in lm.named_parameters():
        p.requires_grad_("lora_" in name)
    lm.lora_config = config


def layers(lm) -> dict:
    """The adapted layers by name."""
    return {name: module for name, module in lm.named_modules() if hasattr(module, "lora_A")}


@contextlib.contextmanager
def switched_off(lm):
    """Inside, the model computes what it did before `add`, bit for bit."""
    every = list(layers(lm).values())
    for layer in every:
        layer._disable_adapters = (
            True  # peft's own switch also changes requires_grad, which DeepSpeed must not see
        )
    try:
        yield
    finally:
        for layer in every:
            layer._disable_adapters = False


def merged(lm, state: dict) -> dict:
    """A plain model's state dict from `lm`'s with adapters: W + alpha / rank * B A, computed in
    fp32.
    """
    plain = {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_" not in name
    }
    for name, layer in layers(lm).items():
        a, b = (state[f"{name}.lora_{side}.{DEFAULT}.weight"].float() for side in "AB")
        weight = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = (weight.float() + layer.scaling[DEFAULT] * (b @ a)).to(
            weight.dtype
        )
    return plain


def alone(state: dict) -> dict:
    """The adapters out of a state dict, under the names that peft gives them in a file."""
    return {
        f"base_model.model.{name.replace(f'.{DEFAULT}.', '.')}": value.contiguous()
        for name, value in state.items()
        if ".lora_" in name
    }
