"""The table of reinforcement learning's algorithms: a row for each, a column for each place where they
differ. losses/policy.py and losses/advantages.py compute what the cells say.

Imports no torch: train/settings.py reads here what an algorithm's numbers are.
"""

from typing import Literal, NamedTuple


class KL(NamedTuple):
    """The pull towards the reference: where it counts, how it is estimated, how strongly.

    With d = log(pi / pi_ref) of a sampled token the estimators (Schulman 2020, "Approximating KL
    divergence") are k1 = d, k2 = d^2 / 2 and k3 = exp(-d) - 1 + d. In the reward only k1 has the
    divergence's policy gradient. In the loss k1's expected gradient is 0, k2's is the divergence's
    while the policy is the one that drew, and r k3's is so always.
    """

    place: Literal["reward", "loss", "none"] = "none"
    estimator: Literal["k1", "k2", "k3", ""] = ""
    coef: float = 0.0

    def check(self):
        """ValueError for an estimator whose gradient is another one there."""
        if self.place == "reward" and self.estimator != "k1":
            raise ValueError(
                f"{self.estimator} in the reward does not have the KL's gradient: k1 does"
            )
        if self.place == "loss" and self.estimator not in ("k2", "k3"):
            raise ValueError(
                f"{self.estimator} in the loss has an expected gradient of 0: k2 or k3 there"
            )


class Algorithm(NamedTuple):
    """A row of the table: what one algorithm does at each place where they differ."""

    paper: str  # its arXiv id
    # "gae": over a value model's; "to_go": the rewards to come; "group": the whole answer's score
    # over its group's baseline, at every token
    advantage: Literal["gae", "to_go", "group"]
    samples: int  # answers to a prompt
    baseline: Literal["none", "mean", "leave_one_out"] = "none"  # of a group
    scale: Literal["group", "batch", "none"] = "none"  # what an advantage is divided by
    whiten: bool = False  # advantages over all tokens of the rollout
    kl: KL = KL()
    # "token": each token's; "mean", "sum": of an answer, exp of its tokens' mean or summed log-ratio;
    # "weight": detached before log pi (CISPO); "gate": through a sigmoid (SAPO)
    ratio: Literal["token", "mean", "sum", "weight", "gate"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0  # the bound at negative advantages, a multiple of them; 0: none
    # "tokens": their number; "samples": each sample's mean over its tokens, their number;
    # "constant": samples times M
    denominator: Literal["tokens", "samples", "constant"] = "tokens"
    epochs: int = 1  # passes over a rollout
    minibatches: int = 1  # updates a pass
    value_clip: float = 0.2  # how far a value moves before its loss is clipped; 0: no clipping
    resamples: int = 0  # how often a prompt with equal rewards is answered anew

    @property
    def needs_critic(self) -> bool:
        """Whether it has a value model."""
        return self.advantage == "gae"

    @property
    def needs_groups(self) -> bool:
        """Whether samples of a prompt are compared."""
        return self.baseline != "none"


GRPO = dict(advantage="group", samples=8, baseline="mean", scale="group")
K1 = KL("reward", "k1", 0.05)

ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm("1707.06347", "gae", 1, whiten=True, kl=K1, epochs=4),
    # on-policy: the ratio is 1 in its one update, and never clipped
    "rloo": Algorithm(
        "2402.14740", "group", 4, "leave_one_out", kl=K1, ratio="sum", denominator="samples"
    ),
    "reinforce++": Algorithm(
        "2501.03262", "to_go", 1, whiten=True, kl=KL("reward", "k1", 0.01), minibatches=4
    ),
    "reinforce++_baseline": Algorithm(
        "2501.03262", "group", 4, "mean", whiten=True, kl=KL("loss", "k2", 0.01), minibatches=4
    ),
    "grpo": Algorithm("2402.03300", **GRPO, kl=KL("loss", "k3", 0.04), denominator="samples"),
    "dr_grpo": Algorithm("2503.20783", "group", 8, "mean", denominator="constant"),
    "dapo": Algorithm("2503.14476", **GRPO, clip_high=0.28, minibatches=4, resamples=2),
    "gspo": Algorithm(
        "2507.18071",
        **GRPO,
        ratio="mean",
        clip_low=3e-4,
        clip_high=4e-4,
        denominator="samples",
        minibatches=4,
    ),
    # its upper bound is of the ratio itself, and there is no lower one
    "cispo": Algorithm("2506.13585", **GRPO, ratio="weight", clip_high=5.0, minibatches=4),
    # clip_low and clip_high are the gate's temperatures for negative and positive advantages
    "sapo": Algorithm(
        "2511.20347",
        **GRPO,
        ratio="gate",
        clip_low=1.05,
        clip_high=1.0,
        denominator="samples",
        minibatches=4,
    ),
}
