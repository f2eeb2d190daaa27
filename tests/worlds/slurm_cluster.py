"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd with ports and folders of their own.

Needs Debian's packages slurm-wlm and munge, and root (slurmd starts jobs for their users). Nothing of a Slurm that may
be installed here for real is touched: all files are in the cluster's folder, all ports are free ones.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from suite_runs import REPOSITORY, clean_environment, heed_all_signals
from worlds.launched import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")
HOST = socket.gethostname().partition(".")[0]
# The script takes the first name for the place to meet, so that it has to be one that is found; Slurm sorts them.
NODES = (HOST, f"{HOST}-node2")
CPUS_PER_NODE = 16  # said, not there: so that jobs of several tests run side by side
CONFIGURATION = """
ClusterName=gemini-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
MinJobAge=3600
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def why_not() -> str:
    """Why there can be no Slurm here; "" where there can be one."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=search_path()) is None]
    if missing:
        return f"apt-get install slurm-wlm munge: {', '.join(missing)} not found"
    if os.geteuid() != 0:
        return "slurmd starts jobs as root only"
    try:
        socket.getaddrinfo(HOST, None)
    except OSError:
        return f"this machine's name, {HOST}, has no address"
    return ""


def search_path() -> str:
    """With the folders of programs for root, which not every shell has."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """The daemons at work in ``folder``, which is to have a short path: sockets are in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []
        self.environment = clean_environment(
            SLURM_CONF=str(folder / "slurm.conf"),
            PATH=f"{Path(sys.executable).parent}:{search_path()}",  # the jobs' Python is the tests'
            GEMINI_USE_ACTIVE="1",
            CUDA_VISIBLE_DEVICES="",
        )

    def __enter__(self) -> Cluster:
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        self._start_munge()
        ports = [free_port() for _ in (None, *NODES)]
        nodes = [
            f"NodeName={name} NodeHostname={HOST} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS_PER_NODE} State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        (self.folder / "state").mkdir()
        text = CONFIGURATION.format(host=HOST, controller_port=ports[0], folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        self._start("slurmctld", "-D")
        for name in NODES:
            (self.folder / f"spool-{name}").mkdir()
            self._start("slurmd", "-D", "-N", name)

        def idle() -> bool:
            return self.run("sinfo", "-h", "-o", "%D %t").stdout.split() == ["2", "idle"]

        self.wait_until("two idle nodes", idle)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o700)
        (folder / "key").write_bytes(secrets.token_bytes(1024))
        (folder / "key").chmod(0o400)
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._start("munged", "-F", "--force", *(f"--{option}={folder / name}" for option, name in names.items()))
        self.wait_until("munge", (folder / "socket").exists)

    def _start(self, *command: str) -> None:
        with open(self.folder / "daemons.log", "a") as log:
            daemon = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=heed_all_signals,
            )
        self._daemons.append(daemon)

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) > 1:
            self.run("scancel", "--user=root", "--signal=KILL", "--full")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=REPOSITORY,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def wait_until(self, what: str, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not yet {what}:\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))

    def submit(self, *words: str, variables: Mapping[str, str]) -> str:
        """sbatch; the job's number."""
        done = self.run("sbatch", "--parsable", *words, **variables)
        assert done.returncode == 0, f"{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, by Slurm's names."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number).stdout))

    def exit_code(self, number: str, seconds: float = 120) -> int:
        """Of the batch script, once its job has ended; 128 + n where Slurm says that signal n ended it."""

        def ended() -> bool:
            return self.job(number).get("JobState") not in ("PENDING", "RUNNING", "COMPLETING", None)

        self.wait_until(f"the end of job {number}", ended, seconds)
        code, _, signum = self.job(number)["ExitCode"].partition(":")
        return int(code) or (128 + int(signum) if int(signum) else 0)
