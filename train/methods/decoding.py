"""Prompts answered by all ranks of a job together: batches are planned for the whole job and dealt to
the ranks, so that what a batch holds does not depend on how many there are.
"""

from collections.abc import Callable, Sequence

from train.engine import dist, memory
from train.models.generate import Completion, batches, generate


def plan_of_rank(
    prompts: Sequence[Sequence[int]], at_once: int, samples_per_prompt: int = 1
) -> list[list[int]]:
    """This rank's batches of places among the prompts, as many on every rank; the last may be empty.

    At most `at_once` answers are decoded together, but at least those of one prompt, which is read
    once for all of its samples.
    """
    plan = batches([len(prompt) for prompt in prompts], max(1, at_once // samples_per_prompt))
    plan += [[]] * (-len(plan) % dist.world_size())
    return plan[dist.rank() :: dist.world_size()]


def answer(
    lm,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    plan: list[list[int]],
    *,
    advice: str,
    samples_per_prompt: int = 1,
    between: Callable[[], object] = lambda: None,
    **options,
) -> list[Completion]:
    """The completions of all prompts, in order and samples side by side, on every rank. Every rank
    calls this.

    numbers: what the noise knows each prompt by, whatever batch it is in. plan: of `plan_of_rank`.
    advice: where memory runs out. between: called before each batch and behind the last, on every
    rank as often. options: `generate`'s.
    """
    mine = []  # (place among the prompts, its completions)
    for places in plan:
        between()
        if not places:
            continue
        count = len(places) * samples_per_prompt
        with memory.room_for(f"{count} answers decoded at once", advice):
            done = generate(
                lm,
                [prompts[i] for i in places],
                samples_per_prompt=samples_per_prompt,
                prompt_numbers=[numbers[i] for i in places],
                batch_size=count,
                **options,
            )
        for n, i in enumerate(places):
            mine.append((i, done[n * samples_per_prompt : (n + 1) * samples_per_prompt]))
    between()
    everyone = sorted(
        (item for part in dist.all_gather(mine) for item in part), key=lambda item: item[0]
    )
    assert [place for place, _ in everyone] == list(range(len(prompts))), (
        "a prompt was answered twice or never"
    )
    return [completion for _, completions in everyone for completion in completions]
