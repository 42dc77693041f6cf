"""The reporting of preference training: what each row, step and evaluation says to the user."""

import math

import torch
from tqdm import tqdm

from train.engine import dist
from train.losses import metrics
from train.losses.preference import Labelled
from train.models.flops import Counter
from train.run import card
from train.run.meter import Meter, peak_flops
from train.run.tensorboard import Board

LOGGED = tuple(metric.name for metric in metrics.METRICS if metric.logged)


class Training:
    """Collects a preference run's numbers and shows them: bar, TensorBoard, run.json, the closing
    table.
    """

    def __init__(self, folder, settings, policy, device, plan, forwards=1):
        """`forwards`: of the reference, a row."""
        self.folder, self.settings, self.plan, self.device = folder, settings, plan, device
        self.flops = Counter(policy.module)
        self.policy, self.forwards, self.names = policy, forwards, ()
        dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
        self.meter = Meter(1 + len(metrics.PAIR_SUMS), device, peak_flops(device, dtype))
        self.board = Board(folder.path / "tensorboard", plan.steps, plan.begun)
        self.evaluated, self.last, self.moved = {}, {}, None
        self.looked = -1  # the last step after which `evaluate` ran

    def add(self, row, examples, losses):
        """A row is done. No value leaves the device here."""
        sums = metrics.preference_sums(examples, losses, self.settings.beta).to(self.device)
        shown = distributions(examples, self.settings.beta)
        self.names = tuple(shown)
        kept = torch.stack(list(shown.values()), 1).detach()
        # the policy forward and backward, the reference forward
        work = (3 + self.forwards) * self.flops.forward(row)
        self.meter.add(sums, row.input_ids.shape[0] if row.num_responses else 0, work, kept)

    def stepped(self, step, update):
        """A step is done: read the sums every `log_every` steps and show them. Every rank calls
        this.
        """
        number = step.number + 1
        shown = {}
        if number % self.settings.log_every == 0 or number == self.plan.steps:
            sums, perf = self.meter.read()
            mean = metrics.means(sums)
            shorter = {
                "loss": "loss",
                "margin": "rewards/margins",
                "accuracy": "rewards/accuracies",
            }
            self.last = {short: mean[name] for short, name in shorter.items()} | perf
            self.board.scalars({name: mean[name] for name in LOGGED}, number, "train/")
            self.board.scalars(
                {
                    "train/grad_norm": update.grad_norm,
                    "train/learning_rate": update.lr,
                    "train/epoch": step.epoch,
                    "health/skipped_steps": self.policy.skipped,
                    **self._displaced(mean, "health/"),
                }
                | perf,
                number,
            )
            self.folder.log.info("step %d %s", number, {**mean, **perf, **update._asdict()})
        if self.last:
            shown = {
                "loss": f"{self.last['loss']:.4f}",
                "margin": f"{self.last['margin']:.3f}",
                "acc": f"{self.last['accuracy']:.2f}",
                "pairs/s": f"{self.last['perf/pairs_per_second']:.2f}",
                "tok/s": f"{self.last['perf/tokens_per_second']:.0f}",
            }
        self.board.advance(shown)

    def evaluate(self, number, held_out, policy, reference, running):
        """Score the held-out pairs after `number` steps, and look at the run's health; once. Every
        rank calls this.
        """
        if number <= self.looked:
            return
        with self.meter.pause():
            self._training_histograms(number)
            start = reference.module if self.plan.same_weights and not reference.version else None
            if start is not None and (moved := share_moved(policy.module, start)) is not None:
                self.board.scalars({"health/bf16_weights_moved": moved}, number)
                self.moved = moved
            if held_out is None:
                self.looked = number
                return
            watch = lambda rows: tqdm(
                rows,
                total=len(held_out.plan),
                desc=f"evaluate at step {number}",
                unit="row",
                leave=False,
                disable=not dist.is_main(),
                dynamic_ncols=True,
            )
            examples, losses = held_out.score(policy, reference, running, watch)
            mean = metrics.means(metrics.preference_sums(examples, losses, self.settings.beta))
            self.board.scalars({name: mean[name] for name in LOGGED}, number, "val/")
            self.board.scalars(self._displaced(mean, "val/"), number)
            for name, values in distributions(examples, self.settings.beta).items():
                self.board.histogram(f"val/histogram/{name}", values, number)
            self.evaluated[number] = (
                mean | {"pairs": len(losses)} | intervals(mean, examples, self.settings.beta)
            )
            self.looked = number
            self.folder.note(evaluations=self.evaluated)

    def _displaced(self, mean, prefix):
        """The share of chosen answers that became less likely than under the reference, where there
        is one.
        """
        if getattr(self.settings, "reference", "live") == "none":
            mean.pop("chosen_fell")
            return {}
        return {f"{prefix}chosen_fell": mean["chosen_fell"]}

    def _training_histograms(self, number):
        values = self.meter.values()
        for column, name in enumerate(self.names if values.numel() else ()):
            self.board.histogram(f"train/histogram/{name}", values[:, column], number)

    def state(self):
        """What a resumed run needs to report on: a record for JSON, and what makes this rank's
        tensors.
        """
        meter, tensors = self.meter.state()
        record = {
            "looked": self.looked,
            "evaluated": dict(self.evaluated),
            "last": self.last,
            "moved": self.moved,
        }
        return record | {"meter": meter, "events": self.board.position()}, tensors

    def load(self, record, parts):
        """Continue from `state`: the record, and the tensors of the ranks whose sums continue here."""
        self.looked, self.last, self.moved = (
            record["looked"],
            numbers(record["last"]),
            record["moved"],
        )
        self.evaluated = {
            int(number): numbers(values) for number, values in record["evaluated"].items()
        }
        self.meter.load(record["meter"], parts)
        if "events" in record:
            self.board.cut(record["events"])
        self.folder.note(evaluations=self.evaluated)

    def sync(self):
        """Bring what was shown so far to the disk."""
        self.board.sync()

    def close(self):
        """End the bar and TensorBoard's file."""
        self.board.close()

    def card(self):
        """What writes the model card, from what run.json says by now."""
        return card.from_run(self.folder.record, seconds=self.folder.seconds(), perf=self.perf())

    def perf(self) -> dict[str, float]:
        """The last reading of `perf/*`."""
        return {name: value for name, value in self.last.items() if name.startswith("perf/")}

    def finish(self, gap: float):
        """Write results, and print what changed, where it lies and what to do next. `gap`: see
        export.
        """
        first, last = (self.evaluated.get(end(self.evaluated, default=0), {}) for end in (min, max))
        results = {m.name: last[m.name] for m in metrics.METRICS if m.in_table and m.name in last}
        results = results or {"train_loss": self.last["loss"]}
        self.board.hparams(
            self.folder.record["flags"],
            {f"final/{name}": value for name, value in results.items()},
            self.plan.steps,
        )
        self.board.close()
        self.folder.finish(
            results=results,
            skipped_steps=self.policy.skipped,
            bf16_weights_moved=self.moved,
            export_gap_nats_per_token=gap,
            perf=self.perf(),
        )
        model = self.folder.path / "model"
        base = self.folder.record["model"]
        lines = [
            *(table(first, last) if last else ()),
            "",
            f"model        {model}  (reloaded: {gap:.1g} nats a token from the trained one)",
            f"run          {self.folder.path / 'run.json'}, logs/, tensorboard/",
            "",
            "next",
            f"  deepspeed eval/evaluate.py --model {model} --reference {base} --output {self.folder.path}/eval",
            f"  tensorboard --logdir {self.folder.path}",
        ]
        for line in lines:
            self.folder.say(line)


