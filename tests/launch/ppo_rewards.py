"""Reward functions that the tests of launch/train_ppo.py name on the command line."""

import os


def vowels(response):
    """The share of vowels: what a tiny model can learn. Leaves a line for each call where the test
    wants to know how far the run is.
    """
    if path := os.environ.get("PPO_TEST_CALLS"):
        with open(path, "a") as file:
            file.write("called\n")
    return sum(letter in "aeiou" for letter in response) / max(len(response), 1)


def as_trl_calls_it(prompts, completions, **columns):
    """Of TRL's signature: messages, and a list for each column."""
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    assert len(columns["weight"]) == len(completions)
    texts = [completion[0]["content"] for completion in completions]
    return [weight * len(text) for weight, text in zip(columns["weight"], texts, strict=True)]


def sometimes_nothing(response, row):
    """None where it does not apply."""
    return 1.0 if row["ended"] else None


def of_even_length(response):
    """Applies to about half of the answers."""
    return 1.0 if len(response) % 2 == 0 else None


def broken(response):
    """A reward that fails."""
    raise RuntimeError("no such answer")


def words(response):
    """A reward that is no number."""
    return "good"


def takes_too_much(question):
    """A parameter that nothing fills."""
