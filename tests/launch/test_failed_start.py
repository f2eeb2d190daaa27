"""A failed start asks the doctor by itself: real ranks that fail, a real doctor, an nvidia-smi that says what it is
told to."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, run_processes
from worlds import wsl_world
from worlds.launched import Launched, wait_until_gone

from commons.doctor import explanation, needs_no_traceback
from commons.doctor.machine import Machine

# The report's card; torch is a CPU build here, which is one more reason for the report's message.
SMI = """#!/bin/sh
case "$*" in
    *query-gpu=*) echo '0, GPU-1, NVIDIA GeForce RTX 4070, 551.78, 12282, 10, 8.9, Default' ;;
    "") echo '| NVIDIA-SMI 550.65   Driver Version: 551.78   CUDA Version: 12.4 |' ;;
esac
"""
HUNG_SMI = "#!/bin/sh\necho $$ >>{pids}\nexec sleep 600\n"
FAILS = """
from commons.doctor import explain_uncaught
explain_uncaught()
def main():
    time.sleep(rank)
    raise RuntimeError({message!r})
recorded(main)
"""
NO_GPUS = "No CUDA GPUs are available"

torch_is_a_cpu_build = Machine().torch_files.version is not None and Machine().torch_files.cuda is None
needs_cpu_torch = pytest.mark.skipif(not torch_is_a_cpu_build, reason="needs a CPU build of torch")
needs_no_gpu = pytest.mark.skipif(bool(Machine().which("nvidia-smi")), reason="for machines without a GPU")


@pytest.fixture
def smi_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """PATH with an nvidia-smi that knows an RTX 4070."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(SMI)
    (folder / "nvidia-smi").chmod(0o755)
    path = f"{folder}:{Path('/usr/bin')}:/bin"
    monkeypatch.setenv("PATH", path)
    return path


@needs_cpu_torch
@needs_no_gpu
def test_the_cause_and_the_cure_are_on_the_screen_and_no_traceback(tmp_path: Path, smi_path: str) -> None:
    run = Launched(tmp_path / "run", FAILS.format(message=NO_GPUS), PATH=smi_path).wait(timeout=150)
    assert run.code == 1
    assert "Traceback" not in run.stderr
    final = run.stderr.split("Rank 0 of 2 failed:\n")[1]
    assert final.startswith(f"RuntimeError: {NO_GPUS}\n\nerror ")
    assert "torch is a CPU build" in final
    assert re.search(r"cure: \S+ -m pip uninstall -y torch .*&& \S+ -m pip install torch==2\.10\.0$", final, re.M)
    assert run.stderr.splitlines()[-1].strip().startswith("id: "), "the findings are last"
    assert run.stderr.count("id:   torch-build.cpu-only") == 1, "once for all ranks"
    assert (run.run_dir() / "console.log").read_text().rstrip().endswith(run.stderr.splitlines()[-1])


@pytest.fixture
def wsl(tmp_path: Path) -> tuple[str, ...]:
    """What stands before a command that is to run in the report's WSL 2; tmp_path is seen in there."""
    if not torch_is_a_cpu_build or wsl_world.tools_missing():
        pytest.skip(wsl_world.tools_missing() or "torch itself would ask the made libcuda")
    prefix = wsl_world.build(tmp_path, SMI)
    if problem := wsl_world.cannot_be_built(tmp_path, prefix):
        pytest.skip(f"needs mounts of its own: {problem}")
    return prefix


def test_the_report_for_real(tmp_path: Path, wsl: tuple[str, ...]) -> None:
    """WSL 2, an RTX 4070, a Linux driver's libcuda before Windows' own: real ranks fail, and a real doctor says why."""
    run = Launched(tmp_path / "run", FAILS.format(message=NO_GPUS), prefix=wsl).wait(timeout=150)
    assert run.code == 1
    assert "Traceback" not in run.stderr
    notice, command = run.stderr.splitlines()[:2]
    assert notice == "No GPU seen: a Linux NVIDIA driver inside WSL hides the one from Windows; try:"
    assert command.strip() == "LD_LIBRARY_PATH=/usr/lib/wsl/lib bash run_gemini.sh"
    final = run.stderr.split("Rank 0 of 2 failed:\n")[1]
    assert final.startswith(f"RuntimeError: {NO_GPUS}\n\nerror ")
    seen = " ".join(final.split())
    assert (
        "libcuda.so.535.183.01; cuInit answers 100 CUDA_ERROR_NO_DEVICE; nvidia-smi sees NVIDIA GeForce RTX 4070"
        in seen
    )
    *_, at_once, for_good, name = run.stderr.rstrip().splitlines()
    assert at_once.strip().startswith("cure: LD_LIBRARY_PATH=/usr/lib/wsl/lib bash run_gemini.sh   # at once")
    assert for_good.strip().startswith("sudo mkdir -p /root/linux-driver && sudo mv ")
    assert name.strip() == "id:   libcuda.shadowed"
    assert run.stderr.count("id:   ") == 1


