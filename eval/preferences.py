"""What the model makes of preference pairs: rewards, margins, accuracy, calibration, displacement,
with intervals.

Rewards are those that the loss looks at (train/losses/composition.py: Reward), as in training: of
DPO beta * (log pi - log pi_ref) summed over a response's tokens, of SimPO beta times the log-prob a
token, which needs no reference. The implied probability that chosen beats rejected is
sigmoid(margin) (Bradley-Terry; Rafailov et al. 2023, arXiv 2305.18290, equation 6), under whatever
loss. Where a loss needs a reference and there is none, there is no reward: margins are differences
of log-probabilities, in nats, and are named so.

How much more a model prefers chosen answers than its reference does is the change of the margin. A
reward that is a log-ratio is 0 under the reference: there the margin itself says it, else a section
of its own, "change".

Legend: N pairs; `clusters` (N,) is the number of each pair's prompt (train/methods/intervals.py).
"""

import itertools

import numpy as np
import scipy.stats
import torch

from eval import measures
from train.losses import metrics
from train.losses.logprobs import damped, sum_per_response
from train.losses.preference import Pairs
from train.methods import intervals

# Chosen's length against rejected's, (chosen - rejected) / the longer of the two.
LENGTH_EDGES = (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0)
CONFIDENCE_EDGES = tuple(0.5 + 0.05 * i for i in range(11))
SIMULATIONS = 1000


def pairs_of(scores, model: int = 0, reference: int | None = None, ld_alpha: float = 1.0) -> Pairs:
    """Pairs of fp64 tensors (N,) from eval.scores.Scores; without a reference its log-probabilities
    are 0. ld_alpha: of LD-DPO, which tokens past the shorter answer count times.
    """
    lengths = torch.from_numpy(scores.lengths)  # (N, 2)

    def sums_of(number):
        """(N, 2) nats, chosen and rejected."""
        if ld_alpha == 1:
            return torch.from_numpy(scores.sums[number])
        flat = lengths.flatten()
        tokens = damped(torch.from_numpy(scores.tokens[number]), flat, ld_alpha)
        return sum_per_response(tokens, flat).view(-1, 2)

    logps = sums_of(model)
    ref_logps = torch.zeros_like(logps) if reference is None else sums_of(reference)
    return Pairs(
        chosen=logps[:, 0],
        rejected=logps[:, 1],
        ref_chosen=ref_logps[:, 0],
        ref_rejected=ref_logps[:, 1],
        chosen_len=lengths[:, 0],
        rejected_len=lengths[:, 1],
    )


def measure(scores, loss_of) -> tuple[dict, dict]:
    """(the report's section, columns of the pairs' table).

    scores: eval.scores.Scores of the model alone, or of model and reference. loss_of: what
    train.losses.composition.choose gives.
    """
    compared = len(scores.sums) == 2
    has_rewards = compared or not loss_of.rewards_need_reference
    clusters = intervals.clusters_of(scores.prompts)
    pairs = pairs_of(scores, 0, 1 if compared else None)
    section = {
        "pairs": len(scores.rows),
        "prompts": int(clusters.max()) + 1,
        "beta": None,
        "reward": None,
        "margin": "difference of log-probabilities, nats (there is no reference)",
        "model": likelihoods(pairs, clusters),
    }
    columns = {
        "row": scores.rows,
        "prompt": clusters,
        "chosen_tokens": scores.lengths[:, 0],
        "rejected_tokens": scores.lengths[:, 1],
        "chosen_logp": scores.sums[0, :, 0],
        "rejected_logp": scores.sums[0, :, 1],
    }
    if compared:
        # likelihood displacement (Razin et al. 2024, arXiv 2410.08847)
        fell = (pairs.chosen < pairs.ref_chosen).double().numpy()
        lost = {"chosen_fell": intervals.ratio(fell, clusters, proportion=True)}
        section["model"] = lost | section["model"]
        section["reference"] = likelihoods(pairs_of(scores, 1), clusters)
        columns["ref_chosen_logp"] = pairs.ref_chosen.numpy()
        columns["ref_rejected_logp"] = pairs.ref_rejected.numpy()
    margins = pairs.chosen - pairs.rejected  # (N,) nats
    if has_rewards:
        reference = 1 if compared else None
        as_scored = pairs_of(scores, 0, reference, loss_of.shared.ld_alpha)
        section["beta"], section["reward"] = loss_of.beta, loss_of.formula_of_rewards
        section["margin"] = f"difference of rewards: {loss_of.formula_of_rewards}"
        estimates, more_columns = rewards(as_scored, clusters, loss_of)
        section["model"] = estimates | section["model"]
        margins = torch.from_numpy(more_columns["margin"])
        section["calibration"] = calibration(margins, clusters)
        columns |= more_columns
        if compared and not loss_of.rewards_need_reference:
            estimates, of_reference = rewards(pairs_of(scores, 1), clusters, loss_of)
            section["reference"] = estimates | section["reference"]
            grown = margins - torch.from_numpy(of_reference["margin"])
            section["change"] = change(grown, clusters)
        section["loss_by_pair"] = is_by_pair(loss_of)
    columns |= {"margin": margins.numpy(), "correct": wins(margins)}
    section["by_length"] = by_length(margins, pairs, clusters)
    section["length_correlation"] = length_correlation(margins, pairs)
    return section, columns


