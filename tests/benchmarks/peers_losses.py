"""Every loss beside TRL 1.16's own code for it, on the same token log-probabilities: values and
gradients.

    python tests/benchmarks/peers_losses.py             # the table; needs pip install -e '.[peers]'

TRL's trainers are not run: their loss methods are, on a stand-in for the model that returns made
log-probabilities. Exit code 1 where a row that should be equal is not, or one that should differ
does not.
"""

import math
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch

from train.losses.composition import choose
from train.losses.logprobs import (
    damped,
    sum_per_response,
    wpo_weights,
)
from train.losses.preference import (
    Labelled,
    Pairs,
    kto,
    orpo,
)

BETA = 0.3
PAIRS = 9
EQUAL = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative to the largest number of the row's


class Case(NamedTuple):
    """One comparison. `why`: what our docstring says where the two differ, and "" where they must
    not. `raises`: TRL's backward pass does, and values alone are compared.
    """

    loss: str
    ours: dict  # loss_args
    theirs: dict  # of DPOConfig
    why: str = ""
    lengths: str = "mixed"
    fp32: bool = False
    raises: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """fp32 where TRL computes, or keeps a constant, in fp32."""
        return torch.float32 if self.fp32 or "exo_pair" in self.loss else torch.float64


F_NAMES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
FAR = "TRL's product of infinity and 0 is NaN at margins this far"
SMOOTH = {"exo_pair": {"label_smoothing": 1e-3}}  # TRL's default of 0 it refuses itself


def divergences():
    for name in F_NAMES:
        smooth = SMOOTH.get(name, {"label_smoothing": 0.1} if name == "robust" else {})
        for kind in ("forward_kl", "js_divergence"):
            why = FAR if (name, kind) == ("discopop", "forward_kl") else ""
            yield Case(
                name,
                smooth | {"f_divergence_type": kind},
                smooth | {"f_divergence_type": kind},
                why,
            )
        alpha = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}
        yield Case(name, smooth | alpha, smooth | alpha, fp32=True)


IN_PLACE = ("hinge",)  # TRL multiplies the weights into a tensor that the backward pass needs
PLAIN = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
)
CASES = [
    *(
        Case(
            name,
            SMOOTH.get(name, {"label_smoothing": 0.0} if name == "robust" else {}),
            SMOOTH.get(name, {}),
        )
        for name in PLAIN
    ),
    Case("sft", {}, {}, lengths="equal"),
    Case(
        "sft", {}, {}, why="TRL: the micro-batch's sum over its tokens; here each answer's own mean"
    ),
    *(
        Case(name, {"label_smoothing": 0.2}, {"label_smoothing": 0.2})
        for name in ("robust", "exo_pair", "aot", "aot_unpaired")
    ),
    Case(
        "sigmoid",
        {"label_smoothing": 0.2},
        {"label_smoothing": 0.2},
        why="TRL's sigmoid does not read it",
    ),
    Case("discopop", {"tau": 0.5}, {"discopop_tau": 0.5}),
    *divergences(),
    *(
        Case(
            name,
            SMOOTH.get(name, {"label_smoothing": 0.0} if name == "robust" else {})
            | {"ld_alpha": 0.4},
            SMOOTH.get(name, {}) | {"ld_alpha": 0.4},
        )
        for name in PLAIN
    ),
    *(
        Case(
            name,
            SMOOTH.get(name, {"label_smoothing": 0.0} if name == "robust" else {})
            | {"use_weighting": True},
            SMOOTH.get(name, {}) | {"use_weighting": True},
            raises=name in IN_PLACE,
        )
        for name in PLAIN
        if not name.startswith("aot")
    ),
    Case(
        "sigmoid:0.8,bco_pair:0.2,sft:1.0",
        {},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        lengths="equal",
    ),
]


class Made(NamedTuple):
    """Token values of PAIRS pairs, chosen and rejected in turn: (T,) nats, and lengths (2B,)."""

    logps: torch.Tensor
    ref_logps: torch.Tensor
    log_p2: torch.Tensor
    lengths: torch.Tensor


def made(case: Case) -> Made:
    random = torch.Generator().manual_seed(7)
    lengths = (
        torch.randint(1, 14, (2 * PAIRS,), generator=random)
        if case.lengths == "mixed"
        else torch.full((18,), 6)
    )
    total = int(lengths.sum())

    def values(scale):
        return -scale * torch.rand(total, dtype=torch.float64, generator=random)

    made = [values(3.0), values(3.0), values(2.0)]
    return Made(*(x.to(case.dtype) for x in made), lengths)


