"""The machines of a job: who they are, and how they find each other and agree before any rank starts.

Node 0 opens a store (torch's TCPStore) at MASTER_ADDR:MASTER_PORT. Every node leaves a card there that says
what it would run; the cards must agree. The same store then serves torchrun's static rendezvous. The cards also
tell the way between the nodes, which gloo would guess from the machine's name.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from commons.launch import lifeline
from commons.launch.lifeline import Lifeline

if TYPE_CHECKING:
    from torch.distributed import TCPStore

Result = TypeVar("Result")

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500  # torchrun's
POLL_SECONDS = 0.2
CONNECT_SECONDS = 30.0
FAREWELL_SECONDS = 10.0
OWN_ADDRESS_SECONDS = 10.0
ANSWER_SECONDS = 10.0  # for node 0 to compare the cards and to make the run's folder
READ_KEY = "suite/read"  # how many nodes have read the answer
SAME_ON_ALL = (
    "MASTER_ADDR must be an address of node 0, MASTER_PORT a port that nothing else uses, on all nodes the same"
)
NODE_0_LEFT = "node 0 went away while the nodes were meeting: see that node's console"


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
        host = f"[{self.master_addr}]" if ":" in self.master_addr else self.master_addr
        return f"{host}:{self.master_port}"

    def annotate(self, text: str) -> str:
        """An error's text with "[10.0.0.2]" made to "[10.0.0.2, node 1]": gloo knows addresses only. Unchanged
        where nodes share an address."""
        if len(set(self.addresses)) < self.count:
            return text
        for node, address in enumerate(self.addresses):
            text = text.replace(f"[{address}]", f"[{address}, node {node}]")
        return text

    def describe(self, node: int) -> str:
        return f"node {node} ({self.addresses[node]})" if self.addresses else f"node {node}"


@dataclass(frozen=True)
class Card:
    """What a node brings to the meeting.

    Attributes:
        same: what has to be the same on every node, as JSON values, by its name in an error.
        address: where the others reach the node; "" on node 0, which only learns it from where it sends.
    """

    same: Mapping[str, object]
    address: str = ""


@dataclass(frozen=True)
class Answer:
    """What node 0 tells every node, once all cards are there.

    Attributes:
        differences: a sentence for each; nothing is started then.
        problem: why node 0 cannot start; "" where it can.
        addresses: by node, node 0's own left out ("").
        lifeline_port, secret: of the connection by which the launchers notice each other's end.
        run_name: of the run, whose folder node 0 has made.
    """

    differences: list[str] = field(default_factory=list)
    problem: str = ""
    addresses: list[str] = field(default_factory=list)
    lifeline_port: int = 0
    secret: str = ""
    run_name: str = ""


@dataclass(frozen=True)
class Meeting:
    """What the nodes have in common once they met: the store, the nodes with their addresses, the run's name."""

    store: TCPStore
    nodes: Nodes
    run_name: str
    lifeline: Lifeline


