"""Tensors gathered and averaged by copies from memory to memory, without a kernel that communicates:
``--peer_copies``.

NCCL's kernels take multiprocessors of the GPU, for which a persistent matrix product beside them has to wait. The GPUs
of one host can read and write each other's memory, and their copy engines do so beside all multiprocessors. Waiting for
another rank needs none either: a stream waits for a number in memory (a stream memory operation of the driver), no
kernel spins.

Ranks signal each other by flags, one of each kind for every pair. The sender raises it in the receiver's memory; the
receiver waits for it and takes it down:

- ``BARRIER_EVEN`` and its like: the stream has come to a barrier of all ranks. Behind it the sender's parts do not
  change until the pass over the model is through, or, where tensors are replicated, all have read them.
- ``ARRIVED_FIRST`` and ``ARRIVED_SECOND``: the sender has written its contribution to an average into that slot of the
  receiver's inbox.
- ``READ``: the sender has read the receiver's parts. Signalled where tensors are replicated, for in the backward pass
  their gradients are written over them. Between two lies a barrier, which the receiver reaches only after it has taken
  the first down.

None is raised again before it was taken down. Of two barriers in a row each has its own flag, and no rank is more than
one ahead. Captured passes have one barrier flag only: between two of them lie the averages of the first, for which each
rank waits for all others.

All ranks average the same tensors in the same order, on one stream each, which joins the computing one before the next
barrier. A part may be overwritten by its average: each contribution comes from a rank that has passed its last use of
the tensor, so that no one still reads the part. Nor is a slot of an inbox written too early: a rank's contribution to
the average after the next one waits for all others' to the next, and each of these is behind the reading of the one
before; the first of a pass waits for the barrier. No number in it changes from step to step, so that it can be captured
(commons.model.cuda_graph).

How memory is reached is commons.distributed.peer_memory'.
"""

from __future__ import annotations

import functools
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from commons.config.auto import compile_problem
from commons.distributed.peer_memory import GpuPeers, HostPeers, Peers
from commons.lifecycle.notices import say
from commons.lifecycle.outcome import RunError

if TYPE_CHECKING:
    from commons.config.resolved import ResolvedConfig
    from commons.distributed.device import Device

# What a rank shares of a tensor begins at a multiple, so that wide copies and kernels find it aligned. On 2, 4 and 8
# ranks all parts of replicated tensors do so nearly, by the widths of models: at 16 bytes.
ALIGNED_ELEMENTS = 128


class Flag(IntEnum):
    """What is signalled; see the module."""

    BARRIER_EVEN = 0
    BARRIER_ODD = 1
    BARRIER_CAPTURED = 2  # where passes are replayed, this is always their barrier, and no one else's
    ARRIVED_FIRST = 3
    ARRIVED_SECOND = 4
    READ = 5


BARRIERS = (Flag.BARRIER_EVEN, Flag.BARRIER_ODD)  # used in turn
ARRIVALS = (Flag.ARRIVED_FIRST, Flag.ARRIVED_SECOND)  # by slot of the inbox
SLOTS = len(ARRIVALS)  # contributions of a rank that an inbox holds: one that comes in, one that is added up


