"""Speech at the rate of the video, for whole files, long files and live streams.

The published pipeline (wan/modules/s2v/audio_encoder.py) encodes the whole file at 50 Hz,
stretches that to 30 Hz with both ends aligned, and picks rows of it for 25 Hz: `video_features`.
A file of hours does not fit one attention, and a live stream has no whole file. For those a
fixed window of samples slides over the recording, one hop of video frames at a time:

    |------------- left -------------|--- hop ---|- ahead -|
                                      the frames asked for

`file_features` knows the length, mean and variance of the recording from a first pass, places
frames exactly as published, and never lets the window stick out of the recording while there is
recording to fill it: a file that fits into one window gets the published features. `feed` and
`listen` know nothing of the future: row r at 30 Hz lies at speech frame 5/3 r, which falls behind
the aligned ends by at most 7/3 speech frames (47 ms) at the end of a recording, and mean and
variance are those of what was heard so far.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from liveavatar_jax.config import MelConfig
from liveavatar_jax.models.mel import log_mel
from liveavatar_jax.models.speech import Hop, at_video_rate
from liveavatar_jax.types import LiveAvatarError

RATE = 16_000  # samples of a second
STEP, FIELD = 320, 400  # samples from one speech frame to the next, and samples it sees
BLOCK = 12  # video frames of a block
BLOCK_STEPS = 24  # speech frames of a block: 0.48 s
BLOCK_SAMPLES = BLOCK_STEPS * STEP
CLIP = 48  # video frames of a published clip, in which lengths are counted
LEAST_AHEAD = 1040  # samples after a block that its last frame may lie in, when ends are aligned

Encode = Callable[[Any, Hop], Any]  # [1, samples], Hop -> [1, F, states, dim]


# Lengths and positions, in the published arithmetic


def speech_frames(samples: int) -> int:
    """Frames of wav2vec2, 50 a second."""
    return max(0, (samples - FIELD) // STEP + 1)


def resampled_frames(frames: int) -> int:
    """Frames at 30 Hz."""
    return int(frames / 50 * 30)


def clip_count(frames: int) -> int:
    """Clips of 48 video frames that so many frames at 30 Hz become: the last may be silent."""
    return int(frames / (CLIP * 1.2)) + 1


def block_count(samples: int) -> int:
    """Blocks of 12 video frames that the published pipeline makes of so many samples."""
    return clip_count(resampled_frames(speech_frames(samples))) * (CLIP // BLOCK)


def source_index(video_frames: np.ndarray) -> np.ndarray:
    """The row at 30 Hz that a video frame shows: 1.2 times its number, rounded (it never ties)."""
    return (12 * video_frames.astype(np.int64) + 5) // 10


def _positions(video_frames: np.ndarray, total: int | None) -> tuple[np.ndarray, ...]:
    """Speech frames below and above each video frame, the fraction between, and whether both
    exist; of `total` speech frames in the recording, or None while it still runs."""
    rows = source_index(video_frames)
    if total is None:
        top, bottom, sounding = 5 * rows, 3, np.ones(rows.shape, bool)
        last = np.int64(np.iinfo(np.int64).max)
    else:
        count = resampled_frames(total)
        sounding = rows < count
        rows = np.where(sounding, rows, 0)
        top, bottom, last = rows * max(0, total - 1), max(1, count - 1), np.int64(max(0, total - 1))
    low = top // bottom  # whole numbers: exact however long the recording
    weight = (top - low * bottom) / bottom
    return low, np.minimum(low + 1, last), weight.astype(np.float32), sounding


def video_features(states: Any, blocks: int | None = None) -> Any:
    """Hidden states [b, frames, states, dim] of a whole recording to video rate, as published.

    The result has 12 · blocks frames, zeros beyond the end; `blocks` defaults to the published
    number for this length.
    """
    total = states.shape[1]
    if blocks is None:
        blocks = clip_count(resampled_frames(total)) * (CLIP // BLOCK)
    low, high, weight, sounding = _positions(np.arange(BLOCK * blocks), total)
    heard = np.ones(total, bool)
    zero, one = np.zeros((), np.float32), np.ones((), np.float32)
    hop = Hop(zero, one, heard, low, high, weight, sounding)
    return at_video_rate(states, hop)


# Mean and variance


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of samples, float64."""

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0

    @classmethod
    def of(cls, chunks: Iterable[np.ndarray]) -> "Moments":
        """The moments of a recording, in one pass over its chunks."""
        moments = cls()
        for chunk in chunks:
            moments = moments.add(chunk)
        return moments

    @classmethod
    def prior(cls, loudness: float = 0.06, seconds: float = 2.0) -> "Moments":
        """What a live stream starts from: as if `seconds` of speech of that RMS had been heard,
        lest the noise before the first word count as loud."""
        count = int(seconds * RATE)
        return cls(count, 0.0, count * loudness**2)

    def add(self, chunk: np.ndarray) -> "Moments":
        if not len(chunk):
            return self
        chunk = chunk.astype(np.float64)
        n, mean = len(chunk), float(chunk.mean())
        count, apart = self.count + n, mean - self.mean
        deviation = float(((chunk - mean) ** 2).sum()) + apart**2 * self.count * n / count
        return Moments(count, self.mean + apart * n / count, self.deviation + deviation)

    @property
    def std(self) -> float:
        """As published: silence does not divide by zero."""
        return (self.deviation / max(self.count, 1) + 1e-7) ** 0.5


