"""Keeps a training: goes on from a checkpoint, writes new ones while the ranks train, and has the last on disk at the
end.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
import time
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from commons.checkpoint.contract import changes, contradictions, fixed
from commons.checkpoint.files import FORMAT, VERSION, CheckpointError
from commons.checkpoint.generators import generator_states, set_generator_states
from commons.checkpoint.host_copy import HostCopy
from commons.checkpoint.initial import fill_weights
from commons.checkpoint.resume import find, load
from commons.checkpoint.store import TEMPORARY, Checkpoint, leftovers
from commons.checkpoint.writer import Order, Writing
from commons.config.resolved import ResolvedConfig
from commons.config.schema import RANDOM_WEIGHTS
from commons.distributed.device import Device
from commons.distributed.layout import place
from commons.distributed.process_group import first_rank_s
from commons.distributed.seeding import seed_generators, seed_of
from commons.lifecycle.guard import Guard
from commons.lifecycle.notices import say
from commons.lifecycle.outcome import Ended
from commons.plans.states import Progress
from commons.plans.trainable import Trainable
from commons.reporting.run_folder import lock_folder
from commons.reporting.writing import json_ready, writing

BEAT_SECONDS = 1.0  # between a waiting rank's signs of life
MIB = 2**20
PACKAGES = ("torch", "colossalai", "transformers", "safetensors")


def open_keeper(trainable: Trainable, config: ResolvedConfig, device: Device, guard: Guard) -> Checkpoints:
    """Fill ``trainable`` from the checkpoint that ``--resume`` names, if any, or else from ``--init_from``, and be
    ready to write new ones (collective).

    Raises:
        RunError: the checkpoint is damaged or contradicts the settings, or the save folder is another run's or cannot
            be written to.
    """
    checkpoint = _agreed(config, device)
    if checkpoint is None:
        if config.init_from != RANDOM_WEIGHTS:
            fill_weights(config.init_from, trainable)
            say(f"the weights of {config.init_from} are what the training begins with")
        return Checkpoints(trainable, config, device, guard)
    load(checkpoint, trainable)
    _continue_generators(checkpoint, config, device)
    say(f"going on after step {checkpoint.step}, from {checkpoint.folder}")
    for change in changes(checkpoint, config):
        say(f"changed since: {change}")
    return Checkpoints(trainable, config, device, guard, checkpoint)


def _agreed(config: ResolvedConfig, device: Device) -> Checkpoint | None:
    """The checkpoint to go on from, which rank 0 has verified, on every rank (collective)."""
    path = ""
    if device.rank == 0:
        found = find(config)
        for line in found.notices:
            say(line)
        path = str(found.checkpoint.folder) if found.checkpoint else ""
    path = first_rank_s(path)
    if not path:
        return None
    checkpoint = Checkpoint(Path(path))
    problems = contradictions(checkpoint, config, device.world_size)
    if problems:
        raise CheckpointError("\n".join(problems))
    return checkpoint


def _continue_generators(checkpoint: Checkpoint, config: ResolvedConfig, device: Device) -> None:
    """On the same ranks the states that were saved; on others new ones, from which no step before has drawn."""
    if checkpoint.state["layout"] == _layout(config, device):
        set_generator_states(checkpoint.generators(device.rank), device.torch_device)
        return
    here = place(device.rank, tp_degree=config.tp_degree, pp_degree=config.pp_degree)
    seed_generators(seed_of(config.seed, f"after step {checkpoint.step}"), here)


def _layout(config: ResolvedConfig, device: Device) -> dict[str, Any]:
    """What a rank's random numbers depend on."""
    return {
        "device": device.type,
        "world_size": device.world_size,
        "dp": config.data_parallel_size(device.world_size),
        "tp": config.tp_degree,
        "pp": config.pp_degree,
    }


