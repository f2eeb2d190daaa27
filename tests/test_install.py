"""install.sh and the scripts that call it, on small machines made for the purpose.

A Machine is a copy of the scripts, a PATH of its own and an empty HOME. Its package index is a folder of tiny
wheels with the names and versions of the real pins: a real venv and a real pip take seconds and no network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from commons.doctor import versions

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ("requirements.txt", "requirements-nodeps.txt", "requirements-dev.txt")
SCRIPTS = ("install.sh", "run_gemini.sh", "run_tests.sh", "hybridparallelism/run.sh", "launchers/visible_gpus.sh")
# Everything that the scripts call; a machine's PATH holds these and the interpreters that a test puts there.
TOOLS = (
    "bash", "cat", "cut", "date", "df", "dirname", "env", "find", "flock", "grep", "head", "ls", "mkdir",
    "readlink", "rm", "sed", "sha256sum", "sleep", "tail", "timeout", "tr", "uname",
)  # fmt: skip
PYTHON = Path(getattr(sys, "_base_executable", sys.executable))
TIMEOUT_SECONDS = 240


def pins(*files: str) -> list[Requirement]:
    """The requirements of this repository's files, without comments."""
    lines = [line.split("  #")[0].strip() for file in files for line in (ROOT / file).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not pinned exactly"
    return specifier.version


def make_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = (), payload: bytes = b"") -> None:
    """A wheel with one module, <name>.py, that a test can look for."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", f"__version__ = {version!r}\n")
        wheel.writestr(f"{module}.bin", payload)
        wheel.writestr(f"{info}/METADATA", metadata + "".join(f"Requires-Dist: {need}\n" for need in requires))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in (*wheel.namelist(), f"{info}/RECORD")))


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package index: a wheel for every pin. Colossal-AI's asks for what is not there, as the real one."""
    folder = tmp_path_factory.mktemp("wheels")
    for pin in pins(*REQUIREMENTS):
        requires = ("torch<=2.5.1", "not-on-this-index") if pin.name == "colossalai" else ()
        make_wheel(folder, pin.name, pinned_version(pin), requires)
    return folder


@dataclass
class Machine:
    home: Path
    wheels: Path

    @property
    def repo(self) -> Path:
        return self.home / "the suite"  # a path with a space must do

    @property
    def venv(self) -> Path:
        return self.repo / ".venv"

    @property
    def bin(self) -> Path:
        return self.home / "bin"

    def set_up(self) -> None:
        for file in (*SCRIPTS, *REQUIREMENTS, "commons/doctor/versions.py"):
            (self.repo / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, self.repo / file)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"this machine has no {tool}"))
        self.put("python3", f'exec "{PYTHON}" "$@"')

    def put(self, command: str, script: str) -> None:
        path = self.bin / command
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def environ(self, **changes: str) -> dict[str, str]:
        """What `env -i` would leave, and a pip that knows the wheels only. An empty value removes one."""
        environ = {
            "HOME": str(self.home), "PATH": str(self.bin), "LANG": "C.UTF-8", "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_NO_COMPILE": "1",
            "GEMINI_MIN_FREE_MIB": "1",
        } | changes  # fmt: skip
        return {name: value for name, value in environ.items() if value}

    def run(self, *command: str, cwd: Path | None = None, **environ: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", *command], cwd=cwd or self.home, env=self.environ(**environ), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
        )  # fmt: skip

    def install(self, *options: str, **environ: Any) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.repo / "install.sh"), *options, **environ)

    def site_packages(self, venv: Path | None = None) -> Path:
        (folder,) = (venv or self.venv).glob("lib/python3*/site-packages")
        return folder

    def has_module(self, name: str) -> bool:
        return (self.site_packages() / f"{name}.py").exists()


@pytest.fixture
def machine(tmp_path: Path, wheels: Path) -> Machine:
    fresh = Machine(tmp_path / "home", wheels)
    fresh.set_up()
    return fresh


