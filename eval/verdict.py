"""Whether a model is better, worse or merely different than its reference: one word and its
reasons, from the intervals of the other chapters.
"""

import math

from train.methods.intervals import percent, show

MATERIAL = 0.02  # a perplexity that is shown to move by less than this share is called unchanged
# The verdict's words, and how they are said.
WORDS = {
    "better": "better",
    "worse": "worse",
    "different": "merely different",
    "unchanged": "unchanged",
    "not compared": "not compared: there is no reference",
}
PREFERENCE = {
    1: "prefers the chosen answers more than the reference does",
    0: "is not shown to prefer the chosen answers more than the reference does",
    -1: "prefers the rejected answers more than the reference does",
}
OTHER_TEXT = {1: "less likely than", 0: "about as likely as", -1: "more likely than"}


def verdict(
    preferences: dict, baselines: dict, distribution: dict, generations: dict, unchanged: bool
) -> dict:
    """{"word": one of WORDS, "reasons": sentences}, from the report's sections.

    Better: accuracy above one half and margin above 0, at no price; where rewards are not relative to
    the reference, accuracy and margin of the change from it. Worse: below, or no gain and a price.
    Else merely different. A price: other text is less likely by a material amount, or the reward
    model prefers the reference's sampled answers. unchanged: the models score everything alike.
    """
    about_baselines = _about_baselines(baselines)
    if "change" not in distribution:
        return {"word": "not compared", "reasons": about_baselines}
    if unchanged:
        reason = "The model scores every response and text as the reference does."
        return {"word": "unchanged", "reasons": [reason]}
    model, change = preferences["model"], preferences.get("change")
    accuracy, margin = model["rewards/accuracies"], model["rewards/margins"]
    if change:
        accuracy, margin = change["accuracies"], change["margins"]
    gain = _side(accuracy, 0.5)
    if gain != _side(margin, 0):
        gain = 0  # shown is only what both say
    ratio = distribution["change"]["out"]["perplexity_ratio"]
    loss = 0  # of likelihood of other text: 1, -1 for a gain, 0 where nothing material is shown
    if _side(ratio, 1 + MATERIAL) > 0:
        loss = 1
    elif _side(ratio, 1 - MATERIAL) < 0:
        loss = -1
    shown = f"reward accuracy {percent(accuracy)} (no preference: 50 %), margin {show(margin)}"
    if change:
        shown = (
            f"the reward margin grew in {percent(accuracy)} of the pairs (no preference: 50 %), by "
            f"{show(margin)} on average"
        )
    reasons = [
        f"The model {PREFERENCE[gain]}: {shown}.",
        *about_baselines,
        f"The chosen answer itself became less likely in {percent(model['chosen_fell'])} of the "
        "pairs.",
        f"Text from elsewhere is {OTHER_TEXT[loss]} before: perplexity x {show(ratio, 5)}.",
        *_about_answers(generations),
    ]
    return {"word": _word(gain, price=loss > 0 or _disliked(generations)), "reasons": reasons}


def _word(gain: int, price: bool) -> str:
    if gain > 0 and not price:
        return "better"
    if gain < 0 or (gain == 0 and price):
        return "worse"
    return "different"


def _side(estimate: dict, neutral: float) -> int:
    """1 where the whole interval lies above `neutral`, -1 where below, else 0."""
    low, high = estimate["interval"] or (-math.inf, math.inf)
    return int(low > neutral) - int(high < neutral)


def _about_baselines(baselines: dict) -> list[str]:
    """What the model's accuracy is to be compared with."""
    words, longer = baselines["bag_of_words"], baselines["longer_wins"]
    if words["value"] is None:
        return []
    return [
        f"Without any model a bag of words is right on {words['value']:.1%} of these pairs, "
        f"\"longer wins\" on {longer['value']:.1%}; the model's accuracy less the bag of words': "
        f"{percent(baselines['model_minus_bag_of_words'])}."
    ]


def _about_answers(generations: dict) -> list[str]:
    """A sentence on how the sampled answers changed; none where there is nothing to compare."""
    sampled = generations.get("sampled", {})
    if "change" not in sampled:
        return []
    change = sampled["change"]
    sentence = (
        f"Sampled answers changed in length by {show(change['length'], 3)} tokens, in repeated "
        f"4-grams by {percent(change['repetition'])}, in ending by themselves by "
        f"{percent(change['ended'])}"
    )
    if kl := sampled["model"].get("kl_k3"):
        sentence += f"; KL to the reference {show(kl, 3)} nats an answer"
    if win_rate := sampled.get("win_rate"):
        sentence += f"; the reward model prefers the new one in {percent(win_rate)}"
    return [f"{sentence}."]


def _disliked(generations: dict) -> bool:
    """Whether the reward model is shown to prefer the reference's sampled answers."""
    win_rate = generations.get("sampled", {}).get("win_rate")
    return win_rate is not None and _side(win_rate, 0.5) < 0
