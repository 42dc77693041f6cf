"""The models under evaluation: loaded, frozen, checked."""

from pathlib import Path
from typing import NamedTuple

import torch

from train.data import chat
from train.engine import checks, ds_config, loading, memory
from train.methods.reference import Live
from train.methods.rewards import RewardModel
from train.models import generate
from train.run import folder

SHARDED = (
    "--ds_config shards the models over the ranks, and decoding needs whole ones; leave it out "
    "where a model's weights fit on one device"
)


class Models(NamedTuple):
    """The models under evaluation."""

    model: Live
    reference: Live | None
    reward_model: RewardModel | None
    sharded: bool  # over the ranks: scored like others, but not decoded
    batch_tokens: int  # tokens that a packed batch may hold
    facts: dict  # about precision and machine, for the report

    @property
    def by_name(self) -> dict[str, Live]:
        """The model, then its reference where there is one."""
        if self.reference is None:
            return {"model": self.model}
        return {"model": self.model, "reference": self.reference}


def open_models(settings, run, opened, device: torch.device, judge=None) -> Models:
    """The frozen model and reference, checked on the first pairs. Every rank calls this.

    opened: eval.inputs.Inputs. judge: eval.judges.Judge, whose model scores what the models write.
    ValueError where a model cannot be loaded or does not fit its task.
    """
    recipe = opened.recipe
    precision = ds_config.resolve_precision(recipe["precision"], device)
    # the policy's configuration as the model was trained: the frozen ones compute as it did
    as_trained = ds_config.resolve({"zero_optimization": {"stage": recipe["stage"]}}, precision)
    config = ds_config.read_config(settings.ds_config) if settings.ds_config else {}
    config = ds_config.resolve_frozen(config, as_trained)
    sharded = ds_config.zero_stage(config) == 3

    def load(path) -> Live:
        backbone = loading.load_backbone(
            path,
            config,
            precision,
            policy_stage=recipe["stage"],
            device=device,
            layout=recipe["layout"],
            trust_remote_code=settings.trust_remote_code,
            allow_pickle=settings.allow_pickle,
        )
        data = (opened.pairs, opened.texts)
        chat.check_fit(backbone.lm.config, opened.tokenizer, recipe["max_length"], data)
        return Live(backbone, config)

    model = load(opened.path)
    reference, same_weights = None, False
    if settings.reference:
        same_weights = Path(settings.reference).resolve() == Path(opened.path).resolve()
        reference = model if same_weights else load(settings.reference)
    checks.check_start(
        model, reference or model, opened.pairs, device, precision, same_weights=same_weights
    )
    reward_model = judge and judge.model
    if reward_model:
        reward_model.check(opened.prompts, settings.max_new_tokens)
    if opened.prompts and not sharded:  # better now than after the scoring
        prompts = [prompt.ids for prompt in opened.prompts]
        for scorer in filter(None, (model, reference)):
            generate.check(scorer.module.lm, prompts, settings.max_new_tokens)
    # not from the free memory, as in training: the report would depend on it by a rounding error
    default_tokens = memory.CUDA_TOKENS if device.type == "cuda" else memory.CPU_TOKENS
    batch_tokens = settings.micro_tokens or default_tokens
    facts = {
        "precision": precision,
        "row_tokens": batch_tokens,
        "hardware": folder.hardware(device),
        "versions": folder.versions(),
    }
    run.note(**facts)
    return Models(model, reference, reward_model, sharded, batch_tokens, facts)