def normalise(waveform: np.ndarray) -> np.ndarray:
    """A whole recording with its mean removed and its variance one, float32."""
    moments = Moments().add(waveform)
    return ((waveform.astype(np.float64) - moments.mean) / moments.std).astype(np.float32)


# Windows


@dataclasses.dataclass(frozen=True)
class SpeechWindow:
    """Samples that are encoded together: `left` before a hop of blocks, and `ahead` after it.

    The defaults are for live streams: one block a hop, and 0.48 s of look-ahead, which is the
    delay they cost on top of the block's own 0.48 s. With `inside`, the window of a file is
    shifted to lie within the file.

    Deviation from the whole file (root mean square over all states and frames of the three
    example recordings, relative to how much the features vary in time), with exact moments and
    positions, so from the cut alone:

        look-ahead        0.16 s  0.32 s  0.48 s  0.96 s  2.4 s
        left 2 s            103 %    92 %    81 %    41 %   20 %
        left 4 s            100 %    89 %    78 %    37 %   14 %
        left 8 s             99 %    89 %    78 %    36 %   11 %
        left 4 s, taps ±16    -      17 %    16 %      -      -

    The encoder was a small one of random weights, and that matters: its positional convolution
    weighs all 128 taps alike, up to 1.28 s ahead, and a look-ahead below that cuts them off. The
    last row keeps the 16 nearest taps to each side, and all that is left comes from attention,
    which random weights spread over everything. What a trained encoder loses lies with how its
    taps fall off; measure it before choosing a shorter look-ahead. From 4 s on, more of the past
    hardly helps.
    """

    left: int = 4 * RATE
    ahead: int = 7680
    hop: int = 1
    inside: bool = True

    def __post_init__(self):
        if self.left < 0 or self.left % STEP:
            raise LiveAvatarError(
                f"SpeechWindow.left = {self.left} must be a multiple of {STEP} samples"
            )
        if self.ahead < LEAST_AHEAD:
            raise LiveAvatarError(
                f"SpeechWindow.ahead = {self.ahead} must be at least {LEAST_AHEAD} samples"
            )
        if self.hop < 1:
            raise LiveAvatarError(f"SpeechWindow.hop = {self.hop} must be at least 1 block")

    @classmethod
    def for_files(cls) -> "SpeechWindow":
        """20.48 s, of which 11.52 s are new each time: no delay matters, so look far ahead."""
        return cls(left=6 * RATE, ahead=47360, hop=24)

    @property
    def samples(self) -> int:
        return self.left + self.hop * BLOCK_SAMPLES + self.ahead

    @property
    def frames(self) -> int:
        return speech_frames(self.samples)

    def first(self, hop: int, total: int | None = None) -> int:
        """The speech frame that the window of a hop begins with; live, it may be before 0."""
        first = hop * self.hop * BLOCK_STEPS - self.left // STEP
        if total is None or not self.inside:
            return first
        return min(max(0, first), max(0, total - self.frames))

    def ask(self, hop: int, moments: Moments, total: int | None = None) -> Hop:
        """What the encoder has to know for a hop of a recording of `total` speech frames."""
        first = self.first(hop, total)
        frame = first + np.arange(self.frames)
        end = np.iinfo(np.int64).max if total is None else total
        video = hop * self.hop * BLOCK + np.arange(self.hop * BLOCK)
        low, high, weight, sounding = _positions(video, total)
        inside = lambda at: np.where(sounding, at - first, 0).astype(np.int32)
        return Hop(
            mean=np.asarray(moments.mean, np.float32),
            std=np.asarray(moments.std, np.float32),
            heard=(frame >= 0) & (frame < end),
            low=inside(low),
            high=inside(high),
            weight=weight,
            sounding=sounding,
        )


