"""What training and evaluation report of examples: sums and counts, so that ranks and batches add
up exactly.

    sums += preference_sums(examples, losses, loss.rewards(examples))
    board.scalars(means(sums))

Rewards of preference training are those that its loss looks at (composition.py: Reward): sums or
means a token, log-ratios or log-probs. `reward accuracy` and `reward margin` are of these.

Legend: B pairs, or B responses that are labelled one by one.
"""

import math
from typing import NamedTuple

import torch

from train.losses.preference import Labelled, Pairs
from train.losses.reward import ScoredAnswers, ScoredPairs

NORMAL_975 = 1.959964  # the 97.5 % quantile of the normal distribution


class Metric(NamedTuple):
    """A mean over examples, and how people see it."""

    name: str  # on the board, after train/ or val/, and in run.json; TRL's names
    title: str
    # empty where a number has none: a share, or what the loss or beta gives a scale of its own
    unit: str = ""
    in_table: bool = False  # whether the closing table and the model card show it
    # whether the board has it at train/NAME and val/NAME, for every loss
    logged: bool = True

    @property
    def label(self) -> str:
        """The title with the unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


# In the order of the closing table. The metrics of labelled data have the same names: desired
# responses stand under chosen, others under rejected.
METRICS: tuple[Metric, ...] = (
    Metric("loss", "loss", in_table=True),
    Metric("rewards/accuracies", "reward accuracy", in_table=True),
    Metric("rewards/margins", "reward margin", in_table=True),
    Metric("rewards/chosen", "reward of chosen"),
    Metric("rewards/rejected", "reward of rejected"),
    Metric("logps/chosen", "log-prob of chosen", "nats", in_table=True),
    Metric("logps/rejected", "log-prob of rejected", "nats", in_table=True),
    Metric("logps/chosen_per_token", "log-prob of chosen", "nats a token"),
    Metric("logps/rejected_per_token", "log-prob of rejected", "nats a token"),
    # Likelihood displacement (Razin et al. 2024, arXiv 2410.08847). Only a run with a reference has
    # it, and it stands among the measures of health.
    Metric("chosen_fell", "chosen became less likely", logged=False),
)
# Of reward models, in the order of the closing table: of pairs, then of answers judged one by one.
REWARD_METRICS: tuple[Metric, ...] = (
    Metric("loss", "loss", in_table=True),
    Metric("rewards/accuracies", "reward accuracy", in_table=True),
    Metric("rewards/margins", "reward margin", in_table=True),
    Metric("rewards/chosen", "score of chosen", in_table=True),
    Metric("rewards/rejected", "score of rejected", in_table=True),
    Metric("rewards/correlation", "correlation with target", in_table=True),
    Metric("rewards/mean", "mean score"),
    Metric("rewards/std", "deviation of scores"),
)
# Of policies that earn rewards, on held-out prompts.
POLICY_METRICS: tuple[Metric, ...] = (
    Metric("reward", "reward", in_table=True),
    Metric("length", "length", "tokens", in_table=True),
    Metric("ended", "ended by themselves", in_table=True),
    Metric("kl", "KL to the reference", "nats", in_table=True),
    Metric("repetition", "repeated 4-grams", in_table=True),
    Metric("distinct_1", "distinct-1", in_table=True),
    Metric("distinct_2", "distinct-2", in_table=True),
)
LABELS: dict[str, str] = {metric.name: metric.label for metric in METRICS}

# The sums that `means` makes the metrics of, in this order, after the number of examples.
# "count/..." says how many examples there are under chosen and under rejected.
PAIR_SUMS = (
    "loss",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "tokens/chosen",
    "tokens/rejected",
    "count/chosen",
    "count/rejected",
    "chosen_fell",
)


def preference_sums(
    examples: Pairs | Labelled, losses: torch.Tensor, rewards: torch.Tensor | tuple
) -> torch.Tensor:
    """The number of examples and the sums of PAIR_SUMS over them, (1 + len(PAIR_SUMS),) fp64.

    rewards: what the loss's `rewards` gives for the examples. A pair is right where chosen's is the
    higher, a labelled response where the sign of its reward is its label's. A tie counts one half.
    """
    with torch.no_grad():
        of_examples = _labelled_columns if isinstance(examples, Labelled) else _pair_columns
        columns = {"loss": losses, **of_examples(examples, rewards)}
        ones = torch.ones_like(columns["rewards/chosen"])
        in_order = [ones, *(columns[name] for name in PAIR_SUMS)]
        return torch.stack([column.detach().double() for column in in_order]).sum(1)


def _pair_columns(pairs, rewards):
    """PAIR_SUMS of each pair by name, (B,) each, without the loss."""
    chosen, rejected = rewards
    ones = torch.ones_like(chosen)
    return {
        "rewards/accuracies": wins(chosen - rejected),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
        "tokens/chosen": pairs.chosen_len,
        "tokens/rejected": pairs.rejected_len,
        "count/chosen": ones,
        "count/rejected": ones,
        "chosen_fell": pairs.chosen < pairs.ref_chosen,
    }


def _labelled_columns(examples, rewards):
    """The same of labelled responses, each of which is 0 on the side that is not its label's."""
    desired = examples.desired
    columns = {
        "rewards/accuracies": wins(torch.where(desired, rewards, -rewards)),
        "chosen_fell": (examples.logps < examples.ref_logps) & desired,
    }
    both_sides = {
        "rewards": rewards,
        "logps": examples.logps,
        "tokens": examples.lengths,
        "count": torch.ones_like(rewards),
    }
    for name, column in both_sides.items():
        columns[f"{name}/chosen"] = column * desired
        columns[f"{name}/rejected"] = column * ~desired
    return columns


