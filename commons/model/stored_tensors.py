"""Named tensors on disk, of which any part can be read by itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from commons.config.gpt2_folder import FolderError, GPT2Folder

Box = tuple[slice, ...]  # one slice per dimension


class TensorReader(Protocol):
    """A model's parameters by HuggingFace's names, the vocabulary unpadded."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """The part of a parameter that ``box`` cuts out, or all of it: fp32, on the CPU, no view of anything."""
        ...


class FolderTensors:
    """The weights of a HuggingFace folder. Files are mapped into memory: a part is read, not its file."""

    def __init__(self, folder: GPT2Folder) -> None:
        self._folder = folder
        self._opened: dict[Path, Any] = {}

    def names(self) -> Iterable[str]:
        return self._folder.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._folder.tensors[name].size

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        stored = self._folder.tensors[name]
        whole = tuple(slice(0, length) for length in stored.size)
        part = self._file(stored.file).get_slice(stored.name)[box or whole]
        return part.to(torch.float32, copy=True)

    def _file(self, file: Path) -> Any:
        from safetensors import safe_open

        if file not in self._opened:
            try:
                self._opened[file] = safe_open(file, framework="pt")
            except OSError as error:
                raise FolderError([f"cannot read {file}: {error.strerror or error}"]) from None
        return self._opened[file]
