"""Generation against transformers' own loop, the softmax that it samples from, and itself in other
batches.
"""

import collections
import warnings

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from train.models import attention, cache
from train.models.backbone import Backbone
from train.models.generate import (
    Completion,
    _mix,
    _noise_key,
    _signed,
    batches,
    decoding,
    draw,
    generate,
    gumbel,
)

LENGTHS = (5, 1, 17, 9, 9, 30, 2, 12, 3)
MASK = (1 << 64) - 1


def prompts(seed=0, lengths=LENGTHS):
    random = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, 1000, (n,), generator=random).tolist()) for n in lengths]


def greedy(lm, prompt, **options):
    """transformers' own loop: the ids of one completion."""
    ids = lm.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=2, **options)
    return tuple(ids[0, len(prompt) :].tolist())


def common_tokens(lm, asked, count):
    """End tokens that tiny models do draw: the most frequent of a long completion."""
    free = generate(lm, asked, eos_token_ids=(), max_new_tokens=24)
    drawn = [token for completion in free for token in completion.ids]
    return [int(token) for token in np.bincount(drawn).argsort()[-count:]]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_is_transformers_generate(family):
    """Prompt by prompt, unpadded, through transformers' own loop, with end tokens that are met."""
    lm = tiny.make_model(family, dtype=torch.float64)
    asked = prompts()
    options = dict(max_new_tokens=20, temperature=0)
    free = generate(lm, asked, eos_token_ids=(), **options)
    met = {completion.ids[n] for n, completion in zip((0, 3, 7, 12), free, strict=False)}
    ends = [2, *sorted(met)]
    completions = generate(lm, asked, eos_token_ids=ends, batch_size=4, **options)
    for prompt, completion in zip(asked, completions, strict=True):
        expected = greedy(lm, prompt, max_new_tokens=20, eos_token_id=ends)
        assert completion == Completion(expected, expected[-1] in ends)
    assert {len(c.ids) for c in completions} >= {1, 20}
    assert {c.ended for c in completions} == {True, False}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_the_batch_and_the_order_change_nothing(family):
    lm = tiny.make_model(family, dtype=torch.float64)
    asked = prompts()
    ends = common_tokens(lm, asked, 8)
    options = dict(eos_token_ids=ends, max_new_tokens=24, seed=5, samples_per_prompt=3)
    whole = generate(lm, asked, batch_size=27, **options)
    # ends at different places, all kinds of text
    assert len({len(c.ids) for c in whole}) > 1 and len(set(whole)) > 20
    for size in (1, 3, 8):
        assert generate(lm, asked, batch_size=size, **options) == whole, size
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = generate(
        lm, [asked[i] for i in order], prompt_numbers=order, batch_size=5, **options
    )
    assert shuffled == [whole[3 * i + s] for i in order for s in range(3)]
    alone = generate(lm, asked[4:5], prompt_numbers=[4], **options)
    assert alone == whole[12:15]


def test_seed_prompt_number_and_sample_each_change_the_noise():
    lm = tiny.make_model()
    asked = [prompts()[0]] * 2
    options = dict(eos_token_ids=(), max_new_tokens=12, samples_per_prompt=2)
    first = generate(lm, asked, **options)
    other = generate(lm, asked, seed=1, **options)
    assert len(set(first + other)) == 8
    assert generate(lm, asked, **options) == first


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_tokens_follow_the_softmax(temperature):
    """First tokens, and second ones after the most frequent first one: chi-square against the
    model's softmax.
    """
    lm = tiny.make_model(vocab_size=64, bos_token_id=1, eos_token_id=2)
    prompt = (7, 40, 3)
    completions = generate(
        lm,
        [prompt],
        eos_token_ids=(),
        max_new_tokens=2,
        temperature=temperature,
        samples_per_prompt=6000,
        batch_size=1500,
    )
    drawn = np.array([c.ids for c in completions])  # (6000, 2)
    first = int(np.bincount(drawn[:, 0]).argmax())
    after_first = drawn[drawn[:, 0] == first, 1]
    for tokens, context in ((drawn[:, 0], prompt), (after_first, (*prompt, first))):
        with torch.no_grad():
            logits = lm(torch.tensor([context])).logits[0, -1].double()
        expected = len(tokens) * torch.softmax(logits / temperature, 0).numpy()
        counts = np.bincount(tokens, minlength=64)
        common = expected >= 5
        assert common.sum() > 5
        # what is rare counts together
        counts, expected = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
        assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def test_noise_is_splitmix64_and_gumbel():
    """The hash against Python's integers; its values against the Gumbel law; neighbours
    uncorrelated.
    """

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
        return x ^ (x >> 31)

    values = [0, 1, 0x9E3779B97F4A7C15, MASK, 1 << 63, 123456789123456789]
    assert [x & MASK for x in _mix(torch.tensor([_signed(x) for x in values])).tolist()] == [
        mix(x) for x in values
    ]
    # published test vector of SplitMix64 from state 0: the first two outputs
    assert [mix(k * 0x9E3779B97F4A7C15 & MASK) for k in (1, 2)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
    ]
    pairs = [(number, sample) for number in range(20) for sample in range(20)]
    keys = torch.tensor([_noise_key(0, number, sample) for number, sample in pairs])
    assert len(set(keys.tolist())) == 400
    for dtype in (torch.float32, torch.float64):
        by_position = [gumbel(keys, position, 100, dtype) for position in (0, 1, 2)]
        noise = torch.stack(by_position)  # (3, 400, 100)
        assert noise.dtype == dtype
        flat = noise.double().flatten().numpy()
        assert scipy.stats.kstest(flat, scipy.stats.gumbel_r.cdf).pvalue > 1e-3
        x = noise.double() - noise.double().mean()
        for a, b in (
            (x[0], x[1]),
            (x[:, :-1], x[:, 1:]),
            (x[:, :-20], x[:, 20:]),
            (x[..., :-1], x[..., 1:]),
        ):
            correlation = float((a * b).mean() / x.var())
            assert abs(correlation) < 4 / a.numel() ** 0.5
    assert torch.equal(gumbel(keys[7:8], 1, 100, torch.float64), noise[1, 7:8])
    assert torch.equal(gumbel(keys[:3], 1, 50, torch.float64), noise[1, :3, :50])


