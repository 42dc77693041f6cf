"""Reward functions that the tests of launch/train_ppo.py name on the command line."""

import os
import time

if os.environ.get("PPO_TEST_ONE_RANK_FAILS") and os.environ.get("RANK") == "1":
    raise ImportError("not on this rank")
if os.environ.get("PPO_TEST_NO_GROUP_IS_IDLE"):
    from train.methods import ppo

    ppo.Collector._idle = lambda *_: []


if os.environ.get("PPO_TEST_POLICY_IS_LOST"):
    from train.losses import policy

    policy_loss = policy.policy_loss
    policy.policy_loss = lambda *args: (found := policy_loss(*args))._replace(
        loss=found.loss * float("nan")
    )


def vowels(response):
    """The share of vowels: what a tiny model can learn. Leaves a line for each call where the test
    wants to know how far the run is.
    """
    if path := os.environ.get("PPO_TEST_CALLS"):
        with open(path, "a") as file:
            file.write("called\n")
    return sum(letter in "aeiou" for letter in response) / max(len(response), 1)


def as_trl_calls_it(prompts, completions, completion_ids, **columns):
    """Of TRL's signature: texts, since the prompts are, ids, and a list for each column."""
    assert all(isinstance(prompt, str) for prompt in prompts)
    assert len(columns["weight"]) == len(completion_ids) == len(completions)
    return [weight * len(text) for weight, text in zip(columns["weight"], completions, strict=True)]


def of_the_group(prompts, completions):
    """How many answers to its prompt an answer is seen with."""
    return [float(prompts.count(prompt)) for prompt in prompts]


def sometimes_nothing(response, row):
    """None where it does not apply."""
    return 1.0 if row["ended"] else None


def of_even_length(response):
    """Applies to about half of the answers."""
    return 1.0 if len(response) % 2 == 0 else None


def never(response):
    """Applies to no answer."""


def broken(response):
    """A reward that fails."""
    raise RuntimeError("no such answer")


def words(response):
    """A reward that is no number."""
    return "good"


def takes_too_much(question):
    """A parameter that nothing fills."""


def of_solutions(completions, solution):
    """Of TRL's signature, for data with a column that these have not."""


def vowels_of_some(response, row):
    """Vowels, but nothing at all for the prompts of weight 0: their samples are worth the same."""
    return vowels(response) if row["weight"] else 0.0


def same(response):
    """All answers are worth the same."""
    return 0.5


def slow_and_chatty(response):
    """Prints and takes its time."""
    print("looking at", response)
    time.sleep(0.01)
    return float(len(response))


def begins_with_a_vowel(response):
    """1 or 0: what is attainable is 1."""
    return float(response.strip()[:1] in tuple("aeiouAEIOU"))


def of_the_prompt(row):
    """What the prompt's row says: nothing that a policy could change."""
    return row["weight"]
