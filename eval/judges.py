"""The reward model under evaluation: loaded, checked, and the scores that it gives to all answers.

One that training here made is computed as it was trained, packed, with shared prompts (in bf16
always under autocast, over fp32 weights, at whatever ZeRO stage it was trained). Another one, or one under --layout padded, is computed by its own class, one right-padded sequence an answer
with an attention mask: where it reads its score is its own affair, and checked once.

Legend: N rows with k answers each, A answers in all.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import transformers
from tqdm import tqdm

from eval.scores import OUT_OF_MEMORY_ADVICE
from train.config import Exit, fail
from train.data.dataset import Tokenised
from train.data.errors import one_line
from train.data.packing import pack
from train.data.steps import plan_pass
from train.engine import dist, ds_config, memory, sweep
from train.engine.checks import TOLERANCE, CheckFailed
from train.methods.rewards import OwnClass, RewardModel
from train.models.backbone import plain_forward
from train.models.heads import ScoreModel
from train.run import folder


class AnswerScores(NamedTuple):
    """The scores of all answers, in the data's order; complete on every rank."""

    rows: np.ndarray  # (N,) int64 numbers of the data rows
    prompts: np.ndarray  # (N,) int64 hash of the prompt: what is resampled as one
    counts: np.ndarray  # (N,) int64 answers of each row
    lengths: np.ndarray  # (A,) int64 tokens of each answer, to the end of what the template renders
    scores: np.ndarray  # (A,) fp64


class Judge(NamedTuple):
    """A reward model, ready to score."""

    model: RewardModel
    own: OwnClass
    packed: ScoreModel | None  # the same weights, packed; None where its own class computes
    batch_tokens: int
    facts: dict  # about precision, machine and checks, for the report

    @property
    def score(self) -> Callable:
        """A PackedBatch in, (N,) scores of its responses out."""
        return self.packed or self.own

    def as_own_class(self):
        """Within this context the model computes as its own class does, for `model.score`."""
        return plain_forward(self.packed) if self.packed else contextlib.nullcontext()


@torch.no_grad()
def open_judge(settings, opened, run, device: torch.device) -> Judge:
    """The reward model, checked on the first rows. Every rank calls this.

    opened: eval.reward_inputs.RewardInputs. run: a RunFolder. ValueError where the model cannot be
    loaded, is no reward model, or reads its scores off other tokens than the last because texts end
    in its pad token.
    """
    if settings.ds_config and ds_config.zero_stage(ds_config.read_config(settings.ds_config)) == 3:
        raise ValueError(
            "--ds_config shards the models over the ranks, and a reward model stands whole on each: "
            "leave it out"
        )
    recipe = opened.recipe
    precision = ds_config.resolve_precision(recipe["precision"], device)
    autocast = torch.bfloat16 if precision == "bf16" else None
    check_ids(
        config_of(opened.path, settings.trust_remote_code),
        opened.data,
        opened.path,
        recipe["max_length"],
    )
    # not from the free memory, as in training: the report would depend on it by a rounding error
    default_tokens = memory.CUDA_TOKENS if device.type == "cuda" else memory.CPU_TOKENS
    batch_tokens = settings.micro_tokens or default_tokens
    model = RewardModel(
        opened.path,
        device,
        autocast=autocast,
        trust_remote_code=settings.trust_remote_code,
        batch_tokens=batch_tokens,
    )
    own = model.own
    reads = check_place(own, opened, run, device)
    packed = None
    first = pack([opened.data.group(i) for i in range(min(2, len(opened.data)))]).to(device)
    alone = torch.cat([own.alone(ids) for ids, _ in first.sequences()])
    if recipe["layout"] == "packed":
        packed = ScoreModel(model.model, "packed", autocast)
    scores = (packed or own)(first)
    check_alike(scores, alone, precision, "packed" if packed else "padded")
    facts = {
        "precision": precision,
        "row_tokens": batch_tokens,
        "computed": "packed, as trained" if packed else f"by {type(model.model).__name__}, padded",
        "reads": reads,
        "hardware": folder.hardware(device),
        "versions": folder.versions(),
    }
    return Judge(model, own, packed, batch_tokens, facts)


