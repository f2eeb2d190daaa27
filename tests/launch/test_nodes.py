"""Several machines: two network namespaces of this one, with the real launcher, real ranks and real gloo between
them (tests/worlds/namespaces.py). How the settings are read is tested in test_launcher.py, over the loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from suite_runs import FinishedRun, launch
from worlds.namespaces import ADDRESSES, DRAIN_SECONDS, NAMES, Network, NodeRun, free_port, two_machines, why_impossible

from commons.launch import lifeline
from commons.launch.lifeline import Lifeline
from commons.launch.nodes import Nodes, interface_to_the_others

SETTINGS = ("--device=cpu", "--model_type=gpt2_tiny", "--train_step=4", "--warmup_step=1")
ENDLESS = ("--device=cpu", "--model_type=gpt2_tiny", "--train_step=100000", "--warmup_step=1")
START_SECONDS = 240  # for the imports on a busy machine
# of a node whose peer has gone: its ranks may fail by themselves first, then they are asked to end, then killed
END_SECONDS = lifeline.GRACE_SECONDS + 20
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def machines() -> Iterator[Network]:
    """Skipped, with the reason, where there can be no namespaces; not in CI, where they have to be tested."""
    reason = why_impossible()
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"two machines cannot be made here: {reason}")
    with two_machines() as network:
        yield network


@pytest.fixture
def network(machines: Network) -> Iterator[Network]:
    """The two machines, joined; no test leaves a process in them."""
    machines.connect()
    assert machines.is_empty(), "a process of an earlier test"
    yield machines
    left = [] if machines.is_empty() else machines.pids()
    machines.kill_all()
    assert not left, f"processes left behind: {left}"


def meeting_point(address: str = NAMES[0]) -> dict[str, str]:
    return {"MASTER_ADDR": address, "MASTER_PORT": free_port()}


def both(network: Network, folder: Path, *flags: str, **variables: str) -> tuple[NodeRun, NodeRun]:
    first, second = (NodeRun(network, node, folder, *flags, **variables) for node in range(2))
    return first, second


def end_of(runs: tuple[NodeRun, NodeRun], seconds: float) -> list[FinishedRun]:
    return [run.wait(seconds) for run in runs]


# ---- a run over both


def test_two_machines_train_what_one_does(network: Network, tmp_path: Path) -> None:
    """The names of the machines stand for 127.0.1.1 there: left alone, gloo would listen on that. One is late."""
    where = meeting_point()
    second = NodeRun(network, 1, tmp_path, *SETTINGS, **where)
    time.sleep(4)
    assert second.process.poll() is None, "it waits for node 0"
    first = NodeRun(network, 0, tmp_path, *SETTINGS, **where)
    runs = end_of((first, second), START_SECONDS)
    assert [run.returncode for run in runs] == [0, 0], "\n".join(run.console for run in runs)
    for node, run in enumerate(runs):
        assert f"Node {node} of 2: eth0 ({ADDRESSES[node]}) is the interface to the other nodes." in run.console
    assert (runs[1].run_dir.name, sorted(os.listdir(runs[1].run_dir))) == (runs[0].run_dir.name, ["console-node1.log"])
    alone = launch(tmp_path / "alone", *SETTINGS, ranks=2)
    assert alone.returncode == 0, alone.console
    assert len(alone.losses) == 4
    assert runs[0].losses == alone.losses, "the same two ranks, wherever they are"


# ---- one of them dies


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_launcher_ends_the_other_node_which_names_it(network: Network, tmp_path: Path, dies: int) -> None:
    runs = both(network, tmp_path, *ENDLESS, **meeting_point())
    runs[0].wait_for_steps(2, START_SECONDS)
    runs[dies].process.kill()
    killed, left = runs[dies], runs[1 - dies]
    done = left.wait(END_SECONDS)
    assert done.returncode == 1, done.console
    assert f"Node {dies} ({ADDRESSES[dies]}) ended first: see that node's console." in left.last_lines
    assert killed.wait(5).returncode == -signal.SIGKILL
    assert network.is_empty(), "ranks of the killed launcher"


def process_of_rank(network: Network, rank: int) -> int:
    mark = f"RANK={rank}".encode()
    return next(pid for pid in network.pids() if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def test_a_killed_rank_is_named_on_its_node_and_ends_the_other(network: Network, tmp_path: Path) -> None:
    runs = both(network, tmp_path, *ENDLESS, **meeting_point())
    runs[0].wait_for_steps(2, START_SECONDS)
    os.kill(process_of_rank(network, 1), signal.SIGKILL)
    done = end_of(runs, 30)
    assert [one.returncode for one in done] == [1, 1]
    assert "Rank 1 of 2 failed (killed by SIGKILL" in runs[1].screen
    assert f"Node 1 ({ADDRESSES[1]}) ended first: see that node's console." in runs[0].last_lines


def test_a_hanging_rank_is_named_on_both_nodes(network: Network, tmp_path: Path) -> None:
    runs = both(network, tmp_path, *ENDLESS, "--timeout=20", **meeting_point())
    runs[0].wait_for_steps(2, START_SECONDS)
    os.kill(process_of_rank(network, 1), signal.SIGSTOP)
    done = end_of(runs, 20 + END_SECONDS)
    assert [one.returncode for one in done] == [1, 1]
    for run in runs:
        assert "Rank 1 of 2 on node 1 hung in step" in run.screen
        assert "Rank 1, its stack, innermost line first:" in run.screen and "Rank 0, was waiting for it" in run.screen


def test_a_signal_to_one_node_ends_both(network: Network, tmp_path: Path) -> None:
    runs = both(network, tmp_path, *ENDLESS, **meeting_point())
    runs[0].wait_for_steps(2, START_SECONDS)
    runs[1].process.send_signal(signal.SIGTERM)
    done = end_of(runs, 10)
    assert [one.returncode for one in done] == [128 + signal.SIGTERM] * 2
    last = [run.last_lines.splitlines()[-1] for run in runs]
    assert last[0].startswith("Stopped by SIGTERM after step ")
    assert last[1] == "Stopped by SIGTERM."  # the steps are node 0's to count


def test_a_launcher_killed_before_the_ranks_are_connected(network: Network, tmp_path: Path) -> None:
    """No connection breaks then: the other node's rank would wait for --timeout, ten minutes."""
    where = meeting_point()
    first = NodeRun(network, 0, tmp_path, *ENDLESS, **where)
    stopped_rank = tmp_path / "sitecustomize"
    stopped_rank.mkdir()
    # node 1's rank never gets to the process group
    (stopped_rank / "sitecustomize.py").write_text("import os, time\nif 'LOCAL_RANK' in os.environ: time.sleep(600)\n")
    second = NodeRun(network, 1, tmp_path, *ENDLESS, **where, PYTHONPATH=with_path(stopped_rank))
    deadline = time.monotonic() + START_SECONDS
    while len(network.pids()) < 4:  # two launchers, two ranks
        assert time.monotonic() < deadline, first.screen + second.screen
        time.sleep(0.2)
    second.process.kill()
    done = first.wait(END_SECONDS)
    assert done.returncode == 1, done.console
    assert first.screen.rstrip().endswith(f"Node 1 ({ADDRESSES[1]}) ended first: see that node's console.")


