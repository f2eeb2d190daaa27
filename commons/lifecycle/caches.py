"""Caches go where they can be written: a home folder that is not there, or not this user's, ends no run."""

from __future__ import annotations

import contextlib
import os
import pwd
import tempfile
from pathlib import Path

from commons.lifecycle.notices import say

# Where the libraries of a run keep things, and the folder below this user's own that each gets. What is not set here
# goes by XDG_CACHE_HOME: torch, transformers and the kernels that are kept (commons.model.compile).
CACHE_VARIABLES = {
    "XDG_CACHE_HOME": "",
    "TRITON_HOME": "triton",
    "MPLCONFIGDIR": "matplotlib",
    "CUDA_CACHE_PATH": "nv",
}
# Set by users alone; torch makes its folder as soon as it is imported.
CHOSEN_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton/cache", "HF_HOME": "huggingface"}


def settle_caches() -> None:
    """Where the home folder, or one that the user chose for a cache, cannot be written to, take a folder of this user's
    among the temporary ones, and say so. For this process and its children; call it before torch is imported.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:  # torch asks for the user's name
        os.environ.setdefault("USER", f"user-{os.getuid()}")
    if not is_writable(cache_home()):
        unwritable, folder = cache_home(), own_temporary_folder()
        for variable, below in CACHE_VARIABLES.items():
            if variable == "XDG_CACHE_HOME" or not os.environ.get(variable):
                os.environ[variable] = str(folder / below)
        say(f"{unwritable} cannot be written to: caches go to {folder} (XDG_CACHE_HOME chooses another place)")
    for variable, below in (CACHE_VARIABLES | CHOSEN_VARIABLES).items():
        chosen = os.environ.get(variable)
        if chosen and not is_writable(Path(chosen)):
            os.environ[variable] = str(own_temporary_folder() / below)
            say(f"{variable}: {chosen} cannot be written to: {os.environ[variable]} is taken")


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
