"""What preference training tells its user: bar, TensorBoard, run.json, the closing table."""

import math

import torch
from tqdm import tqdm

from train.engine import dist
from train.losses import metrics
from train.losses.preference import Labelled
from train.methods.preference import HeldOut
from train.models.flops import FlopCounter
from train.run import card
from train.run.meter import Meter, peak_flops
from train.run.tensorboard import Board

LOGGED = tuple(metric.name for metric in metrics.METRICS if metric.logged)
IN_TABLE = tuple(metric for metric in metrics.METRICS if metric.in_table)


class Report:
    """The numbers of one run, collected and shown. A part of its checkpoints (run/checkpoint.py)."""

    def __init__(self, run, settings, objective, held_out):
        """objective: a methods.preference.Objective. held_out: a Tokenised, or None."""
        self.run, self.settings, self.objective = run, settings, objective
        self.policy, self.reference = objective.policy, objective.reference
        self.held_out = HeldOut(objective, held_out) if held_out else None
        self.flops = FlopCounter(self.policy.module)
        dtype = torch.bfloat16 if run.plan.precision == "bf16" else torch.float32
        peak = peak_flops(run.device, dtype)
        self.meter = Meter(1 + len(metrics.PAIR_SUMS), run.device, peak)
        self.board = None  # from `start` on
        self.evaluated = {}  # step -> what the held-out data said after it
        self.evaluated_at = -1  # the last step after which `evaluate` ran
        self.last = {}  # the last reading of training's measures
        self.moved = None  # share of bf16 weights that differ from the start's
        self._histogram_names = ()
        self._events = None  # where TensorBoard's files of an interrupted run are to be cut

    def start(self):
        """Open TensorBoard and the bar: the run's folder is its own, and where it begins is known."""
        plan = self.run.plan
        with self.meter.pause():  # TensorBoard takes seconds to import
            self.board = Board(self.run.folder.path / "tensorboard", plan.steps, plan.begun)
        if not plan.begun:
            self.board.text("data/first_rows", self.run.sample)
        if self._events is not None:
            self.board.cut(self._events)
            self.run.note(evaluations=self.evaluated)

    def add(self, batch, examples, losses):
        """Take in a batch. No value leaves the device here."""
        sums = metrics.preference_sums(examples, losses, self.settings.beta).to(self.run.device)
        values = distributions(examples, self.settings.beta)
        self._histogram_names = tuple(values)
        kept = torch.stack(list(values.values()), 1).detach()
        # the policy forward and backward, the reference forward
        work = (3 + self.reference.forwards) * self.flops.forward(batch)
        tokens = batch.input_ids.shape[0] if batch.num_responses else 0
        self.meter.add(sums, tokens, work, kept)

    def step(self, step, update):
        """Show a finished step; every `log_every` steps read the sums. Every rank calls this."""
        number = step.number + 1
        if number % self.settings.log_every == 0 or number == self.run.plan.steps:
            sums, perf = self.meter.read()
            mean = metrics.means(sums)
            self.last = {
                "loss": mean["loss"],
                "margin": mean["rewards/margins"],
                "accuracy": mean["rewards/accuracies"],
            } | perf
            self.board.scalars({name: mean[name] for name in LOGGED}, number, "train/")
            progress = {
                "train/grad_norm": update.grad_norm,
                "train/learning_rate": update.lr,
                "train/epoch": step.epoch,
                "health/skipped_steps": self.policy.skipped,
            }
            fell = self._chosen_fell(mean, "health/")
            self.board.scalars(progress | fell | perf, number)
            self.run.folder.log.info("step %d %s", number, {**mean, **perf, **update._asdict()})
        shown = {}
        if self.last:
            shown = {
                "loss": f"{self.last['loss']:.4f}",
                "margin": f"{self.last['margin']:.3f}",
                "acc": f"{self.last['accuracy']:.2f}",
                "pairs/s": f"{self.last['perf/pairs_per_second']:.2f}",
                "tok/s": f"{self.last['perf/tokens_per_second']:.0f}",
            }
        self.board.advance(shown)

    def evaluate(self, number: int):
        """Score the held-out pairs after `number` steps, and look at the run's health; once.

        Every rank calls this.
        """
        if number <= self.evaluated_at:
            return
        with self.meter.pause():
            self._training_histograms(number)
            self._bf16_weights_moved(number)
            if self.held_out is not None:
                self._score_held_out(number)
            self.evaluated_at = number

    def _score_held_out(self, number):
        def watch(batches):
            return tqdm(
                batches,
                total=self.held_out.num_batches(),
                desc=f"evaluate at step {number}",
                unit="batch",
                leave=False,
                disable=not dist.is_main(),
                dynamic_ncols=True,
            )

        examples, losses = self.held_out.evaluate(watch)
        beta = self.settings.beta
        mean = metrics.means(metrics.preference_sums(examples, losses, beta))
        self.board.scalars({name: mean[name] for name in LOGGED}, number, "val/")
        self.board.scalars(self._chosen_fell(mean, "val/"), number)
        for name, values in distributions(examples, beta).items():
            self.board.histogram(f"val/histogram/{name}", values, number)
        counted = {"pairs": len(losses)} | intervals(mean, examples, beta)
        self.evaluated[number] = mean | counted
        self.run.note(evaluations=self.evaluated)

    def _chosen_fell(self, mean, prefix) -> dict:
        """The share of chosen answers that became less likely than under the reference, if any."""
        if self.settings.reference == "none":
            mean.pop("chosen_fell")
            return {}
        return {f"{prefix}chosen_fell": mean["chosen_fell"]}

    def _training_histograms(self, number):
        values = self.meter.values()  # (examples since the last time, columns)
        if values.numel():
            for column, name in enumerate(self._histogram_names):
                self.board.histogram(f"train/histogram/{name}", values[:, column], number)

    def _bf16_weights_moved(self, number):
        """Log it where the reference still is the policy as it started."""
        if not self.run.plan.same_weights or self.reference.version:
            return
        if self.reference.module is None:
            return
        moved = share_moved(self.policy.module, self.reference.module)
        if moved is not None:
            self.board.scalars({"health/bf16_weights_moved": moved}, number)
            self.moved = moved

    # What the run around it needs.

    def pause(self):
        """A context in which the clock of `perf/*` stands still."""
        return self.meter.pause()

    def sync(self):
        """Fsync what TensorBoard was given."""
        self.board.sync()

    def close(self):
        """End the bar and TensorBoard's file."""
        if self.board is not None:
            self.board.close()

    def state_dict(self) -> dict:
        """What a resumed run needs to report on, for JSON."""
        return {
            "evaluated_at": self.evaluated_at,
            "evaluated": dict(self.evaluated),
            "last": self.last,
            "moved": self.moved,
            "meter": self.meter.state_dict(),
            "events": self.board.position(),
        }

    def load_state_dict(self, state: dict):
        """Continue from `state_dict`; before `start`."""
        self.evaluated_at, self.moved = state["evaluated_at"], state["moved"]
        self.last = with_nan(state["last"])
        self.evaluated = {
            int(number): with_nan(values) for number, values in state["evaluated"].items()
        }
        self.meter.load_state_dict(state["meter"])
        self._events = state["events"]

    def rank_tensors(self):
        """What makes this rank's tensors of measures that are not shown yet."""
        return self.meter.rank_tensors()

    def load_rank_tensors(self, of_ranks):
        """Continue from `rank_tensors` of several ranks, or of none."""
        self.meter.load_rank_tensors(of_ranks)

    def forget_evaluations(self):
        """Drop evaluations of before: the run began from another one's checkpoint."""
        self.evaluated_at, self.evaluated = -1, {}

    # The end.

    def card(self):
        """What writes the model card, from what run.json says by now."""
        folder = self.run.folder
        return card.from_run(folder.record, seconds=folder.seconds(), perf=self._perf())

    def _perf(self) -> dict[str, float]:
        """The last reading of `perf/*`."""
        return {name: value for name, value in self.last.items() if name.startswith("perf/")}

    def finish(self, gap: float):
        """Write the results; print what changed, where it lies and what to do next.

        gap: of the exported model, see run/export.py.
        """
        folder = self.run.folder
        first = self.evaluated.get(min(self.evaluated, default=0), {})
        last = self.evaluated.get(max(self.evaluated, default=0), {})
        results = {metric.name: last[metric.name] for metric in IN_TABLE if metric.name in last}
        results = results or {"train_loss": self.last["loss"]}
        final = {f"final/{name}": value for name, value in results.items()}
        self.board.hparams(folder.record["flags"], final, self.run.plan.steps)
        self.board.close()
        folder.finish(
            results=results,
            skipped_steps=self.policy.skipped,
            bf16_weights_moved=self.moved,
            export_gap_nats_per_token=gap,
            perf=self._perf(),
        )
        model = folder.path / "model"
        base = folder.record["model"]
        lines = [
            *(table(first, last) if last else ()),
            "",
            f"model        {model}  (reloaded: {gap:.1g} nats a token from the trained one)",
            f"run          {folder.path / 'run.json'}, logs/, tensorboard/",
            "",
            "next",
            f"  deepspeed eval/evaluate.py --model {model} --reference {base} "
            f"--output {folder.path}/eval",
            f"  tensorboard --logdir {folder.path}",
        ]
        for line in lines:
            self.run.say(line)


