"""The machines of a job: who they are, and how they find each other and agree before any rank starts.

Node 0 opens a store (torch's TCPStore) at MASTER_ADDR:MASTER_PORT. Every node leaves a card there that says
what it would run; the cards must agree. The same store then serves torchrun's static rendezvous.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500  # torchrun's
POLL_SECONDS = 0.2
CONNECT_SECONDS = 30.0
FAREWELL_SECONDS = 10.0


class MeetingError(Exception):
    """The nodes did not come together; the text says which, why, and what to do."""


class NodesDiffer(MeetingError):
    """The nodes came together and would not run the same."""


@dataclass(frozen=True)
class Nodes:
    """The machines of a job, as this one knows them.

    Attributes:
        count, rank: machines in all, and which of them this is.
        ranks_per_node: processes on each.
        master_addr, master_port: where node 0 listens; port 0 takes a free one (one machine only).
    """

    ranks_per_node: int
    count: int = 1
    rank: int = 0
    master_addr: str = LOOPBACK
    master_port: int = 0

    @property
    def world_size(self) -> int:
        return self.count * self.ranks_per_node

    @property
    def address(self) -> str:
        return f"{self.master_addr}:{self.master_port}"


def open_store(nodes: Nodes, timeout_seconds: float) -> TCPStore:
    """The job's store: node 0 serves it, as long as it lives, the others connect. MeetingError if late."""
    from torch.distributed import TCPStore

    serves = nodes.rank == 0
    if serves:
        _check_port_is_free(nodes)
    else:
        _wait_for_listener(nodes, timeout_seconds)
    try:
        return TCPStore(
            nodes.master_addr,
            nodes.master_port,
            is_master=serves,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=min(timeout_seconds, CONNECT_SECONDS)),
            multi_tenant=True,  # the rendezvous opens the same one again
        )
    except RuntimeError as error:
        cause = str(error).splitlines()[0]
        what = "open a store at" if serves else "use the store at"
        raise MeetingError(
            f"node {nodes.rank} could not {what} {nodes.address} ({cause}): MASTER_ADDR must be an address"
            " of node 0 and MASTER_PORT a port that nothing else uses, the same on all nodes"
        ) from None


def agree(store: TCPStore, nodes: Nodes, card: Mapping[str, object], timeout_seconds: float) -> dict:
    """Exchange cards with all nodes (blocking, until the last one comes); returns node 0's.

    Args:
        card: what has to be the same on every node, as JSON values. Keys that start with an underscore may
        differ.

    Raises:
        MeetingError: a node did not come within ``timeout_seconds``.
        NodesDiffer: naming each difference with both values; every node raises it.
    """
    store.set(f"suite/card/{nodes.rank}", json.dumps(dict(card)))
    keys = {node: f"suite/card/{node}" for node in range(nodes.count)}
    _wait_for(store, keys, timeout_seconds)
    cards = [json.loads(store.get(key)) for key in keys.values()]
    store.set(f"suite/read/{nodes.rank}", "")
    differences = [
        f"{key} is {other.get(key)} on node {node}, {cards[0].get(key)} on node 0"
        for node, other in enumerate(cards)
        for key in sorted({*cards[0], *other})
        if not key.startswith("_") and other.get(key) != cards[0].get(key)
    ]
    if differences:
        if nodes.rank == 0:  # whose store the others are still reading
            with contextlib.suppress(MeetingError):
                _wait_for(store, {n: f"suite/read/{n}" for n in range(nodes.count)}, FAREWELL_SECONDS)
        raise NodesDiffer("\n".join(f"{line}: make them the same" for line in differences))
    return cards[0]


def _wait_for(store: TCPStore, keys: Mapping[int, str], timeout_seconds: float) -> None:
    """Until all keys are there. Polled, since a signal cannot interrupt the store's own wait."""
    deadline = time.monotonic() + timeout_seconds
    missing = dict(keys)
    while missing:
        try:
            missing = {node: key for node, key in missing.items() if not store.check([key])}
        except RuntimeError:
            raise MeetingError("node 0 went away while the nodes were meeting: its own screen says why") from None
        if missing and time.monotonic() > deadline:
            late = ", ".join(map(str, missing))
            raise MeetingError(
                f"node {late} did not come within {timeout_seconds:g} s: start the command on every machine,"
                " with NODE_RANK counting from 0, or allow more time with --timeout"
            )
        if missing:
            time.sleep(POLL_SECONDS)


def _check_port_is_free(nodes: Nodes) -> None:
    if nodes.master_port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", nodes.master_port))
        except OSError as error:
            raise MeetingError(
                f"MASTER_PORT {nodes.master_port} cannot be used on node 0 ({error.strerror}): set another"
                " one, the same on all nodes"
            ) from None


def _wait_for_listener(nodes: Nodes, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((nodes.master_addr, nodes.master_port), timeout=5).close()
            return
        except socket.gaierror:
            raise MeetingError(
                f"MASTER_ADDR {nodes.master_addr!r} is no address that node {nodes.rank} can look up: set"
                " node 0's name or IP address"
            ) from None
        except OSError as error:
            cause = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise MeetingError(
                f"node {nodes.rank} could not reach node 0 at {nodes.address} within {timeout_seconds:g} s"
                f" ({cause}): check that node 0 was started, MASTER_ADDR and MASTER_PORT, and the firewall"
                " between the two"
            )
        time.sleep(POLL_SECONDS)
