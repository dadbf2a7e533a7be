"""The chips that `plan` knows: public figures, and what the compilers need to aim at one.

Peaks are dense (no structured sparsity), in operations per second. `link` is what one device can
send to one neighbour, one direction: half of a vendor's "bidirectional" figure, and on a TPU one
of the chip's ports, for a permute to the next stage takes one path.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from liveavatar_jax.types import LiveAvatarError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Sizes in bytes, rates in bytes or operations per second."""

    name: str
    memory: float
    bandwidth: float
    peak: Mapping[str, float]  # by the dtype of a product: bf16, int8, fp8
    link: float
    platform: str  # "cuda" or "tpu"
    target: Mapping[str, str]  # cuda: fields of the target description; tpu: slice per chips
    source: str

    def rate(self, dtype: str) -> float:
        """Peak of products in `dtype`, in bf16 where the chip has no faster path for it."""
        return self.peak.get(dtype, self.peak["bf16"])

    def topology(self, devices: int) -> str:
        """The smallest topology with at least `devices` chips.

        Raises LiveAvatarError when the table has none that large.
        """
        if self.platform == "cuda":
            hosts = -(-devices // 8)
            return f"1x1x{devices}" if hosts == 1 else f"1x{hosts}x8"
        for chips, name in self.target.items():
            if int(chips) >= devices:
                return name
        raise LiveAvatarError(
            f"no slice of {self.name} with {devices} chips is listed; the largest has "
            f"{list(self.target)[-1]}"
        )


def _hopper(name: str, memory: float, bandwidth: float, link: float, source: str) -> Chip:
    return _gpu(name, memory, bandwidth, 989.4e12, link, ("9", "132", "52428800", "1.98"), source)


def _gpu(
    name: str,
    memory: float,
    bandwidth: float,
    bf16: float,
    link: float,
    silicon: tuple[str, str, str, str],  # compute capability, cores, L2 bytes, clock in GHz
    source: str,
) -> Chip:
    major, cores, l2, clock = silicon
    target = {"major": major, "core_count": cores, "l2_cache_size": l2, "clock_rate_ghz": clock}
    peak = MappingProxyType({"bf16": bf16, "int8": 2 * bf16, "fp8": 2 * bf16})
    return Chip(name, memory, bandwidth, peak, link, "cuda", MappingProxyType(target), source)


def _tpu(
    name: str,
    memory: float,
    bandwidth: float,
    peak: dict[str, float],
    link: float,
    slices: dict[str, str],
    source: str,
) -> Chip:
    peaks, target = MappingProxyType(peak), MappingProxyType(slices)
    return Chip(name, memory, bandwidth, peaks, link, "tpu", target, source)


_FLAT = {"4": "2x2", "8": "2x4", "16": "4x4", "32": "4x8", "64": "8x8", "256": "16x16"}
_CUBE = {"4": "2x2x1", "8": "2x2x2", "16": "2x2x4", "64": "4x4x4", "128": "4x4x8"}


def _slices(kind: str, shapes: dict[str, str]) -> dict[str, str]:
    return {chips: f"{kind}:{shape}" for chips, shape in shapes.items()}


# GPU memory is what the driver reports, TPU memory what the TPU compiler lets a program have.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            _hopper("h100", 84.94e9, 3.35e12, 450e9, "NVIDIA H100 SXM datasheet, 2023"),
            _hopper("h800", 84.94e9, 3.35e12, 200e9, "H100 datasheet; NVLink 400 GB/s as sold"),
            _hopper("h200", 150.75e9, 4.8e12, 450e9, "NVIDIA H200 SXM datasheet, 2024"),
            _gpu("b200", 191.5e9, 8.0e12, 2250e12, 900e9, ("10", "148", "132644864", "1.965"),
                 "NVIDIA HGX B200 datasheet, 2024 (1000 W)"),
            _tpu("v5e", 15.75 * GIB, 819e9, {"bf16": 197e12, "int8": 393e12}, 50e9,
                 _slices("v5e", _FLAT), "Google Cloud documentation, TPU v5e"),
            _tpu("v5p", 95.74 * GIB, 2765e9, {"bf16": 459e12, "int8": 918e12}, 100e9,
                 _slices("v5p", _CUBE), "Google Cloud documentation, TPU v5p"),
            _tpu("v6e", 31.25 * GIB, 1638e9, {"bf16": 918e12, "int8": 1836e12}, 100e9,
                 _slices("v6e", _FLAT), "Google Cloud documentation, TPU v6e"),
        )
    }
)  # fmt: skip


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
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": 227 * 1024,
        "shared_memory_per_core": 228 * 1024,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "fpus_per_core": 128,
        "core_count": chip.target["core_count"],
        "l2_cache_size": chip.target["l2_cache_size"],
        "clock_rate_ghz": chip.target["clock_rate_ghz"],
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
