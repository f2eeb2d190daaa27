"""The GPUs that can be planned for: what their memory and their age are."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class GpuModel:
    """One kind of GPU.

    Attributes:
        name: as a user writes it, "H100-80GB".
        memory_bytes: what the driver gives out in all, which is less than what the card is sold with.
        capability: CUDA compute capability, (9, 0) for an H100.
        device_name: as the driver gives it; commons.reporting.peak_rates knows it by this name.
    """

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    device_name: str


def _model(name: str, mib: int, capability: tuple[int, int], device_name: str) -> GpuModel:
    return GpuModel(name, mib << 20, capability, device_name)


# Memory as torch.cuda.mem_get_info() has its total on an idle card. H100 and H200 were read off; of the others it is
# what nvidia-smi lists less some 1.3 %, that the driver keeps (the share on those two).
GPU_MODELS: dict[str, GpuModel] = {
    model.name: model
    for model in (
        _model("H100-80GB", 81079, (9, 0), "NVIDIA H100 80GB HBM3"),
        _model("H100-PCIE-80GB", 80994, (9, 0), "NVIDIA H100 PCIe"),
        _model("H100-NVL-94GB", 95320, (9, 0), "NVIDIA H100 NVL"),
        _model("H200-141GB", 143167, (9, 0), "NVIDIA H200"),
        _model("B200-180GB", 182632, (10, 0), "NVIDIA B200"),
        _model("A100-80GB", 81050, (8, 0), "NVIDIA A100-SXM4-80GB"),
        _model("A100-40GB", 40326, (8, 0), "NVIDIA A100-SXM4-40GB"),
        _model("A40-48GB", 45488, (8, 6), "NVIDIA A40"),
        _model("A10-24GB", 22731, (8, 6), "NVIDIA A10"),
        _model("L40S-48GB", 45488, (8, 9), "NVIDIA L40S"),
        _model("L4-24GB", 22563, (8, 9), "NVIDIA L4"),
        _model("V100-32GB", 32501, (7, 0), "Tesla V100-SXM2-32GB"),
        _model("V100-16GB", 16151, (7, 0), "Tesla V100-SXM2-16GB"),
        _model("T4-16GB", 14930, (7, 5), "Tesla T4"),
        _model("RTX-3060-12GB", 11909, (8, 6), "NVIDIA GeForce RTX 3060"),
        _model("RTX-3090-24GB", 24251, (8, 6), "NVIDIA GeForce RTX 3090"),
        _model("RTX-4060-8GB", 7806, (8, 9), "NVIDIA GeForce RTX 4060"),
        _model("RTX-4070-12GB", 11874, (8, 9), "NVIDIA GeForce RTX 4070"),
        _model("RTX-4090-24GB", 24210, (8, 9), "NVIDIA GeForce RTX 4090"),
        _model("RTX-5090-32GB", 32109, (12, 0), "NVIDIA GeForce RTX 5090"),
    )
}
