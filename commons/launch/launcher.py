"""Starts a run: environment variables and flags in, ranks out. ``bash run_gemini.sh`` ends here.

Reads the settings, judges them once, makes the run's folder and name, meets the other machines, then has
torchrun's engine (torch.distributed.launcher) run the training script, and tells which rank failed first.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commons.cli import answers, planning
from commons.cli.data import prepare
from commons.cli.flags import (
    CONFIG_ERROR,
    Request,
    become_doctor,
    find_devices,
    help_text,
    judge_and_tell,
    read_request,
    report,
    wants_doctor,
    wants_help,
)
from commons.cli.less_memory import Start, with_advice
from commons.cli.machine import no_gpu_notice
from commons.cli.variables import name_variables
from commons.config.resolved import ResolvedConfig
from commons.doctor import explanation, needs_no_traceback
from commons.launch.auto import CHOICE_FILE, choose_layout
from commons.launch.console_copy import ConsoleCopy
from commons.launch.lifeline import Lifeline
from commons.launch.nodes import DEFAULT_PORT, MeetingError, Nodes, interface_to_the_others, meet
from commons.launch.stop_signals import Stopped, StopSignals
from commons.lifecycle.guard import WATCH_VARIABLE
from commons.lifecycle.host_memory import oom_kills
from commons.lifecycle.memory_shortage import killed_shortage
from commons.lifecycle.outcome import FAILURE, OUT_OF_MEMORY, Ended, end_of_note, read_note, stopped_by
from commons.reporting.run_folder import FolderInUse, claim_folder
from commons.reporting.writing import write_json

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from commons.checkpoint.resume import Found
    from commons.launch.watch import Watch

PROG = "run_gemini.sh"
EARLY_SECONDS = 3  # half of what torchrun's engine waits before it kills ranks itself
TRAINING_SCRIPT = Path(__file__).resolve().parents[2] / "train_gpt_demo.py"

# Environment variables that say what to start; they have no flag.
JOB_VARIABLES = {
    "GPUNUM": "processes on this machine, one a GPU (default: what the degrees need; without a GPU at least 2)",
    "NNODES": "machines in all; start the same command on each (default: 1)",
    "NODE_RANK": "which of them this is, from 0",
    "MASTER_ADDR": "name or address of machine 0",
    "MASTER_PORT": f"a free port there (default: {DEFAULT_PORT})",
}


@dataclass(frozen=True)
class Launch:
    """What is to be run.

    Attributes:
        given: the settings that the user gave, by flag or by variable; the ranks get these.
        config: all settings, resolved.
        notices: what the user is told before anything starts.
        choice: what --auto found, for the run's folder; None without it.
    """

    given: dict[str, Any]
    config: ResolvedConfig
    nodes: Nodes
    notices: list[str]
    choice: Mapping[str, Any] | None = None

    def add_notice(self, line: str) -> None:
        """Tell the user now, and console.log later."""
        self.notices.append(line)
        print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str], script: Path = TRAINING_SCRIPT) -> int:
    """Run a training from start to end; returns the process's exit code.

    0: trained. 1, or the rank's own code: a rank failed or hung, or the machines did not meet. 2: wrong
    settings, nothing was started. 128 + n: ended by signal n.
    """
    if wants_doctor(argv):
        become_doctor(argv)
    if wants_help(argv):
        print(help_text(PROG, variable_list()), end="")
        return 0
    try:
        stop = StopSignals()
        request = read_request(argv, os.environ)
        if planning.wants_answer(request.line.given):
            return answer(request, os.environ)
        launch, found = read_launch(argv, os.environ)
        for line in launch.notices:
            print(line, file=sys.stderr, flush=True)
        found = found or prepare(launch.config, launch.add_notice)
        if found:
            report(found)
            return CONFIG_ERROR
        if launch.config.auto:
            chosen = choose_layout(launch)
            if isinstance(chosen, int):
                return chosen
            launch = chosen
        return start(launch, script, stop)
    except Stopped as stopped:
        print(f"Stopped by {signal.Signals(stopped.signum).name}.", file=sys.stderr, flush=True)
        return 128 + stopped.signum


def variable_list() -> str:
    """The section of --help about the environment variables that only this entry point reads."""
    jobs = [f"  {variable:14}{text}" for variable, text in JOB_VARIABLES.items()]
    return "\n".join(["environment variables that say what is started:", *jobs])


def read_launch(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Launch, list[str]]:
    """Settings from flags and variables, and every problem with them. Starts, makes and prints nothing."""
    request = read_request(argv, environ)
    line, notices = request.line, list(request.notices)
    device_type, _ = find_devices(line.config().device)
    nodes, node_problems = read_nodes(environ, line.config().model_parallel_size, device_type)
    config, found, notice = judge_and_tell(line, nodes.world_size, nodes.ranks_per_node)
    if line.given.get("auto"):  # what is open is not decided yet: commons.launch.auto judges what it chooses
        found = [*line.problems, *planning.wrong_flags(line)]
    found = [name_variables(problem, environ, request.flags) for problem in found]
    if not found and config.device == "cpu" and line.config().device == "auto":
        notices.append(no_gpu_notice(config, nodes.world_size))
    if not found and config.resume:
        notices.extend(_found(config).notices)
    if notice and not found and not config.auto:  # which chooses for itself
        notices.append(notice)
    return Launch(line.given, config, nodes, notices), [*found, *node_problems]


def answer(request: Request, environ: Mapping[str, str]) -> int:
    """Answer --plan_for, --dry_run or --calibrate for the ranks that would be started; returns the exit code."""
    config = request.line.config()
    device_type, _ = find_devices(config.device)
    nodes, wrong = read_nodes(environ, config.model_parallel_size, device_type)
    if wrong and not config.plan_for:
        report(wrong)
        return CONFIG_ERROR
    return answers.answer(request, nodes.world_size, nodes.ranks_per_node)


def read_nodes(environ: Mapping[str, str], model_parallel_size: int, device_type: str) -> tuple[Nodes, list[str]]:
    """The job's machines from the environment variables, and what is wrong with these.

    Without GPUNUM as many processes are started as one copy of the model needs; on CPUs two or more, to be a
    parallel run.
    """
    found: list[str] = []

    def number(variable: str, default: int, low: int, high: int, advice: str) -> int:
        text = environ.get(variable) or str(default)
        if re.fullmatch(r"\d+", text) and low <= int(text) <= high:
            return int(text)
        found.append(f"{variable} must be a whole number from {low} to {high}, got {text!r}: {advice}")
        return default

    many = 100_000
    count = number("NNODES", 1, 1, many, "set the number of machines, or leave it out")
    needed = -(-max(1, model_parallel_size) // count)
    smallest = 1 if device_type == "cuda" or count > 1 else 2
    advice = "set the number of processes on this machine, or leave it out"
    ranks = number("GPUNUM", max(smallest, needed), 1, many, advice)
    if count == 1:
        return Nodes(ranks), found
    for variable in ("NODE_RANK", "MASTER_ADDR"):
        if not environ.get(variable):
            found.append(f"{variable} is needed with NNODES={count}: {JOB_VARIABLES[variable]}")
    rank = number("NODE_RANK", 0, 0, count - 1, "number the machines from 0")
    port = number("MASTER_PORT", DEFAULT_PORT, 1, 65535, "set a free port, the same on all machines")
    # an IPv6 address may be written as in a URL
    return Nodes(ranks, count, rank, environ.get("MASTER_ADDR", "").strip("[]"), port), found


def start(launch: Launch, script: Path, stop: StopSignals) -> int:
    """Meet the other machines, make the run's folder, and run the ranks. Returns the exit code."""
    try:
        met = meet(launch.nodes, _same(launch), launch.config.timeout, lambda: _claim_folder(launch))
        _choose_interface(launch, met.nodes)
        config = dataclasses.replace(launch.config, run_name=met.run_name)
        launch = dataclasses.replace(launch, config=config, nodes=met.nodes)
        if launch.choice is not None and launch.nodes.rank == 0:
            write_json(config.run_dir / CHOICE_FILE, launch.choice)
        console_copy = _open_console_copy(launch)
    except (MeetingError, FolderInUse) as error:
        print(f"Nothing was started: {error}", file=sys.stderr, flush=True)
        return FAILURE if type(error) is MeetingError else CONFIG_ERROR
    except OSError as error:
        print(
            f"Nothing was started: {error.filename}: {error.strerror}: choose another --log_dir",
            file=sys.stderr,
        )
        return FAILURE
    with console_copy, met.lifeline as lifeline:
        try:
            code = run_ranks(launch, met.store, script, stop)
        except Stopped as stopped:
            if not lifeline.struck:
                raise
            code = 128 + stopped.signum  # by the lifeline, when the ranks had ended by themselves just so
        lifeline.stand_down()
        if code:
            code = _look_for_others(code, lifeline, met.nodes)
        lifeline.close(succeeded=code == 0)
        console_copy.tells_at_the_end = code == 0  # else the last line is to be what the run ended for
        return code


