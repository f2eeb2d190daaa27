"""Checkpoints in a folder: finding them, verifying them, and reading boxes of their tensors."""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from commons.checkpoint.files import (
    STATE_FILE,
    CheckpointError,
    check_hashes,
    check_sizes,
    read_index,
    read_state,
    sync_folder,
)
from commons.plans.states import KINDS

PREFIX, TEMPORARY = "step-", "."  # whole ones, and what is being written or removed
CHECKPOINTS = "checkpoints"  # the folder of a run's folder that holds them by default


class Checkpoint:
    """A checkpoint on disk, open for reading. Its state.json is unaltered; verify() looks at the rest.

    Attributes:
        state: what state.json holds, see commons.checkpoint.keeper.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError."""
        self.folder = folder
        self.state = read_state(folder)

    @property
    def step(self) -> int:
        return self.state["step"]

    @functools.cached_property
    def index(self) -> dict[str, Any]:
        return read_index(self.folder)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by HuggingFace's name, the vocabulary unpadded, the tied head left out."""
        return {name: tuple(entry["shape"]) for name, entry in self.index["tensors"].items()}

    def verify(self, *, sizes_only: bool = False) -> None:
        """Raises CheckpointError, which names every file that is not what was written."""
        found = (check_sizes if sizes_only else check_hashes)(self.folder, self.state["files"])
        if found:
            raise CheckpointError("; ".join(found))

    def read(self, name: str, kind: str = "master") -> torch.Tensor:
        """A whole tensor, fp32 on the host. ``kind``: one of commons.plans.states.KINDS."""
        whole = torch.empty(self.shapes[name])
        self.read_into(name, kind, (0,) * whole.ndim, whole)
        return whole

    def read_into(self, name: str, kind: str, offsets: Sequence[int], box: torch.Tensor) -> None:
        """Fill ``box``, fp32 on any device, with the part of the tensor that begins at ``offsets``."""
        filled = 0
        for file, begins, sizes, first_byte in self.index["tensors"][name]["boxes"][kind]:
            low = [max(a, b) for a, b in zip(offsets, begins, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, box.shape, begins, sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            stored = np.memmap(self.folder / file, dtype="<f4", mode="c", offset=first_byte, shape=tuple(sizes))
            source = torch.from_numpy(stored[_slices(low, high, begins)])
            box[_slices(low, high, offsets)].copy_(source)
            filled += source.numel()
        if filled != box.numel():
            raise CheckpointError(f"{self.folder}: {kind} of {name} is not whole: {filled} of {box.numel()} elements")

    def generators(self, rank: int) -> dict[str, bytes]:
        """The states of that rank's random generators, by name."""
        states = {}
        for name, (file, first_byte, size) in self.index["generators"][str(rank)].items():
            with open(self.folder / file, "rb") as stream:
                stream.seek(first_byte)
                states[name] = stream.read(size)
        return states


def _slices(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def not_whole(index: dict[str, Any]) -> list[str]:
    """The states whose boxes do not make up the whole tensor, by name and kind."""
    return [
        f"{kind} of {name}"
        for name, entry in index["tensors"].items()
        for kind in KINDS
        if sum(math.prod(box[2]) for box in entry["boxes"].get(kind, ())) != math.prod(entry["shape"])
    ]


def checkpoint_folders(save_dir: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first; what is half written is none."""
    found = [path.parent for path in save_dir.glob(f"{PREFIX}*/{STATE_FILE}")]
    found += [path for path in save_dir.glob(f"{PREFIX}*") if path.is_dir() and path not in found]
    return sorted(found, key=_age, reverse=True)


def _age(folder: Path) -> tuple[float, str]:
    try:
        return float(read_state(folder)["saved_at"]), folder.name
    except (CheckpointError, KeyError, TypeError, ValueError):
        return folder.stat().st_mtime, folder.name


def newest_whole(save_dir: Path, look: Callable[[Path], Checkpoint]) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in a folder that ``look`` finds whole, None where there is none; and what is wrong with
    those passed over, a sentence each.
    """
    passed_over = []
    for folder in checkpoint_folders(save_dir):
        try:
            return look(folder), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


@functools.cache
def verified(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, every byte of it looked at, once in a process. Raises CheckpointError."""
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    return checkpoint


def free_name(save_dir: Path, step: int) -> Path:
    """Where a checkpoint of ``step`` goes: another one of that step, of a training that went another way, stays."""
    name = f"{PREFIX}{step:08d}"
    path, number = save_dir / name, 1
    while path.exists():
        number += 1
        path = save_dir / f"{name}-{number}"
    return path


def remove_all_but(save_dir: Path, keep: int) -> None:
    """Remove the older checkpoints: first out of sight, so that no half of one is left behind."""
    for folder in checkpoint_folders(save_dir)[keep:]:
        away = folder.with_name(f"{TEMPORARY}removing-{folder.name}-{time.time_ns()}")
        folder.rename(away)
        shutil.rmtree(away)
    sync_folder(save_dir)


def leftovers(save_dir: Path) -> Iterator[Path]:
    """What a run that was killed had begun to write, or to remove."""
    for kind in ("writing", "removing"):
        yield from save_dir.glob(f"{TEMPORARY}{kind}-*")
