"""A home folder that cannot be written to, and a user whom the system does not know, end no run."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, run_processes
from worlds.bare import TRAIN, bare_environment, trained

SETPRIV = shutil.which("setpriv")
STRANGER = "12345"
LAUNCHER = (sys.executable, str(REPOSITORY / "commons" / "launch"))


def as_stranger(folder: Path, *command: str, **variables: str) -> tuple[int, str]:
    """Run as a user without a name, a group or a home folder."""
    if os.geteuid() != 0 or not SETPRIV:
        pytest.skip("only root can become another user")
    words = [SETPRIV, f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
    words += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # Python may lie below /root
    names = ("USER", "LOGNAME", "XDG_CACHE_HOME", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR", "PYTHONPATH")
    unset = [word for name in names for word in ("-u", name)]
    environ = bare_environment(GPUNUM="1", PYTHONDONTWRITEBYTECODE="", **variables)
    return run_processes(["env", *unset, *words, *command], environment=environ, cwd=folder)


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """Which the stranger may write to, and come to."""
    folder = tmp_path / "open"
    folder.mkdir()
    for each in (folder, *folder.parents[:-2]):
        each.chmod(0o777 if each == folder else 0o755)
    return folder


@pytest.mark.parametrize("home", ["/", "/nowhere/at/all"])
def test_a_home_that_cannot_be_written_to(open_folder: Path, home: str) -> None:
    (open_folder / "tmp").mkdir()
    (open_folder / "tmp").chmod(0o777)
    where = {"HOME": home, "TMPDIR": str(open_folder / "tmp")}
    code, console = as_stranger(open_folder, *LAUNCHER, *TRAIN, "--compile=on", **where)
    assert code == 0, console
    assert trained(open_folder)
    cache = open_folder / "tmp" / f"gemini-gpt2-{STRANGER}"
    told = [line for line in console.splitlines() if "cannot be written to" in line]
    assert told == [f"{Path(home) / '.cache'} cannot be written to: caches go to {cache} (XDG_CACHE_HOME chooses"
                    " another place)"]  # fmt: skip
    assert any((cache / "gemini-gpt2" / "inductor").rglob("*.py")), "what was compiled is kept"
    assert "PermissionError" not in console and "torch.compile failed" not in console


def test_a_place_of_the_user_s_own_that_cannot_be_written_to(open_folder: Path) -> None:
    (open_folder / "home").mkdir()
    (open_folder / "home").chmod(0o777)
    where = {"HOME": str(open_folder / "home"), "TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere", "TMPDIR": str(open_folder)}
    environ = bare_environment(GPUNUM="1", **where)
    command = ["env", "-u", "PYTHONPATH", sys.executable, str(REPOSITORY / "train_gpt_demo.py"), *TRAIN, "--compile=on"]
    code, console = run_processes(command, environment=environ, cwd=open_folder)
    assert code == 0, console
    assert "TORCHINDUCTOR_CACHE_DIR: /proc/nowhere cannot be written to" in console
