"""Importing Colossal-AI without the packages that it imports but that this suite never calls.

Colossal-AI 0.5.0 imports bitsandbytes, galore_torch and peft at the top of modules that every plugin needs,
for optimizers and LoRA adapters that are not used here. Installing them would add accelerate and about 100
MB, and where they are installed peft alone takes six of the nine seconds of that import, with all that it draws in
(an H100's host, 2026-11-26). Empty stand-ins take their place while Colossal-AI is being imported and are gone
afterwards, so that no other library mistakes them for the real thing.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

MINIMUM_VERSION = (0, 5, 0)

# package -> its modules that Colossal-AI imports from
UNUSED_PACKAGES: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("bitsandbytes.optim", "bitsandbytes.optim.optimizer"),
    "galore_torch": (),
    "peft": ("peft.utils", "peft.utils.other", "peft.utils.save_and_load"),
}


class _StandIn(types.ModuleType):
    """A module that answers every name with an empty class."""

    __path__ = []  # noqa: RUF012  (what makes it a package, whose submodules are looked up in sys.modules)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__})


@contextmanager
def stand_ins() -> Iterator[None]:
    """Put stand-ins for the packages of ``UNUSED_PACKAGES``, but for those imported already, into ``sys.modules`` for a
    while.
    """
    absent = [package for package in UNUSED_PACKAGES if package not in sys.modules]
    names = [name for package in absent for name in (package, *UNUSED_PACKAGES[package])]
    sys.modules.update({name: _StandIn(name) for name in names})
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def check_version() -> None:
    """Raise ``RuntimeError`` with the cure where Colossal-AI is missing or too old to work here."""
    cure = "run `bash install.sh`, or `pip install --no-deps colossalai==0.5.0`"
    try:
        version = importlib.metadata.version("colossalai")
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(f"Colossal-AI is not installed: {cure}") from error
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < MINIMUM_VERSION:
        raise RuntimeError(f"Colossal-AI {version} is too old, 0.5.0 or newer is needed: {cure}")


def import_colossalai() -> None:
    """Import the parts of Colossal-AI that the plans use. Takes 4 to 5 s the first time, nothing afterwards."""
    check_version()
    import transformers.utils  # noqa: F401  (looks for packages by their specs, which stand-ins do not have)

    with stand_ins():
        import colossalai.booster.plugin
        import colossalai.lazy
        import colossalai.legacy.utils.memory
        import colossalai.nn.optimizer  # noqa: F401