def wins(margin: torch.Tensor) -> torch.Tensor:
    """1 where chosen is preferred, 0 where rejected is, one half for a tie: (B,) margins -> (B,)."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def means(sums: torch.Tensor) -> dict[str, float]:
    """METRICS by name, from summed `preference_sums`. NaN without an example.

    The margin is the difference of the mean rewards, which for pairs is the mean difference.
    """
    count, *values = sums.tolist()
    total = dict(zip(PAIR_SUMS, values, strict=True))
    chosen, rejected = total["count/chosen"], total["count/rejected"]
    mean = {
        "loss": _ratio(total["loss"], count),
        "rewards/accuracies": _ratio(total["rewards/accuracies"], count),
        "rewards/chosen": _ratio(total["rewards/chosen"], chosen),
        "rewards/rejected": _ratio(total["rewards/rejected"], rejected),
        "logps/chosen": _ratio(total["logps/chosen"], chosen),
        "logps/rejected": _ratio(total["logps/rejected"], rejected),
        "chosen_fell": _ratio(total["chosen_fell"], chosen),
        # over the tokens of all responses, so that a long one counts for more
        "logps/chosen_per_token": _ratio(total["logps/chosen"], total["tokens/chosen"]),
        "logps/rejected_per_token": _ratio(total["logps/rejected"], total["tokens/rejected"]),
    }
    return mean | {"rewards/margins": mean["rewards/chosen"] - mean["rewards/rejected"]}


def _ratio(value, count):
    return value / count if count else math.nan


def wilson(share: float, count: float, z: float = NORMAL_975) -> tuple[float, float]:
    """The Wilson score interval of a share among `count` independent cases, 95 % unless `z` says
    otherwise.

    Wilson 1927 (Journal of the American Statistical Association 22).
    """
    if not count:
        return math.nan, math.nan
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (middle - half) / scale, (middle + half) / scale


def normal_interval(name: str, values: torch.Tensor) -> dict[str, list[float]]:
    """{NAME_interval: the 95 % interval of the mean of `values` (N,), by the normal distribution}; {}
    for a single value, which has no spread.
    """
    if len(values) < 2:
        return {}
    half = NORMAL_975 * float(values.std()) / math.sqrt(len(values))
    middle = float(values.mean())
    return {f"{name}_interval": [middle - half, middle + half]}


# The sums that `score_means` makes REWARD_METRICS of, after the number of examples; of pairs the
# first six, of judged answers all but those of chosen and rejected.
SCORE_SUMS = (
    "loss",
    "wins",
    "chosen",
    "rejected",
    "scores",
    "squares",
    "targets",
    "target_squares",
    "products",
    "labelled",
)


def score_sums(examples: ScoredPairs | ScoredAnswers, losses: torch.Tensor) -> torch.Tensor:
    """The number of examples and the sums of SCORE_SUMS over them, (1 + len(SCORE_SUMS),) fp64.

    A pair is right where chosen has the higher score, a judged answer, where targets are the labels
    0 and 1, where its score's sign is its label's. A tie counts one half.
    """
    with torch.no_grad():
        of_examples = _answer_columns if isinstance(examples, ScoredAnswers) else _score_columns
        columns = of_examples(*(x.double() for x in examples)) | {"loss": losses.double()}
        ones = torch.ones_like(columns["loss"])
        in_order = [ones, *(columns.get(name, 0 * ones) for name in SCORE_SUMS)]
        return torch.stack(in_order).sum(1)


def _score_columns(chosen, rejected, margin):
    """SCORE_SUMS of each pair by name, (B,) each, without the loss."""
    return {
        "wins": wins(chosen - rejected),
        "chosen": chosen,
        "rejected": rejected,
        "scores": chosen + rejected,
        "squares": chosen**2 + rejected**2,
    }


def _answer_columns(scores, targets):
    """The same of answers that are judged one by one."""
    labelled = (targets == 0) | (targets == 1)
    return {
        "wins": wins(torch.where(targets == 1, scores, -scores)) * labelled,
        "scores": scores,
        "squares": scores**2,
        "targets": targets,
        "target_squares": targets**2,
        "products": scores * targets,
        "labelled": labelled.double(),
    }


def score_means(sums: torch.Tensor, of_pairs: bool) -> dict[str, float]:
    """REWARD_METRICS by name, from summed `score_sums`: those that pairs have, or those that judged
    answers have. NaN without an example. The accuracy of answers is there where all have labels.

    The correlation is Pearson's between scores and targets, NaN where either are all the same.
    """
    count, *values = sums.tolist()
    total = dict(zip(SCORE_SUMS, values, strict=True))
    num_scores = 2 * count if of_pairs else count
    mean = _ratio(total["scores"], num_scores)
    variance = _variance(total["squares"], mean, num_scores)
    found = {
        "loss": _ratio(total["loss"], count),
        "rewards/mean": mean,
        "rewards/std": math.sqrt(variance) if count else math.nan,
    }
    if of_pairs:
        chosen, rejected = _ratio(total["chosen"], count), _ratio(total["rejected"], count)
        return found | {
            "rewards/accuracies": _ratio(total["wins"], count),
            "rewards/margins": chosen - rejected,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
        }
    target = _ratio(total["targets"], count)
    target_variance = _variance(total["target_squares"], target, count)
    covariance = _ratio(total["products"], count) - mean * target
    found["rewards/correlation"] = _ratio(covariance, math.sqrt(variance * target_variance))
    if total["labelled"] == count:
        found["rewards/accuracies"] = _ratio(total["wins"], count)
    return found


def _variance(squares: float, mean: float, count: float) -> float:
    """The variance of `count` numbers from the sum of their squares; 0 where it is no more than what
    the difference of two sums in fp64 leaves of equal numbers.
    """
    mean_square = _ratio(squares, count)
    variance = mean_square - mean**2
    return 0.0 if variance < 1e-12 * mean_square else variance