def meet(nodes: Nodes, same: Mapping[str, object], timeout_seconds: float, begin: Callable[[], str]) -> Meeting:
    """Bring all nodes together (blocking).

    Args:
        same: see Card.
        begin: called on node 0 when all agree; makes what belongs to the run and returns its name. What it raises is
            raised here on node 0, and told on the others.

    Raises:
        MeetingError, NodesDiffer: as open_store, compare and ask do.
    """
    store = open_store(nodes, timeout_seconds)
    if nodes.count == 1:
        return Meeting(store, nodes, begin(), Lifeline())
    if nodes.rank == 0:
        listener, secret = lifeline.listen(), lifeline.new_secret()
        hub = Answer(lifeline_port=listener.getsockname()[1], secret=secret)
        answer = compare(store, nodes, Card(same), timeout_seconds, begin, hub)
        # node 0 learns its own address from where it sends to node 1
        addresses = (_local_address(answer.addresses[1]), *answer.addresses[1:])
        line = Lifeline(listener, secret=secret, nodes=nodes.count)
    else:
        way = _way_to_node_0(nodes)
        answer = ask(store, nodes, Card(same, way.here), timeout_seconds)
        addresses = (way.there, *answer.addresses[1:])
        line = Lifeline(line=lifeline.connect(way.there, answer.lifeline_port, nodes.rank, answer.secret))
    return Meeting(store, replace(nodes, addresses=addresses), answer.run_name, line)


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
        _check_port_and_address(nodes)
    else:
        _wait_for_listener(nodes, timeout_seconds)

    def open_it() -> TCPStore:
        return TCPStore(
            nodes.master_addr,
            nodes.master_port,
            is_master=serves,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=min(timeout_seconds, CONNECT_SECONDS)),
            multi_tenant=True,  # the rendezvous opens the same one again
        )

    try:
        return in_time(open_it, min(timeout_seconds, CONNECT_SECONDS) + 1)
    except (RuntimeError, TimeoutError) as error:
        cause = str(error).splitlines()[0]
        if serves:
            text = f"node 0 could not open a store at {nodes.address} ({cause}): {SAME_ON_ALL}"
        else:
            text = (
                f"what answers node {nodes.rank} at {nodes.address} is not node 0's store ({cause}): if another"
                f" program has this port there, which node 0's console says, set another MASTER_PORT; {SAME_ON_ALL}"
            )
        raise MeetingError(text) from None


def in_time(work: Callable[[], Result], seconds: float) -> Result:
    """work(), in a thread that is left behind where it takes too long: a listener that is no store, and says
    nothing, holds TCPStore for ever, whatever its timeout, and keeps signals from being handled."""
    answers: list[Result | Exception] = []

    def run() -> None:
        try:
            answers.append(work())
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def card_key(node: int) -> str:
    return f"suite/card/{node}"


ANSWER_KEY = "suite/answer"


def ask(store: TCPStore, nodes: Nodes, card: Card, timeout_seconds: float) -> Answer:
    """Leave this node's card and wait for node 0's answer, which is one request (blocking, until the last node comes).

    Raises:
        MeetingError: node 0 went away, cannot begin, or did not answer within ``timeout_seconds`` and a little more.
        NodesDiffer: naming each difference with both values; every node raises it.
    """
    store.set(card_key(nodes.rank), json.dumps(asdict(card)))
    limit = timeout_seconds + ANSWER_SECONDS
    try:
        in_time(lambda: store.wait([ANSWER_KEY], datetime.timedelta(seconds=limit)), limit + 1)
        answer = Answer(**json.loads(store.get(ANSWER_KEY)))
        store.add(READ_KEY, 1)
    except (RuntimeError, TimeoutError):
        raise MeetingError(NODE_0_LEFT) from None
    return _checked(answer)


def compare(
    store: TCPStore, nodes: Nodes, card: Card, timeout_seconds: float, begin: Callable[[], str], hub: Answer
) -> Answer:
    """On node 0: wait for all cards, compare them, begin, and answer every node (blocking).

    Args:
        begin: see meet.
        hub: the answer as far as node 0 alone knows it.

    Raises:
        MeetingError: a node did not join within ``timeout_seconds``.
        NodesDiffer: see ask.
    """
    store.set(card_key(0), json.dumps(asdict(card)))
    try:
        _wait_for_cards(store, nodes.count, timeout_seconds)
        cards = [Card(**json.loads(text)) for text in store.multi_get([card_key(node) for node in range(nodes.count)])]
        answer = replace(hub, differences=list(_differences(cards)), addresses=[each.address for each in cards])
        answer = answer if answer.differences else replace(answer, run_name=begin())
    except Exception as error:
        _tell(store, nodes, Answer(problem=f"node 0 cannot start: {error}"))
        raise
    _tell(store, nodes, answer)
    return _checked(answer)


