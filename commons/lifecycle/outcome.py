"""How a run can end: in words for summary.json and the screen, as an exit code, and as a note to the launcher.

| how           | exit code | because of |
|---------------|-----------|------------|
| finished      | 0         | all steps are done (--check_parity: 1 after a difference, 3 where it could not compare) |
| SIGTERM, ...  | 128 + n   | a signal asked for it |
| bad steps     | 1         | --max_bad_steps losses in a row were not finite |
| failed        | 1, or the rank's own | an exception, a killed rank, a log that could not be written |
| hung          | 1         | no rank moved for --timeout |
| does not fit  | 3         | the memory that is free is too small, and no model was built |
| out of memory | 4         | a rank asked for more memory than there was, or the kernel killed one for it |

docs/endings.md has all exit codes, those of what never became a run among them.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OUT_OF_MEMORY = "out of memory"
HOW = ("finished", "bad steps", "failed", "hung", "does not fit", OUT_OF_MEMORY)  # and the names of STOP_SIGNALS
# Ctrl-C, `kill`, a closed terminal, Ctrl-\ and what Slurm can be asked to send before the time limit. Each asks
# for an orderly end.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
FAILURE = 1
NOTHING_PROVED = 3  # --check_parity had something that it could not compare: neither a success nor a difference
DOES_NOT_FIT = 3
OUT_OF_MEMORY_CODE = 4
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"  # where torchrun's engine looks for what a rank died of


class RunError(Exception):
    """Ends the run with ``exit_code``. Its text says all there is to say: no traceback is shown."""

    exit_code = FAILURE


@dataclass(frozen=True)
class Ended:
    """The end of a run.

    Attributes:
        how: the first column of the module's table.
        why: a sentence for whoever looks at the screen; "" when there is nothing to explain.
        details: what summary.json says beyond that, by its keys there; ready for JSON.
    """

    how: str
    why: str = ""
    exit_code: int = FAILURE
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.how in HOW or self.how in {signum.name for signum in STOP_SIGNALS}, self.how


FINISHED = Ended("finished", exit_code=0)


def stopped_by(signum: int, steps_done: int | None, steps: int) -> Ended:
    """The end that a signal asked for. ``steps_done`` is None where another machine counts them."""
    name = signal.Signals(signum).name
    how_far = f" after step {steps_done} of {steps}" if steps_done else " before the first step was done"
    return Ended(name, f"Stopped by {name}{'' if steps_done is None else how_far}.", 128 + signum)


def leave_note(ended: Ended, last: str = "") -> None:
    """Tell torchrun's engine, where there is one, that this rank ends on purpose.

    The launcher shows the text as it is, ``last`` last of all, and does not start the ranks again.
    """
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path:
        extra = {"py_callstack": ended.why, "timestamp": str(int(time.time()))}
        message = {
            "message": ended.why,
            "errorCode": ended.exit_code,
            "extraInfo": extra,
            "on_purpose": ended.how,
            "details": dict(ended.details),
            "last": last,
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)


def read_note(message: Any) -> Ended | None:
    """What leave_note() left, from a ProcessFailure's message; None if the rank did not end on purpose."""
    if isinstance(message, Mapping) and "on_purpose" in message:
        return Ended(message["on_purpose"], message["message"], message["errorCode"], message.get("details", {}))
    return None


def end_of_note(message: Any) -> str:
    """What leave_note() was to have shown last of all."""
    return message.get("last", "") if isinstance(message, Mapping) else ""
