"""A user's DeepSpeed JSON: what of it is taken, and in which one line the rest is refused."""

import json

import pytest

from train.engine import ds_config

# As transformers' pages have it.
WITH_AUTO = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 2},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def zero(stage, **more):
    return {"zero_optimization": {"stage": stage, **more}}


def read(tmp_path, config):
    path = tmp_path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return ds_config.read_config(path)


@pytest.mark.parametrize(
    "config, said",
    [
        ({"steps_per_print": "ten"}, 'steps_per_print is a number from 1 on, not "ten"'),
        ({"steps_per_print": 0}, "steps_per_print is a number from 1 on, not 0"),
        ({"wall_clock_breakdown": "yes"}, 'wall_clock_breakdown is true or false, not "yes"'),
        ({"prescale_gradients": 1}, "prescale_gradients is true or false, not 1"),
        ({"gradient_predivide_factor": "auto"}, 'predivide_factor is a number above 0, not "auto"'),
        ({"communication_data_type": "float32"}, 'one of fp32, fp16, bf16, not "float32"'),
        ({"communication_data_type": 16}, "one of fp32, fp16, bf16, not 16"),
        ({"flops_profiler": True}, "flops_profiler is a JSON object, not true"),
        ({"comms_logger": True}, "comms_logger is a JSON object, not true"),
        (zero(2, reduce_bucket_size="many"), "zero_optimization.reduce_bucket_size: Input should be a"),
        (zero(2, contiguous_gradients="maybe"), 'contiguous_gradients: Input should be a valid boolean, unable to interpret input, not "maybe"'),
        (zero(2, offload_optimizer={"device": "gpu"}), "zero_optimization.offload_optimizer.device: Input should be 'none', 'cpu' or 'nvme', not \"gpu\""),
        (zero(2, reduce_bucket_size=-1), "greater than 0, not -1"),
        (zero(2, legacy_stage1=True), "no zero_optimization.legacy_stage1: DeepSpeed has none any more"),
        (zero(2, zenflow={"topk_ratio": 0.1}), "no zero_optimization.zenflow: it needs"),
        (zero(1, compute_grad_norm=False), "no zero_optimization.compute_grad_norm false: by the norm"),
        (zero(0, offload_optimizer={"device": "cpu"}), "offload_optimizer changes nothing at stage 0: it counts from stage 1 on"),
        (zero(0, cpu_offload=True), "offload_optimizer changes nothing at stage 0"),
        (zero(2, offload_param={"device": "cpu"}), "offload_param changes nothing at stage 2: it counts from stage 3 on"),
        (zero(3, offload_param={"device": "nvme"}), "zero_optimization.offload_param.nvme_path says where to: it is missing"),
        (zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "ratio and super_offload need DeepSpeed's own optimiser"),
        (zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5}), "Partial offloading only supported for ZeRO Stage 3"),
        (zero(2) | {"prescale_gradients": True}, "need zero_optimization.reduce_scatter false at stages 2 and 3"),
        (zero(3) | {"gradient_predivide_factor": 2.0}, "need zero_optimization.reduce_scatter false at stages 2 and 3"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "the key 'stage' stands twice: keep one"),
    ],
)  # fmt: skip
def test_what_a_run_would_trip_over_is_refused_at_the_door(tmp_path, config, said):
    with pytest.raises(ValueError) as refused:
        read(tmp_path, config)
    assert said in str(refused.value) and str(refused.value).count("\n") == 0
    assert str(tmp_path / "ds.json") in str(refused.value)


def test_all_that_flags_own_is_named_at_once(tmp_path):
    with pytest.raises(ValueError) as refused:
        read(tmp_path, WITH_AUTO)
    said = str(refused.value)
    assert "'bf16' belongs to --precision, 'fp16' belongs to --precision, 'optimizer'" in said
    assert "'train_micro_batch_size_per_gpu' belongs to --micro_tokens; remove them from" in said
    rest = {key: WITH_AUTO[key] for key in WITH_AUTO if key not in ds_config.OWNED_BY_FLAGS}
    assert read(tmp_path, rest) == rest
    assert [*rest] == ["zero_optimization", "steps_per_print", "wall_clock_breakdown"]


@pytest.mark.parametrize(
    "config",
    [
        zero(
            3, reduce_bucket_size="auto", stage3_prefetch_bucket_size="auto"
        ),  # DeepSpeed's default
        zero(2, reduce_bucket_size=5e8),
        zero(2, reduce_scatter=False) | {"prescale_gradients": True},
        zero(1) | {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
        zero(3, offload_param=None, offload_optimizer={"device": "none"}),
        zero(0, offload_optimizer={"device": "none"}),
        zero(2, cpu_offload=True),
    ],
)
def test_what_users_write_is_taken(tmp_path, config):
    assert read(tmp_path, config) == config
    assert read(tmp_path, "\ufeff" + json.dumps(config)) == config


def test_overlap_is_off_at_stage_3_whether_or_not_it_is_said(tmp_path):
    """DeepSpeed's default is on there alone; what is explicit is refused."""
    for stage in (0, 1, 2, 3):
        resolved = ds_config.resolve(read(tmp_path, zero(stage)), "fp32")
        found = ds_config.zero_config.DeepSpeedZeroConfig(**resolved["zero_optimization"])
        assert not found.overlap_comm
    with pytest.raises(ValueError, match="overlap_comm works with stage 2 only"):
        read(tmp_path, zero(3, overlap_comm=True))
