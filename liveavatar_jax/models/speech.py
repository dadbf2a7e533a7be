"""The wav2vec2 speech encoder, and its hidden states at the rate of the video.

`SpeechEncoder` maps a waveform to all hidden states at 50 Hz; `window_features` maps one window
of a longer recording to the features of a few video frames. Which frames, and where they lie, is
decided on the host in whole numbers (data/speech.py) and arrives here as a `Hop`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from liveavatar_jax.config import SpeechConfig
from liveavatar_jax.models.layers import LayerNorm, Linear, along_last
from liveavatar_jax.types import Array, Bool, Float, Int, LiveAvatarError, struct

EPS = 1e-5  # of every layer norm in here
Numbers = Array | np.ndarray  # made on the host, traced on the device


class Conv(nnx.Module):
    """A strided convolution over time, a norm over its channels, and exact GELU."""

    def __init__(self, i: int, o: int, kernel: int, stride: int, dtype: str, *, rngs: nnx.Rngs):
        self.stride = stride
        scale = (2 / (i * kernel)) ** 0.5
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (kernel, i, o), dtype))
        self.bias = nnx.Param(jnp.zeros(o, dtype))
        self.norm = LayerNorm(o, dtype, EPS, rngs=rngs)

    def __call__(self, x: Float[Array, "b t i"]) -> Float[Array, "b s o"]:
        y = _convolve(x, self.kernel[...], self.stride)
        return jax.nn.gelu(self.norm(y + along_last(self.bias[...], y)), approximate=False)


class PositionalConv(nnx.Module):
    """Relative position by a wide grouped convolution, its weight kept as gain g times v / |v|."""

    def __init__(self, cfg: SpeechConfig, *, rngs: nnx.Rngs):
        self.groups = cfg.pos_groups
        shape = (cfg.pos_kernel, cfg.dim // cfg.pos_groups, cfg.dim)
        v = (shape[0] * shape[1]) ** -0.5 * jax.random.normal(rngs.params(), shape)
        self.g = nnx.Param(jnp.sqrt(jnp.sum(v * v, axis=(1, 2))).astype(cfg.param_dtype))
        self.v = nnx.Param(v.astype(cfg.param_dtype))
        self.bias = nnx.Param(jnp.zeros(cfg.dim, cfg.param_dtype))

    def __call__(self, x: Float[Array, "b t dim"]) -> Float[Array, "b t dim"]:
        kernel = self.kernel().astype(x.dtype)
        width = kernel.shape[0]
        x = jnp.pad(x, ((0, 0), (width // 2, (width - 1) // 2), (0, 0)))  # as many out as in
        y = _convolve(x, kernel, 1, self.groups)
        return jax.nn.gelu(y + along_last(self.bias[...], y), approximate=False)

    def kernel(self) -> Float[Array, "k i o"]:
        """One norm for each tap, over all its channels; float32."""
        g, v = self.g[...].astype(jnp.float32), self.v[...].astype(jnp.float32)
        return v * (g * jax.lax.rsqrt(jnp.sum(v * v, axis=(1, 2))))[:, None, None]


class Layer(nnx.Module):
    """A pre-norm ("stable layer norm") transformer layer."""

    def __init__(self, cfg: SpeechConfig, *, rngs: nnx.Rngs):
        dim, ffn, dtype = cfg.dim, cfg.ffn_dim, cfg.param_dtype
        self.heads = cfg.heads
        self.attn_norm = LayerNorm(dim, dtype, EPS, rngs=rngs)
        self.q = Linear(dim, dim, dtype, rngs=rngs)
        self.k = Linear(dim, dim, dtype, rngs=rngs)
        self.v = Linear(dim, dim, dtype, rngs=rngs)
        self.out = Linear(dim, dim, dtype, rngs=rngs)
        self.ffn_norm = LayerNorm(dim, dtype, EPS, rngs=rngs)
        self.expand = Linear(dim, ffn, dtype, rngs=rngs)
        self.shrink = Linear(ffn, dim, dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t dim"], heard: Bool[Array, "b t"]
    ) -> Float[Array, "b t dim"]:
        x = x + self.attend(self.attn_norm(x), heard)
        y = jax.nn.gelu(self.expand(self.ffn_norm(x)), approximate=False)
        return x + self.shrink(y)

    def attend(
        self, x: Float[Array, "b t dim"], heard: Bool[Array, "b t"]
    ) -> Float[Array, "b t dim"]:
        q, k, v = (
            rearrange(part(x), "b t (n d) -> b t n d", n=self.heads)
            for part in (self.q, self.k, self.v)
        )
        logits = jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=jnp.float32)
        logits = logits * q.shape[-1] ** -0.5
        lowest = jnp.finfo(jnp.float32).min  # finite: a window that hears nothing stays finite
        weights = jax.nn.softmax(jnp.where(heard[:, None, None], logits, lowest), axis=-1)
        y = jnp.einsum("bnts,bsnd->btnd", weights.astype(x.dtype), v)
        return self.out(rearrange(y, "b t n d -> b t (n d)"))


class SpeechEncoder(nnx.Module):
    """wav2vec2 with the traits of wav2vec2-large-xlsr-53: layer norm and bias in the
    convolutions, pre-norm layers. Raises LiveAvatarError for sizes that do not divide."""

    def __init__(self, cfg: SpeechConfig, *, rngs: nnx.Rngs):
        if not len(cfg.conv_dim) == len(cfg.conv_kernel) == len(cfg.conv_stride):
            raise LiveAvatarError(
                "SpeechConfig.conv_dim, conv_kernel, conv_stride differ in length"
            )
        if cfg.dim % cfg.heads or cfg.dim % cfg.pos_groups:
            raise LiveAvatarError(
                f"SpeechConfig.dim = {cfg.dim} must divide by heads = {cfg.heads} "
                f"and by pos_groups = {cfg.pos_groups}"
            )
        self.cfg = cfg
        dtype = cfg.param_dtype
        inputs = (1, *cfg.conv_dim)
        sizes = zip(inputs, cfg.conv_dim, cfg.conv_kernel, cfg.conv_stride, strict=False)
        self.convs = nnx.List([Conv(*size, dtype, rngs=rngs) for size in sizes])
        self.project_norm = LayerNorm(inputs[-1], dtype, EPS, rngs=rngs)
        self.project = Linear(inputs[-1], cfg.dim, dtype, rngs=rngs)
        self.pos_conv = PositionalConv(cfg, rngs=rngs)
        make = lambda key: Layer(cfg, rngs=nnx.Rngs(key))
        self.layers = jax.vmap(make)(jax.random.split(rngs.params(), cfg.layers))
        self.norm = LayerNorm(cfg.dim, dtype, EPS, rngs=rngs)

    def __call__(
        self,
        waveform: Float[Array, "b samples"],
        heard: Bool[Array, "b frames"] | None = None,
        dtype: str | None = None,
    ) -> Float[Array, "b frames states dim"]:
        """A normalised 16 kHz waveform to all hidden states, `states` = layers + 1.

        The states are the input of each layer and the normed output of the last. `heard` tells
        which frames are speech (default: all); the others are to the rest as if the recording
        had not contained them, so a padded window gives what the bare recording gives. Frames
        are 20 ms apart and see 25 ms; fewer than 400 samples make none. Runs in the dtype of
        the weights unless `dtype` names another.
        """
        dtype = dtype or self.project.kernel.dtype
        frames = self.frames(waveform.shape[1])
        if frames == 0:
            return jnp.zeros((len(waveform), 0, self.cfg.layers + 1, self.cfg.dim), dtype)
        if heard is None:
            heard = jnp.ones((len(waveform), frames), bool)
        x = self.project(self.project_norm(self.local(waveform.astype(dtype))))
        x = jnp.where(heard[..., None], x, jnp.zeros_like(x))  # the padding of the convolution
        x = x + self.pos_conv(x)
        x, inputs = jax.lax.scan(lambda x, layer: (layer(x, heard), x), x, self.layers)
        states = jnp.concatenate([inputs, self.norm(x)[None]])
        return rearrange(states, "l b t c -> b t l c")

    def local(self, waveform: Float[Array, "b samples"]) -> Float[Array, "b frames c"]:
        """The convolutions alone: each frame knows its own 25 ms."""
        x = waveform[..., None]
        for conv in self.convs:
            x = conv(x)
        return x

    def frames(self, samples: int) -> int:
        """How many frames a waveform of so many samples makes."""
        for kernel, stride in zip(self.cfg.conv_kernel, self.cfg.conv_stride, strict=True):
            samples = max(0, (samples - kernel) // stride + 1)
        return samples

    def hop(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.cfg.conv_stride)


def _convolve(
    x: Float[Array, "b t i"], kernel: Float[Array, "k j o"], stride: int, groups: int = 1
) -> Float[Array, "b s o"]:
    # channels last: this layout alone reaches the full speed of XLA's CPU convolution
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride,),
        "VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


@struct
class Hop:
    """All that an encoder has to know about a window and the video frames it is asked for.

    Each video frame lies between the two encoder frames `low` and `high` of the window, at the
    fraction `weight`; where it is not `sounding`, the recording has ended and features are zero.
    """

    mean: Float[Numbers, ""]  # of the recording's samples
    std: Float[Numbers, ""]
    heard: Bool[Numbers, " frames"]  # encoder frames that lie inside the recording
    low: Int[Numbers, " F"]
    high: Int[Numbers, " F"]
    weight: Float[Numbers, " F"]
    sounding: Bool[Numbers, " F"]


def at_video_rate(
    states: Float[Array, "b frames states dim"], hop: Hop
) -> Float[Array, "b F states dim"]:
    """Hidden states interpolated to video frames, in float32 and back."""
    if states.shape[1] == 0:  # too short for a single one
        return jnp.zeros((len(states), len(hop.low), *states.shape[2:]), states.dtype)
    low, high = states[:, hop.low].astype(jnp.float32), states[:, hop.high].astype(jnp.float32)
    axes = lambda a: jnp.asarray(a)[None, :, None, None]
    between = low + (high - low) * axes(hop.weight)
    return jnp.where(axes(hop.sounding), between, 0.0).astype(states.dtype)


def window_features(
    encoder: SpeechEncoder, samples: Float[Array, "b samples"], hop: Hop, dtype: str | None = None
) -> Float[Array, "b F states dim"]:
    """The features of a hop's video frames from the window of raw 16 kHz samples around them.

    All shapes are those of the window, so a stream compiles this once. It is pure and keeps
    nothing between hops: most of a window is encoded again with the next one. Its convolutions,
    which alone could be kept, are a seventh of the work; attention sees both ways.
    """
    heard = jnp.broadcast_to(hop.heard, (len(samples), len(hop.heard)))
    return at_video_rate(encoder((samples - hop.mean) / hop.std, heard, dtype), hop)
