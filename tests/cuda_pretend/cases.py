"""What is run on pretend CUDA: each case a function of a Pretend that returns facts, or raises.

To add one: a function, and its name in CASES. It is run by run_cases.py, in whose process torch sees
a GPU; test_pretend.py looks at what came out.
"""

import contextlib
import itertools
import logging
import types
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from tests.cuda_pretend import machine_code as code
from tests.cuda_pretend import pretend
from tests.engine import made_rollouts
from tests.engine.made_pairs import made_pairs, with_targets
from train.data.packing import pack
from train.data.steps import PlannedRollout, PlannedStep
from train.engine import ds_config, footprint
from train.engine.trained import TrainedModel
from train.losses import composition
from train.losses import policy as losses_of_policies
from train.losses import reward as losses_of_rewards
from train.methods import policy_report, policy_setup, preference, preference_report, reward
from train.methods import ppo as methods_ppo
from train.methods.reference import Live
from train.methods.rollout import Known
from train.models import buckets, compiled, generate, lora
from train.models.backbone import Backbone
from train.models.heads import ScoreModel
from train.run import loop
from train.run.checkpoint import Checkpointer
from train.run.checkpoint_files import Place

# FILE:FUNCTION where the host may wait for the device, and why.
MAY_WAIT = {
    "train/models/generate.py:_decode": "who has finished is looked at every 16 tokens",
    "train/models/generate.py:__init__": "what noise and ends are comes from lists, once a batch",
    "train/models/generate.py:completions": "a batch is done",
    "train/models/generate.py:_close_gaps": "where somebody has",
    "train/models/cache.py:batch_select_indices": "the same",
    "train/models/cache.py:update": "transformers' layer of a window begins with empty tensors",
    "train/models/generate.py:_prefill": "prompts come from lists, once a batch",
    **dict.fromkeys(
        (
            "train/methods/preference.py:score_examples",
            "train/methods/preference.py:<listcomp>",
            "train/methods/preference.py:<genexpr>",
            "train/methods/preference.py:forward",
        ),
        "a coupled loss sees the whole step, which is put together on the CPU",
    ),
    "train/methods/ppo.py:moved": "--target_kl: whether to step at all is the host's to say",
}


class Pretend(NamedTuple):
    """What a case gets."""

    watch: object  # pretend.make_watch's
    fake: object  # the FakeTensorMode
    folder: Path  # for files


class Family(NamedTuple):
    """A model's shape, as a model of that family has it but for its layers."""

    config: type
    shape: dict
    lora: bool = False
    checkpointing: bool = False


