"""One launcher notices that another one is gone.

Ranks that are connected notice it themselves: a broken connection ends a collective. Ranks that are still on
their way to each other do not, and would wait for --timeout. So every launcher keeps a connection open to node
0's. It closes when its launcher ends in whatever way, kill -9 among them; only one that succeeded says so first.
A network that swallows packets closes nothing: that is what --timeout is for.

Anyone on the network can connect to node 0's port. Only a connection that begins with the job's secret, which the
launchers have from the job's store, is believed; all others are closed, at once or when they keep silent.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from dataclasses import dataclass, field

POLL_SECONDS = 0.5
# for the ranks to fail by themselves, which tells more than being stopped
GRACE_SECONDS = 10.0
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 3.0
HELLO_SECONDS = 5.0  # for a new connection to give the secret
STRANGERS = 64  # connections without the secret that are kept at a time, beside one for every node
CONNECT_TRIES = 3
LONGEST_LINE = 128
BACKLOG = 1024


def listen(port: int = 0) -> socket.socket:
    """A listener on all interfaces, IPv4 and, where there is any, IPv6; port 0 takes a free one. OSError if taken."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("", port), backlog=BACKLOG)


def new_secret() -> str:
    """For one job, known to its launchers alone."""
    return secrets.token_hex(16)


def connect(address: str, port: int, node: int, secret: str) -> socket.socket | None:
    """Node ``node``'s connection to node 0; None where it cannot be had: the run goes on without.

    A flood of others can crowd it out before it has given the secret: node 0's answer is waited for.
    """
    for _ in range(CONNECT_TRIES):
        with contextlib.suppress(OSError):
            line = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
            with contextlib.ExitStack() as closing:
                closing.callback(line.close)
                line.sendall(f"node {node} {secret}\n".encode())
                if line.recv(LONGEST_LINE) == b"welcome\n":
                    closing.pop_all()
                    return line
    return None


@dataclass
class Peer:
    """The other end of a connection. node is None as long as it has not given the secret, and when it is done."""

    node: int | None
    words: bytes = b""
    answered: bool = False
    since: float = field(default_factory=time.monotonic)
    is_stranger: bool = False


