"""The table of losses, and how one or several of them become what a run minimises.

    loss = choose("sigmoid:1.0,sft:0.2", beta, {"label_smoothing": 0.1})
    losses = loss(pairs)    # (B,)
    losses, gradient = loss.over_step(pairs, running, mismatched)   # a whole coupled step

Legend: B pairs, or B responses that are labelled one by one; M mismatched responses.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from train.losses import preference
from train.losses.preference import (
    Labelled,
    Pairs,
    sigmoid,  # noqa: F401  (Pairs and sigmoid are looked for here)
)


def mean_reward(examples, beta: float, running, mismatched, update: bool):
    """BCO's delta: the mean of all rewards so far, with the step's where `update`."""
    if update:
        rewards = examples.rewards(beta)
        running.update(rewards if torch.is_tensor(rewards) else torch.cat(rewards))
    return running.mean


def mean_kl(examples, beta: float, running, mismatched, update: bool):
    """KTO's z: the mean log-ratio of the mismatched responses, at least 0, in nats."""
    if mismatched is None:
        raise ValueError(
            "kto needs the step's mismatched responses for its estimate of the KL divergence"
        )
    return max(0.0, float(mismatched.double().mean())) if mismatched.numel() else 0.0


class RunningMean:
    """The mean of every reward that training has seen. Part of a checkpoint."""

    def __init__(self):
        self.mean, self.count = 0.0, 0

    def update(self, rewards: torch.Tensor):
        """Take in a step's rewards, any shape."""
        self.count += rewards.numel()
        if rewards.numel():
            self.mean += float((rewards.detach().double() - self.mean).sum()) / self.count

    def state_dict(self) -> dict:
        """What a checkpoint holds."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict):
        """Go on from a checkpoint's."""
        self.mean, self.count = state["mean"], state["count"]


class LossRow(NamedTuple):
    """A loss, and what a run must know of it. Its own parameters are the keyword-only arguments of
    `of`.
    """

    of: Callable  # (Pairs, beta[, baseline], *, own parameters) -> (B,); of Labelled where it is `unpaired` too
    reference: bool = True  # it needs one
    divergence: bool = False  # made of differences of log-ratios, where an f-divergence's partition function cancels
    unpaired: Callable | None = None  # the same for Labelled, where it takes responses one by one
    baseline: Callable | None = (
        None  # what couples a step: a statistic that scores are measured against,
    )
    sorts: bool = False  # or an order

    @property
    def couples(self) -> bool:
        """Whether an example's loss depends on the step's other examples."""
        return self.sorts or self.baseline is not None


LOSSES: dict[str, LossRow] = {
    "sigmoid": LossRow(preference.sigmoid, divergence=True),
    "robust": LossRow(preference.robust, divergence=True),
    "hinge": LossRow(preference.hinge, divergence=True),
    "ipo": LossRow(preference.ipo, divergence=True),
    "exo_pair": LossRow(preference.exo_pair, divergence=True),
    "nca_pair": LossRow(preference.nca_pair),
    "bco_pair": LossRow(preference.bco_pair, unpaired=preference.bco, baseline=mean_reward),
    "sppo_hard": LossRow(preference.sppo_hard),
    "aot": LossRow(preference.aot, sorts=True),
    "aot_unpaired": LossRow(preference.aot_unpaired, unpaired=preference.aot_unpaired, sorts=True),
    "apo_zero": LossRow(preference.apo_zero),
    "apo_down": LossRow(preference.apo_down),
    "discopop": LossRow(preference.discopop, divergence=True),
    "sft": LossRow(preference.sft, reference=False),
    "sigmoid_norm": LossRow(preference.sigmoid_norm, divergence=True),
    "simpo": LossRow(preference.simpo, reference=False),
    "orpo": LossRow(preference.orpo, reference=False),
    "cpo": LossRow(preference.cpo, reference=False),
    "kto": LossRow(preference.kto, unpaired=preference.kto, baseline=mean_kl),
    "dpop": LossRow(preference.dpop),
    "rpo": LossRow(preference.rpo),
    "rdpo": LossRow(preference.rdpo),
}

