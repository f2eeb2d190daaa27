"""Checks of how processes talk: a real all-reduce, the network interface it takes, the machine's name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import AllReduce, Machine

ALL_REDUCE_TIMEOUT_SECONDS = 90.0  # two imports of torch on a busy laptop included
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# interfaces of containers, virtual machines and tunnels: other machines are not reached through them
VIRTUAL_INTERFACE = re.compile(r"(lo$|docker|br-|veth|virbr|cni|flannel|cali|tun|tap|wg|tailscale|zt|podman|lxc|vmnet)")
LOOPBACK_NAMES = ("127.", "localhost", "::1")


def wants_several_machines(machine: Machine) -> bool:
    """NNODES above 1, unless the "machines" meet at this one's loopback: then they are all here."""
    if machine.environment.get("MASTER_ADDR", "").startswith(LOOPBACK_NAMES):
        return False
    value = machine.environment.get("NNODES", "1").split(":")[-1]
    return value.isdecimal() and int(value) > 1


def default_route(machine: Machine) -> str:
    """The interface that leads out of this machine, by the kernel's routing table; empty: none."""
    for row in (line.split() for line in (machine.read("/proc/net/route") or "").splitlines()[1:]):
        if len(row) > 7 and row[1] == "00000000" and row[7] == "00000000":
            return row[0]
    return ""


def set_interface(machine: Machine) -> str:
    real = [name for name, found in machine.interface_addresses.items() if found and not VIRTUAL_INTERFACE.match(name)]
    name = default_route(machine) or next(iter(real), "<interface>")
    return f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}   # ip -br addr lists them"


def interface_of(machine: Machine, address: str) -> str:
    names = [name for name, addresses in machine.interface_addresses.items() if address in addresses]
    loopback = address.startswith("127.") or address == "::1"
    return names[0] if names else "lo" if loopback else "?"


def interface(machine: Machine) -> Iterator[Finding]:
    """Do the variables name interfaces that are there and lead somewhere?"""
    there = machine.interface_addresses
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
                    why="Bridges of containers and tunnels end on this machine: the others wait until the time limit.",
                    cure=set_interface(machine),
                )
    if not wrong:
        route = default_route(machine)
        yield ok(f"the way out is {route}" if route else "no way out of this machine", describe(there))


def describe(addresses: dict[str, list[str]]) -> str:
    return ", ".join(f"{name} {' '.join(found)}".strip() for name, found in addresses.items())


def hostname(machine: Machine) -> Iterator[Finding]:
    """gloo listens on the address of the machine's own name, unless GLOO_SOCKET_IFNAME names an interface."""
    answer = machine.hostname_answer
    name, address = answer.get("hostname", "?"), answer.get("address", "")
    several = wants_several_machines(machine)
    if machine.environment.get("GLOO_SOCKET_IFNAME"):
        yield ok("this machine's name does not matter: GLOO_SOCKET_IFNAME is set")
    elif not address:
        finding = error if several else warning
        yield finding(
            "unresolved",
            "this machine's own name has no address",
            seen=f"{name}: {answer.get('error', '')}",
            why="gloo looks it up: a slow start or a failed one, and with several machines only the loopback.",
            cure=f'echo "127.0.1.1 {name}" | sudo tee -a /etc/hosts\n{set_interface(machine)}',
        )
    elif several and address.startswith("127."):
        yield warning(
            "loopback",
            "this machine's name stands for the loopback address, and there are several machines",
            seen=f"{name} is {address} (/etc/hosts); NNODES={machine.environment.get('NNODES')}",
            why="run_gemini.sh has gloo take the interface by which the machines meet. Under plain torchrun gloo goes"
            " by the name, and tells the others to connect to 127.x, which is each machine itself: 'connectFullMesh"
            " failed', or a hang until the time limit.",
            cure=set_interface(machine),
        )
    else:
        note = "fine for one machine; several need GLOO_SOCKET_IFNAME" if address.startswith("127.") else ""
        yield ok(f"{name} is {address}", note)


def all_reduce(machine: Machine) -> Iterator[Finding]:
    """gloo between two processes, and NCCL between up to two GPUs."""
    if not machine.torch.imported:
        return
    if not machine.torch.distributed:
        yield error(
            "no-distributed",
            "this torch was built without torch.distributed",
            seen=f"torch {machine.torch.version}, {machine.torch.path}",
            why="Every plan of this suite is distributed, also on one GPU.",
            cure="bash install.sh",
        )
        return
    yield judge(machine, "gloo", 2)
    if machine.torch.devices:
        yield judge(machine, "nccl", min(2, len(machine.torch.devices)))


def judge(machine: Machine, backend: str, ranks: int) -> Finding:
    result = machine.all_reduce(backend, ranks, ALL_REDUCE_TIMEOUT_SECONDS)
    many = f"{ranks} processes" if ranks > 1 else "one process"
    if result.worked:
        return ok(f"{many} summed over {backend} in {result.seconds * 1e3:.1f} ms", way(machine, backend, result))
    warnings = [line for line in result.log.splitlines() if "NCCL WARN" in line]
    cause = "hangs" if result.timed_out else "fails"
    first = warnings[0].split("NCCL WARN")[-1].strip() if warnings else ""
    cure = {
        "gloo": set_interface(machine),
        "nccl": f"NCCL_P2P_DISABLE=1 bash run_gemini.sh   # if this helps: IOMMU or ACS break peer-to-peer\n"
        f"{set_interface(machine)}",
    }[backend]
    return error(
        f"{backend}-{cause}",
        f"{many} could not sum over {backend}",
        seen=f"{result.error}{'; ' if first else ''}{first}",
        why="Training would stop at its first exchange between processes.",
        cure=cure,
    )


def way(machine: Machine, backend: str, result: AllReduce) -> str:
    """Over which interface the processes met, and for NCCL how the GPUs exchange."""
    if backend == "gloo":
        interfaces = [f"{interface_of(machine, address)} ({address})" for address in result.addresses]
        return "over " + ", ".join(interfaces) if interfaces else ""
    found = re.findall(r"NET/(?:Socket|IB) : Using ([^\n]*)", result.log)
    links = sorted(set(re.findall(r"\bvia ([A-Z0-9]+)", result.log)))
    parts = [f"between GPUs by {', '.join(links)}"] if links else []
    parts += [f"network {found[0].strip()}"] if found else []
    return "; ".join(parts)
