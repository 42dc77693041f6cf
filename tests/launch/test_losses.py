"""Every loss through the user's script on two ranks: it learns a rule, its reference is where it
was asked to be.
"""

import json
import random
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import tiny
import torch
from safetensors import safe_open

from tests.launch.compare import (
    ROOT,
    STEPS,
    at_checkpoint,
    flags,
    moments,
    same_bits,
    same_run,
    scalars,
    straight,
    weights,
)
from train.losses.composition import LOSSES
from train.run import checkpoint_files

WORDS = (
    "tree stone river cloud lamp paper glass bread train window garden letter music summer winter paint table "
    "chair clock sugar water light house field ocean"
).split()
random.Random(7).shuffle(WORDS)  # a split that the tiny model has no opinion on
GOOD, BAD = WORDS[:12], WORDS[12:]
# Step sizes and strengths at which each loss moves in two dozen steps; the defaults are for real
# models.
BETA = {"simpo": 2.0, "sigmoid_norm": 2.0, "ipo": 0.5}


def made(path, count, seed, labelled=False):
    """Pairs with a rule: words of one list are preferred to words of another. Prompts and lengths
    say nothing.
    """
    draw = random.Random(seed)
    with open(path, "w") as file:
        for number in range(count):
            size = draw.randint(3, 8)
            prompt = f"{number}: " + " ".join(draw.choices(WORDS, k=4))
            answers = [" ".join(draw.choices(words, k=size)) for words in (GOOD, BAD)]
            row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
            if labelled:
                row = {
                    "prompt": prompt,
                    "completion": answers[number % 2],
                    "label": number % 2 == 0,
                }
            file.write(json.dumps(row) + "\n")
    return path


def line(model_dir, data, held_out, out, loss, *extra):
    return [
        "--model",
        model_dir,
        "--data",
        data,
        "--eval_data",
        held_out,
        "--output",
        out,
        "--max_length",
        128,
        "--max_prompt_length",
        64,
        "--loss",
        loss,
        "--beta",
        BETA.get(loss, 0.1),
        "--lr",
        "2e-3",
        "--batch_size",
        16,
        "--max_steps",
        24,
        "--epochs",
        8,
        "--micro_tokens",
        600,
        *extra,
    ]


