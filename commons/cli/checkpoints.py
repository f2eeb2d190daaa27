"""Checks of where checkpoints go, and of the one that a run is to go on from."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

from commons.cli.job import Job
from commons.cli.output import folder_problem
from commons.config.schema import RESUME_AUTO
from commons.lifecycle.guard import WATCH_VARIABLE
from commons.lifecycle.job import read_job
from model_zoo import parameter_count

STATE_BYTES = 12  # a parameter: master and two moments in fp32
GIB = 2**30


def saving(job: Job) -> Iterator[str]:
    """A folder that cannot be written to, or has no room for one checkpoint."""
    config = job.config
    if not config.save_every:
        yield from (
            f"--{name} has no effect without --save_every: add --save_every 100, or remove it"
            for name in ("keep", "save_dir")
            if name in job.typed and not (name == "save_dir" and config.resume == RESUME_AUTO)
        )
        return
    folder = config.checkpoint_dir
    if config.save_dir:
        yield from folder_problem(folder, "save_dir")
    existing = next((path for path in (folder, *folder.parents) if path.is_dir()), None)
    if existing is None or job.shape is None:
        return
    needed, free = STATE_BYTES * parameter_count(job.shape), shutil.disk_usage(existing).free
    if free < needed:
        yield (
            f"--save_dir {folder}: a checkpoint takes {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free: free"
            " some space there, or choose another --save_dir"
        )


def resuming(job: Job) -> Iterator[str]:
    """A checkpoint that is damaged, or that contradicts the settings; all contradictions at once."""
    config = job.config
    if not config.resume:
        return
    if config.check_parity:
        yield "--check_parity compares with a training from its first step: remove --resume, or --check_parity"
    if config.resume == RESUME_AUTO and not {"save_dir", "run_name"} & job.typed:
        yield (
            "--resume auto looks in --save_dir, or else in the folder of --run_name: give one of them, or --resume PATH"
        )
        return
    if WATCH_VARIABLE in os.environ or job.shape is None:
        return  # the launcher has looked
    yield from _of_the_checkpoint(job)


def _of_the_checkpoint(job: Job) -> Iterator[str]:
    # with torch, which settings without a checkpoint are read without
    from commons.checkpoint.contract import contradictions
    from commons.checkpoint.files import CheckpointError
    from commons.checkpoint.resume import find
    from commons.checkpoint.store import Checkpoint, verified

    config = job.config
    try:
        # every byte is looked at once on a machine, though all of its ranks judge the settings
        found = find(config, verified if read_job().local_rank == 0 else Checkpoint)
    except CheckpointError as error:
        yield str(error)
        return
    if found.checkpoint is not None:
        # data that cannot be opened are no contradiction: their own check tells
        with contextlib.suppress(ValueError, OSError):
            yield from contradictions(found.checkpoint, config, job.world_size)