class PeerCopies:
    """Gathers and averages tensors of which every rank holds a part.

    Args:
        peers: all of the tensors' ranks.
        part_sizes: elements of each tensor's part.
        dtype: of all tensors.
        replicated: a rank's part is a piece of the whole tensor, which stays in memory.

    Attributes:
        parts: for each tensor its parts by rank, flat; this rank's are its own to fill.
        wholes: each tensor [ranks * elements] in this rank's memory, where they are ``replicated``; else none.
        shared_bytes: device memory taken for it, as far as torch's allocator does not count it.
        link_rate: bytes per second from another rank, when all copy.
    """

    def __init__(self, peers: Peers, part_sizes: list[int], dtype: torch.dtype, *, replicated: bool) -> None:
        self._peers = peers
        self._barriers = 0
        self._averages = 0
        # at one time every rank reads from another: the next one after it first
        self._others = [(peers.rank + distance) % peers.size for distance in range(1, peers.size)]
        self._replicated = replicated
        # what each rank shares of a tensor, and where in it its part begins; both in parts
        held, places = (peers.size, range(peers.size)) if replicated else (1, [0] * peers.size)
        sizes = [_aligned(held * size) for size in part_sizes]
        buffers = [buffer.split(sizes) for buffer in peers.share(sum(sizes), dtype)]  # by rank, then by tensor
        self.parts = [
            [buffer[index][place * size : (place + 1) * size] for buffer, place in zip(buffers, places, strict=True)]
            for index, size in enumerate(part_sizes)
        ]
        own = zip(buffers[peers.rank], part_sizes, strict=True)
        self.wholes = [memory[: held * size] for memory, size in own] if replicated else []
        width = _aligned(max(part_sizes))
        self._inboxes = [
            inbox.view(SLOTS, peers.size - 1, width) for inbox in peers.share(SLOTS * (peers.size - 1) * width, dtype)
        ]
        self.shared_bytes, self.link_rate = peers.unseen_bytes, peers.link_rate

    def barrier(self) -> None:
        """Let the current stream wait for those of all other ranks. To be called before a pass over the model, behind
        everything that writes parts. Where tensors are not replicated, also after a pass that averages nothing.
        """
        flag = BARRIERS[self._barriers % len(BARRIERS)]
        if self._peers.capturing():
            flag = Flag.BARRIER_CAPTURED
        else:
            self._barriers += 1
        self._signal_all(flag)
        self._wait_for_all(flag)

    def gather(self, parts: list[torch.Tensor], whole: torch.Tensor) -> None:
        """Copy all ``parts``, by rank, into ``whole`` [ranks * elements], on the current stream, which is behind the
        pass's barrier. Of a replicated tensor this rank's own is there.
        """
        pieces = whole.chunk(self._peers.size)
        for peer in self._others if self._replicated else (*self._others, self._peers.rank):
            pieces[peer].copy_(parts[peer])

    def signal_read(self) -> None:
        """Of replicated tensors: this rank has gathered all of them, on the current stream."""
        self._signal_all(Flag.READ)

    def wait_read(self) -> None:
        """Let the current stream wait until all other ranks have read this one's parts: once for each
        :meth:`signal_read`, behind it, and before gradients take the tensors' place or parts are written again.
        """
        self._wait_for_all(Flag.READ)

    def average(self, whole: torch.Tensor, out: torch.Tensor) -> None:
        """Put the mean over the ranks of this rank's piece of their ``whole`` [ranks * elements] into ``out``, summed
        up in fp32, on the current stream (every rank has to).
        """
        peers, pieces = self._peers, whole.chunk(self._peers.size)
        slot = self._averages % SLOTS
        self._averages += 1
        for peer in self._others:
            self._slot(receiver=peer, index=slot, sender=peers.rank)[: len(out)].copy_(pieces[peer])
            peers.signal(peer, ARRIVALS[slot])
        self._wait_for_all(ARRIVALS[slot])
        received = self._inboxes[peers.rank][slot, :, : len(out)]
        mean_of(pieces[peers.rank], received, out)

    def raised_flags(self) -> int:
        """How many flags are raised in this rank's memory: none, when all that was signalled has been waited for."""
        return self._peers.raised()

    def start_with_slot(self, slot: int) -> None:
        """Have the next average take this slot of the inboxes, as captured passes do with the one they were captured
        with (every rank has to).
        """
        self._averages = slot

    def _signal_all(self, flag: Flag) -> None:
        for peer in self._others:
            self._peers.signal(peer, flag)

    def _wait_for_all(self, flag: Flag) -> None:
        for peer in self._others:
            self._peers.wait(peer, flag)

    def _slot(self, *, receiver: int, index: int, sender: int) -> torch.Tensor:
        """Where in its inbox the receiver finds the contribution of the sender."""
        return self._inboxes[receiver][index, (sender - receiver) % self._peers.size - 1]


def _aligned(elements: int) -> int:
    return elements + -elements % ALIGNED_ELEMENTS


def mean_of(own: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
    """Put the mean of ``own`` [elements] and of the rows of ``others`` [rows, elements] into ``out``, summed up in
    fp32.
    """
    if own.is_cuda and _has_kernels():
        from commons.ops.triton_kernels import mean_

        mean_(own, others, out)
        return
    total = own.to(torch.float32, copy=True)
    for other in others:
        total += other
    out.copy_(total.div_(1 + len(others)))


@functools.cache
def _has_kernels() -> bool:
    if compile_problem("cuda") is not None:
        return False
    from commons.ops.triton_kernels import fits

    return fits()


def find_peers(config: ResolvedConfig, device: Device) -> Peers | None:
    """All ranks, where ``--peer_copies`` is on and they reach each other's memory (collective).

    Raises:
        RunError: they do not, and it was asked for, or ``--cuda_graph on``, which needs it.
    """
    if config.peer_copies == "off":
        return None
    try:
        return peers_of(device)
    except RuntimeError as error:
        text = f"the ranks do not reach each other's memory ({error})"
    wanted = [
        f"--{name} off"
        for name in ("peer_copies", "cuda_graph")
        if getattr(config, name) == "on" and config.asked(name)
    ]
    if wanted:
        raise RunError(f"{text}: use {' and '.join(wanted)}")
    say(f"{text}: falling back to NCCL for gradients and chunks (--peer_copies)")
    return None


def peers_of(device: Device) -> Peers:
    """All ranks, which are of one host (collective).

    Raises:
        RuntimeError: on every rank, if one does not reach another's memory.
    """
    group: Any = dist.group.WORLD
    return (GpuPeers if device.type == "cuda" else HostPeers)(group, len(Flag))
