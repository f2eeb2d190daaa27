"""Reads a sweep from TOML: what is wrong with it, all of it at once, or its cells.

    about = "one line"            for --list
    minutes = 30                  no run starts that would end later; without it: no limit
    run_seconds = 420             a run that takes longer is ended
    repeats = 3
    extra = ["parity", "trace"]   each cell once more: beside the fp32 reference, and with a traced step

    [flags]                       of every cell: flags of train_gpt_demo.py
    [grid]                        every combination of these lists; [[grid]] for several
    [[exclude]]                   cells with all of these values are left out
    [[case]]                      one cell more: label ({gpus} in it is the number), gpus, its flags, and
                                  visible (CUDA_VISIBLE_DEVICES, or "last": the last GPU)

The axes of a grid are flags, ``gpus`` (numbers of ranks; "all": every GPU here) and ``global_batch`` (sequences per
step over all ranks). ``distplan = "all"`` and ``"data-parallel"`` stand for the plans.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from benchmarks.sweep.cell import Cell, Machine
from commons.cli.flags import read_value
from commons.cli.wording import either, nearest
from commons.config.schema import TrainConfig
from commons.plans.registry import PLANS
from model_zoo import MODEL_SIZES

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser, before Python had it
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

READY_MADE = Path(__file__).resolve().parent.parent / "sweeps"
HINTS = get_type_hints(TrainConfig)
# what the sweep itself decides
OWN_FLAGS = ("log_dir", "run_name", "check_parity", "trace_step")
FLAGS = tuple(f.name for f in dataclasses.fields(TrainConfig) if f.name not in OWN_FLAGS)
AXES = (*FLAGS, "gpus", "global_batch")
NAMES = {"distplan": PLANS, "model_type": MODEL_SIZES}
PLAN_SETS = {
    "all": tuple(PLANS),
    "data-parallel": tuple(name for name, plan in PLANS.items() if not plan.pipeline),
}
AXIS_WORDS = {
    "batch_size": "batch {}",
    "global_batch": "batch {} in all",
    "seq_len": "sequence {}",
    "placement": "placement {}",
    "tp_degree": "tp {}",
    "pp_degree": "pp {}",
    "precision": "{}",
}
EXTRAS = ("parity", "trace")


@dataclass(frozen=True)
class Sweep:
    """A sweep as read; see the module's text for its keys. Cells are in the order of the file."""

    name: str
    about: str
    cells: tuple[Cell, ...]
    repeats: int = 3
    minutes: float | None = None
    run_seconds: float = 420.0
    extra: tuple[str, ...] = ()


class SweepError(ValueError):
    """What is wrong with a sweep's file: a line per problem."""


# key -> what its value has to be, and the test of it
KEYS: dict[str, tuple[str, Any]] = {
    "about": ("a text", lambda value: isinstance(value, str)),
    "minutes": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "run_seconds": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "repeats": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "extra": (f"a list of {either(EXTRAS)}", lambda value: isinstance(value, list) and set(value) <= set(EXTRAS)),
    "flags": ("a table [flags]", lambda value: isinstance(value, dict)),
    "grid": ("a table [grid], or several [[grid]]", lambda value: _is_tables(value) or isinstance(value, dict)),
    "exclude": ("tables [[exclude]]", lambda value: _is_tables(value)),
    "case": ("tables [[case]]", lambda value: _is_tables(value)),
}


def ready_made() -> dict[str, Path]:
    """The sweeps that come with the suite, by name."""
    return {path.stem: path for path in sorted(READY_MADE.glob("*.toml"))}


def find_sweep(name: str) -> Path:
    """The file of a ready-made sweep or of a path. SweepError where there is neither."""
    if name in ready_made():
        return ready_made()[name]
    path = Path(name)
    if path.suffix != ".toml" and not path.exists():
        raise SweepError(f"no sweep {name!r}: {nearest(name, ready_made())}, or give a file that ends in .toml")
    if not path.is_file():
        raise SweepError(f"{name}: {'not a file' if path.exists() else 'no such file'}")
    return path


