"""Condition tokens: the reference image, and the packed motion frames behind the stream."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from liveavatar_jax.config import DiTConfig
from liveavatar_jax.models.layers import Linear, Phase, grid_phase
from liveavatar_jax.types import Array, Float, Int

REFERENCE_POSITION = 30  # temporal position of the reference before it rolls
MOTION_FRAMES = 19  # motion latents, 73 video frames
_NEAR, _MID, _FAR = (1, 2, 2), (2, 4, 4), (4, 8, 8)  # patches: frames, rows, columns


def patchify(x: Float[Array, "b f h w c"], patch: tuple[int, int, int]) -> Float[Array, "b t k"]:
    """Tokens frame by frame, row by row; what does not fill a patch is dropped."""
    sizes = (n - n % p for n, p in zip(x.shape[1:4], patch, strict=True))
    f, h, w = sizes
    t, p, q = patch
    return rearrange(
        x[:, :f, :h, :w], "b (f t) (h p) (w q) c -> b (f h w) (t p q c)", t=t, p=p, q=q
    )


class FramePacker(nnx.Module):
    """The published FramePack: of 19 motion latents the last one is seen in full, the two before
    it at half, the sixteen before those at a quarter of the resolution."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        def project(patch: tuple[int, int, int]) -> Linear:
            width = int(np.prod(patch)) * cfg.latent_channels
            return Linear(width, cfg.dim, cfg.param_dtype, rngs=rngs)

        self.near, self.mid, self.far = project(_NEAR), project(_MID), project(_FAR)

    def __call__(self, motion: Float[Array, "b f h w c"]) -> Float[Array, "b t dim"]:
        """Oldest first; missing old frames count as zeros, surplus ones are ignored."""
        motion = motion[:, -MOTION_FRAMES:]
        missing = MOTION_FRAMES - motion.shape[1]
        motion = jnp.pad(motion, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
        near, mid, far = motion[:, -1:], motion[:, -3:-1], motion[:, :-3]
        parts = (
            self.near(patchify(near, _NEAR)),
            self.mid(patchify(mid, _MID)),
            self.far(patchify(far, _FAR)),
        )
        return jnp.concatenate(parts, axis=1)


def condition_phase(height: int, width: int, roll: Int[Array, " b"], head_dim: int) -> Phase:
    """Phases of reference | near | mid | far tokens for latents of height × width.

    Only the reference rolls; the motion frames stay at negative positions. Coarse grids spread
    over the fine one, truncated to integers.
    """
    rows, cols = height // 2, width // 2
    groups = (
        (REFERENCE_POSITION + roll[:, None], rows, cols),
        (np.array([[-1]]), rows, cols),
        (np.array([[-3]]), height // 4, width // 4),
        (np.array([[-19, -14, -9, -4]]), height // 8, width // 8),
    )

    def group(frames: Int[Array, "_ f"] | np.ndarray, h: int, w: int) -> Phase:
        turn = grid_phase(jnp.asarray(frames), _spread(h, rows), _spread(w, cols), head_dim)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (len(roll), *a.shape[1:])), turn)

    phases = [group(*each) for each in groups]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *phases)


def _spread(coarse: int, fine: int) -> Int[Array, " n"]:
    """`coarse` integers from 0 to fine - 1, equally spaced and truncated.

    In float64 as published: exact integers would differ by one in a few places (119 to 59).
    """
    return jnp.asarray(np.linspace(0, fine - 1, coarse).astype(np.int32))