def wins(margins: torch.Tensor) -> np.ndarray:
    """(N,) fp64: 1 where the margin is above 0, one half for a tie, else 0."""
    return metrics.wins(margins).double().numpy()


def rewards(pairs: Pairs, clusters, loss_of) -> tuple[dict, dict]:
    """Estimates of the loss's own rewards, by TRL's names, and their columns."""
    chosen, rejected = (reward.numpy() for reward in loss_of.rewards(pairs))
    margins = chosen - rejected
    losses = loss_of(pairs).numpy()
    correct = wins(torch.from_numpy(margins))
    estimates = {
        "rewards/accuracies": intervals.ratio(correct, clusters, proportion=True),
        "rewards/margins": intervals.ratio(margins, clusters),
        "rewards/chosen": intervals.ratio(chosen, clusters),
        "rewards/rejected": intervals.ratio(rejected, clusters),
        "loss": intervals.ratio(losses, clusters),
    }
    columns = {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": margins,
        "loss": losses,
    }
    return estimates, columns


def change(grown: torch.Tensor, clusters) -> dict:
    """Estimates of what the margin grew by from the reference to the model, (N,), and of how often
    it did.
    """
    grew = wins(grown)
    return {
        "accuracies": intervals.ratio(grew, clusters, proportion=True),
        "margins": intervals.ratio(grown.numpy(), clusters),
    }


def is_by_pair(loss_of) -> bool:
    """Whether a pair's loss here is the one that training would take; else it lacks what steps and
    tokens' probabilities add.
    """
    return not loss_of.couples and not loss_of.shared.use_weighting


def likelihoods(pairs: Pairs, clusters) -> dict:
    """Estimates of one model alone: log-probabilities a response and a token, and how often chosen
    is the likelier.
    """
    chosen, rejected = pairs.chosen.numpy(), pairs.rejected.numpy()
    chosen_len, rejected_len = pairs.chosen_len.numpy(), pairs.rejected_len.numpy()
    correct = wins(pairs.chosen - pairs.rejected)
    correct_per_token = wins(torch.from_numpy(chosen / chosen_len - rejected / rejected_len))
    return {
        "logps/chosen": intervals.ratio(chosen, clusters),
        "logps/rejected": intervals.ratio(rejected, clusters),
        "logps/margins": intervals.ratio(chosen - rejected, clusters),
        "logps/accuracies": intervals.ratio(correct, clusters, proportion=True),
        "logps/chosen_per_token": intervals.ratio(chosen, clusters, chosen_len),
        "logps/rejected_per_token": intervals.ratio(rejected, clusters, rejected_len),
        "logps/accuracies_per_token": intervals.ratio(correct_per_token, clusters, proportion=True),
    }


