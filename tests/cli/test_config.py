"""The settings: their defaults, the flags made from them, and every way in which they can be wrong."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from commons.cli import flags as cli
from commons.cli.checks import READ_UNDER, problems
from commons.cli.layout import working_head_counts
from commons.cli.limits import LIMITS
from commons.config import auto
from commons.config.resolved import DEVICE_DEFAULTS, ResolvedConfig
from commons.config.schema import FLAG_GROUPS, FRACTIONS, PLACEMENTS, TrainConfig, as_typed, as_words
from commons.plans.registry import ALL_PRECISIONS, PLANS
from model_zoo import MODEL_SIZES

REPOSITORY = Path(__file__).resolve().parents[2]
ABLE = dataclasses.replace(
    PLANS["CAI_Gemini"],
    name="Able",
    placement=True,
    tensor_parallel=True,
    sequence_parallel=True,
    pipeline=True,
    precisions=ALL_PRECISIONS,
)


def found(*, world_size: Any = 1, device: Any = "cpu", gpu_count: Any = 0, plan: Any = ABLE, **settings: Any) -> str:
    """All problems of these settings as one text."""
    return "\n".join(problems(TrainConfig(**settings), world_size, device, gpu_count, plan))


def read(*argv: str) -> tuple[ResolvedConfig, str]:
    config, lines = cli.judge(cli.read_flags(argv), 1, 1)
    return config, "\n".join(lines)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # the same answers on a machine with GPUs, or with a torch that brings Triton; the checks get theirs as arguments
    monkeypatch.setattr(cli, "find_devices", lambda wanted: ("cuda" if wanted == "cuda" else "cpu", 0))
    monkeypatch.setattr(auto, "find_spec", lambda _name: None)


# ---- defaults


@pytest.mark.parametrize("device", DEVICE_DEFAULTS)
@pytest.mark.parametrize("plan", PLANS)
def test_defaults_are_complete_and_without_problems(device: str, plan: str) -> None:
    given = TrainConfig(distplan=plan)
    config = given.resolve(device)
    unset = [name for name, value in config.as_dict().items() if value is None or value == "auto"]
    assert unset == []
    assert problems(given, 1, device, 1, PLANS[plan]) == []
    assert config.resolve(device) == config


def test_as_dict_holds_every_field_once() -> None:
    assert list(TrainConfig().as_dict()) == [f.name for g in FLAG_GROUPS for f in dataclasses.fields(g)]
    assert set(TrainConfig().as_dict()) == {f.name for f in dataclasses.fields(TrainConfig)}


def test_every_number_has_a_limit_that_allows_its_default_and_its_suggestion() -> None:
    config = TrainConfig().resolve("cpu")
    for name, value in config.as_dict().items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert LIMITS[name].allows(value), name
            assert LIMITS[name].allows(LIMITS[name].works), name


NUMBERS = {name for name, hint in get_type_hints(TrainConfig).items() if {int, float} & {hint, *get_args(hint)}}


def test_every_number_has_both_ends() -> None:
    """From the table: what is allowed at an end is, what lies beyond is told with the end."""
    assert set(LIMITS) == NUMBERS
    for name, limit in LIMITS.items():
        upper = limit.high if limit.high is not None else limit.below
        assert upper is not None and limit.allows(upper) == (limit.high is not None), name
        read_under = dict([READ_UNDER[name]] if name in READ_UNDER else [])
        assert f"--{name} must be {limit}, got " in found(**{name: upper + 1}, **read_under), name


def test_a_timeout_without_an_end_is_told_with_the_limit() -> None:
    assert "--timeout must be above 0 and at most 1000000, got 1e+10: try" in read("--timeout", "1e10")[1]


def test_nothing_is_left_open() -> None:
    with pytest.raises(AssertionError, match="not decided"):
        dataclasses.replace(TrainConfig().resolve("cpu"), compile="auto")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="has to be given"):
        ResolvedConfig()
    config = TrainConfig(lr=0.1, cuda_graph="off").resolve("cpu")
    assert not config.asked("batch_size") and not config.asked("compile")
    assert config.asked("lr") and config.asked("cuda_graph")


GIVE_WAY = [
    ("--train_step 1", {"train_step": 1, "warmup_step": 0}),
    ("--train_step 2", {"train_step": 2, "warmup_step": 1}),
    ("--warmup_step 20", {"train_step": 30, "warmup_step": 20}),
    ("--warmup_step 9", {"train_step": 10, "warmup_step": 9}),
    ("--trace_step 15", {"train_step": 15}),
    ("--lr_warmup_step 40", {"train_step": 40}),
    ("--lr_warmup_step 40 --warmup_step 50", {"train_step": 60}),
    ("--offload_param_frac 0.5", {"offload_optim_frac": 1.0, "shard_param_frac": 1.0}),
    ("--distplan CAI_Hybrid --pp_degree 4 --num_layers 8", {"batch_size": 4, "num_microbatches": 4}),
    ("--distplan CAI_Hybrid --pp_degree 8 --num_layers 8", {"batch_size": 8, "num_microbatches": 8}),
    ("--distplan CAI_Hybrid --pp_degree 2 --num_microbatches 3", {"batch_size": 6}),
    ("--distplan CAI_Hybrid --pp_degree 3 --num_model_chunks 2 --num_layers 6", {"batch_size": 6}),
    ("--distplan CAI_Hybrid --tp_degree 2 --sequence_parallel on --num_heads 4", {"seq_len": 64}),
    ("--hidden_size 96 --num_layers 1", {"num_heads": 4}),
    ("--model_type gpt2_small --hidden_size 80", {"num_heads": 5}),
]


@pytest.mark.parametrize(("flags", "expected"), GIVE_WAY)
def test_defaults_give_way_to_what_was_asked_for(flags: str, expected: dict[str, Any]) -> None:
    """None of them is refused for the sake of a default that the user never typed."""
    line = cli.read_flags(flags.split())
    ranks = line.config().model_parallel_size
    config, wrong = cli.judge(line, ranks, ranks)
    assert wrong == []
    assert {name: getattr(config, name) for name in expected} == expected


def test_default_sequence_fits_the_model() -> None:
    assert TrainConfig(model_type="gpt2_tiny").resolve("cuda").seq_len == MODEL_SIZES["gpt2_tiny"].positions


def test_shape_takes_the_overrides() -> None:
    shape = TrainConfig(model_type="gpt2_small", num_layers=2, hidden_size=96, num_heads=3).resolve("cpu").shape()
    assert (shape.layers, shape.hidden, shape.heads) == (2, 96, 3)
    assert shape.vocab == MODEL_SIZES["gpt2_small"].vocab
    assert TrainConfig().resolve("cpu").shape() == MODEL_SIZES["gpt2_tiny"]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placement_names_stand_for_fractions(name: str) -> None:
    placement = TrainConfig(placement=name).resolve("cpu").gemini_placement()  # pyright: ignore
    if name == "auto":
        assert set(placement) == {"placement_policy", "warmup_non_model_data_ratio", "steady_cuda_cap_ratio"}
        assert placement["placement_policy"] == "auto"
    else:
        assert placement["placement_policy"] == "static"
        assert tuple(placement[f] for f in FRACTIONS) == PLACEMENTS[name]


def test_fractions_given_with_static_are_kept() -> None:
    config = TrainConfig(offload_optim_frac=0.25, shard_param_frac=0.5).resolve("cpu")
    assert config.gemini_placement() == {
        "placement_policy": "static",
        "shard_param_frac": 0.5,
        "offload_optim_frac": 0.25,
        "offload_param_frac": 0.0,
    }


def test_in_fp32_the_default_is_to_shard_nothing() -> None:
    stages = {name: TrainConfig(precision=name).resolve("cpu", 2).zero_stage for name in ALL_PRECISIONS}  # pyright: ignore
    assert stages == {"bf16": 1, "fp16": 1, "fp32": 0, "fp8": 1}
    assert TrainConfig(precision="fp32", zero_stage=1).resolve("cpu", 2).zero_stage == 1
    assert TrainConfig().resolve("cpu", 1).zero_stage == 0, "one data-parallel rank has nobody to shard over"


@pytest.mark.parametrize(("pp", "batch", "expected"), [(1, 4, 1), (2, 4, 2), (2, 5, 5), (4, 8, 4)])
def test_default_microbatches(pp: int, batch: int, expected: int) -> None:
    assert TrainConfig(pp_degree=pp, batch_size=batch).resolve("cpu").num_microbatches == expected


# ---- the command line


def test_underscores_dashes_and_equal_signs_are_the_same() -> None:
    spellings = (["--train_step", "7"], ["--train-step", "7"], ["--train_step=7"], ["--train-step=7"])
    assert {read(*words)[0].train_step for words in spellings} == {7}


def test_fsdp_on_a_cpu_needs_torch_2_6(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLANS["Pytorch_FSDP"]
    for version, told in (("2.5.1", True), ("2.6.0+cpu", False), ("2.13.0", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        assert ("torch 2.6.0 or newer" in found(distplan=plan.name, plan=plan)) is told, version
        assert found(distplan=plan.name, plan=plan, device="cuda", gpu_count=1) == ""


def test_types_and_repeated_flags() -> None:
    config, wrong = read("--lr", "1e-3", "--quiet", "--measure_peak=false", "--seed", "1", "--seed", "2")
    assert (config.lr, config.quiet, config.measure_peak, config.seed, wrong) == (1e-3, True, False, 2, "")


def test_help_is_grouped_and_tells_everything() -> None:
    text = cli.help_text("prog")
    for group in FLAG_GROUPS:
        assert f"{group._argument_group_name}:" in text
        for field in dataclasses.fields(group):
            assert f"--{field.name}" in text
    assert all(name in text for name in [*PLANS, *MODEL_SIZES])
    assert "default: None" not in text
    assert "examples:" in text


UNREADABLE = [
    (["--batch_size", "ten"], "--batch_size must be a whole number, got 'ten': try --batch_size"),
    (["--batch_size", "1.5"], "--batch_size must be a whole number, got '1.5'"),
    (["--lr", "fast"], "--lr must be a number, got 'fast'"),
    (["--quiet", "perhaps"], "--quiet must be true or false, got 'perhaps'"),
    (["--seq_len"], "--seq_len needs a value"),
    (["--attention", "flsh"], "--attention 'flsh' does not exist: did you mean flash?"),
    (["--placement", "disk"], "--placement 'disk' does not exist: use auto, static, cuda, cpu or const"),
    (["--precision", "bf32"], "did you mean"),
    (["--lrr", "3"], "unknown flag --lrr: did you mean --lr?"),
    (["--tp-degre", "2"], "did you mean --tp_degree"),
    (["--qqq"], "unknown flag --qqq: see --help"),
    (["stray"], "'stray' does not belong to a flag"),
    (["--distplan", "CAI_Gemni"], "--distplan 'CAI_Gemni' does not exist: did you mean CAI_Gemini"),
    (["--distplan", "cai_gemini"], "did you mean CAI_Gemini"),
    (["--model_type", "gpt2_meduim"], "did you mean gpt2_medium"),
    (["--model_type", "llama"], "--model_type 'llama' does not exist: use gpt2_tiny"),
]


@pytest.mark.parametrize(("argv", "message"), UNREADABLE, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_cannot_be_read_is_told(argv: list[str], message: str) -> None:
    wrong = read(*argv)[1]
    assert message in wrong
    assert len(wrong.splitlines()) == 1


def test_unreadable_values_count_as_not_given() -> None:
    config, _ = read("--train_step", "x", "--lr", "0.5")
    assert (config.train_step, config.lr) == (TrainConfig().resolve("cpu").train_step, 0.5)


# ---- checks


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainConfig) if isinstance(f.default, float)])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_may_be_nan_or_infinite(name: str, value: str) -> None:
    read_under = [f"--{READ_UNDER[name][0]}={READ_UNDER[name][1]}"] if name in READ_UNDER else []
    wrong = read(f"--{name}={value}", *read_under)[1]
    assert f"--{name} must be a finite number, got {value}: try --{name}" in wrong


@pytest.mark.parametrize("name", LIMITS)
def test_every_limit_is_enforced_and_suggests_what_works(name: str) -> None:
    limit = LIMITS[name]
    too_small = limit.low - 1 if limit.low is not None else limit.above
    read_under = dict([READ_UNDER[name]] if name in READ_UNDER else [])
    wrong = found(**{name: too_small}, **read_under)
    assert f"--{name} must be {limit}, got {too_small:g}: try --{name} {limit.works:g}" in wrong
    upper = limit.high if limit.high is not None else limit.below
    if upper is not None:
        assert f"--{name} must be {limit}" in found(**{name: upper + 1}, **read_under)


WRONG = [
    ({"train_step": 2, "warmup_step": 2}, "--train_step must exceed --warmup_step (2), got 2: try --train_step 12"),
    ({"train_step": 1, "warmup_step": 1}, "--warmup_step 0"),
    ({"lr_warmup_step": 11, "train_step": 10}, "--lr_warmup_step 11 would not end"),
    ({"seq_len": 129}, "--seq_len 129 exceeds the 128 positions of gpt2_tiny: use --seq_len 128"),
    (
        {"num_heads": 5},
        "5 heads (--num_heads) do not divide the hidden size 64 (--hidden_size): use --num_heads",
    ),
    ({"tp_degree": 3, "world_size": 3}, "--tp_degree 3 does not divide the 4 attention heads of gpt2_tiny"),
    ({"tp_degree": 3, "world_size": 3}, "--tp_degree 3 does not divide the hidden size"),
    ({"tp_degree": 3, "world_size": 3}, "--tp_degree 3 does not divide the padded vocabulary of 1024"),
    (
        {"tp_degree": 2, "world_size": 3},
        "world size 3 is not divisible by --tp_degree 2 x --pp_degree 1 = 2",
    ),
    ({"tp_degree": 2, "pp_degree": 2, "world_size": 2}, "start 4 ranks (GPUNUM=4"),
    ({"pp_degree": 8, "batch_size": 8, "world_size": 8}, "gpt2_tiny has 4 layers: use --pp_degree 4"),
    (
        {"pp_degree": 2, "num_microbatches": 3, "batch_size": 4, "world_size": 2},
        "--num_microbatches 3 does not divide --batch_size 4",
    ),
    ({"pp_degree": 4, "num_microbatches": 2, "world_size": 4}, "must be at least --pp_degree 4"),
    (
        {"pp_degree": 2, "num_microbatches": 3, "batch_size": 6, "num_model_chunks": 2, "world_size": 2},
        "must be a multiple of --pp_degree 2",
    ),
    ({"num_model_chunks": 2}, "--num_model_chunks 2 needs a pipeline"),
    ({"num_microbatches": 4}, "--num_microbatches 4 needs a pipeline: remove it"),
    ({"num_microbatches": 4, "world_size": 2}, "remove it, or use --pp_degree 2"),
    ({"pp_degree": 2, "zero_stage": 2, "world_size": 2}, "use --zero_stage 1 or 0"),
    ({"pp_degree": 2, "zero_stage": 2, "world_size": 4, "precision": "fp32"}, "above 1: use --zero_stage 0"),
    ({"placement": "auto", "warmup_non_model_data_ratio": 1.0}, "must be at least 0 and below 1, got 1"),
    ({"placement": "auto", "steady_cuda_cap_ratio": 0.0}, "must be above 0 and at most 1, got 0"),
    ({"sequence_parallel": "on"}, "--sequence_parallel on needs tensor parallelism"),
    ({"activation_checkpointing": "selective", "tp_degree": 2, "world_size": 2}, "add them up twice"),
    ({"precision": "fp8"}, "--precision fp8 needs a GPU"),
    ({"precision": "fp8", "gemini_hooks": "operation"}, "--precision fp8 takes whole blocks"),
    ({"precision": "fp8", "batch_size": 1, "seq_len": 24}, "--batch_size x --seq_len that is a multiple of 16"),
    ({"trace_step": 11, "train_step": 10}, "--trace_step 11 is never reached"),
    (
        {"check_parity": True, "dropout": 0.1},
        "--check_parity cannot follow --dropout: attention kernels and compiled blocks",
    ),
    (
        {"precision": "fp32", "zero_stage": 1, "world_size": 2},
        "in fp32 shards nothing over data-parallel ranks: use --zero_stage 0",
    ),
    (
        {"sequence_parallel": "on", "tp_degree": 2, "seq_len": 63, "world_size": 2},
        "do not divide --seq_len 63: use --seq_len 62",
    ),
    ({"offload_param_frac": 0.5, "offload_optim_frac": 0.0}, "--offload_param_frac 0.5 would be ignored"),
    ({"offload_param_frac": 0.5, "shard_param_frac": 0.5, "offload_optim_frac": 1.0}, "would be ignored"),
    (
        {"placement": "cuda", "offload_optim_frac": 0.5},
        "--offload_optim_frac 0.5 contradicts --placement cuda",
    ),
    ({"placement": "auto", "shard_param_frac": 0.5}, "contradicts --placement auto, which has none"),
    ({"warmup_non_model_data_ratio": 0.5}, "is read under --placement auto only"),
    ({"initial_loss_scale": 1024.0}, "is read under --precision fp16 only: remove it, or use --precision"),
    ({"attention": "flash", "dropout": 0.1}, "--attention flash has no dropout on a CPU"),
    ({"attention": "flash", "precision": "fp32", "device": "cuda", "gpu_count": 1}, "no fp32 on a GPU"),
    ({"device": "cuda"}, "--device cuda needs a GPU, and none is seen ("),
    (
        {"device": "cuda", "gpu_count": 1, "world_size": 2},
        "2 ranks on this machine, but 1 visible GPU: use GPUNUM=1",
    ),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_wrong_settings_are_told(settings: dict, message: str) -> None:
    assert message in found(**settings)


RIGHT = [
    {"train_step": 1, "warmup_step": 0},
    {"seq_len": 128},
    {"tp_degree": 2, "world_size": 4},
    {"tp_degree": 2, "pp_degree": 2, "world_size": 4},
    {"tp_degree": 2, "world_size": 2, "sequence_parallel": "on"},
    {"pp_degree": 2, "num_microbatches": 4, "num_model_chunks": 2, "world_size": 2},
    {"pp_degree": 2, "zero_stage": 1, "world_size": 2},
    {"precision": "fp32", "world_size": 2},
    {"precision": "fp32", "pp_degree": 2, "world_size": 4},
    {"offload_param_frac": 0.5, "offload_optim_frac": 1.0},
    {"offload_optim_frac": 0.3, "shard_param_frac": 0.7},
    {"placement": "cpu", "offload_param_frac": 1.0},
    {"placement": "auto", "warmup_non_model_data_ratio": 0.5},
    {"attention": "flash"},
    {"precision": "fp16", "initial_loss_scale": 2.0**32},
    {"device": "cuda", "gpu_count": 2, "world_size": 2},
    {
        "clip_grad_norm": 1.0,
        "grad_accum": 4,
        "lr_warmup_step": 10,
        "lr_schedule": "cosine",
        "precision": "fp32",
    },
]


@pytest.mark.parametrize("settings", RIGHT, ids=str)
def test_right_settings_are_not_complained_about(settings: dict) -> None:
    assert found(**settings) == ""


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"placement": "cpu"}, "--placement cpu"),
        ({"offload_optim_frac": 0.5}, "--offload_optim_frac 0.5"),
        ({"max_prefetch": 0}, "--max_prefetch 0"),
        ({"max_prefetch": 2}, "--max_prefetch 2"),
        ({"blocks_per_chunk": 1}, "--blocks_per_chunk 1"),
        ({"blocks_per_chunk": 2}, "--blocks_per_chunk 2"),
        ({"tp_degree": 2}, "--tp_degree 2"),
        ({"pp_degree": 2}, "--pp_degree 2"),
        ({"zero_stage": 0}, "--zero_stage 0"),
    ],
    ids=str,
)
def test_settings_that_a_plan_does_not_have_are_told_once(settings: dict, flag: str) -> None:
    simple = dataclasses.replace(ABLE, name="Simple", placement=False, tensor_parallel=False, pipeline=False)
    lines = found(plan=simple, **settings).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{flag} has no effect with Simple: remove it")


TYPED = [
    ("--distplan Pytorch_DDP --placement static", "--placement static has no effect with Pytorch_DDP"),
    ("--distplan CAI_ZeRO1 --zero_stage 1", "--zero_stage 1 has no effect with CAI_ZeRO1"),
    ("--distplan CAI_Gemini --num_microbatches 3", "--num_microbatches 3 has no effect with CAI_Gemini"),
    ("--distplan Pytorch_DDP --tp_degree 3", "--tp_degree 3 has no effect with Pytorch_DDP"),
    ("--distplan Pytorch_DDP --gemini_hooks block", "--gemini_hooks block has no effect with Pytorch_DDP"),
    ("--distplan Pytorch_DDP --peer_copies off", "--peer_copies off has no effect with Pytorch_DDP"),
    ("--placement auto --shard_param_frac 1", "--shard_param_frac 1 contradicts --placement auto, which has none"),
    ("--warmup_non_model_data_ratio 0.8", "--warmup_non_model_data_ratio is read under --placement auto only"),
    ("--initial_loss_scale 65536", "--initial_loss_scale is read under --precision fp16 only"),
]


@pytest.mark.parametrize(("flags", "message"), TYPED)
def test_what_was_typed_without_effect_is_told_once_be_it_the_default(flags: str, message: str) -> None:
    lines = read(*flags.split())[1].splitlines()
    assert len(lines) == 1 and lines[0].startswith(message)


NEUTRAL_FLAGS = "--tp_degree 1 --pp_degree 1 --num_microbatches 1 --num_model_chunks 1 --sequence_parallel off"


@pytest.mark.parametrize("plan", PLANS)
def test_flags_that_are_true_of_every_plan_are_taken(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0")
    assert read("--distplan", plan, *NEUTRAL_FLAGS.split())[1] == ""


def test_heads_are_no_way_out_where_the_vocabulary_is_not_divided_either() -> None:
    wrong = found(tp_degree=3, world_size=4)
    assert "attention heads of gpt2_tiny: use --tp_degree 1, 2 or 4" in wrong and "--num_heads" not in wrong


def test_gpus_of_several_machines_are_counted_together() -> None:
    config, plan = TrainConfig(tp_degree=4, model_type="gpt2_tiny"), PLANS["CAI_Gemini"]
    told = problems(config, 8, "cuda", 3, plan, local_world_size=4)
    assert told == [
        "4 ranks on this machine, but 3 visible GPUs: use GPUNUM=2 (torchrun --nproc_per_node 2), or --device cpu"
    ]


def test_a_precision_that_a_plan_cannot_names_both_ways_out() -> None:
    wrong = found(plan=PLANS["CAI_Gemini"], precision="fp32")
    assert "CAI_Gemini cannot train in --precision fp32: use --precision bf16 or fp16, or --distplan" in wrong
    assert "Pytorch_DDP" in wrong


def test_head_counts_that_would_work_for_tensor_parallel_gpt2_xl() -> None:
    wrong = found(model_type="gpt2_xl", tp_degree=2, world_size=2)
    assert "--tp_degree 2 does not divide the 25 attention heads of gpt2_xl: use --num_heads" in wrong
    counts = working_head_counts(MODEL_SIZES["gpt2_xl"], 2)
    assert counts == [16, 20, 32, 40]
    for heads in counts:
        assert found(model_type="gpt2_xl", tp_degree=2, world_size=2, num_heads=heads) == ""


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/tmp/x", "a/b", "a\\b", "x" * 201])
def test_run_names_that_leave_the_folder(name: str, tmp_path: Path) -> None:
    assert "must be a folder's name" in found(run_name=name, log_dir=str(tmp_path))


@pytest.mark.parametrize("length", [1, 199, 200])
def test_run_names_up_to_the_longest(length: int, tmp_path: Path) -> None:
    assert found(run_name="x" * length, log_dir=str(tmp_path)) == ""


def test_run_that_is_already_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    where = {"log_dir": str(tmp_path), "run_name": "old"}
    assert found(**where) == ""  # what the launcher leaves to its ranks
    (tmp_path / "old" / "config.json").touch()
    assert "already holds a run: choose another name" in found(**where)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert found(**where) == ""


def test_log_dir_is_judged_without_making_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in found(log_dir=str(tmp_path / "file" / "logs"))
    assert found(log_dir=str(tmp_path / "a" / "b")) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    # where not even root may write
    assert "--log_dir /proc/logs: nothing can be written in /proc (" in found(log_dir="/proc/logs")


# ---- as the user sees it

MANY_MISTAKES = [
    "--distplan=CAI_Gemni", "--model_type=gpt2_tinny", "--train_step=0", "--batch_size=0", "--lr=nan",
    "--precision=int8", "--seq_len=many", "--device=cuda", "--run_name=../out", "--log_dir=logs", "--wat",
]  # fmt: skip


def command_line(*argv: str, folder: Path, rank: str | None = None) -> subprocess.CompletedProcess:
    code = "import sys; from commons.cli.flags import read_config; print(read_config(sys.argv[1:]))"
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    environ.pop("RANK", None)
    if rank is not None:
        environ |= {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


def children_cpu_seconds() -> float:
    """Not the clock on the wall: this machine may be busy with something else."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_all_problems_are_told_at_once_and_nothing_is_made(tmp_path: Path) -> None:
    start = children_cpu_seconds()
    done = command_line(*MANY_MISTAKES, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"{len(MANY_MISTAKES) - 1} problems with the settings")  # log_dir is right
    for flag in MANY_MISTAKES:
        name = flag.split("=")[0]
        assert name == "--log_dir" or len(re.findall(rf"^  - (?:unknown flag )?{name}[ :]", done.stderr, re.M)) == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert children_cpu_seconds() - start < 10