def with_path(*folders: Path) -> str:
    from suite_runs import REPOSITORY

    return os.pathsep.join(map(str, (*folders, REPOSITORY)))


def test_a_network_that_goes_down_is_told_within_the_time_limit(network: Network, tmp_path: Path) -> None:
    limit = 40
    runs = both(network, tmp_path, *ENDLESS, f"--timeout={limit}", **meeting_point())
    runs[0].wait_for_steps(2, START_SECONDS)
    network.cut_off(1)
    for node, done in enumerate(end_of(runs, limit + END_SECONDS)):
        assert done.returncode == 1, done.console
        other = f"Node {1 - node} ({ADDRESSES[1 - node]})"
        assert f"{other} does not answer: is it up, and its network?" in runs[node].last_lines


# ---- they do not come together


def test_a_node_that_does_not_come_is_named(network: Network, tmp_path: Path) -> None:
    where = meeting_point()
    first = NodeRun(network, 0, tmp_path, *SETTINGS, "--timeout=5", **where)
    done = first.wait(START_SECONDS)
    assert done.returncode == 1
    assert "Nothing was started: node 1 did not join within 5 s" in first.last_lines
    second = NodeRun(network, 1, tmp_path, *SETTINGS, "--timeout=5", **where)
    done = second.wait(START_SECONDS)
    assert done.returncode == 1
    assert f"node 1 could not reach node 0 at {NAMES[0]}:{where['MASTER_PORT']} within 5 s" in second.last_lines
    assert not first.log_dir.exists() and not second.log_dir.exists(), "nothing was made"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("10.77.0.9", "No route to host"),  # nobody's
        (NAMES[1], "Connection refused"),  # the other node's
        ("no-such-host.invalid", ""),
    ],
)
def test_a_wrong_address_is_told_on_both(network: Network, tmp_path: Path, address: str, told: str) -> None:
    runs = both(network, tmp_path, *SETTINGS, "--timeout=8", **meeting_point(address))
    first, second = end_of(runs, START_SECONDS)
    assert (first.returncode, second.returncode) == (1, 1)
    assert f"MASTER_ADDR '{address}' does not lead to node 0, which this is ({told}" in first.console
    assert f"set one of its addresses ({ADDRESSES[0]}) or its name" in first.console
    reached = f"MASTER_ADDR '{address}' is no address that node 1 can look up"
    if told:
        reached = f"node 1 could not reach node 0 at {address}:"
    assert reached in second.console
    assert told in second.console
    for run in (first, second):
        assert "frame #" not in run.console and "Traceback" not in run.console


