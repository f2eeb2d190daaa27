"""The size of a gradient, exact to 1e-6 at every size, and clipping by it.

A single fp32 sum over the gradient of an embedding of 40 million elements loses digits on a CPU: what is added is
smaller than half of the sum's last digit. The norm was seen 3e-5 too small, which is more than an fp32 plan may be from
its reference, and clipping inherits it. Here fp32 sums are short, and they are added up in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROW_ELEMENTS = 1024  # of one fp32 sum on a CPU, which takes as long as a sum over everything


def sum_of_squares(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of the squares of all elements, an fp64 scalar on ``device``; no host waits for it.

    Args:
        tensors: of any floating dtype and shape, all on one device; none at all give 0.
        device: where the sum is wanted.
    """
    filled = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=device)
    if filled[0].device.type == "cpu":
        norms = torch.cat([_row_norms(tensor) for tensor in filled])
    else:
        # the kernel sums up blocks of 65536 elements by themselves, some hundred elements a thread
        norms = torch.stack(torch._foreach_norm(filled, 2, dtype=torch.float32))
    return norms.double().square().sum().to(device)


def _row_norms(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    whole = flat.numel() - flat.numel() % ROW_ELEMENTS
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW_ELEMENTS), dim=1, dtype=torch.float32)
    return torch.cat([rows, torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)[None]])


def clip_(gradients: Sequence[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale ``gradients`` in place so that a gradient of ``norm`` is not longer than ``max_norm``.

    Args:
        gradients: all on one device, this rank's parts of the gradient.
        norm: of the whole gradient, an fp64 scalar on that device. One that is not finite leaves no element finite,
            or zero, as torch.nn.utils.clip_grad_norm_ does.
    """
    if gradients:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(gradients), factor.float())
