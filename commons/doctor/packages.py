"""Checks of Python and of the installed packages, against the versions with which the suite is tested."""

from __future__ import annotations

import re
from collections.abc import Iterator

from commons.doctor import versions
from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import Distribution, Machine

INSTALL = "bash install.sh"
REBUILD = "rm -rf .venv && bash install.sh   # a fresh environment"
TESTED = {**versions.TESTED, "numpy": versions.TestedRange("1.26", "2.5", minimum="1.26")}
# seen failing: Colossal-AI's lazy initialisation breaks the import of transformers 5
FAILS_FROM = {"transformers": (5,)}


def python(machine: Machine) -> Iterator[Finding]:
    text = ".".join(map(str, machine.python))
    if machine.python[:2] <= versions.release(versions.PYTHON.newest):
        yield ok(f"Python {text}", machine.python_path)
        return
    yield warning(
        "untested",
        f"Python {text} is newer than what the suite is tested with",
        seen=f"{machine.python_path}; tested: {versions.PYTHON}",
        why="Some of the pinned packages have no wheel for it, or fail where they have never run.",
        cure=f"sudo apt-get install python{versions.PYTHON.newest}-venv && {INSTALL}",
    )


def packages(machine: Machine) -> Iterator[Finding]:
    first = {package.name: package for package in reversed(machine.distributions)}
    needed = (*versions.TESTED, *versions.ANY_VERSION)
    missing = [name for name in needed if name not in first]
    if missing:
        yield error(
            "missing",
            f"not installed: {', '.join(missing)}",
            seen=machine.python_path,
            why="Training needs them; this may also be another Python than the one that was installed for.",
            cure=INSTALL,
        )
    good = []
    for name, tested in TESTED.items():
        if name not in first:
            continue
        package = first[name]
        if is_tested(package.version, tested):
            good.append(f"{name} {package.version}")
        else:
            yield untested(package, tested)
    if good and not missing:
        yield ok("tested versions", ", ".join(good))


def is_tested(version: str, tested: versions.TestedRange) -> bool:
    """The newest version counts with all its patch releases: 2.13.7 is within "2.13"."""
    numbers, newest = versions.release(version), versions.release(tested.newest)
    return versions.release(tested.oldest) <= numbers and numbers[: len(newest)] <= newest


def untested(package: Distribution, tested: versions.TestedRange) -> Finding:
    numbers = versions.release(package.version)
    install = versions.CURES.get(package.name, f"pip install '{package.name}=={tested.newest}.*'")
    cure = f"{INSTALL}   # or: {install}"
    fails = numbers < versions.release(tested.minimum) or numbers >= FAILS_FROM.get(package.name, (1000,))
    if fails:
        return error(
            "wrong-version",
            f"{package.name} {package.version} does not work with this suite",
            seen=f"{package.name} {package.version} in {package.folder}; tested: {tested}",
            why="Colossal-AI reaches into the insides of torch and transformers, which change: 'cannot import"
            " name', AttributeError or TypeError at the start.",
            cure=cure,
        )
    return warning(
        "untested",
        f"{package.name} {package.version} is outside the tested versions",
        seen=f"{package.name} {package.version} in {package.folder}; tested: {tested}",
        why="It may work; nobody has tried.",
        cure=cure,
    )


def duplicates(machine: Machine) -> Iterator[Finding]:
    """Two copies of one package: the folder that comes first on the path wins, pip may see the other."""
    copies: dict[str, list[Distribution]] = {}
    for package in machine.distributions:
        if package.name in TESTED:
            copies.setdefault(package.name, []).append(package)
    twice = {name: found for name, found in copies.items() if len(found) > 1}
    for name, found in twice.items():
        finding = error if name == "torch" else warning
        yield finding(
            "twice",
            f"{name} is installed {len(found)} times",
            seen="; ".join(f"{package.version} in {package.folder}" for package in found) + path_note(machine),
            why="Python takes the first, pip changes one of them, and files of two versions mix.",
            cure=f"env -u PYTHONPATH PYTHONNOUSERSITE=1 bash run_gemini.sh   # without other folders\n{REBUILD}",
        )
    libraries = mixed_cuda_libraries(machine)
    if libraries:
        yield mixed(machine, libraries)
    if not twice and not libraries:
        yield ok("one copy of each package")


def path_note(machine: Machine) -> str:
    path = machine.environment.get("PYTHONPATH", "")
    return f"; PYTHONPATH={path}" if path else ""


# what NVIDIA installs to a folder without the CUDA version in its name, whatever the version
SHARED_CUDA_LIBRARIES = re.compile(r"nvidia-(nccl|cudnn|nvshmem|cusparselt)-cu(\d+)")


def shared_cuda_libraries(machine: Machine) -> list[Distribution]:
    return [package for package in machine.distributions if SHARED_CUDA_LIBRARIES.fullmatch(package.name)]


def mixed_cuda_libraries(machine: Machine) -> list[Distribution]:
    """Packages like nvidia-nccl-cu12 beside nvidia-nccl-cu13, which install to the same folder."""

    def place(package: Distribution) -> tuple[str, str]:
        return package.name.rsplit("-", 1)[0], package.folder

    found = shared_cuda_libraries(machine)
    return [each for each in found if sum(place(other) == place(each) for other in found) > 1]


def mixed(machine: Machine, libraries: list[Distribution]) -> Finding:
    """Both versions wrote the same files: the one that torch needs has to be written again."""
    suffix = f"-cu{(machine.torch_files.cuda or '').split('.')[0]}"
    needed = [f"{package.name}=={package.version}" for package in libraries if package.name.endswith(suffix)]
    others = [package.name for package in libraries if not package.name.endswith(suffix)]
    pip = f"{machine.python_path} -m pip"
    return warning(
        "cuda-libraries",
        "libraries for two CUDA versions share a folder",
        seen=", ".join(f"{package.name} {package.version}" for package in libraries),
        why="nvidia-nccl-cu12 and -cu13, for instance, write the same files: torch loads what came last, and"
        " removing one takes the other's files along.",
        cure=f"{pip} uninstall -y {' '.join(others)}\n{pip} install --force-reinstall --no-deps {' '.join(needed)}"
        if needed
        else REBUILD,
    )