@pytest.fixture(scope="session")
def finished_venv(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """A .venv that install.sh finished, to be copied."""
    first = Machine(tmp_path_factory.mktemp("first") / "home", wheels)
    first.set_up()
    done = first.install()
    assert done.returncode == 0, done.stderr
    return first.venv


@pytest.fixture
def installed(machine: Machine, finished_venv: Path) -> Machine:
    shutil.copytree(finished_venv, machine.venv, symlinks=True)
    return machine


@pytest.fixture
def active(machine: Machine) -> Path:
    """A virtual environment of the user's that has everything; its packages are metadata only."""
    prefix = machine.home / "active"
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", prefix], check=True, timeout=TIMEOUT_SECONDS)
    for pin in pins("requirements.txt", "requirements-nodeps.txt"):
        pretend_installed(machine.site_packages(prefix), pin.name, pinned_version(pin))
    return prefix


def pretend_installed(site: Path, name: str, version: str) -> None:
    for old in site.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def assert_ready(done: subprocess.CompletedProcess[str], python: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{python}\n"


def assert_one_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Failed, and told why in the last line, one line, without a traceback before it."""
    assert done.returncode == 1
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert errors == done.stderr.splitlines()[-1:], done.stderr
    assert errors[0].startswith("install.sh: error: ")
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in errors[0]


def cut_off_network() -> dict[str, Any]:
    """An index at a port where nobody listens, and no wheels."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    index = f"http://127.0.0.1:{port}/simple"
    return {"PIP_NO_INDEX": "", "PIP_FIND_LINKS": "", "PIP_INDEX_URL": index, "PIP_RETRIES": "1"}


# ---- a .venv of our own


def test_first_start_makes_a_venv_with_every_pin(machine: Machine) -> None:
    done = machine.install()

    assert_ready(done, machine.venv / "bin/python")
    for pin in pins("requirements.txt", "requirements-nodeps.txt"):
        if pin.marker is None or pin.marker.evaluate():
            assert machine.has_module(pin.name), pin.name
    assert not machine.has_module("pytest")
    assert [line[12:17] for line in done.stderr.splitlines() if re.search(r"\[\d/3\]", line)] == [
        "[1/3]", "[2/3]", "[3/3]",
    ]  # fmt: skip


# nvidia-smi as the doctor asks it: one GPU, a driver and the CUDA that this runs
NVIDIA_SMI = """case "$*" in
    --list-gpus) echo 'GPU 0: {gpu} (UUID: GPU-1)' ;;
    *query-gpu=*) echo '0, GPU-1, {gpu}, {driver}, 12282, 10, {capability}, Default' ;;
    "") echo '| NVIDIA-SMI 1.2   Driver Version: {driver}   CUDA Version: {cuda} |' ;;
esac"""
REPORTED = "torch 2.10.0: driver 551.78 runs CUDA 12.4 at most, and torch {pinned} is built for CUDA 13"


@pytest.mark.parametrize(
    ("gpu", "driver", "cuda", "capability", "version", "said"),
    [
        ("NVIDIA GeForce RTX 4070", "551.78", "12.4", "8.9", "2.10.0", REPORTED),
        ("NVIDIA H100", "470.82", "11.4", "9.0", "", "every tested torch needs 12: update the driver"),
        ("NVIDIA H100", "580.159", "13.0", "9.0", versions.GPU_TORCH, "the one that the GPU tests have passed with"),
    ],
)
def test_a_torch_that_the_driver_can_run(
    machine: Machine, gpu: str, driver: str, cuda: str, capability: str, version: str, said: str
) -> None:
    (pinned,) = [pinned_version(pin) for pin in pins("requirements.txt") if pin.name == "torch"]
    shutil.copytree(ROOT / "commons", machine.repo / "commons", dirs_exist_ok=True)
    answers = NVIDIA_SMI.format(gpu=gpu, driver=driver, cuda=cuda, capability=capability)
    machine.put("nvidia-smi", answers)
    index = machine.home / "index"
    shutil.copytree(machine.wheels, index)
    for other in ("2.10.0", versions.GPU_TORCH):
        make_wheel(index, "torch", other)

    done = machine.install(PIP_FIND_LINKS=str(index))

    assert_ready(done, machine.venv / "bin/python")
    text = (machine.site_packages() / "torch.py").read_text()
    assert text == f"__version__ = {version or pinned!r}\n"
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("install.sh: torch ")]
    assert said.format(pinned=pinned) in told
    again = machine.install(PIP_FIND_LINKS="")
    assert_ready(again, machine.venv / "bin/python")  # it fulfils the pins
    note = f"install.sh: warning: torch {version or pinned} has run on no GPU here, {versions.GPU_TORCH} has"
    assert again.stderr.startswith(note) if version != versions.GPU_TORCH else again.stderr == ""


def simple_index(folder: Path, version: str) -> str:
    """The address of a package index that has this torch alone."""
    (folder / "torch").mkdir(parents=True)
    make_wheel(folder / "torch", "torch", version)
    (wheel,) = (folder / "torch").glob("*.whl")
    (folder / "torch" / "index.html").write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>')
    return folder.as_uri()


@pytest.mark.parametrize(
    ("variables", "gpu", "installed"),
    [({}, False, "+cpu"), ({"GEMINI_CUDA": "1"}, False, ""), ({}, True, ""), ({"index": "empty"}, False, "")],
)
def test_where_no_gpu_is_seen_torch_for_cpus_comes_first(
    machine: Machine, tmp_path: Path, variables: dict[str, str], gpu: bool, installed: str
) -> None:
    (pinned,) = [pinned_version(pin) for pin in pins("requirements.txt") if pin.name == "torch"]
    index = simple_index(tmp_path / "cpu", f"{pinned}+cpu")
    if variables.pop("index", None):
        index = simple_index(tmp_path / "empty", "0.1")
    if gpu:
        machine.put("nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'")

    done = machine.install(GEMINI_TORCH_INDEX=index, **variables)

    assert_ready(done, machine.venv / "bin/python")
    assert (machine.site_packages() / "torch.py").read_text() == f"__version__ = {pinned + installed!r}\n"
    asked = "no NVIDIA GPU seen: torch for CPUs (GEMINI_CUDA=1" in done.stderr
    assert asked == (not gpu and "GEMINI_CUDA" not in variables)
    assert ("gave none" in done.stderr) == (asked and not installed)


def test_pytorch_s_own_index_is_the_default_and_stands_at_one_place() -> None:
    lines = [line for line in (ROOT / "install.sh").read_text().splitlines() if "https://" in line]
    assert lines == ['torch_index="${GEMINI_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"']


def test_the_torch_for_gpus_is_one_that_a_result_confirms() -> None:
    """All cases of the matrix that could run, and none of them failed."""
    result = json.loads((ROOT / versions.GPU_TORCH_RESULT).read_text())
    assert result["environment"]["versions"]["torch"] == versions.GPU_TORCH and result["environment"]["gpus"]
    assert result["cases"] and all(case["holds"] for case in result["cases"])
    assert not versions.gpu_note(f"{versions.GPU_TORCH}+cu130")
    assert versions.GPU_TORCH in versions.gpu_note("2.13.0")


def test_a_doctor_that_cannot_tell_leaves_the_pins(machine: Machine) -> None:
    (machine.repo / "commons" / "doctor").mkdir(exist_ok=True)
    (machine.repo / "commons" / "doctor" / "__main__.py").write_text("print('2.10.0; touch x')\nprint('why')\n")
    done = machine.install()
    assert_ready(done, machine.venv / "bin/python")
    assert not (machine.repo / "x").exists()
    (pinned,) = [pinned_version(pin) for pin in pins("requirements.txt") if pin.name == "torch"]
    assert (machine.site_packages() / "torch.py").read_text() == f"__version__ = {pinned!r}\n"


def test_second_start_runs_no_pip_and_says_nothing(installed: Machine) -> None:
    shutil.rmtree(installed.site_packages() / "pip")  # it could not

    done = installed.install()

    assert_ready(done, installed.venv / "bin/python")
    assert done.stderr == ""


def test_dev_adds_the_test_tools_and_keeps_the_rest_ready(installed: Machine) -> None:
    done = installed.install("--dev")

    assert_ready(done, installed.venv / "bin/python")
    assert installed.has_module("pytest")
    assert "left half made" not in done.stderr
    assert installed.install().stderr == ""
    assert installed.install("--dev").stderr == ""


@pytest.mark.parametrize(("file", "package"), [("requirements.txt", "rich"), ("requirements-dev.txt", "ruff")])
def test_new_pins_are_installed(installed: Machine, tmp_path: Path, file: str, package: str) -> None:
    options = () if file == "requirements.txt" else ("--dev",)
    installed.install(*options)
    newer = tmp_path / "newer"
    newer.mkdir()
    make_wheel(newer, package, "99.0")
    path = installed.repo / file
    path.write_text(re.sub(rf"{package}==\S+", f"{package}==99.0", path.read_text()))

    done = installed.install(*options, PIP_FIND_LINKS=f"{installed.wheels} {newer}")

    assert_ready(done, installed.venv / "bin/python")
    assert "99.0" in (installed.site_packages() / f"{package}.py").read_text()


def test_new_pins_without_network_leave_the_old_venv_usable(installed: Machine) -> None:
    file = installed.repo / "requirements.txt"
    old = file.read_text()
    file.write_text(re.sub(r"rich==\S+", "rich==99.0", old))
    assert_one_error(installed.install(**cut_off_network()), "no network")

    file.write_text(old)

    assert installed.install(**cut_off_network()).stderr == ""


def start_and_signal(machine: Machine, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Start install.sh and send `number` to its process group, as a terminal does, once it is at work."""
    start = subprocess.Popen(
        ["bash", machine.repo / "install.sh"], env=machine.environ(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (machine.venv / "bin/python").exists():
        assert time.monotonic() < deadline and start.poll() is None
        time.sleep(0.01)
    os.killpg(start.pid, number)
    stdout, stderr = start.communicate(timeout=TIMEOUT_SECONDS)
    return subprocess.CompletedProcess(start.args, start.returncode, stdout, stderr)


def test_killed_install_is_repaired(machine: Machine) -> None:
    start_and_signal(machine, signal.SIGKILL)
    # what a pip that is killed at a bad moment leaves: a package that seems installed and is not
    pretend_installed(machine.site_packages(), "torch", "2.13.0")

    done = machine.install()

    assert_ready(done, machine.venv / "bin/python")
    assert "left half made" in done.stderr
    assert machine.has_module("torch")


def test_interrupt_is_not_taken_for_a_failure(machine: Machine) -> None:
    done = start_and_signal(machine, signal.SIGINT)

    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "install.sh: interrupted; the next start repairs it"


def test_missing_package_is_put_back(installed: Machine) -> None:
    for part in installed.site_packages().glob("einops*"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()

    assert_ready(installed.install(), installed.venv / "bin/python")
    assert installed.has_module("einops")


def test_venv_of_a_python_that_is_gone_is_made_again(installed: Machine) -> None:
    for link in (installed.venv / "bin").glob("python*"):
        link.unlink()

    assert_ready(installed.install(), installed.venv / "bin/python")


def test_two_starts_at_once_install_once(machine: Machine) -> None:
    starts = [
        subprocess.Popen(
            ["bash", machine.repo / "install.sh"], env=machine.environ(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    results = [start.communicate(timeout=TIMEOUT_SECONDS) for start in starts]

    assert [start.returncode for start in starts] == [0, 0], results
    assert {stdout for stdout, _ in results} == {f"{machine.venv / 'bin/python'}\n"}
    assert sorted("[2/3]" in stderr for _, stderr in results) == [False, True]
    assert sorted("waiting for it" in stderr for _, stderr in results) == [False, True]


def test_venv_made_by_the_user_is_completed_and_never_cleared(machine: Machine) -> None:
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", machine.venv], check=True, timeout=TIMEOUT_SECONDS)
    theirs = machine.venv / "notes.txt"
    theirs.write_text("mine")
    no_network = machine.install(VIRTUAL_ENV=str(machine.venv), **cut_off_network())
    assert_one_error(no_network, "no network")

    done = machine.install(VIRTUAL_ENV=str(machine.venv))

    assert_ready(done, machine.venv / "bin/python")
    assert machine.has_module("torch")
    assert theirs.read_text() == "mine"
    assert machine.install().stderr == ""


def test_folder_that_is_no_venv_is_left_alone(machine: Machine) -> None:
    machine.venv.mkdir()
    (machine.venv / "thesis.txt").write_text("not to be lost")

    assert_one_error(machine.install(), "install.sh did not make it", "move it away")
    assert (machine.venv / "thesis.txt").exists()


# ---- an environment that is there already


def test_active_environment_that_has_everything_is_used(machine: Machine, active: Path) -> None:
    done = machine.install(VIRTUAL_ENV=str(active), **cut_off_network())

    assert_ready(done, active / "bin/python")
    assert done.stderr == ""
    assert not machine.venv.exists()


def test_conda_environment_is_used(machine: Machine, active: Path) -> None:
    assert_ready(machine.install(CONDA_PREFIX=str(active), **cut_off_network()), active / "bin/python")


def test_packages_on_pythonpath_count(machine: Machine, active: Path) -> None:
    """A machine without network: the packages came with `pip install --target`."""
    done = machine.install(PYTHONPATH=str(machine.site_packages(active)), **cut_off_network())

    assert_ready(done, machine.bin / "python3")
    assert not machine.venv.exists()


def test_active_environment_without_pytest_is_not_enough_for_dev(machine: Machine, active: Path) -> None:
    done = machine.install("--dev", VIRTUAL_ENV=str(active))

    assert_ready(done, machine.venv / "bin/python")
    assert "not using the active environment" in done.stderr
    assert "pytest is not installed" in done.stderr


def test_untested_versions_are_not_used_unasked(machine: Machine, active: Path) -> None:
    pretend_installed(machine.site_packages(active), "torch", "2.14.1+cu130")

    unasked = machine.install(VIRTUAL_ENV=str(active))
    asked = machine.install(VIRTUAL_ENV=str(active), GEMINI_USE_ACTIVE="1")

    assert_ready(unasked, machine.venv / "bin/python")
    assert "torch 2.14.1+cu130 is outside the tested range, 2.5.1 to 2.13" in unasked.stderr
    assert_ready(asked, active / "bin/python")
    assert "warning: torch 2.14.1+cu130 is outside the tested range, 2.5.1 to 2.13" in asked.stderr


def test_untested_versions_are_better_than_nothing(machine: Machine, active: Path) -> None:
    pretend_installed(machine.site_packages(active), "torch", "2.14.1")

    done = machine.install(VIRTUAL_ENV=str(active), **cut_off_network())

    assert_ready(done, active / "bin/python")
    assert "no network" in done.stderr
    assert "warning: torch 2.14.1 is outside the tested range" in done.stderr


def test_old_colossalai_is_an_error_with_the_cure(machine: Machine, active: Path) -> None:
    pretend_installed(machine.site_packages(active), "colossalai", "0.4.9")

    done = machine.install(VIRTUAL_ENV=str(active), GEMINI_USE_ACTIVE="1")

    assert_one_error(done, "colossalai 0.4.9 cannot work", "pip install --no-deps colossalai==0.5.0")


def test_what_the_current_folder_holds_is_not_run(machine: Machine, tmp_path: Path) -> None:
    """Python's `-m` takes modules from there first."""
    hostile = tmp_path / "x"
    for name in ("pip", "venv", "ensurepip", "commons"):
        (hostile / name).mkdir(parents=True)
        (hostile / name / "__init__.py").write_text("raise SystemExit('code of the current folder was run')\n")

    done = machine.run(str(machine.repo / "install.sh"), cwd=hostile)

    assert_ready(done, machine.venv / "bin/python")


# ---- what a machine can lack


def test_broken_shim_is_passed_over(machine: Machine) -> None:
    (machine.bin / "python3").rename(machine.bin / "python3.11")
    machine.put("python3", "echo 'pyenv: version 3.99 is not installed' >&2; exit 127")

    assert_ready(machine.install(), machine.venv / "bin/python")


def answering(version: str) -> str:
    """A Python that calls itself `version` when it is asked, and is a real one in all else."""
    return f'if [ "$1" = -c ]; then echo "{version} venv"; else exec "{PYTHON}" "$@"; fi'


def test_python_too_old(machine: Machine) -> None:
    machine.put("python3", 'if [ "$1" = -c ]; then echo "3.8 venv"; else exit 1; fi')

    assert_one_error(machine.install(), "Python 3.10 to 3.12 is needed, found 3.8", "apt-get install python3.12")
    assert not (machine.venv / "bin").exists()


def test_no_python(machine: Machine) -> None:
    (machine.bin / "python3").unlink()

    assert_one_error(machine.install(), "Python 3.10 to 3.12 is needed, found none")


def test_newer_python_is_tried_with_a_warning(machine: Machine) -> None:
    machine.put("python3", answering("3.13"))

    done = machine.install()

    assert_ready(done, machine.venv / "bin/python")
    assert "warning: no Python from the tested range, 3.10 to 3.12" in done.stderr


def test_tested_python_goes_before_a_newer_one(machine: Machine) -> None:
    machine.put("python3", answering("3.13"))
    machine.put("python3.12", answering("3.12"))

    done = machine.install()

    assert_ready(done, machine.venv / "bin/python")
    assert "warning" not in done.stderr
    assert f"({machine.bin / 'python3.12'})" in done.stderr


def test_no_venv_module(machine: Machine, tmp_path: Path) -> None:
    """Debian splits ensurepip off into python3-venv."""
    machine.put("python3", answering("3.11").replace('"3.11 venv"', '"3.11 no-venv"'))

    assert_one_error(machine.install(), "Python 3.11 has no venv module", "apt-get install python3.11-venv")


def test_a_python_without_ensurepip_is_recognised(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "ensurepip.py").write_text("raise ImportError")

    assert_one_error(machine.install(PYTHONPATH=str(tmp_path)), "has no venv module", "-venv")


def test_no_network(machine: Machine) -> None:
    assert_one_error(machine.install(**cut_off_network()), "no network", "PIP_INDEX_URL")

    done = machine.install()

    assert_ready(done, machine.venv / "bin/python")


def test_package_that_the_index_does_not_have(machine: Machine, tmp_path: Path) -> None:
    assert_one_error(machine.install(PIP_FIND_LINKS=str(tmp_path)), "No matching distribution found for torch==2.13.0")


def test_too_little_space_is_told_before_anything_is_installed(machine: Machine) -> None:
    needed = 10**8

    done = machine.install(GEMINI_MIN_FREE_MIB=str(needed))

    assert_one_error(done, "disk full", f"MiB free, {needed} are needed", "GEMINI_VENV")
    assert not (machine.venv / "bin").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount the small file system that this test fills")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path, leave_bytes: int = 0) -> None:
    status = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(status.f_bavail * status.f_frsize - leave_bytes, 0)))


