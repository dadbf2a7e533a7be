"""From "stage=4,tensor=2,vae=1" to devices.

Axes: `stage` (one denoising step each), `tensor` (weights and heads parted) and `sequence`
(tokens parted) inside a stage, and `vae` (picture columns parted) beside them.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from liveavatar_jax.config import ModelConfig
from liveavatar_jax.types import LiveAvatarError

STAGE, TENSOR, SEQUENCE, VAE = "stage", "tensor", "sequence", "vae"
AXES = (STAGE, TENSOR, SEQUENCE)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Sizes of the axes; `vae` = 0 means that the decoder shares the last stages' devices."""

    stage: int
    tensor: int = 1
    sequence: int = 1
    vae: int = 0

    @classmethod
    def parse(cls, text: str) -> "MeshSpec":
        """Reads "stage=4,vae=1".

        Raises LiveAvatarError for unknown, repeated or ill-sized axes.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = part.strip().partition("=")
            if name not in (*AXES, VAE) or not size.isdecimal() or name in sizes:
                raise LiveAvatarError(
                    f"--mesh {text!r}: {part.strip()!r} is not understood; write each of stage, "
                    "tensor, sequence, vae at most once, as in stage=4,vae=1"
                )
            sizes[name] = int(size)
        for name, size in sizes.items():
            if size < 1 and name != VAE:
                raise LiveAvatarError(f"--mesh {text!r}: {name} must be at least 1")
        if STAGE not in sizes:
            raise LiveAvatarError(f"--mesh {text!r} has no stage axis; write stage=4, one a step")
        return cls(**sizes)

    def __str__(self) -> str:
        sizes = dataclasses.asdict(self)
        return ",".join(f"{k}={v}" for k, v in sizes.items() if v > (k != VAE) or k == STAGE)

    @property
    def stage_devices(self) -> int:
        return self.stage * self.tensor * self.sequence

    @property
    def devices(self) -> int:
        return self.stage_devices + self.vae

    @property
    def inside(self) -> int:
        """Devices of one stage."""
        return self.tensor * self.sequence

    def check(self, cfg: ModelConfig, width: int, rows: int = 1) -> None:
        """Refuses what does not divide, by name; `width` is that of the latents, `rows` the
        streams at once."""
        steps, heads, ffn = cfg.stream.steps, cfg.dit.heads, cfg.dit.ffn_dim
        if min(self.stage, self.tensor, self.sequence, rows) < 1 or self.vae < 0:
            raise LiveAvatarError(f"mesh {self} for {rows} streams: every size must be at least 1")
        if cfg.stream.history is not None:
            raise LiveAvatarError(
                f"StreamConfig.history = {cfg.stream.history} needs each block clean before the "
                "next one starts, so it cannot be pipelined; use history = None or one device"
            )
        if self.stage != steps:
            raise LiveAvatarError(
                f"stage = {self.stage} does not match the {steps} denoising steps; a stage owns "
                f"exactly one step: use stage={steps} or --steps {self.stage}"
            )
        if heads % self.inside:
            fits = [n for n in range(1, heads + 1) if heads % n == 0]
            raise LiveAvatarError(
                f"tensor x sequence = {self.tensor} x {self.sequence} does not divide the {heads} "
                f"attention heads; their product must be one of {', '.join(map(str, fits))}"
            )
        if ffn % self.tensor:
            raise LiveAvatarError(f"tensor = {self.tensor} does not divide the {ffn} of ffn_dim")
        if self.vae > 1 and width % self.vae and rows % self.vae:
            raise LiveAvatarError(
                f"vae = {self.vae} does not divide the {width} latent columns of the picture (a "
                f"latent is 8 pixels), nor the streams (at once: {rows}); choose another --size or "
                "vae"
            )


@dataclasses.dataclass(frozen=True)
class Meshes:
    """Where the two programs of a stream run."""

    stages: Mesh  # stage x tensor x sequence
    vae: Mesh  # devices of the decoder; some of the stages' own where the spec has none


def make(spec: MeshSpec, width: int, devices: Sequence[jax.Device] | None = None) -> Meshes:
    """Places the axes on devices (default: all there are), stages in the order of the processes.

    The decoder lies in the process of the last stage, so that a block needs no more than
    `device_put` to reach it. `width` is that of the latents: a decoder that shares devices takes
    as many of the last process' as divide it.

    Raises LiveAvatarError when there are too few devices, or a process would have none.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < spec.devices:
        raise LiveAvatarError(
            f"mesh {spec} needs {spec.devices} devices ({spec.stage_devices} for the stages, "
            f"{spec.vae} for the decoder), and there are {len(devices)}; make it smaller, or on a "
            f"CPU try it with --fake-devices {spec.devices}"
        )
    of_host: dict[int, list[jax.Device]] = {}
    for device in sorted(devices, key=lambda device: device.process_index):
        of_host.setdefault(device.process_index, []).append(device)
    counts = _shares(spec, [len(own) for own in of_host.values()])
    chosen = [d for own, n in zip(of_host.values(), counts, strict=True) for d in own[:n]]
    own, share = [*of_host.values()][-1], counts[-1]
    shape = (spec.stage, spec.tensor, spec.sequence)
    stages = Mesh(np.array(chosen).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)
    decoders = own[share : share + spec.vae] or _sharing(own[:share], width)
    vae = Mesh(np.array(decoders), (VAE,), axis_types=(AxisType.Auto,))
    return Meshes(stages=stages, vae=vae)


def _shares(spec: MeshSpec, sizes: list[int]) -> list[int]:
    """How many devices of each process the stages take: as many of each if that is possible, else
    what the last processes have, for the decoder has to be beside the last stage."""
    free = [*sizes[:-1], sizes[-1] - spec.vae]
    even = spec.stage_devices // len(sizes)
    if even * len(sizes) == spec.stage_devices and even <= min(free):
        return [even] * len(sizes)
    counts, left = [], spec.stage_devices
    for size in reversed(free):
        counts.insert(0, max(0, min(size, left)))
        left -= counts[0]
    if left or not all(counts):
        raise LiveAvatarError(
            f"mesh {spec} cannot be shared out over {len(sizes)} processes with "
            f"{', '.join(map(str, sizes))} devices; start as few as are needed, and leave the last "
            "one room for the decoder and a part of the last stage"
        )
    return counts


def _sharing(devices: list[jax.Device], width: int) -> list[jax.Device]:
    """The last devices, as many as divide the columns."""
    return devices[-max(n for n in range(1, len(devices) + 1) if width % n == 0) :]
