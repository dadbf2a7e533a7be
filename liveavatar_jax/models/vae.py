"""The causal 3-D VAE of Wan2.1 (arXiv 2503.20314, section 4.1; published as Wan2.1_VAE.pth).

A video begins with one frame that makes one latent by itself; every later latent stands for four
frames, and each for 8×8 pixels. Nothing looks ahead, so a video of any length passes through in
pieces: each call takes the `FeatureCache` of the one before and returns the next.

Small presets have the same interface over a coder of their own, see cells.py.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from liveavatar_jax.config import VAEConfig
from liveavatar_jax.models.causal import (
    Attention,
    CausalConv,
    Conv,
    FeatureCache,
    Norm,
    Tail,
    run,
)
from liveavatar_jax.models.cells import CellDecoder, CellEncoder
from liveavatar_jax.models.conv import conv2d, conv2d_doubled
from liveavatar_jax.models.layers import Linear, along_last
from liveavatar_jax.types import Array, Float, LiveAvatarError


class Residual(nnx.Module):
    """Twice norm, SiLU, causal convolution; the input is added, through 1×1×1 if it is narrower."""

    def __init__(self, cfg: VAEConfig, c: int, out: int, *, rngs: nnx.Rngs):
        self.norm1 = Norm(cfg, c, rngs=rngs)
        self.conv1 = CausalConv(cfg, c, out, rngs=rngs)
        self.norm2 = Norm(cfg, out, rngs=rngs)
        self.conv2 = CausalConv(cfg, out, out, rngs=rngs)
        self.shortcut = Linear(c, out, cfg.param_dtype, rngs=rngs) if c != out else None

    def __call__(self, x: Float[Array, "b f h w c"], tail: Tail):
        first, second = (None, None) if tail is None else tail
        y, first = self.conv1(jax.nn.silu(self.norm1(x)), first)
        y, second = self.conv2(jax.nn.silu(self.norm2(y)), second)
        x = x if self.shortcut is None else self.shortcut(x)
        return x + y, (first, second)


class Downsample(nnx.Module):
    """Halves rows and columns, then the frames where `time` says so."""

    def __init__(self, cfg: VAEConfig, c: int, time: bool, *, rngs: nnx.Rngs):
        self.conv = Conv(cfg, c, c, (3, 3), rngs=rngs)
        self.time_conv = Conv(cfg, c, c, (3,), rngs=rngs) if time else None

    def __call__(self, x: Float[Array, "b f h w c"], tail: Tail):
        x = conv2d(x, self.conv.kernel[...], stride=2, pad=((0, 1), (0, 1)))
        x = self.conv.shift(x)
        return (x, ()) if self.time_conv is None else self._halve(self.time_conv, x, tail)

    def _halve(self, conv: Conv, x, last):
        """The first frame of a video passes alone; then (last, 1, 2), (2, 3, 4) make one each."""
        if last is None:
            return x, x
        last, x = x[:, -1:], jnp.concatenate([last, x], axis=1)
        taps = jnp.concatenate([x[:, :-2:2], x[:, 1:-1:2], x[:, 2::2]], axis=-1)
        kernel = conv.kernel[...].astype(x.dtype)
        return conv.shift(taps @ rearrange(kernel, "k c o -> (k c) o")), last


class Upsample(nnx.Module):
    """Doubles the frames where `time` says so, then rows and columns, which halves the channels."""

    def __init__(self, cfg: VAEConfig, c: int, time: bool, *, rngs: nnx.Rngs):
        self.time_conv = CausalConv(cfg, c, 2 * c, (3, 1, 1), rngs=rngs) if time else None
        self.conv = Conv(cfg, c, c // 2, (3, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], tail: Tail):
        x, tail = (x, ()) if self.time_conv is None else self._double(self.time_conv, x, tail)
        return self.conv.shift(conv2d_doubled(x, self.conv.kernel[...])), tail

    def _double(self, conv: CausalConv, x, tail):
        """The first latent of a video stays one frame, and the second does not know of it."""
        if tail is None:
            return x, jnp.repeat(jnp.zeros_like(x), 2, axis=1)
        x, tail = conv(x, tail)
        return rearrange(x, "b f h w (two c) -> b (f two) h w c", two=2), tail


class Head(nnx.Module):
    """Norm, SiLU and the last convolution."""

    def __init__(self, cfg: VAEConfig, c: int, out: int, *, rngs: nnx.Rngs):
        self.norm = Norm(cfg, c, rngs=rngs)
        self.conv = CausalConv(cfg, c, out, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], tail: Tail):
        return self.conv(jax.nn.silu(self.norm(x)), tail)


def middle(cfg: VAEConfig, c: int, *, rngs: nnx.Rngs) -> list[nnx.Module]:
    first, last = (Residual(cfg, c, c, rngs=rngs) for _ in range(2))
    return [first, Attention(cfg, c, rngs=rngs), last]


class Encoder(nnx.Module):
    """Frames to the mean and log-variance of latents."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        widths = [cfg.dim * m for m in cfg.dim_mult]
        c, down = cfg.dim, []
        for level, out in enumerate(widths):
            for _ in range(cfg.res_blocks):
                down.append(Residual(cfg, c, out, rngs=rngs))
                c = out
            if level < len(widths) - 1:
                down.append(Downsample(cfg, c, cfg.time_down[level], rngs=rngs))
        self.conv_in = CausalConv(cfg, 3, cfg.dim, rngs=rngs)
        self.down = nnx.List(down)
        self.middle = nnx.List(middle(cfg, c, rngs=rngs))
        self.head = Head(cfg, c, 2 * cfg.z_dim, rngs=rngs)

    @property
    def layers(self) -> list:
        return [self.conv_in, *self.down, *self.middle, self.head]

    def __call__(self, frames: Float[Array, "b F H W 3"], cache: FeatureCache | None):
        return run(self.layers, frames, cache)