def test_disk_that_fills_up_while_the_venv_is_made(machine: Machine, small_disk: Path) -> None:
    fill(small_disk, leave_bytes=5 * 2**20)

    assert_one_error(machine.install(GEMINI_VENV=str(small_disk / "venv")), "disk full", "GEMINI_VENV")


def test_disk_that_fills_up_while_pip_installs(installed: Machine, small_disk: Path) -> None:
    shutil.copytree(installed.venv, small_disk / "venv", symlinks=True)
    large = installed.home / "large"
    large.mkdir()
    make_wheel(large, "torch", "2.13.1", payload=os.urandom(30 * 2**20))
    file = installed.repo / "requirements.txt"
    file.write_text(file.read_text().replace("torch==2.13.0", "torch==2.13.1"))

    done = installed.install(GEMINI_VENV=str(small_disk / "venv"), PIP_FIND_LINKS=f"{installed.wheels} {large}")

    assert_one_error(done, "disk full", "GEMINI_VENV")


def test_disk_full_to_the_last_byte(machine: Machine, small_disk: Path) -> None:
    (small_disk / "venv").mkdir()
    fill(small_disk)

    done = machine.install(GEMINI_VENV=str(small_disk / "venv"), GEMINI_MIN_FREE_MIB="0")

    assert_one_error(done, "disk full")


