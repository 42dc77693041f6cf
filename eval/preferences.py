"""What the model makes of preference pairs: rewards, margins, accuracy, calibration, displacement,
with intervals.

With a reference, reward = beta * (log pi - log pi_ref) summed over a response's tokens, and the
implied probability that chosen beats rejected is sigmoid(margin) (Bradley-Terry; Rafailov et al.
2023, arXiv 2305.18290, equation 6). Without one there is no reward: margins are differences of
log-probabilities, in nats, and are named so.

Legend: N pairs.
"""

import numpy as np
import scipy.stats
import torch

from eval import intervals, statistics
from train.losses import metrics
from train.losses.preference import Pairs

# Chosen's length against rejected's, (chosen - rejected) / the longer of the two.
LENGTH_EDGES = (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0)
CONFIDENCE_EDGES = tuple(0.5 + 0.05 * i for i in range(11))
SIMULATIONS = 1000


def pairs_of(scores, model: int = 0, reference: int | None = None) -> Pairs:
    """Pairs of fp64 tensors (N,) from eval.scores.Scores; without a reference its log-probabilities
    are 0.
    """
    ours = torch.from_numpy(scores.sums[model])
    theirs = (
        torch.zeros_like(ours) if reference is None else torch.from_numpy(scores.sums[reference])
    )
    lengths = torch.from_numpy(scores.lengths)
    return Pairs(ours[:, 0], ours[:, 1], theirs[:, 0], theirs[:, 1], lengths[:, 0], lengths[:, 1])


def measure(scores, beta: float, loss_of) -> tuple[dict, dict]:
    """(the report's section, columns of the per-row table). `scores`: of the model alone, or of
    model and reference.
    """
    compared = len(scores.sums) == 2
    units = intervals.units_of(scores.prompts)
    pairs = pairs_of(scores, 0, 1 if compared else None)
    margins = pairs.rewards(beta if compared else 1.0)
    margins = margins[0] - margins[1]  # (N,) beta times nats, or nats
    section = {
        "pairs": len(margins),
        "prompts": int(units.max()) + 1,
        "beta": beta if compared else None,
        "margin": "beta x difference of the log-ratios to the reference"
        if compared
        else "difference of log-probabilities, nats (there is no reference)",
        "model": likelihoods(pairs, units),
    }
    columns = {
        "row": scores.rows,
        "prompt": units,
        "chosen_tokens": scores.lengths[:, 0],
        "rejected_tokens": scores.lengths[:, 1],
        "chosen_logp": scores.sums[0, :, 0],
        "rejected_logp": scores.sums[0, :, 1],
        "margin": margins.numpy(),
        "correct": metrics.wins(margins).double().numpy(),
    }
    if compared:
        rewarded, more = rewards(pairs, units, beta, loss_of)
        section["model"] = rewarded | section["model"]
        section["reference"] = likelihoods(pairs_of(scores, 1), units)
        section["calibration"] = calibration(margins, units)
        section["loss_by_pair"] = by_pair(loss_of)
        columns |= more
    section["by_length"] = by_length(margins, pairs, units)
    section["length_correlation"] = length_correlation(margins, pairs)
    return section, columns


def rewards(pairs: Pairs, units, beta: float, loss_of) -> tuple[dict, dict]:
    """Measures against the reference, by TRL's names, and their columns."""
    chosen, rejected = (reward.numpy() for reward in pairs.rewards(beta))
    margin = chosen - rejected
    losses = loss_of(pairs).numpy()
    fell = (pairs.chosen < pairs.ref_chosen).double().numpy()
    correct = metrics.wins(torch.from_numpy(margin)).double().numpy()
    found = {
        "rewards/accuracies": intervals.ratio(correct, units, share=True),
        "rewards/margins": intervals.ratio(margin, units),
        "rewards/chosen": intervals.ratio(chosen, units),
        "rewards/rejected": intervals.ratio(rejected, units),
        "loss": intervals.ratio(losses, units),
        "chosen_fell": intervals.ratio(fell, units, share=True),
    }
    columns = {
        "ref_chosen_logp": pairs.ref_chosen.numpy(),
        "ref_rejected_logp": pairs.ref_rejected.numpy(),
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "loss": losses,
    }
    return found, columns


def by_pair(loss_of) -> bool:
    """Whether a pair's loss here is the one that training would take; else it lacks what steps and
    tokens add.
    """
    return not loss_of.couples and not loss_of.shared.use_weighting and loss_of.shared.ld_alpha == 1


