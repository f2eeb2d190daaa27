"""The machines of a job: who they are, and how they find each other and agree before any rank starts.

Node 0 opens a store (torch's TCPStore) at MASTER_ADDR:MASTER_PORT. Every node leaves a card there that says
what it would run; the cards must agree. The same store then serves torchrun's static rendezvous. The cards also
tell the way between the nodes, which gloo would guess from the machine's name.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500  # torchrun's
POLL_SECONDS = 0.2
CONNECT_SECONDS = 30.0
FAREWELL_SECONDS = 10.0
NODE_0_LEFT = "node 0 went away while the nodes were meeting: its own screen says why"


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
        addresses: by node, where this one reaches it; this one's own is where the others do. Known after `meet`.
    """

    ranks_per_node: int
    count: int = 1
    rank: int = 0
    master_addr: str = LOOPBACK
    master_port: int = 0
    addresses: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.count * self.ranks_per_node

    @property
    def address(self) -> str:
        return f"{self.master_addr}:{self.master_port}"

    def named_in(self, text: str) -> list[int]:
        """The other nodes whose address stands in an error's text; none where nodes share an address."""
        if len(set(self.addresses)) < self.count:
            return []
        there = {node: rf"(?<![\w.:]){re.escape(address)}(?![\w.])" for node, address in enumerate(self.addresses)}
        return [node for node, pattern in there.items() if node != self.rank and re.search(pattern, text)]


def meet(nodes: Nodes, card: Mapping[str, object], timeout_seconds: float) -> tuple[TCPStore, Nodes, dict]:
    """Bring all nodes together (blocking); the store, the nodes with their addresses, and node 0's card.

    Raises:
        MeetingError, NodesDiffer: as open_store and agree do.
    """
    store = open_store(nodes, timeout_seconds)
    way = _way_to_node_0(nodes) if nodes.rank else None
    cards = agree(store, nodes, {**card, "_address": way.here if way else ""}, timeout_seconds)
    addresses = [other["_address"] for other in cards]
    if nodes.count > 1:
        # node 0 learns its own address from where it sends to node 1
        addresses[0] = way.there if way else _local_address(addresses[1])
    return store, replace(nodes, addresses=tuple(addresses)), cards[0]


@dataclass(frozen=True)
class Way:
    """The two ends of a connection, as addresses."""

    here: str
    there: str


def _way_to_node_0(nodes: Nodes) -> Way:
    try:
        with socket.create_connection((nodes.master_addr, nodes.master_port), timeout=CONNECT_SECONDS) as connection:
            return Way(connection.getsockname()[0], connection.getpeername()[0])
    except OSError:
        raise MeetingError(NODE_0_LEFT) from None


def _local_address(there: str) -> str:
    """This machine's address on the way to another; nothing is sent."""
    family = socket.AF_INET6 if ":" in there else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((there, DEFAULT_PORT))
        return probe.getsockname()[0]


def interface_to_the_others(nodes: Nodes) -> str:
    """The name of the network interface by which the other nodes reach this one; empty where it has none."""
    import psutil

    if not nodes.addresses:
        return ""
    mine = nodes.addresses[nodes.rank]
    found = psutil.net_if_addrs()
    # an IPv6 address of a link has its interface behind it: fe80::1%eth0
    return next((name for name, all_of_it in found.items() if any(mine == each.address for each in all_of_it)), "")


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


def agree(store: TCPStore, nodes: Nodes, card: Mapping[str, object], timeout_seconds: float) -> list[dict]:
    """Exchange cards with all nodes (blocking, until the last one comes); returns them by node.

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
    return cards


def _wait_for(store: TCPStore, keys: Mapping[int, str], timeout_seconds: float) -> None:
    """Until all keys are there. Polled, since a signal cannot interrupt the store's own wait."""
    deadline = time.monotonic() + timeout_seconds
    missing = dict(keys)
    while missing:
        try:
            missing = {node: key for node, key in missing.items() if not store.check([key])}
        except RuntimeError:
            raise MeetingError(NODE_0_LEFT) from None
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