def test_place_that_cannot_be_written(machine: Machine) -> None:
    # root may write anywhere but here
    assert_one_error(machine.install(GEMINI_VENV="/sys/gemini-venv"), "cannot make /sys/gemini-venv", "not writable")


def test_file_in_the_way(machine: Machine) -> None:
    machine.venv.write_text("")

    assert_one_error(machine.install(), "is not a folder")


def test_unknown_option(machine: Machine) -> None:
    assert_one_error(machine.install("--upgrade"), "unknown option --upgrade", "--dev")


def test_help_is_the_head_of_the_script(machine: Machine) -> None:
    done = machine.install("--help")

    assert done.returncode == 0
    assert "GEMINI_USE_ACTIVE" in done.stdout
    assert "set -euo" not in done.stdout


def test_which_installs_nothing(machine: Machine, active: Path) -> None:
    missing = machine.install("--which")

    assert (missing.returncode, missing.stdout) == (1, "")
    assert not machine.venv.exists()
    assert_ready(machine.install("--which", VIRTUAL_ENV=str(active)), active / "bin/python")


# ---- the scripts on top

STUB = """
import os, sys
print(".".join(os.path.dirname(__file__).split(os.sep)[-2:]), sys.argv[1:], os.getcwd())
print(*(f"{name}={os.environ.get(name)}" for name in ("DISTPLAN", "TPDEGREE", "PPDEGREE", "GPUNUM")))
sys.exit(7)
"""


