"""Before any model is built: whether the run fits into the memory that is really free, and what would."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from commons.cli import flags
from commons.cli.less_memory import given_settings
from commons.cli.planning import settings_of
from commons.config.resolved import ResolvedConfig
from commons.config.schema import as_words
from commons.lifecycle.guard import WATCH_VARIABLE
from commons.lifecycle.job import JobPlace, read_job
from commons.lifecycle.notices import say
from commons.lifecycle.outcome import DOES_NOT_FIT, FINISHED, Ended

if TYPE_CHECKING:
    from commons.distributed.device import Device
    from commons.planner.fit import Proposal, Short
    from commons.planner.memory import Forecast
    from commons.planner.room import Room

PROPOSAL_SECONDS = 30.0  # for the search of what fits


def preflight(config: ResolvedConfig, here: Device) -> Ended:
    """Hold the run against the free memory of every rank's device and machine (collective).

    Returns:
        How the run ends at once where it does not fit, the same on every rank; FINISHED where it does.
    """
    from commons.distributed.process_group import every_rank, first_rank_s

    if config.no_preflight:
        return FINISHED
    job = read_job()
    room, lacking = _look(config, here, job)
    if every_rank(not lacking, here.torch_device):
        return FINISHED
    rooms, found = _everyone(room, lacking)
    text = refusal(config, job, rooms, found) if here.rank == 0 else ""
    return Ended("does not fit", first_rank_s(text), DOES_NOT_FIT)


def _look(config: ResolvedConfig, here: Device, job: JobPlace) -> tuple[Room | None, list[Short]]:
    """The room of this rank and what it lacks there. A fault of the planner's own keeps no run from starting."""
    from commons.planner.room import find_room

    try:
        room = find_room(config.device == "cuda", here.local_rank, job.rank // job.local_world_size)
        return room, lacks(config, job, room)
    except Exception as error:
        say(f"memory was not planned ({type(error).__name__}: {error}): starting without the preflight")
        return None, []


def lacks(config: ResolvedConfig, job: JobPlace, room: Room) -> list[Short]:
    """What the run lacks where this rank is; a guess that is high and quick settles most launches."""
    from commons.planner.fit import shortages

    for rough in (True, False):
        found = shortages(_forecast(config, job, room, rough), room, job.local_rank)
        if not found:
            break
    return found


def _forecast(config: ResolvedConfig, job: JobPlace, room: Room, rough: bool) -> Forecast:
    from commons.planner.memory import forecast

    return forecast(config, job.world_size, job.local_world_size, room.gpu, rough=rough)


def _everyone(room: Room | None, lacking: list[Short]) -> tuple[list[Room], list[Short]]:
    """Every rank's room, as far as it is known, and what is lacking anywhere (collective)."""
    import torch.distributed as dist

    all_of_them: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, (room, lacking))
    return [room for room, _ in all_of_them if room is not None], [short for _, lacks in all_of_them for short in lacks]


def refusal(config: ResolvedConfig, job: JobPlace, rooms: Sequence[Room], lacking: Iterable[Short]) -> str:
    """What is told of a run that does not fit: what is short where, and complete commands that fit."""
    short = [f"  - {line}" for line in dict.fromkeys(map(str, lacking))]
    lines = ["The run does not fit into the memory that is free here; no model was built:", *short]
    fitting = [command(given_of(config) | dict(each.changed), job) for each in what_fits(config, job, rooms)]
    if fitting:
        lines += ["What fits, fastest first:", *(f"    {line}" for line in fitting)]
    else:
        lines += ["Nothing near it fits: use a smaller --model_type, or more GPUs or memory."]
    return "\n".join([*lines, "--dry_run true shows the memory by kind; --no_preflight true starts anyway."])


def what_fits(config: ResolvedConfig, job: JobPlace, rooms: Sequence[Room]) -> list[Proposal]:
    """Up to three runs near this one; each of their commands is read again, planned again, and found to fit."""
    from commons.planner.fit import proposals, shortages

    given, end = given_of(config), time.monotonic() + PROPOSAL_SECONDS

    def judged(changed: Mapping[str, Any]) -> ResolvedConfig | None:
        if time.monotonic() > end:
            return None
        line = flags.read_flags(as_words({**given, **changed}))
        resolved, found = flags.judge(line, job.world_size, job.local_world_size)
        return None if found else resolved

    def fits(plan: Forecast) -> bool:
        return not any(shortages(plan, room) for room in rooms)

    smallest = min(rooms, key=lambda room: (room.gpu.capability if room.gpu else (0, 0), room.device or 0))
    return proposals(config, job.world_size, judged, lambda asked, rough: _forecast(asked, job, smallest, rough), fits)


def given_of(config: ResolvedConfig) -> dict[str, Any]:
    """The settings that the user gave and that are not the defaults anyway, without those of one run alone."""
    given = settings_of(given_settings(config))
    return {name: value for name, value in given.items() if name != "device"}


def command(settings: Mapping[str, Any], job: JobPlace) -> str:
    """The complete command of such a run, started as this one was."""
    words = shlex.join(as_words(settings))
    if WATCH_VARIABLE in os.environ:
        start = f"GPUNUM={job.local_world_size} bash run_gemini.sh"
        nodes = job.world_size // job.local_world_size
        start = f"NNODES={nodes} {start}" if nodes > 1 else start
    elif job.world_size > 1:
        start = f"torchrun --nproc_per_node {job.local_world_size} train_gpt_demo.py"
    else:
        start = "python train_gpt_demo.py"
    return f"{start} {words}".rstrip()
