"""What the user had set is there afterwards, and reaches the ranks: variables and signals that the suite touches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from suite_runs import REPOSITORY, clean_environment
from worlds.launched import Launched

from commons.launch import launcher
from commons.launch.nodes import Nodes
from commons.lifecycle.outcome import STOP_SIGNALS
from commons.lifecycle.suite_root import python_path

NOTED = """
leave_note(
    variables={name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "PYTHONPATH", "GLOO_SOCKET_IFNAME")},
    ignored=[n for n in range(1, 32) if n not in (9, 19) and signal.getsignal(n) is signal.SIG_IGN],
)
"""


def test_ranks_see_the_user_s_variables_and_ignored_signals(tmp_path: Path) -> None:
    """As under nohup, with packages of the user's own, three threads and an interface that they chose."""
    mine = str(tmp_path / "packages")
    under_nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    chosen = {"OMP_NUM_THREADS": "3", "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{mine}", "GLOO_SOCKET_IFNAME": "lo"}
    run = Launched(tmp_path, NOTED, before=under_nohup, GPUNUM="1", **chosen).wait()
    assert run.code == 0, run.stderr
    note = json.loads((tmp_path / "note-0.json").read_text())
    assert note["variables"] == chosen
    assert signal.SIGHUP in note["ignored"] and signal.SIGTERM not in note["ignored"]


@pytest.mark.parametrize(
    ("given", "expected"), [({}, []), ({"PYTHONPATH": ""}, []), ({"PYTHONPATH": "/a:/b"}, ["/a", "/b"])]
)
def test_a_child_s_python_path_keeps_what_was_there(given: dict[str, str], expected: list[str]) -> None:
    assert python_path(given).split(os.pathsep) == [str(REPOSITORY), *expected]


GUARD = """
import json, os, signal, sys, time
from commons.lifecycle.guard import on_duty
before = {n: signal.getsignal(n) is signal.SIG_IGN for n in (1, 2, 3, 10, 15)}
with on_duty() as guard:
    os.kill(os.getpid(), signal.SIGHUP)
    after = {n: signal.getsignal(n) is signal.SIG_IGN for n in before}
    time.sleep(0.3)  # the guard's thread would end the process
    print(json.dumps([before == after, before[1], guard.signum]))
"""


@pytest.mark.parametrize("signum", [signal.SIGHUP])
def test_a_rank_under_nohup_does_not_hear_that_its_terminal_closed(signum: signal.Signals) -> None:
    assert signum in STOP_SIGNALS
    done = subprocess.run(
        [sys.executable, "-c", GUARD],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signum, signal.SIG_IGN),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, True, 0]


@pytest.mark.parametrize(("given", "expected"), [("lo", "lo"), ("", ""), (None, "eth7")])
def test_an_interface_that_the_user_chose_is_not_chosen_again(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.setattr(launcher, "interface_to_the_others", lambda nodes: "eth7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")  # to be put back afterwards
    if given is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    launch: Any = SimpleNamespace(notices=[])
    launcher._choose_interface(launch, Nodes(1, 2, 0, "10.0.0.1", 29500, ("10.0.0.1", "10.0.0.2")))
    assert os.environ["GLOO_SOCKET_IFNAME"] == expected
    assert len(launch.notices) == (given is None)