def file_features(
    encode: Encode,
    chunks: Iterable[np.ndarray],
    moments: Moments,
    window: SpeechWindow | None = None,
) -> Iterator[Any]:
    """The features of a file block by block, [12, states, dim] each, in constant memory.

    There are as many as the published pipeline makes, and zeros beyond the end of the recording.
    `chunks` gives the 16 kHz samples in any pieces, `moments` are theirs from a pass before
    (`Moments.of`), `encode` is `window_features` with its encoder bound, compiled. Raises
    LiveAvatarError when the chunks end before `moments.count` samples.
    """
    window = window or SpeechWindow.for_files()
    total, blocks = speech_frames(moments.count), block_count(moments.count)
    hops = -(-blocks // window.hop)
    starts = (window.first(hop, total) * STEP for hop in range(hops))
    for hop, samples in enumerate(_cut(chunks, starts, window.samples, moments.count)):
        features = encode(samples[None], window.ask(hop, moments, total))[0]
        for block in range(min(window.hop, blocks - hop * window.hop)):
            yield features[block * BLOCK : (block + 1) * BLOCK]


def _cut(
    chunks: Iterable[np.ndarray], starts: Iterable[int], size: int, total: int
) -> Iterator[np.ndarray]:
    """Windows of a recording at ascending starts; zeros before its begin and after its end."""
    pieces, held, at = iter(chunks), np.zeros(0, np.float32), 0
    for start in starts:
        if start < at:  # only the first ones: nothing was read yet
            held, at = np.zeros(-start, np.float32), start
        held, at = held[start - at :], start
        parts, have = [held], len(held)
        while have < min(size, total - start):
            piece = next(pieces, None)
            if piece is None:
                raise LiveAvatarError(
                    f"the audio ended after {start + have} of {total} samples; it must be the "
                    "recording whose moments were taken"
                )
            parts.append(piece.astype(np.float32))
            have += len(piece)
        held = np.concatenate(parts)
        yield np.pad(held[:size], (0, max(0, size - have)))


def mel_window(cfg: MelConfig, hop: int = 1) -> SpeechWindow:
    """The window of log-mel features: no more than they are made of."""
    left = -(-cfg.past // STEP) * STEP
    return SpeechWindow(left, max(LEAST_AHEAD, cfg.future), hop, inside=False)


def mel_encode(cfg: MelConfig, window: SpeechWindow) -> Encode:
    """Log-mel features in the place of a speech encoder, to be compiled; after the end of a
    recording they are those of silence."""
    begin, end = window.left - cfg.past, window.samples - window.ahead + cfg.future
    return lambda samples, hop: log_mel(samples[:, begin:end], cfg)


# Live


PRIOR = Moments.prior()


@dataclasses.dataclass(frozen=True)
class Listener:
    """The state of a live stream: the samples that coming hops still need, and what was heard."""

    window: SpeechWindow
    samples: np.ndarray  # float32; the first belongs to the start of the next window
    hop: int = 0  # hops given so far
    moments: Moments = PRIOR
    adapt: bool = True  # else mean and variance stay as given

    @classmethod
    def start(cls, window: SpeechWindow | None = None, **given: Any) -> "Listener":
        """Nothing heard yet; `given` may fix `moments` and `adapt`."""
        window = window or SpeechWindow()
        return cls(window, np.zeros(window.left, np.float32), **given)


def feed(listener: Listener, chunk: np.ndarray) -> Listener:
    """The listener after more 16 kHz samples, as many as there are."""
    samples = np.concatenate([listener.samples, chunk.astype(np.float32)])
    return dataclasses.replace(listener, samples=samples)


def listen(encode: Encode, listener: Listener) -> tuple[Any | None, Listener]:
    """The features of the next hop, [12 · hop, states, dim], or None until enough was heard.

    It is the same whatever the sizes of the chunks that were fed. Pieces of silence (-60 dB and
    below) do not count towards mean and variance: a pause must not make the next word loud.
    """
    window = listener.window
    if len(listener.samples) < window.samples:
        return None, listener
    samples = listener.samples[: window.samples]
    moments = listener.moments
    fresh = samples[window.left if listener.hop == 0 else -window.hop * BLOCK_SAMPLES :]
    if listener.adapt and float((fresh.astype(np.float64) ** 2).mean()) > 1e-6:
        moments = moments.add(fresh)
    features = encode(samples[None], window.ask(listener.hop, moments))[0]
    rest = listener.samples[window.hop * BLOCK_SAMPLES :]
    return features, dataclasses.replace(
        listener, samples=rest, hop=listener.hop + 1, moments=moments
    )
