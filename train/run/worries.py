"""What a run's own numbers say against going on as it does, in a line with what to change."""

NOTHING_LEFT = 1e-3  # a loss below which a step changes next to nothing
STEPS = 20  # for which it has to be so low


class NothingLeft:
    """Watches training's loss for pairs that have nothing left to teach."""

    def __init__(self):
        self._since, self._said = None, False

    def look(self, first: int, last: int, loss: float) -> str | None:
        """The warning, once, after STEPS steps of a low loss in a row; else None.

        loss: the mean of steps `first` to `last`. A loss that goes below 0 has no such floor.
        """
        if not 0 <= loss < NOTHING_LEFT:
            self._since = None
            return None
        if self._since is None:
            self._since = first
        if self._said or last - self._since + 1 < STEPS:
            return None
        self._said = True
        return (
            f"warning: the loss has been below {NOTHING_LEFT} since step {self._since}: these rows have "
            "next to nothing left to teach; fewer --epochs or --max_steps, a smaller --lr, for a "
            "preference loss a smaller --beta, or harder rows would change that"
        )


def chosen_fell(evaluated: dict[int, dict]) -> str | None:
    """A line where the held-out log-probs of chosen answers fell from each evaluation to the next.

    Their margin grows all the same: likelihood displacement, Razin et al. 2025 (arXiv 2410.08847).
    """
    logps = [values.get("logps/chosen") for _, values in sorted(evaluated.items())]
    if len(logps) < 2 or None in logps:
        return None
    if not all(after < before for before, after in zip(logps, logps[1:], strict=False)):
        return None
    return (
        f"note: the log-probs of the chosen answers fell throughout, from {logps[0]:.1f} to "
        f"{logps[-1]:.1f} nats: what they lost went to answers that nobody judged; --loss dpop, or a "
        "share of sft as in sigmoid:1,sft:0.1, holds them up"
    )
