"""Peak rates of NVIDIA's devices from their datasheets: what MFU is a share of."""

from __future__ import annotations

import re
from typing import NamedTuple

TERA = 1e12


class PeakRates(NamedTuple):
    """Dense datasheet rates of one kind of device, in 10^12 FLOPs per second; None: the device cannot.

    Attributes:
        name: a regular expression for the whole device name, lower case and without "NVIDIA".
        bf16: matmul with fp32 accumulation, no sparsity.
        fp16: likewise.
        fp32: plain fp32, TF32 off.
        source: the document that says so.
    """

    name: str
    bf16: float | None
    fp16: float | None
    fp32: float | None
    source: str


# Datasheets state tensor rates with 2:4 sparsity; half of that is the dense rate here.
DATACENTER_PEAKS = (
    PeakRates(r"gb200", 2500, 2500, 80, "GB200 NVL72 datasheet, per GPU"),
    PeakRates(r"b200", 2250, 2250, 75, "HGX B200 datasheet, per GPU"),
    PeakRates(r"b100", 1750, 1750, 60, "Blackwell architecture technical brief, HGX B100"),
    PeakRates(r"h200", 989.4, 989.4, 66.9, "H200 datasheet, SXM"),
    PeakRates(r"h200 nvl", 835.5, 835.5, 60, "H200 datasheet, NVL"),
    PeakRates(r"gh200 \d+gb?( hbm3e?)?", 989.4, 989.4, 66.9, "GH200 datasheet"),
    PeakRates(r"h100 (80gb hbm3|sxm5?( 80gb)?)", 989.4, 989.4, 66.9, "H100 architecture whitepaper, SXM5"),
    PeakRates(r"h100 pcie", 756, 756, 51.2, "H100 architecture whitepaper, PCIe"),
    PeakRates(r"h100 nvl", 835.5, 835.5, 60, "H100 datasheet, NVL"),
    PeakRates(r"h800", 989.4, 989.4, 66.9, "H800 datasheet, SXM"),
    PeakRates(r"h800 pcie", 756, 756, 51.2, "H800 datasheet, PCIe"),
    PeakRates(r"h20", 148, 148, 44, "H20 datasheet"),
    PeakRates(r"a[18]00([ -](sxm4?|pcie|40gb|80gb))*", 312, 312, 19.5, "A100 datasheet; A800 differs in NVLink only"),
    PeakRates(r"a800 40gb active", 312, 312, 19.5, "A800 40GB Active datasheet"),
    PeakRates(r"a40", 149.7, 149.7, 37.4, "A40 datasheet"),
    PeakRates(r"a30", 165, 165, 10.3, "A30 datasheet"),
    PeakRates(r"a10", 125, 125, 31.2, "A10 datasheet"),
    PeakRates(r"a10g", 70, 70, 35, "A10G datasheet"),
    PeakRates(r"l4", 121, 121, 30.3, "L4 datasheet"),
    PeakRates(r"l40", 181.05, 181.05, 90.5, "L40 datasheet"),
    PeakRates(r"l40s", 362.05, 362.05, 91.6, "L40S datasheet"),
    PeakRates(r"(tesla )?v100-sxm[23]-\d+gb", None, 125, 15.7, "V100 datasheet, SXM2"),
    PeakRates(r"(tesla )?v100-pcie-\d+gb", None, 112, 14, "V100 datasheet, PCIe"),
    PeakRates(r"(tesla )?v100s-pcie-32gb", None, 130, 16.4, "V100 datasheet, V100S"),
    PeakRates(r"(tesla )?t4", None, 65, 8.1, "T4 datasheet"),
    PeakRates(r"(quadro )?rtx a6000", 154.8, 154.8, 38.7, "GA102 architecture whitepaper, RTX A6000"),
    PeakRates(r"rtx 6000 ada generation", 364.2, 364.2, 91.1, "Ada professional whitepaper, RTX 6000 Ada"),
    PeakRates(r"rtx pro 6000 blackwell workstation edition", 503.8, 503.8, 126.0, "RTX Blackwell PRO whitepaper"),
    PeakRates(
        r"rtx pro 6000 blackwell max-q workstation edition",
        438.9,
        438.9,
        109.7,
        "RTX Blackwell PRO whitepaper",
    ),
)


