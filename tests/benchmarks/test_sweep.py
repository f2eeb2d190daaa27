"""benchmarks.sweep: what it reads, what it skips, what it remembers; one real sweep that is killed and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from suite_runs import clean_environment, run_processes

from benchmarks.sweep import command
from benchmarks.sweep.cell import Cell, Machine
from benchmarks.sweep.grid import SweepError, find_sweep, read_sweep, ready_made
from benchmarks.sweep.limits import forecast_kinds, free_room, reason_to_skip
from benchmarks.sweep.process import JOB_VARIABLES, environment_of
from benchmarks.sweep.progress import duration
from benchmarks.sweep.runs import Run, read_json, state_of
from commons.launch import launcher
from commons.planner.gpus import GPU_MODELS
from commons.planner.room import Room
from commons.plans.registry import PLANS

REPOSITORY = Path(__file__).resolve().parents[2]
CPU, TWO_GPUS = Machine("cpu", 0), Machine("cuda", 2)
TINY = '[flags]\nmodel_type = "gpt2_tiny"\ntrain_step = 3\nwarmup_step = 1\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


# ---- what it reads


@pytest.mark.parametrize("name", ready_made())
@pytest.mark.parametrize("machine", [CPU, Machine("cuda", 1), Machine("cuda", 8)])
def test_ready_made_sweeps(name: str, machine: Machine) -> None:
    sweep = read_sweep(find_sweep(name), machine)
    labels = [cell.label for cell in sweep.cells]
    assert sweep.about and len({cell.id for cell in sweep.cells}) == len(labels)
    assert machine.ranks == 1 or len(set(labels)) == len(labels), labels
    if machine.gpu_count == 8:
        asked = [cell for cell in sweep.cells if "fp8" not in cell.label]  # fp8 asks the GPU that is here
        assert not [cell.refusal(machine) for cell in asked if cell.refusal(machine)]


def test_the_old_examples_grid() -> None:
    """Its loops: 1, 2, 4, 8 GPUs; tensor parallelism up to their number; placements cpu and auto."""
    cells = read_sweep(find_sweep("example"), Machine("cuda", 8)).cells
    seen = {(cell.gpus, cell.settings["tp_degree"], cell.settings["placement"]) for cell in cells}
    assert seen == {(n, tp, p) for n in (1, 2, 4, 8) for tp in (1, 2, 4, 8) if tp <= n for p in ("cpu", "auto")}


def test_a_grid_and_its_words(tmp_path: Path) -> None:
    text = """
