"""Portrait + speech file → video file, block by block, in constant memory."""

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.data import speech
from liveavatar_jax.data.audio import SAMPLE_RATE, read_audio
from liveavatar_jax.data.image import Fit, load_portrait, to_pixels
from liveavatar_jax.data.prompt import Tokenizer
from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax.models.mel import MelConfig
from liveavatar_jax.models.speech import SpeechEncoder, window_features
from liveavatar_jax.types import Array, Float, UInt8
from liveavatar_jax.weights import checkpoint
from liveavatar_jax.weights.convert import TOKENIZER

FPS = 25
BLOCK = 12  # video frames of a block
SAMPLES = SAMPLE_RATE // FPS  # of one video frame
PROMPT = "A person looks into the camera and speaks naturally, with lively expression."


@dataclass(frozen=True)
class Request:
    """What to make: the arguments of `liveavatar-jax generate`."""

    image: Path
    audio: Path
    out: Path
    weights: Path
    prompt: str | None = None
    area: int = 720 * 400  # of the picture, in pixels; its shape is the portrait's
    fit: Fit = "cover"
    steps: int | None = None
    seed: int = 0
    dtype: str | None = None  # float32 on a CPU, bfloat16 elsewhere
    quantise: str | None = None  # "int8" or "fp8": the DiT's trunk, in 8 bits


@dataclass(frozen=True)
class Report:
    """What came out; `str` is the closing line of the command."""

    out: Path
    frames: int
    seconds: float  # from the start of the stream to the last frame
    first_frame: float  # seconds from the start of the stream to the first frame
    compiling: float  # seconds, before the stream
    finished: bool  # or interrupted

    @property
    def fps(self) -> float:
        return self.frames / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        state = "" if self.finished else "interrupted; "
        if not self.frames:
            return f"interrupted before the first frame; {self.out} was not written"
        return (
            f"{self.out}: {state}{self.frames} frames ({self.frames / FPS:.2f} s of video) in "
            f"{self.seconds:.2f} s, {self.fps:.2f} FPS, {self.fps / FPS:.3f} x real time, first "
            f"frame after {self.first_frame:.2f} s (and {self.compiling:.1f} s of compiling)"
        )


def generate(request: Request) -> Report:
    """Runs the whole command; an interrupt leaves a playable file and a report that says so.

    Raises LiveAvatarError for any input that cannot be used.
    """
    moments = speech.Moments.of(read_audio(request.audio))
    portrait = load_portrait(request.image, request.area, fit=request.fit)
    frames = -(-moments.count // SAMPLES)
    with VideoWriter(request.out, portrait.shape[:2], fps=FPS, audio=request.audio) as video:
        cfg = checkpoint.load_config(request.weights)
        cfg = replace(cfg, stream=_policy(cfg, request))
        with jax.default_matmul_precision("highest" if cfg.stream.dtype == "float32" else None):
            context = encode_prompt(request.weights, cfg, request.prompt)
            heard = hear(request.weights, cfg, request.audio, moments)
            avatar = load_avatar(request.weights, cfg, request.quantise)
            return _run(avatar, portrait, context, with_lead(heard), frames, video, request.seed)


def _policy(cfg: ModelConfig, request: Request):
    dtype = request.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return replace(cfg.stream, dtype=dtype, steps=request.steps or cfg.stream.steps)


def load_avatar(folder: Path, cfg: ModelConfig, quantised: str | None = None) -> stream.Avatar:
    """DiT and VAE of a converted checkpoint, in the dtype of the stream.

    quantised: "int8" or "fp8", for the DiT's trunk, see models/quantise.py.
    """
    avatar = jax.eval_shape(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0)))
    avatar.dit = checkpoint.restore(folder, "dit", dtype=cfg.stream.dtype, quantised=quantised)
    avatar.vae = checkpoint.restore(folder, "vae", dtype=cfg.stream.dtype)
    return avatar


def encode_prompt(folder: Path, cfg: ModelConfig, prompt: str | None) -> Float[Array, "1 t k"]:
    """Rows of the text encoder, which is loaded for this alone and let go.

    Without a prompt a plain one is used, or none at all if the folder has no tokenizer.
    """
    if prompt is None and not (folder / TOKENIZER).is_file():
        return jnp.zeros((1, 1, cfg.dit.text_dim))
    tokenizer = Tokenizer(folder)
    ids, mask = tokenizer(PROMPT if prompt is None else prompt, cfg.dit.text_len)
    encoder = checkpoint.restore(folder, "text")
    rows = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))(encoder, ids, mask)
    return rows[:, : int(mask.sum())]


