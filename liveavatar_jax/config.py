"""Every knob of the model and of the stream, as frozen dataclasses; nothing is read from a global.

A config with no arguments has the published size; `tiny()` makes one for tests and laptops.
"""

import contextlib
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from typing import Any, cast, get_type_hints

import numpy as np

from liveavatar_jax.types import LiveAvatarError


def insist(ok: bool, cfg: object, field: str, what: str) -> None:
    """Raises LiveAvatarError that this field of a config must `what`, unless that is so."""
    if not ok:
        value = getattr(cfg, field)
        raise LiveAvatarError(f"{type(cfg).__name__}.{field} = {value!r} must {what}")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The causal DiT (Wan2.2-S2V-14B as released with Live Avatar)."""

    dim: int = 5120
    ffn_dim: int = 13824
    heads: int = 40
    layers: int = 40
    latent_channels: int = 16
    freq_dim: int = 256  # width of the timestep sinusoid
    text_dim: int = 4096
    text_len: int = 512
    audio_dim: int = 1024
    audio_layers: int = 25  # hidden states of the speech encoder that are averaged
    audio_tokens: int = 4  # learned tokens per latent frame, one padding token is added
    inject_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    predicts: str = "velocity"  # what the head says; "offset": clean latents less those of the pose
    places: tuple[int, int] | None = None  # rows and columns of patches that have an embedding each
    attention: str = "auto"  # "auto" | "chunked" | "cudnn" | "pallas"
    remat: str = "none"  # what a gradient keeps: "none" | "dots" | "full" | "offload"
    param_dtype: str = "bfloat16"

    def __post_init__(self):
        insist(self.dim % self.heads == 0, self, "dim", f"divide by heads = {self.heads}")
        insist(self.head_dim % 2 == 0, self, "dim", "give an even head width dim / heads")
        insist(self.dim % 4 == 0, self, "dim", "divide by 4 (the global audio branch is dim / 4)")
        inside = all(0 <= i < self.layers for i in self.inject_layers)
        insist(inside, self, "inject_layers", f"lie within 0..{self.layers - 1}")
        ascending = list(self.inject_layers) == sorted(set(self.inject_layers))
        insist(ascending, self, "inject_layers", "ascend without repeats")
        known = self.predicts in ("velocity", "offset")
        insist(known, self, "predicts", 'be "velocity" or "offset"')
        known = ("auto", "chunked", "cudnn", "pallas")
        insist(self.attention in known, self, "attention", f"be one of {', '.join(known)}")
        known = ("none", "dots", "full", "offload")
        insist(self.remat in known, self, "remat", f"be one of {', '.join(known)}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @classmethod
    def tiny(cls, **changes: Any) -> "DiTConfig":
        small = cls(
            dim=128,
            ffn_dim=256,
            heads=4,
            layers=3,
            freq_dim=64,
            text_dim=48,
            text_len=16,
            audio_dim=32,
            audio_layers=25,
            inject_layers=(0, 2),
            param_dtype="float32",
        )
        return dataclasses.replace(small, **changes)


# Published statistics of the 16 latent channels of Wan2.1's VAE.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The causal 3-D VAE of Wan2.1: 4 frames and 8×8 pixels to one latent position.

    Small ones have `cells`: so many residuals of width `dim` in the decoder, in pictures of one
    size, `grid`; of the other sizes only the product counts, 4 frames and 8×8 pixels.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    time_down: tuple[bool, ...] = (False, True, True)
    cells: int | None = None  # None: the published pyramid of levels
    grid: tuple[int, int] = (8, 8)  # rows and columns of latents that cells know
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD
    param_dtype: str = "float32"

    def __post_init__(self):
        for name, length, source in (
            ("time_down", len(self.dim_mult) - 1, "dim_mult"),
            ("latent_mean", self.z_dim, "z_dim"),
            ("latent_std", self.z_dim, "z_dim"),
        ):
            ok = len(getattr(self, name)) == length
            insist(ok, self, name, f"have {length} entries, as {source} = {getattr(self, source)}")
        insist(self.cells is None or self.cells >= 1, self, "cells", "be None or at least 1")
        enough = self.cells is None or self.z_dim > 4
        insist(enough, self, "z_dim", "be above 4, for four channels of cells tell motion")

    @property
    def frames_per_latent(self) -> int:
        return 2 ** sum(self.time_down)

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.dim_mult) - 1)

    @classmethod
    def tiny(cls, **changes: Any) -> "VAEConfig":
        return dataclasses.replace(cls(dim=8), **changes)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The umT5-XXL encoder."""

    vocab: int = 256384
    dim: int = 4096
    attn_dim: int = 4096
    ffn_dim: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    param_dtype: str = "bfloat16"

    @classmethod
    def tiny(cls, **changes: Any) -> "TextConfig":
        small = cls(
            vocab=97, dim=48, attn_dim=64, ffn_dim=80, heads=4, layers=2, param_dtype="float32"
        )
        return dataclasses.replace(small, **changes)


