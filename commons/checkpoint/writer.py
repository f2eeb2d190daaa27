"""One checkpoint on its way to the disk, in a thread beside the training.

Every rank writes its own file under the temporary name and, when that is on the disk, a note that says what is in it.
Rank 0 waits for all notes, makes index.json and state.json of them, and gives the folder its name last: whatever has
that name is whole. The ranks meet in the folder alone, since collectives of two threads could cross.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from commons.checkpoint.files import (
    INDEX_FILE,
    STATE_FILE,
    CheckpointError,
    Entry,
    sealed,
    sync_folder,
    write_tensors,
    write_text,
)
from commons.checkpoint.host_copy import HostCopy
from commons.checkpoint.store import free_name, not_whole, remove_all_but
from commons.plans.states import Box, StatePiece

LOOKS_PER_SECOND = 50  # of rank 0 for the others' notes


@dataclass(frozen=True)
class Order:
    """What is to be written.

    Attributes:
        save_dir: where; ``temporary`` is the folder's name in it before it is whole, the same on all ranks.
        state: of state.json, without its files.
        keep: checkpoints that stay; 0: all.
    """

    save_dir: Path
    temporary: str
    state: Mapping[str, Any]
    keep: int
    rank: int
    ranks: int

    @property
    def folder(self) -> Path:
        return self.save_dir / self.temporary


class Writing:
    """Writes from its creation on.

    Attributes:
        own_done: this rank's part is on the disk, or failed.
        error: what went wrong, None before and without.
        path: of the checkpoint, on rank 0 once it is whole.
        seconds, size: from begin to end, and bytes of all files, then.
    """

    def __init__(
        self,
        order: Order,
        copy: HostCopy,
        placed: Sequence[tuple[StatePiece, Box, torch.Tensor]],
        generators: Mapping[str, bytes],
    ) -> None:
        self._order, self._copy, self._placed, self._generators = order, copy, placed, generators
        self._cancelled = threading.Event()
        self.own_done = threading.Event()
        self.error: Exception | None = None
        self.path: Path | None = None
        self.seconds, self.size = 0.0, 0
        self._begun = time.monotonic()
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    @property
    def name(self) -> str:
        return f"The checkpoint of step {self._order.state['step']}"

    @property
    def problem(self) -> str | None:
        """What went wrong, in words."""
        if self.error is None:
            return None
        if isinstance(self.error, OSError) and self.error.strerror:
            return f"{self.error.filename or self._order.save_dir}: {self.error.strerror}"
        return str(self.error) or type(self.error).__name__

    def cancel(self) -> None:
        """A part cannot be written: leave nothing behind. Every rank's part is through."""
        self._cancelled.set()
        self.thread.join()
        if self._order.rank == 0:
            shutil.rmtree(self._order.folder, ignore_errors=True)

    def _write(self) -> None:
        try:
            self._copy.complete()
            self._write_own()
            self.own_done.set()
            if self._order.rank == 0:
                self._conclude()
        except Exception as error:
            self.error = error
        finally:
            self.own_done.set()

    def _write_own(self) -> None:
        order = self._order
        order.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{order.rank:05d}-of-{order.ranks:05d}.safetensors"
        entries, boxes = [], []
        for piece, box, flat in self._placed:
            key = f"{piece.name}/{piece.kind}@{','.join(map(str, box.offsets))}"
            data: Any = flat.numpy()
            entries.append(Entry(key, "F32", box.sizes, memoryview(data).cast("B")))
            boxes.append((key, piece.name, piece.kind, box.offsets, box.sizes))
        for kind, state in self._generators.items():
            entries.append(Entry(f"generator/{kind}", "U8", (len(state),), memoryview(state)))
        written = write_tensors(order.folder / name, entries)
        note = {
            "file": name,
            "bytes": written.size,
            "sha256": written.sha256,
            "boxes": [[*where, written.begins[key]] for key, *where in boxes],
            "generators": {
                kind: [name, written.begins[f"generator/{kind}"], len(state)]
                for kind, state in self._generators.items()
            },
            "shapes": {piece.name: piece.shape for piece, _, _ in self._placed},
        }
        draft = order.folder / f"note-{order.rank}.draft"
        write_text(draft, json.dumps(note))
        draft.rename(_note(order.folder, order.rank))

    def _conclude(self) -> None:
        """Rank 0, when every rank's part is on the disk: give the checkpoint its name."""
        order = self._order
        notes = []
        for rank in range(order.ranks):
            while not _note(order.folder, rank).exists():
                if self._cancelled.wait(1 / LOOKS_PER_SECOND):
                    return
            notes.append(json.loads(_note(order.folder, rank).read_text()))
        index = _index(notes)
        missing = not_whole(index)
        if missing:
            raise CheckpointError(f"{order.folder}: the ranks have not written all of {', '.join(missing[:3])}")
        listed = write_text(order.folder / INDEX_FILE, json.dumps(index, separators=(",", ":")))
        files = {note["file"]: {"bytes": note["bytes"], "sha256": note["sha256"]} for note in notes}
        files[INDEX_FILE] = {"bytes": listed.size, "sha256": listed.sha256}
        write_text(order.folder / STATE_FILE, sealed({**order.state, "saved_at": time.time(), "files": files}))
        for rank in range(order.ranks):
            _note(order.folder, rank).unlink()
        sync_folder(order.folder)
        path = free_name(order.save_dir, order.state["step"])
        order.folder.rename(path)
        sync_folder(order.save_dir)
        self.size, self.seconds = sum(file["bytes"] for file in files.values()), time.monotonic() - self._begun
        self.path = path
        if order.keep:
            remove_all_but(order.save_dir, order.keep)


def _note(folder: Path, rank: int) -> Path:
    return folder / f"note-{rank}.json"


def _index(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """index.json of all ranks' notes."""
    tensors: dict[str, Any] = {}
    for note in notes:
        for name, kind, offsets, sizes, first_byte in note["boxes"]:
            entry = tensors.setdefault(name, {"shape": note["shapes"][name], "boxes": {}})
            entry["boxes"].setdefault(kind, []).append([note["file"], offsets, sizes, first_byte])
    return {"tensors": tensors, "generators": {str(rank): note["generators"] for rank, note in enumerate(notes)}}
