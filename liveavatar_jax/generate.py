"""Portrait + speech file → video file, block by block, in constant memory."""

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.data import marks, speech
from liveavatar_jax.data.audio import SAMPLE_RATE, read_audio
from liveavatar_jax.data.image import Fit, load_portrait, to_pixels
from liveavatar_jax.data.prompt import PROMPT, Tokenizer
from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax.models.speech import SpeechEncoder, window_features
from liveavatar_jax.parallel import hosts
from liveavatar_jax.parallel.mesh import MeshSpec, make
from liveavatar_jax.player import OneDevice, OnMesh, load, load_avatar
from liveavatar_jax.types import Array, Float, LiveAvatarError, UInt8
from liveavatar_jax.weights import checkpoint
from liveavatar_jax.weights.convert import TOKENIZER

FPS = 25
SAMPLES = SAMPLE_RATE // FPS  # of one video frame
AREA = 720 * 400  # of the picture, in pixels
VISIBLE = 384  # rows of the video of a model that makes pictures below that


@dataclass(frozen=True)
class Request:
    """What to make: the arguments of `liveavatar-jax generate`."""

    image: Path
    audio: Path
    out: Path
    weights: Path
    prompt: str | None = None
    area: int | None = None  # of the picture, in pixels, in the portrait's shape; None: AREA, or
    # the one size that the model knows
    fit: Fit = "cover"
    steps: int | None = None
    seed: int = 0
    dtype: str | None = None  # float32 on a CPU, bfloat16 elsewhere
    quantise: str | None = None  # "int8" or "fp8": the DiT's trunk, in 8 bits
    mesh: str | None = None  # such as "stage=4,vae=1"; None: one device
    warm: int = 0  # first blocks that are made on all stages at once
    scale: int | None = None  # of the video, in pictures; None: small ones become VISIBLE
    badge: bool = False  # "AI" in a corner of every frame
    signed: tuple[Path, Path] | None = None  # certificate and key with which the file is signed


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

    Over several processes the first one hears the recording and looks at the portrait, the last
    one writes the video (and reads the recording once more, for its sound).

    Raises LiveAvatarError for any input that cannot be used.
    """
    if request.signed and hosts.is_last():
        with marks.signer(*request.signed):
            pass  # before hours of work that it should sign
    report = _generate(request)
    if request.signed and report.frames and hosts.is_last():
        marks.sign(report.out, *request.signed)
    return report


def _generate(request: Request) -> Report:
    cfg = checkpoint.load_config(request.weights)
    moments, picture = speech.Moments.prior(), np.zeros((0, 0, 3), np.uint8)
    if hosts.is_first():
        moments = speech.Moments.of(read_audio(request.audio))
        picture = portrait(request.image, cfg, request.area, request.fit)
    about = np.array([-(-moments.count // SAMPLES), *picture.shape[:2]], np.int32)
    frames, height, width = (int(n) for n in hosts.broadcast(about))
    picture = hosts.broadcast(picture if picture.size else np.zeros((height, width, 3), np.uint8))
    with contextlib.ExitStack() as stack:
        video = None
        if hosts.is_last():
            scale = request.scale or (max(1, VISIBLE // height) if cfg.size else 1)
            size = height, width
            mark = marks.badge if request.badge else None
            video = VideoWriter(
                request.out, size, fps=FPS, audio=request.audio, scale=scale, mark=mark
            )
            stack.enter_context(video)
        cfg = replace(cfg, stream=_policy(cfg, request))
        spec = _mesh(request, cfg, width // 8)
        precision = "highest" if cfg.stream.dtype == "float32" else None
        stack.enter_context(jax.default_matmul_precision(precision))
        context = encode_prompt(request.weights, cfg, request.prompt)
        heard = with_lead(hear(request.weights, cfg, request.audio, moments), cfg.block)
        # On the host: as a device array it would wait for the blocks in progress.
        chunks = (stream.Chunk(audio=cast(Array, block[None, None])) for block in heard)
        first = next(chunks) if hosts.is_first() else None

        print("compiling ...", file=sys.stderr)  # minutes, at the published size
        begun = time.perf_counter()
        opening = (to_pixels(picture)[None], context, request.seed)
        if spec is None:
            avatar = load_avatar(request.weights, cfg, request.quantise)
            assert first is not None
            player = OneDevice(avatar, *opening, first)
        else:
            player = OnMesh(
                request.weights, cfg, spec, *opening, quantised=request.quantise, warm=request.warm
            )
        compiling = time.perf_counter() - begun
        chunks = itertools.chain([first], chunks if hosts.is_first() else itertools.repeat(None))
        return _watch(player, chunks, frames, cfg.block, video, request, compiling)


def portrait(
    path: Path, cfg: ModelConfig, area: int | None = None, fit: Fit = "cover"
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture in the size that was asked for, else in the one that the model knows."""
    side = cfg.size if area is None else None
    return load_portrait(path, area or AREA, fit=fit, side=side)


def _policy(cfg: ModelConfig, request: Request):
    dtype = request.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return replace(cfg.stream, dtype=dtype, steps=request.steps or cfg.stream.steps)


