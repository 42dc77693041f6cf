"""What a run makes of the models that its flags name."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers

from train.methods.setup import stop_at_end

END = 2  # of the template


def stopped(folder, own):
    """(what is said, the settings, new tokens of a model that writes the end token and nothing else)
    of a policy whose own settings stop at `own`, written and loaded again.
    """
    lm, tokenizer = tiny.make_model(), tiny.save_tokenizer(folder)
    lm.config.eos_token_id = lm.generation_config.eos_token_id = own
    said = []
    stop_at_end(SimpleNamespace(say=said.append), lm, tokenizer)
    lm.save_pretrained(folder)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)

    def ends(ids, scores):
        return scores.index_fill(1, torch.tensor([END]), 1e9)

    found = lm.generate(
        torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, logits_processor=[ends]
    )
    return said, lm.generation_config.eos_token_id, found.shape[1] - 2


@pytest.mark.parametrize(
    ("own", "then"), [(0, [0, END]), (None, [END]), ([7, 0], [0, 7, END])], ids=str
)
def test_a_policy_stops_where_it_learns_to_end(tmp_path, own, then):
    """A base model that is given a template: its settings stop at another token."""
    said, eos, length = stopped(tmp_path, own)
    assert (eos, length) == (then, 1)
    [line] = said
    assert "will stop at '<|im_end|>', too" in line


@pytest.mark.parametrize("own", [END, [END, 0]], ids=str)
def test_settings_that_stop_there_are_left_alone(tmp_path, own):
    assert stopped(tmp_path, own) == ([], own, 1)
