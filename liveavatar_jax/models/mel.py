"""Log-mel features of speech, for models that have no speech encoder: no weights, no look back
at the whole recording, and hardly any delay."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from liveavatar_jax.types import Array, Float, LiveAvatarError

RATE = 16_000
HOP = 160  # samples from one spectrum to the next: 100 Hz
SIZE = 400  # samples of one spectrum
FLOOR = 1e-8  # power of a band that counts as silence: -80 dB
PER_FRAME = 4  # spectra of one video frame: 640 samples at 25 fps


@dataclasses.dataclass(frozen=True)
class MelConfig:
    """A video frame sees `layers` spectra, 10 ms apart, of which `ahead` come after its end.

    The defaults have the shape of DiTConfig.tiny's audio: 25 spectra of 32 bands. Eight of
    them lie ahead, which costs 80 ms of delay.
    """

    bins: int = 32
    layers: int = 25
    ahead: int = 8
    lowest: float = 60.0  # Hz
    highest: float = 7600.0

    def __post_init__(self):
        if not 0 <= self.ahead <= self.layers - PER_FRAME:
            raise LiveAvatarError(
                f"MelConfig.ahead = {self.ahead} must lie within 0..layers - {PER_FRAME}"
            )
        if self.bins < 1 or (_filters(self).sum(0) == 0).any():
            raise LiveAvatarError(
                f"MelConfig.bins = {self.bins} must be at least 1 and leave every band a "
                "frequency of its own; take fewer, or a higher MelConfig.lowest"
            )

    @property
    def past(self) -> int:
        """Samples before the first video frame that it is made of."""
        return (self.layers - PER_FRAME - self.ahead) * HOP + SIZE - HOP

    @property
    def future(self) -> int:
        """Samples after the last video frame that it is made of."""
        return self.ahead * HOP


def log_mel(waveform: Float[Array, "b samples"], cfg: MelConfig) -> Float[Array, "b F layers bins"]:
    """16 kHz samples to the features of the video frames they hold, float32, about -1 to 1.

    The waveform begins `cfg.past` samples before the first frame and ends `cfg.future` samples
    after the last; at the ends of a recording these are zeros. A frame depends on just those
    samples, so any cutting of a recording gives equal features. -1 is silence, digital or not
    (a band at -80 dB and below), 0 is -40 dB, 1 is full scale: nothing is normalised by what
    else was heard. Ordinary speech has mean -0.6 and deviation 0.4.
    """
    frames = (waveform.shape[1] - cfg.past - cfg.future) // (PER_FRAME * HOP)
    if frames < 1:
        return jnp.zeros((len(waveform), 0, cfg.layers, cfg.bins))
    spectra = PER_FRAME * (frames - 1) + cfg.layers
    at = HOP * np.arange(spectra)[:, None] + np.arange(SIZE)
    window = np.hanning(SIZE + 1)[:-1].astype(np.float32)
    cut = waveform.astype(jnp.float32)[:, at] * jnp.asarray(window)[None, None]
    power = jnp.abs(jnp.fft.rfft(cut)) ** 2 / float((window**2).sum() * SIZE / 2)
    level = jnp.log10(power @ jnp.asarray(_filters(cfg)) + FLOOR) / 4 + 1
    shown = PER_FRAME * np.arange(frames)[:, None] + np.arange(cfg.layers)
    return level[:, shown]


@functools.cache
def _filters(cfg: MelConfig) -> np.ndarray:
    """Triangles of equal width on the mel scale, [SIZE / 2 + 1, bins]."""
    mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)
    edges = np.linspace(mel(cfg.lowest), mel(cfg.highest), cfg.bins + 2)
    edges = 700 * (10 ** (edges / 2595) - 1)
    hertz = np.fft.rfftfreq(SIZE, 1 / RATE)[:, None]
    rise = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rise, fall)).astype(np.float32)