class Lifeline:
    """Context manager around a run: if another launcher goes, this process gets SIGTERM after GRACE_SECONDS.

    Args:
        listener, secret, nodes: on node 0: from `listen` and `new_secret`, and the number of nodes.
        line: on the others, from `connect`.

    Attributes:
        lost: the node that went without having succeeded; None as long as there is none.
        struck: this process was sent SIGTERM for it.
    """

    def __init__(
        self,
        listener: socket.socket | None = None,
        line: socket.socket | None = None,
        secret: str = "",
        nodes: int = 0,
    ) -> None:
        self.lost: int | None = None
        self.struck = False
        self._listener, self._secret, self._nodes = listener, secret, nodes
        self._peers: dict[socket.socket, Peer] = {}
        self._selector = selectors.DefaultSelector()
        if listener:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)
        if line:
            self._add(line, Peer(0))
        self._deadline = float("inf")
        self._over = self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)

    def __enter__(self) -> Lifeline:
        if self._listener or self._peers:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close(succeeded=False)

    def stand_down(self) -> None:
        """The ranks have ended: nothing is left to be stopped."""
        with self._lock:
            self._deadline, self._over = float("inf"), True

    def close(self, succeeded: bool) -> None:
        """Leave, and let the others know how."""
        self.stand_down()
        self._closed = True
        if self._thread.is_alive():
            self._thread.join()
        if succeeded:
            self._tell("done")
        self._selector.close()
        for line in filter(None, [*self._peers, self._listener]):
            line.close()
        self._peers, self._listener = {}, None

    def silent(self, seconds: float = ANSWER_SECONDS) -> list[int]:
        """The nodes that do not answer within ``seconds``, of those that this one is connected to."""
        asked = [peer for peer in self._peers.values() if peer.node is not None]
        for peer in asked:
            peer.answered = False
        self._tell("ping")
        deadline = time.monotonic() + seconds
        while not all(peer.answered for peer in asked) and time.monotonic() < deadline:
            time.sleep(0.05)
        return sorted(peer.node for peer in asked if not peer.answered and peer.node is not None)

    # ---- the thread; it alone changes the connections, in a new dict each time

    def _watch(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(POLL_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._peers:  # else it was dropped just now
                    self._hear(key.fileobj)  # pyright: ignore[reportArgumentType]
            self._drop_strangers()
            with self._lock:
                if time.monotonic() > self._deadline:
                    self._deadline, self.struck = float("inf"), True
                    os.kill(os.getpid(), signal.SIGTERM)

    def _accept(self) -> None:
        assert self._listener
        try:
            line = self._listener.accept()[0]
        except OSError:  # it is gone again, or this process has no file descriptors left
            time.sleep(0.01)
            return
        self._add(line, Peer(None, is_stranger=True))

    def _add(self, line: socket.socket, peer: Peer) -> None:
        line.settimeout(ANSWER_SECONDS)  # nobody who does not read can hold this thread for long
        self._peers = {**self._peers, line: peer}
        self._selector.register(line, selectors.EVENT_READ)

    def _drop(self, line: socket.socket) -> None:
        self._selector.unregister(line)
        self._peers = {other: its for other, its in self._peers.items() if other is not line}
        line.close()

    def _drop_strangers(self) -> None:
        """Those that kept silent too long, and the oldest of a flood."""
        strangers = [line for line, peer in self._peers.items() if peer.is_stranger]
        too_many = len(strangers) - STRANGERS - self._nodes
        for number, line in enumerate(strangers):
            if number < too_many or time.monotonic() - self._peers[line].since > HELLO_SECONDS:
                self._drop(line)

    def _hear(self, line: socket.socket) -> None:
        peer, data = self._peers[line], _receive(line)
        *lines, peer.words = (peer.words + data).split(b"\n")
        for words in lines:
            if peer.is_stranger and not self._introduce(peer, line, words):
                self._drop(line)
                return
            self._understand(peer, line, words.decode(errors="replace"))
        if not data or len(peer.words) > LONGEST_LINE:
            self._drop(line)
            if peer.node is not None:
                self._lose(peer.node)

    def _introduce(self, peer: Peer, line: socket.socket, words: bytes) -> bool:
        """Whether the connection's first words are a node's number and the job's secret."""
        word, _, rest = words.partition(b" ")
        number, _, secret = rest.partition(b" ")
        if word != b"node" or not number.isdigit() or not hmac.compare_digest(secret, self._secret.encode()):
            return False
        peer.node, peer.is_stranger = int(number), False
        for older, its in list(self._peers.items()):
            if its.node == peer.node and older is not line:
                self._drop(older)  # it tried again
        _send(line, "welcome")
        return True

    def _understand(self, peer: Peer, line: socket.socket, words: str) -> None:
        word, _, number = words.partition(" ")
        if word == "ping":
            _send(line, "pong")
        elif word == "pong":
            peer.answered = True
        elif word == "lost" and number.isdecimal():  # node 0 passes on what it noticed
            self._lose(int(number))
        elif word == "done":
            peer.node = None

    def _lose(self, node: int) -> None:
        if self.lost is None:
            self.lost = node
            self._tell(f"lost {node}")
            with self._lock:
                if not self._over:
                    self._deadline = time.monotonic() + GRACE_SECONDS

    def _tell(self, words: str) -> None:
        for line, peer in list(self._peers.items()):
            if not peer.is_stranger:
                _send(line, words)


def _send(line: socket.socket, words: str) -> None:
    with contextlib.suppress(OSError):
        line.sendall(f"{words}\n".encode())


def _receive(line: socket.socket) -> bytes:
    try:
        return line.recv(LONGEST_LINE)
    except OSError:  # reset: its process was killed with unread words
        return b""
