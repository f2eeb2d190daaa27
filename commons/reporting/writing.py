"""Writing a run's files: strict JSON, whole files or none, and errors that say what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from commons.lifecycle.outcome import RunError

# --- Failing to write -----------------------------------------------------------------------------

CURES = {
    errno.ENOSPC: "free some space there, or choose another disk with --log_dir",
    errno.EDQUOT: "free some of your quota, or choose another disk with --log_dir",
    errno.EACCES: "choose a folder you may write to with --log_dir",
    errno.EPERM: "choose a folder you may write to with --log_dir",
    errno.EROFS: "choose a folder you may write to with --log_dir",
    errno.EPIPE: "whatever read the output has ended: keep it open, or send the output to a file",
}
OTHER_CURE = "check the disk, or choose another folder with --log_dir"


class SinkError(OSError, RunError):
    """Something could not be written. Its text is one line: the file, why, and what to do about it."""

    def __str__(self) -> str:
        return self.strerror or ""  # OSError would put "[Errno 28]" before it


@contextlib.contextmanager
def writing(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError inside the block into a SinkError about the file `name`."""
    try:
        yield
    except SinkError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        cure = CURES.get(error.errno or 0, OTHER_CURE)
        raise SinkError(error.errno, f"cannot write {os.fspath(name)}: {reason}; {cure}") from None


# --- JSON -----------------------------------------------------------------------------------------


def json_ready(value: Any, path: str, non_finite: dict[str, str]) -> Any:
    """A copy of `value` that strict JSON can hold: NaN and infinities become None.

    Args:
        value: anything of dataclasses, dicts, sequences, numbers, strings, numpy or torch scalars, and paths.
        path: where `value` lies in the whole, in dots.
        non_finite: is given {path: "nan", "inf" or "-inf"} for every number that JSON has no word for.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    scalar = getattr(value, "item", None)  # of numpy or torch
    if callable(scalar):
        value = scalar()
    if isinstance(value, float) and not math.isfinite(value):
        non_finite[path] = str(value)
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # a path that is no valid text holds lone surrogates
    if value is None or isinstance(value, (bool, int, float)):
        return value
    prefix = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item, f"{prefix}{key}", non_finite) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_ready(item, f"{prefix}{index}", non_finite) for index, item in enumerate(value)]
    return json_ready(str(value), path, non_finite)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON of a dict or dataclass; what was NaN or infinite is null and named under "non_finite"."""
    non_finite: dict[str, str] = {}
    ready = json_ready(value, "", non_finite)
    if non_finite:
        ready["non_finite"] = non_finite
    return json.dumps(ready, indent=indent, allow_nan=False, ensure_ascii=False)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` whole or not at all: a reader never sees half a file. Raises SinkError."""
    text = to_json(value, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
