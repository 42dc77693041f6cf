"""The table of losses, and how one or several of them become what a run minimises.

    loss = choose("sigmoid:1.0,sft:0.2", beta, {"label_smoothing": 0.1})
    losses = loss(pairs)    # (B,)
    losses, gradient = loss.over_step(pairs, running, mismatched)   # a whole coupled step

A new loss is a function in preference.py and a row of LOSSES here.

Legend: B pairs, or B responses that are labelled one by one; M mismatched responses.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F

from train.losses import preference
from train.losses.preference import Labelled, Pairs

# Statistics of a step that couple its examples: a loss measures its rewards against one of them.


def mean_reward(examples, beta: float, running, mismatched, update: bool) -> float:
    """BCO's delta: the mean of all rewards so far, with the step's where `update`.

    Jung et al. 2024 (arXiv 2404.04656), section 4.
    """
    if update:
        rewards = examples.rewards(beta)  # (B,), or (B,) of chosen and of rejected
        running.update(rewards if torch.is_tensor(rewards) else torch.cat(rewards))
    return running.mean


def mean_kl(examples, beta: float, running, mismatched, update: bool) -> float:
    """KTO's z: the mean log-ratio of the mismatched responses, at least 0, in nats.

    Ethayarajh et al. 2024 (arXiv 2402.01306), z of equation 7.
    """
    if mismatched is None:
        raise ValueError(
            "kto needs the step's mismatched responses for its estimate of the KL divergence"
        )
    # a step whose prompts are all the same has no mismatched responses
    return max(0.0, float(mismatched.double().mean())) if mismatched.numel() else 0.0


class RunningMean:
    """The mean of every reward that training has seen. Part of a checkpoint."""

    def __init__(self):
        self.mean = 0.0
        self.count = 0

    def update(self, rewards: torch.Tensor):
        """Take in a step's rewards, any shape."""
        self.count += rewards.numel()
        if rewards.numel():
            # the mean moves by what the new rewards differ from it: no large sums to cancel
            self.mean += float((rewards.detach().double() - self.mean).sum()) / self.count

    def state_dict(self) -> dict:
        """The mean and the count, for a checkpoint's JSON."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict):
        """Continue from a checkpoint's."""
        self.mean = state["mean"]
        self.count = state["count"]


class Reward(NamedTuple):
    """What a loss takes for the reward of a response: the function of one response whose values for
    chosen and rejected it compares, or judges one by one.

    It is what training, evaluation, table, card and board show. Target margins, penalties of one
    side, smoothing and a step's baseline are not in it, nor what depends on the prompt alone.
    """

    per_token: bool  # the mean over the response's tokens, else the sum
    of_ratio: bool = True  # of log pi - log pi_ref, else of log pi
    scaled: bool = True  # times beta
    paid_a_token: str = ""  # the loss's parameter that is added for each token of length

    def __call__(self, responses: Labelled, beta: float, args: dict) -> torch.Tensor:
        """(B,), of B responses. args: the loss's own parameters."""
        values = responses.logps - responses.ref_logps if self.of_ratio else responses.logps
        if self.per_token:
            values = values / responses.lengths.clamp(min=1)  # an empty response: 0
        if self.scaled:
            values = beta * values
        if self.paid_a_token:
            values = values + args[self.paid_a_token] * responses.lengths.to(values.dtype)
        return values

    def formula(self, args: dict) -> str:
        """The same in words, for people."""
        words = "log-ratio to the reference" if self.of_ratio else "log-prob"
        words += ", mean a token" if self.per_token else ", summed"
        if self.scaled:
            words = f"beta x {words}"
        if self.paid_a_token:
            words += f", + {args[self.paid_a_token]:g} a token of length"
        return words


SUMMED_RATIO = Reward(per_token=False)
MEAN_RATIO = Reward(per_token=True)
SUMMED_LOGP = Reward(per_token=False, of_ratio=False)
MEAN_LOGP = Reward(per_token=True, of_ratio=False)


