"""--plan_for, --dry_run and --calibrate as answered by both entry points: what is printed, and the exit codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from commons.cli import answers
from commons.cli.flags import judge, read_config, read_request
from commons.launch import launcher
from commons.planner import measure
from commons.planner.machines import this_machine
from commons.planner.rates import calibration_path, rates_of


def ask(*flags: str, ranks: int = 2) -> int:
    return answers.answer(read_request(flags, {}), ranks, ranks)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--plan_for", "8 x H1000"), "--plan_for: GPU 'H1000' is not known: did you mean H100"),
        (("--plan_for", "8 x H100-0GB"), "0 GB is no GPU's memory"),
        (("--plan_for", "8 x H100", "--batch_sise", "3"), "unknown flag --batch_sise"),
        (("--plan_for", "8 x H100", "--tp_degree", "3"), "--tp_degree 3"),
        (("--plan_for", "8 x T4", "--distplan", "Pytorch_DDP", "--precision", "fp8"), "--precision fp8 needs a GPU"),
        (
            ["--plan_for=H100", "--auto", "--distplan=Pytorch_DDP", "--batch_size=4", "--activation_checkpointing=off"],
            "--auto has nothing to choose, since everything is given",
        ),
        (("--plan_for", "2 x H100", "--auto", "--seq_len", "5000"), "1024 positions"),
        (("--plan_for", "2 x H100", "--auto", "--model_type", "gpt2_xxl"), "did you mean gpt2_xl"),
        (("--plan_for", "2 x H100", "--auto", "--batch_size", "0"), "--batch_size must be at least 1"),
        (("--dry_run", "--device", "cpu", "--auto", "--pp_degree", "-2"), "--pp_degree must be at least 1"),
        (("--calibrate", "--auto", "--plan_for", ""), "--calibrate measures and does nothing else"),
    ],
)
def test_wrong_questions(flags: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(*flags) == 2
    shown = capsys.readouterr()
    assert told in shown.err and not shown.out
    assert "with the settings, nothing was started:" in shown.err


def test_plan_for_machines_that_are_not_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--plan_for", "2 x H100, 256 GiB host", "--model_type", "gpt2_xl", "--json")
    assert ask(*flags) == 0
    document = json.loads(capsys.readouterr().out)
    (layout,) = document["layouts"]
    assert document["machine"] == "2 x H100-80GB, 256 GiB host" and document["fits"]
    assert layout["step_seconds"] == pytest.approx(0.331, rel=0.05), "as measured on two H100s"
    assert 40 << 30 < layout["memory"]["device_peak"] < 60 << 30
    assert document["command"] == "GPUNUM=2 bash run_gemini.sh --model_type gpt2_xl"
    assert ask(*flags, "--batch_size", "64") == answers.NOT_FITTING
    lacking = json.loads(capsys.readouterr().out)["layouts"][0]["memory"]["short_of"]
    assert list(lacking) == ["device"] and lacking["device"] > 10 << 30


def test_the_best_layout_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    batch = ("--batch_size", "16", "--activation_checkpointing", "off")
    assert ask("--plan_for", "2 x H100, 256 GiB host", "--model_type", "gpt2_xl", "--auto", *batch) == 0
    shown = capsys.readouterr().out
    assert "Layouts that fit, fastest first" in shown and "chosen" in shown and "forward" in shown
    command = shown.splitlines()[-1]
    assert command.startswith("GPUNUM=2 bash run_gemini.sh --model_type gpt2_xl --batch_size 16")
    assert "--distplan CAI_Gemini --shard_param_frac 0" in command
    tiny = ("--plan_for", "2 x RTX-4060-8GB, 16 GiB host", "--model_type", "gpt2_10b", "--auto", *batch)
    assert ask(*tiny) == answers.NOT_FITTING
    assert "short on the" in capsys.readouterr().out


def test_gpus_without_bf16_are_planned_in_fp16(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--plan_for", "1 x T4, 64 GiB host", "--model_type", "gpt2_small", "--batch_size", "1", "--json")
    assert ask(*flags) == 0
    assert json.loads(capsys.readouterr().out)["given"]["precision"] == "fp16"


def test_both_entry_points_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["--plan_for", "nothing"]) == 2
    with pytest.raises(SystemExit) as exit_code:
        read_config(["--plan_for", "nothing"])
    assert exit_code.value.code == 2
    assert capsys.readouterr().err.count("GPU 'nothing' is not known") == 2


def test_auto_needs_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        read_config(["--auto", "--device", "cpu"])
    assert exit_code.value.code == 2 and "--auto needs the launcher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--auto_minutes", "3"), "--auto_minutes is read under --auto true only: remove it, or use --auto true"),
        (("--auto", "--auto_minutes", "-1"), "--auto_minutes must be at least 0"),
        (("--json",), "--json prints what --dry_run and --plan_for found"),
    ],
)
def test_planning_flags_of_a_training(flags: tuple[str, ...], told: str) -> None:
    _, found = judge(read_request((*flags, "--device", "cpu"), {}).line, 2, 2)
    assert [problem for problem in found if told in problem], found


def test_calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "REPEATS", 2)
    monkeypatch.setattr(measure, "WARM_UPS", 1)
    monkeypatch.setattr(measure, "MATMUL_SIZE", {"cpu": 128})
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(measure, "ADAM_ELEMENTS", 1 << 12)
    assert ask("--calibrate", "--device", "cpu") == 0
    machine = this_machine(1, 2, "cpu")
    assert str(calibration_path(machine)) in capsys.readouterr().out
    assert set(rates_of(machine).measured) == {"matmul_flops", "memory_bandwidth", "host_adam"}
    calibration_path(machine).write_text("{")
    assert ask("--dry_run", "--device", "cpu") == 2
    assert "is damaged: measure again with --calibrate" in capsys.readouterr().err
