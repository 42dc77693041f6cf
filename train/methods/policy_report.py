"""What a run of reinforcement learning tells its user: bar, TensorBoard, run.json, the closing table.

Names are TRL's where it has one: objective/*, policy/*, loss/*, val/* (ratio and clipping),
completions/*, rewards/NAME/*; what the held-out prompts say stands under eval/*.

Legend: P prompts, k samples of each, B = P k samples, T tokens of all answers, F sources of reward.
"""

import math
import time

import numpy as np
import torch

from train.data import mixing
from train.data.packing import digest
from train.engine import dist
from train.losses import policy
from train.losses.metrics import POLICY_METRICS, Metric
from train.methods import rollout
from train.methods.answers import COMPARED, against, columns_of_tokens, summary
from train.methods.intervals import show
from train.methods.policy_setup import Models, Rewards, samples_of
from train.methods.rollout import Rollout, per_answer
from train.run import card, commands, report
from train.run.meter import peak_memory
from train.run.tensorboard import open_board
from train.settings import telling

SHOWN = 4  # answers in a table of TensorBoard, and in run.json before and after
NAMES = [metric.name for metric in POLICY_METRICS]
# CUSTOM SCALARS: what was drawn, and what the held-out prompts are answered with
KL_CHART = "KL to the reference, nats"
CHARTS = {
    "reward": ["objective/scores", "eval/reward"],
    KL_CHART: ["objective/kl", "eval/kl"],
    "length, tokens": ["completions/mean_length", "eval/length"],
    "ended by themselves": ["eval/ended"],
    "repeated 4-grams": ["eval/repetition"],
    "policy's loss": ["loss/policy_avg"],
}
CUT_WARNING, FLAT_WARNING = 0.5, 0.8


