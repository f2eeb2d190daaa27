"""Faults of Colossal-AI 0.5.0 in the way of the suite's plans that can be mended from outside, one class each.

Faults that are avoided by construction are described where that happens: the forward pass, the loss and the
sequence-parallel biases of a split GPT-2 in split_gpt2.py; small models and blocks across chunk boundaries in
chunks.py; memory that is freed while it is read in suite_chunk.py; clipping with offloaded gradients and accumulation
after an overflow in chunk_adam.py.
"""

from __future__ import annotations

from commons.plans.colossal.faults.base import UpstreamFault
from commons.plans.colossal.faults.gradient_norms import GeminiNormOfOnePart, HybridNormCountsPartsAsCopies
from commons.plans.colossal.faults.inference import GatheredAheadForgotten, InferenceCountsAsTraining
from commons.plans.colossal.faults.loss_scale import ScaleGrowsBeforeDivision
from commons.plans.colossal.faults.placement import FractionsCountParameters
from commons.plans.colossal.faults.saving import SplitStatesNotSaved

FAULTS: tuple[UpstreamFault, ...] = (
    FractionsCountParameters(),
    GeminiNormOfOnePart(),
    HybridNormCountsPartsAsCopies(),
    SplitStatesNotSaved(),
    ScaleGrowsBeforeDivision(),
    GatheredAheadForgotten(),
    InferenceCountsAsTraining(),
)


def mend_all() -> None:
    """Mend what the installed Colossal-AI still has wrong. Called once per process, by ``runtime.prepare``."""
    for fault in FAULTS:
        if fault.seen():
            fault.mend()