def config_of(path: str, trust_remote_code: bool):
    """The configuration of the text model in a directory or on the hub. Raises ValueError."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise a dozen types
        message = f"cannot load a reward model from {path}: {one_line(error)}"
        raise ValueError(message) from error
    return config.get_text_config()


def check_ids(config, data: Tokenised, path: str, max_length: int):
    """ValueError where the data has token ids or lengths that the model lacks."""
    largest = int(data.ids.max())
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of --reward_model {path} makes token {largest}, and the model has "
            f"{config.vocab_size}: they are not of one model"
        )
    positions = getattr(config, "max_position_embeddings", None)
    longest = int((data.lengths[:, 0] + data.lengths[:, 1:].max(1)).max())
    if positions and longest > positions:
        raise ValueError(
            f"a text has {longest} tokens, --max_length is {max_length}, and --reward_model {path} "
            f"has {positions} positions: lower --max_length"
        )


def check_place(own: OwnClass, opened, run, device: torch.device) -> str:
    """Where the class reads its score, in words: checked on the first answer, and on the first that
    ends in the pad token. Every rank calls this.

    ValueError where it misses the last token of texts that end in the pad token: transformers'
    classes take the rightmost that is not pad.
    """
    data = opened.data
    pad = own.lm.config.get_text_config().pad_token_id
    ends = data.offsets[:, None] + np.cumsum(data.lengths, axis=1, dtype=np.int64)[:, 1:] - 1
    there = data.lengths[:, 1:] > 0  # (N, k)
    in_pad = there & (data.ids[ends] == (-1 if pad is None else pad))

    def reads_last(row: int, answer: int):
        ids, _ = list(pack([data.group(row)]).sequences())[answer]
        return own.reads_last(ids.to(device))

    if in_pad.any():
        row, answer = np.argwhere(in_pad)[0].tolist()
        if reads_last(row, answer) is False:
            token = opened.tokenizer.convert_ids_to_tokens(int(pad))
            source, number = data.place(row)
            raise ValueError(
                f"{int(in_pad.sum())} of {int(there.sum())} texts end in the pad token {token!r} of "
                f"--reward_model {opened.path}, which reads its score off the last token that is not "
                f"pad; the first: {source} row {number}. Give its configuration a pad_token_id that "
                "no text ends in"
            )
    found = reads_last(0, 0)
    if found is None:
        return "not checked: the class shows no score of each token"
    if found:
        return "the last token"
    run.say(
        f"warning: --reward_model {opened.path} does not read its score off a text's last token; its "
        "own class decides, and is used"
    )
    return "another token than the last"


def check_alike(scores: torch.Tensor, alone: torch.Tensor, precision: str, layout: str):
    """CheckFailed unless a batch gives the scores that the class gives to each sequence by itself,
    (N,) each.
    """
    if not torch.isfinite(alone).all():
        raise CheckFailed("the reward model's scores are not finite")
    difference = ScoreModel.distance(scores, alone)
    if not difference <= TOLERANCE[precision]:
        other = "--layout padded" if layout == "packed" else "--micro_tokens 1"
        raise CheckFailed(
            f"{layout} scores of the first rows differ from one sequence at a time by "
            f"{difference:.2g} {ScoreModel.unit} (at most {TOLERANCE[precision]:g}): pass {other}"
        )


def refuse_not_finite(results: list[np.ndarray], data: Tokenised):
    """End the run where a score is NaN or infinite: such a row would count as lost, in silence."""
    broken = [i for i, scores in enumerate(results) if not np.isfinite(scores).all()]
    if broken:
        source, number = data.place(broken[0])
        fail(
            f"{len(broken)} of {len(results)} rows have scores that are not finite; the first: "
            f"{source} row {number}; try --precision fp32",
            Exit.NONFINITE,
        )


@torch.no_grad()
def score_all(judge: Judge, data: Tokenised, device: torch.device) -> AnswerScores:
    """Score every answer of `data` once. Every rank calls this.

    Batches are planned for the whole job and dealt to the ranks, and ranks hand over single scores:
    the world size cannot change a digit.
    """
    budget = judge.batch_tokens
    plan = plan_pass(data.lengths.sum(1), budget, rank=dist.rank(), world=dist.world_size())

    def score_batch(batch):
        if not batch.num_responses:  # of a rank that is short of batches
            return []
        task = f"a batch of {batch.input_ids.shape[0]:,} tokens"
        advice = f"(--micro_tokens is {budget:,}: {OUT_OF_MEMORY_ADVICE})"
        with memory.room_for(task, advice):
            scores = judge.score(batch).double().cpu().numpy()  # (N,)
        places = np.cumsum([0, *sweep.responses_per_group(batch)])
        return [scores[start:end] for start, end in zip(places, places[1:], strict=False)]

    def watch(batches):
        return tqdm(
            batches,
            total=len(plan),
            desc="scores of the reward model",
            unit="batch",
            disable=not dist.is_main(),
            dynamic_ncols=True,
        )

    results = sweep.score_groups(plan, range(len(data)), data, device, score_batch, watch)
    refuse_not_finite(results, data)
    return AnswerScores(
        rows=data.rows,
        prompts=data.prompts,
        counts=np.array([len(scores) for scores in results]),
        lengths=data.lengths[:, 1:][data.lengths[:, 1:] > 0].astype(np.int64),
        scores=np.concatenate(results),
    )