def test_a_taken_port_is_told_on_both(network: Network, tmp_path: Path) -> None:
    """What has it says nothing to whoever connects: torch's store would wait for its words for ever."""
    where = meeting_point()
    listener = f"import socket, time; s = socket.create_server(('', {where['MASTER_PORT']})); time.sleep(600)"
    namespace = ["ip", "netns", "exec", network.namespaces[0]]
    with subprocess.Popen([*namespace, sys.executable, "-c", listener]) as taker:
        try:
            time.sleep(1)
            first, second = end_of(both(network, tmp_path, *SETTINGS, "--timeout=8", **where), START_SECONDS)
        finally:
            taker.kill()
    assert (first.returncode, second.returncode) == (1, 1)
    expected = f"MASTER_PORT {where['MASTER_PORT']} cannot be used on node 0 (Address already in use): set another"
    assert expected in first.console
    assert f"what answers node 1 at {NAMES[0]}:{where['MASTER_PORT']} is not node 0's store" in second.console
    assert "set another MASTER_PORT" in second.console


def test_different_versions_are_refused_with_both_named_on_both(network: Network, tmp_path: Path) -> None:
    other = tmp_path / "other" / "transformers-4.51.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.51.9\n")
    where = meeting_point()
    runs = (
        NodeRun(network, 0, tmp_path, *SETTINGS, **where),
        NodeRun(network, 1, tmp_path, *SETTINGS, **where, PYTHONPATH=with_path(other.parent)),
    )
    for run in end_of(runs, START_SECONDS):
        assert run.returncode == 2, run.console
        expected = "the version of transformers is 4.51.9 on node 1, 4.51.3 on node 0: make them the same"
        assert expected in run.console
        assert not run.run_dir.exists()


# ---- where gloo is told to take a wrong interface


def test_a_wrong_interface_is_explained_by_the_doctor(network: Network, tmp_path: Path) -> None:
    """The rank that is told nothing is stopped, long before --timeout."""
    runs = both(network, tmp_path, *SETTINGS, GLOO_SOCKET_IFNAME="lo", **meeting_point())
    done = end_of(runs, START_SECONDS)
    assert [run.returncode for run in done] == [1, 1]
    (explained, *_) = [run for run in done if "connectFullMesh failed" in run.console]
    final = explained.console.split("connectFullMesh failed")[-1]
    assert "GLOO_SOCKET_IFNAME names an interface that leads to no other machine" in final
    assert "cure: export GLOO_SOCKET_IFNAME=" in final


# ---- the parts by themselves


def test_addresses_in_an_error_are_named() -> None:
    text = "Connection closed by peer [10.0.0.12]:4000, [10.0.0.1]:1"
    nodes = Nodes(8, 2, 0, "10.0.0.1", 29500, ("10.0.0.1", "10.0.0.12"))
    assert nodes.annotate(text) == "Connection closed by peer [10.0.0.12, node 1]:4000, [10.0.0.1, node 0]:1"
    one_machine = Nodes(8, 2, 0, "127.0.0.1", 29500, ("127.0.0.1", "127.0.0.1"))
    assert one_machine.annotate("peer [127.0.0.1]:1") == "peer [127.0.0.1]:1", "it could be either"
    assert Nodes(2).annotate(text) == text


def test_the_interface_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """By any of its addresses, of either family, as the connection itself gives them."""
    there = {
        "lo": ["127.0.0.1", "::1"],
        "eth0": ["02:00:00:00:00:01", "192.0.2.5", "fe80::1%eth0"],
        "ib0": ["10.1.0.5", "10.2.0.5"],
    }
    monkeypatch.setattr(
        "psutil.net_if_addrs", lambda: {n: [SimpleNamespace(address=each) for each in a] for n, a in there.items()}
    )
    cases = {"10.2.0.5": "ib0", "fe80::1%eth0": "eth0", "127.0.0.1": "lo", "10.9.9.9": ""}
    for address, name in cases.items():
        assert interface_to_the_others(Nodes(1, 2, 1, "node0", 1, ("10.0.0.1", address))) == name
    assert interface_to_the_others(Nodes(2)) == ""


SECRET = "0123456789abcdef"


