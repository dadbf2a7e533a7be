"""The chips that `plan` knows: public figures, and what the compilers need to aim at one.

Peaks are dense (no structured sparsity), in operations per second. `link` is what one device can
send to one neighbour, one direction: half of a vendor's "bidirectional" figure, and on a TPU one
of the chip's ports, for a permute to the next stage takes one path. `network` is what one device
can send to another host, or on TPUs to another slice.
"""

import dataclasses
import math
from collections.abc import Mapping

from liveavatar_jax.types import LiveAvatarError

GIB = 2**30

# What the GPU compiler asks beside the figures of the table: capability, cores, L2, clock.
_HOPPER = {"major": "9", "core_count": "132", "l2_cache_size": "52428800", "clock_rate_ghz": "1.98"}
_BLACKWELL = _HOPPER | {"major": "10", "core_count": "148", "l2_cache_size": "132644864"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Sizes in bytes, rates in bytes or operations per second."""

    name: str
    memory: float
    bandwidth: float
    peak: Mapping[str, float]  # by the dtype of a product: bf16, int8, fp8
    link: float
    platform: str  # "cuda" or "tpu"
    target: Mapping[str, str]  # cuda: fields of the target description; tpu: slices by chips
    source: str
    network: float = 50e9

    def rate(self, dtype: str) -> float:
        """Peak of products in `dtype`, in bf16 where the chip has no faster path for it."""
        return self.peak.get(dtype, self.peak["bf16"])

    @property
    def host(self) -> int:
        """Devices of one host; of TPUs, there are also larger ones."""
        return 8 if self.platform == "cuda" else 4

    def topology(self, devices: int) -> str:
        """The smallest topology with at least `devices` chips.

        Raises LiveAvatarError when the table has none that large.
        """
        if self.platform == "cuda":
            hosts = -(-devices // 8)
            return f"1x1x{devices}" if hosts == 1 else f"1x{hosts}x8"
        for chips, name in self.target.items():
            if int(chips) >= devices:
                return f"{self.name}:{name}"
        raise LiveAvatarError(
            f"no slice of {self.name} with {devices} chips is listed; the largest has "
            f"{list(self.target)[-1]}"
        )


def _gpu(
    name: str,
    memory: float,
    bandwidth: float,
    link: float,
    source: str,
    bf16: float = 989.4e12,
    target: Mapping[str, str] = _HOPPER,
) -> Chip:
    peak = {"bf16": bf16, "int8": 2 * bf16, "fp8": 2 * bf16}
    return Chip(name, memory, bandwidth, peak, link, "cuda", target, source)


def _tpu(
    name: str,
    gib: float,
    bandwidth: float,
    link: float,
    bf16: float,
    int8: float,
    shapes: str,
    network: float,
) -> Chip:
    slices = {str(math.prod(map(int, shape.split("x")))): shape for shape in shapes.split()}
    source, peak = f"Google Cloud documentation, TPU {name}", {"bf16": bf16, "int8": int8}
    return Chip(name, gib * GIB, bandwidth, peak, link, "tpu", slices, source, network)


_HGX = "NVIDIA HGX B200 datasheet, 2024 (1000 W)"
_FLAT, _CUBE = "2x2 2x4 4x4 4x8 8x8 16x16", "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8"

# GPU memory is what the driver reports, TPU memory what the TPU compiler lets a program have.
_ALL = (
    _gpu("h100", 84.94e9, 3.35e12, 450e9, "NVIDIA H100 SXM datasheet, 2023"),
    _gpu("h800", 84.94e9, 3.35e12, 200e9, "NVIDIA H100 SXM datasheet; NVLink cut to 400 GB/s"),
    _gpu("h200", 150.75e9, 4.8e12, 450e9, "NVIDIA H200 SXM datasheet, 2024"),
    _gpu("b200", 191.5e9, 8.0e12, 900e9, _HGX, 2250e12, _BLACKWELL),
    _tpu("v5e", 15.75, 819e9, 50e9, 197e12, 393e12, _FLAT, 3.1e9),
    _tpu("v5p", 95.74, 2765e9, 100e9, 459e12, 918e12, _CUBE, 6.2e9),
    _tpu("v6e", 31.25, 1638e9, 100e9, 918e12, 1836e12, _FLAT, 12.5e9),
)
CHIPS: Mapping[str, Chip] = {each.name: each for each in _ALL}


def chip(name: str) -> Chip:
    """Raises LiveAvatarError for a name that is not in the table."""
    if name not in CHIPS:
        raise LiveAvatarError(f"no chip is called {name!r}; choose of {', '.join(CHIPS)}")
    return CHIPS[name]


def gpu_target(chip: Chip) -> str:
    """The description of a GPU that XLA compiles for, a text proto (`GpuTargetConfigProto`).

    Limits of threads, registers and shared memory are those of compute capabilities 9.0 and 10.0
    (CUDA C++ programming guide, "Compute capabilities").
    """
    device = {name: value for name, value in chip.target.items() if name != "major"} | {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": 227 * 1024,
        "shared_memory_per_core": 228 * 1024,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "fpus_per_core": 128,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": int(chip.memory),
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    version = 'driver_version: "13.0.0" runtime_version: "13.0.0" dnn_version: "9.10.0"'
    capability = f"major: {chip.target['major']} minor: 0 feature_extension: ACCELERATED_FEATURES"
    return (
        f'gpu_device_info {{ {fields} name: "{chip.name}" device_vendor: "NVIDIA Corporation" '
        f"cuda_compute_capability {{ {capability} }} {version} "
        'compile_time_toolkit_version: "13.0.0" } '
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} '
        f'device_description_str: "{chip.name}"'
    )
