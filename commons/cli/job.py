"""What the checks judge: a configuration, and the machine that is to run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from commons.config.resolved import ResolvedConfig
from commons.config.schema import TrainConfig

if TYPE_CHECKING:
    from commons.plans.registry import Plan
    from model_zoo import ModelShape


@dataclass(frozen=True)
class Job:
    """A configuration and the machine that is to run it.

    Attributes:
        given: what the user gave, without what is wrong by itself.
        config: the same, resolved.
        typed: the settings that the user gave, by name; everything else was chosen.
        plan, shape: None where the plan or the size does not exist.
        gpu_count: GPUs that this node's processes see.
    """

    given: TrainConfig
    config: ResolvedConfig
    typed: frozenset[str]
    plan: Plan | None
    shape: ModelShape | None
    world_size: int
    local_world_size: int
    device_type: str
    gpu_count: int

    @property
    def node_count(self) -> int:
        return max(1, self.world_size // self.local_world_size)