def _look_for_others(code: int, lifeline: Lifeline, nodes: Nodes) -> int:
    """Say which node was gone before this one failed, or cannot be reached; returns the exit code."""
    if code > 128 and not lifeline.struck:
        return code  # by a signal from outside: nobody is to be blamed
    if lifeline.lost is not None:
        line = f"{nodes.describe(lifeline.lost).capitalize()} ended first: see that node's console."
        print(line, file=sys.stderr, flush=True)
        return FAILURE if lifeline.struck else code
    for node in lifeline.silent():
        line = f"{nodes.describe(node).capitalize()} does not answer: is it up, and its network?"
        print(line, file=sys.stderr, flush=True)
    return code


def _choose_interface(launch: Launch, nodes: Nodes) -> None:
    """Have gloo take the interface by which the nodes met. Left alone, it takes the one of the machine's own
    name, which on many systems is the loopback: no other machine gets through to that."""
    name = interface_to_the_others(nodes)
    if name and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = name
        interface = f"{name} ({nodes.addresses[nodes.rank]}) is the interface to the other nodes."
        notice = f"Node {nodes.rank} of {nodes.count}: {interface} GLOO_SOCKET_IFNAME chooses another."
        launch.notices.append(notice)
        print(launch.notices[-1], file=sys.stderr, flush=True)


