"""Log-mel features of speech, for models that have no speech encoder: no weights, no look back
at the whole recording, and hardly any delay."""

import functools

import jax.numpy as jnp
import numpy as np

from liveavatar_jax.config import MelConfig
from liveavatar_jax.types import Array, Float

RATE = 16_000
HOP, SIZE, PER_FRAME = MelConfig.HOP, MelConfig.SIZE, MelConfig.PER_FRAME
FLOOR = 1e-8  # power of a band that counts as silence: -80 dB


def log_mel(waveform: Float[Array, "b samples"], cfg: MelConfig) -> Float[Array, "b F layers bins"]:
    """16 kHz samples to the features of the video frames they hold, float32, about -1 to 1.

    The waveform begins `cfg.past` samples before the first frame and ends `cfg.future` samples
    after the last; at the ends of a recording these are zeros. A frame depends on just those
    samples, so any cutting of a recording gives equal features. -1 is silence, digital or not
    (a band at -80 dB and below), 0 is -40 dB, 1 is full scale: nothing is normalised by what
    else was heard. Ordinary speech has mean -0.6 and deviation 0.4.

    With `cfg.flat` there is one layer of width layers · bins, the earliest spectrum first.
    """
    frames = (waveform.shape[1] - cfg.past - cfg.future) // (PER_FRAME * HOP)
    if frames < 1:
        return jnp.zeros((len(waveform), 0, *cfg.made))
    spectra = PER_FRAME * (frames - 1) + cfg.layers
    at = HOP * np.arange(spectra)[:, None] + np.arange(SIZE)
    window = np.hanning(SIZE + 1)[:-1].astype(np.float32)
    cut = waveform.astype(jnp.float32)[:, at] * jnp.asarray(window)[None, None]
    power = jnp.abs(jnp.fft.rfft(cut)) ** 2 / float((window**2).sum() * SIZE / 2)
    level = jnp.log10(power @ jnp.asarray(_filters(cfg)) + FLOOR) / 4 + 1
    shown = PER_FRAME * np.arange(frames)[:, None] + np.arange(cfg.layers)
    return level[:, shown].reshape(len(waveform), frames, *cfg.made)


@functools.cache
def _filters(cfg: MelConfig) -> np.ndarray:
    """Triangles of equal width on the mel scale, [SIZE / 2 + 1, bins]."""
    edges = cfg.edges()
    hertz = np.fft.rfftfreq(SIZE, 1 / RATE)[:, None]
    rise = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rise, fall)).astype(np.float32)
