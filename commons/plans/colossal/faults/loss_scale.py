"""The loss scale that gradients carry."""

from __future__ import annotations

from typing import Any

import torch
from colossalai.amp.naive_amp.mixed_precision_mixin.fp16 import FP16MixedPrecisionMixin

from commons.plans.colossal.faults.base import UpstreamFault


class ScaleGrowsBeforeDivision(UpstreamFault):
    file = "amp/naive_amp/mixed_precision_mixin/fp16.py"
    function = "FP16MixedPrecisionMixin.should_skip_step"
    symptom = (
        "the loss scale grows (every 1000 good steps) before the gradients are divided by it: in all plans this"
        " step's gradients are half of what they should be"
    )

    def seen(self) -> bool:
        """Scale by 2 and double the scale after this step: upstream divides this step's gradients by 4."""
        mixin = _ProbeMixin(initial_scale=2, growth_interval=1)
        mixin.pre_backward(torch.ones(()))
        mixin.should_skip_step()
        return mixin.get_grad_div_scale() != 2

    def mend(self) -> None:
        should_skip_step = FP16MixedPrecisionMixin.should_skip_step
        get_grad_div_scale = FP16MixedPrecisionMixin.get_grad_div_scale

        def remember_and_decide(self: Any) -> bool:
            self._scale_of_gradients = self.loss_scale
            return should_skip_step(self)

        def remembered(self: Any) -> float:
            get_grad_div_scale(self)  # for what else it does
            return self._scale_of_gradients

        FP16MixedPrecisionMixin.should_skip_step = remember_and_decide
        FP16MixedPrecisionMixin.get_grad_div_scale = remembered


class _ProbeMixin(FP16MixedPrecisionMixin):
    def check_local_overflow(self) -> bool:
        return False

    def check_overflow(self) -> bool:  # without asking other ranks
        return False