class LossRow(NamedTuple):
    """A loss, and all that the rest of the house must know of it.

    Its own parameters are the keyword-only arguments of `function`; where there is a `statistic`,
    the functions take it as `baseline`.
    """

    of_pairs: Callable | None  # (Pairs, beta[, baseline], *, parameters) -> (B,)
    paper: str  # its arXiv id
    reward: Reward = SUMMED_RATIO
    compares: bool = True  # chosen with rejected, or each with a baseline; else it ignores rejected
    of_labelled: Callable | None = None  # (Labelled, beta[, baseline], *, parameters) -> (B,)
    # there is no `of_pairs`: a pair is two labelled responses, and its number the mean of theirs
    pair_as_two: bool = False
    needs_reference: bool = True
    # each step is scored with responses to other prompts as well
    needs_mismatched: bool = False
    statistic: Callable | None = None  # of the whole step: mean_reward, mean_kl, or none
    sorts: bool = False  # the examples of the whole step, by their scores
    # made of differences of log-ratios, in which an f-divergence's partition function cancels
    f_divergence: bool = False

    @property
    def couples(self) -> bool:
        """Whether an example's loss depends on the step's other examples."""
        return self.sorts or self.statistic is not None

    @property
    def function(self) -> Callable:
        """The function that a pair's number comes from."""
        return self.of_labelled if self.pair_as_two else self.of_pairs

    @property
    def parameters(self) -> dict:
        """The loss's own parameters and their defaults."""
        signature = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}


LOSSES: dict[str, LossRow] = {
    "sigmoid": LossRow(preference.sigmoid, paper="2305.18290", f_divergence=True),
    "robust": LossRow(preference.robust, paper="2403.00409", f_divergence=True),
    "hinge": LossRow(preference.hinge, paper="2305.10425", f_divergence=True),
    "ipo": LossRow(preference.ipo, paper="2310.12036", reward=MEAN_RATIO, f_divergence=True),
    "exo_pair": LossRow(preference.exo_pair, paper="2402.00856", f_divergence=True),
    "nca_pair": LossRow(preference.nca_pair, paper="2402.05369"),
    "bco_pair": LossRow(
        preference.bco_pair,
        paper="2404.04656",
        of_labelled=preference.bco,
        statistic=mean_reward,
    ),
    "sppo_hard": LossRow(preference.sppo_hard, paper="2405.00675"),
    "aot": LossRow(preference.aot, paper="2406.05882", sorts=True),
    "aot_unpaired": LossRow(
        of_pairs=None,
        paper="2406.05882",
        of_labelled=preference.aot_unpaired,
        pair_as_two=True,
        sorts=True,
    ),
    "apo_zero": LossRow(preference.apo_zero, paper="2408.06266"),
    "apo_down": LossRow(preference.apo_down, paper="2408.06266"),
    "discopop": LossRow(preference.discopop, paper="2406.08414", f_divergence=True),
    # it has no beta
    "sft": LossRow(
        preference.sft,
        paper="2411.10442",
        reward=MEAN_LOGP._replace(scaled=False),
        compares=False,
        needs_reference=False,
    ),
    "sigmoid_norm": LossRow(
        preference.sigmoid_norm, paper="2411.15124", reward=MEAN_RATIO, f_divergence=True
    ),
    "simpo": LossRow(preference.simpo, paper="2405.14734", reward=MEAN_LOGP, needs_reference=False),
    # compares log odds, which are a function of the mean that rises with it: as ORPO's authors and
    # TRL, what is shown is the mean
    "orpo": LossRow(preference.orpo, paper="2403.07691", reward=MEAN_LOGP, needs_reference=False),
    "cpo": LossRow(preference.cpo, paper="2401.08417", reward=SUMMED_LOGP, needs_reference=False),
    "kto": LossRow(
        of_pairs=None,
        paper="2402.01306",
        of_labelled=preference.kto,
        pair_as_two=True,
        needs_mismatched=True,
        statistic=mean_kl,
    ),
    "dpop": LossRow(preference.dpop, paper="2402.13228"),
    "rpo": LossRow(preference.rpo, paper="2404.19733"),
    "rdpo": LossRow(
        preference.rdpo, paper="2403.19159", reward=Reward(per_token=False, paid_a_token="alpha")
    ),
}


# What losses of the table are called elsewhere: offered where a name does not exist.
ALSO_CALLED = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid, with --loss_args.label_smoothing",
    "slic": "hinge",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "bco": "bco_pair",
    "sppo": "sppo_hard",
    "apo": "apo_zero or apo_down",
    "kto_pair": "kto",
    "nll": "sft",
    "length_norm": "sigmoid_norm",
    "tr_dpo": "sigmoid, with --reference_every",
    "ld_dpo": "sigmoid, with --loss_args.ld_alpha",
    "wpo": "sigmoid, with --loss_args.use_weighting true",
    "mpo": "sigmoid:0.8,bco_pair:0.2,sft:1.0",
}


