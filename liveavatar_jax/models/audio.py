"""From speech features to the DiT: the causal audio adapter, and injection into hidden states."""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from liveavatar_jax.config import DiTConfig
from liveavatar_jax.models.attention import Attention
from liveavatar_jax.models.layers import Linear, along_last, modulate, standardise
from liveavatar_jax.types import Array, Float, LiveAvatarError, struct

PAST = 5  # feature frames before a block that its first latent frame still sees


@struct
class AudioTokens:
    """What a latent frame hears: one global token for AdaLN, `k` local ones to attend to."""

    global_: Float[Array, "b a f dim"]
    local: Float[Array, "b a f k dim"]


class CausalConv(nnx.Module):
    """Kernel 3 along time, no padding; standardised and SiLU'd, as everywhere in the adapter."""

    def __init__(self, inputs: int, outputs: int, stride: int, dtype: str, *, rngs: nnx.Rngs):
        self.stride = stride
        kernel = jax.random.normal(rngs.params(), (3, inputs, outputs)) * (3 * inputs) ** -0.5
        self.kernel = nnx.Param(kernel.astype(dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype))

    def __call__(self, x: Float[Array, "b i c"], groups: int = 1) -> Float[Array, "bg o k"]:
        """Each of `groups` parts of the output is standardised by itself and becomes a row."""
        steps = (x.shape[1] - 3) // self.stride + 1
        taps = [x[:, i : i + self.stride * (steps - 1) + 1 : self.stride] for i in range(3)]
        kernel = rearrange(self.kernel[...].astype(x.dtype), "k i o -> (k i) o")
        y = jnp.concatenate(taps, axis=-1) @ kernel
        y = y + along_last(self.bias[...], y)
        y = rearrange(y, "b i (g o) -> (b g) i o", g=groups)
        return jax.nn.silu(standardise(y)).astype(x.dtype)


class AudioAdapter(nnx.Module):
    """The published `casual_audio_encoder`: hidden states of the speech encoder → `AudioTokens`."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        dim, dtype = cfg.dim, cfg.param_dtype
        self.layers, self.tokens = cfg.audio_layers, cfg.audio_tokens
        self.layer_weights = nnx.Param(jnp.full(cfg.audio_layers, 0.01, dtype))
        self.pad_token = nnx.Param(jnp.zeros(dim, dtype))
        width = dim // 4
        self.conv1_local = CausalConv(cfg.audio_dim, width * self.tokens, 1, dtype, rngs=rngs)
        self.conv1_global = CausalConv(cfg.audio_dim, width, 1, dtype, rngs=rngs)
        self.conv2 = CausalConv(width, dim // 2, 2, dtype, rngs=rngs)
        self.conv3 = CausalConv(dim // 2, dim, 2, dtype, rngs=rngs)
        self.final = Linear(dim, dim, dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "b a F layers c"]) -> AudioTokens:
        """Features of `PAST + 4 f` video frames, the first `PAST` being the left context.

        The published code prepends 73 copies of the first frame and drops 19 of 22 results; the
        three that remain look back no further than `PAST` frames, so only these are computed.

        Raises:
            LiveAvatarError: another number of frames or of layers.
        """
        b, a, frames, layers, _ = features.shape
        if layers != self.layers or (frames - PAST) % 4 or frames <= PAST:
            raise LiveAvatarError(
                f"audio features of {frames} frames x {layers} layers: give {PAST} + 4k frames of "
                f"{self.layers} layers"
            )
        weight = jax.nn.silu(self.layer_weights[...].astype(features.dtype))
        x = jnp.einsum("bafli,l->bafi", features, weight / weight.sum())
        x = rearrange(x, "b a f i -> (b a) f i")
        local = self.conv3(self.conv2(self.conv1_local(x, groups=self.tokens)))
        local = rearrange(local, "(b a k) f o -> b a f k o", a=a, k=self.tokens)
        pad = self.pad_token[...].astype(x.dtype)
        pad = repeat(pad, "o -> b a f 1 o", b=b, a=a, f=local.shape[2])
        whole = self.final(self.conv3(self.conv2(self.conv1_global(x))))
        return AudioTokens(
            global_=rearrange(whole, "(b a) f o -> b a f o", a=a),
            local=jnp.concatenate([local, pad], axis=3),
        )


class Injector(nnx.Module):
    """Cross-attention of every latent frame to its own audio, after AdaLN by the global token."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        dtype = cfg.param_dtype
        self.attn = Attention(cfg.dim, cfg.heads, "plain", dtype, rngs=rngs)
        self.adain = Linear(cfg.dim, 2 * cfg.dim, dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b f p dim"], audio: AudioTokens, mask: Float[Array, "b a #f p"]
    ) -> Float[Array, "b f p dim"]:
        """Adds what every speaker's audio says where `mask` lets it; background hears all."""
        frames = x.shape[1]
        heard = self.attn.context(rearrange(audio.local, "b a f k dim -> (b a f) k dim"))
        y = self.attn(rearrange(self.adapt(x, audio), "b a f p dim -> (b a f) p dim"), heard)
        y = rearrange(y, "(b a f) p dim -> b a f p dim", b=len(x), f=frames)
        return x + jnp.sum(y * mask[..., None].astype(y.dtype), axis=1)

    def adapt(
        self, x: Float[Array, "b f p dim"], audio: AudioTokens
    ) -> Float[Array, "b a f p dim"]:
        """Hidden states as each speaker's queries see them."""
        level = self.adain(jax.nn.silu(audio.global_)).astype(jnp.float32)
        shift, scale = jnp.split(level, 2, axis=-1)
        return modulate(x[:, None], shift[:, :, :, None], scale[:, :, :, None], eps=1e-5)