def trained(warm, arguments, out):
    codes, text = warm.run(arguments, 2)
    assert codes == [0, 0], text[-3000:]
    run = json.loads((out / "run.json").read_text())
    first, last = run["evaluations"]["0"], run["evaluations"]["24"]
    return run, first, last


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns_the_rule(warm, model_dir, tmp_path, loss):
    data, held_out = (
        made(tmp_path / "train.jsonl", 192, 0),
        made(tmp_path / "held_out.jsonl", 96, 1),
    )
    free = not LOSSES[loss].needs_reference
    extra = ["--reference", "none"] if free else []
    _, first, last = trained(
        warm, line(model_dir, data, held_out, tmp_path / "out", loss, *extra), tmp_path / "out"
    )
    low, high = first["rewards/accuracies_interval"]
    if not LOSSES[loss].reward.paid_a_token:  # which has an opinion on lengths
        assert low <= 0.5 <= high, first  # chance before
    if loss == "sft":
        assert last["loss"] < first["loss"] - 0.5
    else:
        assert last["rewards/accuracies_interval"][0] > 0.5, last
        assert last["loss"] < first["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [name for name, row in LOSSES.items() if row.of_labelled])
def test_answers_with_labels(warm, model_dir, tmp_path, loss):
    data, held_out = (
        made(tmp_path / "a.jsonl", 256, 0, True),
        made(tmp_path / "b.jsonl", 96, 1, True),
    )
    _, first, last = trained(
        warm, line(model_dir, data, held_out, tmp_path / "out", loss), tmp_path / "out"
    )
    assert first["rewards/accuracies"] == 0.5  # every reward is 0: ties
    assert last["rewards/accuracies_interval"][0] > 0.5 and last["rewards/margins"] > 0, last


def test_a_sum_without_a_reference_in_memory(warm, model_dir, tmp_path):
    """Two losses that need none, weighted, with WPO's weights; a loss that needs one is refused."""
    data, held_out = made(tmp_path / "train.jsonl", 64, 0), made(tmp_path / "held_out.jsonl", 32, 1)
    arguments = line(
        model_dir,
        data,
        held_out,
        tmp_path / "out",
        "simpo:1.0,sft:0.2",
        "--reference",
        "none",
        "--loss_args",
        "{use_weighting: true, gamma: 0.3}",
    )
    run, first, last = trained(warm, arguments, tmp_path / "out")
    assert run["reference_deepspeed"] is None and last["rewards/margins"] > first["rewards/margins"]
    for extra, said in (
        (("sigmoid", "--reference", "none"), "--loss sigmoid needs a reference"),
        (("kto", "--reference", "cached"), "--reference live"),
        (
            ("sigmoid:0.5,nothing", "--reference", "live"),
            "loss 'nothing' (did you mean hinge?) is none of: sigmoid, robust",
        ),
        (
            ("simpo", "--reference", "none", "--reference_every", 2),
            "--reference none: it counts with live",
        ),
    ):
        codes, text = warm.run(line(model_dir, data, held_out, tmp_path / "refused", *extra), 1)
        assert codes == [2] and said in text and "Traceback" not in text, text[-2000:]


def test_cached_equals_live_bit_for_bit_when_made_from_the_same_rows(
    warm, model_dir, tmp_path, monkeypatch
):
    """Records made from the rows of twenty steps; then no digit of weights and moments differs."""
    from train.data import steps, tokens
    from train.data.packing import pack
    from train.methods import reference, reference_cache
    from train.models import backbone, pretrained

    pairs = ROOT / "train/data/builtin/train.jsonl"
    ends = [
        "--max_steps",
        20,
        "--log_every",
        1,
        "--save_every",
        20,
        "--eval_every",
        0,
    ]  # in the first epoch of 24 steps
    assert warm.run(flags(model_dir, pairs, tmp_path / "live", 0, *ends))[0] == [0]
    monkeypatch.setenv("ZEROPREF_CACHE", str(warm.cache))
    data = tokens.prepare(
        [str(pairs)],
        pretrained.load_tokenizer(str(model_dir)),
        max_length=512,
        max_prompt_length=256,
    )
    live = reference.Live(backbone.Backbone(pretrained.load_causal_lm(str(model_dir))), {})
    made = {}
    for step in steps.plan_steps(data.lengths.sum(1), 8, 512, seed=7, total=20):
        for groups in step.batches:
            row = pack([data.group(i) for i in groups])
            values = live(row).split(row.lengths.tolist())
            made |= {name: part.numpy() for name, part in zip(row.digests, values, strict=True)}
    reference_cache.write_records(reference_cache.directory(reference._identity(live)), made)
    codes, text = warm.run(
        flags(model_dir, pairs, tmp_path / "cached", 0, *ends, "--reference", "cached")
    )
    assert codes == [0] and "32 groups of them made now" in text, text[
        -3000:
    ]  # for evaluation: 160 are there
    one, other = moments(tmp_path / "live", 20), moments(tmp_path / "cached", 20)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    found, expected = scalars(tmp_path / "cached", ()), scalars(tmp_path / "live", ())
    assert (
        found["train/loss"] == expected["train/loss"]
        and found["train/grad_norm"] == expected["train/grad_norm"]
    )


@pytest.mark.slow
def test_a_moving_reference_is_resumed(warm, model_dir, few, tmp_path):
    extra = ["--reference_every", 2, "--reference_mixup", 0.5]
    codes, text = warm.run(flags(model_dir, few, tmp_path / "straight", 2, *extra), 2)
    assert codes == [0, 0], text[-3000:]
    job = warm.start(flags(model_dir, few, tmp_path / "killed", 2, *extra), 2)
    at_checkpoint(tmp_path / "killed", 5)
    job.kill()
    job.wait()
    codes, text = warm.run(flags(model_dir, few, tmp_path / "killed", 2, *extra), 2)
    assert codes == [0, 0] and "continues after step" in text, text[-3000:]
    same_run(tmp_path / "killed", tmp_path / "straight")
    kept = moments(tmp_path / "straight")
    moved = [name for name in kept if name.startswith("reference/")]
    assert moved and any(
        not torch.equal(kept[name], kept[name.replace("reference/", "policy/")]) for name in moved
    )
    straight(warm, model_dir, few, tmp_path / "still", 2, 2)
    assert scalars(tmp_path / "still")["train/loss"] != scalars(tmp_path / "straight")["train/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("stage, ranks", [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_lora(warm, model_dir, few, tmp_path, stage, ranks):
    """The base model is the reference: the first margin is exactly 0. Merged weights give what
    adapters gave.
    """
    pytest.importorskip("peft")
    out = tmp_path / "out"
    extra = ["--lora_rank", 4, "--lr", "1e-2", "--warmup_ratio", 0]
    codes, text = warm.run(flags(model_dir, few, out, stage, *extra), ranks)
    assert codes == [0] * ranks, text[-3000:]
    run, found = json.loads((out / "run.json").read_text()), scalars(out, ())
    assert (
        found["val/rewards/margins"][0] == (0, 0.0) and found["val/rewards/margins"][-1][1] > 0.01
    )
    assert (
        run["export_gap_nats_per_token"] < 1e-4
    )  # the merged model, loaded again, against the one with adapters
    kept = moments(out)
    assert kept and all(".lora_" in name for name in kept)
    _check_adapters(model_dir, out)
    if stage == 0:
        job = warm.start(flags(model_dir, few, tmp_path / "killed", stage, *extra), ranks)
        at_checkpoint(tmp_path / "killed", STEPS // 2)
        job.kill()
        job.wait()
        assert warm.run(flags(model_dir, few, tmp_path / "killed", stage, *extra), ranks)[0] == [0]
        assert all(
            torch.equal(weights(out)[name], value)
            for name, value in weights(tmp_path / "killed").items()
        )
        _check_exported(model_dir, out, tmp_path)


def _check_adapters(model_dir, out):
    """What peft loads from OUTPUT/model/adapter onto the base is the merged model."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    with_adapters = peft.PeftModel.from_pretrained(base, out / "model/adapter").merge_and_unload()
    plain = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    for (name, p), (_, q) in zip(
        with_adapters.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name
    with safe_open(out / "model/model.safetensors", "pt") as file:
        assert not any("lora" in name or "base_layer" in name for name in file.keys())  # noqa: SIM118


def _check_exported(model_dir, out, folder):
    """launch/export.py merges a checkpoint's adapters into the base; one of another size, or none,
    is refused.
    """
    import peft
    import transformers

    command = [sys.executable, "launch/export.py", out / f"checkpoints/step-{STEPS}"]
    quiet = {"cwd": ROOT, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}

    def export(*args):
        return subprocess.run([*command, *args], **quiet)

    done = export(folder / "again")
    assert done.returncode == 0, done.stderr[-2000:]
    for made, again in (
        (out / "model", folder / "again"),
        (out / "model/adapter", folder / "again/adapter"),
    ):

        def of(path):
            return safetensors.torch.load_file(next(path.glob("*.safetensors")))

        same_bits(of(again), of(made))
    assert export(folder / "bf16", "--export_dtype", "bf16", "--model", model_dir).returncode == 0
    whole = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.bfloat16)
    same_bits(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "bf16").state_dict(),
        whole.state_dict(),
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    assert peft.PeftModel.from_pretrained(base, folder / "bf16/adapter").active_adapters == [
        "default"
    ]
    tiny.make_model("llama", intermediate_size=104).save_pretrained(folder / "wider")
    tiny.make_model("llama", seed=1).save_pretrained(folder / "same shapes")
    for model, word in (
        ("wider", "is not the base"),
        ("same shapes", "is not the base"),
        ("nowhere", "there is no folder"),
    ):
        model = folder / model
        done = export(folder / "other", "--model", model)
        assert done.returncode == 2 and word in done.stderr and "--model names" in done.stderr, (
            done.stderr[-2000:]
        )
        assert "Traceback" not in done.stderr and not (folder / "other").exists()
    # what a stranger's checkpoint says of its run lets nobody's code run here
    path, marker = out / f"checkpoints/step-{STEPS}/manifest.json", folder / "ran"
    told = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    told["flags"] |= {
        "trust_remote_code": True,
        "allow_pickle": True,
        "model": str(folder / "theirs"),
    }
    path.write_text(json.dumps(told | {"sha256": checkpoint_files._digest(told)}))
    shutil.copytree(model_dir, folder / "theirs")
    (folder / "theirs/theirs.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((model_dir / "config.json").read_text()) | {"model_type": "theirs"}
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "theirs/config.json").write_text(json.dumps(config))
    done = export(folder / "other")
    assert done.returncode == 2 and "trust_remote_code" in done.stderr and not marker.exists(), (
        done.stderr[-2000:]
    )
    assert (
        export(folder / "other", "--trust_remote_code").returncode and marker.exists()
    )  # it would have run


@pytest.mark.slow
def test_buffers_reach_an_export(warm, few, tmp_path):
    """A mixture of experts whose router has a bias that is a buffer: in the run's model and in its
    checkpoint's export.
    """
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=2,
        bos_token_id=1,
    )
    lm, name = Glm4MoeForCausalLM(config), "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = dict(lm.named_buffers())[name].uniform_().clone()
    lm.save_pretrained(tmp_path / "moe")
    tiny.save_tokenizer(tmp_path / "moe")
    for number, extra in enumerate(([], ["--lora_rank", 2, "--lora_targets", "q_proj"])):
        if extra:
            pytest.importorskip("peft")
        out, folder = tmp_path / f"out{number}", tmp_path / f"again{number}"
        codes, text = warm.run(flags(tmp_path / "moe", few, out, 0, *extra, "--max_steps", 2))
        assert codes == [0], text[-3000:]
        command = [sys.executable, "launch/export.py", out / "checkpoints/step-2", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "MISSING" not in done.stderr, done.stderr[-2000:]
        exported = safetensors.torch.load_file(folder / "model.safetensors")
        assert torch.equal(exported[name], bias)
        same_bits(exported, weights(out))


@pytest.mark.slow
def test_lora_where_it_could_go_wrong_late(warm, model_dir, few, tmp_path):
    """Layers that cannot have adapters are refused first; an fp32 export of bf16 weights is
    measured as bf16.
    """
    pytest.importorskip("peft")
    for number, targets in enumerate((["embed_tokens"], ["q_proj", "lm_head"], ["nothing"])):
        line = flags(
            model_dir, few, tmp_path / str(number), 0, "--lora_rank", 2, "--lora_targets", *targets
        )
        codes, text = warm.run(line)
        assert (
            codes == [2] and "adapters go beside linear layers" in text and "Traceback" not in text
        ), text[-2000:]
    line = flags(
        model_dir,
        few,
        tmp_path / "out",
        2,
        "--lora_rank",
        4,
        "--lora_targets",
        "q_proj",
        "--precision",
        "bf16",
        "--export_dtype",
        "fp32",
        "--max_steps",
        2,
    )
    codes, text = warm.run(line)
    assert codes == [0], text[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["aot", "kto", "bco_pair", "aot_unpaired"])
def test_coupled_losses_do_not_see_rows_ranks_or_stages(warm, model_dir, few, tmp_path, loss):
    """AdamW's first moments after the first step are a tenth of its gradient: the same however the
    step was cut up.
    """
    ends = [
        "--loss",
        loss,
        "--max_steps",
        3,
        "--eval_every",
        0,
        "--log_every",
        1,
        "--keep",
        3,
        "--warmup_ratio",
        0,
        "--grad_clip",
        0,
    ]
    ways = {
        "whole": (0, 1, 4000),
        "small rows": (0, 1, 1),
        "two ranks": (0, 2, 300),
        "ZeRO 1": (1, 2, 512),
        "ZeRO 2": (2, 2, 300),
        "ZeRO 3": (3, 2, 200),
    }
    for name, (stage, ranks, budget) in ways.items():
        line = flags(model_dir, few, tmp_path / name, stage, *ends, "--micro_tokens", budget)
        codes, text = warm.run(line, ranks)
        assert codes == [0] * ranks, (name, text[-3000:])
    expected, losses = moments(tmp_path / "whole", 1), scalars(tmp_path / "whole", ())["train/loss"]
    scale = max(value.abs().max() for key, value in expected.items() if key.endswith("exp_avg"))
    assert scale > 0
    for name in ways:
        found = moments(tmp_path / name, 1)
        for key, value in expected.items():
            if key.endswith("exp_avg"):
                assert (found[key] - value).abs().max() <= 2e-5 * scale, (name, key)
        for (step, mine), (_, theirs) in zip(
            scalars(tmp_path / name, ())["train/loss"], losses, strict=True
        ):
            assert mine == pytest.approx(theirs, rel=1e-4 if step > 1 else 1e-5, abs=1e-6), (
                name,
                step,
            )