# f'(t) of a divergence, up to a constant, by the log-ratio u = log t (nats, any shape) and TRL's
# coefficient: what stands for u in a loss. Wang et al. 2023 (arXiv 2309.16240), table 1, whose
# alpha is 1 minus the coefficient.


def reverse_kl(u, coef):
    """log t, of f(t) = t log t: the log-ratio itself, which is DPO."""
    return u


def forward_kl(u, coef):
    """1 - 1 / t, of f(t) = -log t."""
    return -_expm1(-u)


def js_divergence(u, coef):
    """log(2 t / (1 + t)), of f(t) = t log t - (1 + t) log((1 + t) / 2)."""
    return math.log(2) + F.logsigmoid(u)


def alpha_divergence(u, coef):
    """(t^(coef - 1) - 1) / (coef - 1), and its limit, log t, at a coefficient of 1."""
    return u if abs(coef - 1) < 1e-6 else _expm1((coef - 1) * u) / (coef - 1)


DIVERGENCES: dict[str, Callable] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def _expm1(x):
    # as TRL's alpha_divergence, and here forward_kl's too: cut before infinity, from where on the
    # gradient is 0; where the square, which ipo takes, is finite too
    return torch.expm1(x.clamp(max=40.0 if x.dtype == torch.float32 else 350.0))


class SharedParameters(NamedTuple):
    """Parameters that go with any loss they make sense for; names and defaults as TRL's."""

    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float = 1.0  # of LD-DPO (logprobs.damped); 1 damps nothing
    use_weighting: bool = False  # WPO (logprobs.weights)

    def check(self, names, args: dict):
        """ValueError where they are out of range, or not for one of the losses `names`.

        `args`: those that were given, as the others are allowed anywhere.
        """
        if self.f_divergence_type not in DIVERGENCES:
            raise ValueError(
                f"f_divergence_type {self.f_divergence_type!r} is none of: {', '.join(DIVERGENCES)}"
            )
        if "f_alpha_divergence_coef" in args and self.f_divergence_type != "alpha_divergence":
            raise ValueError("f_alpha_divergence_coef is for f_divergence_type alpha_divergence")
        if not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha lies in [0, 1], not at {self.ld_alpha}")
        if self.f_divergence_type != "reverse_kl":
            # sft has no log-ratio to replace, and may go along
            takers = [name for name, row in LOSSES.items() if row.f_divergence or name == "sft"]
            _refuse_others("f_divergence_type", names, takers)
        if self.ld_alpha < 1:
            takers = [name for name, row in LOSSES.items() if row.needs_reference]
            _refuse_others("ld_alpha", names, takers)
        if self.use_weighting:
            # a weight multiplies an example's own number, and a sort has none of its own
            takers = [name for name, row in LOSSES.items() if not row.sorts]
            _refuse_others("use_weighting", names, takers)


def _refuse_others(parameter, names, takers):
    """ValueError where one of the losses `names` is not among those that take `parameter`."""
    if wrong := [name for name in names if name not in takers]:
        raise ValueError(
            f"{parameter} is not for {', '.join(wrong)}; it is for: {', '.join(takers)}"
        )


class WeightedLoss(NamedTuple):
    """One loss of a weighted sum."""

    name: str
    weight: float
    args: dict  # its own parameters, where they are not the defaults