@contextlib.contextmanager
def three_lifelines() -> Iterator[tuple[int, Lifeline, Lifeline, Lifeline]]:
    """The port and the launchers of three nodes; nobody gets a signal here."""
    listener = lifeline.listen()
    port = listener.getsockname()[1]
    with Lifeline(listener, secret=SECRET, nodes=3) as node_0:
        one = Lifeline(line=lifeline.connect("127.0.0.1", port, 1, SECRET))
        two = Lifeline(line=lifeline.connect("::1" if socket.has_dualstack_ipv6() else "127.0.0.1", port, 2, SECRET))
        for line in (node_0, one, two):
            line.stand_down()
        with one, two:
            yield port, node_0, one, two


def answering(node_0: Lifeline) -> list[int]:
    """The nodes that node 0 believes to be connected, once all have answered."""
    assert node_0.silent(5) == []
    return sorted(peer.node for peer in node_0._peers.values() if peer.node is not None)


def test_the_done_are_not_taken_for_losses() -> None:
    with three_lifelines() as (_, node_0, one, two):
        assert answering(node_0) == [1, 2] and one.silent(5) == []
        one.close(succeeded=True)
        time.sleep(3 * lifeline.POLL_SECONDS)
        assert (node_0.lost, two.lost) == (None, None)
        two.close(succeeded=False)
        wait_until(lambda: node_0.lost == 2)


def test_the_loss_of_a_node_is_passed_on() -> None:
    with three_lifelines() as (port, node_0, one, two):
        two.close(succeeded=False)
        wait_until(lambda: one.lost == 2 and node_0.lost == 2)
    assert lifeline.connect("127.0.0.1", port, 1, SECRET) is None, "without one a run goes on"


@pytest.mark.parametrize(
    "words",
    [
        b"node 1\n",
        b"node 1 \n",
        b"node 1 wrong\n",
        b"node 1 %s \n" % SECRET.encode(),
        b"lost 1\n",
        b"done\n",
        b"ping\n",
        b"GET / HTTP/1.1\r\n" * 20,
        b"x" * 100_000,
        bytes(range(256)) * 4,
        b"",
    ],
    ids=lambda words: repr(words[:20]),
)
def test_strangers_change_nothing(words: bytes) -> None:
    with three_lifelines() as (port, node_0, one, two):
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as stranger, contextlib.suppress(OSError):
                stranger.sendall(words)
                stranger.settimeout(0.5)
                with contextlib.suppress(TimeoutError):
                    assert stranger.recv(100) == b"", "nothing is told to a stranger"
        assert answering(node_0) == [1, 2] and one.silent(5) == [] == two.silent(5)
        assert (node_0.lost, one.lost, two.lost) == (None, None, None)


def test_a_flood_of_slow_strangers_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay connected, send a byte now and then, and a launcher gets through all the same."""
    monkeypatch.setattr(lifeline, "HELLO_SECONDS", 2.0)
    with three_lifelines() as (port, node_0, _, two), contextlib.ExitStack() as strangers:
        flood = [strangers.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(300)]
        for stranger in flood:
            with contextlib.suppress(OSError):
                stranger.sendall(b"n")
        late = lifeline.connect("127.0.0.1", port, 1, SECRET)
        assert late is not None
        late.close()
        wait_until(lambda: node_0.lost == 1)  # the late one took the place of the first
        assert len(node_0._peers) <= 3 + lifeline.STRANGERS + 3
        wait_until(lambda: len(node_0._peers) == 1)
        assert two.silent(5) == []


def test_a_stranger_does_not_end_a_run_of_two_machines(network: Network, tmp_path: Path) -> None:
    """Whoever connects to any port of node 0 and says what its launchers say."""
    runs = both(network, tmp_path, *(flag for flag in SETTINGS if "train_step" not in flag), "--train_step=400",
                **meeting_point())  # fmt: skip
    runs[0].wait_for_steps(2, START_SECONDS)
    program = (
        "import socket, re\n"
        "ports = {int(line.split()[1].split(':')[1], 16) for name in ('tcp', 'tcp6') for line in\n"
        "         open('/proc/net/' + name).readlines()[1:] if line.split()[3] == '0A'}\n"
        "for port in ports:\n"
        "    try:\n"
        "        with socket.create_connection(('127.0.0.1', port), 5) as line: line.sendall(b'node 1\\n')\n"
        "    except OSError: pass  # it listens on another address, or wants no stranger\n"
        "print(len(ports))\n"
    )
    inside = ["ip", "netns", "exec", network.namespaces[0], sys.executable, "-c", program]
    asked = subprocess.run(inside, capture_output=True, text=True, timeout=60)
    assert int(asked.stdout) >= 2, asked.stderr
    assert [run.returncode for run in end_of(runs, START_SECONDS)] == [0, 0], runs[0].screen + runs[1].screen


def wait_until(condition, seconds: float = DRAIN_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
