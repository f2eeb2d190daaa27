"""Matrix products with something done to their result before it leaves the chip: cuBLASLt's epilogues, which torch does
not offer.

torch brings the library and has it loaded; its C interface has been the same from CUDA 11.4 to 13, so a few calls
through ctypes are enough, with no compiler and no package more. The numbers are those of cublasLt.h; what they mean:
https://docs.nvidia.com/cuda/cublas/#cublaslt-datatypes-reference
"""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from enum import IntEnum
from typing import Any

import torch

WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises for Hopper
ALIGNED_BYTES = 256  # the most that the library asks about
DATA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
COMPUTE_32F = 68  # cublasComputeType_t: products are summed up in fp32
TRANSPOSED = 1  # cublasOperation_t


# Kernels of the library's choice that are timed. Its first is not always its fastest: GELU's derivative with a product
# of gpt2_xl's shape took 0.617 ms with the first of eight and 0.553 with the seventh (H100, 2026-11-26).
CHOICES = 8
REPEATS = 5
# What another kernel's time has to be below, of the first one's: timed alone, one that was 2 % faster was 8 % slower
# in a step, where power and caches are shared.
GAIN = 0.95


class Epilogue(IntEnum):
    """What is done to a product, cublasLtEpilogue_t. GELU is the library's, in its tanh form."""

    BIAS = 4  # a bias is added; here another matrix too, which the library takes with every epilogue
    GELU_AUX_BIAS = 164  # a bias is added, the sum is written to the side, and its GELU is the result
    DGELU = 192  # multiplied by GELU's derivative at what is read from the side


class _Attribute(IntEnum):
    """Of a product, cublasLtMatmulDescAttributes_t."""

    TRANS_A = 3
    EPILOGUE = 7
    BIAS_POINTER = 8
    EPILOGUE_AUX_POINTER = 11
    EPILOGUE_AUX_LD = 12


class _Preference(IntEnum):
    """Of the choice of a kernel, cublasLtMatmulPreferenceAttributes_t."""

    MAX_WORKSPACE_BYTES = 1
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


class _Choice(ctypes.Structure):
    """A kernel for a product, cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The cuBLASLt that torch has loaded; None where torch has none."""
    if torch.version.cuda is None:
        return None
    try:
        name = f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}"
        return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)  # torch's, and no other that may lie about
    except OSError:
        return None


class CublasLtError(RuntimeError):
    """A call failed; the message has cublasStatus_t's number."""


def _call(name: str, *arguments: Any) -> None:
    status = getattr(library(), name)(*arguments)
    if status:
        raise CublasLtError(f"{name} failed with status {status}")


@functools.cache
def _handle(device: int) -> c_void_p:
    with torch.cuda.device(device):
        return _created("cublasLtCreate")


def _created(name: str, *arguments: Any) -> c_void_p:
    made = c_void_p()
    _call(name, byref(made), *arguments)
    return made


def alignment(*tensors: torch.Tensor) -> int:
    """The largest power of two, up to ``ALIGNED_BYTES``, that divides the addresses of all ``tensors``."""
    bits = ALIGNED_BYTES
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & -bits