class Loss(NamedTuple):
    """What a run minimises: losses with weights, beta and parameters bound."""

    parts: tuple[WeightedLoss, ...]
    beta: float
    shared: SharedParameters

    @property
    def needs_reference(self) -> bool:
        """Whether a reference's log-probabilities count."""
        return any(LOSSES[part.name].needs_reference for part in self.parts)

    @property
    def couples(self) -> bool:
        """Whether it is a loss of one step's examples at once, and goes by `over_step`."""
        return any(LOSSES[part.name].couples for part in self.parts)

    @property
    def takes_labelled(self) -> bool:
        """Whether it takes labelled responses (k = 1). Damping needs the pair: its shared length."""
        all_do = all(LOSSES[part.name].of_labelled is not None for part in self.parts)
        return all_do and self.shared.ld_alpha == 1

    @property
    def needs_mismatched(self) -> bool:
        """Whether the pass that scores a step needs responses to other prompts as well."""
        return any(LOSSES[part.name].needs_mismatched for part in self.parts)

    @property
    def judge(self) -> WeightedLoss:
        """The part whose reward is shown: the first that compares, else the first."""
        return next((part for part in self.parts if LOSSES[part.name].compares), self.parts[0])

    @property
    def rewards_need_reference(self) -> bool:
        """Whether `rewards` are of log-ratios to a reference."""
        return LOSSES[self.judge.name].reward.of_ratio

    @property
    def formula_of_rewards(self) -> str:
        """What `rewards` are, in words."""
        row = LOSSES[self.judge.name]
        words = row.reward.formula(row.parameters | self.judge.args)
        if row.f_divergence and self.shared.f_divergence_type != "reverse_kl":
            words += f", the log-ratio as {self.shared.f_divergence_type} has it (f-DPO)"
        if self.shared.ld_alpha < 1:
            words += f", tokens past the shorter answer x {self.shared.ld_alpha:g} (LD-DPO)"
        if len(self.parts) > 1:
            words += f": that of {self.judge.name}"
        return words

    def rewards(self, examples: Pairs | Labelled) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The rewards that the loss looks at: (B,) of chosen and (B,) of rejected, or (B,) of
        labelled responses. See Reward; of a sum the `judge`'s.
        """
        row = LOSSES[self.judge.name]
        args = row.parameters | self.judge.args
        if isinstance(examples, Labelled):
            return row.reward(examples, self.beta, args)
        rewards = row.reward(self._diverging(row, examples).split(), self.beta, args)  # (2B,)
        return rewards[0::2], rewards[1::2]

    def _diverging(self, row: LossRow, pairs: Pairs) -> Pairs:
        """`pairs` as a loss that takes an f-divergence sees them; as they are for another."""
        if not row.f_divergence:
            return pairs
        return with_divergence(
            pairs, self.shared.f_divergence_type, self.shared.f_alpha_divergence_coef
        )

    def __call__(
        self,
        examples: Pairs | Labelled,
        weights: torch.Tensor | None = None,
        baselines: dict[str, float] | None = None,
    ) -> torch.Tensor:
        """(B,): one number an example, times WPO's weights (B,).

        `baselines`: the statistic of the step, by the loss's name; 0 for those that are left out.
        """
        baselines = baselines or {}
        total = 0
        for part in self.parts:
            losses = self._losses_of(part, examples, baselines.get(part.name, 0.0))
            total = total + part.weight * losses
        return total if weights is None else total * weights

    def _losses_of(self, part, examples, baseline):
        """(B,): one part of the sum, without its weight."""
        row = LOSSES[part.name]
        args = part.args if row.statistic is None else {"baseline": baseline, **part.args}
        if isinstance(examples, Labelled):
            return row.of_labelled(examples, self.beta, **args)
        if row.pair_as_two:
            losses = row.of_labelled(examples.split(), self.beta, **args)  # (2B,)
            return losses.view(-1, 2).mean(1)
        return row.of_pairs(self._diverging(row, examples), self.beta, **args)

    def over_step(
        self,
        examples: Pairs | Labelled,
        running: RunningMean,
        mismatched: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        update: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses (B,) of a whole step's scores, and the gradient of their sum by these scores.

        `mismatched`: (M,) nats, log-ratios of mismatched responses. `weights`: (B,) WPO's.
        `update`: take the step into `running`, as training does. The gradient's order is that of a
        batch's scores: (2B,) chosen and rejected in turn, (B,) for Labelled.
        """
        examples = type(examples)(*(x.detach() for x in examples))
        baselines = {}
        for part in self.parts:
            if statistic := LOSSES[part.name].statistic:
                baselines[part.name] = statistic(examples, self.beta, running, mismatched, update)
        fields = ["logps"] if isinstance(examples, Labelled) else ["chosen", "rejected"]
        # this runs in the pass that scores without gradient, and differentiates by the scores alone
        with torch.enable_grad():
            leaves = {name: getattr(examples, name).clone().requires_grad_() for name in fields}
            losses = self(examples._replace(**leaves), weights, baselines)
            # sft, say, does not look at rejected
            gradients = torch.autograd.grad(
                losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        return losses.detach(), torch.stack(gradients, 1).flatten()


def with_divergence(pairs: Pairs, kind: str, coef: float) -> Pairs:
    """The pairs with f' of a divergence's ratio in place of the log-ratios.

    Wang et al. 2023 (arXiv 2309.16240), table 1; `reverse_kl` changes nothing.
    """
    if kind == "reverse_kl":
        return pairs
    derivative = DIVERGENCES[kind]
    chosen, rejected = pairs.rewards(1.0)  # (B,) nats, the log-ratios
    zeros = torch.zeros_like(pairs.ref_chosen)
    # the whole term stands on the policy's side, so that differences to the reference are the term
    return pairs._replace(
        chosen=derivative(chosen, coef),
        rejected=derivative(rejected, coef),
        ref_chosen=zeros,
        ref_rejected=zeros,
    )


def parse(spec: str) -> dict[str, float]:
    """ "sigmoid:1.0,sft:0.2" -> weights by name, 1 where none is given.

    ValueError, with the choices, for a name that does not exist.
    """
    weights = {}
    for part in spec.split(","):
        name, colon, weight = map(str.strip, part.partition(":"))
        if name not in LOSSES:
            hint = meant(name, LOSSES, ALSO_CALLED)
            raise ValueError(f"loss {name!r}{hint} is none of: {', '.join(LOSSES)}")
        if name in weights:
            raise ValueError(f"loss {name!r} stands twice in {spec!r}")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            weights[name] = math.nan  # refused below, with the example
        if not 0 < weights[name] < math.inf:
            raise ValueError(
                f"the weight of loss {name!r} is a number above 0, not {weight!r}: sigmoid:1.0,sft:0.2"
            )
    return weights


def meant(name: str, losses: Collection[str], also_called: dict[str, str]) -> str:
    """What a loss that does not exist may be here, in words behind its name; "" where nothing is near."""
    name = name.lower().replace("-", "_")
    if name in also_called:
        return f", here called {also_called[name]},"
    near = difflib.get_close_matches(name, losses, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def choose(spec: str, beta: float, args: dict) -> Loss:
    """The losses of `spec` (a name, or name:weight,name:weight) with beta and parameters bound.

    A key of `args` goes to the one loss that takes it; where several do, it is written name.key.
    Keys of SharedParameters go with all. ValueError with the choices where a loss or a key does not
    exist, or a value is out of range.
    """
    weights = parse(spec)
    defaults = {name: LOSSES[name].parameters for name in weights}
    own_args, shared_args = _distribute(args, defaults, spec)
    shared = SharedParameters(**shared_args)
    shared.check(weights, shared_args)
    parts = (WeightedLoss(name, weight, own_args[name]) for name, weight in weights.items())
    loss = Loss(tuple(parts), beta, shared)
    # the functions refuse parameters out of range: here, before a model is loaded
    loss(Pairs(*torch.zeros(6, 1)))
    return loss


def _distribute(args, defaults, spec):
    """`args` by the loss that takes them, and those for all.

    `defaults`: the losses' own parameters and defaults, by the loss's name.
    """
    own_args = {name: {} for name in defaults}
    shared_args, unknown = {}, []
    for key, value in args.items():
        prefix, _, parameter = key.rpartition(".")
        takers = [name for name in defaults if parameter in defaults[name] and prefix in ("", name)]
        if len(takers) > 1:
            choices = " or ".join(f"{name}.{key}" for name in takers)
            raise ValueError(f"{' and '.join(takers)} take {key}: write {choices}")
        if takers:
            (name,) = takers
            own_args[name][parameter] = _of_type(key, value, defaults[name][parameter])
        elif key in SharedParameters._fields:
            shared_args[key] = _of_type(key, value, SharedParameters._field_defaults[key])
        else:
            unknown.append(key)
    if unknown:
        known = ", ".join(parameter for each in defaults.values() for parameter in each) or "none"
        raise ValueError(
            f"loss {spec!r} takes no {', '.join(unknown)}; its parameters are: {known}; those across "
            f"losses: {', '.join(SharedParameters._fields)}"
        )
    return own_args, shared_args


def _of_type(key, value, default):
    """`value` where it has the default's type, an int for a float included; ValueError otherwise."""
    wanted = (int, float) if isinstance(default, float) else type(default)
    # a bool is an int to Python
    if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
        raise ValueError(f"{key} is {kinds[type(default)]}, not {value!r}")
    return value