def test_the_reports_cures_for_real(wsl: tuple[str, ...]) -> None:
    """Each as it is printed, in a world as new: after it a process loads Windows' libcuda, which sees the GPU."""
    doctor = f"{sys.executable} -m commons.doctor --topic gpu --json"

    def findings(script: str) -> dict[str, dict[str, str]]:
        code, console = run_processes([*wsl, "sh", "-c", script])
        assert code in (0, 1), console
        return {each["id"]: each for each in json.loads(console[console.index("{") :])["findings"]}

    at_once, for_good = findings(doctor)["libcuda.shadowed"]["cure"].splitlines()
    variable = at_once.partition(" bash run_gemini.sh")[0]
    for script in (f"{variable} {doctor}", f"{for_good}\n{doctor}"):
        found = findings(script)
        assert found["libcuda"]["seen"].startswith("/usr/lib/wsl/lib/libcuda.so.1: NVIDIA Fake 1"), found
        assert not {name for name in found if name.startswith("libcuda.")}


def test_nothing_is_said_where_nothing_here_explains_it(tmp_path: Path) -> None:
    """The error is of a kind that the doctor knows, and all is well with what it looks at."""
    run = Launched(tmp_path, FAILS.format(message="Connection refused"), GLOO_SOCKET_IFNAME="lo").wait(timeout=100)
    assert (run.code, run.stderr.splitlines()[-1]) == (1, "RuntimeError: Connection refused")
    assert "Traceback" in run.stderr.split("Rank 0 of 2 failed:")[1]


GLOO_FAILS = {"GLOO_SOCKET_IFNAME": "nosuch0", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_the_launcher_too(tmp_path: Path, ranks: int) -> None:
    """The real script, and a failure that is real: gloo is told to use an interface that is not there."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks > 1 else []
    script = [str(REPOSITORY / "train_gpt_demo.py"), "--device=cpu", f"--log_dir={tmp_path}"]
    code, console = run_processes([sys.executable, *torchrun, *script], environment=GLOO_FAILS, cwd=tmp_path)
    assert code == 1, console
    assert console.count("GLOO_SOCKET_IFNAME names an interface that is not there") == 1, console
    assert "cure: unset GLOO_SOCKET_IFNAME" in console
    error = console.index("nosuch0")
    assert error < console.index("id:   interface.unknown"), "after the error"
    if ranks == 1:
        assert console.rstrip().endswith("id:   interface.unknown")
    else:
        assert console.index("id:   interface.unknown") < console.index("ChildFailedError"), "torchrun's report follows"


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        (f"RuntimeError: {NO_GPUS}", True),
        ("AssertionError: Torch not compiled with CUDA enabled", True),
        ("RuntimeError: The NVIDIA driver on your system is too old (found version 12040).", True),
        ("RuntimeError: CUDA error: no kernel image is available for execution on the device", True),
        ("torch.AcceleratorError: CUDA error: CUDA-capable device(s) is/are busy or unavailable", True),
        ("RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment", True),
        ("torch.OutOfMemoryError: CUDA out of memory.", False),
        (
            "RuntimeError: Attempting to deserialize object on a CUDA device but torch.cuda.is_available() is False",
            False,
        ),
        ("ImportError: cannot import name 'X' from 'transformers'", False),
        ("ValueError: the cause", False),
    ],
)
def test_where_a_traceback_helps(message: str, plain: bool) -> None:
    assert needs_no_traceback(message) == plain


def test_no_symptom_starts_no_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    assert explanation("ValueError: train_step must exceed warmup_step") == ""


def test_a_doctor_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, smi_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    (tmp_path / "bin" / "nvidia-smi").write_text(HUNG_SMI.format(pids=pids))
    started = time.monotonic()
    assert explanation(NO_GPUS, seconds=8) == ""
    assert time.monotonic() - started < 18  # nvidia-smi alone has 20
    assert pids.read_text(), "the doctor did not get as far as asking"
    assert wait_until_gone([int(pid) for pid in pids.read_text().split()], seconds=5)


@pytest.mark.parametrize("python", ["/bin/false", "/no/such/python"])
def test_a_doctor_that_cannot_start_leaves_the_failure_alone(monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    monkeypatch.setattr(sys, "executable", python)
    assert explanation(NO_GPUS) == ""


def test_uncaught_errors_fall_back_to_the_traceback(tmp_path: Path) -> None:
    """No rank, no launcher: where the doctor finds nothing to say, the traceback is shown after all."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom commons.doctor import explain_uncaught, failure\n"
        "failure.explanation = lambda message: ''\nexplain_uncaught()\n"
        "raise RuntimeError(sys.argv[1])\n"
    )
    code, console = run_processes([sys.executable, str(script), NO_GPUS], cwd=tmp_path)
    assert code == 1
    assert console.startswith(f"RuntimeError: {NO_GPUS}\nTraceback")
