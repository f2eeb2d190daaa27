"""Two machines for test_nodes.py: two network namespaces of this one, joined by a virtual cable.

Each has an interface eth0 and a loopback of its own, and names of its own: as on many a Debian, a machine's name
stands for 127.0.1.1 there, an address that no other machine can use.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from suite_runs import REPOSITORY, FinishedRun, clean_environment

NAMES = ("node0", "node1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PREFIX = "gemini-test-"
HOSTS = Path("/etc/netns")  # what `ip netns exec` puts over the files of /etc
DRAIN_SECONDS = 15


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def why_impossible() -> str:
    """Why this machine cannot have namespaces; empty where it can."""
    if not shutil.which("ip"):
        return "no `ip` here: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        ip("netns", "add", f"{PREFIX}{os.getpid()}-probe")
        ip("netns", "del", f"{PREFIX}{os.getpid()}-probe")
    except OSError as error:
        return f"the kernel or the container forbids network namespaces ({error})"
    return ""


@dataclass(frozen=True)
class Network:
    """The namespaces of node 0 and node 1."""

    namespaces: tuple[str, str]

    def pids(self) -> list[int]:
        return [int(pid) for each in self.namespaces for pid in ip("netns", "pids", each).split()]

    def is_empty(self, seconds: float = DRAIN_SECONDS) -> bool:
        """Whether no process is left in either namespace; what is just ending gets some seconds."""
        deadline = time.monotonic() + seconds
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.pids()

    def cut_off(self, node: int) -> None:
        """The cable is out: packets vanish, no connection is told."""
        ip("-n", self.namespaces[node], "link", "set", "eth0", "down")

    def connect(self) -> None:
        for namespace, address in zip(self.namespaces, ADDRESSES, strict=True):
            ip("-n", namespace, "link", "set", "eth0", "up")
            ip("-n", namespace, "addr", "replace", f"{address}/24", "dev", "eth0")

    def kill_all(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def two_machines() -> Iterator[Network]:
    """Makes both and takes them away again, with whatever still runs in them. OSError where that cannot be."""
    remove_leftovers()
    names = (f"{PREFIX}{os.getpid()}-0", f"{PREFIX}{os.getpid()}-1")
    network = Network(names)
    try:
        for number, name in enumerate(names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            (HOSTS / name).mkdir(parents=True)
            (HOSTS / name / "hosts").write_text(hosts_file(number))
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        network.connect()
        yield network
    finally:
        remove(names)


def hosts_file(node: int) -> str:
    own = f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()} {NAMES[node]}\n"
    return own + f"{ADDRESSES[1 - node]} {NAMES[1 - node]}\n"


def remove(names: tuple[str, ...]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            Network((name, name)).kill_all()
        with contextlib.suppress(OSError):
            ip("netns", "del", name)
        shutil.rmtree(HOSTS / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # where the last one is gone
        HOSTS.rmdir()


def remove_leftovers() -> None:
    """Of tests that were killed."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix(PREFIX).split("-")[0]
        if name.startswith(PREFIX) and not Path(f"/proc/{owner}").exists():
            remove((name,))


class NodeRun:
    """The launcher at work on one of the machines; what it prints goes to a file."""

    def __init__(self, network: Network, node: int, folder: Path, *flags: str, **variables: str) -> None:
        self.folder = folder / NAMES[node]
        self.folder.mkdir(parents=True)
        self.log_dir, self._console = self.folder / "logs", self.folder / "screen.txt"
        job = {"NNODES": "2", "NODE_RANK": str(node), "GPUNUM": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "commons.launch", f"--log_dir={self.log_dir}", *flags]
        self.started = time.monotonic()
        with self._console.open("wb") as screen:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", network.namespaces[node], *command],
                cwd=REPOSITORY,
                env=clean_environment(**{**job, **variables}),
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def screen(self) -> str:
        return self._console.read_text(errors="replace")

    @property
    def last_lines(self) -> str:
        return "\n".join(self.screen.strip().splitlines()[-6:])

    def wait(self, seconds: float) -> FinishedRun:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.screen}") from None
        run_dirs = list(self.log_dir.iterdir()) if self.log_dir.exists() else [self.log_dir]
        return FinishedRun(code, self.screen, run_dirs[0])

    def wait_for_steps(self, count: int, seconds: float = 120) -> None:
        """Until so many steps were recorded (node 0 only: it writes the records)."""
        deadline = time.monotonic() + seconds
        while sum(len(path.read_text().splitlines()) for path in self.log_dir.glob("*/metrics.jsonl")) < count:
            assert self.process.poll() is None, f"it ended too early:\n{self.screen}"
            assert time.monotonic() < deadline, f"no {count} steps in {seconds} s:\n{self.screen}"
            time.sleep(0.1)


def free_port() -> str:
    """A port that is free in the namespaces too: they have no servers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
