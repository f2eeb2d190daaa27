"""RunHeader: what a reader of a run's log must know before its first step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunHeader:
    """The facts at the head of a log, the same on every rank.

    Attributes:
        model: the size's name; with it its layers, hidden size and heads.
        parameters: exact, the tied embedding counted once, no padding.
        padded_parameters: with the vocabulary padded as it is computed.
        plan: its name.
        placement: of Gemini's chunks; None for plans that have none.
        world_size: ranks in all, the product of dp, tp and pp: data-, tensor- and pipeline-parallel degree.
        micro_batch_size: sequences per data-parallel rank and micro-batch.
        grad_accum: micro-batches per step.
        global_batch_size: sequences per step, over all ranks.
        seq_len: tokens per sequence.
        precision, attention, activation_checkpointing: as their flags say.
        cuda_graph: whether forward and backward are replayed from a captured graph.
        peer_copies: whether ranks copy from each other's memory.
        device: "cuda" or "cpu".
        device_name: what the device calls itself.
        peak_tflops_per_device: what MFU is a share of, in 10^12 FLOP/s; None where it is not known.
        places: lines that say where the ranks stand in the parallel groups; empty without model parallelism.
        data: what it is trained on; "" for random tokens.
        epochs: how often the training goes through that; None for random tokens.
        notes: further lines.
    """

    model: str
    layers: int
    hidden: int
    heads: int
    parameters: int
    padded_parameters: int
    plan: str
    placement: str | None
    world_size: int
    dp: int
    tp: int
    pp: int
    micro_batch_size: int
    grad_accum: int
    global_batch_size: int
    seq_len: int
    precision: str
    attention: str
    activation_checkpointing: str
    cuda_graph: bool
    peer_copies: bool
    device: str
    device_name: str
    peak_tflops_per_device: float | None
    places: tuple[str, ...] = ()
    data: str = ""
    epochs: float | None = None
    notes: tuple[str, ...] = ()