class PolicyReport:
    """The numbers of one run, collected and shown. A part of its checkpoints (run/checkpoint.py)."""

    known_late = True  # what the last update came to

    def __init__(self, run, settings, algorithm, models: Models, rewards: Rewards, held_out):
        """held_out: Prompts, or None."""
        self.run, self.settings, self.algorithm = run, settings, algorithm
        self.models, self.rewards, self.held_out = models, rewards, held_out
        self.board = None  # from `start` on
        self.sums = no_sums(run.device)  # of the updates of this rollout
        self.ratios = []  # of the last update's tokens of this rank, (T,) a batch
        self.updates = []  # the rollout's last ones, (model's name, engine/trained.py: Update)
        self.of_updates = {}  # what is shown of them, where they were done before the run went on
        self.seconds = {}  # what the rollout's time went to
        self.evaluated, self.evaluated_at = {}, -1
        self.answers = {}  # of the held-out prompts, at the start and last, for people
        self.first_columns = {}  # measures of those at the start, by name, a value a prompt
        self.comparison = {}  # of the last ones with those
        self.last = {}
        self._events = None

    # What the loop asks for (run/loop.py: Report).

    def start(self):
        """Open TensorBoard and the bar."""
        goes_on = self._events is not None
        within = goes_on and bool(self.run.checkpointer.resumed_within)
        self.board = open_board(self.run, self.settings.report_to, within)
        if not goes_on:
            no_kl = set() if self.algorithm.kl.coef else {KL_CHART}
            charts = {title: tags for title, tags in CHARTS.items() if title not in no_kl}
            self.board.custom_scalars({"rollouts": charts})
        if goes_on:
            self.board.cut(self._events)
            self.run.note(evaluations=self.evaluated, comparison=self.comparison)

    def step(self, step, updates):
        """Show a finished rollout. Every rank calls this."""
        number = step.number + 1
        summed = dist.all_reduce(self.sums.clone())  # a mark may hold this rank's own
        means = policy.means(summed, self.algorithm.needs_critic)
        shown = self.last | means | {"train/epoch": step.epoch}
        shown |= norms_and_rates(updates[-2:]) or self.of_updates
        trained = (self.models.policy, self.models.critic)
        shown["health/skipped_steps"] = sum(model.skipped for model in trained if model is not None)
        ratios = torch.cat([torch.zeros(0), *(each.cpu() for each in self.ratios)])
        everyone = torch.cat(dist.all_gather(ratios))
        seconds = sum(self.seconds.values())
        perf = {f"perf/seconds_{name}": value for name, value in self.seconds.items()}
        tokens = shown.get("completions/total_tokens", 0.0)
        perf["perf/tokens_per_second"] = tokens / seconds if seconds else math.nan
        perf["perf/memory_gb"] = peak_memory(self.run.device)
        self.last = shown | perf
        if self._is_shown(number):
            self.board.scalars(self.last, number)
            if len(everyone):  # none where the run was interrupted after the rollout's last update
                self.board.histogram("train/histogram/ratios", everyone, number)
        self.run.folder.log.info("rollout %d %s", number, self.last)
        self.sums, self.ratios, self.seconds = no_sums(self.run.device), [], {}
        bar = {
            "reward": format(shown["objective/scores"], ".3f"),
            "len": format(shown["completions/mean_length"], ".0f"),
            "cut": format(shown["completions/clipped_ratio"], ".0%"),
            "tok/s": format(perf["perf/tokens_per_second"], ".0f"),
            "loss": format(shown.get("loss/policy_avg", math.nan), ".3f"),
        }
        if "objective/kl" in shown:
            bar = {"reward": bar.pop("reward"), "kl": format(shown["objective/kl"], ".3f")} | bar
        self.board.advance(bar)

    def _is_shown(self, number: int) -> bool:
        """Whether the board shows a rollout, 1-based."""
        return number % self.settings.log_every == 0 or number == self.run.plan.steps

    def evaluate(self, number: int):
        """Answer the held-out prompts after `number` rollouts, with the same noise each time; once for
        a number. Every rank calls this.
        """
        if number <= self.evaluated_at:
            return
        self.evaluated_at = number
        if self.held_out is None:
            return
        models, prompts, sampler = self.models, self.held_out, self.models.sampler
        sampler.follow()
        places = range(len(prompts))
        answers = sampler.answer(
            places,
            [prompts.ids(i) for i in places],
            # the noise of training's draws counts up from 0
            [(1 << 40) + i for i in places],
            samples_per_prompt=1,
            seed=self.settings.seed,
        )
        samples = samples_of(
            answers, prompts, models.policy.tokenizer, self.settings.max_new_tokens
        )
        scores, score = self.rewards.score(samples)
        columns = columns_of_tokens(answers.completions) | {"reward": score.tolist()}
        if self.algorithm.kl.coef:
            columns["kl_k1"] = self._kl(answers).tolist()
            columns["kl_tokens"] = answers.lengths.tolist()
        found = estimated(columns, answers.completions)
        by_source = {}
        for source, index in mixing.places_by_source(prompts.data).items():
            own = {name: [column[i] for i in index] for name, column in columns.items()}
            by_source[source] = estimated(own, [answers.completions[i] for i in index])
            shown = {name: by_source[source][name] for name in NAMES if name in by_source[source]}
            self.board.scalars(shown, number, f"eval/{source}/")
        if by_source:
            found["by_source"] = by_source
        if len(self.rewards.names) > 1 or self.settings.missing_end_penalty:
            # what the reward is made of: one source may pay for another
            for name, column in zip(self.rewards.names, scores.T, strict=True):
                if np.isfinite(column).any():
                    found[f"rewards/{name}"] = float(np.nanmean(column))
        self.evaluated[number] = found
        self._compare(columns, [digest((), c.ids).hex() for c in answers.completions], number)
        self.answers["after" if self.answers else "before"] = [
            {"prompt": s.prompt, "answer": s.response, "reward": float(value)}
            for s, value in zip(samples, score, strict=True)
        ][: 3 * SHOWN]
        parts = [f"rewards/{name}" for name in self.rewards.names]
        shown = {f"eval/{name}": found[name] for name in (*NAMES, *parts) if name in found}
        self.board.scalars(shown, number)
        self.board.histogram("eval/histogram/reward", applying(score), number)
        self.board.text("eval/answers", table_of_answers(samples[:SHOWN], score), number)
        self.run.note(evaluations=self.evaluated, answers=self.answers)

    def _compare(self, columns: dict[str, list], digests: list[str], number: int):
        """Hold these answers against the first ones, prompt by prompt. digests: of their tokens."""
        now = {name: columns[name] for name in COMPARED} | {"digest": digests}
        if not self.first_columns:
            self.first_columns = now
            return
        same = [float(a == b) for a, b in zip(self.first_columns["digest"], digests, strict=True)]
        self.comparison = against(same, self.first_columns, now)
        win_rate = self.comparison.get("win_rate")
        if win_rate:
            self.board.scalars({"eval/win_rate": win_rate["value"]}, number)
        self.board.text("eval/before_and_after", "\n".join(self._compared_lines()), number)
        self.run.note(comparison=self.comparison)

    def _compared_lines(self) -> list[str]:
        """What changed prompt by prompt, as lines of a Markdown table."""
        lines = ["| of the same prompts with the same noise | |", "|---|---|"]
        if "win_rate" in self.comparison:
            lines.append(f"| win rate by reward | {show(self.comparison['win_rate'])} |")
        lines += [
            f"| change of {name} | {show(estimate)} |"
            for name, estimate in self.comparison["change"].items()
        ]
        return [*lines, f"| the same answer | {show(self.comparison['unchanged'])} |"]

    def _kl(self, answers) -> np.ndarray:
        """(B,) nats, k1 of each answer against the reference. Every rank calls this."""
        everyone = range(len(answers.prompts))
        plan = rollout.batches_of(everyone, answers.sizes, self.run.plan.batch_tokens)
        scored = rollout.Scored(
            self.models.policy, self.models.reference, None, self.settings.temperature
        )
        with self.models.reference.at_hand():
            found = rollout.score_tokens(answers, plan, self.run.device, scored)
        return per_answer((found["old"] - found["ref"]).double(), answers.lengths)

    def forget_evaluations(self):
        """Drop evaluations of before: the run began from another one's checkpoint."""
        self.evaluated_at, self.evaluated, self.answers = -1, {}, {}
        self.first_columns, self.comparison = {}, {}

    def pause(self):
        """A context in which the clock of `perf/*` stands still: that of a rollout counts its parts."""
        return _Nothing()

    def sync(self):
        """Fsync what TensorBoard was given."""
        self.board.sync()

    def close(self):
        """End the bar and TensorBoard's file."""
        if self.board is not None:
            self.board.close()

    # What the script calls.

    def take(self, number: int, drawn: Rollout, facts: dict, samples: list):
        """Show a rollout that has been drawn. facts: what is said of it, {name: value}."""
        self.last = dict(facts)
        self.updates, self.of_updates = [], {}
        if self._is_shown(number + 1):
            self._show_answers(number + 1, drawn, samples)
        if facts["completions/clipped_ratio"] > CUT_WARNING:
            self._warn(
                "cut",
                f"{facts['completions/clipped_ratio']:.0%} of the answers were cut at "
                f"--max_new_tokens {self.settings.max_new_tokens}: what they are rewarded for may be "
                "out of their reach",
            )
        if not len(applying(drawn.score)):
            self._warn(
                "none",
                f"rollout {number + 1}: no reward applies to any answer: for all of them None came from "
                f"{', '.join(self.rewards.names)}",
            )
        elif facts["frac_reward_zero_std"] > FLAT_WARNING:
            self._warn(
                "flat",
                f"all samples of {facts['frac_reward_zero_std']:.0%} of the prompts have the same "
                "reward: they teach nothing",
            )

    def _show_answers(self, number: int, drawn: Rollout, samples: list):
        """What a rollout's answers are like, on the board."""
        self.board.histogram("train/histogram/rewards", applying(drawn.score), number)
        self.board.histogram(
            "train/histogram/lengths", torch.from_numpy(drawn.answers.lengths), number
        )
        self.board.histogram("train/histogram/advantages", drawn.advantages, number)
        if drawn.ref is not None:
            self.board.histogram("train/histogram/kl", drawn.old - drawn.ref, number)
        self.board.text("train/answers", table_of_answers(samples[:SHOWN], drawn.score), number)

    _warned: frozenset = frozenset()

    def _warn(self, kind: str, line: str):
        """Say a warning, each kind once."""
        if kind not in self._warned:
            self._warned = self._warned | {kind}
            self.run.say(f"warning: {line}")

    def stopped(self, number: int, update: int, moved: float):
        """Say that a rollout's updates end before update `update`, both 0-based: the policy has moved by
        `moved` nats a token.
        """
        self.last["policy/stopped_at_update"] = update
        self.run.folder.log.info(
            "rollout %d: updates end at %d, KL %.5f a token", number + 1, update, moved
        )
        self._warn(
            "kl",
            f"rollout {number + 1}: {update} updates took the policy {moved:.4f} nats a token from where "
            f"the rollout was drawn, over {policy.KL_SLACK} times --target_kl {self.settings.target_kl}: the rest of "
            "its updates are left out, as those of later rollouts may be",
        )

    def add(self, sums: torch.Tensor):
        """Take in a batch's sums, (columns,) fp64. No value leaves the device here."""
        self.sums = self.sums + sums.detach()

    def timed(self, name: str):
        """A context whose seconds count as `name` in perf/*: generate, score, train."""
        return _Timed(self.seconds, name)

    # What a checkpoint holds of it.

    def state_dict(self) -> dict:
        """What a resumed run needs to report on, for JSON."""
        return {
            "evaluated_at": self.evaluated_at,
            "evaluated": dict(self.evaluated),
            "answers": self.answers,
            "first_columns": self.first_columns,
            "comparison": self.comparison,
            "last": self.last,
            "seconds": dict(self.seconds),
            "of_updates": norms_and_rates(self.updates) or self.of_updates,
            "events": self.board.position(),
        }

    def load_state_dict(self, state: dict):
        """Continue from `state_dict`; before `start`."""
        self.evaluated_at, self.answers = state["evaluated_at"], state["answers"]
        self.evaluated = {int(number): values for number, values in state["evaluated"].items()}
        self.first_columns, self.comparison = state["first_columns"], state["comparison"]
        self.last, self.seconds = report.with_nan(state["last"]), state["seconds"]
        self.of_updates = report.with_nan(state.get("of_updates", {}))
        self._events = state["events"]

    def rank_tensors(self):
        """What makes this rank's tensors of the updates that are not shown yet."""
        sums = self.sums
        return lambda: {"sums": sums}

    def load_rank_tensors(self, of_ranks):
        """Continue from `rank_tensors` of several ranks, or of none."""
        found = (tensors["sums"].to(self.run.device) for tensors in of_ranks)
        self.sums = sum(found, no_sums(self.run.device))

    # The end.

    def card(self):
        """What writes the model card, from what run.json says by now."""
        folder = self.run.folder
        return card.from_run(folder.record, seconds=folder.seconds())

    def finish(self, gap: float, critic_folder=None):
        """Write the results; print what changed, where it lies and what to do next."""
        folder = self.run.folder
        first = self.evaluated.get(min(self.evaluated, default=0), {})
        last = self.evaluated.get(max(self.evaluated, default=0), {})
        results = {name: last[name] for name in NAMES if name in last}
        tags = [f"eval/{name}" for name in results] or ["objective/scores"]
        results = results or {"reward": self.last.get("objective/scores", math.nan)}
        final = {f"final/{name}": value for name, value in results.items()}
        self.board.hparams(telling(self.settings), tags, final, self.run.plan.steps)
        self.board.close(patience=60)
        module = self.models.policy.module
        folder.finish(
            results=results,
            skipped_steps=self.models.policy.skipped,
            **{module.gap_name: gap},
        )
        for line in self._closing(first, last, gap, critic_folder):
            self.run.say(line)

    def _closing(self, first, last, gap, critic_folder):
        model = self.run.folder.path / "model"
        if last:
            parts = [Metric(f"rewards/{name}", f"  of it {name}") for name in self.rewards.names]
            metrics = [POLICY_METRICS[0], *parts, *POLICY_METRICS[1:]]
            more = report.rows_of_sources(metrics, first, last)
            yield from report.table(metrics, first, last, "prompts", more)
            yield f"({self.rewards.formula})"
            if "win_rate" in self.comparison:
                yield f"{'better than before':<22} {show(self.comparison['win_rate'], 3)} of the prompts"
            pairs = zip(self.answers.get("before", ()), self.answers.get("after", ()), strict=False)
            for before, after in list(pairs)[:2]:
                yield ""
                yield f"{before['prompt']}"
                yield f"  before ({before['reward']:.2f})  {' '.join(before['answer'].split())[:160]}"
                yield f"  after  ({after['reward']:.2f})  {' '.join(after['answer'].split())[:160]}"
        unit = self.models.policy.module.unit
        yield ""
        yield f"model        {model}  (reloaded: {gap:.1g} {unit} from the trained one)"
        if critic_folder:
            yield f"value model  {critic_folder}  (--value_model takes it)"
        yield from self.board.where()
        yield ""
        yield "next"
        folder, settings = self.run.folder, self.settings
        models = {
            "model": model,
            "reference": folder.record["model"],
            "reward_model": settings.reward_model,
        }
        config = self.models.policy.module.lm.config
        yield f"  {commands.evaluation(settings, folder.path, config, **models)}"
        yield from self.board.next_commands()