@pytest.fixture
def stubbed(installed: Machine) -> Machine:
    for module in ("launch/__main__", "doctor/__main__"):
        path = installed.repo / f"commons/{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB)
    return installed


def test_run_gemini_passes_flags_and_exit_code_on(stubbed: Machine, tmp_path: Path) -> None:
    done = stubbed.run(str(stubbed.repo / "run_gemini.sh"), "--run-name", "two words", cwd=tmp_path)

    assert done.returncode == 7
    assert done.stdout.startswith(f"commons.launch ['--run-name', 'two words'] {tmp_path}\n")
    assert done.stderr == ""


def test_run_gemini_does_not_start_without_an_environment(stubbed: Machine) -> None:
    shutil.rmtree(stubbed.venv)

    done = stubbed.run(str(stubbed.repo / "run_gemini.sh"), **cut_off_network())

    assert_one_error(done, "no network")


@pytest.mark.parametrize(
    ("flags", "passed_on"),
    [
        (["--doctor"], []),
        (["--doctor", "--json"], ["--json"]),
        (["--json", "--doctor"], ["--json"]),
        (["--failure", "no --doctor helps", "--doctor", "--json"], ["--failure", "no --doctor helps", "--json"]),
    ],
)
def test_doctor_needs_no_environment(stubbed: Machine, flags: list[str], passed_on: list[str]) -> None:
    shutil.rmtree(stubbed.venv)

    done = stubbed.run(str(stubbed.repo / "run_gemini.sh"), *flags, **cut_off_network())

    assert done.returncode == 7
    assert done.stdout.startswith(f"commons.doctor {passed_on} ")
    assert not stubbed.venv.exists()