def test_draw_works_in_parts_and_in_bf16():
    logits = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)) * 3
    keys = torch.tensor([_noise_key(0, n, 0) for n in range(300)])
    expected = (logits / 0.7 + gumbel(keys, 4, 1000, torch.float32)).argmax(1)
    assert torch.equal(draw(logits, keys, 4, 0.7), expected)  # 300 rows of 8 kB: 5 parts
    rounded = logits.bfloat16()
    assert torch.equal(draw(rounded, keys, 4, 0.7), draw(rounded.float(), keys, 4, 0.7))
    assert torch.equal(draw(logits, keys, 4, 0), logits.argmax(1))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_a_whole_forward_pass(temperature):
    """One sequence at a time, unpadded; and asking for them changes no token."""
    lm = tiny.make_model("llama", dtype=torch.float64)
    asked = prompts()
    ends = common_tokens(lm, asked, 8)
    options = dict(
        eos_token_ids=ends, max_new_tokens=12, temperature=temperature, samples_per_prompt=2
    )
    plain = generate(lm, asked, **options, batch_size=8)
    found = generate(lm, asked, **options, batch_size=8, logps=True)
    assert [(c.ids, c.ended) for c in found] == [(c.ids, c.ended) for c in plain]
    assert all(c.logps is None for c in plain) and len({len(c.ids) for c in found}) > 3
    for i, completion in enumerate(found):
        ids = [*asked[i // 2], *completion.ids]
        with torch.no_grad():
            exact = (lm(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
        size = len(completion.ids)
        wanted = [exact[len(ids) - size - 1 + n, token] for n, token in enumerate(completion.ids)]
        assert completion.logps == pytest.approx([float(x) for x in wanted], abs=2e-5)  # fp32 sums


def test_packed_backbone_is_left_as_it_was():
    """A module that trains packed, with recomputed activations, decodes as the plain model does,
    and trains on.
    """
    backbone = Backbone(tiny.make_model())
    asked = prompts()
    expected = generate(tiny.make_model(), asked, eos_token_ids=[2], max_new_tokens=16)
    backbone.checkpoint_activations()
    assert generate(backbone.lm, asked, eos_token_ids=[2], max_new_tokens=16) == expected
    assert backbone.lm.training and backbone.lm.config._attn_implementation == attention.NAME
    with pytest.raises(RuntimeError, match="broken"), decoding(backbone.lm):
        raise RuntimeError("broken")
    assert backbone.lm.training and backbone.lm.config._attn_implementation == attention.NAME


def test_autocast_is_the_forward_that_decodes():
    lm = tiny.make_model()
    dtypes = []
    hook = lm.model.layers[0].mlp.register_forward_hook(
        lambda module, args, out: dtypes.append(out.dtype)
    )
    generate(lm, prompts(), eos_token_ids=[2], max_new_tokens=3, autocast=torch.bfloat16)
    hook.remove()
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_a_weight_is_multiplied_once_a_token():
    """In one piece and by oneDNN, however few sequences there are: by the slices that make a forward
    pass exact it would be copied for each token.
    """
    lm = Backbone(tiny.make_model()).lm
    products = collections.Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products[function._schema.name.split("::")[1]] += 1
            return function(*args, **(kwargs or {}))

    with Count():
        generate(lm, prompts(lengths=(7, 7)), eos_token_ids=(), max_new_tokens=4)
    matrices = sum(isinstance(module, torch.nn.Linear) for module in lm.modules())
    assert products["_linear_pointwise"] == 4 * matrices and not products["mm"]
    products.clear()
    with Count():
        lm.model.layers[0].mlp.up_proj(torch.randn(70, lm.config.hidden_size))
    assert products["_linear_pointwise"] > 1  # in slices again


def test_finished_sequences_leave_and_prompts_are_read_once():
    """Widths of the batch, forward by forward: 3 prompts are read for 12 samples, then no more than
    still run.
    """
    lm = tiny.make_model(dtype=torch.float64)
    asked = prompts()[:3]
    ends = common_tokens(lm, asked, 10)
    widths = []
    hook = lm.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    completions = generate(lm, asked, eos_token_ids=ends, max_new_tokens=24, samples_per_prompt=4)
    hook.remove()
    lengths = [len(c.ids) for c in completions]
    running = [sum(n > position for n in lengths) for position in range(1, max(lengths))]
    assert widths[0] == 3 and len(widths) == 1 + len(running)
    for width, num_running in zip(widths[1:], running, strict=True):
        assert num_running <= width < num_running / 0.875 + 1
    assert widths[-1] < 12


def test_cache_is_transformers_own_in_place():
    """The same keys and values as transformers' layers hold, through growth, copies for samples and
    sequences that leave, and views of the same memory while there is room.
    """
    lm = tiny.make_model("gemma3")  # of its layers every other has a sliding window
    random = torch.Generator().manual_seed(0)
    ours, theirs = cache.make_cache(lm), transformers.DynamicCache(config=lm.config)
    kinds = [type(layer) is cache.GrowingLayer for layer in ours.layers]
    assert kinds == [kind == "full_attention" for kind in tiny.GEMMA3_LAYERS]

    def add(rows, tokens):
        for layer in range(len(kinds)):
            states = torch.randn(2, rows, 2, tokens, 16, generator=random)
            found, expected = (each.update(*states, layer) for each in (ours, theirs))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()

    def keep(*places):
        for each in (ours, theirs):
            each.batch_select_indices(torch.tensor(places))

    add(3, 7)
    keep(0, 0, 0, 1, 1, 2, 2, 2)
    places = set()
    for _ in range(cache.ROOM):
        add(8, 1)
        places.add(ours.layers[1].keys.data_ptr())
    assert len(places) == 1
    add(8, 2)
    assert ours.layers[1].keys.data_ptr() not in places
    keep(0, 7, 2, 6, 4)
    add(5, 1)
    keep(3, 1, 0)
    add(3, cache.ROOM + 2)
    keep(2)
    add(1, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # the second with sliding windows
def test_keys_under_autocast_are_kept_as_attention_reads_them(family):
    """In bf16, though rotary embeddings give fp32, and no logit is another than with the wide keys of
    transformers' own cache.
    """
    lm = tiny.make_model(family)
    text = torch.arange(3, 63).view(3, 20)
    caches = [cache.make_cache(lm), transformers.DynamicCache(config=lm.config)]
    with decoding(lm, torch.bfloat16), torch.no_grad():
        for part in text.split([12, 4, 1, 3], dim=1):  # past gemma3's window of 8
            ours, theirs = (
                lm(input_ids=part, **cache.as_argument(lm, each)).logits for each in caches
            )
            assert torch.equal(ours, theirs)
    kept, wide = ({layer.keys.dtype for layer in each.layers} for each in caches)
    assert kept == {torch.bfloat16} and wide == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "gemma3"])
def test_looking_seldom_changes_nothing(family):
    """Tokens and log-probabilities are those of a look at each token, with ends that are met: over a
    cache with room, but in gemma3, whose sliding windows it has no room for.
    """
    lm = tiny.make_model(family, dtype=torch.float64)
    asked = prompts()
    ends = common_tokens(lm, asked, 8)
    options = dict(
        eos_token_ids=ends, max_new_tokens=40, seed=5, samples_per_prompt=3, batch_size=27
    )
    for temperature in (1.0, 0.0):
        options["temperature"] = temperature
        plain = generate(lm, asked, logps=True, **options)
        if temperature:
            assert len({len(c.ids) for c in plain}) > 2
            assert {c.ended for c in plain} == {True, False}
        for every in (2, 16, 64):
            assert generate(lm, asked, logps=True, look_every=every, **options) == plain, every


def test_the_host_looks_no_oftener_than_it_is_told():
    lm = tiny.make_model()
    for every, times in ((1, 39), (8, 4), (16, 2), (64, 0)):
        looks = []
        generate(
            lm,
            prompts()[:3],
            eos_token_ids=(),
            max_new_tokens=40,
            look_every=every,
            stop=lambda looks=looks: looks.append(0),
        )
        assert len(looks) == times
    # finished sequences leave at a look
    ends = common_tokens(lm, prompts(), 40)
    widths = []
    hook = lm.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    generate(lm, prompts(), eos_token_ids=ends, max_new_tokens=40, look_every=4)
    hook.remove()
    assert widths[1:4] == [9] * 3 and widths[4] < 9


def test_cache_with_room_is_transformers_own():
    """The same keys and values in the places that attention sees, zeros behind them; sequences leave."""
    lm = tiny.make_model("llama")
    random = torch.Generator().manual_seed(0)
    prompt_cache, theirs = cache.make_cache(lm), transformers.DynamicCache(config=lm.config)

    def states(rows, tokens):
        return torch.randn(2, rows, 2, tokens, 16, generator=random)

    for layer in range(2):
        given = states(3, 120)
        for each in (prompt_cache, theirs):
            each.update(*given, layer)
    places = torch.tensor([0, 0, 2, 1, 1])
    ours = cache.RoomCache(prompt_cache, places, 120 + 20)
    theirs.batch_select_indices(places)
    seen = []
    for token in range(20):
        ours.room.advance()
        seen.append(ours.room.seen)
        for layer in range(2):
            given = states(len(ours.layers[0].keys), 1)
            found, expected = (each.update(*given, layer) for each in (ours, theirs))
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a[:, :, : b.shape[2]], b) and not a[:, :, b.shape[2] :].any()
        if token in (3, 11):
            stay = torch.tensor([0, 3, 1, 4] if token == 3 else [3, 1])
            for each in (ours, theirs):
                each.batch_select_indices(stay)
    assert seen == [128] * 8 + [140] * 12  # multiples of 128, and no more than there is room


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_which_models_take_a_cache_with_room(family):
    lm = tiny.make_model(family)
    with decoding(lm):
        assert cache.takes_room(lm) == (family not in ("mistral", "gemma3"))


@pytest.mark.parametrize("look_every", [1, 16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_cache_goes_by_the_name_that_the_model_has_for_it(family, look_every):
    """Over a cache that grows, and one with room."""
    lm = tiny.make_model(family)
    options = dict(eos_token_ids=[2], max_new_tokens=4, look_every=look_every)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        new = generate(lm, [[5, 6, 7]], **options)
    own, told = lm.forward, cache.as_argument(lm, None)

    def older(past_key_values, **others):
        return own(**others, **dict.fromkeys(told, past_key_values))

    lm.forward = older
    assert generate(lm, [[5, 6, 7]], **options) == new


def test_progress_and_batches():
    done = []
    options = dict(eos_token_ids=[2], max_new_tokens=2, batch_size=4)
    generate(tiny.make_model(), prompts(), progress=done.append, **options)
    assert done == [3, 3, 3]
    assert batches(LENGTHS, 4) == [[5, 2, 7], [3, 4, 0], [8, 6, 1]]
    assert batches([], 4) == [] and batches([3], 4) == [[0]]


def test_refusals_name_what_is_wrong():
    lm = tiny.make_model(max_position_embeddings=16)

    def ask(lm=lm, prompts=((5, 6),), **options):
        generate(lm, prompts, **{"eos_token_ids": [2], "max_new_tokens": 4, **options})

    too_long = "prompt 1 of 13 tokens and 4 new ones exceed the model's 16 positions"
    for options, message in (
        (dict(prompts=((5,), ())), "prompt 1 has no tokens"),
        (dict(prompts=((5,), tuple(range(13)))), too_long),
        (dict(max_new_tokens=0), "max_new_tokens is at least 1"),
        (dict(samples_per_prompt=0), "samples_per_prompt is at least 1"),
        (dict(temperature=-1.0), "temperature is at least 0"),
        (dict(temperature=float("nan")), "temperature is at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(**options)
    ask(prompts=(tuple(range(3, 15)),))  # 12 + 4 positions just fit
    stateful = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4
    )
    with pytest.raises(ValueError, match="keeps a state"):
        ask(lm=transformers.AutoModelForCausalLM.from_config(stateful))
    sharded = tiny.make_model()
    next(sharded.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="sharded"):
        ask(lm=sharded)


def test_greedy_in_fp32_builds_no_graph():
    lm = tiny.make_model()
    asked = prompts()
    graphs = []
    hook = lm.register_forward_hook(
        lambda module, args, out: graphs.append(out.logits.requires_grad)
    )
    completions = generate(lm, asked, eos_token_ids=[2], max_new_tokens=8, temperature=0)
    hook.remove()
    assert len(graphs) == 8 and not any(graphs)
    for prompt, completion in zip(asked, completions, strict=True):
        assert completion.ids == greedy(lm, prompt, max_new_tokens=8, eos_token_id=[2])