@dataclasses.dataclass(frozen=True)
class SpeechConfig:
    """The wav2vec2 speech encoder with the traits of wav2vec2-large-xlsr-53."""

    dim: int = 1024
    ffn_dim: int = 4096
    heads: int = 16
    layers: int = 24
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    pos_kernel: int = 128
    pos_groups: int = 16
    param_dtype: str = "float32"

    @classmethod
    def tiny(cls, **changes: Any) -> "SpeechConfig":
        small = cls(dim=32, ffn_dim=48, heads=4, layers=24, conv_dim=(16,) * 7)
        return dataclasses.replace(small, **changes)


@dataclasses.dataclass(frozen=True)
class MelConfig:
    """Log-mel features in the place of a speech encoder, see models/mel.py.

    A video frame sees `layers` spectra, 10 ms apart, of which `ahead` come after its end. They
    stand beside each other on the axis that the DiT averages over; `flat` puts them into the
    width instead, so that they stay apart.

    The defaults have the shape of DiTConfig.tiny's audio: 25 spectra of 32 bands. Eight of
    them lie ahead, which costs 80 ms of delay.
    """

    bins: int = 32
    layers: int = 25
    ahead: int = 8
    lowest: float = 60.0  # Hz
    highest: float = 7600.0
    flat: bool = False

    HOP = 160  # samples at 16 kHz from one spectrum to the next: 100 Hz
    SIZE = 400  # samples of one spectrum
    PER_FRAME = 4  # spectra of one video frame: 640 samples at 25 fps

    def __post_init__(self):
        inside = 0 <= self.ahead <= self.layers - self.PER_FRAME
        insist(inside, self, "ahead", f"lie within 0..layers - {self.PER_FRAME}")
        audible = 0 <= self.lowest < self.highest <= 8000
        insist(audible, self, "highest", f"lie between lowest = {self.lowest} and 8000 Hz")
        apart = self.bins >= 1 and self._bands_have_frequencies()
        insist(apart, self, "bins", "be at least 1 and leave every band a frequency of its own; "
               "take fewer, or a higher MelConfig.lowest")  # fmt: skip

    def edges(self) -> np.ndarray:
        """Hz, [bins + 2], equally far apart in mel: band i lies between edges i and i + 2."""
        mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)
        edges = np.linspace(mel(self.lowest), mel(self.highest), self.bins + 2)
        return 700 * (10 ** (edges / 2595) - 1)

    def _bands_have_frequencies(self) -> bool:
        at = self.edges() * self.SIZE / 16_000  # in steps of the spectrum
        return bool((np.floor(at[:-2]) + 1 < at[2:]).all())

    @property
    def made(self) -> tuple[int, int]:
        """DiTConfig.audio_layers and audio_dim that fit."""
        return (1, self.layers * self.bins) if self.flat else (self.layers, self.bins)

    @property
    def past(self) -> int:
        """Samples before the first video frame that it is made of."""
        spectra = self.layers - self.PER_FRAME - self.ahead
        return spectra * self.HOP + self.SIZE - self.HOP

    @property
    def future(self) -> int:
        """Samples after the last video frame that it is made of."""
        return self.ahead * self.HOP