class GeForce(NamedTuple):
    """A GeForce desktop card by two figures of NVIDIA's product page; laptop cards have others."""

    name: str
    cuda_cores: int
    boost_mhz: int


# The 3080's 12 GB edition has 3 % more cores under the same name.
GEFORCE_CARDS = (
    GeForce("rtx 3060", 3584, 1777),
    GeForce("rtx 3060 ti", 4864, 1665),
    GeForce("rtx 3070", 5888, 1725),
    GeForce("rtx 3070 ti", 6144, 1770),
    GeForce("rtx 3080", 8704, 1710),
    GeForce("rtx 3080 ti", 10240, 1665),
    GeForce("rtx 3090", 10496, 1695),
    GeForce("rtx 3090 ti", 10752, 1860),
    GeForce("rtx 4060", 3072, 2460),
    GeForce("rtx 4060 ti", 4352, 2535),
    GeForce("rtx 4070", 5888, 2475),
    GeForce("rtx 4070 super", 7168, 2475),
    GeForce("rtx 4070 ti", 7680, 2610),
    GeForce("rtx 4070 ti super", 8448, 2610),
    GeForce("rtx 4080", 9728, 2505),
    GeForce("rtx 4080 super", 10240, 2550),
    GeForce("rtx 4090", 16384, 2520),
    GeForce("rtx 4090 d", 14592, 2520),
    GeForce("rtx 5060", 3840, 2497),
    GeForce("rtx 5060 ti", 4608, 2572),
    GeForce("rtx 5070", 6144, 2512),
    GeForce("rtx 5070 ti", 8960, 2452),
    GeForce("rtx 5080", 10752, 2617),
    GeForce("rtx 5090", 21760, 2407),
)


def _geforce_peak(card: GeForce) -> PeakRates:
    """One fused multiply-add per core and cycle in fp32; twice that on tensor cores with fp32 accumulation.

    So it is in all three generations: GA102 whitepaper table 2, Ada whitepaper appendix A, RTX Blackwell
    whitepaper appendix A. With fp16 accumulation the tensor cores do twice as much, which no training uses.
    """
    fp32 = 2 * card.cuda_cores * card.boost_mhz / 1e6
    source = f"GeForce {card.name.upper()} product page: cores and boost clock"
    return PeakRates(f"geforce {re.escape(card.name)}", 2 * fp32, 2 * fp32, fp32, source)


PEAK_RATES: tuple[PeakRates, ...] = (*DATACENTER_PEAKS, *map(_geforce_peak, GEFORCE_CARDS))
PRECISIONS = ("bf16", "fp16", "fp32", "fp8")


def peak_flops(device_name: str, precision: str) -> float | None:
    """The datasheet's dense peak of a device, in FLOPs per second (not tera).

    The whole name has to match: a laptop's card, a MIG slice, a model not in the table give None, no guess.

    Args:
        device_name: as the driver gives it, "NVIDIA H100 80GB HBM3" for one.
        precision: "bf16", "fp16" or "fp32". "fp8" has no peak: its matrix products are of two kinds.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; take one of {', '.join(PRECISIONS)}")
    rates = peak_rates(device_name)
    tflops = getattr(rates, precision, None) if rates else None
    return None if tflops is None else tflops * TERA


def peak_rates(device_name: str) -> PeakRates | None:
    """The table's row for a device, its source with it; None if there is none."""
    name = " ".join(device_name.lower().split()).removeprefix("nvidia ")
    return next((rates for rates in PEAK_RATES if re.fullmatch(rates.name, name)), None)
