"""The entry points as a user types them: train_gpt_demo.py alone and under torchrun, and the shell scripts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, run_processes

SCRIPT = str(REPOSITORY / "train_gpt_demo.py")
WRONG = [
    "--distplan",
    "CAI_Gemin",
    "--model_type",
    "gpt2_medum",
    "--train_step",
    "1",
    "--lr",
    "nan",
    "--tp-degree",
    "3",
]
TOLD = ["did you mean CAI_Gemini", "did you mean gpt2_medium", "--lr", "--train_step"]


def check_told_once(console: str, folder: Path) -> None:
    for words in TOLD:
        assert console.count(words) >= 1, console
    assert console.count("CAI_Gemin'") + console.count("CAI_Gemin ") == 1, f"told once, not once a rank:\n{console}"
    assert not list(folder.iterdir()), "no half-made folder"


def test_plain_python_tells_all_problems(tmp_path: Path) -> None:
    returncode, console = run_processes([sys.executable, SCRIPT, "--log_dir", str(tmp_path / "logs"), *WRONG])
    assert returncode == 2 and "Traceback" not in console, console
    check_told_once(console, tmp_path)


def test_restarts_need_the_launcher(tmp_path: Path) -> None:
    flags = ["--log_dir", str(tmp_path / "logs"), "--max_restarts", "2"]
    returncode, console = run_processes([sys.executable, SCRIPT, *flags])
    assert returncode == 2 and "use bash run_gemini.sh, or torchrun's own --max-restarts=2" in console, console


def test_torchrun_tells_them_once(tmp_path: Path) -> None:
    """torchrun itself ends with 1 and its own report whatever a rank's exit code; the launcher does better."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    returncode, console = run_processes([*torchrun, SCRIPT, "--log_dir", str(tmp_path / "logs"), *WRONG])
    assert returncode == 1, console
    check_told_once(console.split("torch.distributed.elastic")[0].split("Traceback")[0], tmp_path)


def test_torchrun_tells_them_though_rank_0_comes_last(tmp_path: Path) -> None:
    """The first rank to end takes the others with it."""
    script = tmp_path / "slow.py"
    slow = "import os, sys, time; time.sleep(0 if int(os.environ['RANK']) else 2)"
    script.write_text(
        f"{slow}; sys.path.insert(0, {str(REPOSITORY)!r})\nimport train_gpt_demo as demo\ndemo.main(sys.argv[1:])\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    returncode, console = run_processes([*torchrun, str(script), *WRONG])
    assert returncode == 1 and all(words in console for words in TOLD), console


def test_plain_python_trains(tmp_path: Path) -> None:
    flags = ["--log_dir", str(tmp_path), "--train-step", "2", "--warmup-step", "1", "--device", "cpu"]
    returncode, console = run_processes([sys.executable, SCRIPT, *flags, "--run_name", "plain"])
    assert returncode == 0, console
    assert (tmp_path / "plain" / "console.log").read_text().strip().splitlines()[0].startswith("model")


def test_parity_beyond_the_bound_is_exit_code_1(tmp_path: Path) -> None:
    """The same check that passes everywhere fails where the run is another: here its bound is nothing."""
    program = (
        "import sys; from commons.training import parity;"
        "parity.ROUNDING['bf16'] = (parity.Rounding(0.0), parity.Rounding(0.0));"
        "import train_gpt_demo; train_gpt_demo.main(sys.argv[1:])"
    )
    flags = ["--log_dir", str(tmp_path), "--train_step", "2", "--warmup_step", "1", "--device", "cpu"]
    flags += ["--check_parity", "true", "--run_name", "run"]
    returncode, console = run_processes([sys.executable, "-c", program, *flags])
    assert returncode == 1 and "BROKEN" in console, console
    assert '"holds": false' in (tmp_path / "run" / "parity.json").read_text()


@pytest.mark.parametrize(
    ("script", "degrees", "first_lines"),
    [
        ("run_gemini.sh", "", ["CAI_Gemini", "dp 2 × tp 1 × pp 1"]),
        ("hybridparallelism/run.sh", "", ["CAI_Hybrid", "dp 1 × tp 2 × pp 2", "rank 3: dp 0, tp 1, pp 1"]),
        ("hybridparallelism/run.sh", "--tp_degree 1 --pp_degree 3", ["CAI_Hybrid", "dp 1 × tp 1 × pp 3"]),
    ],
)
def test_shell_scripts_train(tmp_path: Path, script: str, degrees: str, first_lines: list[str]) -> None:
    """From another folder, with the environment that the tests run in."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    flags = [
        "--log_dir",
        str(tmp_path),
        "--train_step",
        "2",
        "--warmup_step",
        "1",
        "--run_name",
        "run",
        *degrees.split(),
    ]
    returncode, console = run_processes(
        ["bash", str(REPOSITORY / script), *flags], cwd=tmp_path, environment={"PATH": path}
    )
    assert returncode == 0, console
    assert all(words in console for words in first_lines), console
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