class Product:
    """``epilogue(left @ right)`` of one shape on one device. Kept as long as the process.

    The library thinks column by column: what is [rows, out] here is [out, rows] there, and the factors change places.

    Args:
        rows, inner, out: ``left`` is [rows, inner], the result [rows, out].
        right_is_transposed: ``right`` is [out, inner] instead of [inner, out].
        epilogue: what is done to the product.
        dtype: of all matrices and of the bias.
        aligned: a power of two that divides the addresses of all of them.
        device: index of the GPU.

    Raises:
        CublasLtError: the library has no kernel for it.
    """

    def __init__(
        self,
        rows: int,
        inner: int,
        out: int,
        right_is_transposed: bool,
        epilogue: Epilogue,
        dtype: torch.dtype,
        aligned: int,
        device: int,
    ) -> None:
        kind = DATA_TYPES[dtype]
        self._handle, self._epilogue = _handle(device), epilogue
        self._product = _created("cublasLtMatmulDescCreate", c_int(COMPUTE_32F), c_int(DATA_TYPES[torch.float32]))
        self._set(_Attribute.TRANS_A, c_int(TRANSPOSED if right_is_transposed else 0))
        self._set(_Attribute.EPILOGUE, c_uint32(epilogue))
        # the choice of a kernel looks at how these are aligned
        if epilogue is not Epilogue.BIAS:
            self._set(_Attribute.EPILOGUE_AUX_LD, c_int64(out))
            self._set(_Attribute.EPILOGUE_AUX_POINTER, c_void_p(aligned))
        if epilogue is not Epilogue.DGELU:
            self._set(_Attribute.BIAS_POINTER, c_void_p(aligned))

        def columns(height: int, width: int) -> c_void_p:
            return _created(
                "cublasLtMatrixLayoutCreate", c_int(kind), c_uint64(height), c_uint64(width), c_int64(height)
            )

        self._right = columns(inner, out) if right_is_transposed else columns(out, inner)
        self._left, self._out = columns(inner, rows), columns(out, rows)
        self._choices = self._found(aligned)
        self._choice = self._choices[0]
        self._one = c_float(1)
        self._shape = rows, inner, out
        self._transposed = right_is_transposed
        self._dtype = dtype
        self._device = device

    def _set(self, attribute: _Attribute, value: Any) -> None:
        _call("cublasLtMatmulDescSetAttribute", self._product, c_int(attribute), byref(value), c_size_t(sizeof(value)))

    def _found(self, aligned: int) -> list[_Choice]:
        """Kernels for the product, the one first that the library thinks best."""
        wishes = {
            _Preference.MAX_WORKSPACE_BYTES: c_uint64(WORKSPACE_BYTES),
            **dict.fromkeys(list(_Preference)[1:], c_uint32(aligned)),
        }
        preference = _created("cublasLtMatmulPreferenceCreate")
        for name, value in wishes.items():
            _call(
                "cublasLtMatmulPreferenceSetAttribute",
                preference,
                c_int(name),
                byref(value),
                c_size_t(sizeof(value)),
            )
        choices, found = (_Choice * CHOICES)(), c_int()
        matrices = self._right, self._left, self._out, self._out
        try:
            _call(
                "cublasLtMatmulAlgoGetHeuristic",
                self._handle,
                self._product,
                *matrices,
                preference,
                c_int(CHOICES),
                choices,
                byref(found),
            )
        finally:
            _call("cublasLtMatmulPreferenceDestroy", preference)
        good = [choice for choice in choices[: found.value] if not choice.status]
        if not good:
            raise CublasLtError("cuBLASLt has no kernel for this product")
        return good

    def tune(self) -> None:
        """Time the library's kernels on random matrices and keep the fastest. Waits for the device, and takes memory
        for the matrices meanwhile; without it the first kernel stays.
        """
        rows, inner, out = self._shape
        device = torch.device("cuda", self._device)
        generator = torch.Generator(device).manual_seed(0)  # the training's own random numbers stay as they are

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=self._dtype, device=device)

        try:
            left, right = random(rows, inner), random(*((out, inner) if self._transposed else (inner, out)))
            result, aside, bias = random(rows, out), random(rows, out), random(out)
        except torch.cuda.OutOfMemoryError:
            return
        times: list[list[float]] = [[] for _ in self._choices]
        for _ in range(REPEATS + 1):
            for choice, taken in zip(self._choices, times, strict=True):
                self._choice = choice
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                self(left, right, result, aside, bias)
                end.record()
                end.synchronize()
                taken.append(begin.elapsed_time(end))
        medians = [statistics.median(taken[1:]) for taken in times]
        best = min(range(len(medians)), key=medians.__getitem__)
        self._choice = self._choices[best if medians[best] < GAIN * medians[0] else 0]

    def __call__(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        out: torch.Tensor,
        aside: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Write ``epilogue(left @ right)`` into ``out``, on the current stream.

        Args:
            left: [rows, inner].
            right: [inner, out], or [out, inner] where it is transposed.
            out: [rows, out].
            aside: [rows, out], what the epilogue writes or reads beside the product; for BIAS it is added to it.
            bias: [out].

        Raises:
            CublasLtError: the product cannot be started.
        """
        adds = self._epilogue is Epilogue.BIAS
        if not adds:
            self._set(_Attribute.EPILOGUE_AUX_POINTER, c_void_p(aside.data_ptr()))
        if self._epilogue is not Epilogue.DGELU:
            assert bias is not None
            self._set(_Attribute.BIAS_POINTER, c_void_p(bias.data_ptr()))
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=left.device)
        target = c_void_p(out.data_ptr())
        _call(
            "cublasLtMatmul",
            self._handle,
            self._product,
            byref(self._one),
            c_void_p(right.data_ptr()),
            self._right,
            c_void_p(left.data_ptr()),
            self._left,
            byref(self._one if adds else c_float(0)),
            c_void_p(aside.data_ptr()) if adds else target,
            self._out,
            target,
            self._out,
            byref(self._choice.algorithm),
            c_void_p(workspace.data_ptr()),
            c_size_t(WORKSPACE_BYTES),
            c_void_p(torch.cuda.current_stream(left.device).cuda_stream),
        )
