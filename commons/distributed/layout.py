"""Which rank is where: every rank's place among data-, pipeline- and tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A rank's coordinates, each counted from 0.

    Attributes:
        data: which copy of the model; decides the data that the rank draws.
        pipeline: which stage of it.
        tensor: which part of every matrix.
    """

    data: int
    pipeline: int
    tensor: int


def place(rank: int, *, tp_degree: int, pp_degree: int) -> Place:
    """The place of ``rank``: tensor-parallel ranks are neighbours, then come the stages, then the copies.

    That is the order of Colossal-AI's meshes: (data, pipeline, tensor, sequence) in HybridParallelPlugin, and
    (data, extra data, tensor) in GeminiPlugin; :func:`check_mesh` compares. The most talkative ranks are thus
    on one machine.
    """
    stage_rank, tensor = divmod(rank, tp_degree)
    data, pipeline = divmod(stage_rank, pp_degree)
    return Place(data, pipeline, tensor)


def check_mesh(rank: int, *, tp_degree: int, pp_degree: int, mesh_place: Place) -> None:
    """Fail where a plugin has placed this rank elsewhere, which would train on wrong data without a sign of
    it.
    """
    expected = place(rank, tp_degree=tp_degree, pp_degree=pp_degree)
    if mesh_place != expected:
        raise RuntimeError(
            f"rank {rank} is {mesh_place} for Colossal-AI, but {expected} for this suite: the order of the"
            " plugin's mesh has changed; adapt commons/distributed/layout.py"
        )