class Checkpoints:
    """A commons.training.keeping.Keeper that writes a checkpoint after every ``--save_every`` steps and the last one.

    Attributes:
        progress: see there.
    """

    def __init__(
        self,
        trainable: Trainable,
        config: ResolvedConfig,
        device: Device,
        guard: Guard,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._trainable, self._config, self._device, self._guard = trainable, config, device, guard
        self._save_dir = config.checkpoint_dir
        self._writing: Writing | None = None
        self._copy: HostCopy | None = None
        self._trouble: str | None = None
        self._last = checkpoint.folder if checkpoint is not None else None  # that is whole, as rank 0 knows
        self.progress = Progress()
        if checkpoint is not None:
            self.progress = Progress(checkpoint.step, checkpoint.state["samples"], checkpoint.state["skipped_steps"])
        if config.save_every:
            self._temporary = f"{TEMPORARY}writing-{first_rank_s(uuid.uuid4().hex)}"
            self._claim_folder()
            # made now: pinning as much memory takes seconds
            self._copy = HostCopy(list(trainable.states()), device.torch_device)

    def _claim_folder(self) -> None:
        """Rank 0: make the save folder this run's, and clear away what a killed run had begun to write there."""
        if self._device.rank != 0:
            return
        with writing(self._save_dir):
            self._save_dir.mkdir(parents=True, exist_ok=True)
            if not lock_folder(self._save_dir):
                raise CheckpointError(f"--save_dir {self._save_dir}: a run that goes on saves there: choose another")
            for folder in leftovers(self._save_dir):
                shutil.rmtree(folder, ignore_errors=True)

    # --- what the loop tells and asks

    @property
    def trouble(self) -> str | None:
        """What kept this rank from writing its part, or any rank after finish(); None while all is well."""
        return self._trouble or (self._writing.problem if self._writing is not None else None)

    def before_update(self) -> None:
        if self._copy is not None:
            self._copy.before_update()

    def after_step(self, progress: Progress, *, finite: bool, last: bool) -> None:
        if self._writing is not None and self._writing.path is not None:
            self._tell_of(self._writing)
        if self._copy is None or not (last or progress.steps % self._config.save_every == 0):
            return
        if not finite:
            say(f"no checkpoint of step {progress.steps}: the loss is not finite")
            return
        self._settle()
        if self._trouble is None:
            self._begin(self._copy, progress)

    def finish(self) -> None:
        guard, ended = self._guard, self._guard.ended
        if self._copy is None:
            return
        if self._writing is not None and not guard.finished:
            # said where the time does not suffice
            late = f"{self._writing.name} was not on the disk in time; {self._whole()}."
            guard.ended = dataclasses.replace(ended, why=f"{ended.why} {late}")
        self._settle()
        guard.ended = ended
        if self._trouble is not None and ended.exit_code == 0:
            guard.ended = Ended("failed", self._trouble)
        elif self._trouble is not None:
            guard.ended = dataclasses.replace(ended, why=f"{ended.why} {self._trouble}")

    # --- one checkpoint after the other

    def _begin(self, copy: HostCopy, progress: Progress) -> None:
        begun = time.monotonic()
        order = Order(
            save_dir=self._save_dir,
            temporary=f"{self._temporary}-{progress.steps}",
            state=self._state(progress),
            keep=self._config.keep,
            rank=self._device.rank,
            ranks=self._device.world_size,
        )
        placed = copy.begin(list(self._trainable.states()))
        self._writing = Writing(order, copy, placed, generator_states(self._device.torch_device))
        self._stalled_seconds = time.monotonic() - begun

    def _state(self, progress: Progress) -> dict[str, Any]:
        """state.json, but for its files and when it was written."""
        config, device = self._config, self._device
        state = {
            "format": {"name": FORMAT, "version": VERSION},
            "step": progress.steps,
            "samples": progress.samples,
            "skipped_steps": progress.skipped_steps,
            **fixed(config, device.world_size),
            "counters": dataclasses.asdict(self._trainable.counters()),
            "layout": _layout(config, device),
            "plan": config.distplan,
            "settings": config.as_dict(),
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        }
        return json_ready(state, "", {})

    def _settle(self) -> None:
        """Have the checkpoint that was begun on the disk, or know why that cannot be (collective)."""
        begun = self._writing
        if begun is None:
            return
        self._guard.beat("save")
        while not begun.own_done.wait(BEAT_SECONDS):
            self._guard.beat("save")
        problems: list[Any] = [None] * self._device.world_size
        dist.all_gather_object(problems, begun.problem)
        problem = next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text), "")
        if not problem:
            problem = first_rank_s(self._named(begun))
        self._writing = None
        if problem:
            begun.cancel()
            self._trouble = f"{begun.name} could not be written: {problem}; {self._whole()}."

    def _named(self, begun: Writing) -> str:
        """Rank 0: wait until the checkpoint has its name; returns what went wrong, "" if nothing did."""
        if self._device.rank != 0:
            return ""
        while begun.thread.is_alive():
            begun.thread.join(BEAT_SECONDS)
            self._guard.beat("save")
        if begun.path is not None:
            self._tell_of(begun)
        return begun.problem or ""

    def _tell_of(self, begun: Writing) -> None:
        if begun.path is None or begun.path == self._last:
            return
        self._last = begun.path
        rate = f"{begun.size / MIB:.1f} MiB in {begun.seconds:.2f} s, training stood for {self._stalled_seconds:.3f} s"
        say(f"saved {begun.path} ({rate})")

    def _whole(self) -> str:
        return f"the last whole checkpoint is {self._last}" if self._last else "there is no whole checkpoint"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