NEVER = -(2**30)  # a distance to a sink that so does not roll, in a video of any length


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How blocks follow each other; the defaults are those of the released multi-GPU code."""

    steps: int = 4  # denoising steps of a block
    shift: float = 3.0  # of the noise levels, see diffusion/flow.py
    block_frames: int = 3  # latent frames of a block = 12 video frames
    ring_blocks: int = 4  # blocks that attention sees, the current one included
    history: float | None = None  # level of remembered keys: None = each step's own, 0.0 = clean
    sink_after: int | None = 4  # block before which the sink becomes our own first frame
    distance: int | tuple[int, int] | None = (4, 30)  # latent frames from block to sink, as its
    # phase rolls along; a range is drawn; None: it never rolls
    audio_past: str = "repeat"  # "repeat" the block's first frame, or the "true" left context
    motion: bool = True  # motion frames (the portrait, standing still) beside the sink
    pose: str = "none"  # what a block without a pose is shown as that: "none", or the "portrait",
    # so that small networks need not find it by attention
    dtype: str = "bfloat16"  # of latents, activations and caches

    def __post_init__(self):
        insist(self.steps >= 1, self, "steps", "be at least 1")
        insist(self.shift > 0, self, "shift", "be above 0")
        insist(self.block_frames >= 1, self, "block_frames", "be at least 1")
        insist(self.ring_blocks >= 1, self, "ring_blocks", "be at least 1")
        level = self.history is None or 0.0 <= self.history < 1.0
        insist(level, self, "history", "be None or a noise level in [0, 1)")
        late = self.sink_after is None or self.sink_after >= 1
        insist(late, self, "sink_after", "be None or at least 1")
        near, far = (0, 0) if self.distance is None else self.distance_range
        insist(0 <= near <= far <= 30, self, "distance", "lie within 0..30, smaller end first")
        known = self.audio_past in ("repeat", "true")
        insist(known, self, "audio_past", 'be "repeat" or "true"')
        known = self.pose in ("none", "portrait")
        insist(known, self, "pose", 'be "none" or "portrait"')
        known = self.dtype in ("float32", "bfloat16")
        insist(known, self, "dtype", 'be "float32" or "bfloat16"')

    @property
    def rings(self) -> int:
        """One a denoising step, or one in all for a history at a fixed level."""
        return self.steps if self.history is None else 1

    @property
    def distance_range(self) -> tuple[int, int]:
        if self.distance is None:
            return NEVER, NEVER
        return self.distance if isinstance(self.distance, tuple) else (self.distance, self.distance)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """All networks of one avatar, and how they stream."""

    dit: DiTConfig = DiTConfig()
    vae: VAEConfig = VAEConfig()
    text: TextConfig = TextConfig()
    speech: SpeechConfig = SpeechConfig()
    stream: StreamConfig = StreamConfig()
    mel: MelConfig | None = None  # heard in the place of the speech encoder
    size: int | None = None  # side of the square pictures it knows; None: pictures of any shape

    def __post_init__(self):
        known = self.size is None or (self.size > 0 and self.size % 64 == 0)
        insist(known, self, "size", "be None or a multiple of 64")
        if self.mel is not None and self.mel.made != self._heard:
            layers, dim = self.mel.made
            raise LiveAvatarError(
                f"ModelConfig.mel makes {layers} x {dim} features of a frame, the DiT hears "
                f"{self.dit.audio_layers} x {self.dit.audio_dim}; set dit.audio_layers = {layers} "
                f"and dit.audio_dim = {dim}"
            )

    @property
    def block(self) -> int:
        """Video frames that are made at once."""
        return self.stream.block_frames * self.vae.frames_per_latent

    @property
    def _heard(self) -> tuple[int, int]:
        return self.dit.audio_layers, self.dit.audio_dim

    @property
    def log_mel(self) -> MelConfig | None:
        """What is heard in the place of the speech encoder: `mel`, or log-mel features of the
        DiT's shape where the speech encoder has another; None: the encoder is heard."""
        if self.mel is not None or (self.speech.layers + 1, self.speech.dim) == self._heard:
            return self.mel
        return MelConfig(bins=self.dit.audio_dim, layers=self.dit.audio_layers)

    @classmethod
    def tiny(cls, **changes: Any) -> "ModelConfig":
        small = cls(
            dit=DiTConfig.tiny(),
            vae=VAEConfig.tiny(),
            text=TextConfig.tiny(),
            speech=SpeechConfig.tiny(),
            stream=StreamConfig(dtype="float32"),
        )
        return dataclasses.replace(small, **changes)


