"""The entry points as a user types them: train_gpt_demo.py alone and under torchrun, and the shell scripts."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
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
    "0",
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
    settings = json.loads((tmp_path / "plain" / "config.json").read_text())
    chosen = settings.pop("chosen")
    assert [name for name, value in settings.items() if value in (None, "auto")] == [], "every setting is decided"
    assert "batch_size" in chosen and not {"train_step", "warmup_step", "device", "run_name"} & set(chosen)
    assert settings == {**settings, "compile": "off", "cuda_graph": "off", "peer_copies": "off", "batch_size": 4}


OLD_EXAMPLE = ["--tp_degree=2", "--placement=auto", "--shardinit", "--distplan=CAI_Gemini", "--train_step=4"]
SMALL = ["--device=cpu", "--num_layers=1"]
IGNORED = "warning: --shardinit has no effect any more and is ignored"


def test_both_entry_points_speak_one_language(tmp_path: Path) -> None:
    """Flags as people's scripts around the old example have them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name, command, variables in (
        ("torchrun", [*torchrun, SCRIPT], {}),
        ("launcher", ["bash", str(REPOSITORY / "run_gemini.sh")], {"GPUNUM": "2", "PATH": path}),
    ):
        flags = [*OLD_EXAMPLE, *SMALL, "--log_dir", str(tmp_path), "--run_name", name]
        returncode, console = run_processes([*command, *flags], environment=variables)
        assert returncode == 0, console
        assert console.count(IGNORED) == 1 and "dp 1 × tp 2" in console, console
        assert len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) == 4


def test_variables_are_read_by_the_script_too(tmp_path: Path) -> None:
    variables = {"BATCH_SIZE": "0", "PRECISION": "int8", "USE_SHARD_INIT": "True", "GPUNUM": "2"}
    command = [sys.executable, SCRIPT, "--log_dir", str(tmp_path / "logs"), "--precision", "fp16"]
    returncode, console = run_processes(command, environment=variables)
    assert returncode == 2, console
    assert "try --batch_size 4 [BATCH_SIZE=0 in the environment]" in console
    assert "int8" not in console, "flags win"
    assert "warning: USE_SHARD_INIT has no effect any more" in console
    assert "warning: GPUNUM=2 is ignored: this machine has 1 rank already" in console


def test_the_script_leads_to_the_doctor_too() -> None:
    returncode, console = run_processes([sys.executable, SCRIPT, "--doctor", "--failure", "no such error"])
    assert returncode == 0 and "Traceback" not in console, console


def test_without_colossalai_its_plans_are_refused_in_one_sentence(tmp_path: Path) -> None:
    """requirements.txt alone: every installed package but that one, by links."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith("colossalai"):
            (packages / entry.name).symlink_to(entry)
    # without site-packages of its own
    command = [sys.executable, "-S", SCRIPT, "--log_dir", str(tmp_path / "logs"), "--device", "cpu"]
    environment = {"PYTHONPATH": f"{REPOSITORY}:{packages}"}
    returncode, console = run_processes(command, environment=environment)
    assert returncode == 2 and "Traceback" not in console, console
    assert "--distplan CAI_Gemini: Colossal-AI is not installed: run `bash install.sh`" in console, console
    flags = ["--distplan", "Pytorch_DDP", "--train_step", "1", "--num_layers", "1"]
    returncode, console = run_processes([*command, *flags], environment=environment)
    assert returncode == 0, console


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
