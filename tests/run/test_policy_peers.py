"""Updates of our GRPO family and RLOO beside TRL's GRPOTrainer and RLOOTrainer: the same weights,
prompts, samples, rewards and optimiser, in fp32. One command, with the extra `peers`:

    pytest -m slow tests/run/test_policy_peers.py

TRL renders and tokenises the prompts itself; its model's `generate` gives our samples back, and all
that follows (ends, rewards, advantages, old and reference log-probabilities, losses) is its own. Each
of two rollouts is trained on twice: in the second update ratios are not 1, and clipping takes a part
of the gradient. The loss and the gradient norm of every update lie within 1e-5 of TRL's wherever both
mean the same. The optimiser is plain SGD: AdamW's first step is the gradient's sign, which rounding
decides where it is near 0.

Where the two do not mean the same:

* A group's standard deviation: TRL divides by it plus 1e-4, we by itself, as the paper has it. Rewards
  are a thousand times larger here where it is used, which leaves our advantages as they are and makes
  the 1e-4 vanish; test_what_trl_adds_to_a_deviation shows it.
* The KL in GRPO's loss counts with the token's ratio, in TRL too unless use_bias_correction_kl is off:
  test_kl_without_the_ratio.
* A group whose rewards are all equal: exactly 0 here, in TRL what rounding leaves over 1e-4. None here.
* Log-ratios are bounded at 20 nats here and not in TRL. None here is that large.
* TRL's defaults are others: loss_type dapo for all, no KL in GRPO, one clip for both sides, and CISPO's
  bound 0.2 where it bounds the ratio itself. The cases pass what our rows say.
* DAPO is only the loss in TRL: prompts with equal rewards are not answered anew.
"""

import json
from typing import NamedTuple

import pytest
import tiny
import torch

from train.data.packing import pack
from train.losses import policy as losses
from train.losses.algorithms import ALGORITHMS
from train.methods import ppo, rollout
from train.models.backbone import Backbone
from train.models.generate import generate
from train.models.pretrained import load_causal_lm, load_tokenizer

pytestmark = pytest.mark.slow
ROLLOUTS, EPOCHS, PROMPTS, SAMPLES = 2, 2, 4, 4  # prompts a rollout, samples a prompt
MAX_NEW_TOKENS, CLIP = 16, 1.0


class Case(NamedTuple):
    """A row of our table and TRL's arguments for the same."""

    algorithm: str
    arguments: dict
    temperature: float = 1.0
    micro_batches: int = 1  # of a TRL update
    kl_coef: float | None = None  # None: the row's
    rate: float = 0.01

    @property
    def row(self):
        """The algorithm as it is used here."""
        row = ALGORITHMS[self.algorithm]._replace(samples=SAMPLES, epochs=EPOCHS, minibatches=1)
        if self.kl_coef is not None:
            row = row._replace(kl=row.kl._replace(coef=self.kl_coef))
        return row


SEQUENCE = dict(loss_type="grpo", importance_sampling_level="sequence")
CASES = {
    "grpo": Case("grpo", dict(loss_type="grpo", beta=0.04)),
    "grpo, cold": Case("grpo", dict(loss_type="grpo", beta=0.04), temperature=0.7),
    "grpo, in parts": Case("grpo", dict(loss_type="grpo", beta=0.04), micro_batches=2),
    "grpo, much KL": Case("grpo", dict(loss_type="grpo", beta=0.5), kl_coef=0.5),
    "dr_grpo": Case("dr_grpo", dict(loss_type="dr_grpo", scale_rewards="none")),
    "dapo": Case("dapo", dict(loss_type="dapo", epsilon_high=0.28)),
    "dapo, in parts": Case("dapo", dict(loss_type="dapo", epsilon_high=0.28), micro_batches=4),
    # its clip is narrow: with steps like the others' nothing would be left of the second update
    "gspo": Case("gspo", dict(**SEQUENCE, epsilon=3e-4, epsilon_high=4e-4), rate=1e-4),
    "cispo": Case("cispo", dict(loss_type="cispo", epsilon_high=5.0)),
    "sapo": Case("sapo", dict(loss_type="sapo", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05)),
    "rloo": Case("rloo", dict(beta=0.05)),
    "rloo, cold, in parts": Case("rloo", dict(beta=0.05), temperature=0.7, micro_batches=2),
    "rloo, much KL": Case("rloo", dict(beta=0.2), kl_coef=0.2),
}  # fmt: skip