class Decoder(nnx.Module):
    """Latents to frames."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        widths = [cfg.dim * m for m in reversed(cfg.dim_mult)]
        c, up = widths[0], []
        self.conv_in = CausalConv(cfg, cfg.z_dim, c, rngs=rngs)
        self.middle = nnx.List(middle(cfg, c, rngs=rngs))
        for level, out in enumerate(widths):
            for _ in range(cfg.res_blocks + 1):
                up.append(Residual(cfg, c, out, rngs=rngs))
                c = out
            if level < len(widths) - 1:
                up.append(Upsample(cfg, c, cfg.time_down[-1 - level], rngs=rngs))
                c //= 2
        self.up = nnx.List(up)
        self.head = Head(cfg, c, 3, rngs=rngs)

    @property
    def layers(self) -> list:
        return [self.conv_in, *self.middle, *self.up, self.head]

    def __call__(self, latent: Float[Array, "b f h w c"], cache: FeatureCache | None):
        return run(self.layers, latent, cache)


class VAE(nnx.Module):
    """Video to latents and back.

    Weights stay in `cfg.param_dtype`; results and caches have the dtype of the input.
    """

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        encoder, decoder = (Encoder, Decoder) if cfg.cells is None else (CellEncoder, CellDecoder)
        self.encoder = encoder(cfg, rngs=rngs)
        if cfg.cells is None:
            self.to_moments = Linear(2 * cfg.z_dim, 2 * cfg.z_dim, cfg.param_dtype, rngs=rngs)
            self.from_latents = Linear(cfg.z_dim, cfg.z_dim, cfg.param_dtype, rngs=rngs)
        self.decoder = decoder(cfg, rngs=rngs)

    def encode(
        self, video: Float[Array, "b F H W _"], cache: FeatureCache | None = None
    ) -> tuple[Float[Array, "b f h w c"], FeatureCache]:
        """Normalised mean latents of frames with values in [-1, 1]; H and W are multiples of 8.

        Without a cache the video begins here, with one frame more than four times the latents
        (F = 1 + 4k, f = 1 + k); with the cache of the call before it goes on (F = 4k, f = k).
        However a video is cut into calls, the latents are the same. Memory is that of four frames.

        Raises LiveAvatarError when a size does not fit, or the cache is of another video.
        """

        self._check_video(video, begins=cache is None)
        _check_cache(cache, video, "encode")

        return _stream(self.latents, video, cache, self.cfg.frames_per_latent)

    def still(self, picture: Float[Array, "b H W 3"], frames: int) -> Float[Array, "b f h w c"]:
        """`encode` of a picture that stands still for so many frames."""
        if self.cfg.cells is None:
            return self.encode(jnp.repeat(picture[:, None], frames, axis=1))[0]
        latents, _ = self.encode(picture[:, None])  # cells have no memory but of the first frame
        return jnp.repeat(latents, 1 + (frames - 1) // self.cfg.frames_per_latent, axis=1)

    def decode(
        self, latents: Float[Array, "b f h w c"], cache: FeatureCache | None = None
    ) -> tuple[Float[Array, "b F H W 3"], FeatureCache]:
        """Frames of normalised latents, nominally within [-1, 1] but not clamped.

        Without a cache the video begins here and the first latent makes one frame (F = 4f - 3);
        with the cache of the call before it goes on (F = 4f). However the latents are cut into
        calls, the frames are the same. Memory is that of one latent, and of the frames returned.

        Raises LiveAvatarError when there is no latent, it has not the right channels or, of cells,
        size, or the cache is of another video.
        """
        grid = latents.shape[2:4] if self.cfg.cells is None else self.cfg.grid
        fits = latents.shape[2:] == (*grid, self.cfg.z_dim)
        _check_cache(cache, latents, "decode")
        if latents.shape[1] < 1 or not fits:
            rows, columns = ("rows", "columns") if self.cfg.cells is None else grid
            raise LiveAvatarError(
                f"latents of shape {latents.shape} cannot be decoded; give at least one, as "
                f"(batch, frames, {rows}, {columns}, {self.cfg.z_dim})"
            )
        return _stream(self.shown, latents, cache, 1)

    def primed(
        self,
        latents: Float[Array, "b f h w c"],
        picture: Float[Array, "b H W 3"] | None = None,
    ) -> FeatureCache:
        """The cache of a decoder that has shown these latents, of a picture that stands still.

        Cells need the first alone, and keep the picture itself, if they are given it; what comes
        next may begin anywhere.
        """
        if not isinstance(self.decoder, CellDecoder):
            return self.decode(latents)[1]
        first = denormalise(latents[:, :1], self.cfg)
        return self.decoder.begin(first, None if picture is None else picture[:, None])

    def latents(
        self, frames: Float[Array, "b F H W 3"], cache: FeatureCache | None
    ) -> tuple[Float[Array, "b f h w c"], FeatureCache]:
        """Of one frame without a cache, and of the frames of one latent with it; cells take those
        of several at once."""
        y, cache = self.encoder(frames, cache)
        if self.cfg.cells is None:
            y, _ = jnp.split(self.to_moments(y), 2, axis=-1)  # and log-variance
        return normalise(y, self.cfg), cache

    def shown(
        self, latent: Float[Array, "b f h w c"], cache: FeatureCache | None
    ) -> tuple[Float[Array, "b F H W 3"], FeatureCache]:
        """Frames of one normalised latent; cells, with a cache, take several at once."""
        x = denormalise(latent, self.cfg)
        return self.decoder(x if self.cfg.cells is not None else self.from_latents(x), cache)

    def _check_video(self, video, begins: bool) -> None:
        _, frames, height, width, colours = video.shape
        if colours != 3:
            raise LiveAvatarError(f"video has {colours} channels; give 3 (red, green, blue) last")
        size = self.cfg.pixels_per_latent
        if height % size or width % size:
            raise LiveAvatarError(
                f"video is {width}×{height} pixels; crop or scale it to multiples of {size}"
            )
        if self.cfg.cells is not None and (height // size, width // size) != self.cfg.grid:
            rows, columns = self.cfg.grid
            raise LiveAvatarError(
                f"video is {width}×{height} pixels; this VAE knows {columns * size}×{rows * size} "
                "alone"
            )
        group = self.cfg.frames_per_latent
        if frames < 1 or (frames - begins) % group:
            rule = f"a video begins with 1 + {group}·k frames" if begins else f"give {group}·k"
            raise LiveAvatarError(f"video has {frames} frames; {rule} to this call of encode")


def normalise(mean: Float[Array, "*n c"], cfg: VAEConfig) -> Float[Array, "*n c"]:
    """Encoder output to the latents that the diffusion model knows: about zero mean, unit width."""
    center, width = _statistics(mean, cfg)
    return (mean - center) / width


def denormalise(latents: Float[Array, "*n c"], cfg: VAEConfig) -> Float[Array, "*n c"]:
    """The inverse of `normalise`."""
    center, width = _statistics(latents, cfg)
    return latents * width + center


def _statistics(like: Float[Array, "*n c"], cfg: VAEConfig) -> list[Float[Array, "*ones c"]]:
    known = (cfg.latent_mean, cfg.latent_std)
    return [along_last(jnp.asarray(values), like) for values in known]


def _stream(step, x, cache, group: int):
    """Drives `step` over groups of frames; where a video begins, its first frame is one."""
    pieces = []
    if cache is None:
        y, cache = step(x[:, :1], None)
        pieces, x = [y], x[:, 1:]
    if x.shape[1] == group:  # no loop, in which a CPU takes many times as long for gradients
        y, cache = step(x, cache)
        pieces.append(y)
    elif x.shape[1]:
        groups = rearrange(x, "b (n f) h w c -> n b f h w c", f=group)
        cache, y = jax.lax.scan(lambda cache, x: step(x, cache)[::-1], cache, groups)
        pieces.append(rearrange(y, "n b f h w c -> b (n f) h w c"))
    return jnp.concatenate(pieces, axis=1), cache


def _check_cache(cache, x, call: str) -> None:
    """The first layer keeps what came in, so its tail tells batch, size, channels and dtype."""
    if cache is None:
        return
    seen = cache.tails[0]
    if (seen.shape[0], *seen.shape[2:], seen.dtype) != (x.shape[0], *x.shape[2:], x.dtype):
        raise LiveAvatarError(
            f"the cache is of a {call} call with {_describe(seen)}, but this one has "
            f"{_describe(x)}; pass the cache that the same video's last {call} returned"
        )


def _describe(x) -> str:
    b, _, h, w, c = x.shape
    return f"batch {b}, {h}×{w}, {c} channels in {x.dtype}"
