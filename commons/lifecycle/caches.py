"""Caches go where they can be written: a home folder that is not there, or not this user's, ends no run."""

from __future__ import annotations

import contextlib
import os
import pwd
import tempfile
from pathlib import Path

from commons.lifecycle.notices import say

# What the libraries of a run read, and the folder below the cache that it gets. torch, transformers and the kernels
# that are kept (commons.model.compile) go by XDG_CACHE_HOME.
CACHE_VARIABLES = {
    "XDG_CACHE_HOME": "",
    "TRITON_HOME": "triton",
    "MPLCONFIGDIR": "matplotlib",
    "CUDA_CACHE_PATH": "nv",
}


def settle_caches() -> None:
    """Where the home folder cannot be written to, let all caches of this process and its children go to a folder of
    this user's among the temporary ones, and say so. Call it before torch is imported.
    """
    with contextlib.suppress(KeyError):
        pwd.getpwuid(os.getuid())
        if is_writable(cache_home()):
            return
    # torch asks for the user's name too, which an unknown number has not
    os.environ.setdefault("USER", f"user-{os.getuid()}")
    if is_writable(cache_home()):
        return
    unwritable, folder = cache_home(), own_temporary_folder()
    for variable, below in CACHE_VARIABLES.items():
        if variable == "XDG_CACHE_HOME" or not os.environ.get(variable):
            os.environ[variable] = str(folder / below)
    say(f"{unwritable} cannot be written to: caches go to {folder} (XDG_CACHE_HOME chooses another place)")


def cache_home() -> Path:
    """Where programs keep their caches, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache")


def is_writable(folder: Path) -> bool:
    """Whether files can be made there; the folder is made where it does not exist yet."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def own_temporary_folder() -> Path:
    """A folder that stays for later runs, and that nobody else can have prepared."""
    folder = Path(tempfile.gettempdir()) / f"gemini-gpt2-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    seen = folder.lstat()
    if seen.st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink() and not seen.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="gemini-gpt2-"))