def read_sweep(path: Path, machine: Machine, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """The sweep in a file. SweepError with every problem of it.

    Args:
        overrides: flags of every cell that win over the file's [flags], not over its grid.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SweepError(f"{path}: cannot be read: {error}") from None
    found = list(_problems(table))
    if found:
        raise SweepError("\n".join(f"{path.name}: {problem}" for problem in found))
    flags = {**_typed(table.get("flags", {})), **(overrides or {})}
    cells = tuple(_cells(table, flags, machine))
    if not cells:
        raise SweepError(
            f"{path.name}: no cell is left: it needs a [grid] or a [[case]] that no [[exclude]] takes away"
        )
    options = {name: table[name] for name in ("repeats", "minutes", "run_seconds") if name in table}
    return Sweep(path.stem, table.get("about", ""), cells, extra=tuple(table.get("extra", ())), **options)


# ---- what is wrong


def _problems(table: Mapping[str, Any]) -> Iterator[str]:
    sound = {}
    for key, value in table.items():
        if key not in KEYS:
            yield f"unknown key {key!r}: {nearest(key, KEYS)}"
        elif not KEYS[key][1](value):
            yield f"{key} must be {KEYS[key][0]}, got {value!r}"
        else:
            sound[key] = value
    yield from _value_problems("flags", sound.get("flags", {}), FLAGS)
    for grid in _grids(sound):
        yield from _grid_problems(grid)
    for entry in sound.get("exclude", []):
        yield from _value_problems("exclude", {k: v for k, v in entry.items() if k != "why"}, AXES)
    for entry in sound.get("case", []):
        flags = {k: v for k, v in entry.items() if k not in ("label", "visible")}
        yield from _value_problems(f"case {entry.get('label', '')!r}", flags, AXES)
        if not isinstance(entry.get("label"), str):
            yield "case: needs a label"


def _grid_problems(grid: Mapping[str, Any]) -> Iterator[str]:
    for axis, values in grid.items():
        if axis in AXES and not values and values != 0:
            yield f"grid.{axis} is empty: give it a value, or leave it out"
    yield from _value_problems("grid", grid, AXES)
    if "global_batch" in grid and "batch_size" in grid:
        yield "grid has batch_size and global_batch: keep one of them"


def _value_problems(where: str, values: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    for name, value in values.items():
        if name not in names:
            reason = "the sweep sets it itself" if name in OWN_FLAGS else nearest(name, names) if len(name) > 2 else ""
            yield f"{where}: unknown key {name!r}: {reason}"
            continue
        for one in value if isinstance(value, list) else [value]:
            try:
                _read(name, one)
            except ValueError as error:
                yield f"{where}.{name}: {error}"


def _read(name: str, value: Any) -> Any:
    """The typed value of an axis. ValueError where it has none."""
    if name in ("gpus", "global_batch"):
        if name == "gpus" and value == "all":
            return value
        if type(value) is not int or value < 1:
            raise ValueError(f"must be a whole number above 0{' or all' * (name == 'gpus')}, got {value!r}")
        return value
    if isinstance(value, (dict, list)):
        raise ValueError(f"must be a value or a list of values, got {value!r}")
    if name == "distplan" and value in PLAN_SETS:
        return value
    if name in NAMES and value not in NAMES[name]:
        raise ValueError(f"{value!r} does not exist: {nearest(str(value), NAMES[name])}")
    return read_value(name, str(value), HINTS[name], label=name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


# ---- its cells


def _grids(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    grid = table.get("grid", [])
    return grid if isinstance(grid, list) else [grid]


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _read(name, value) for name, value in values.items()}


def _cells(table: Mapping[str, Any], flags: Mapping[str, Any], machine: Machine) -> Iterator[Cell]:
    excluded = [{k: v for k, v in entry.items() if k != "why"} for entry in table.get("exclude", [])]
    seen = set()
    grids = [{name: _values(name, values, machine) for name, values in grid.items()} for grid in _grids(table)]
    told = _told_axes(grids)
    for axes in grids:
        for combination in itertools.product(*axes.values()):
            point = dict(zip(axes, combination, strict=True))
            if not any(_matches(point, entry, machine) for entry in excluded):
                cell = _cell(_label(point, told), point, flags)
                if cell.id not in seen:
                    seen.add(cell.id)
                    yield cell
    for entry in table.get("case", []):
        point = {k: v if v != "all" else machine.ranks for k, v in entry.items() if k not in ("label", "visible")}
        visible = entry.get("visible")
        visible = str(machine.ranks - 1) if visible == "last" else visible
        label = entry["label"].replace("{gpus}", str(point.get("gpus", 1)))
        yield _cell(label, _typed(point), flags, visible)


def _values(axis: str, values: Any, machine: Machine) -> list[Any]:
    """The values of an axis, each once; a single one may stand without a list."""
    listed = [_read(axis, value) for value in (values if isinstance(values, list) else [values])]
    if axis == "distplan":
        listed = [name for value in listed for name in PLAN_SETS.get(value, (value,))]
    if axis == "gpus":
        listed = [machine.ranks if value == "all" else value for value in listed]
    return list(dict.fromkeys(listed))


def _matches(point: Mapping[str, Any], entry: Mapping[str, Any], machine: Machine) -> bool:
    return all(name in point and point[name] in _values(name, values, machine) for name, values in entry.items())


def _told_axes(grids: list[dict[str, list[Any]]]) -> set[str]:
    """The axes that differ between cells, within a grid or from one to another."""
    names = {name for axes in grids for name in axes}
    by_axis = {name: [axes.get(name, [None]) for axes in grids] for name in names}
    return {name for name, lists in by_axis.items() if len({value for values in lists for value in values}) > 1}


def _label(point: Mapping[str, Any], told: set[str]) -> str:
    """Plan and size, whatever else differs between the cells, and the ranks."""
    words = [str(point[name]) for name in NAMES if name in point]
    for name, value in point.items():
        if name in told and name not in (*NAMES, "gpus"):
            words.append(AXIS_WORDS.get(name, f"{name} {{}}").format(value))
    return f"{', '.join(words) or 'defaults'} × {point.get('gpus', 1)}"


def _cell(label: str, point: Mapping[str, Any], flags: Mapping[str, Any], visible: str | None = None) -> Cell:
    settings = {**flags, **point}
    gpus = settings.pop("gpus", 1)
    total = settings.pop("global_batch", None)
    if total is not None:
        ranks = gpus // (settings.get("tp_degree", 1) * settings.get("pp_degree", 1))
        if not ranks or total % ranks:
            raise SweepError(f"{label}: a global_batch of {total} cannot be split over {ranks} data-parallel ranks")
        settings["batch_size"] = total // ranks
    return Cell(label, settings, gpus, visible)
