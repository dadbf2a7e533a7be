"""From "stage=4,tensor=2,vae=1" to devices; of training, from "data=2,fsdp=16,tensor=2".

Axes: `stage` (one denoising step each), `tensor` (weights and heads parted) and `sequence`
(tokens parted) inside a stage, and `vae` (picture columns parted) beside them. Training has
`data` (rows of the batch parted), `fsdp` (rows and weights parted), `sequence` and `tensor`.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from liveavatar_jax.config import DiTConfig, ModelConfig
from liveavatar_jax.types import LiveAvatarError

STAGE, TENSOR, SEQUENCE, VAE = "stage", "tensor", "sequence", "vae"
AXES = (STAGE, TENSOR, SEQUENCE)
DATA, FSDP = "data", "fsdp"
TRAIN_AXES = (DATA, FSDP, SEQUENCE, TENSOR)  # neighbours last, for they have most to say
ROWS = (DATA, FSDP)  # what the rows of a batch are parted over


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
        _check_heads(self.tensor, self.sequence, heads, ffn)
        if self.vae > 1 and width % self.vae and rows % self.vae:
            raise LiveAvatarError(
                f"vae = {self.vae} does not divide the {width} latent columns of the picture (a "
                f"latent is 8 pixels), nor the streams (at once: {rows}); choose another --size or "
                "vae"
            )


def _check_heads(tensor: int, sequence: int, heads: int, ffn: int) -> None:
    if heads % (tensor * sequence):
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        raise LiveAvatarError(
            f"tensor x sequence = {tensor} x {sequence} does not divide the {heads} "
            f"attention heads; their product must be one of {', '.join(map(str, fits))}"
        )
    if ffn % tensor:
        raise LiveAvatarError(f"tensor = {tensor} does not divide the {ffn} of ffn_dim")


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


# ---- training


@dataclasses.dataclass(frozen=True)
class TrainMesh:
    """Sizes of the axes of training: within a slice, and how many slices `data` and `fsdp` span.

    `data` and `fsdp` part the rows of a batch, `fsdp` and `tensor` the weights, `sequence` the
    tokens, and `sequence` x `tensor` the heads. A slice is what has fast links of its own: of
    TPUs the slice, elsewhere the process. Between slices `tensor` and `sequence` would wait for
    the network in every layer, so they have no `dcn_` size.
    """

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    dcn_data: int = 1
    dcn_fsdp: int = 1

    @classmethod
    def parse(cls, text: str, dcn: str = "") -> "TrainMesh":
        """Reads "data=2,fsdp=16,sequence=2,dcn_data=2"; `dcn` may hold the sizes between slices
        by themselves, as "data=2".

        Raises LiveAvatarError for unknown, repeated or ill-sized axes.
        """
        given = [part.strip() for part in text.split(",") if part.strip()]
        given += [f"dcn_{part.strip()}" for part in dcn.split(",") if part.strip()]
        known, sizes = [field.name for field in dataclasses.fields(cls)], {}
        for part in given:
            name, _, size = part.partition("=")
            if name in (f"dcn_{SEQUENCE}", f"dcn_{TENSOR}"):
                raise LiveAvatarError(
                    f"--mesh {text!r}: {name} is not possible, for {name[4:]} exchanges data in "
                    "every layer and slices are joined by a slow network; use dcn_data or dcn_fsdp"
                )
            if name not in known or not size.isdecimal() or name in sizes:
                raise LiveAvatarError(
                    f"--mesh {text!r}: {part!r} is not understood; write each of "
                    f"{', '.join(known)} at most once, as in data=2,fsdp=16,sequence=2"
                )
            if int(size) < 1:
                raise LiveAvatarError(f"--mesh {text!r}: {name} must be at least 1")
            sizes[name] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        sizes = dataclasses.asdict(self)
        return ",".join(f"{k}={v}" for k, v in sizes.items() if v > 1) or "data=1"

    @property
    def shape(self) -> dict[str, int]:
        """Sizes of the mesh's axes, slices included."""
        return {
            DATA: self.dcn_data * self.data,
            FSDP: self.dcn_fsdp * self.fsdp,
            SEQUENCE: self.sequence,
            TENSOR: self.tensor,
        }

    @property
    def devices(self) -> int:
        return math.prod(self.shape.values())

    @property
    def slices(self) -> int:
        return self.dcn_data * self.dcn_fsdp

    @property
    def rows(self) -> int:
        """Parts that a batch is cut into."""
        return self.shape[DATA] * self.shape[FSDP]

    def check(self, cfg: DiTConfig, batch: int) -> None:
        """Refuses what does not divide, by name; `batch` are the rows of one forward, over all
        devices (of an accumulated step, those of one part of it)."""
        if min(dataclasses.astuple(self)) < 1 or batch < 1:
            raise LiveAvatarError(f"mesh {self} for {batch} rows: every size must be at least 1")
        _check_heads(self.tensor, self.sequence, cfg.heads, cfg.ffn_dim)
        fsdp = self.shape[FSDP]
        if cfg.dim % (fsdp * self.tensor):
            raise LiveAvatarError(
                f"fsdp x tensor = {fsdp} x {self.tensor} does not divide the {cfg.dim} of dim, so "
                "the weights could not be parted; use a smaller fsdp and data for the rest"
            )
        if batch % self.rows:
            raise LiveAvatarError(
                f"data x fsdp = {self.shape[DATA]} x {fsdp} does not divide the {batch} rows of a "
                f"batch; use a multiple of {self.rows}, or sequence and tensor for more devices "
                "than rows"
            )

    def make(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh on these devices (default: all there are), slice by slice.

        Raises LiveAvatarError when there are too few devices, when some processes would have
        none, or when slices are not as many or not as large as the sizes say.
        """
        devices = list(jax.devices() if devices is None else devices)
        several = len({device.process_index for device in devices}) > 1
        if len(devices) < self.devices or (several and len(devices) > self.devices):
            raise LiveAvatarError(
                f"mesh {self} has {self.devices} devices, and there are {len(devices)}; choose "
                f"sizes with that product, or on a CPU try it with --fake-devices {self.devices}"
            )
        devices = sorted(devices, key=lambda d: (_slice_of(d), d.process_index, d.id))
        inside = (self.data, self.fsdp, self.sequence, self.tensor)
        parts = [_arranged(inside, own) for own in self._by_slice(devices[: self.devices])]
        outside = (self.dcn_data, self.dcn_fsdp, 1, 1)
        # Slices are the slow part of each axis: [dcn, data, fsdp, ...] to [dcn data, dcn fsdp, ...]
        grid = np.array(parts).reshape(*outside, *inside)
        grid = grid.transpose(0, 4, 1, 5, 2, 6, 3, 7).reshape(tuple(self.shape.values()))
        return Mesh(grid, TRAIN_AXES, axis_types=(AxisType.Auto,) * len(TRAIN_AXES))

    def _by_slice(self, devices: list[Any]) -> list[list[Any]]:
        """Equal parts of devices in the order of slices and processes."""
        size = len(devices) // self.slices
        parts = [devices[i : i + size] for i in range(0, len(devices), size)]
        if any(len({_slice_of(device) for device in part}) > 1 for part in parts):
            there = list(Counter(map(_slice_of, devices)).values())
            raise LiveAvatarError(
                f"mesh {self} has {self.slices} slices of {size} devices, and there are "
                f"{len(there)} of {', '.join(map(str, there))}; change dcn_data or dcn_fsdp"
            )
        return parts


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def _arranged(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Neighbours of the mesh on neighbours of the network, where JAX knows how."""
    if devices[0].platform == "tpu":
        try:
            return mesh_utils.create_device_mesh(
                shape, devices, contiguous_submeshes=False, allow_split_physical_axes=True
            )
        except (ValueError, NotImplementedError, AssertionError):
            pass  # some shapes have no assignment (64 x 4 on v6e 16 x 16): in order, then
    return np.array(devices).reshape(shape)
