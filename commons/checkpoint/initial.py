"""``--init_from``: a training that begins with the weights of a HuggingFace folder, under every plan."""

from __future__ import annotations

import torch

from commons.config.gpt2_folder import look_through
from commons.model.stored_tensors import FolderTensors
from commons.plans.states import Box
from commons.plans.trainable import Trainable


def fill_weights(folder: str, trainable: Trainable) -> None:
    """Fill this rank's part of the master weights, each box read by itself, and what is computed with (collective).

    Masters are the folder's weights to the bit, whatever the precision of compute. Rows that pad the vocabulary stay
    as they are: no token reads them, and no loss sees them.

    Raises:
        FolderError: the folder cannot be read any more; it has been looked through before.
    """
    reader = FolderTensors(look_through(folder))
    with torch.no_grad():
        for piece in trainable.states():
            if piece.kind == "master":
                for box in piece.boxes:
                    box.tensor.copy_(reader.read(piece.name, _slices(box)))
    trainable.after_load()


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.sizes, strict=True))
