"""The states of this process's random generators as bytes: dropout goes on where it stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch


def generator_states(device: torch.device) -> dict[str, bytes]:
    """Of Python, NumPy, torch on the host and, on a GPU, torch there."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": json.dumps(random.getstate()).encode(),
        "numpy": json.dumps([kind, keys.tolist(), *rest]).encode(),  # pyright: ignore
        "torch": _bytes(torch.get_rng_state()),
    }
    if device.type == "cuda":
        states["cuda"] = _bytes(torch.cuda.get_rng_state(device))
    return states


def set_generator_states(states: Mapping[str, bytes], device: torch.device) -> None:
    """Go on from ``states``; one of a device that is not here is left out."""
    version, internal, gauss = json.loads(states["python"])
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = json.loads(states["numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_tensor(states["cuda"]), device)


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
