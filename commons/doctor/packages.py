"""Checks of the installed packages, against the versions with which the suite is tested."""

from __future__ import annotations

from collections.abc import Iterator

from commons.doctor import versions
from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import Distribution, Machine
from commons.doctor.torch_build import install, recommended_torch

INSTALL = "bash install.sh"
TESTED = {**versions.TESTED, "numpy": versions.TestedRange("1.26", "2.5", minimum="1.26")}


def packages(machine: Machine) -> Iterator[Finding]:
    first = {package.name: package for package in reversed(machine.distributions)}
    missing = [name for name in (*versions.TESTED, *versions.ANY_VERSION) if name not in first]
    if missing:
        yield error(
            "missing",
            f"not installed: {', '.join(missing)}",
            seen=machine.python_path,
            why="Training needs them; this may also be another Python than the one that was installed for.",
            cure=INSTALL,
        )
    there = [first[name] for name in TESTED if name in first]
    found = {package: versions.compare(package.name, package.version, TESTED[package.name], "") for package in there}
    for package, difference in found.items():
        if difference:
            yield untested(machine, package, difference.usable)
    good = [f"{package.name} {package.version}" for package, difference in found.items() if not difference]
    if good and not missing:
        yield ok("tested versions", ", ".join(good))


def untested(machine: Machine, package: Distribution, usable: bool) -> Finding:
    tested = TESTED[package.name]
    pip = versions.CURES.get(package.name, f"pip install '{package.name}=={tested.newest}.*'")
    if package.name == "torch":  # the newest tested one may be too new for this driver
        pip = install(machine, recommended_torch(machine))
    seen = f"{package.name} {package.version} in {package.folder}; tested: {tested}"
    cure = f"{INSTALL}   # or: {pip}"
    if usable:
        title, why = (
            f"{package.name} {package.version} is outside the tested versions",
            "It may work; nobody has tried.",
        )
        return warning("untested", title, seen=seen, why=why, cure=cure)
    return error(
        "wrong-version",
        f"{package.name} {package.version} does not work with this suite",
        seen=seen,
        why="Colossal-AI uses internals of torch and transformers, which change: 'cannot import name',"
        " AttributeError or TypeError at the start.",
        cure=cure,
    )


def duplicates(machine: Machine) -> Iterator[Finding]:
    """Two copies of one package: Python takes the one whose folder comes first, pip may see the other."""
    copies: dict[str, list[Distribution]] = {}
    for package in machine.distributions:
        if package.name in TESTED:
            copies.setdefault(package.name, []).append(package)
    twice = {name: found for name, found in copies.items() if len(found) > 1}
    path = machine.environment.get("PYTHONPATH", "")
    for name, found in twice.items():
        finding = error if name == "torch" else warning
        yield finding(
            "twice",
            f"{name} is installed {len(found)} times",
            seen="; ".join(f"{package.version} in {package.folder}" for package in found)
            + (f"; PYTHONPATH={path}" if path else ""),
            why="Python takes the first, pip changes one of them, and files of two versions mix.",
            cure="env -u PYTHONPATH PYTHONNOUSERSITE=1 bash run_gemini.sh   # without other folders\n"
            "rm -rf .venv && bash install.sh   # a fresh environment",
        )
    if not twice:
        yield ok("one copy of each package")
