"""One launcher notices that another one is gone.

Ranks that are connected notice it themselves: a broken connection ends a collective. Ranks that are still on
their way to each other do not, and would wait for --timeout. So every launcher keeps a connection open to node
0's. It closes when its launcher ends in whatever way, kill -9 among them; only one that succeeded says so first.
A network that swallows packets closes nothing: that is what --timeout is for.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from dataclasses import dataclass

POLL_SECONDS = 0.5
# for the ranks to fail by themselves, which tells more than being stopped
GRACE_SECONDS = 10.0
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 3.0
LONGEST_LINE = 64


def listen() -> socket.socket:
    """A listener for node 0's Lifeline, on a free port of all interfaces."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def connect(address: str, port: int, node: int) -> socket.socket | None:
    """Node ``node``'s connection to node 0; None where it cannot be had: the run goes on without."""
    try:
        line = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        line.settimeout(None)
        line.sendall(b"node %d\n" % node)
    except OSError:
        return None
    return line


@dataclass
class Peer:
    """The other end of a connection. node is None until it said which it is."""

    node: int | None
    words: bytes = b""
    answered: bool = False


class Lifeline:
    """Context manager around a run: if another launcher goes, this process gets SIGTERM after GRACE_SECONDS.

    Args:
        listener: on node 0, from `listen`.
        line: on the others, from `connect`.

    Attributes:
        lost: the node that went without having succeeded; None as long as there is none.
        struck: this process was sent SIGTERM for it.
    """

    def __init__(self, listener: socket.socket | None = None, line: socket.socket | None = None) -> None:
        self.lost: int | None = None
        self.struck = False
        self._listener = listener
        self._peers = {line: Peer(0)} if line else {}
        self._deadline = float("inf")
        self._over = False
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

    _closed = False

    def _watch(self) -> None:
        while not self._closed:
            ready, _, _ = select.select([*filter(None, [self._listener]), *self._peers], [], [], POLL_SECONDS)
            for source in ready:
                if source is self._listener:
                    self._peers = {**self._peers, source.accept()[0]: Peer(None)}
                else:
                    self._listen_to(source)
            with self._lock:
                if time.monotonic() > self._deadline:
                    self._deadline, self.struck = float("inf"), True
                    os.kill(os.getpid(), signal.SIGTERM)

    def _listen_to(self, line: socket.socket) -> None:
        peer, data = self._peers[line], _receive(line)
        *lines, peer.words = (peer.words + data).split(b"\n")
        for words in lines:
            self._understand(peer, line, words.decode(errors="replace"))
        if not data or len(peer.words) > LONGEST_LINE:
            self._peers = {other: its for other, its in self._peers.items() if other is not line}
            line.close()
            if peer.node is not None:  # else a stranger
                self._lose(peer.node)

    def _understand(self, peer: Peer, line: socket.socket, words: str) -> None:
        word, _, number = words.partition(" ")
        if word == "node" and peer.node is None and number.isdecimal():
            peer.node = int(number)
        elif word == "ping":
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
        for line in list(self._peers):
            _send(line, words)


def _send(line: socket.socket, words: str) -> None:
    with contextlib.suppress(OSError):
        line.sendall(f"{words}\n".encode())


def _receive(line: socket.socket) -> bytes:
    try:
        return line.recv(LONGEST_LINE)
    except OSError:  # reset: its process was killed with unread words
        return b""
