"""The search over layouts, with simulated memory; what is told of it; what a trial is started with and read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commons.cli.answers import judge_on
from commons.cli.flags import read_request
from commons.config.resolved import ResolvedConfig
from commons.config.schema import TrainConfig
from commons.planner import choice_table, trials
from commons.planner.choose import (
    BATCHES,
    Candidate,
    Search,
    candidates,
    nothing_open,
    plain_command,
    search,
    shortfall,
)
from commons.planner.gpus import GIB
from commons.planner.machines import Machine, parse_machine
from commons.planner.memory import DEVICE_KINDS, HOST_KINDS, Forecast
from commons.planner.rates import rates_of
from commons.planner.trials import LATE, NO_TIME, Trial
from commons.plans.registry import PLANS

H100 = parse_machine("1 x H100-80GB, 128 GiB host")
TWO = parse_machine("2 x H100-80GB, 256 GiB host")


def simulated(device_gib_a_sequence: float, host_gib: float = 1.0) -> Any:
    """Memory that grows with the batch: so much for each sequence, an eighth of it recomputed."""

    def memory(config: ResolvedConfig, machine: Machine, rough: bool) -> Forecast:
        share = {"off": 1.0, "selective": 0.5, "on": 0.125}[config.activation_checkpointing]
        device = int(device_gib_a_sequence * GIB * config.batch_size * share) + GIB
        host = int(host_gib * GIB * (1 + 100 * config.offload_optim_frac))
        rest = {**dict.fromkeys(DEVICE_KINDS, 0), "parameters": GIB}
        taken = {**dict.fromkeys(HOST_KINDS, 0), "process": host}
        peak = {**rest, "activations": device - GIB}
        return Forecast(rest, peak, "backward", taken, 0, 0, machine.gpus_per_node)

    return memory


def found(machine: Machine, memory: Any, **given: Any) -> Search:
    return search(given, machine, rates_of(machine), judge_on(machine), memory=memory)


def test_the_fastest_that_fits_is_first() -> None:
    result = found(TWO, simulated(1.0), model_type="gpt2_xl")
    speeds = [layout.time.tokens_per_second for layout in result.fitting]
    assert speeds == sorted(speeds, reverse=True) and len(result.fitting) >= 4
    assert all(not shortfall(layout.memory, TWO) for layout in result.fitting)
    best = result.fitting[0].config
    assert (best.distplan, best.shard_param_frac, best.activation_checkpointing) == ("CAI_Gemini", 0, "off")
    assert best.batch_size == 32, "64 fits too, and is less than 1 % faster"
    assert len({layout.kind for layout in result.fitting}) == len(result.fitting)


def test_no_exhaustive_look_finds_a_faster_one() -> None:
    memory = simulated(3.0)
    result = found(H100, memory, model_type="gpt2_medium")
    fitting = [
        layout.time.tokens_per_second
        for layout in candidates({"model_type": "gpt2_medium"}, H100, rates_of(H100))
        if not shortfall(memory(layout.config, H100, False), H100)
    ]
    assert result.fitting[0].time.tokens_per_second >= 0.99 * max(fitting)


def test_few_forecasts_are_asked_for() -> None:
    asked: list[int] = []
    memory = simulated(3.0)

    def counted(config: ResolvedConfig, machine: Machine, rough: bool) -> Forecast:
        asked.append(config.batch_size)
        return memory(config, machine, rough)

    result = found(parse_machine("64 x H100-80GB, 1000 GiB host"), counted, model_type="gpt2_10b")
    assert result.fitting and result.considered > 1000 and len(asked) < 200


def test_what_the_user_gave_is_kept() -> None:
    given = {"model_type": "gpt2_medium", "distplan": "Pytorch_DDP", "batch_size": 12}
    for layout in found(TWO, simulated(1.0), **given).fitting:
        assert (layout.config.distplan, layout.config.batch_size) == ("Pytorch_DDP", 12)
        assert set(layout.settings) == {"activation_checkpointing"}
    with_tp = found(TWO, simulated(1.0), model_type="gpt2_medium", tp_degree=2)
    assert {layout.config.distplan for layout in with_tp.fitting} <= {"CAI_Gemini", "CAI_Hybrid"} and with_tp.fitting
    half = found(TWO, simulated(1.0), distplan="CAI_Gemini", offload_optim_frac=0.5)
    assert all(layout.config.offload_optim_frac == 0.5 for layout in half.fitting) and half.fitting
    policy = found(TWO, simulated(1.0), distplan="CAI_Gemini", placement="auto")
    assert all(layout.config.placement == "auto" for layout in policy.fitting) and policy.fitting


def test_every_candidate_is_what_the_plain_command_gives() -> None:
    result = found(TWO, simulated(1.0), model_type="gpt2_medium")
    for layout in result.fitting:
        command = plain_command({"model_type": "gpt2_medium", **layout.settings}, TWO)
        assert command.startswith("GPUNUM=2 bash run_gemini.sh --")
        line = read_request(command.split()[3:], {}).line
        assert not line.problems and not judge_on(TWO)(line.given)
        again = TrainConfig(**line.given).resolve("cuda", 2)
        for name in ("distplan", "batch_size", "activation_checkpointing", "shard_param_frac", "offload_optim_frac"):
            assert getattr(again, name) == getattr(layout.config, name)


def test_nothing_fits() -> None:
    result = found(H100, simulated(1000.0), model_type="gpt2_medium")
    assert not result.fitting and result.nearest is not None and result.too_large
    assert "GiB short on the device" in choice_table.short_sentence(result.nearest, H100)
    host = found(H100, simulated(0.1, host_gib=500.0), model_type="gpt2_medium")
    assert not host.fitting and host.nearest and "on the host" in choice_table.short_sentence(host.nearest, H100)
    small = parse_machine("RTX-4060-8GB")  # states alone are too large: no forecast is needed to know it
    far = found(small, simulated(100.0), model_type="gpt2_10b", distplan="Pytorch_DDP")
    assert not far.fitting and far.nearest and far.nearest.memory and far.too_large == far.considered


def test_a_rough_guess_does_not_say_that_nothing_fits() -> None:
    exact = simulated(1.0)

    def memory(config: ResolvedConfig, machine: Machine, rough: bool) -> Forecast:
        return (simulated(1000.0) if rough else exact)(config, machine, rough)

    given = {"model_type": "gpt2_medium"}
    late = search(given, H100, rates_of(H100), judge_on(H100), memory=memory, seconds=0.0)
    assert late.fitting and not late.complete


def test_what_cannot_run_says_why() -> None:
    result = found(TWO, simulated(0.1), model_type="gpt2_medium", seq_len=5000)
    assert not result.fitting and result.refused and "1024 positions" in result.refusals[0]


def test_offloading_where_the_rest_fits_is_not_tried() -> None:
    result = found(H100, simulated(1.0), model_type="gpt2_medium")
    assert not any(layout.config.offload_optim_frac for layout in result.fitting)


def test_nothing_to_choose() -> None:
    everything = {"distplan", "batch_size", "activation_checkpointing"}
    assert "everything is given" in str(nothing_open(everything, "Pytorch_DDP"))
    assert nothing_open(everything, "CAI_Gemini") is None
    assert nothing_open({*everything, "placement", "tp_degree"}, "CAI_Gemini")
    assert nothing_open({*everything, "tp_degree", "pp_degree"}, "CAI_Hybrid")
    assert (
        nothing_open(everything - {"batch_size"}, "Pytorch_DDP") is None and nothing_open(set(), "CAI_Gemini") is None
    )


def test_every_plan_and_batch_is_considered() -> None:
    layouts = list(candidates({"model_type": "gpt2_medium"}, TWO, rates_of(TWO)))
    assert {layout.config.distplan for layout in layouts} == set(PLANS)
    assert {layout.config.batch_size for layout in layouts} == set(BATCHES["cuda"])
    assert {layout.config.pp_degree for layout in layouts} == {1, 2}


# ---- what is told


def test_table_and_document() -> None:
    from rich.console import Console

    result = found(TWO, simulated(1.0), model_type="gpt2_xl")
    first, second = result.fitting[:2]
    tried = [Trial(first, why="failed: out of memory"), Trial(second, 1000.0, 2.0, 3.0)]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    choice_table.show(console, TWO, result, tried, second)
    shown = console.export_text()
    for word in ("Layouts that fit", "chosen", "out of memory", "forward", "activations", "1,000"):
        assert word in shown
    document = json.loads(json.dumps(choice_table.document({"model_type": "gpt2_xl"}, TWO, result, tried, second)))
    assert document["fits"] and document["command"].startswith("GPUNUM=2 bash run_gemini.sh --model_type gpt2_xl")
    assert [layout["chosen"] for layout in document["layouts"][:2]] == [False, True]
    assert document["layouts"][0]["lost_because"] == "failed: out of memory"
    assert sum(document["layouts"][0]["parts"].values()) == pytest.approx(document["layouts"][0]["step_seconds"])


# ---- trials


def layouts(*speeds: float) -> list[Candidate]:
    """Layouts with these tokens per second by the model."""
    first = next(candidates({"model_type": "gpt2_medium"}, TWO, rates_of(TWO)))
    made = []
    for speed in speeds:
        time = first.time.__class__(**{**vars(first.time), "tokens": int(speed * first.time.seconds)})
        made.append(Candidate(first.settings, first.config, time))
    return made


def test_hopeless_layouts_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter((500.0, 520.0, 1.0, 1.0))
    monkeypatch.setattr(trials, "run_trial", lambda given, layout, machine, seconds: Trial(layout, next(speeds), 1.0))
    tried = trials.try_layouts({}, layouts(1000, 950, 700), TWO, 5.0, lambda trial: None)
    assert [trial.tokens_per_second for trial in tried] == [500.0, 520.0, None]
    assert "slower than the best so far by the model" in tried[2].why
    best = trials.best_of(tried)
    assert best is tried[1]


def test_time_for_trials_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "run_trial", lambda given, layout, machine, seconds: Trial(layout, why=LATE))
    tried = trials.try_layouts({}, layouts(1000, 950), TWO, 0.0, lambda trial: None)
    assert [trial.why for trial in tried] == [NO_TIME, NO_TIME] and tried[0].ran_out_of_time
    assert trials.best_of(tried) is None


def test_trials_are_as_long_as_their_time_allows() -> None:
    (layout,) = layouts(1000)
    seconds = layout.time.seconds
    assert trials.trial_steps(layout, 1000 * seconds) == (12, 4)
    assert trials.trial_steps(layout, 2 * 7 * seconds) == (7, 4)
    assert trials.trial_steps(layout, seconds) == (4, 2)


def test_what_a_trial_is_started_with(tmp_path: Path) -> None:
    (layout,) = layouts(1000)
    given = {"model_type": "gpt2_medium", "train_step": 9999, "lr_warmup_step": 500, "trace_step": 7, "seed": 3}
    flags = trials.trial_flags(given, layout, 60.0, tmp_path)
    line = read_request(flags, {}).line
    assert not line.problems and line.given["seed"] == 3 and line.given["run_name"] == "trial"
    assert line.given["train_step"] < 20 and not {"lr_warmup_step", "trace_step"} & set(line.given)


@pytest.mark.parametrize(
    ("summary", "code", "in_time", "speed", "why"),
    [
        ({"step_seconds": {"median": 0.5}, "tokens_per_second": {"median": 10.0}}, 0, True, 10.0, ""),
        ({"step_seconds": {"median": 0.5}, "tokens_per_second": {"median": 10.0}}, 143, False, 10.0, ""),
        ({"step_seconds": {"median": None}}, 143, False, None, LATE),
        ({"ended": "failed", "ended_because": "Rank 0 died\nand more"}, 1, True, None, "failed: Rank 0 died"),
        (None, 2, True, None, "failed: exit code 2"),
    ],
)
def test_what_a_trial_left(
    tmp_path: Path, summary: Any, code: int, in_time: bool, speed: float | None, why: str
) -> None:
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    trial = trials.read_trial(layouts(1000)[0], tmp_path, code, in_time)
    assert (trial.tokens_per_second, trial.why) == (speed, why)