# f'(t) of a divergence, up to a constant, by the log-ratio u = log t and TRL's coefficient: what
# stands for u in a loss (Wang et al. 2023, arXiv 2309.16240, table 1). The coefficient is 1 - alpha
# of that table.
DIVERGENCES: dict[str, Callable] = {
    "reverse_kl": lambda u, coef: u,
    "forward_kl": lambda u, coef: -_expm1(-u),
    "js_divergence": lambda u, coef: math.log(2) + F.logsigmoid(u),
    "alpha_divergence": lambda u, coef: (
        u if abs(coef - 1) < 1e-6 else _expm1((coef - 1) * u) / (coef - 1)
    ),
}


def _expm1(x):
    # as TRL's alpha_divergence, and here forward_kl's too: cut before infinity, from where on the
    # gradient is 0
    return torch.expm1(x.clamp(max=80.0 if x.dtype == torch.float32 else 700.0))


class SharedParameters(NamedTuple):
    """Parameters that go with any loss they make sense for; names and defaults as TRL's."""

    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float = 1.0  # of LD-DPO (logprobs.damped); 1 damps nothing
    use_weighting: bool = False  # WPO (logprobs.weights)

    def check(self, rows: dict[str, LossRow], given: dict):
        """ValueError where they are out of range, or not for one of these losses."""

        def only(choices, what):
            if wrong := [name for name in rows if name not in choices]:
                raise ValueError(
                    f"{what} is not for {', '.join(wrong)}; it is for: {', '.join(choices)}"
                )

        if self.f_divergence_type not in DIVERGENCES:
            raise ValueError(
                f"f_divergence_type {self.f_divergence_type!r} is none of: {', '.join(DIVERGENCES)}"
            )
        if "f_alpha_divergence_coef" in given and self.f_divergence_type != "alpha_divergence":
            raise ValueError("f_alpha_divergence_coef is for f_divergence_type alpha_divergence")
        if not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha lies in [0, 1], not at {self.ld_alpha}")
        if self.f_divergence_type != "reverse_kl":
            # sft has no log-ratio to replace, and may go along
            only(
                [n for n, row in LOSSES.items() if row.divergence or n == "sft"],
                "f_divergence_type",
            )
        if self.ld_alpha < 1:
            only([n for n, row in LOSSES.items() if row.reference], "ld_alpha")
        if self.use_weighting:
            only([n for n, row in LOSSES.items() if not row.sorts], "use_weighting")


class WeightedLoss(NamedTuple):
    """One loss of a weighted sum."""

    name: str
    weight: float
    own: dict  # its parameters


