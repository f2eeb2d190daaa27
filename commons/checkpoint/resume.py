"""Which checkpoint a run goes on from, and how a model is filled from it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from commons.checkpoint.files import STATE_FILE, CheckpointError
from commons.checkpoint.store import CHECKPOINTS, Checkpoint, checkpoint_folders, newest_whole, verified
from commons.config.resolved import ResolvedConfig
from commons.config.schema import RESUME_AUTO
from commons.lifecycle.guard import WATCH_VARIABLE
from commons.lifecycle.job import read_job
from commons.plans.states import Counters
from commons.plans.trainable import Trainable


class Found(NamedTuple):
    """What ``--resume`` comes out as: None where a training begins; and what the user is told, a line each."""

    checkpoint: Checkpoint | None
    notices: tuple[str, ...] = ()


def find(config: ResolvedConfig, look: Callable[[Path], Checkpoint] = verified) -> Found:
    """The checkpoint to go on from, each byte of it verified unless ``look`` looks less closely.

    After a restart by the launcher it is the newest of this
    run's own, as it is with ``--resume auto``.

    Raises:
        CheckpointError: there is none that is whole, though there are checkpoints, or though one was named.
    """
    if read_job().attempt > 1:
        own = _newest(config.checkpoint_dir, look)
        if own.checkpoint is not None or config.resume in ("", RESUME_AUTO):
            return own
    if config.resume == "":
        return Found(None)
    if config.resume == RESUME_AUTO:
        return _newest(config.checkpoint_dir, look)
    return _named(Path(config.resume).expanduser(), look)


def _named(path: Path, look: Callable[[Path], Checkpoint]) -> Found:
    """``path``: a checkpoint, a folder of checkpoints, or a run's folder."""
    if (path / STATE_FILE).exists() or not any(_save_dirs(path)):
        if not path.is_dir():
            raise CheckpointError(f"--resume {path}: there is no such folder")
        if not (path / STATE_FILE).exists():
            raise CheckpointError(
                f"--resume {path}: no checkpoint is there: name a checkpoint's folder (it has a {STATE_FILE}), one of"
                " checkpoints, or a run's"
            )
        # the launcher has looked at every byte, and given its ranks the checkpoint's own folder
        return Found(Checkpoint(path) if WATCH_VARIABLE in os.environ else look(path))
    return _newest(next(_save_dirs(path)), look)


def _save_dirs(path: Path) -> Iterator[Path]:
    return (folder for folder in (path / CHECKPOINTS, path) if folder.is_dir() and checkpoint_folders(folder))


def _newest(save_dir: Path, look: Callable[[Path], Checkpoint]) -> Found:
    checkpoint, passed_over = newest_whole(save_dir, look)
    if checkpoint is None and passed_over:
        text = "; ".join(passed_over)
        raise CheckpointError(f"no checkpoint in {save_dir} is whole: {text}: move them away to begin anew")
    if checkpoint is None:
        return Found(None, (f"no checkpoint in {save_dir} yet: the training begins at its first step",))
    return Found(checkpoint, tuple(f"passed over: {text}" for text in passed_over))


def load(checkpoint: Checkpoint, trainable: Trainable) -> None:
    """Fill this rank's part of the model and its optimizer (collective)."""
    with torch.no_grad():
        for piece in trainable.states():
            for box in piece.boxes:
                checkpoint.read_into(piece.name, piece.kind, box.offsets, box.tensor)
    names = {field.name for field in dataclasses.fields(Counters)}
    trainable.set_counters(Counters(**{name: checkpoint.state["counters"][name] for name in names}))
    trainable.after_load()