def with_nan(value):
    """The same value with NaN where JSON had to write null."""
    if isinstance(value, dict):
        return {key: with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_nan(item) for item in value]
    return math.nan if value is None else value


def distributions(examples, beta: float) -> dict[str, torch.Tensor]:
    """What histograms show, (B,) each.

    Margins and log-probs of pairs, rewards and log-probs of responses that are labelled one by one.
    """
    if isinstance(examples, Labelled):
        return {"rewards": examples.rewards(beta), "logps": examples.logps}
    return {
        "margins": examples.margin(beta),
        "logps_chosen": examples.chosen,
        "logps_rejected": examples.rejected,
    }


def intervals(mean: dict, examples, beta: float) -> dict[str, list[float]]:
    """95 % intervals of the accuracy (Wilson) and of the mean margin (normal), for the table.

    Quick ones; evaluation bootstraps (eval/intervals.py).
    """
    labelled = isinstance(examples, Labelled)
    n = len(examples.logps if labelled else examples.chosen)
    accuracy = list(metrics.wilson(mean["rewards/accuracies"], n))
    if labelled:
        return {"rewards/accuracies_interval": accuracy}
    margins = examples.margin(beta)
    half = 1.959964 * float(margins.std()) / math.sqrt(n) if n > 1 else math.nan
    middle = float(margins.mean())
    return {
        "rewards/accuracies_interval": accuracy,
        "rewards/margins_interval": [middle - half, middle + half],
    }