@pytest.mark.parametrize(
    ("gpus", "environ", "expected"),
    [
        (0, {}, "DISTPLAN=CAI_Hybrid TPDEGREE=2 PPDEGREE=2 GPUNUM=None"),
        (1, {}, "DISTPLAN=CAI_Hybrid TPDEGREE=1 PPDEGREE=1 GPUNUM=None"),
        (2, {}, "DISTPLAN=CAI_Hybrid TPDEGREE=2 PPDEGREE=1 GPUNUM=None"),
        (8, {}, "DISTPLAN=CAI_Hybrid TPDEGREE=2 PPDEGREE=2 GPUNUM=None"),
        (8, {"TPDEGREE": "4", "GPUNUM": "8"}, "DISTPLAN=CAI_Hybrid TPDEGREE=4 PPDEGREE=2 GPUNUM=8"),
        (8, {"CUDA_VISIBLE_DEVICES": "0,1"}, "DISTPLAN=CAI_Hybrid TPDEGREE=2 PPDEGREE=1 GPUNUM=None"),
        (8, {"CUDA_VISIBLE_DEVICES": "3"}, "DISTPLAN=CAI_Hybrid TPDEGREE=1 PPDEGREE=1 GPUNUM=None"),
        (8, {"CUDA_VISIBLE_DEVICES": "-1"}, "DISTPLAN=CAI_Hybrid TPDEGREE=2 PPDEGREE=2 GPUNUM=None"),
    ],
)
def test_hybrid_defaults(stubbed: Machine, gpus: int, environ: dict[str, Any], expected: str) -> None:
    """The number of ranks is left to the launcher, which sees the flags too."""
    if gpus:
        listing = "".join(f"GPU {index}: NVIDIA H200 (UUID: GPU-{index})\\n" for index in range(gpus))
        stubbed.put("nvidia-smi", f"printf '{listing}'")

    done = stubbed.run("run.sh", "--seed", "1", cwd=stubbed.repo / "hybridparallelism", **environ)

    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines()[1] == expected


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("0,1", 2), ("", 0), ("-1", 0), ("0,-1,1", 1), ("1, 3", 2), ("7,8", 1), ("08,1", 0), ("no", 0),
        ("GPU-8932f937,GPU-aa", 2), ("MIG-GPU-1/2/3", 1), (None, 8),
    ],
)  # fmt: skip
def test_what_is_visible_is_counted(machine: Machine, visible: str | None, count: int) -> None:
    script = str(machine.repo / "launchers/visible_gpus.sh")
    environ = machine.environ() | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})

    def counted(*arguments: str) -> str:
        command = ["bash", script, *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout

    assert (counted("8"), counted()) == (f"{count}\n", "0\n"), "no GPU is to be seen where there is none"
    machine.put("nvidia-smi", 'for gpu in 0 1 2 3 4 5 6 7; do echo "GPU $gpu: NVIDIA H200 (UUID: GPU-$gpu)"; done')
    assert counted() == f"{count}\n"


def is_running(pid: int) -> bool:
    """A zombie that init has not reaped yet does not run."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


LEAVES_A_PROCESS = """
import subprocess, pytest
def test_leaves_a_process():
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    print("left", child.pid)
@pytest.mark.gpu
def test_gpu(): pass
def test_fails(): assert False
"""


@pytest.fixture
def tests_machine(machine: Machine) -> Machine:
    """run_tests.sh with this very environment's pytest instead of an installed one."""
    machine.put("python3", f'exec "{sys.executable}" "$@"')
    shutil.copy(ROOT / "pyproject.toml", machine.repo)
    (machine.repo / "install.sh").write_text(f"echo '{machine.bin / 'python3'}'")
    (machine.repo / "tests").mkdir()
    return machine


def test_run_tests_leaves_no_process_behind(tests_machine: Machine) -> None:
    (tests_machine.repo / "tests/test_it.py").write_text(LEAVES_A_PROCESS)

    done = tests_machine.run(str(tests_machine.repo / "run_tests.sh"), "-s", "-p", "no:cacheprovider")

    assert done.returncode == 1  # pytest's
    assert "1 failed, 1 passed, 1 deselected" in done.stdout.splitlines()[-1]
    found = re.search(r"left (\d+)", done.stdout)
    assert found
    assert not is_running(int(found.group(1)))
    assert f"killed a process left behind: {found.group(1)} (sleep 300" in done.stderr


def test_run_tests_passes_arguments_on(tests_machine: Machine) -> None:
    (tests_machine.repo / "tests/test_it.py").write_text(LEAVES_A_PROCESS)

    done = tests_machine.run(str(tests_machine.repo / "run_tests.sh"), "-m", "gpu", "-p", "no:cacheprovider")

    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 deselected" in done.stdout.splitlines()[-1]
    assert done.stderr == ""


def test_run_tests_smoke_is_left_out_unless_asked_for(tests_machine: Machine) -> None:
    (tests_machine.repo / "tests/test_it.py").write_text("def test_else(): pass\n")
    smoke = "import pytest\n@pytest.mark.smoke\ndef test_plan(): pass\n@pytest.mark.smoke\ndef test_other(): pass\n"
    (tests_machine.repo / "tests/test_smoke.py").write_text(smoke)
    script, quiet = str(tests_machine.repo / "run_tests.sh"), ("-p", "no:cacheprovider")

    assert "1 passed, 2 deselected" in tests_machine.run(script, *quiet).stdout.splitlines()[-1]
    assert "2 passed" in tests_machine.run(script, "--smoke", *quiet).stdout.splitlines()[-1]
    assert (
        "1 passed, 1 deselected" in tests_machine.run(script, "--smoke", "-k", "plan", *quiet).stdout.splitlines()[-1]
    )


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_run_tests_ended_by_a_signal_ends_everything(tests_machine: Machine, ending: signal.Signals) -> None:
    (tests_machine.repo / "tests/test_it.py").write_text(
        "import subprocess, time\n"
        "def test_waits():\n"
        "    subprocess.Popen(['sleep', '301'], start_new_session=True)\n"
        "    open('started', 'w').close()\n"
        "    time.sleep(300)\n"
    )
    marker = f"GEMINI_OUTER={os.getpid()}-{ending}"
    script = subprocess.Popen(
        ["bash", tests_machine.repo / "run_tests.sh", "-p", "no:cacheprovider"],
        env=tests_machine.environ(**dict([marker.split("=")])), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (tests_machine.repo / "started").exists():
        assert time.monotonic() < deadline and script.poll() is None
        time.sleep(0.05)

    script.send_signal(ending)
    stdout, _ = script.communicate(timeout=TIMEOUT_SECONDS)

    assert script.returncode not in (0, None)
    assert "KeyboardInterrupt" in stdout
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert marker.encode() not in environ.read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile


# ---- pins and tested ranges


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_package_is_pinned_once_for_every_tested_python(python: str) -> None:
    names = [
        pin.name for pin in pins(*REQUIREMENTS) if not pin.marker or pin.marker.evaluate({"python_version": python})
    ]

    assert sorted(names) == sorted(set(names))
    assert {*versions.TESTED, *versions.ANY_VERSION, *versions.TEST_PACKAGES} <= set(names)


def test_pins_lie_in_the_tested_ranges_and_the_cures_name_them() -> None:
    by_name = {pin.name: pinned_version(pin) for pin in pins("requirements.txt", "requirements-nodeps.txt")}
    for package, tested in versions.TESTED.items():
        assert versions.compare(package, by_name[package], tested, "") is None
        assert f"{package}=={by_name[package]}" in versions.CURES[package]


def test_install_sh_knows_the_numbers_of_versions_py() -> None:
    script = (ROOT / "install.sh").read_text()
    oldest, newest = (versions.release(end)[1] for end in (versions.PYTHON.oldest, versions.PYTHON.newest))

    assert f"readonly untested={versions.EXIT_UNTESTED} " in script
    assert f"tested_pythons=({' '.join(f'3.{minor}' for minor in range(newest, oldest - 1, -1))})" in script


def test_requirements_say_in_the_first_lines_how_to_complete_the_install() -> None:
    head = (ROOT / "requirements.txt").read_text().splitlines()[:2]

    assert "pip install --no-deps -r requirements-nodeps.txt" in head[1]


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("2.4.1", "unusable"), ("2.5.0", "untested"), ("2.5.1", "tested"), ("2.5.1+cu124", "tested"),
        ("2.13.0+cpu", "tested"), ("2.13.7", "tested"), ("2.14.0.dev1", "untested"), ("3.0", "untested"),
    ],
)  # fmt: skip
def test_torch_versions(version: str, verdict: str) -> None:
    finding = versions.compare("torch", version, versions.TESTED["torch"], "the cure")

    assert verdict == ("tested" if finding is None else "untested" if finding.usable else "unusable")
    assert finding is None or ("2.5.1 to 2.13" in finding.message and "the cure" in finding.message)


def test_complete_environment_has_no_findings() -> None:
    every = {pin.name: pinned_version(pin) for pin in pins(*REQUIREMENTS)}
    python_is_tested = versions.compare("Python", "{}.{}".format(*sys.version_info), versions.PYTHON, "") is None

    assert python_is_tested == (versions.check_environment(tests=True, version_of=every.get) == [])


def test_missing_package_is_found() -> None:
    every = {pin.name: pinned_version(pin) for pin in pins(*REQUIREMENTS)} | {"einops": None}

    found = versions.check_environment(version_of=every.get)

    assert [(finding.package, finding.usable) for finding in found if finding.package != "Python"] == [
        ("einops", False)
    ]
