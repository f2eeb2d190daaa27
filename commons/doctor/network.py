"""Checks of how machines reach each other: the network interface that is used, this machine's name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import Machine

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# the loopback and the bridges of containers and virtual machines: they lead to no other machine
VIRTUAL_INTERFACE = re.compile(r"(lo$|docker|br-|veth|virbr|cni|cali|podman|lxc|vmnet)")
LOOPBACK_NAMES = ("127.", "localhost", "::1")


def wants_several_machines(machine: Machine) -> bool:
    """NNODES above 1, unless the "machines" meet at the loopback address: then all of them are this one."""
    if machine.environment.get("MASTER_ADDR", "").startswith(LOOPBACK_NAMES):
        return False
    value = machine.environment.get("NNODES", "1").split(":")[-1]
    return value.isdecimal() and int(value) > 1


def default_route(machine: Machine) -> str:
    """The interface that leads out of this machine, by the kernel's tables for IPv4, then for IPv6; empty: none."""
    for row in (line.split() for line in (machine.read("/proc/net/route") or "").splitlines()[1:]):
        if len(row) > 7 and row[1] == "00000000" and row[7] == "00000000":
            return row[0]
    for row in (line.split() for line in (machine.read("/proc/net/ipv6_route") or "").splitlines()):
        if len(row) == 10 and set(row[0]) == {"0"} and row[1] == "00" and row[9] != "lo":
            return row[9]
    return ""


def set_interface(machine: Machine) -> str:
    """The command that has gloo and NCCL use the interface by which this machine reaches others."""
    candidates = [name for name in (default_route(machine), *machine.interfaces) if name]
    name = next((each for each in candidates if not VIRTUAL_INTERFACE.match(each)), "")
    if not name:
        return "ip -br addr   # no interface here leads to another machine: connect this one to their network"
    return f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}   # ip -br addr lists them"


def interface(machine: Machine) -> Iterator[Finding]:
    """Do the variables name interfaces that are there and lead to other machines?"""
    there = machine.interfaces
    wrong = False
    for variable in INTERFACE_VARIABLES:
        value = machine.environment.get(variable, "")
        names = [name.lstrip("=") for name in value.split(",") if name and not value.startswith("^")]
        matches = [name for name in names if any(each.startswith(name.split(":")[0]) for each in there)]
        if names and not matches:
            wrong = True
            yield error(
                "unknown",
                f"{variable} names an interface that is not there",
                seen=f"{variable}={value}; here: {', '.join(there)}",
                why="The backend does not start, or waits for its partners until the time limit.",
                cure=f"unset {variable}   # or: {set_interface(machine)}",
            )
        for name in matches:
            if VIRTUAL_INTERFACE.match(name) and wants_several_machines(machine):
                wrong = True
                yield error(
                    "virtual",
                    f"{variable} names an interface that leads to no other machine",
                    seen=f"{variable}={value}",
                    why="The loopback and bridges of containers end on this machine: the others wait until the time"
                    " limit.",
                    cure=set_interface(machine),
                )
    if not wrong:
        route = default_route(machine)
        title = f"the default route is through {route}" if route else "no default route out of this machine"
        yield ok(title, ", ".join(there))


def hostname(machine: Machine) -> Iterator[Finding]:
    """gloo listens on the address of the machine's own name, unless GLOO_SOCKET_IFNAME names an interface."""
    answer = machine.hostname_answer
    name, address = answer.get("hostname", "?"), answer.get("address", "")
    local = not address or address.startswith("127.")
    if machine.environment.get("GLOO_SOCKET_IFNAME"):
        yield ok("this machine's name does not matter: GLOO_SOCKET_IFNAME is set")
    elif local and wants_several_machines(machine):
        stands_for = f"is {address} (/etc/hosts)" if address else f"has no address ({answer.get('error', '')})"
        yield warning(
            "loopback",
            "this machine's name stands for the loopback address, and there are several machines",
            seen=f"{name} {stands_for}; NNODES={machine.environment.get('NNODES')}",
            why="run_gemini.sh has gloo use the interface through which the machines meet. Under plain torchrun gloo"
            " goes by the name, and tells the others to connect to 127.x, which is each machine itself:"
            " 'connectFullMesh failed', or a hang until the time limit.",
            cure=set_interface(machine),
        )
    else:
        note = "fine for one machine; several need GLOO_SOCKET_IFNAME" if local else ""
        yield ok(f"{name} is {address}" if address else f"{name} has no address", note)