def to_dict(cfg: Any) -> dict[str, Any]:
    """Plain JSON values of a config; `from_dict` is its inverse."""
    return dataclasses.asdict(cfg)


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Builds `cls` from JSON values; unknown and ill-typed fields are refused by name."""
    hints = get_type_hints(cls)
    where = where or cls.__name__
    fields = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise LiveAvatarError(f"{where} has no field {name!r}{hint}")
        fields[name] = _coerce(hints[name], value, f"{where}.{name}")
    return cls(**fields)


def change(cfg: Any, changes: Sequence[str]) -> Any:
    """A config with changes such as "data.batch=64", values as in JSON or as plain words.

    Raises LiveAvatarError for unknown fields, with the nearest name, and values that do not fit.
    """
    tree: dict[str, Any] = {}
    for text in changes:
        path, given, value = text.partition("=")
        if not given:
            raise LiveAvatarError(f"--set {text!r} is not understood; write FIELD.FIELD=VALUE")
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
        *rooms, field = path.split(".")
        at = tree
        for room in rooms:
            at = at.setdefault(room, {})
        at[field] = _Leaf(value)
    return _changed(cfg, tree, "--set ")


@dataclasses.dataclass(frozen=True)
class _Leaf:
    value: Any


def _changed(cfg: Any, tree: dict[str, Any], where: str) -> Any:
    """All changes of a dataclass at once: one may be right only together with another."""
    if not dataclasses.is_dataclass(cfg):
        said = repr(cfg) if isinstance(cfg, (str, int, float, type(None))) else type(cfg).__name__
        raise LiveAvatarError(f"{where}{next(iter(tree))} is below {said}, which has no fields")
    hints, new = get_type_hints(type(cfg)), {}
    for name, value in tree.items():
        path = where + name
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            hint = f", did you mean {near[0]!r}?" if near else f"; it has {', '.join(hints)}"
            raise LiveAvatarError(f"{path}: {type(cfg).__name__} has no field {name!r}{hint}")
        if isinstance(value, _Leaf):
            new[name] = _coerce(hints[name], value.value, path)
        else:
            new[name] = _changed(getattr(cfg, name), value, f"{path}.")
    return dataclasses.replace(cast(Any, cfg), **new)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value, where)
    if hint is types.NoneType and value is None:
        return value
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
        configs = [option for option in options if dataclasses.is_dataclass(option)]
        if isinstance(value, dict) and len(configs) == 1:  # an error is about its own fields
            return _coerce(configs[0], value, where)
        for option in options:
            try:
                return _coerce(option, value, where)
            except LiveAvatarError:
                continue
    elif typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        args = typing.get_args(hint)
        args = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(args) == len(value):
            return tuple(_coerce(a, v, where) for a, v in zip(args, value, strict=True))
    elif hint is float and type(value) is int:
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise LiveAvatarError(f"{where} = {value!r} must be {getattr(hint, '__name__', hint)}")
