"""A model ready to train under its plan, and what is to be known about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from commons.config.auto import EAGER_STEPS
from commons.config.resolved import ResolvedConfig
from commons.data.batch_source import BatchPlace, BatchSource
from commons.data.sources import open_source
from commons.distributed.device import Device
from commons.distributed.layout import Place, place
from commons.distributed.process_group import every_rank, first_rank_s
from commons.distributed.seeding import seed_generators
from commons.lifecycle.job import read_job
from commons.lifecycle.outcome import RunError
from commons.plans.registry import PLANS, Plan
from commons.plans.trainable import Trainable
from commons.reporting.header import RunHeader
from commons.reporting.peak_rates import TERA, peak_flops
from commons.training.clock import measured_peak_flops
from model_zoo import ModelShape, padded_parameter_count, parameter_count

MOST_PLACE_LINES = 16  # ranks that the header places one by one; more of them it sums up


@dataclass(frozen=True)
class Session:
    """A model ready to train, and what the loop and the sinks must know about it.

    Attributes:
        peak_flops: of this device and precision, FLOP/s, from the datasheet or measured; None if unknown.
    """

    config: ResolvedConfig
    device: Device
    plan: Plan
    shape: ModelShape
    trainable: Trainable
    peak_flops: float | None

    @cached_property
    def source(self) -> BatchSource:
        """Of batches, opened when it is first asked for; ValueError and OSError as open_source() has them."""
        return open_source(self.config.data_request())

    def batch_place(self, rank: int) -> BatchPlace:
        """Which part of every global batch ``rank`` takes: ranks that share a copy of the model take the same."""
        copies = self.config.data_parallel_size(self.device.world_size)
        return BatchPlace(self.config.batch_size, self.place(rank).data, copies, self.device.torch_device)

    def place(self, rank: int) -> Place:
        """Which copy, pipeline stage and part of every matrix ``rank`` has."""
        return place(rank, tp_degree=self.config.tp_degree, pp_degree=self.config.pp_degree)

    def has_loss(self, rank: int) -> bool:
        """Only the last stage of a pipeline does."""
        return self.place(rank).pipeline == self.config.pp_degree - 1

    @property
    def sequences_per_step(self) -> int:
        """Over all data-parallel ranks and micro-batches."""
        config = self.config
        return config.batch_size * config.grad_accum * config.data_parallel_size(self.device.world_size)

    @property
    def tokens_per_step(self) -> int:
        """Over all data-parallel ranks and micro-batches."""
        return self.sequences_per_step * self.config.seq_len

    def settled_config(self, steps_done: int) -> ResolvedConfig:
        """The settings as they turned out so far: whether ranks copy from each other's memory is known once the model
        is built, whether its passes are captured after the step that does so.
        """
        copies = self.trainable.shared_bytes is not None
        captures = self.config.captures_graphs(self.device.world_size, copies)
        if steps_done > EAGER_STEPS:
            captures = captures and self.trainable.replayed_bytes > 0
        turned_out = {"peer_copies": copies, "cuda_graph": captures}
        return dataclasses.replace(
            self.config, **{name: "on" if value else "off" for name, value in turned_out.items()}
        )

    def _epochs(self) -> float | None:
        """How often the whole training goes through the data; None where that has no end."""
        samples = self.source.epoch_samples
        return None if samples is None else self.config.train_step * self.sequences_per_step / samples

    def header(self) -> RunHeader:
        """What a reader of the log must know, for the sinks."""
        config, shape, world_size = self.settled_config(0), self.shape, self.device.world_size
        return RunHeader(
            model=config.model_type,
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            parameters=parameter_count(shape),
            padded_parameters=padded_parameter_count(shape),
            plan=self.plan.name,
            placement=config.placement if self.plan.placement else None,
            world_size=world_size,
            dp=config.data_parallel_size(world_size),
            tp=config.tp_degree,
            pp=config.pp_degree,
            micro_batch_size=config.batch_size,
            grad_accum=config.grad_accum,
            global_batch_size=self.sequences_per_step,
            seq_len=config.seq_len,
            precision=config.precision,
            attention=config.attention,
            activation_checkpointing=config.activation_checkpointing,
            cuda_graph=config.cuda_graph == "on",
            peer_copies=config.peer_copies == "on",
            device=self.device.type,
            device_name=self.device.name,
            peak_tflops_per_device=None if self.peak_flops is None else self.peak_flops / TERA,
            data=self.source.description,
            epochs=self._epochs(),
            places=tuple(place_lines([self.place(rank) for rank in range(world_size)])),
            notes=_attempt_note(),
        )


def build_session(config: ResolvedConfig, device: Device) -> Session:
    """Build and wrap the model (collective). ``config`` is resolved and checked."""
    plan, here = PLANS[config.distplan], place(device.rank, tp_degree=config.tp_degree, pp_degree=config.pp_degree)
    seed_generators(config.seed, here)
    trainable = plan.build(config, device)
    if config.measure_peak:
        peak = measured_peak_flops(device, config.base_precision)
    else:
        peak = peak_flops(device.name, config.precision)
    seed_generators(config.seed, here)  # again: training draws the same, whatever building and measuring drew
    session = Session(config, device, plan, config.shape(), trainable, peak)
    _agree_on_data(session)
    return session


def _agree_on_data(session: Session) -> None:
    """Raises RunError where a rank reads other data than rank 0: machines may have other files at one path
    (collective).
    """
    source = session.source
    if source.description and not every_rank(
        first_rank_s(source.fingerprint) == source.fingerprint, session.device.torch_device
    ):
        raise RunError(
            f"the ranks' data differ: not every machine has the same files at --data {session.config.data}, or the same"
            " tokenizer: copy them there"
        )


def place_lines(places: Sequence[Place]) -> list[str]:
    """Where the ranks stand: a line each, and beyond MOST_PLACE_LINES ranks a line per kind of group.

    Args:
        places: every rank's, by rank. Nothing is said where ranks differ in their data only.
    """
    if all((at.tensor, at.pipeline) == (0, 0) for at in places):
        return []
    if len(places) <= MOST_PLACE_LINES:
        return [f"rank {r}: dp {at.data}, tp {at.tensor}, pp {at.pipeline}" for r, at in enumerate(places)]
    first = places[0]
    groups = {
        "tp": [r for r, at in enumerate(places) if (at.data, at.pipeline) == (first.data, first.pipeline)],
        "pp": [r for r, at in enumerate(places) if (at.data, at.tensor) == (first.data, first.tensor)],
        "dp": [r for r, at in enumerate(places) if (at.tensor, at.pipeline) == (first.tensor, first.pipeline)],
    }
    return [_group_line(name, ranks) for name, ranks in groups.items() if len(ranks) > 1]


def _group_line(name: str, ranks: Sequence[int]) -> str:
    """One kind of group by its first: they all have as many ranks, as far apart."""
    apart = "next to each other" if ranks[1] == 1 else f"{ranks[1]} apart"
    shown = [str(rank) for rank in (ranks if len(ranks) <= 4 else [*ranks[:2], ranks[-1]])]
    if len(ranks) > 4:
        shown.insert(2, "...")
    return f"{name} groups: {len(ranks)} ranks {apart}, the first {', '.join(shown)}"


def _attempt_note() -> tuple[str, ...]:
    job = read_job()
    return (f"attempt {job.attempt} of {job.attempts_allowed}",) if job.attempt > 1 else ()