def likelihoods(pairs: Pairs, units) -> dict:
    """Measures of one model alone: log-probabilities a response and a token, and how often chosen
    is the likelier.
    """
    chosen, rejected = pairs.chosen.numpy(), pairs.rejected.numpy()
    chosen_len, rejected_len = pairs.chosen_len.numpy(), pairs.rejected_len.numpy()
    wins = lambda difference: metrics.wins(torch.from_numpy(difference)).double().numpy()
    per_token = chosen / chosen_len - rejected / rejected_len
    return {
        "logps/chosen": intervals.ratio(chosen, units),
        "logps/rejected": intervals.ratio(rejected, units),
        "logps/margins": intervals.ratio(chosen - rejected, units),
        "logps/accuracies": intervals.ratio(wins(chosen - rejected), units, share=True),
        "logps/chosen_per_token": intervals.ratio(chosen, units, chosen_len),
        "logps/rejected_per_token": intervals.ratio(rejected, units, rejected_len),
        "logps/accuracies_per_token": intervals.ratio(wins(per_token), units, share=True),
    }


def calibration(margins: torch.Tensor, units) -> dict:
    """How often the preferred answer is the better one, against how sure the model is: reliability
    table and ECE.

    Chosen always stands first, so what is calibrated is the confidence max(p, 1 - p) in the answer
    that the model prefers. A finite sample shows an error even of a calibrated model:
    `ece_if_calibrated` is where 95 % of samples of this size lie whose outcomes are drawn from the
    model's own confidences (Broecker and Smith 2007).
    """
    probability = torch.sigmoid(margins)
    confidence = torch.maximum(probability, 1 - probability)
    correct = metrics.wins(margins).double()
    edges = torch.tensor(CONFIDENCE_EDGES, dtype=torch.float64)
    table, _ = statistics.calibration(confidence, correct, edges)
    rows = [
        {
            "from": low,
            "to": high,
            "n": int(n),
            "confidence": sure if n else None,
            "accuracy": right if n else None,
            "interval": list(metrics.wilson(right, n)) if n else None,
        }
        for low, high, (n, sure, right) in zip(
            CONFIDENCE_EDGES, CONFIDENCE_EDGES[1:], table.tolist(), strict=False
        )
    ]
    error = lambda weights: (statistics.calibration(confidence, correct, edges, weights)[1],)
    found = intervals.resampled(error, units, measures={"ece": (0, 1)}, what=(len(margins),))
    draws = torch.from_numpy(np.random.default_rng(0).random((SIMULATIONS, len(margins))))  # (S, N)
    simulated = [
        statistics.calibration(confidence, (draw < confidence).double(), edges)[1] for draw in draws
    ]
    chance = torch.quantile(
        torch.stack(simulated), torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    return {
        "confidence": intervals.ratio(confidence.numpy(), units),
        **found,
        "ece_if_calibrated": chance,
        "table": rows,
    }


def by_length(margins: torch.Tensor, pairs: Pairs, units) -> list[dict]:
    """Accuracy where chosen is shorter, as long, and longer, by the relative difference in tokens."""
    difference = relative_length(pairs)
    group = np.clip(np.digitize(difference, LENGTH_EDGES[1:-1]), 0, len(LENGTH_EDGES) - 2)
    correct = metrics.wins(margins).double().numpy()
    return [
        {
            "from": low,
            "to": high,
            **intervals.ratio(correct[group == i], units[group == i], share=True),
        }
        for i, (low, high) in enumerate(zip(LENGTH_EDGES, LENGTH_EDGES[1:], strict=False))
    ]


def relative_length(pairs: Pairs) -> np.ndarray:
    """(N,) in [-1, 1]: above 0 where chosen is the longer answer."""
    chosen, rejected = pairs.chosen_len.double(), pairs.rejected_len.double()
    return ((chosen - rejected) / torch.maximum(chosen, rejected)).numpy()


def length_correlation(margins: torch.Tensor, pairs: Pairs) -> dict:
    """Spearman's rank correlation of the margin with chosen's excess length: far from 0, length
    explains the margin.
    """
    length, margin = relative_length(pairs), margins.numpy()
    if len(margin) < 4 or np.ptp(length) == 0 or np.ptp(margin) == 0:
        return {
            "value": None,
            "interval": None,
            "n": len(margin),
            "method": "none: too few pairs, or all alike",
        }
    rho = float(scipy.stats.spearmanr(length, margin).statistic)
    half = 1.959964 * np.sqrt(
        (1 + rho * rho / 2) / (len(margin) - 3)
    )  # Bonett and Wright 2000, on Fisher's z
    z = np.arctanh(np.clip(rho, -1 + 1e-12, 1 - 1e-12))
    return {
        "value": rho,
        "interval": [float(np.tanh(z - half)), float(np.tanh(z + half))],
        "n": len(margin),
        "method": "Bonett-Wright, by pair",
    }