def numbers(value):
    """The same with NaN where JSON had to write null."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return math.nan if value is None else value


def distributions(examples, beta: float) -> dict[str, torch.Tensor]:
    """What histograms show, (B,) each: margins and log-probs of pairs, rewards and log-probs of
    judged responses.
    """
    if isinstance(examples, Labelled):
        return {"rewards": examples.rewards(beta), "logps": examples.logps}
    return {
        "margins": examples.margin(beta),
        "logps_chosen": examples.chosen,
        "logps_rejected": examples.rejected,
    }


def intervals(mean: dict, examples, beta: float) -> dict[str, list[float]]:
    """95 % intervals of the accuracy (Wilson) and of the mean margin (normal), for the table; eval/
    bootstraps.
    """
    if isinstance(examples, Labelled):
        return {
            "rewards/accuracies_interval": list(
                metrics.wilson(mean["rewards/accuracies"], len(examples.logps))
            )
        }
    margins = examples.margin(beta)
    n = len(margins)
    half = 1.959964 * float(margins.std()) / math.sqrt(n) if n > 1 else math.nan
    middle = float(margins.mean())
    return {
        "rewards/accuracies_interval": list(metrics.wilson(mean["rewards/accuracies"], n)),
        "rewards/margins_interval": [middle - half, middle + half],
    }


def table(first: dict, last: dict) -> list[str]:
    """What the held-out pairs say, before and after, as lines of text."""
    lines = ["", f"{last['pairs']} held-out pairs      before      after   95 % interval"]
    for title, name in ((m.title, m.name) for m in metrics.METRICS if m.in_table):
        interval = last.get(f"{name}_interval")
        shown = f"   [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        lines.append(f"{title:<22} {first[name]:>9.4f}  {last[name]:>9.4f}{shown}")
    if "chosen_fell" in last:
        lines.append(f"{'chosen not less likely':<22} {'':>9}  {1 - last['chosen_fell']:>9.4f}")
    return lines


@torch.no_grad()
def share_moved(module, start) -> float | None:
    """The share of weights whose bf16 copy differs from that at the start; None where shards do not
    line up.

    At learning rates near bf16's grid many updates change a master weight and not its bf16 copy
    (DESIGN's precision note in train/engine/ds_config.py); this says how many came through. Every rank
    calls this.
    """
    moved = torch.zeros(2, dtype=torch.float64, device=next(module.parameters()).device)
    for p, q in zip(module.parameters(), start.parameters(), strict=True):
        mine, theirs = getattr(p, "ds_tensor", p), getattr(q, "ds_tensor", q)
        if mine.shape != theirs.shape or mine.device != theirs.device:
            return None
        changed = (mine.bfloat16() != theirs.bfloat16()).sum().to(moved.device)
        moved += torch.stack([changed.double(), moved.new_tensor(mine.numel())])
    changed, count = dist.all_reduce(moved).tolist()
    return changed / count