def test_only_rank_0_tells(tmp_path: Path) -> None:
    told = command_line("--batch_size=0", folder=tmp_path, rank="0")
    silent = command_line("--batch_size=0", folder=tmp_path, rank="1")
    assert (told.returncode, silent.returncode) == (2, 2)
    assert "--batch_size must be at least 1" in told.stderr
    assert silent.stdout + silent.stderr == ""


def test_help_exits_with_0(tmp_path: Path) -> None:
    done = command_line("--help", "--batch_size=0", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: train_gpt_demo.py")


def test_importing_the_configuration_is_light() -> None:
    code = "import sys, commons.cli.flags, commons.config.schema, commons.plans.registry; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_tilde_that_the_shell_left_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everybody who writes for a run writes into one folder: launcher, ranks and checks."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig(log_dir="~/logs", run_name="one").resolve("cpu")
    assert config.run_dir == tmp_path / "logs" / "one"
    (config.run_dir).mkdir(parents=True)
    (config.run_dir / "config.json").touch()
    assert "already holds a run" in found(log_dir="~/logs", run_name="one")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (1.0, "1"),
        (3e-4, "0.0003"),
        (0.000123456789, "0.000123456789"),
        (16, "16"),
        ("bf16", "bf16"),
    ],
)
def test_a_setting_is_written_so_that_it_reads_back(value: Any, text: str) -> None:
    assert as_typed(value) == text
    assert as_words({"lr": value}) == ["--lr", text]
    assert type(value)(text if value is not True else 1) == value