class Model(torch.nn.Module):
    """Stands for the model: returns what was made for the batch whose first token id is asked for."""

    is_gradient_checkpointing = False

    def __init__(self, answers: dict):
        super().__init__()
        self.answers = answers

    def forward(self, input_ids, **_):
        return self.answers[int(input_ids[0, 0])]


def padded(values, lengths):
    """(T,), (N,) -> (N, longest), zeros at the end."""
    rows = torch.nn.utils.rnn.pad_sequence(values.split(lengths.tolist()), batch_first=True)
    return rows


def answer(logps, log_p2=None):
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(
        log_probs=logps,
        log_sum_sq_probs=log_p2,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )


def stand_in(**settings):
    """What TRL's loss methods ask of their trainer."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    defaults = dict(
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        label_smoothing=0.0,
        beta=BETA,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(
            discopop_tau=settings.pop("discopop_tau", 0.05), gradient_checkpointing_kwargs=None
        ),
    )
    return SimpleNamespace(**defaults | settings)


def of_trl(case: Case, tokens: Made) -> torch.Tensor:
    """The mean loss of TRL's DPOTrainer over the pairs."""
    from trl import DPOTrainer

    sides = torch.cat(
        [torch.arange(0, 2 * PAIRS, 2), torch.arange(1, 2 * PAIRS, 2)]
    )  # chosen first, then rejected

    def place(values):
        return padded(values, tokens.lengths)[sides]

    mask = padded(torch.ones_like(tokens.logps, dtype=torch.long), tokens.lengths)[sides]
    mask = torch.cat(
        [torch.zeros(2 * PAIRS, 1, dtype=torch.long), mask], 1
    )  # a prompt of one token
    model = Model({1: answer(place(tokens.logps), place(tokens.log_p2))})
    settings = {"loss_type": [case.loss]} | case.theirs
    trainer = stand_in(
        loss_types=settings.pop("loss_type"),
        ref_model=Model({1: answer(place(tokens.ref_logps))}),
        model=model,
        **{"loss_weights": [1.0]} | settings,
    )
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, False)


def of_ours(case: Case, tokens: Made) -> torch.Tensor:
    """Our mean loss over the pairs, by the way that a row takes."""
    loss = choose(case.loss, BETA, case.ours)
    logps, ref_logps, lengths = tokens.logps, tokens.ref_logps, tokens.lengths
    of_pair = None
    if loss.shared.use_weighting:
        each = wpo_weights(logps, tokens.log_p2, lengths)
        of_pair = each[0::2] * each[1::2]
    values = (damped(x, lengths, loss.shared.ld_alpha) for x in (logps, ref_logps))
    return loss(Pairs.of(*(sum_per_response(x, lengths) for x in values), lengths), of_pair).mean()


def of_trl_kto(tokens: Made, mismatched: Made) -> torch.Tensor:
    """The mean loss of TRL's KTOTrainer: responses with even numbers are desired."""
    from trl import KTOTrainer

    batch = {"label": torch.arange(2 * PAIRS) % 2 == 0}
    answers, ref_answers = {}, {}
    for number, (prefix, part) in enumerate((("", tokens), ("KL_", mismatched)), 1):
        mask = padded(torch.ones_like(part.logps, dtype=torch.long), part.lengths)
        mask = torch.cat([torch.zeros(2 * PAIRS, 1, dtype=torch.long), mask], 1)
        batch |= {
            f"{prefix}input_ids": torch.full_like(mask, number),
            f"{prefix}attention_mask": torch.ones_like(mask),
            f"{prefix}completion_mask": mask,
        }
        answers[number] = answer(padded(part.logps, part.lengths))
        ref_answers[number] = answer(padded(part.ref_logps, part.lengths))
    model = Model(answers)
    trainer = stand_in(
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        model=model,
        ref_model=Model(ref_answers),
    )
    trainer._compute_kl_logps = lambda *given: KTOTrainer._compute_kl_logps(trainer, *given)
    return KTOTrainer._compute_loss(trainer, model, batch, False)


def kto_row():
    case = Case("kto", {"desirable_weight": 1.2, "undesirable_weight": 0.7}, {})
    tokens, other = made(case), made(case)
    # likelier than under the reference, so that the estimate of the KL divergence is above its
    # bound of 0
    other = other._replace(logps=other.logps * 0.5)

    def theirs(logps):
        return of_trl_kto(tokens._replace(logps=logps), other)

    ratio = sum_per_response(other.logps, other.lengths) - sum_per_response(
        other.ref_logps, other.lengths
    )
    assert ratio.mean() > 0

    def examples(logps):
        return Labelled(
            sum_per_response(logps, tokens.lengths),
            sum_per_response(tokens.ref_logps, tokens.lengths),
            tokens.lengths,
            torch.arange(2 * PAIRS) % 2 == 0,
        )

    def ours(logps):
        return kto(examples(logps), BETA, float(ratio.mean()), **case.ours).mean()

    return case, tokens, ours, theirs