def _same(launch: Launch) -> dict[str, Any]:
    """What all machines have to agree on, by its name in an error."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    settings = launch.config.as_dict()
    # where a machine keeps its logs is its own affair
    del settings["log_dir"], settings["run_name"], settings["quiet"], settings["log_every"]
    return {
        **{f"the version of {package}": installed(package) for package in ("torch", "colossalai", "transformers")},
        "the version of python": ".".join(map(str, sys.version_info[:2])),
        "NNODES": launch.nodes.count,
        "the number of ranks (GPUNUM)": launch.nodes.ranks_per_node,
        **{f"--{name}": value for name, value in settings.items()},
    }


def _claim_folder(launch: Launch) -> str:
    """On node 0, whose run it is; returns its name. See commons.reporting.run_folder."""
    return str(claim_folder(launch.config).run_name)


def _open_console_copy(launch: Launch) -> ConsoleCopy:
    """In the run's folder, which node 0 made; another node may keep its own. OSError where that cannot be."""
    run_dir, node = launch.config.run_dir, launch.nodes.rank
    run_dir.mkdir(parents=True, exist_ok=True)
    name = "console.log" if node == 0 else f"console-node{node}.log"
    return ConsoleCopy(run_dir / name, already_shown=launch.notices)


def _rank_command(launch: Launch, script: Path) -> list[str]:
    """The script, with the given settings as flags for the ranks, which choose the rest as the launcher did."""
    settings = {**launch.given, "device": launch.config.device, "run_name": launch.config.run_name}
    if launch.config.resume and (checkpoint := _found(launch.config).checkpoint) is not None:
        settings["resume"] = str(checkpoint.folder)  # the ranks need not look for it, nor at its every byte, again
    return [str(script), *(f"--{name}={value}" for name, value in settings.items())]


def _found(config: ResolvedConfig) -> Found:
    """What --resume comes out as; it has been verified when the settings were judged."""
    from commons.checkpoint.resume import find

    return find(config)