def _tell(store: TCPStore, nodes: Nodes, answer: Answer) -> None:
    """Answer the others; where nothing is started, wait until those that came have read it, as the store ends then."""
    store.set(ANSWER_KEY, json.dumps(asdict(answer)))
    if not answer.differences and not answer.problem:
        return
    came = sum(store.check([card_key(node)]) for node in range(1, nodes.count))
    deadline = time.monotonic() + FAREWELL_SECONDS
    while store.add(READ_KEY, 0) < came and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _checked(answer: Answer) -> Answer:
    if answer.problem:
        raise MeetingError(answer.problem)
    if answer.differences:
        raise NodesDiffer("\n".join(f"{line}: make them the same" for line in answer.differences))
    return answer


def _differences(cards: Sequence[Card]) -> Iterator[str]:
    """A sentence for each difference from node 0."""
    first = cards[0].same
    for node, card in enumerate(cards):
        for key in sorted({*first, *card.same}):
            if card.same.get(key) != first.get(key):
                yield f"{key} is {card.same.get(key)} on node {node}, {first.get(key)} on node 0"


def _wait_for_cards(store: TCPStore, count: int, timeout_seconds: float) -> None:
    """Until all are there. Polled, since a signal cannot interrupt the store's own wait."""
    deadline = time.monotonic() + timeout_seconds
    keys = [card_key(node) for node in range(count)]
    while not store.check(keys):
        if time.monotonic() > deadline:
            late = ", ".join(str(node) for node, key in enumerate(keys) if not store.check([key]))
            raise MeetingError(
                f"node {late} did not join within {timeout_seconds:g} s: start the command on every machine,"
                " with NODE_RANK counting from 0, or allow more time with --timeout"
            )
        time.sleep(POLL_SECONDS)


def _check_port_and_address(nodes: Nodes) -> None:
    """Node 0 can listen on MASTER_PORT, and MASTER_ADDR leads back to it. TCPStore finds that out too, with
    pages of its own frames."""
    if nodes.master_port == 0:
        return
    try:
        listener = lifeline.listen(nodes.master_port)
    except OSError as error:
        raise MeetingError(
            f"MASTER_PORT {nodes.master_port} cannot be used on node 0 ({os.strerror(error.errno or 0)}): set another"
            " one, the same on all nodes"
        ) from None
    with listener:
        problem = _not_ours(listener, nodes)
    if problem:
        raise MeetingError(
            f"MASTER_ADDR {nodes.master_addr!r} does not lead to node 0, which this is ({problem}): set one of its"
            f" addresses ({', '.join(_addresses_here())}) or its name, the same on all nodes; or NODE_RANK is wrong"
        )


def _not_ours(listener: socket.socket, nodes: Nodes) -> str:
    """Why a connection to MASTER_ADDR does not reach ``listener``; empty where it does."""
    token, deadline = os.urandom(16), time.monotonic() + OWN_ADDRESS_SECONDS
    try:
        with socket.create_connection((nodes.master_addr, nodes.master_port), OWN_ADDRESS_SECONDS) as probe:
            probe.sendall(token)
            if _hears(listener, token, deadline):
                return ""
    except TimeoutError:
        pass
    except OSError as error:
        return error.strerror or str(error)
    return "another machine answers there"


def _hears(listener: socket.socket, token: bytes, deadline: float) -> bool:
    """Whether a connection to ``listener`` says ``token``. The other nodes knock here too, all of them at a time."""
    with contextlib.ExitStack() as closing, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is listener:
                    connection = closing.enter_context(listener.accept()[0])
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                selector.unregister(key.fileobj)
                with contextlib.suppress(ConnectionError):
                    if key.fileobj.recv(len(token)) == token:  # pyright: ignore[reportAttributeAccessIssue]
                        return True
    return False


def _addresses_here() -> list[str]:
    import psutil

    all_of_them = [each for found in psutil.net_if_addrs().values() for each in found]
    found = [each.address for each in all_of_them if each.family in (socket.AF_INET, socket.AF_INET6)]
    return [each for each in found if not each.startswith(("127.", "fe80:")) and each != "::1"] or ["it has none"]


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