def calibration(margins: torch.Tensor, clusters) -> dict:
    """How often the preferred answer is the better one, against how sure the model is: reliability
    table and expected calibration error (ECE).

    Chosen always stands first, so what is calibrated is the confidence max(p, 1 - p) in the answer
    that the model prefers. A finite sample shows an error even of a calibrated model:
    `ece_if_calibrated` is where 95 % of samples of this size lie whose outcomes are drawn from the
    model's own confidences (Broecker and Smith 2007).
    """
    probability = torch.sigmoid(margins)  # (N,) that chosen beats rejected
    confidence = torch.maximum(probability, 1 - probability)
    correct = metrics.wins(margins).double()
    edges = torch.tensor(CONFIDENCE_EDGES, dtype=torch.float64)
    table, _ = measures.calibration(confidence, correct, edges)  # (bins, 3)

    def error(weights):
        return (measures.calibration(confidence, correct, edges, weights)[1],)

    estimates = intervals.resampled(error, clusters, bounds={"ece": (0, 1)}, sizes=(len(margins),))
    # a calibrated model is right as often as it is sure: simulated (SIMULATIONS, N)
    uniform = torch.from_numpy(np.random.default_rng(0).random((SIMULATIONS, len(margins))))
    simulated = [
        measures.calibration(confidence, (row < confidence).double(), edges)[1] for row in uniform
    ]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {
        "confidence": intervals.ratio(confidence.numpy(), clusters),
        **estimates,
        "ece_if_calibrated": torch.quantile(torch.stack(simulated), ends).tolist(),
        "table": [
            _reliability(edges_of_bin, *values)
            for edges_of_bin, values in zip(
                itertools.pairwise(CONFIDENCE_EDGES), table.tolist(), strict=True
            )
        ],
    }


def _reliability(edges: tuple[float, float], count: float, confidence: float, accuracy: float):
    """A bin of the reliability table; means are None where no pair is in it."""
    low, high = edges
    row = {"from": low, "to": high, "n": int(count)}
    if not count:
        return row | {"confidence": None, "accuracy": None, "interval": None}
    interval = list(metrics.wilson(accuracy, count))
    return row | {"confidence": confidence, "accuracy": accuracy, "interval": interval}


def by_length(margins: torch.Tensor, pairs: Pairs, clusters) -> list[dict]:
    """Accuracy where chosen is shorter, as long, and longer, by the relative difference in tokens."""
    bins = np.digitize(relative_length(pairs), LENGTH_EDGES[1:-1])
    correct = wins(margins)
    return [
        {
            "from": low,
            "to": high,
            **intervals.ratio(correct[bins == i], clusters[bins == i], proportion=True),
        }
        for i, (low, high) in enumerate(itertools.pairwise(LENGTH_EDGES))
    ]


def relative_length(pairs: Pairs) -> np.ndarray:
    """(N,) in [-1, 1]: above 0 where chosen is the longer answer."""
    chosen, rejected = pairs.chosen_len.double(), pairs.rejected_len.double()
    return ((chosen - rejected) / torch.maximum(chosen, rejected)).numpy()


def length_correlation(margins: torch.Tensor, pairs: Pairs) -> dict:
    """Spearman's rank correlation of the margin with chosen's excess length: far from 0, length
    explains the margin.

    Its interval is Bonett and Wright's (2000): normal on Fisher's z = atanh(rho), with variance
    (1 + rho^2 / 2) / (N - 3).
    """
    length, margin = relative_length(pairs), margins.numpy()
    size = len(margin)
    if size < 4 or np.ptp(length) == 0 or np.ptp(margin) == 0:
        return intervals.as_estimate(None, (size,), "none: too few pairs, or all alike")
    rho = float(scipy.stats.spearmanr(length, margin).statistic)
    half = metrics.NORMAL_975 * np.sqrt((1 + rho * rho / 2) / (size - 3))
    # rank orders that agree wholly have z infinite
    z = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))
    ends = [float(np.tanh(z - half)), float(np.tanh(z + half))]
    return intervals.as_estimate(rho, (size,), "Bonett-Wright, by pair", ends)
