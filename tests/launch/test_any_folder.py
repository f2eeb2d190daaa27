"""Every entry point runs its own code: from any folder, whatever lies there, through links, under PYTHONSAFEPATH=1."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, run_processes
from worlds.bare import TRAIN, bare_environment, trained

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))  # `python -m` itself takes modules from the current folder
# What the suite imports, at some time, by these names.
NAMES = (
    "commons",
    "model_zoo",
    "train_gpt_demo",
    "tests",
    "launch",
    "torch",
    "numpy",
    "rich",
    "pip",
    "venv",
    "ensurepip",
)
WRONG = "raise SystemExit('code of the current folder was run')\n"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder in which everything that the suite imports lies under the same name, and is not it."""
    folder = tmp_path / "x"
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(WRONG)
    return folder


def run(*command: str | Path, cwd: Path, **changes: str) -> tuple[int, str]:
    words = ["env", "-u", "PYTHONPATH", *map(str, command)]
    return run_processes(words, environment=bare_environment(**changes), cwd=cwd)


SAFE_PATH = pytest.mark.parametrize("variables", [{}, {"PYTHONSAFEPATH": "1"}], ids=["", "PYTHONSAFEPATH"])


@SAFE_PATH
def test_run_gemini_trains(hostile: Path, variables: dict[str, str]) -> None:
    code, console = run("bash", REPOSITORY / "run_gemini.sh", *TRAIN, cwd=hostile, GPUNUM="1", **variables)
    assert code == 0, console
    assert trained(hostile)


@SAFE_PATH
@pytest.mark.parametrize("starts", [[sys.executable], [TORCHRUN, "--standalone", "--nproc_per_node=1"]], ids=str)
def test_the_training_script_trains(hostile: Path, starts: list[str], variables: dict[str, str]) -> None:
    (hostile / "torch").rename(hostile / "not_torch")  # torchrun is torch's own program
    code, console = run(*starts, REPOSITORY / "train_gpt_demo.py", *TRAIN, cwd=hostile, **variables)
    assert code == 0, console
    assert trained(hostile)


@SAFE_PATH
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hybridparallelism/run.sh", "--help"], "usage: run_gemini.sh"),
        (["run_gemini.sh", "--doctor", "--topic", "packages"], "Nothing here stops"),
        (["run_tests.sh", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/test_rooms.py"], "tests collected"),
        (["install.sh"], sys.executable),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_the_other_scripts_run(hostile: Path, words: list[str], told: str, variables: dict[str, str]) -> None:
    code, console = run("bash", REPOSITORY / words[0], *words[1:], cwd=hostile, **variables)
    assert "code of the current folder" not in console
    assert (code, told in console) == (0, True), console


def test_the_launcher_asks_its_own_doctor(hostile: Path) -> None:
    """By the flag and, for an error that it knows, by itself."""
    launcher = (sys.executable, REPOSITORY / "commons" / "launch")
    code, console = run(*launcher, "--doctor", "--topic", "packages", cwd=hostile)
    assert code == 0 and "Nothing here stops" in console, console
    ask = (
        "import sys; sys.path[0] = sys.argv[1]; from commons.doctor import explanation; print(explanation(sys.argv[2]))"
    )
    error = "No CUDA GPUs are available"
    _, here = run(sys.executable, "-c", ask, REPOSITORY, error, cwd=hostile)
    _, at_home = run(sys.executable, "-c", ask, REPOSITORY, error, cwd=REPOSITORY)
    assert here == at_home and "code of the current folder" not in here


# ---- links


@pytest.mark.parametrize("script", ["run_gemini.sh", "hybridparallelism/run.sh"])
@pytest.mark.parametrize("links", ["one", "a link to a link", "a linked folder"])
def test_a_link_instead_of_the_script(tmp_path: Path, script: str, links: str) -> None:
    called = link_to(tmp_path, script, links)
    code, console = run(called, "--help", cwd=tmp_path)
    assert (code, "usage: run_gemini.sh" in console) == (0, True), console


def link_to(folder: Path, script: str, links: str) -> Path:
    (folder / "bin").mkdir()
    called = folder / "bin" / "train"
    if links == "a linked folder":
        (folder / "suite").symlink_to(REPOSITORY)
        called = folder / "suite" / script
    elif links == "one":
        called.symlink_to(REPOSITORY / script)
    else:
        (folder / "first").symlink_to(os.path.relpath(REPOSITORY / script, folder))
        called.symlink_to("../first")
    return called


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("install.sh", []),
        ("run_tests.sh", ["--collect-only", "-q", "-p", "no:cacheprovider", "tests/test_rooms.py"]),
        ("train_gpt_demo.py", ["--help"]),
    ],
)
def test_a_link_instead_of_another_file(tmp_path: Path, script: str, words: list[str]) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "called").symlink_to(REPOSITORY / script)
    program = [sys.executable] if script.endswith(".py") else ["bash"]
    code, console = run(*program, tmp_path / "bin" / "called", *words, cwd=tmp_path)
    assert code == 0, console


def test_a_folder_that_cdpath_would_lead_astray(tmp_path: Path) -> None:
    """`cd hybridparallelism` inside a script would go there and print where that is."""
    (tmp_path / "hybridparallelism").mkdir()
    command = ["bash", "hybridparallelism/run.sh", "--help"]
    code, console = run(*command, cwd=REPOSITORY, CDPATH=str(tmp_path))
    assert (code, console.startswith("usage: run_gemini.sh")) == (0, True), console


# ---- what separates paths, inside of one


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    """A copy of the suite in a folder of all kinds of separators."""
    suite = tmp_path / "run_12:30; a,b=c 'd' $e"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (REPOSITORY / name).exists() and not name.startswith(("tests/", "benchmarks/")):
            (suite / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, suite / name)
    return suite


def test_a_suite_in_a_folder_with_a_colon_trains(awkward: Path) -> None:
    """The relative --log_dir lies in such a folder too."""
    code, console = run("bash", "run_gemini.sh", *TRAIN, "--compile=on", cwd=awkward, GPUNUM="1")
    assert code == 0, console
    assert trained(awkward)
    assert json.loads((awkward / "gemini_logs" / "run" / "summary.json").read_text())["ended"] == "finished"
    code, console = run("bash", "run_gemini.sh", "--doctor", "--topic", "packages", cwd=awkward)
    assert code == 0, console
    code, console = run(sys.executable, "train_gpt_demo.py", *TRAIN, "--run_name=again", cwd=awkward)
    assert code == 0, console


def test_a_colon_where_no_environment_can_be_made_is_one_sentence(awkward: Path) -> None:
    """Python's own environments cannot lie there."""
    environ = {**bare_environment(), "PATH": "/usr/bin:/bin", "GEMINI_USE_ACTIVE": "", "VIRTUAL_ENV": ""}
    command = ["env", "-u", "PYTHONPATH", "bash", "install.sh"]
    done = subprocess.run(command, cwd=awkward, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("install.sh: error: ") and "GEMINI_VENV" in line and "':'" in line
    assert not (awkward / ".venv").exists()
