"""What the loop tells whoever keeps the training's state: commons.checkpoint, or nobody."""

from __future__ import annotations

from typing import Protocol

from commons.plans.states import Progress


class Keeper(Protocol):
    """Keeps a training's state.

    Attributes:
        progress: where this run goes on.
        trouble: what could not be kept on this rank, a sentence; None while all is well.
    """

    @property
    def progress(self) -> Progress: ...

    @property
    def trouble(self) -> str | None: ...

    def before_update(self) -> None:
        """The optimizer is about to write to the states."""
        ...

    def after_step(self, progress: Progress, *, finite: bool, last: bool) -> None:
        """A step is done, of which every rank tells the same (collective where something was kept before).

        Args:
            finite: its loss is a number.
            last: no step follows.
        """
        ...

    def finish(self) -> None:
        """Have all that was begun on disk (collective). ``trouble`` is the same on all ranks afterwards."""
        ...


class NoKeeper:
    """Keeps nothing; begins at the first step."""

    progress = Progress()
    trouble: str | None = None

    def before_update(self) -> None: ...

    def after_step(self, progress: Progress, *, finite: bool, last: bool) -> None: ...

    def finish(self) -> None: ...