def run_ranks(launch: Launch, store: TCPStore, script: Path, stop: StopSignals) -> int:
    """Run ``script`` on this machine's ranks with torchrun's engine; returns the exit code when all ended."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from commons.launch.agent import run_agent
    from commons.launch.watch import Watch

    nodes, config = launch.nodes, launch.config
    threads = max(1, len(os.sched_getaffinity(0)) // nodes.ranks_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # the engine leaves its folder of error files behind
    with tempfile.TemporaryDirectory(prefix="run_gemini_") as folder:
        os.environ[WATCH_VARIABLE] = folder
        watch = Watch(Path(folder), nodes, config.timeout, store)
        course, failed = Course(launch, watch), None
        with stop.keeping():
            try:
                run_agent(
                    _rank_command(launch, script),
                    nodes,
                    store,
                    Path(folder) / "errors",
                    config.max_restarts,
                    stop,
                    watch=watch,
                    begin=course.begin,
                    is_final=course.is_final,
                    on_restart=course.report_restart,
                )
            except (ChildFailedError, SignalException, RuntimeError) as error:
                failed = error
            finally:
                watch.sweep()
            if stop.kept:  # what failed, failed for it
                return course.report_signal(stop.kept)
        if isinstance(failed, ChildFailedError):
            return _report_failure(failed, nodes, course)
        if failed is not None:  # node 0, which holds the store, has gone
            print(f"node {nodes.rank} lost its connection to the others: {failed}", file=sys.stderr, flush=True)
            return FAILURE
    return 0


class Course:
    """What becomes of a run's attempts: told on the screen and, where the ranks could not, in summary.json."""

    def __init__(self, launch: Launch, watch: Watch) -> None:
        self._config, self._nodes, self.watch = launch.config, launch.nodes, watch
        self._oom_kills = oom_kills()

    def begin(self, attempt: int) -> None:
        from commons.reporting.run_log import begin_attempt

        self.watch.sweep()
        self.watch.begin(attempt)
        if self._nodes.rank == 0:
            begin_attempt(self._config.run_dir, attempt, resumes=bool(self._config.resume))

    def report_restart(self, failures: Mapping[int, ProcessFailure], attempt: int) -> None:
        lines, ended = self.tell(failures)
        self.conclude(ended, replace=True)
        allowed = self._config.max_restarts + 1
        whence = "the last whole checkpoint" if self._config.save_every else "the first step"
        lines.append(f"Attempt {attempt} of {allowed} begins: all ranks start again, from {whence}.")
        print("", *lines, sep="\n", file=sys.stderr, flush=True)

    def is_final(self, failures: Mapping[int, ProcessFailure]) -> bool:
        """Whether ranks that failed so would fail again; a lack of memory is told to the other machines at once."""
        if (ended := self._out_of_memory(failures)) is not None:
            if self.watch.elsewhere is None:
                self.watch.tell_others(ended)
            return True
        return is_final(failures)

    def tell(self, failures: Mapping[int, ProcessFailure]) -> tuple[list[str], Ended]:
        """failure_lines(), with what is known here beyond what the ranks have left."""
        ended = self._out_of_memory(failures)
        known = self.watch.verdict or read_note(root_cause(failures)[1].message)
        if ended is None and not known and self._nodes.count > 1:
            ended = self.watch.look_elsewhere(wait=True)  # what these ranks may have failed for
        if ended is None:
            return failure_lines(failures, self._nodes, self.watch.verdict)
        ended, advice = with_advice(self._config, ended, self._start())
        lines = [ended.why, *advice, self._where_the_traceback_is(failures)]
        return [line for line in lines if line], ended

    def _out_of_memory(self, failures: Mapping[int, ProcessFailure]) -> Ended | None:
        """The end of a run of which a rank has left word that it is out of memory, here or on another machine, or was
        killed for it: by SIGKILL, while the kernel counted such a kill.
        """
        if self.watch.elsewhere is not None:
            return self.watch.elsewhere
        rank, failure = root_cause(failures)
        if note := read_note(failure.message):
            return note if note.how == OUT_OF_MEMORY else None
        if self.watch.verdict or failure.exitcode != -signal.SIGKILL or oom_kills() <= self._oom_kills:
            return None
        lack = killed_shortage(rank, self.watch.beat(rank), self.watch.resident_bytes(rank))
        return lack.ended(self._nodes.world_size)

    def _where_the_traceback_is(self, failures: Mapping[int, ProcessFailure]) -> str:
        return end_of_note(root_cause(failures)[1].message) if self.watch.elsewhere is None else ""

    def _start(self) -> Start:
        ranks = os.environ.get("GPUNUM")
        command = f"GPUNUM={ranks} bash {PROG}" if ranks else f"bash {PROG}"
        return Start(command, self._nodes.world_size, self._nodes.ranks_per_node)

    def report_signal(self, signum: int) -> int:
        done = self.conclude(stopped_by(signum, 0, self._config.train_step), replace=False)
        print(stopped_by(signum, done, self._config.train_step).why, file=sys.stderr, flush=True)
        return 128 + signum

    def conclude(self, ended: Ended, *, replace: bool) -> int | None:
        """See commons.reporting.run_log; None where rank 0 is not: its machine counts the steps."""
        from commons.reporting.run_log import conclude

        if self._nodes.rank != 0:
            return None
        return conclude(self._config.run_dir, self._config, ended, self.watch.attempt, replace=replace)


