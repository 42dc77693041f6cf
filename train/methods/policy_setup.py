"""What reinforcement learning starts from, out of its flags: prompts, sources of reward, and up to four
models.
"""

from collections import Counter
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch

from train.data import chat, mixing, prompts
from train.engine import checks, dist, ds_config, loading, memory
from train.engine.trained import TrainedModel
from train.methods import reward_functions, setup
from train.methods.answers import ends_of, without_end
from train.methods.reference import AdaptersOff, NoReference, Reference
from train.methods.reward_functions import Sample, Source
from train.methods.rewards import RewardModel, prompts_of
from train.methods.rollout import Answers, Sampler
from train.run.folder import hardware, versions
from train.run.session import Plan, Run

REWARD_MODEL = "reward_model"  # what it is called among the sources
CPU_ROLLOUTS = 8  # of the default run on a CPU


def open_prompts(settings, run: Run):
    """The tokenizer, the training prompts and the held-out ones (None where there are none). Every
    rank calls this.
    """
    return setup.read_sources(
        settings,
        run,
        choose=lambda sources: prompts.prepare,
        split=prompts.Prompts.split,
        tokens_of=attrgetter("data"),
    )


class Rewards:
    """The sources of reward, and how their scores become one."""

    def __init__(self, sources: list[Source], model: RewardModel | None, settings):
        """model: a reward model as the last source."""
        self.sources, self.model, self.settings = sources, model, settings
        self.names = [source.name for source in sources] + ([REWARD_MODEL] if model else [])
        weights = settings.reward_weights or [1.0] * len(self.names)
        self.weights = np.array(weights)  # (F,)
        self.shift, self.scale = 0.0, 1.0  # of the reward model's scores
        if model is not None:
            config = model.model.config
            self.shift = float(getattr(config, "score_mean", 0.0) or 0.0)
            self.scale = float(getattr(config, "score_std", 1.0) or 1.0)

    @property
    def formula(self) -> str:
        """What is maximised, for people: the sources with their weights."""
        weighed = [
            name if weight == 1 else f"{weight:g} x {name}"
            for name, weight in zip(self.names, self.weights, strict=True)
        ]
        return f"the reward is {' + '.join(weighed)}"

    def score(self, samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """((B, F) each source's scores, NaN where it does not apply; (B,) what is maximised). Every
        rank calls this.

        The reward model's scores have mean 0 and deviation 1 on the data that it was evaluated on, if
        its configuration says which those were. Sources that do not apply drop out of a sample's sum;
        NaN where none does.
        """
        columns = [reward_functions.score(source, samples) for source in self.sources]
        if self.model is not None:
            raw = self.model.score(
                [s.messages for s in samples],
                [s.response for s in samples],
                [s.ended for s in samples],
                [s.template_args for s in samples],
            )
            columns.append((raw - self.shift) / self.scale)
        scores = np.stack(columns, 1)  # (B, F)
        applies = np.isfinite(scores)
        total = np.where(applies, scores, 0.0) @ self.weights
        if self.settings.reward_clip is not None:
            total = total.clip(-self.settings.reward_clip, self.settings.reward_clip)
        ended = np.array([s.ended for s in samples])
        total = total - self.settings.missing_end_penalty * ~ended
        return scores, np.where(applies.any(1), total, np.nan)


def open_rewards(
    settings, run: Run, train: prompts.Prompts, held_out: prompts.Prompts | None
) -> Rewards:
    """The sources of reward that the flags name. Every rank calls this, before a policy is loaded."""
    specs = settings.reward or []
    if not specs and not settings.reward_model:
        if settings.data:
            raise ValueError("--reward or --reward_model: something has to say what is good")
        specs = [settings.default_reward]
    sources, problem = [], None
    try:
        sources = [reward_functions.open_source(spec, train.columns) for spec in specs]
        for spec in specs if held_out else ():
            reward_functions.open_source(spec, held_out.columns, "--eval_data")
    except ValueError as error:
        problem = str(error)
    # a module may be missing on one host alone: all ranks end then
    for number, said in enumerate(dist.all_gather(problem)):
        if said:
            raise ValueError(said if problem else f"on rank {number}: {said}")
    sources = with_own_names(sources, specs)
    model = None
    if settings.reward_model:
        precision = ds_config.resolve_precision(settings.precision, run.device)
        autocast = torch.bfloat16 if precision == "bf16" else None
        config = resolve_reward_config(settings, precision)
        model = RewardModel(
            settings.reward_model,
            run.device,
            autocast,
            settings.trust_remote_code,
            offload=settings.offload_frozen,
            config=config,
        )
        run.note(reward_deepspeed=config)
        for each in (train, held_out) if held_out else (train,):
            model.check(prompts_of(each), settings.max_new_tokens)
    rewards = Rewards(sources, model, settings)
    if model is not None and (rewards.shift, rewards.scale) != (0.0, 1.0):
        run.say(
            f"reward model: scores are taken less {rewards.shift:.4f} and over {rewards.scale:.4f}, as "
            "its configuration says of the data it was evaluated on"
        )
    run.note(rewards=rewards.names)
    return rewards


def with_own_names(sources: list[Source], specs: list[str]) -> list[Source]:
    """The sources, those of one name under all that --reward says of them. ValueError where that is
    the same.
    """
    taken = Counter([*(source.name for source in sources), REWARD_MODEL])
    for spec, count in Counter(specs).items():
        if count > 1:
            raise ValueError(
                f"--reward names {spec} {count} times: name it once, with a weight in --reward_weights"
            )
    return [
        source if taken[source.name] == 1 else source._replace(name=spec)
        for source, spec in zip(sources, specs, strict=True)
    ]


def resolve_reward_config(settings, precision: str) -> dict:
    """The resolved DeepSpeed configuration of the reward model. ValueError for stages 1 and 2."""
    policy = ds_config.resolve(ds_config.read_config(settings.ds_config), precision)
    # its shards are bf16 whatever the policy's weights are
    policy |= {"bf16": {"enabled": True}} if precision == "bf16" else {}
    return setup.resolve_frozen_config(settings.reward_ds_config, policy, "reward model")


class Models(NamedTuple):
    """The models of a run."""

    policy: TrainedModel
    reference: Reference
    critic: TrainedModel | None
    sampler: Sampler


def open_models(settings, run: Run, tokenizer, algorithm, train, held_out) -> Models:
    """Policy and critic under DeepSpeed, a frozen reference where the algorithm has a KL to it, checked
    on the first prompts; settles the plan. Every rank calls this.
    """
    mode = setup.resolve_mode(settings, run.device)
    path = run.folder.model_path(settings.model)
    by_default = CPU_ROLLOUTS if not settings.data and run.device.type == "cpu" else 0
    steps = setup.num_steps(
        mixing.mix_of(train.data).count,
        settings.batch_size,
        settings.epochs,
        settings.max_steps or by_default,
    )
    module = setup.load(
        settings, run.device, mode, path, mode.config, change=setup.adapters(settings)
    )
    datasets = [each.data for each in (train, held_out) if each is not None]
    chat.check_fit(module.lm.config, tokenizer, settings.max_length, datasets)
    setup.stop_at_end(run, module.lm, tokenizer)
    policy = setup.wrap_for_training(settings, mode, module, tokenizer, steps)
    reference, reference_config = NoReference(), None
    if algorithm.kl.coef and settings.lora_rank:
        reference = AdaptersOff(policy)
    elif algorithm.kl.coef:
        reference_config = setup.resolve_reference_config(settings, mode.config)
        reference = setup.live_reference(
            settings, run, mode, path, reference_config, offload=settings.offload_frozen
        )
    if settings.offload_frozen and not (settings.reward_model or reference_config):
        raise ValueError(
            "--offload_frozen: there is no frozen model, neither a reward model nor a reference beside "
            "the policy"
        )
    critic = None
    if algorithm.needs_critic:
        critic = open_critic(settings, run, mode, tokenizer, datasets, path, steps)
    setup.say_attention(settings, run, mode, module)
    ends = ends_of(tokenizer, module.lm)

    def make_copy():
        whole = ds_config.resolve({}, mode.precision, settings.grad_clip)
        change = setup.adapters(settings)
        return setup.load(settings, run.device, mode, path, whole, change=change).lm

    sampler = Sampler(policy, make_copy, ends, settings, run)
    every = [each.ids(i) for each in (train, held_out) if each for i in range(len(each))]
    sampler.check(every)
    run.set_plan(
        Plan(
            mode.precision,
            setup.batch_tokens(settings, run.device, mode, module),
            steps,
            True,
            decode_batch=settings.decode_batch
            or memory.default_decode_batch(
                module,
                run.device,
                mode.stage,
                max(map(len, every)) + settings.max_new_tokens,
                say=run.say,
            ),
        ),
        task="policy",
        algorithm=algorithm._asdict() | {"kl": algorithm.kl._asdict()},
        model=path,
        deepspeed=mode.config,
        reference_deepspeed=reference_config,
        hardware=hardware(run.device),
        versions=versions(),
    )
    # what the first prompts' own first tokens are answered with is as good as any text for a check
    pairs = FirstTexts(train)
    run.first_batches = checks.check_start(
        policy,
        reference,
        pairs,
        run.device,
        mode.precision,
        same_weights=bool(algorithm.kl.coef),
    )
    return Models(policy, reference, critic, sampler)


class FirstTexts:
    """Prompts with a part of themselves for a response: texts to compare two ways of computing on."""

    def __init__(self, train):
        self.train = train

    def __len__(self):
        return len(self.train)

    def group(self, i):
        """The prompt twice answered, each time by some of its own tokens."""
        group = self.train.data.group(i)
        ids = tuple(group.prompt)
        return group._replace(responses=(ids[: len(ids) // 2 + 1], ids[len(ids) // 2 :]))


def open_critic(settings, run, mode, tokenizer, datasets, path, steps) -> TrainedModel:
    """The value model under DeepSpeed: from --value_model, from the reward model where it reads the
    same tokens and can be trained here, else from the policy's body with a head of zeros. Every rank
    calls this.
    """
    config = ds_config.read_config(settings.value_ds_config or settings.ds_config)
    config = ds_config.resolve(config, mode.precision, settings.grad_clip)
    mode = setup.Mode(mode.precision, config, ds_config.zero_stage(config))
    # values are in the reward's unit: of a reward model, deviations from the mean of its scores
    loader = partial(loading.load_score_model, seed=None, in_deviations=True)

    def begun_as(source, flag):
        if flag:
            setup.check_same_tokens(
                tokenizer, source, datasets, flag, settings.trust_remote_code, run.say
            )
        module = setup.load(settings, run.device, mode, source, config, loader=loader)
        of = f"{flag} {source}" if flag else "the value model"
        chat.check_fit(module.lm.config, tokenizer, settings.max_length, datasets, of=of)
        return module

    module = None
    if settings.value_model:
        module = begun_as(settings.value_model, "--value_model")
    elif settings.reward_model:
        try:
            module = begun_as(settings.reward_model, "--reward_model")
        except ValueError as error:
            run.say(f"the value model begins as the policy with a head of zeros: {error}")
    if module is None:
        module = begun_as(path, flag=None)
    lr = settings.value_lr
    if lr is None:
        lr = settings.resolve(settings)["value_lr"]
    return setup.wrap_for_training(settings, mode, module, tokenizer, steps, lr=lr)


def samples_of(answers: Answers, of: prompts.Prompts, tokenizer, most: int) -> list[Sample]:
    """What sources of reward see of each answer: text, decoded without control tokens. most: tokens
    that an answer may have.
    """
    k = answers.samples_per_prompt
    texts = tokenizer.batch_decode(
        [list(without_end(c)) for c in answers.completions], skip_special_tokens=True
    )
    found = []
    for n, (completion, text) in enumerate(zip(answers.completions, texts, strict=True)):
        i = answers.groups[n // k]
        asked = of.asked(i)
        found.append(
            Sample(
                asked.messages,
                text,
                completion.ended,
                of.row(i),
                int(of.data.rows[i]),
                ids=completion.ids,
                most=most,
                template_args=asked.template_args,
            )
        )
    return found
