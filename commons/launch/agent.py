"""torchrun's engine (torch.distributed.elastic) as the launcher uses it: starts the ranks, starts them again, ends
them. The names are the engine's own; torch 2.5 to 2.13 have them all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic import multiprocessing
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from commons.doctor.failure import LAUNCHER_RUN_ID
from commons.launch.nodes import Nodes
from commons.launch.stop_signals import StopSignals
from commons.launch.watch import Watch

if TYPE_CHECKING:
    from torch.distributed import TCPStore

SHUTDOWN_SECONDS = 6  # between asking the ranks to stop and killing them
MONITOR_SECONDS = 0.1
RENDEZVOUS_SECONDS = 900

# Runs in a rank before the script: the kernel is to kill it when the launcher dies in whatever way (prctl(2),
# 1 is PR_SET_PDEATHSIG), which survives the exec.
RANK_START = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)

Failures = Mapping[int, ProcessFailure]


class Agent(LocalElasticAgent):
    """The engine's agent, which also watches for ranks that hang, and knows what a restart cannot help.

    Args:
        stop: what it has kept is raised before the ranks start and whenever they have been looked at.
        begin: called with the number of an attempt, from 1, before its ranks start.
        is_final: whether ranks that failed so would fail again.
        on_restart: called with the failures and the number of the attempt that follows.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: DefaultLogsSpecs,
        stop: StopSignals,
        watch: Watch,
        begin: Callable[[int], None],
        is_final: Callable[[Failures], bool],
        on_restart: Callable[[Failures, int], None],
    ) -> None:
        super().__init__(spec, logs_specs)
        self._shutdown_timeout = SHUTDOWN_SECONDS  # torch 2.13 takes it as an argument, 2.5 has it nowhere
        self._stop, self._watch = stop, watch
        self._begin, self._is_final, self._on_restart = begin, is_final, on_restart

    @property
    def _attempt(self) -> int:
        return self._worker_group.spec.max_restarts - self._remaining_restarts + 1

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        self._raise_what_was_kept()
        self._begin(self._attempt)
        pids: Any = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        self._watch.started({worker_group.workers[local].global_rank: pid for local, pid in pids.items()})
        return pids

    def _monitor_workers(self, worker_group: Any) -> Any:
        result: Any = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]
        self._raise_what_was_kept()  # ranks that heard it too have not failed
        if not result.is_failed():
            self._watch.look()
        elif self._is_final(result.failures):
            self._remaining_restarts = 0
        elif self._remaining_restarts:
            self._on_restart(result.failures, self._attempt + 1)
        return result

    def _raise_what_was_kept(self) -> None:
        if self._stop.kept:
            raise SignalException(f"signal {self._stop.kept}", signal.Signals(self._stop.kept))

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *arguments: Any, **options: Any) -> None:
        if death_sig == signal.SIGINT:
            # Python answers Ctrl-C with a traceback until the rank's guard is on duty
            for pid in self._watch.unheard():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGTERM)
        super()._shutdown(death_sig, *arguments, **options)


def run_agent(
    command: Sequence[str],
    nodes: Nodes,
    store: TCPStore,
    folder: Path,
    max_restarts: int,
    stop: StopSignals,
    **hooks: Any,
) -> None:
    """Run ``command`` on this machine's ranks until all have ended.

    Args:
        command: arguments of this Python.
        folder: for the engine's error files.
        stop: keeps the signals that end the run.
        hooks: the further arguments of Agent.

    Raises:
        ChildFailedError: ranks failed.
        SignalException: a signal came, and was passed on to the ranks.
    """
    set_engine_up(stop)
    # made here, since torch's registry takes an address apart and knows none of a link (fe80::1%eth0)
    handler = StaticTCPRendezvous(
        nodes.master_addr, store.port, nodes.rank, nodes.count, LAUNCHER_RUN_ID, RENDEZVOUS_SECONDS
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=nodes.ranks_per_node,
        entrypoint=sys.executable,
        args=("-I", "-S", "-c", RANK_START, str(os.getpid()), "-u", *command),
        rdzv_handler=handler,
        max_restarts=max_restarts,
        monitor_interval=MONITOR_SECONDS,
        master_addr=nodes.master_addr,
        master_port=store.port,
    )
    result: Any = Agent(spec, DefaultLogsSpecs(log_dir=str(folder)), stop, **hooks).run()
    if result.is_failed():
        raise ChildFailedError(name=command[0], failures=result.failures)


def set_engine_up(stop: StopSignals) -> None:
    """Settings that torchrun's engine takes from no argument, at least not in every version."""
    # its handler raises at once; torch 2.5 sets it for four signals, whatever it is told
    multiprocessing.api._terminate_process_handler = stop.answer  # pyright: ignore[reportAttributeAccessIssue]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(signum.name for signum in stop.handled)
    # it waits 30 s before it kills ranks that do not end
    PContext.close.__defaults__ = (None, SHUTDOWN_SECONDS)
    if "LOGLEVEL" not in os.environ:
        # it tells of its own proceedings; what failed is told by the launcher
        engine = logging.getLogger("torch.distributed.elastic")
        engine.addHandler(logging.NullHandler())
        engine.propagate = False
