"""The watch over ranks, by a clock of the test's own: no process sleeps or hangs here."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, cast

import pytest

from commons.launch import watch
from commons.launch.nodes import Nodes
from commons.launch.watch import LOOK_SECONDS, Watch
from commons.lifecycle.guard import Guard, pulse_path
from commons.lifecycle.heartbeat import LAYOUT, NAMES
from commons.lifecycle.outcome import FINISHED

TIMEOUT = 20.0  # a rank may be quiet for 15 of them


class World:
    """Two ranks, their pulses and the clock."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.folder = 1000.0, folder
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)
        self.watch = Watch(folder, Nodes(2), TIMEOUT, cast("Any", None))
        self.judged: list[float] = []
        monkeypatch.setattr(self.watch, "_judge", lambda sightings, quiet: self.judged.append(quiet))
        monkeypatch.setattr(self.watch, "_sightings", list)
        self.watch.begin(1)
        self.watch.started({0: 100, 1: 101})
        self.beat(0, 1)

    def beat(self, *ranks: int, step: int = 5) -> None:
        for rank in ranks:
            data = LAYOUT.pack(9, step, NAMES.index("forward"), self.now)
            pulse_path(self.folder, 1, rank).write_bytes(data)

    def look(self, seconds: float) -> None:
        """Look as often as the launcher does, for so long."""
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK_SECONDS
            self.watch.look()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_ranks_that_do_not_move_are_judged_after_the_time_limit(world: World) -> None:
    world.look(14.5)
    assert world.judged == []
    world.look(1)
    assert 15 <= world.judged[0] < 16


def test_ranks_that_beat_are_left_alone(world: World) -> None:
    for _ in range(10):
        world.look(14)
        world.beat(0)
    assert world.judged == []


def test_a_launcher_that_was_suspended_with_its_ranks_gives_them_their_time_again(world: World) -> None:
    """Ctrl-Z and fg, a laptop's lid: nobody has beaten for an hour, and nobody hangs."""
    world.now += 3600
    world.look(14.5)
    assert world.judged == []
    world.look(1)
    assert len(world.judged) >= 1, "then they do hang"


def test_a_launcher_that_is_only_slow_is_not_taken_for_a_suspended_one(world: World) -> None:
    for _ in range(4):
        world.now += 9 * LOOK_SECONDS
        world.watch.look()
    assert world.judged, "18 seconds without a beat"


def test_the_first_step_has_its_time_to_compile(world: World) -> None:
    world.beat(0, 1, step=1)
    world.look(119)
    assert world.judged == []
    world.look(2)
    assert world.judged


def test_after_a_verdict_nobody_is_judged_again(world: World) -> None:
    world.watch.verdict = ["Rank 1 hung"]
    world.look(100)
    assert world.judged == []


# ---- a signal in the last step


@pytest.mark.parametrize(
    ("step", "stops", "ended"),
    [(1, True, "SIGTERM"), (9, True, "SIGTERM"), (10, True, "finished")],
)
def test_a_signal_in_the_last_step_leaves_a_finished_run(step: int, stops: bool, ended: str) -> None:
    guard = Guard()
    with guard.at_work(10):
        assert guard.stop_after(step, [0, signal.SIGTERM]) == stops
    assert guard.ended.how == ended and guard.steps_done == step
    assert (guard.ended is FINISHED) == guard.finished == (ended == "finished")


def test_without_a_signal_nothing_stops() -> None:
    guard = Guard()
    assert not any(guard.stop_after(step, [0, 0]) for step in range(1, 11)) and guard.finished