class Start(NamedTuple):
    """What both begin with."""

    model: str  # a directory
    prompts: list[str]
    answers: dict[float, list[rollout.Answers]]  # by temperature, of each rollout


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model with several ends, that answers of 16 tokens do meet, and its samples."""
    folder = tmp_path_factory.mktemp("peers") / "model"
    tokenizer, lm = tiny.save_tokenizer(folder), tiny.make_model()
    lines = (tiny.ROOT / "train/data/builtin/prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[: ROLLOUTS * PROMPTS]]
    ids = [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True
            )["input_ids"]
        )
        for prompt in prompts
    ]
    drawn = generate(lm, ids, eos_token_ids=(), max_new_tokens=60, seed=1)
    frequent = torch.bincount(torch.tensor([t for c in drawn for t in c.ids])).argsort()[-60:]
    ends = sorted({2, *frequent.tolist()})
    lm.generation_config.eos_token_id = ends
    lm.save_pretrained(folder)
    answers = {}
    for temperature in (1.0, 0.7):
        answers[temperature] = []
        for number in range(ROLLOUTS):
            places = range(number * PROMPTS, (number + 1) * PROMPTS)
            completions = generate(
                lm,
                [ids[i] for i in places],
                eos_token_ids=ends,
                max_new_tokens=MAX_NEW_TOKENS,
                temperature=temperature,
                samples_per_prompt=SAMPLES,
                prompt_numbers=places,
            )
            answers[temperature].append(
                rollout.Answers(tuple(places), tuple(ids[i] for i in places), tuple(completions))
            )
        ended = [c.ended for each in answers[temperature] for c in each.completions]
        assert 0.3 < sum(ended) / len(ended) < 1  # answers of many lengths, some of them cut
    return Start(str(folder), prompts, answers)


def reward_of(ids, scale):
    """A number that differs between samples: even tokens."""
    return scale * float(sum(token % 2 == 0 for token in ids))


def theirs(start, case, scale, folder):
    """(loss, gradient norm) of each of TRL's updates, and the advantages of its last rollout."""
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(start.model, dtype=torch.float32)
    pad = lm.config.pad_token_id
    answers_of = {}
    for answers in start.answers[case.temperature]:
        for i, prompt in enumerate(answers.prompts):
            answers_of[prompt] = [c.ids for c in answers.completions[i * SAMPLES :][:SAMPLES]]

    def give_back(input_ids, attention_mask, **_):
        """(B, P + M) as a model's `generate` has it: a prompt's samples in turn."""
        rows, given = [], dict.fromkeys(answers_of, 0)
        for row, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            prompt = tuple(token for token, counts in zip(row, mask, strict=True) if counts)
            answer = answers_of[prompt][given[prompt]]
            given[prompt] += 1
            rows.append([*row, *answer, *[pad] * (MAX_NEW_TOKENS - len(answer))])
        assert set(given.values()) == {0, SAMPLES}
        return torch.tensor(rows)

    lm.generate = give_back
    trainers = (trl.RLOOTrainer, trl.RLOOConfig), (trl.GRPOTrainer, trl.GRPOConfig)
    trainer_class, config_class = trainers[case.algorithm != "rloo"]
    size = PROMPTS * SAMPLES // case.micro_batches
    trainer = trainer_class(
        model=lm,
        reward_funcs=lambda completion_ids, **_: [reward_of(ids, scale) for ids in completion_ids],
        args=config_class(
            output_dir=str(folder),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=case.micro_batches,
            num_generations=SAMPLES,
            num_iterations=EPOCHS,
            max_completion_length=MAX_NEW_TOKENS,
            temperature=case.temperature,
            shuffle_dataset=False,
            max_steps=ROLLOUTS * EPOCHS,
            learning_rate=case.rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=CLIP,
            optim="sgd",
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            **case.arguments,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": [{"role": "user", "content": prompt}]} for prompt in start.prompts]
        ),
        processing_class=load_tokenizer(start.model),
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [(e["loss"], e["grad_norm"]) for e in log], list(trainer._logs["advantages"])


def ours(start, case, scale):
    """(loss, gradient norm, share of tokens clipped) of each update, as launch/train_ppo.py makes
    them, and the advantages of the last rollout's answers.
    """
    algorithm, device = case.row, torch.device("cpu")
    module, reference = (Backbone(load_causal_lm(start.model)) for _ in range(2))
    optimizer = torch.optim.SGD(module.lm.parameters(), lr=case.rate)
    models = rollout.Scored(
        module, reference if algorithm.kl.coef else None, None, case.temperature
    )
    collector = ppo.Collector(None, None, algorithm, models, None, None, None)
    updates = []
    for number, answers in enumerate(start.answers[case.temperature]):
        sizes = [answers.group(i).tokens for i in range(PROMPTS)]
        (part,) = rollout.minibatches(sizes, 1, max(sizes), seed=0, number=number)
        assert len(part.batches) > 1
        tokens = rollout.score_tokens(answers, part.batches, device, models)
        score = torch.tensor([reward_of(c.ids, scale) for c in answers.completions]).double()
        drawn = collector._with_advantages(answers, score[:, None].numpy(), score.numpy(), tokens)
        lengths = answers.lengths
        denominator = losses.denominator(
            algorithm, len(lengths), int(lengths.sum()), MAX_NEW_TOKENS
        )
        for _ in range(EPOCHS):
            mean, clipped = 0.0, 0.0
            for groups in part.batches:
                batch = pack([answers.group(i) for i in groups])
                known = drawn.of_batch(batch)
                logps = module(batch, temperature=case.temperature)
                found = losses.policy_loss(algorithm, logps, known)
                (found.loss / denominator).backward()
                mean += found.loss.item() / denominator
                clipped += found.clipped.item() / lengths.sum()
            norm = torch.nn.utils.clip_grad_norm_(module.lm.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            updates.append((mean, norm.item(), clipped))
    first_tokens = lengths.cumsum() - lengths
    return updates, drawn.advantages[first_tokens].tolist()


def assert_near(found, expected):
    """Losses within 1e-5, gradient norms within 1e-5 of themselves, update by update."""
    assert len(found) == len(expected) == ROLLOUTS * EPOCHS
    for (loss, norm, _), (their_loss, their_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(their_loss, rel=0, abs=1e-5)
        assert norm == pytest.approx(their_norm, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_updates(start, tmp_path, name):
    case = CASES[name]
    scale = 1000.0 if case.row.scale == "group" else 0.25
    found, advantages = ours(start, case, scale)
    expected, their_advantages = theirs(start, case, scale, tmp_path)
    assert_near(found, expected)
    assert advantages == pytest.approx(their_advantages, abs=1e-5)
    # the second update of a rollout is of another policy than drew it
    shares = [clipped for _, _, clipped in found]
    assert shares[0] == shares[2] == 0
    if case.row.ratio in ("token", "mean", "sum"):
        assert 0 < shares[1] < 1 and 0 < shares[3] < 1
    norms = [norm for _, norm, _ in found]
    assert min(norms) > 0.05 and norms[1] != pytest.approx(norms[0], rel=0.02)


def test_what_trl_adds_to_a_deviation(start, tmp_path):
    """Rewards of everyday size: TRL's advantages are ours times std / (std + 1e-4), which in a loss
    is more than the 1e-5 that all else keeps to.
    """
    case, scale = CASES["dapo"], 0.01
    found, advantages = ours(start, case, scale)
    expected, their_advantages = theirs(start, case, scale, tmp_path)
    completions = start.answers[1.0][-1].completions
    rewards = torch.tensor([reward_of(c.ids, scale) for c in completions]).double()
    deviations = rewards.view(PROMPTS, SAMPLES).std(1).repeat_interleave(SAMPLES)
    shrunk = torch.tensor(advantages) * deviations / (deviations + 1e-4)
    assert shrunk.tolist() == pytest.approx(their_advantages, abs=1e-5)
    assert advantages != pytest.approx(their_advantages, abs=1e-3)
    assert abs(found[0][0] - expected[0][0]) > 1e-4


def test_kl_without_the_ratio(start, tmp_path):
    """TRL's use_bias_correction_kl=False: k3 alone. The first rollout's first update is the same,
    where policy and reference are; from then on the KL's gradient is another.
    """
    case = CASES["grpo, much KL"]
    uncorrected = case._replace(arguments=case.arguments | {"use_bias_correction_kl": False})
    found, _ = ours(start, case, 1000.0)
    expected, _ = theirs(start, uncorrected, 1000.0, tmp_path)
    for column in (0, 1):
        assert found[0][column] == pytest.approx(expected[0][column], rel=1e-5, abs=1e-5)
        assert found[1][column] != pytest.approx(expected[1][column], rel=1e-4, abs=1e-4)
    # the second rollout begins with ratios of 1 and a policy that has left the reference: k3 is the
    # same number, its gradient lacks the ratio's
    assert found[2][1] != pytest.approx(expected[2][1], rel=1e-4, abs=1e-4)