def table(first: dict, last: dict) -> list[str]:
    """What the held-out pairs say, before and after, as lines of text."""
    lines = ["", f"{last['pairs']} held-out pairs      before      after   95 % interval"]
    for metric in IN_TABLE:
        before, after = first[metric.name], last[metric.name]
        interval = last.get(f"{metric.name}_interval")
        shown = f"   [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        lines.append(f"{metric.title:<22} {before:>9.4f}  {after:>9.4f}{shown}")
    if "chosen_fell" in last:
        lines.append(f"{'chosen not less likely':<22} {'':>9}  {1 - last['chosen_fell']:>9.4f}")
    return lines


@torch.no_grad()
def share_moved(module, start) -> float | None:
    """The share of weights whose bf16 copy differs from that at the start.

    At learning rates near bf16's grid many updates change a master weight and not its bf16 copy
    (train/engine/ds_config.py); this says how many came through. None where the two modules' shards
    do not line up. Every rank calls this.
    """
    counts = torch.zeros(2, dtype=torch.float64, device=next(module.parameters()).device)
    for p, q in zip(module.parameters(), start.parameters(), strict=True):
        shard, start_shard = getattr(p, "ds_tensor", p), getattr(q, "ds_tensor", q)
        if shard.shape != start_shard.shape or shard.device != start_shard.device:
            return None
        moved = (shard.bfloat16() != start_shard.bfloat16()).sum().to(counts.device)
        counts += torch.stack([moved.double(), counts.new_tensor(shard.numel())])
    moved, total = dist.all_reduce(counts).tolist()
    return moved / total