def is_final(failures: Mapping[int, ProcessFailure]) -> bool:
    """Whether ranks that failed so would fail again: wrong settings, or an end on purpose."""
    return any(
        failure.exitcode == CONFIG_ERROR or read_note(failure.message) is not None for failure in failures.values()
    )


def root_cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first, of ``failures`` by rank in the order in which torchrun's engine saw them
    end.

    Its peers fail too, for want of it, and may end before it does. A rank whose exception was recorded failed
    when its error file was written. One that was killed wrote none: it is the cause if it was the first to
    end, or was killed by a signal that the engine had not yet begun to send.
    """
    first, start = next(iter(failures)), min(failure.timestamp for failure in failures.values())

    def order(rank: int) -> tuple[int, float]:
        failure = failures[rank]
        if os.path.isfile(failure.error_file):
            return 1, os.stat(failure.error_file).st_mtime
        by_itself = failure.exitcode < 0 and failure.exitcode not in (-signal.SIGTERM, -signal.SIGABRT)
        early = failure.timestamp - start < EARLY_SECONDS
        if (rank == first and failure.exitcode != -signal.SIGABRT) or (by_itself and early):
            return 0, failure.timestamp
        return 2, failure.timestamp

    rank = min(failures, key=order)
    return rank, failures[rank]


def _report_failure(error: ChildFailedError, nodes: Nodes, course: Course) -> int:
    """Print, last of all, the error of the rank that failed first; returns the launcher's exit code."""
    _, failure = root_cause(error.failures)
    if failure.exitcode == CONFIG_ERROR and not os.path.isfile(failure.error_file):
        return CONFIG_ERROR  # rank 0 has told the problems
    lines, ended = course.tell(error.failures)
    course.conclude(ended, replace=ended.how == OUT_OF_MEMORY or read_note(failure.message) is None)
    print("", *lines, sep="\n", file=sys.stderr, flush=True)
    if ended.how == "failed" and read_note(failure.message) is None:
        causes = _causes(failure, lines)
        if causes:
            print(f"\n{causes}", file=sys.stderr, flush=True)
    return ended.exit_code


def failure_lines(
    failures: Mapping[int, ProcessFailure], nodes: Nodes, verdict: Sequence[str]
) -> tuple[list[str], Ended]:
    """What is told of ranks that failed: of the one that hung, else of the one that failed first.

    Args:
        verdict: commons.launch.watch's lines, empty if no rank hung.

    Returns:
        Lines for the screen, and the same for summary.json.
    """
    if verdict:
        return list(verdict), Ended("hung", verdict[0])
    rank, failure = root_cause(failures)
    if note := read_note(failure.message):
        return [note.why], note
    message, stack = _message(failure)
    # what this rank printed lies somewhere among what the others did
    shows_stack = nodes.world_size > 1 and not needs_no_traceback(message)
    text = nodes.annotate(stack if shows_stack else message)
    head = f"Rank {rank} of {nodes.world_size} failed"
    lines = [f"{head}:", *text.strip().splitlines()] if text else [f"{head} ({_ending(failure)})."]
    code = failure.exitcode if failure.exitcode > 0 else FAILURE
    return lines, Ended("failed", f"{head}: {message}" if message else lines[0], code)


def _message(failure: ProcessFailure) -> tuple[str, str]:
    """What the rank's exception said, and that with its stack; empty where it left none."""
    details = failure.message if isinstance(failure.message, dict) else {}
    message = details.get("message", "")
    return message, details.get("extraInfo", {}).get("py_callstack", message)


def _causes(failure: ProcessFailure, lines: Sequence[str]) -> str:
    """What the doctor finds on this machine that explains a failure; where it finds nothing, the stack that an
    error which needs none was told without.
    """
    message, stack = _message(failure)
    return explanation(message or lines[0]) or (stack.rstrip() if needs_no_traceback(message) else "")


def _ending(failure: ProcessFailure) -> str:
    if failure.exitcode >= 0:
        return f"exit code {failure.exitcode}"
    name = failure.signal_name()
    if name != "SIGKILL":
        return f"killed by {name}"
    return f"killed by {name}, often because the machine ran out of memory: see `dmesg | tail`, or lower --batch_size"
