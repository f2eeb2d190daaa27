"""Mutation testing: bash run_tests.sh --mutate [MODULE ...], MODULE being a name of targets.TARGETS; all without one.

Every mutant of a module (mutants.py) is tried by the module's own tests, two at a time, each in a fork of a process
that has imported torch and transformers already, on a copy of the suite. Survivors are told, but for those that
EQUIVALENT (equivalent.py) explains. The score is what tests notice of all that could be noticed; below LEAST_SCORE the
exit code is 1, and 2 for a name that is none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from equivalent import EQUIVALENT
from mutants import Mutant, mutants_of
from planted import copy_of_the_suite
from targets import TARGETS, Target

LEAST_SCORE = 0.95
AT_ONCE = 2
# Of the tests without a mutant: what is slower hangs, as a loop without an end does.
PATIENCE, LEAST_SECONDS = 4, 20
PYTEST = "-x -q -p no:cacheprovider -p no:randomly"


@dataclass
class Result:
    """What became of a module's mutants.

    Attributes:
        equivalent: survivors that EQUIVALENT explains.
    """

    name: str
    noticed: int = 0
    equivalent: int = 0
    survivors: list[Mutant] = field(default_factory=list)

    @property
    def score(self) -> float:
        """Of those that could be noticed."""
        return self.noticed / max(1, self.noticed + len(self.survivors))

    def __str__(self) -> str:
        of = self.noticed + len(self.survivors)
        return f"{self.name:16} {self.noticed:4} of {of:4} noticed, {self.score:6.1%}; equivalent: {self.equivalent}"


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Inside, this process writes into ``log``."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    yield


def forked(work: Callable[[], int]) -> int:
    """``work`` in a process of its own session; returns its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    try:
        code = work()
    except BaseException:
        code = 1
    os._exit(code)


def tests_in(folder: Path, arguments: str) -> int:
    """pytest's exit code, with the suite as it is in ``folder``. For a forked process."""
    import shlex

    import pytest

    os.chdir(folder)
    sys.path[:] = [str(folder), *sys.path]
    os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    with quiet(folder / "pytest.txt"):
        return int(pytest.main([*PYTEST.split(), *shlex.split(arguments)]))


class Slots:
    """Copies of the suite, each with at most one forked process at work on it."""

    def __init__(self, folder: Path) -> None:
        self.free = [copy_of_the_suite(folder / str(number)) for number in range(AT_ONCE)]
        self._busy: dict[int, tuple[Path, float, Callable[[int], None]]] = {}

    def start(self, work: Callable[[Path], int], seconds: float, done: Callable[[int], None]) -> None:
        """``work`` in a free copy, after waiting for one; then ``done`` with its exit code, 124 after ``seconds``."""
        while not self.free:
            self._collect()
        copy = self.free.pop()
        pid = forked(lambda: work(copy))
        self._busy[pid] = (copy, time.monotonic() + seconds, done)

    def finish(self) -> None:
        while self._busy:
            self._collect()

    def _collect(self) -> None:
        for pid, (copy, deadline, done) in list(self._busy.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            late = not ended and time.monotonic() > deadline
            if not ended and not late:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            if late:
                os.waitpid(pid, 0)
            del self._busy[pid]
            self.free.append(copy)
            done(124 if late else os.waitstatus_to_exitcode(status))
        time.sleep(0.02)


def seconds_without_a_mutant(target: Target, slots: Slots) -> float:
    """RuntimeError where the tests do not pass as they are."""
    codes: list[int] = []
    began = time.monotonic()
    slots.start(lambda copy: tests_in(copy, target.tests), 600, codes.append)
    slots.finish()
    if codes != [0]:
        log = (slots.free[-1] / "pytest.txt").read_text()[-3000:]
        raise RuntimeError(
            f"{target.path}: its tests end with {codes} though nothing is changed: {target.tests}\n{log}"
        )
    return time.monotonic() - began


def try_mutants(name: str, target: Target, slots: Slots) -> Result:
    """Every mutant of a module."""
    limit = max(LEAST_SECONDS, PATIENCE * seconds_without_a_mutant(target, slots))
    source = (slots.free[0] / target.path).read_text()
    result = Result(name)

    def judge(mutant: Mutant, code: int) -> None:
        if code != 0:
            result.noticed += 1
        elif (target.path, mutant.before, mutant.after) in EQUIVALENT:
            result.equivalent += 1
        else:
            result.survivors.append(mutant)
            print(f"  survived  {target.path}:{mutant}", flush=True)

    def work(copy: Path, mutant: Mutant) -> int:
        path = copy / target.path
        path.write_text(mutant.text)
        return tests_in(copy, target.tests)

    for mutant in mutants_of(source):
        slots.start(
            lambda copy, mutant=mutant: work(copy, mutant), limit, lambda code, mutant=mutant: judge(mutant, code)
        )
    slots.finish()
    for copy in slots.free:
        (copy / target.path).write_text(source)
    return result


def main(names: Sequence[str]) -> int:
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        print(f"no module {', '.join(unknown)}: take of {', '.join(TARGETS)}, or planted", file=sys.stderr)
        return 2
    chosen = {name: TARGETS[name] for name in names or TARGETS}
    if not all(target.light for target in chosen.values()):
        import torch  # noqa: F401  once for all forks
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    results = []
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        slots = Slots(Path(folder))
        for name, target in chosen.items():
            results.append(try_mutants(name, target, slots))
            print(results[-1], flush=True)
    whole = Result("all", sum(r.noticed for r in results), sum(r.equivalent for r in results))
    whole.survivors = [mutant for result in results for mutant in result.survivors]
    print(whole)
    return 0 if all(result.score >= LEAST_SCORE for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
