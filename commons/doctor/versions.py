"""The versions that the suite is tested with, and how an environment compares to them.

Standard library only, nothing heavy: install.sh runs this file with every interpreter that might do.

    python commons/doctor/versions.py [--tests] [--gpu]

prints a line for each finding and exits with one of the EXIT_ codes below.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

# Read by install.sh too. Not 1 or 2: an interpreter too old to read this file exits with those.
EXIT_TESTED, EXIT_UNTESTED, EXIT_UNUSABLE = 0, 10, 11


class TestedRange(NamedTuple):
    """Both ends belong to it; "2.13" includes every 2.13.x.

    Below `minimum` nothing can work, nor from `broken_from` on, where that is known.
    """

    oldest: str
    newest: str
    minimum: str
    broken_from: str = ""

    def __str__(self) -> str:
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


PYTHON = TestedRange("3.10", "3.12", minimum="3.10")
TESTED = {
    "torch": TestedRange("2.5.1", "2.13", minimum="2.5"),
    # transformers 5 was seen failing: Colossal-AI's lazy initialisation breaks its import
    "transformers": TestedRange("4.51.3", "4.51.3", minimum="4.40", broken_from="5"),
    "colossalai": TestedRange("0.5.0", "0.5.0", minimum="0.5.0"),
}
# The torch that the GPU tests have passed with, for CUDA 13, and the file that says so.
GPU_TORCH, GPU_TORCH_RESULT = "2.11.0", "benchmarks/results/2026-11-26-h100-copies/parity.json"
# Needed, in whatever version torch and transformers accept.
ANY_VERSION = ("einops", "numpy", "packaging", "psutil", "rich", "safetensors", "tqdm")
TEST_PACKAGES = ("pytest", "pytest-timeout", "pytest-xdist")

CURES = {
    "torch": "pip install torch==2.13.0",
    "transformers": "pip install transformers==4.51.3",
    # its own requirements would replace torch by 2.5.1
    "colossalai": "pip install --no-deps colossalai==0.5.0",
}


class Finding(NamedTuple):
    """usable: False if nothing can run before the cure."""

    package: str
    usable: bool
    message: str


def installed_version(package: str) -> str | None:
    """The version in this interpreter's environment, PYTHONPATH included; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: "2.13.0+cpu" -> (2, 13, 0), "2.14.0rc1" -> (2, 14, 0).

    Raises:
        ValueError: if it does not start with a number.
    """
    found = re.match(r"\d+(\.\d+)*", version)
    if not found:
        raise ValueError(f"not a version: {version!r}")
    return tuple(int(number) for number in found.group().split("."))


def compare(name: str, version: str, tested: TestedRange, cure: str) -> Finding | None:
    """None if `version` lies in the tested range."""
    numbers, newest = release(version), release(tested.newest)
    if numbers < release(tested.minimum):
        text = f"{name} {version} cannot work, {tested.minimum} or newer is needed (tested: {tested}): {cure}"
        return Finding(name, usable=False, message=text)
    if tested.broken_from and numbers >= release(tested.broken_from):
        text = f"{name} {version} cannot work, one older than {tested.broken_from} is needed (tested: {tested}): {cure}"
        return Finding(name, usable=False, message=text)
    if numbers < release(tested.oldest) or numbers[: len(newest)] > newest:
        text = f"{name} {version} is outside the tested range, {tested}; if it fails: {cure}"
        return Finding(name, usable=True, message=text)
    return None


def check_environment(
    *, tests: bool = False, version_of: Callable[[str], str | None] = installed_version
) -> list[Finding]:
    """What in the running interpreter's environment differs from what was tested; empty if nothing does.

    Args:
        tests: whether pytest and its plugins are needed as well.
        version_of: tells a package's version, None if it is missing.
    """
    python = compare(
        "Python",
        "{}.{}.{}".format(*sys.version_info),
        PYTHON,
        f"install Python {PYTHON} and run bash install.sh",
    )
    findings = [python] if python else []
    for package in (*TESTED, *ANY_VERSION, *(TEST_PACKAGES if tests else ())):
        version, cure = version_of(package), CURES.get(package, f"pip install {package}")
        if version is None:
            findings.append(Finding(package, usable=False, message=f"{package} is not installed: {cure}"))
        elif package in TESTED:
            finding = compare(package, version, TESTED[package], cure)
            if finding:
                findings.append(finding)
    return findings


def gpu_note(version: str | None) -> str:
    """What a user of a GPU is to know about another torch than the one that was tested on GPUs; "" for that one."""
    if version is None or release(version) == release(GPU_TORCH):
        return ""
    return f"torch {version} has run on no GPU here, {GPU_TORCH} has; if it fails: pip install torch=={GPU_TORCH}"


def main(argv: list[str]) -> int:
    """Print the findings; see the module's docstring for the exit codes. --gpu adds a note, which is no finding."""
    findings = check_environment(tests="--tests" in argv)
    for finding in findings:
        print(finding.message)
    if "--gpu" in argv and gpu_note(installed_version("torch")):
        print(gpu_note(installed_version("torch")))
    if not findings:
        return EXIT_TESTED
    return EXIT_UNTESTED if all(finding.usable for finding in findings) else EXIT_UNUSABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
