"""A copy of this rank's states on the host, made beside the training: in one buffer, pinned where the states are a
GPU's.

Only an optimizer step writes to masters and moments. So the copy runs beside the next step's forward and backward
passes, on a stream of its own for what lies on a GPU and in the writer's thread for what lies on the host, and only
that step's update has to wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from commons.plans.states import Box, StatePiece


class HostCopy:
    """The buffer, and one copy after another into it.

    Args:
        pieces: this rank's; those that it writes are copied. Their sizes do not change.
        device: that the rank computes on.
    """

    def __init__(self, pieces: Sequence[StatePiece], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        total = sum(box.tensor.numel() for piece in pieces if piece.writes for box in piece.boxes)
        self.buffer = torch.empty(total, pin_memory=self._on_gpu)
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._event: torch.cuda.Event | None = None
        self._host_pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._host_done = threading.Event()
        self._host_done.set()

    @torch.no_grad()
    def begin(self, pieces: Sequence[StatePiece]) -> list[tuple[StatePiece, Box, torch.Tensor]]:
        """Begin to copy the states as they are now.

        Returns:
            For every box the flat part of the buffer that will hold it, in row-major order.
        """
        placed, at = [], 0
        for piece, box in ((each, box) for each in pieces if each.writes for box in each.boxes):
            size = box.tensor.numel()
            placed.append((piece, box, self.buffer[at : at + size]))
            at += size
        pairs = [(flat.view(box.sizes), box.tensor) for _, box, flat in placed]
        self._host_pairs = [pair for pair in pairs if not pair[1].is_cuda]
        self._host_done.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for target, source in pairs:
                    if source.is_cuda:
                        target.copy_(source, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()
        return placed

    @torch.no_grad()
    def complete(self) -> None:
        """For the writer's thread: copy what lies on the host, and wait for the rest."""
        try:
            for target, source in self._host_pairs:
                target.copy_(source)
        finally:
            self._host_done.set()
        if self._event is not None:
            self._event.synchronize()

    def before_update(self) -> None:
        """Let what is given to the current stream next write to the states."""
        self._host_done.wait()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