[flags]
seq_len = 64
[[grid]]
distplan = "data-parallel"
global_batch = [8, 16]
gpus = [2, "all"]
[[exclude]]
distplan = ["CAI_ZeRO1", "CAI_ZeRO2"]
why = "slow"
[[case]]
label = "mine on {gpus}"
gpus = "all"
visible = "last"
measure_peak = true
"""
    cells = read_sweep(written(tmp_path, text), TWO_GPUS, {"train_step": 7}).cells
    plans = [name for name, plan in PLANS.items() if not plan.pipeline and "CAI_ZeRO" not in name]
    assert [cell.settings["distplan"] for cell in cells[:-1]] == [name for name in plans for _ in (8, 16)]
    assert {cell.settings["batch_size"] for cell in cells[:-1]} == {4, 8} and cells[0].label.endswith("8 in all × 2")
    assert all(cell.settings["seq_len"] == 64 and cell.settings["train_step"] == 7 for cell in cells)
    assert (cells[-1].label, cells[-1].visible, cells[-1].gpus) == ("mine on 2", "1", 2)
    assert cells[-1].flags[-2:] == ["--measure_peak", "true"]


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    text = """
abuot = "x"
repeats = 0
extra = ["speed"]
[flags]
model_typ = "gpt2_tiny"
batch_size = "many"
run_name = "x"
[grid]
distplan = ["CAI_Gemni"]
model_type = ["gpt2_huge"]
placement = "moon"
gpus = [0]
seq_len = []
[[case]]
gpus = 1
"""
    with pytest.raises(SweepError) as error:
        read_sweep(written(tmp_path, text), CPU)
    told = str(error.value).splitlines()
    signs = (
        "abuot",
        "repeats",
        "extra",
        "'model_typ'",
        "many",
        "run_name",
        "CAI_Gemni",
        "gpt2_huge",
        "moon",
        "gpus: must be",
    )
    for sign in (*signs, "seq_len is empty", "needs a label"):
        assert sum(sign in line for line in told) == 1, (sign, told)
    assert len(told) == len(signs) + 2 and all(line.startswith("mine.toml: ") for line in told)


@pytest.mark.parametrize(
    ("words", "sign"),
    [
        (["quik"], "did you mean quick"),
        (["nowhere.toml"], "no such file"),
        (["quick", "--trane_step", "3"], "did you mean --train_step"),
        (["quick", "--log_dir", "x"], "the sweep sets it itself"),
        (["quick", "--only", "nothing"], "leaves no cell"),
        (["quick", "--repeats", "0"], "--repeats must be above 0"),
        (["quick", "--minutes", "-1"], "--minutes must be above 0"),
        (["quick", "--out", "/proc/nothing"], "choose a folder"),
    ],
)
def test_wrong_commands(words: list[str], sign: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 2
    assert sign in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("repeats = ", "cannot be read"),
        ("repeats = 2", "no cell is left"),
        ("[grid]\nglobal_batch = 3\ngpus = 2", "cannot be split over 2"),
        ("[grid]\nglobal_batch = 4\nbatch_size = 2", "keep one of them"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, sign: str) -> None:
    with pytest.raises(SweepError, match=sign):
        read_sweep(written(tmp_path, text), CPU)


def test_an_id_changes_with_the_settings() -> None:
    cells = [Cell("a", {"seed": 1}), Cell("a", {"seed": 2}), Cell("a", {"seed": 1}, 2), Cell("a", {"seed": 1}, 1, "1")]
    assert len({cell.id for cell in cells}) == 4
    assert cells[0].id == Cell("a", {"seed": 1}).id


# ---- what became of a run


@pytest.mark.parametrize(
    ("summary", "record", "state"),
    [
        ({"ended": "finished"}, {}, "finished"),  # the sweep was killed before it could record it
        ({"ended": "finished"}, {"exit_code": 1, "timed_out": False}, "finished"),  # --check_parity found a difference
        ({"ended": "SIGTERM"}, {}, None),
        ({}, {}, None),
        ({}, {"exit_code": 2}, "failed"),
        ({"ended": "SIGTERM"}, {"timed_out": True}, "timed out"),
        ({"ended": "failed", "ended_because": "ValueError: x"}, {"exit_code": 1}, "failed"),
        ({"ended": "failed", "ended_because": "OutOfMemoryError: CUDA out."}, {"exit_code": 1}, "out of memory"),
        ({"ended": "failed", "ended_because": "killed by SIGKILL, often because the machine ran out of memory"},
         {"exit_code": 1}, "out of memory"),
        ({"ended": "out of memory"}, {"exit_code": 1}, "out of memory"),
    ],
)  # fmt: skip
def test_states(summary: dict, record: dict, state: str | None) -> None:
    assert state_of(summary, record) == state


def test_half_a_file_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"ended": "fin')
    assert read_json(tmp_path / "summary.json") == {}


# ---- what is skipped


def larger_than(small: Cell, **changes: object) -> bool:
    gpus = changes.pop("gpus", small.gpus)
    assert isinstance(gpus, int)
    return bool(reason_to_skip(Cell("other", {**small.settings, **changes}, gpus), Machine("cuda", 8), [small]))


def test_what_is_larger_than_a_cell_out_of_memory_is_skipped() -> None:
    small = Cell("small", {"distplan": "CAI_Gemini", "model_type": "gpt2_xl", "batch_size": 8, "seq_len": 512}, 2)
    assert larger_than(small, batch_size=16) and larger_than(small, seq_len=1024) and larger_than(small, gpus=1)
    assert larger_than(small, model_type="gpt2_10b", batch_size=9) and larger_than(small, num_layers=60)
    assert not larger_than(small, batch_size=4) and not larger_than(small, gpus=4)
    assert not larger_than(small, distplan="Pytorch_FSDP", batch_size=16)  # whose memory is another
    assert not larger_than(small, model_type="gpt2_medium", batch_size=16)  # smaller in one way, larger in another
    assert not larger_than(small, activation_checkpointing="on", batch_size=16)


def test_reasons() -> None:
    cell = Cell("x", {"distplan": "CAI_ZeRO1", "placement": "cpu"}, 4)
    assert reason_to_skip(cell, TWO_GPUS) == "refused: needs 4 GPUs, this machine has 2"
    assert "--placement" in (reason_to_skip(cell, Machine("cuda", 4)) or "")


def test_what_the_planner_knows_not_to_fit_is_skipped() -> None:
    gpu = GPU_MODELS["H100-80GB"]
    room = Room(gpu, 79 << 30, 1 << 40, "free memory of this machine", None, None)
    h100 = Machine("cuda", 1, room)
    assert reason_to_skip(Cell("fits", {"model_type": "gpt2_xl", "batch_size": 4}), h100) is None
    why = reason_to_skip(Cell("too large", {"model_type": "gpt2_10b"}), h100)
    assert why is not None and why.startswith("forecast: GPU 0:") and "GiB short" in why
    assert sum(forecast_kinds(Cell("fits", {"model_type": "gpt2_xl"}), h100).values()) > 50_000


def test_the_room_of_a_sweep_on_this_machine() -> None:
    room = free_room("cpu", 2)
    assert room is not None and room.gpu is None and room.host > 1 << 30


def test_a_sweep_that_has_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One cell ran out of memory, one is larger, one refused: no process is started, and all of it is on record."""
    path = written(tmp_path, f'{TINY}repeats = 2\n[grid]\nbatch_size = [4, 8]\nprecision = ["bf16", "fp8"]\n'
                   '[[exclude]]\nprecision = "fp8"\nbatch_size = 8'.replace("repeats = 2\n", ""))  # fmt: skip
    out = tmp_path / "out"
    cells = {cell.settings["batch_size"]: cell for cell in read_sweep(path, CPU).cells if "bf16" in cell.label}
    first = Run(cells[4], "run-1", out)
    first.folder.mkdir(parents=True)
    (first.folder / "summary.json").write_text('{"ended": "failed", "ended_because": "CUDA out of memory"}')
    first.record.write_text('{"exit_code": 1, "seconds": 30}')
    assert command.main([str(path), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "larger: " in shown and "refused: --precision fp8" in shown and "1 cells out of memory" in shown
    assert "would have taken about 30 s" in shown
    record = read_json(Run(cells[8], "run-1", out).cell_folder / "cell.json")
    assert record["skipped"].startswith("larger: ") and record["settings"]["batch_size"] == 8
    assert read_json(out / "sweep.json")["cells"] and not list(out.glob("*/run-1/config.json"))


def test_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, f"{TINY}[grid]\ngpus = 1\n")
    assert command.main([str(path), "--out", str(tmp_path / "out"), "--minutes", "1e-9"]) == 1
    shown = capsys.readouterr().out
    assert "budget of 1e-09 minutes is used up" in shown and "3 runs left" in shown


def test_the_users_variables_do_not_change_a_cell(tmp_path: Path) -> None:
    run = Run(Cell("a", {}, 2, "1"), "run-1", tmp_path)
    environ = environment_of(run, {"DISTPLAN": "x", "BATCH_SIZE": "1", "NNODES": "2", "HOME": "/h", "GPUNUM": "8"})
    assert environ == {"HOME": "/h", "GPUNUM": "2", "CUDA_VISIBLE_DEVICES": "1"}
    assert set(JOB_VARIABLES) == set(launcher.JOB_VARIABLES)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 61, 3700)] == ["0 s", "1 min 00 s", "1 min 01 s", "1 h 01 min"]