def _mesh(request: Request, cfg: ModelConfig, width: int) -> MeshSpec | None:
    """The mesh, before anything large is read for it."""
    if request.mesh is None:
        if jax.process_count() > 1:
            raise LiveAvatarError(
                "several processes need a mesh to share; add --mesh stage=4,vae=1, for example"
            )
        if request.warm:
            raise LiveAvatarError("--warm is for a mesh; add --mesh stage=4,vae=1, for example")
        return None
    spec = MeshSpec.parse(request.mesh)
    spec.check(cfg, width)
    make(spec, width)
    if request.warm and cfg.dit.heads % spec.stage_devices:
        raise LiveAvatarError(
            f"--warm {request.warm} shares the {cfg.dit.heads} heads out over all "
            f"{spec.stage_devices} devices of mesh {spec}, which does not go; leave it out"
        )
    return spec


def encode_prompt(folder: Path, cfg: ModelConfig, prompt: str | None) -> Float[Array, "1 t k"]:
    """Rows of the text encoder, which is loaded for this alone and let go.

    Without a prompt a plain one is used, or none at all if the folder has no tokenizer.
    """
    if prompt is None and not (folder / TOKENIZER).is_file():
        return jnp.zeros((1, 1, cfg.dit.text_dim))
    tokenizer = Tokenizer(folder)
    ids, mask = tokenizer(PROMPT if prompt is None else prompt, cfg.dit.text_len)
    encoder = load(folder, "text")
    rows = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))(encoder, ids, mask)
    return rows[:, : int(mask.sum())]


def ear(
    folder: Path, cfg: ModelConfig, window: speech.SpeechWindow | None = None
) -> tuple[speech.Encode, speech.SpeechWindow, float]:
    """What hears for this model, for `speech.file_features`, and what silence sounds like to it:
    the speech encoder, through `window` (that of files by default), or log-mel features in its
    place, which have a window of their own."""
    if (mel := cfg.log_mel) is None:
        # On the last device: the first one is the most in demand where there are several.
        encoder: SpeechEncoder = jax.device_put(load(folder, "speech"), jax.local_devices()[-1])
        window = window or speech.SpeechWindow.for_files()
        encode, silence = functools.partial(jax.jit(window_features), encoder), 0.0
    else:
        window = speech.mel_window(mel)
        encode, silence = jax.jit(speech.mel_encode(mel, window)), -1.0

    def fetched(samples: np.ndarray, hop: object) -> np.ndarray:
        """A whole hop at once: a slice on the device would wait for the block in progress."""
        return np.asarray(encode(samples, hop), np.float32)

    return fetched, window, silence


def hear(
    folder: Path, cfg: ModelConfig, audio: Path, moments: speech.Moments
) -> Iterator[Float[np.ndarray, "12 layers c"]]:
    """Speech features block by block, for ever: silence follows the end of the file."""
    encode, window, silence = ear(folder, cfg)

    def blocks() -> Iterator[Float[np.ndarray, "12 layers c"]]:
        for block in speech.file_features(encode, read_audio(audio), moments, window):
            yield block
        yield from itertools.repeat(np.full_like(block, silence))

    # All processes load the encoder together; one needs it.
    return blocks() if hosts.is_first() else iter(())


def with_lead(
    heard: Iterable[Float[np.ndarray, "f layers c"]], frames: int
) -> Iterator[Float[np.ndarray, "frames layers c"]]:
    """The same features, `LEAD_FRAMES` later, in blocks of so many frames.

    The first frames of the first block are not shown. The released code drops them and so speaks
    three frames (120 ms) ahead of the sound; here nothing is said in them, and frame k of the
    video is the one that heard frame k of the sound.
    """
    held = None
    for some in heard:
        held = np.repeat(some[:1], stream.LEAD_FRAMES, axis=0) if held is None else held
        held = np.concatenate([held, some])
        while len(held) >= frames:
            yield held[:frames]
            held = held[frames:]


def _watch(
    player: OneDevice | OnMesh,
    chunks: Iterator,
    frames: int,
    block: int,
    video: VideoWriter | None,
    request: Request,
    compiling: float,
) -> Report:
    """Drives the player to the end, or to an interrupt; what came until then is in the file.

    Over several processes an interrupt is an error like others, and so ends them all.
    """
    begun, first_frame, seen, finished = time.perf_counter(), 0.0, 0, False
    interrupts = (KeyboardInterrupt,) if jax.process_count() == 1 else ()
    blocks = -(-(frames + stream.LEAD_FRAMES) // block)
    with (
        contextlib.suppress(*interrupts),
        tqdm(total=frames, unit="frame", disable=video is None) as bar,
    ):
        for pixels in player.play(chunks, blocks):
            shown = pixels[0 if seen else stream.LEAD_FRAMES :][: frames - seen]
            assert video is not None  # frames come out where they are written
            video.write(shown)
            seen += len(shown)
            bar.update(seen - bar.n)
            if not first_frame:
                first_frame = time.perf_counter() - begun
                bar.set_postfix_str(f"first frame after {first_frame:.2f} s")
        finished = True
    seconds = time.perf_counter() - begun
    if video is not None:
        seen = video.frames  # an interrupt may have come within a block
    out = request.out if video is None else video.path
    return Report(out, seen, seconds, first_frame or seconds, compiling, finished)