def hear(
    folder: Path, cfg: ModelConfig, audio: Path, moments: speech.Moments
) -> Iterator[Float[np.ndarray, "12 layers c"]]:
    """Speech features block by block, for ever: silence follows the end of the file."""
    if cfg.speech_fits:
        encoder: SpeechEncoder = checkpoint.restore(folder, "speech")
        window = speech.SpeechWindow.for_files()
        encode, silence = functools.partial(jax.jit(window_features), encoder), 0.0
    else:
        mel = MelConfig(cfg.dit.audio_dim, cfg.dit.audio_layers)
        window = speech.mel_window(mel)
        encode, silence = jax.jit(speech.mel_encode(mel, window)), -1.0

    def fetched(samples: np.ndarray, hop: object) -> np.ndarray:
        """A whole hop at once: a slice on the device would wait for the block in progress."""
        return np.asarray(encode(samples, hop), np.float32)

    for block in speech.file_features(fetched, read_audio(audio), moments, window):
        yield block
    yield from itertools.repeat(np.full_like(block, silence))


def with_lead(
    blocks: Iterable[Float[np.ndarray, "12 layers c"]],
) -> Iterator[Float[np.ndarray, "12 layers c"]]:
    """The same features, `LEAD_FRAMES` later.

    The first frames of the first block are not shown. The released code drops them and so speaks
    three frames (120 ms) ahead of the sound; here nothing is said in them, and frame k of the
    video is the one that heard frame k of the sound.
    """
    held = None
    for block in blocks:
        held = np.repeat(block[:1], stream.LEAD_FRAMES, axis=0) if held is None else held
        block = np.concatenate([held, block])
        yield block[:BLOCK]
        held = block[BLOCK:]


def opened(
    model: stream.Avatar, picture: Float[Array, "1 H W 3"], context: Array, key: Array
) -> stream.StreamState:
    """The state before the first block."""
    return stream.start(model, stream.encode_portrait(model, picture), context, key)


def frames_of(
    model: stream.Avatar, state: stream.StreamState, chunk: stream.Chunk
) -> tuple[stream.StreamState, UInt8[Array, "b F H W 3"]]:
    """`stream.step`, with the frames as bytes."""
    state, frames = stream.step(model, state, chunk)
    return state, stream.pixels(frames)


def _run(
    avatar: stream.Avatar,
    portrait: np.ndarray,
    context: Array,
    heard: Iterator[np.ndarray],
    frames: int,
    video: VideoWriter,
    seed: int,
) -> Report:
    picture = jnp.asarray(to_pixels(portrait))[None].astype(avatar.cfg.dtype)
    chunks = (stream.Chunk(audio=jnp.asarray(block)[None, None]) for block in heard)
    first = next(chunks)

    print("compiling ...", file=sys.stderr)  # minutes, at the published size
    begun = time.perf_counter()
    opening = (avatar, picture, context, jax.random.key(seed))
    start = jax.jit(opened).lower(*opening).compile()
    state = jax.eval_shape(opened, *opening)
    step = jax.jit(frames_of, donate_argnums=1).lower(avatar, state, first).compile()
    compiling = time.perf_counter() - begun

    begun, first_frame, finished = time.perf_counter(), 0.0, False

    def show(block: Array) -> None:
        # All of it: a slice would be one more program, queued behind the next block.
        pixels = np.asarray(block)[0, 0 if video.frames else stream.LEAD_FRAMES :]
        video.write(pixels[: frames - video.frames])
        bar.update(video.frames - bar.n)

    with contextlib.suppress(KeyboardInterrupt), tqdm(total=frames, unit="frame") as bar:
        blocks = -(-(frames + stream.LEAD_FRAMES) // BLOCK)
        state = start(*opening)
        state, pending = step(avatar, state, first)
        for chunk in itertools.islice(chunks, blocks - 1):
            state, ready = step(avatar, state, chunk)
            show(pending)  # fetched while the device works on the next block
            if not first_frame:
                first_frame = time.perf_counter() - begun
                bar.set_postfix_str(f"first frame after {first_frame:.2f} s")
            pending = ready
        show(pending)
        finished = True
    seconds = time.perf_counter() - begun
    return Report(video.path, video.frames, seconds, first_frame or seconds, compiling, finished)