def test_the_script_works_from_any_folder(tmp_path: Path) -> None:
    code, shown = run_processes(
        ["bash", str(REPOSITORY / "benchmark_gemini.sh"), "--list"],
        cwd=tmp_path,
        environment={"VIRTUAL_ENV": sys.prefix},
    )
    assert code == 0 and [line.split()[0] for line in shown.splitlines()] == list(ready_made())


# ---- a real one


def processes_with(word: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def wait_for(condition: object, seconds: float = 120) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.05)


def test_killed_and_started_again_it_repeats_no_finished_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = f'repeats = 1\n{TINY}device = "cpu"\n[grid]\ndistplan = "Pytorch_DDP"\nseq_len = [16, 32]\n'
    sweep = [sys.executable, "-m", "benchmarks.sweep", str(written(tmp_path, text)), "--out", str(out)]
    process = subprocess.Popen(sweep, cwd=REPOSITORY, env=clean_environment(), stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list(out.glob("*/run-1.json"))) == 1 and len(list(out.glob("*/run-1"))) == 2)
        code, console = run_processes(sweep)
        assert code == 2 and "another sweep is at work there" in console
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (record,) = out.glob("*/run-1.json")
    finished = record.with_suffix("") / "summary.json"
    before = os.stat(finished).st_mtime_ns
    code, console = run_processes(sweep)
    assert code == 0, console
    assert os.stat(finished).st_mtime_ns == before, "a finished run was done again"
    assert "[2/2]" in console and "[1/2]" not in console and "2 runs finished" in console
    summaries = [json.loads(path.read_text()) for path in out.glob("*/run-1/summary.json")]
    assert [summary["ended"] for summary in summaries] == ["finished"] * 2
    assert all(read_json(path)["first_step_seconds"] > 0 for path in out.glob("*/run-1.json"))
    assert not processes_with(str(out)), "nothing outlives a sweep"
    code, console = run_processes([*sweep, "--repeats", "1"])
    assert code == 0 and "[" not in console and "0 runs left" in console