def estimated(columns: dict[str, list], completions: list) -> dict:
    """What is said of answers to held-out prompts: NAMES with their intervals, as far as they are
    numbers, and how many prompts there are. columns: of each answer, by name.
    """
    estimates = summary(columns, completions)
    estimates["kl"] = estimates.pop("kl_k1", {"value": math.nan})
    found = {"pairs": len(completions)}
    for name in NAMES:
        if math.isfinite(estimates[name]["value"]):
            found[name] = estimates[name]["value"]
            if estimates[name]["interval"]:
                found[f"{name}_interval"] = estimates[name]["interval"]
    return found


def norms_and_rates(updates: list[tuple]) -> dict[str, float]:
    """Gradient norms and rates of updates, (model's name, engine/trained.py: Update) each."""
    found = {}
    for name, update in updates:
        prefix = "train/" if name == "policy" else "train/value_"
        found |= {f"{prefix}grad_norm": update.grad_norm, f"{prefix}learning_rate": update.lr}
    return found


def no_sums(device) -> torch.Tensor:
    """(columns,) zeros of policy.SUMS, to add to."""
    return torch.zeros(len(policy.SUMS), dtype=torch.float64, device=device)


def applying(score: np.ndarray) -> torch.Tensor:
    """The scores of the answers that some reward applies to, for a histogram."""
    return torch.from_numpy(score[np.isfinite(score)])


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


class _Timed:
    def __init__(self, seconds: dict, name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *_):
        spent = time.perf_counter() - self.began
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + spent


def table_of_answers(samples, score) -> str:
    """Prompts, answers and rewards as a Markdown table."""

    def cell(text):
        return " ".join(text.split()).replace("|", "\\|")[:400]

    lines = ["| prompt | answer | reward |", "|---|---|---|"]
    for sample, value in zip(samples, score, strict=False):
        lines.append(f"| {cell(sample.prompt)} | {cell(sample.response)} | {value:.3f} |")
    return "\n".join(lines)
