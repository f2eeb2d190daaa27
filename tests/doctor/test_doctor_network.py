"""The checks of interfaces and names: README's case 11."""

from __future__ import annotations

import pytest
from worlds.fake_machine import FakeMachine
from worlds.sick_machines import found, only, troubles

from commons.doctor import explain_failure


def test_case_11_hang_between_machines(linux: FakeMachine) -> None:
    linux.hostname_answer = {"hostname": "box", "address": "127.0.1.1"}
    assert troubles(linux) == {}
    finding = only(linux.with_environment(NNODES="2"))
    assert (finding.id, finding.level) == ("hostname.loopback", "warning")
    assert finding.cure.startswith("export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0")
    assert explain_failure("Gloo connectFullMesh failed with ...", linux) == [finding]
    assert troubles(linux.with_environment(GLOO_SOCKET_IFNAME="eth0")) == {}


@pytest.mark.parametrize(
    ("environment", "finding_id"),
    [
        ({"NCCL_SOCKET_IFNAME": "ib0"}, "interface.unknown"),
        ({"GLOO_SOCKET_IFNAME": "eth1,ens3"}, "interface.unknown"),
        ({"NCCL_SOCKET_IFNAME": "docker", "NNODES": "2"}, "interface.virtual"),
        ({"GLOO_SOCKET_IFNAME": "lo", "NNODES": "2"}, "interface.virtual"),
        ({"GLOO_SOCKET_IFNAME": "lo", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}, ""),
        ({"GLOO_SOCKET_IFNAME": "lo"}, ""),
        ({"NCCL_SOCKET_IFNAME": "docker0"}, ""),
        ({"NCCL_SOCKET_IFNAME": "eth"}, ""),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, ""),
        ({"NCCL_SOCKET_IFNAME": "^docker0,virbr0"}, ""),
    ],
)
def test_case_11_interfaces(linux: FakeMachine, environment: dict[str, str], finding_id: str) -> None:
    linux.interfaces.append("docker0")
    assert list(troubles(linux.with_environment(**environment))) == ([finding_id] if finding_id else [])


@pytest.mark.parametrize(
    ("route", "interfaces", "cure"),
    [
        ("eth0", ["lo", "eth0"], "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 "),
        ("docker0", ["lo", "docker0", "ens3"], "export GLOO_SOCKET_IFNAME=ens3 NCCL_SOCKET_IFNAME=ens3 "),
        ("", ["lo", "docker0", "ib0"], "export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0 "),
        ("wg0", ["lo", "wg0"], "export GLOO_SOCKET_IFNAME=wg0 NCCL_SOCKET_IFNAME=wg0 "),
        ("", ["lo", "docker0"], "ip -br addr   # no interface here leads to another machine"),
    ],
)
def test_case_11_the_advice_is_no_interface_that_leads_nowhere(
    linux: FakeMachine, route: str, interfaces: list[str], cure: str
) -> None:
    row = f"{route}\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n" if route else ""
    linux.write("/proc/net/route", f"Iface\n{row}")
    linux.interfaces = interfaces
    linux.with_environment(GLOO_SOCKET_IFNAME="lo", NNODES="2")
    assert only(linux).id == "interface.virtual"
    assert only(linux).cure.startswith(cure)


def test_case_11_a_machine_with_ipv6_alone(linux: FakeMachine) -> None:
    zero = "0" * 32
    rows = [
        f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo",
        f"fe80{'0' * 28} 40 {zero} 00 {zero} 00000100 00000001 00000000 00000001     eth7",
        f"{zero} 00 {zero} 00 fe80{'0' * 28} 00000400 00000001 00000000 00000003     eth0",
    ]
    linux.write("/proc/net/route", "Iface\n")
    linux.write("/proc/net/ipv6_route", "\n".join(rows) + "\n")
    assert found(linux)["interface"].title == "the default route is through eth0"
    linux.write("/proc/net/ipv6_route", "\n".join(rows[:2]) + "\n")
    assert found(linux)["interface"].title == "no default route out of this machine"


def test_case_11_a_name_without_an_address(linux: FakeMachine) -> None:
    linux.hostname_answer = {"hostname": "box", "error": "Name or service not known"}
    assert troubles(linux) == {}
    assert found(linux)["hostname"].title == "box has no address"
    assert only(linux.with_environment(NNODES="1:4")).id == "hostname.loopback"
    assert "box has no address (Name or service not known)" in only(linux).seen


KILLED_RANKS = [
    "Rank 1 of 2 failed (killed by SIGKILL, often because the machine ran out of memory: see `dmesg | tail`).",
    "Rank 1 of 2 failed (killed by SIGTERM).",
    "exitcode  : -9 (pid: 4711), gloo timed out",
    "RuntimeError: [third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.6]:4242",
    "RuntimeError: [third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error: Connection reset by peer",
    "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. The client socket has timed out",
    "DistBackendError: NCCL error: Last error: socketProgress: Connection closed by remote peer node1<53416>",
    "Gloo connectFullMesh failed: rank 1 was killed by signal 9",
]
NOT_KILLED = ["Gloo connectFullMesh failed with [pair.cc:144] no error", "Connection refused", "gloo: timed out"]


@pytest.mark.parametrize("text", KILLED_RANKS + NOT_KILLED)
def test_no_interface_is_blamed_for_a_rank_that_a_signal_ended(linux: FakeMachine, text: str) -> None:
    """Neither by the launcher of that rank nor by the others, which lose a connection that they had."""
    linux.with_environment(GLOO_SOCKET_IFNAME="lo", NNODES="2")
    expected = ["interface.virtual"] if text in NOT_KILLED else []
    assert [finding.id for finding in explain_failure(text, linux)] == expected
