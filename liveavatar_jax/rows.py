"""Several streams on one device, as the rows of a batch: faster together than one after another.

rows = Rows(avatar, pictures, context, seed, numbers, first)    # compiles
for block, pixels in rows.play(chunks, wanted):                  # [b, F, H, W, 3] bytes

Row r is the stream that it would be alone and at any place of any batch: its noise comes from
`numbers[r]`. Blocks that nobody wants to see are not decoded.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from liveavatar_jax import stream
from liveavatar_jax.models.vae import VAE, FeatureCache
from liveavatar_jax.types import Array, Float, Int, Key, UInt8

# Latents that are decoded before one that is wanted. No convolution of the published decoder, whose
# memory is the longest, looks further back, so frames are those that they would be had all been
# decoded.
WARM_UP = 38


def begun(
    model: stream.Avatar, picture: Float[Array, "b H W 3"], context: Float[Array, "b t k"],
    key: Key[Array, ""], numbers: Int[Array, " b"],
) -> tuple[stream.StreamState, FeatureCache]:  # fmt: skip
    """The state before the first block, and apart from it that of the decoder."""
    state = stream.start(model, stream.encode_portrait(model, picture), context, key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    decoder = state.decoder
    assert decoder is not None
    return dataclasses.replace(state, key=keys, decoder=None), decoder


def moved(
    model: stream.Avatar, state: stream.StreamState, chunk: stream.Chunk
) -> tuple[stream.StreamState, Array, Array]:
    """The next block, clean and not decoded, and which rows it is live in."""
    state, flight = stream.denoise(model, state, stream.draw(model, state), chunk)
    return state, flight.x, flight.live


def shown(
    vae: VAE, decoder: FeatureCache, x: Array, live: Array
) -> tuple[FeatureCache, UInt8[Array, "b F H W 3"]]:
    decoder, frames = stream.decode(vae, decoder, x, live)
    return decoder, stream.pixels(frames)


class Rows:
    """Streams of one picture size that go on together."""

    def __init__(
        self, avatar: stream.Avatar, pictures: Float[np.ndarray, "b H W 3"],
        context: Float[np.ndarray, "b t k"], seed: int, numbers: Int[np.ndarray, " b"],
        first: stream.Chunk,
    ):  # fmt: skip
        self.avatar = avatar
        self.opening: Any = self._opening(pictures, context, seed, numbers)
        self._begin = jax.jit(begun).lower(avatar, *self.opening).compile()
        state, decoder = jax.eval_shape(begun, avatar, *self.opening)
        self._move = jax.jit(moved, donate_argnums=1).lower(avatar, state, first).compile()
        _, x, live = jax.eval_shape(moved, avatar, state, first)
        self._show = jax.jit(shown, donate_argnums=1).lower(avatar.vae, decoder, x, live).compile()

    def reopen(
        self, pictures: Float[np.ndarray, "b H W 3"], context: Float[np.ndarray, "b t k"],
        seed: int, numbers: Int[np.ndarray, " b"],
    ) -> None:  # fmt: skip
        """Other streams of the same shapes, with what is compiled."""
        self.opening = self._opening(pictures, context, seed, numbers)

    def play(
        self, chunks: Iterator[stream.Chunk], wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "b F H W 3"]]]:
        """The wanted blocks by number; the host looks at one while the device makes the next."""
        state, decoder = self._begin(self.avatar, *self.opening)
        before = -(-WARM_UP // self.avatar.cfg.block_frames)
        pending = None
        for block, chunk in enumerate(chunks):
            state, x, live = self._move(self.avatar, state, chunk)
            ready = None
            if any(wanted(block + ahead) for ahead in range(before + 1)):
                decoder, pixels = self._show(self.avatar.vae, decoder, x, live)
                ready = (block, pixels) if wanted(block) else None
            if pending is not None:
                yield pending[0], np.asarray(pending[1])
            elif ready is None:
                jax.block_until_ready(live)  # or the host would run ahead without bound
            pending = ready
        if pending is not None:
            yield pending[0], np.asarray(pending[1])

    def _opening(self, pictures: Any, context: Any, seed: int, numbers: Any) -> tuple[Array, ...]:
        dtype = self.avatar.cfg.dtype
        return (
            jnp.asarray(pictures).astype(dtype),
            jnp.asarray(context),
            jax.random.key(seed),
            jnp.asarray(numbers, jnp.int32),
        )