SMOLLM = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LLAMA = transformers.LlamaConfig
FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA, SMOLLM),
    "llama_lora": Family(LLAMA, SMOLLM, lora=True),
    "llama_checkpointing": Family(LLAMA, SMOLLM, checkpointing=True),
    "qwen3": Family(
        transformers.Qwen3Config,
        dict(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
    ),
    "gemma": Family(
        transformers.GemmaConfig,
        dict(
            vocab_size=256000,
            hidden_size=2048,
            intermediate_size=16384,
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=256,
        ),
    ),
    "gemma3": Family(
        transformers.Gemma3TextConfig,
        dict(
            vocab_size=262144,
            hidden_size=640,
            intermediate_size=2048,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "mistral_window": Family(
        transformers.MistralConfig,
        dict(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            sliding_window=16,
        ),
    ),
    "gpt2": Family(
        transformers.GPT2Config,
        dict(vocab_size=50257, n_embd=768, n_head=12, n_positions=1024),
    ),
    "phi3": Family(
        transformers.Phi3Config,
        dict(
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            num_attention_heads=32,
            num_key_value_heads=32,
            sliding_window=None,
        ),
    ),
}
LAYERS = 2


def make_lm(family: Family, layers=LAYERS, kind=transformers.AutoModelForCausalLM, **changes):
    """A model of `family` of so many layers, on the GPU."""
    shape = dict(family.shape)
    if "layer_types" in shape:
        shape["layer_types"] = shape["layer_types"][:layers]
    depth = "n_layer" if family.config is transformers.GPT2Config else "num_hidden_layers"
    config = family.config(**shape, **{depth: layers}, pad_token_id=0, **changes)
    with torch.device("cuda"):
        lm = kind.from_config(config, dtype=torch.float32)
    if family.lora:
        lora.add(lm, 8, 16, None)
    return lm


def under_deepspeed(module, family: Family) -> TrainedModel:
    """The module under a real DeepSpeed engine of stage 0, as a run in bf16 makes it."""
    if family.checkpointing:
        module.checkpoint_activations()
    config = ds_config.resolve(ds_config.read_config("ds_configs/zero0.json"), "bf16", 1.0)
    return TrainedModel(
        module,
        config,
        lr=1e-5,
        weight_decay=0.1,
        grad_clip=1.0,
        scheduler="cosine",
        warmup_ratio=0.1,
        total_steps=100,
    )


def check_gradients(module):
    """Every trained parameter's gradient is on the GPU, in its own dtype."""
    for name, p in module.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} has no gradient"
            assert p.grad.is_cuda and p.grad.dtype == p.dtype, (name, p.grad.device, p.grad.dtype)


def made_batch(data=None, groups=None):
    """A packed batch of pairs on the GPU, of all of them or the first `groups`."""
    data = data or made_pairs()
    with unset_fake_temporarily():  # a run packs in a thread of its own, and in real memory
        batch = pack([data.group(i) for i in range(groups or len(data))])
    return batch.to("cuda")


def policy_and_reference(family: Family, layers=LAYERS):
    """(a TrainedModel, a Live or what switches adapters off) of one family."""
    module = Backbone(make_lm(family, layers), autocast=torch.bfloat16)
    frozen = Backbone(make_lm(family._replace(lora=False), layers), autocast=torch.bfloat16)
    return under_deepspeed(module, family), Live(frozen, {})


class Training:
    """A run of launch/train_dpo.py past its start: the loop, the report and the checkpointer around a
    policy. log_every is 1, and nothing else is due.
    """

    def __init__(self, policy, reference, loss, batch, folder):
        device = torch.device("cuda")
        settings = types.SimpleNamespace(
            reference="live",
            log_every=1,
            eval_every=1000,
            save_every=0,
            save_minutes=0,
            max_skipped=5,
            report_to=["tensorboard"],
        )
        run = types.SimpleNamespace(
            device=device,
            plan=types.SimpleNamespace(steps=1000, begun=0, precision="bf16", batch_tokens=4000),
            folder=types.SimpleNamespace(
                path=folder, log=logging.getLogger("pretend"), record={"flags": {}}
            ),
            sample="",
            note=lambda **facts: None,
            say=print,
        )
        self.policy, self.reference, self.loss, self.batch = policy, reference, loss, batch
        data = made_pairs()
        data.starts = [("pairs.jsonl", 0)]
        self.objective = preference.Objective(
            run, loss, policy, reference, data, max_length=100, reference_every=0
        )
        self.report = preference_report.open_report(run, settings, self.objective, None)
        state = {
            "policy": policy,
            "reference": reference,
            "running_mean": self.objective.running_mean,
            "report": self.report,
        }
        self.checkpointer = Checkpointer(run, settings, state, {})
        self.report.start()
        self.run, self.number = run, 0
        late = device.type in loop.READS_LATE
        self.ends = loop._Ends(run, settings, self.checkpointer, self.report, data, late)

    def step(self, watch):
        """One step as launch/train_dpo.py has it, phase by phase."""
        planned = PlannedStep(self.number, 0.0, tuple(range(11)), (tuple(range(11)),))
        step = loop.Step(self.run, planned, [self.batch], before_update=self.ends.settle)
        loss, objective = self.loss, self.objective
        objective.begin(step)
        for batch in step.batches():
            with watch.phase("reference"):
                ref_logps = objective.ref_logps(batch)
            with watch.phase("forward"):
                logps = self.policy(batch, log_p2=loss.shared.use_weighting)
            with watch.phase("loss"):
                scored = objective.score(logps, ref_logps, batch)
                losses = objective.losses(scored)
                total = losses.sum() / step.num_groups
            with watch.phase("backward"):
                self.policy.backward(total)
            check_gradients(self.policy.module)
            with watch.phase("measures"):
                self.report.add(batch, scored.examples, losses)
        with watch.phase("update"):
            update = self.policy.step()
        objective.end(step, update)
        step.finish(update)
        with watch.phase("measures"):
            self.ends.add(step)
        self.number += 1


def step_of(name: str):
    """The case of a family: four steps, every uncoupled loss, a reward model's and a value model's
    step, and what a layer costs.
    """
    family = FAMILIES[name]

    def case(run: Pretend) -> dict:
        watch = run.watch
        with run.fake:
            policy, reference = policy_and_reference(family)
            batch = made_batch()
            loss = composition.choose("sigmoid", 0.1, {})
            training = Training(policy, reference, loss, batch, run.folder / name)
            watch.forget(everything=True)  # TensorBoard's clock, which starts once
            with watch:
                # DeepSpeed's timer waits for the device from its third step on
                for _ in range(4):
                    watch.forget()
                    training.step(watch)
            # what the step before came to was read, shown and marked
            assert training.checkpointer._mark.place.step == training.number - 1
            assert training.report.last["perf/tokens_per_second"] > 0
            facts = {"step": dict(watch.launches)}
            with watch:
                logps = policy(batch, log_p2=True)
                every_loss(logps, reference(batch), batch, variants=name == "llama")
            facts["layer"] = a_layer(run, family, batch)
            scores(run, family)
        return facts

    return case


def every_loss(logps, ref_logps, batch, variants: bool):
    """Every loss that does not couple a step, down to the log-probs' gradient; the coupled ones have
    a case of their own. variants: with what goes along with losses as well.
    """
    leaf, log_p2 = logps[0].detach().requires_grad_(), logps[1]
    for name, row in composition.LOSSES.items():
        if row.couples:
            continue
        shared = [{}]
        if variants:
            shared += [{"use_weighting": True}] if not row.sorts else []
            shared += [{"ld_alpha": 0.5}] if row.needs_reference else []
            divergences = composition.DIVERGENCES if row.f_divergence else ()
            shared += [{"f_divergence_type": each} for each in divergences]
        for args in shared:
            loss = composition.choose(name, 0.1, args)
            given = (leaf, log_p2) if loss.shared.use_weighting else leaf
            scored = preference.score_batch(given, ref_logps, batch, loss)
            losses = loss(scored.examples, scored.weights)
            (gradient,) = torch.autograd.grad(losses.sum(), [leaf])
            assert losses.is_cuda and losses.dtype == torch.float64
            assert gradient.is_cuda and gradient.dtype == torch.float32
            preference_report.sums(loss, scored.examples, losses)
            preference_report.distributions(loss, scored.examples)


def scores(run: Pretend, family: Family):
    """A reward model's step for each of its losses, and PPO's minibatch with a value model."""
    watch = run.watch
    kind = transformers.AutoModelForSequenceClassification
    module = ScoreModel(make_lm(family, kind=kind, num_labels=1), autocast=torch.bfloat16)
    model = under_deepspeed(module, family)
    for name, row in losses_of_rewards.LOSSES.items():
        data = with_targets(made_pairs(), singles=not row.takes_pairs)
        batch = made_batch(data)
        loss = losses_of_rewards.choose(name, {})
        with watch:
            examples = reward.examples(model(batch, at="last"), batch, row.takes_pairs)
            losses = loss(examples)
            model.backward(losses.sum() / len(batch.shape))
            model.step()
    check_of_values(watch, model)


def check_of_values(watch, critic):
    """A value model's part of PPO's minibatch."""
    batch = made_batch()
    known = made_known(batch)
    algorithm = losses_of_policies.ALGORITHMS["ppo"]
    with watch:
        of_values = losses_of_policies.value_loss(algorithm, critic(batch, at="before"), known)
        critic.backward(of_values.loss / batch.target.shape[0])
    check_gradients(critic.module)
    with watch:
        critic.step()


def made_known(batch) -> Known:
    """What a rollout knows of a batch's tokens, on the GPU."""
    tokens = torch.zeros(batch.target.shape[0], device="cuda")
    return Known(tokens, tokens, tokens, tokens, tokens, batch.lengths)


def ppo(run: Pretend) -> dict:
    """PPO's minibatch: the policy's loss of every algorithm, and the update."""
    watch, family = run.watch, FAMILIES["llama"]
    with run.fake:
        policy, _ = policy_and_reference(family)
        batch = made_batch()
        known = made_known(batch)
        for algorithm in losses_of_policies.ALGORITHMS.values():
            with watch:
                logps = policy(batch, temperature=0.7)
                found = losses_of_policies.policy_loss(algorithm, logps, known)
                policy.backward(found.loss / 100)
                losses_of_policies.sums(found, None, 100, 100)
                policy.step(advance=False)
    return {}


class Updates:
    """A rollout's updates of launch/train_ppo.py: the collector, the report and the checkpointer around
    a policy and a value model. The rollout is there as if it had been drawn.
    """

    def __init__(self, policy, critic, algorithm, folder, target_kl):
        settings = types.SimpleNamespace(
            **made_rollouts.SETTINGS | {"target_kl": target_kl},
            report_to=["tensorboard"],
            temperature=made_rollouts.TEMPERATURE,
        )
        run = types.SimpleNamespace(
            device=torch.device("cuda"),
            plan=types.SimpleNamespace(steps=1000, begun=0, batch_tokens=300),
            folder=types.SimpleNamespace(
                path=folder, log=logging.getLogger("pretend"), record={"flags": {}}
            ),
            note=lambda **facts: None,
            say=print,
        )
        models = policy_setup.Models(policy, None, critic, None)
        self.report = policy_report.PolicyReport(run, settings, algorithm, models, None, None)
        self.collector = methods_ppo.Collector(
            run, settings, algorithm, models, None, None, self.report
        )
        parts = {"policy": policy, "report": self.report}
        self.checkpointer = Checkpointer(run, settings, self.collector.state | parts, {})
        self.report.start()
        self.checkpointer.mark(0)
        self.run, self.models, self.temperature = run, models, settings.temperature
        with unset_fake_temporarily():  # it lies in main memory
            score = made_rollouts.made_scores()
            answers = made_rollouts.made_answers()
            tokens = torch.zeros(int(answers.lengths.sum()))
            known = dict.fromkeys(("old", "ref", "values"), tokens) | {"entropy": None}
            self.rollout = self.collector._with_advantages(answers, score[:, None], score, known)
        self.number = 0

    def step(self, watch):
        """The updates of one rollout as the script and the loop have them: where the host waits at the
        end of the last.
        """
        (policy, _, critic, _), collector = self.models, self.collector
        algorithm = collector.algorithm
        planned = PlannedRollout(self.number, 0.0, self.rollout.answers.groups)
        late = self.run.device.type in loop.READS_LATE
        step = loop.RolloutStep(self.run, self.checkpointer, planned, late)
        self.checkpointer.before_use = step.settle
        collector.kept.take(self.number, self.rollout, {})
        with watch:
            for minibatch in collector.minibatches(step, self.rollout):
                for batch in minibatch.batches():
                    known = self.rollout.of_batch(batch)
                    logps = policy(batch, temperature=self.temperature)
                    found = losses_of_policies.policy_loss(algorithm, logps, known)
                    policy.backward(found.loss / minibatch.denominator)
                    of_values = None
                    if critic:
                        values = critic(batch, at="before")
                        of_values = losses_of_policies.value_loss(algorithm, values, known)
                        critic.backward(of_values.loss / minibatch.num_tokens)
                    self.report.add(minibatch.sums(found, of_values))
                minibatch.finish()
                # what a checkpoint would be made of is the update before
                assert self.checkpointer._mark.place == Place(self.number, minibatch.number)
                before_end = list(watch.waits)
        at_end, watch.waits = watch.waits[len(before_end) :], before_end
        assert self.checkpointer._mark.place == Place(self.number, minibatch.number + 1)
        self.number += 1
        self.checkpointer.mark(self.number)  # as the loop does
        return sorted(set(at_end))


def updates(run: Pretend) -> dict:
    """The updates of two rollouts, of GRPO and of PPO with a value model. Between them the host does not
    wait; facts: where it does when a rollout's last one is done.
    """
    family, kind = FAMILIES["llama"], transformers.AutoModelForSequenceClassification
    facts = {}
    for name, target_kl in (("grpo", 0.0), ("ppo", 0.0), ("ppo", 1e9)):
        algorithm = made_rollouts.algorithm_row(name)._replace(epochs=2)
        with run.fake:
            policy, _ = policy_and_reference(family)
            critic = None
            if algorithm.needs_critic:
                lm = make_lm(family, kind=kind, num_labels=1)
                critic = under_deepspeed(ScoreModel(lm, autocast=torch.bfloat16), family)
            folder = run.folder / f"updates_{name}"
            training = Updates(policy, critic, algorithm, folder, target_kl)
            facts[f"{name} {target_kl:g}"] = [training.step(run.watch) for _ in range(2)]
    return facts


def coupled(run: Pretend) -> dict:
    """KTO, BCO and AOT: the step's scores first, then the losses with their known gradient.

    aot_unpaired is left out: on the CPU, where the step is put together, it counts the desired ones
    among values that a fake tensor does not have. On the GPU it does what aot does.
    """
    watch, family = run.watch, FAMILIES["llama"]
    data = made_pairs()
    data.labels = None
    data.rows = list(range(len(data)))
    device = torch.device("cuda")
    plan = types.SimpleNamespace(batch_tokens=4000)
    holder = types.SimpleNamespace(device=device, plan=plan)
    with run.fake:
        policy, reference = policy_and_reference(family)
        batch = made_batch(data)
        groups = list(range(len(data)))
        step = types.SimpleNamespace(groups=groups, groups_of_batches=[tuple(groups)])
        for name, row in composition.LOSSES.items():
            if not row.couples or name == "aot_unpaired":
                continue
            loss = composition.choose(name, 0.1, {})
            objective = preference.Objective(holder, loss, policy, reference, data, max_length=100)
            with watch:
                objective.begin(step)
                scored = objective.score(policy(batch), objective.ref_logps(batch), batch)
                losses = objective.losses(scored)
                policy.backward(losses.sum() / 11)
                policy.step()
    return {}


def a_layer(run: Pretend, family: Family, batch) -> dict:
    """{phase: launches}: what one more layer costs."""
    found = []
    for layers in (LAYERS - 1, LAYERS):
        module = Backbone(make_lm(family, layers), autocast=torch.bfloat16)
        if family.checkpointing:
            module.checkpoint_activations()
        frozen = Backbone(make_lm(family._replace(lora=False), layers), autocast=torch.bfloat16)
        reference = Live(frozen, {})
        run.watch.forget()
        with run.watch:
            with run.watch.phase("reference"):
                reference(batch)
            with run.watch.phase("forward"):
                total = module(batch).sum()
            with run.watch.phase("backward"):
                total.backward()
        found.append((dict(run.watch.launches), dict(run.watch.ops)))
    fewer, more = found
    names = ("launches", "ops")
    return {
        name: {phase: more[i][phase] - fewer[i][phase] for phase in more[i]}
        for i, name in enumerate(names)
    }


def weights_in_bf16(run: Pretend) -> dict:
    """Stages 1 to 3 compute in bf16 weights, without autocast."""
    with run.fake:
        batch = made_batch()
        for name in ("llama", "gemma3", "gpt2"):
            module = Backbone(make_lm(FAMILIES[name]).to(torch.bfloat16))
            with run.watch:
                module(batch).sum().backward()
            check_gradients(module)
    return {}


def other_kernels(run: Pretend) -> dict:
    """Where the flash kernel does not apply: {what: [launches of one more layer, names]}."""
    settings = {
        "fp32": (FAMILIES["llama"], None, pretend.CAPABILITY),
        "fp32_window": (FAMILIES["gemma3"], None, pretend.CAPABILITY),
        "before_sm80": (FAMILIES["llama"], torch.bfloat16, (7, 0)),
        # heads of 20
        "odd_heads": (
            Family(LLAMA, SMOLLM | {"hidden_size": 180}),
            torch.bfloat16,
            pretend.CAPABILITY,
        ),
    }
    facts = {}
    with run.fake:
        batch = made_batch()
        for name, (family, autocast, capability) in settings.items():
            counts = []
            for layers in (LAYERS - 1, LAYERS):
                with pretend.a_gpu_of(capability):
                    module = Backbone(make_lm(family, layers), autocast=autocast)
                    run.watch.forget()
                    with run.watch:
                        module(batch).sum().backward()
                check_gradients(module)
                counts.append(sum(run.watch.launches.values()))
            facts[name] = [counts[1] - counts[0], sorted(run.watch.names[""])]
    return facts


def deterministic(run: Pretend) -> dict:
    """--deterministic: what computes attention's backward, without and with it, and how many operations
    add up with atomics.
    """
    facts = {}
    with run.fake:
        batch = made_batch()
        for family in ("llama", "mistral_window", "llama_checkpointing"):
            for asked in (False, True):
                module = Backbone(make_lm(FAMILIES[family]), autocast=torch.bfloat16)
                module.deterministic = asked
                if FAMILIES[family].checkpointing:
                    module.checkpoint_activations()
                run.watch.forget()
                with run.watch:
                    module(batch).sum().backward()
                check_gradients(module)
                names = run.watch.names[""]
                backwards = {name: n for name, n in names.items() if "backward" in name}
                facts[f"{family} {asked}"] = [
                    {name: n for name, n in backwards.items() if "varlen" in name},
                    names["index_add"] + names["index_add_"],
                ]
    return facts


def decoding(run: Pretend) -> dict:
    """Generation: prompts read, tokens drawn one after the other. Of each model the launches of one
    token, and of each token behind the prompt's how often the host waits for the device from one
    forward pass to the next, and whether it asks the same of the device as the token before.
    """
    facts, watch = {}, run.watch
    with run.fake:
        for name in ("llama", "qwen3", "gpt2", "gemma3"):
            lm = make_lm(FAMILIES[name]).eval()
            begun = []  # of each forward pass: launches, waits, operations so far

            def note(lm, args, begun=begun):
                waits = len(watch.waits) + len(watch.allowed)
                begun.append((sum(watch.launches.values()), waits, len(watch.trace)))

            lm.register_forward_pre_hook(note)
            watch.forget()
            watch.trace = []
            with watch:
                generate.generate(
                    lm,
                    [tuple(range(5, 65)), (8, 9)],
                    eos_token_ids=[1],
                    max_new_tokens=40,
                    samples_per_prompt=2,
                    autocast=torch.bfloat16,
                    logps=True,
                )
            trace, watch.trace = watch.trace, None
            launches, waits, starts = zip(*begun, strict=True)
            steps = [trace[a:b] for a, b in itertools.pairwise(starts)]
            facts[name] = {
                "launches": launches[3] - launches[2],
                "waits": [b - a for a, b in itertools.pairwise(waits)][1:],
                "same": [a == b for a, b in itertools.pairwise(steps)][1:],
            }
    return facts


def static_shapes(run: Pretend) -> dict:
    """Layers over batches in the shapes of buckets: whether two batches of one bucket ask the same of
    the device; as compiled code, how many graphs they come to and with how many nodes; and why a model
    without flash attention stays as it is.
    """
    from torch._dynamo.backends.common import aot_autograd

    facts = {}
    with run.fake:
        batches = [made_batch(groups=count) for count in (11, 10)]
        facts["buckets"] = [buckets.bucket_of(batch) for batch in batches]
        for name in ("llama", "qwen3", "gemma3", "mistral_window", "gpt2", "llama_lora"):
            family = FAMILIES[name]
            module = Backbone(make_lm(family), autocast=torch.bfloat16)
            assert compiled.why_not(module, stage=0) is None
            module.static_shapes = True
            traces = []
            for batch in batches:
                run.watch.trace = []
                with run.watch, between_layers(run.watch, module) as marks:
                    module(batch).sum().backward()
                traces.append(run.watch.trace[slice(*marks)])
            run.watch.trace = None
            check_gradients(module)
            nodes = []

            def count(graph, example_inputs, nodes=nodes):
                nodes.append(len(graph.graph.nodes))
                return graph.forward

            with pretend.no_gpu_for_dynamo():
                compiled.compile_layers(module, aot_autograd(fw_compiler=count, bw_compiler=count))
                for batch in batches:
                    module(batch).sum().backward()
            torch._dynamo.reset()
            facts[name] = {"operations": len(traces[0]), "same": traces[0] == traces[1]}
            facts[name]["nodes"] = nodes
        wide = Backbone(make_lm(FAMILIES["llama"]))
        facts["fp32"] = compiled.why_not(wide, stage=0)
    return facts


@contextlib.contextmanager
def between_layers(watch, module):
    """Gives two marks in the watch's trace: where the first decoder layer begins and the last ends."""
    marks, (first, *_, last) = [], compiled._decoder_layers(module)

    def note(*_):
        marks.append(len(watch.trace))

    hooks = [first.register_forward_pre_hook(note), last.register_forward_hook(note)]
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()


def fullgraph(run: Pretend) -> dict:
    """Each family's body is one graph for dynamo, forward and backward; its nodes are counted."""
    from torch._dynamo.backends.common import aot_autograd

    facts = {}
    with run.fake, pretend.no_gpu_for_dynamo():
        batch = made_batch()
        for name in ("llama", "qwen3", "gemma3", "mistral_window"):
            nodes = []

            def count(graph, example_inputs, nodes=nodes):
                nodes.append(len(graph.graph.nodes))
                return graph.forward

            module = Backbone(make_lm(FAMILIES[name]), autocast=torch.bfloat16)
            compiled = torch.compile(
                module.packed_hidden,
                backend=aot_autograd(fw_compiler=count, bw_compiler=count),
                fullgraph=True,
                dynamic=False,
            )
            with torch.autocast("cuda", torch.bfloat16):
                hidden = compiled(batch)
            F.mse_loss(hidden.float(), torch.zeros_like(hidden)).backward()
            facts[name] = nodes
            torch._dynamo.reset()
    return facts


def memory(run: Pretend) -> dict:
    """{family and mode: [bytes that autograd keeps of a token, and the estimate of that]}."""
    facts = {}
    batches = [pack([footprint.GROUP] * count) for count in (1, 3)]
    for name in ("llama", "qwen3", "gemma", "gemma3", "mistral_window", "gpt2"):
        for mode in ("autocast", "bf16", "checkpointing"):
            with run.fake:
                lm = make_lm(FAMILIES[name])
                lm = lm.to(torch.bfloat16) if mode == "bf16" else lm
                module = Backbone(lm, autocast=None if mode == "bf16" else torch.bfloat16)
                if mode == "checkpointing":
                    module.checkpoint_activations()
                few, many = (
                    footprint.kept_bytes(partial(module, batch.to("cuda")), module)
                    for batch in batches
                )
            tokens = len(batches[1].input_ids) - len(batches[0].input_ids)
            estimate = footprint.of_config(lm.config, "bf16", stage=int(mode == "bf16"))
            if mode == "checkpointing":
                estimate = estimate._replace(layer=estimate.layer_input)
            facts[f"{name}, {mode}"] = [
                (many - few) / tokens,
                LAYERS * estimate.layer + estimate.rest,
            ]
    return facts


def machine_code(run: Pretend) -> dict:
    """Families' compiled layers as an A100 runs them, Llama's as an H100 does, too: {family and GPU: the
    kernels that each graph launches, forward and backward}; or why they cannot be built.
    """
    reason = code.why_not()
    if reason is not None:
        return {"reason": reason}
    a100, h100 = code.PROPERTIES
    families = ("llama", "qwen3", "gemma3", "mistral_window", "gpt2", "llama_lora", "reference")
    facts = {}
    with run.fake:
        batch = made_batch(groups=11)
        for name, capability in [*zip(families, itertools.repeat(a100)), ("llama", h100)]:
            is_reference = name == "reference"
            module = Backbone(
                make_lm(FAMILIES["llama" if is_reference else name]), autocast=torch.bfloat16
            )
            score = Live(module, {}) if is_reference else module
            with code.building(run.folder, capability) as built:
                compiled.compile_layers(module, built.backend)
                logps = score(batch)
                if not is_reference:
                    logps.sum().backward()
            torch._dynamo.reset()
            check_gradients(module)
            launched = {kernel for graph in built.graphs for kernel in graph}
            assert set(built.binaries) == {each for each in launched if each.startswith("triton_")}
            assert all(each.startswith(b"\x7fELF") for each in sum(built.binaries.values(), []))
            facts[f"{name} {capability}"] = built.graphs
    return facts


CASES = {
    **{f"step_{name}": step_of(name) for name in FAMILIES},
    "ppo": ppo,
    "updates": updates,
    "coupled": coupled,
    "weights_in_bf16": weights_in_bf16,
    "other_kernels": other_kernels,
    "deterministic": deterministic,
    "decoding": decoding,
    "static_shapes": static_shapes,
    "fullgraph": fullgraph,
    "memory": memory,
    "machine_code": machine_code,
}
