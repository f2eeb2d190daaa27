"""torchrun's engine as the launcher uses it, without ranks."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException

from commons.launch.agent import SHUTDOWN_SECONDS, Agent
from commons.lifecycle.guard import GRACE_SECONDS


def agent(kept: int) -> Any:
    made: Any = Agent.__new__(Agent)  # without the engine's own set-up, which opens sockets
    made._stop, made._remaining_restarts = SimpleNamespace(kept=kept), 0
    made._worker_group = SimpleNamespace(
        spec=SimpleNamespace(max_restarts=0), workers={0: SimpleNamespace(global_rank=4)}
    )
    made.began, made.pids = [], {}
    made._begin, made._watch = made.began.append, SimpleNamespace(started=made.pids.update)
    return made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engine's starts of ranks, which come to nothing."""
    starts: list[Any] = []

    def start(_: Any, group: Any) -> dict[int, int]:
        starts.append(group)
        return {0: 4711}

    monkeypatch.setattr(LocalElasticAgent, "_start_workers", start)
    return starts


def test_a_signal_that_came_before_the_ranks_start_starts_none(started: list[Any]) -> None:
    stopped = agent(signal.SIGTERM)
    with pytest.raises(SignalException):
        stopped._start_workers(stopped._worker_group)
    assert started == [] and stopped.began == []


def test_ranks_are_watched_by_their_numbers_in_the_whole_job(started: list[Any]) -> None:
    going = agent(0)
    assert going._start_workers(going._worker_group) == {0: 4711}
    assert started == [going._worker_group] and going.began == [1] and going.pids == {4: 4711}


def test_who_does_not_end_by_itself_is_ended_in_the_ten_seconds_that_are_promised() -> None:
    assert GRACE_SECONDS < SHUTDOWN_SECONDS < 10
