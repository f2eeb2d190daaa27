"""Cell: one configuration of a sweep, and how it compares with others in size."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from commons.cli.checks import problems
from commons.config.resolved import ResolvedConfig
from commons.config.schema import TrainConfig, as_words
from commons.planner.room import Room
from commons.plans.registry import PLANS
from model_zoo import MODEL_SIZES, ModelShape, parameter_count

# What makes a run larger or smaller while it stays the same experiment.
SIZE_SETTINGS = ("model_type", "num_layers", "hidden_size", "num_heads", "batch_size", "seq_len")


@dataclass(frozen=True)
class Machine:
    """What the cells run on: ``device_type`` "cuda" or "cpu", how many GPUs can be seen, and the memory that a rank
    finds free there, None where nobody looked.
    """

    device_type: str
    gpu_count: int
    room: Room | None = None

    @property
    def ranks(self) -> int:
        """What "all" stands for."""
        return max(1, self.gpu_count)


@dataclass(frozen=True)
class Cell:
    """One configuration.

    Attributes:
        label: what it is called, unique in its sweep.
        settings: values of flags of train_gpt_demo.py by name.
        gpus: ranks, a GPU each (without GPUs: processes on the CPU).
        visible: CUDA_VISIBLE_DEVICES; None: all GPUs.
    """

    label: str
    settings: Mapping[str, Any]
    gpus: int = 1
    visible: str | None = None

    @property
    def flags(self) -> list[str]:
        return as_words(self.settings)

    @cached_property
    def id(self) -> str:
        """A folder's name, which changes when anything that the cell runs with changes."""
        facts = json.dumps([sorted(self.settings.items()), self.gpus, self.visible], default=str)
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-")[:60]
        return f"{slug}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"

    def given(self) -> TrainConfig:
        return TrainConfig(**self.settings)

    def resolved(self, machine: Machine) -> ResolvedConfig:
        return self.given().resolve(machine.device_type, self.gpus)

    def refusal(self, machine: Machine) -> str | None:
        """Why the suite would refuse these settings on this machine, None where it would not."""
        if machine.device_type == "cuda" and self.gpus > machine.gpu_count:
            return f"needs {self.gpus} GPUs, this machine has {machine.gpu_count}"
        given = self.given()
        found = problems(
            given, self.gpus, machine.device_type, machine.gpu_count, PLANS.get(given.distplan), typed=self.settings
        )
        return "; ".join(found) or None

    def size(self, machine: Machine) -> tuple[int, int, int]:
        """Parameters, sequences per rank and micro-batch, tokens per sequence."""
        config = self.resolved(machine)
        size = MODEL_SIZES[str(config.model_type)]
        shape = ModelShape(
            config.num_layers or size.layers, config.hidden_size or size.hidden, config.num_heads or size.heads,
            size.positions, size.vocab,
        )  # fmt: skip
        return parameter_count(shape), config.batch_size or 1, config.seq_len or 1

    def load(self, machine: Machine) -> int:
        """Something that grows with a step's work: the sweep goes from small to large."""
        parameters, batch, sequence = self.size(machine)
        return parameters * batch * sequence

    def is_at_least(self, other: Cell, machine: Machine) -> bool:
        """Whether each rank needs at least the memory of ``other``'s: the same but for sizes, of which none is smaller,
        on no more GPUs.
        """
        mine, others = (
            {name: value for name, value in cell.settings.items() if name not in SIZE_SETTINGS}
            for cell in (self, other)
        )
        larger = all(a >= b for a, b in zip(self.size(machine), other.size(machine), strict=True))
        return mine == others and larger and self.gpus <= other.gpus