def reference_free_rows():
    """CPOTrainer's simpo and preference term, ORPOTrainer's odds term: TRL takes sums or means of
    log-probabilities.
    """
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    def pairs(logps, tokens):
        return Pairs.of(*(sum_per_response(logps, tokens.lengths),) * 2, tokens.lengths)

    def cpo_trainer(loss_type, logps, tokens):
        p = pairs(logps, tokens)
        given = (
            p.per_token(p.chosen, p.rejected) if loss_type == "simpo" else (p.chosen, p.rejected)
        )
        trainer = stand_in(alpha=0.0, loss_type=loss_type, simpo_gamma=0.9)
        return CPOTrainer.cpo_loss(trainer, *given)[0].mean()

    def odds(logps, tokens):
        p = pairs(logps, tokens)
        return -ORPOTrainer.odds_ratio_loss(stand_in(), *p.per_token(p.chosen, p.rejected))[
            0
        ].mean()

    simpo, cpo_case = Case("simpo", {"gamma": 0.9}, {}), Case("cpo", {"nll_weight": 0.0}, {})
    odds_case = Case("orpo", {}, {}, fp32=True)  # TRL computes it in fp32
    for case, theirs in (
        (simpo, lambda logps, t: cpo_trainer("simpo", logps, t)),
        (cpo_case, lambda logps, t: cpo_trainer("sigmoid", logps, t)),
        (odds_case, odds),
    ):
        tokens = made(case)

        def ours(logps, c=case, t=tokens):
            return choose(c.loss, BETA, c.ours)(pairs(logps, t)).mean()

        if case.loss == "orpo":

            def ours(logps, t=tokens):
                return (orpo(pairs(logps, t), BETA) - pairs(logps, t).nll()).mean()

        yield case, tokens, ours, lambda logps, t=tokens, f=theirs: f(logps, t)


def rows():
    """Every comparison: the case, its tokens, and two functions of token log-probabilities."""
    for case in CASES:
        tokens = made(case)
        yield (
            case,
            tokens,
            lambda logps, c=case, t=tokens: of_ours(c, t._replace(logps=logps)),
            lambda logps, c=case, t=tokens: of_trl(c, t._replace(logps=logps)),
        )
    yield kto_row()
    yield from reference_free_rows()


class Found(NamedTuple):
    case: Case
    ours: float
    theirs: float
    value_gap: float  # relative
    gradient_gap: (
        float | None
    )  # relative to the largest entry; None where TRL's backward pass raises

    @property
    def equal(self) -> bool:
        return all(
            gap <= EQUAL[self.case.dtype] for gap in (self.value_gap, self.gradient_gap or 0.0)
        )

    @property
    def as_said(self) -> bool:
        """Equal, or different with a reason given."""
        return self.equal != bool(self.case.why) and (self.gradient_gap is None) == self.case.raises


def compare(case, tokens, ours, theirs) -> Found:
    def near(a, b):
        return float((a - b).abs().max() / b.abs().max())

    leaf = tokens.logps.clone().requires_grad_()
    value, their_value = ours(leaf), theirs(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    try:
        gap = near(gradient, torch.autograd.grad(their_value, leaf)[0])
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        gap = None
    value, their_value = value.detach(), their_value.detach()
    return Found(case, float(value), float(their_value), near(value, their_value), gap)


def main():
    import trl

    torch.set_num_threads(1)
    print(
        f"TRL {trl.__version__}, torch {torch.__version__}: the mean over {PAIRS} pairs, beta {BETA}. Gaps are "
        "relative, of the value and of its gradient by token log-probabilities.\n"
    )
    print(
        "| loss | its parameters | type | here | TRL | gap | gradient's gap | |\n|---|---|---|---|---|---|---|---|"
    )
    sound = True
    for row in rows():
        found = compare(*row)
        case, sound = found.case, sound and found.as_said
        verdict = "equal" if found.equal else f"differs: {case.why}" if case.why else "NOT EQUAL"
        verdict += "; TRL's backward pass raises" * (found.gradient_gap is None)
        verdict += "" if found.as_said else " (UNEXPECTED)"
        given = ", ".join(f"{k}={v}" for k, v in case.ours.items()) + (
            " (equal lengths)" * (case.lengths == "equal")
        )
        print(
            f"| {case.loss} | {given} | {str(case.dtype)[6:]} | {found.ours:.9g} | {found.theirs:.9g} | "
            f"{found.value_gap:.1e} | {math.nan if found.gradient_gap is None else found.gradient_gap:.1e} | "
            f"{verdict} |"
        )
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
