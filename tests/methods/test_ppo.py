"""Drawing and rewarding a rollout: which answer stands where, under which noise, with which reward."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import transformers

from train.data import prompts
from train.losses.algorithms import ALGORITHMS
from train.methods.policy_setup import Models, Rewards, with_own_names
from train.methods.ppo import Collector
from train.methods.reference import NoReference
from train.methods.reward_functions import Sample, Source
from train.methods.rollout import Sampler
from train.models.generate import generate

P, K, MOST, SEED, STEP = 5, 2, 3, 14, 4
ENDS = {2}


@pytest.fixture(scope="module")
def collector(model_dir, tmp_path_factory):
    """Of five prompts by two answers of three tokens, resampled twice at most; an answer is worth 1
    if its length in characters is even.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["One.", "Two, said she.", "And three?", "Four of them", "The fifth"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    settings = SimpleNamespace(
        batch_size=P,
        seed=SEED,
        max_new_tokens=MOST,
        temperature=1.0,
        reward_weights=None,
        reward_clip=None,
        missing_end_penalty=0.0,
    )
    policy = SimpleNamespace(
        stage=0,
        tokenizer=tokenizer,
        module=SimpleNamespace(lm=tiny.make_model("llama"), autocast=None),
    )
    run = SimpleNamespace(plan=SimpleNamespace(decode_batch=4))
    return Collector(
        run=run,
        settings=settings,
        algorithm=ALGORITHMS["dapo"]._replace(samples=K, resamples=2),
        models=Models(policy, NoReference(), None, Sampler(policy, None, ENDS, settings, run)),
        rewards=Rewards([Source("even", even)], None, settings),
        prompts=prompts.prepare([str(path)], tokenizer, max_length=64),
        report=SimpleNamespace(timed=lambda name: contextlib.nullcontext()),
    )


def even(samples):
    return [1.0 - len(sample.response) % 2 for sample in samples]


def alone(collector, prompt, draw):
    """What the prompt is answered with at this number of a draw, decoded by itself."""
    return generate(
        collector.models.policy.module.lm,
        [collector.prompts.ids(prompt)],
        eos_token_ids=ENDS,
        max_new_tokens=MOST,
        temperature=1.0,
        seed=SEED,
        samples_per_prompt=K,
        prompt_numbers=[draw],
    )


def test_prompts_whose_answers_are_worth_the_same_are_answered_anew(collector):
    """Each at its own place, with its own new rewards, under noise that no other draw of the run has;
    as often as the algorithm says, and no more. The rest stays as it was.
    """
    step = SimpleNamespace(number=STEP, groups=(3, 0, 4, 1, 2))
    answers, samples, scores, score = collector._reward(step, collector._draw(step, range(P), 0))
    attempts = []
    for place, prompt in enumerate(step.groups):
        for attempt in range(3):
            # every rollout has room for three draws of all its prompts
            expected = alone(collector, prompt, (3 * STEP + attempt) * P + place)
            texts = collector.models.policy.tokenizer.batch_decode(
                [c.ids[:-1] if c.ended else c.ids for c in expected], skip_special_tokens=True
            )
            worth = [1.0 - len(text) % 2 for text in texts]
            if len(set(worth)) > 1:
                break
        attempts.append(attempt)
        mine = slice(place * K, (place + 1) * K)
        drawn = [(c.ids, c.ended) for c in answers.completions[mine]]
        assert drawn == [(c.ids, c.ended) for c in expected]
        assert [sample.response for sample in samples[mine]] == texts
        assert score[mine].tolist() == scores[mine, 0].tolist() == worth
        assert answers.group(place).prompt == collector.prompts.ids(prompt)
        assert answers.group(place).responses == tuple(c.ids for c in expected)
    assert set(attempts) == {0, 1, 2}  # else another seed


def sample(response, ended=True):
    return Sample([{"role": "user", "content": ""}], response, ended, {}, 0)


def test_sources_of_one_name_are_told_apart():
    """Functions of two modules may be called the same, or as the reward model is."""
    specs = ["a:good", "b:good", "b:reward_model", "ended"]
    sources = [Source(spec.rpartition(":")[2], len) for spec in specs]
    names = [source.name for source in with_own_names(sources, specs)]
    assert names == ["a:good", "b:good", "b:reward_model", "ended"]
    with pytest.raises(ValueError, match="names a:good 2 times: name it once, with a weight"):
        with_own_names(sources[:1] * 2, specs[:1] * 2)


def test_one_number_of_several_rewards():
    """Weights first, then the clip, then the price of a missing end; what does not apply drops out."""
    settings = SimpleNamespace(
        reward_weights=[1.0, 10.0], reward_clip=25.0, missing_end_penalty=0.5
    )
    lengths = Source("length", lambda samples: [float(len(s.response)) for s in samples])
    of_a = Source("a", lambda samples: [s.response.count("a") or None for s in samples])
    rewards = Rewards([lengths, of_a], None, settings)
    texts = [sample("xa"), sample("xyz", ended=False), sample("aaaa"), sample("aa", ended=False)]
    scores, score = rewards.score(texts)
    assert np.array_equal(scores, [[2, 1], [3, np.nan], [4, 4], [2, 2]], equal_nan=True)
    assert score.tolist() == [12.0, 2.5, 25.0, 21.5]
    alone = Rewards([of_a], None, SimpleNamespace(**vars(settings) | {"reward_weights": None}))
    assert np.array_equal(alone.score(texts)[1], [1, np.nan, 4, 1.5], equal_nan=True)