class Loss(NamedTuple):
    """What a run minimises: losses with weights, beta and parameters bound."""

    parts: tuple[WeightedLoss, ...]
    beta: float
    across: SharedParameters

    @property
    def needs_reference(self) -> bool:
        """Whether it says anything about a reference."""
        return any(LOSSES[part.name].reference for part in self.parts)

    @property
    def couples(self) -> bool:
        """Whether it takes `over_step`: one step's examples at once."""
        return any(LOSSES[part.name].couples for part in self.parts)

    @property
    def takes_labelled(self) -> bool:
        """Whether it takes rows of k = 1. Damping needs the pair: its shared length."""
        return all(LOSSES[part.name].unpaired for part in self.parts) and self.across.ld_alpha == 1

    @property
    def wants_mismatched(self) -> bool:
        """Whether each response needs a mismatched one beside it in the pass that scores the step."""
        return any(LOSSES[part.name].baseline is mean_kl for part in self.parts)

    def __call__(
        self, examples: Pairs | Labelled, weights: torch.Tensor | None = None, baselines=None
    ) -> torch.Tensor:
        """(B,): one number an example, times WPO's weights (B,). `baselines`: by name, 0 where
        there is none.
        """
        total = 0
        for part in self.parts:
            given = [(baselines or {}).get(part.name, 0.0)] if LOSSES[part.name].baseline else []
            total = total + part.weight * self._of(part, examples, *given)
        return total if weights is None else total * weights

    def _of(self, part, examples, *baseline):
        row = LOSSES[part.name]
        if isinstance(examples, Labelled):
            return row.unpaired(examples, self.beta, *baseline, **part.own)
        if row.unpaired is row.of:
            return row.of(examples.split(), self.beta, *baseline, **part.own).view(-1, 2).mean(1)
        if row.divergence:
            examples = diverged(
                examples, self.across.f_divergence_type, self.across.f_alpha_divergence_coef
            )
        return row.of(examples, self.beta, *baseline, **part.own)

    def over_step(
        self,
        examples: Pairs | Labelled,
        running: RunningMean,
        mismatched: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        update: bool = True,
    ):
        """The losses (B,) of a whole step's scores, and the gradient of their sum by these scores.

        `mismatched`: (M,) nats, log-ratios of mismatched responses. `update`: take the step into
        `running`, as training does. The gradient's order is that of a row's scores: (2B,) chosen
        and rejected in turn, (B,) for Labelled.
        """
        examples = type(examples)(*(x.detach() for x in examples))
        baselines = {
            part.name: baseline(examples, self.beta, running, mismatched, update)
            for part in self.parts
            if (baseline := LOSSES[part.name].baseline)
        }
        sides = ["logps"] if isinstance(examples, Labelled) else ["chosen", "rejected"]
        with torch.enable_grad():
            leaves = {side: getattr(examples, side).clone().requires_grad_() for side in sides}
            losses = self(examples._replace(**leaves), weights, baselines)
            gradients = torch.autograd.grad(
                losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        return losses.detach(), torch.stack(gradients, 1).flatten()


def diverged(pairs: Pairs, kind: str, coef: float) -> Pairs:
    """The same pairs with f' of a divergence's ratio in place of the log-ratios; `reverse_kl`
    leaves them alone.
    """
    if kind == "reverse_kl":
        return pairs
    score, zeros = DIVERGENCES[kind], torch.zeros_like(pairs.ref_chosen)
    chosen, rejected = pairs.rewards(1.0)
    return pairs._replace(
        chosen=score(chosen, coef),
        rejected=score(rejected, coef),
        ref_chosen=zeros,
        ref_rejected=zeros,
    )


def parse(spec: str) -> dict[str, float]:
    """ "sigmoid:1.0,sft:0.2" -> weights by name, 1 where none is given. ValueError with the
    choices.
    """
    weights = {}
    for part in spec.split(","):
        name, colon, weight = map(str.strip, part.partition(":"))
        if name not in LOSSES:
            raise ValueError(f"loss {name!r} is none of: {', '.join(LOSSES)}")
        if name in weights:
            raise ValueError(f"loss {name!r} stands twice in {spec!r}")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ValueError(
                f"the weight of loss {name!r} is a number above 0, not {weight!r}: sigmoid:1.0,sft:0.2"
            )
    return weights


def choose(spec: str, beta: float, args: dict) -> Loss:
    """The losses of `spec` (a name, or name:weight,name:weight) with beta and parameters bound.

    A key of `args` goes to the one loss that takes it; where several do, it is written name.key.
    Keys of Across go with all. ValueError with the choices where a loss or a key does not exist, or
    a value is out of range.
    """
    weights = parse(spec)
    own = {
        name: {
            p.name: p.default
            for p in inspect.signature(LOSSES[name].of).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        for name in weights
    }
    bound, shared, unknown = {name: {} for name in weights}, {}, []
    for key, value in args.items():
        name, _, short = key.rpartition(".")
        takers = [loss for loss in own if short in own[loss] and name in ("", loss)]
        if len(takers) > 1:
            raise ValueError(
                f"{' and '.join(takers)} take {key}: write {' or '.join(f'{t}.{key}' for t in takers)}"
            )
        if takers:
            bound[takers[0]][short] = _of_type(key, value, own[takers[0]][short])
        elif key in SharedParameters._fields:
            shared[key] = _of_type(key, value, SharedParameters._field_defaults[key])
        else:
            unknown.append(key)
    if unknown:
        known = ", ".join(short for each in own.values() for short in each) or "none"
        raise ValueError(
            f"loss {spec!r} takes no {', '.join(unknown)}; its parameters are: {known}; those across "
            f"losses: {', '.join(SharedParameters._fields)}"
        )
    across = SharedParameters(**shared)
    across.check({name: LOSSES[name] for name in weights}, shared)
    loss = Loss(
        tuple(WeightedLoss(name, weight, bound[name]) for name, weight in weights.items()),
        beta,
        across,
    )
    loss(
        Pairs(*torch.zeros(6, 1))
    )  # parameters out of range are refused here, before a model is loaded
    return loss


def _of_type(key, value, default):
    wanted = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
        raise ValueError(f"{key} is a {type(default).__name__}, not {value!r}")
    return value
