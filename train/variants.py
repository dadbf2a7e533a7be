"""What each mechanism of the puppet preset is worth, in one table:

    python -m train.clips --out runs/puppet/clips --count 24
    python -m train.variants --out runs/puppet/variants --rows full static clean steps-1
    python -m train.variants --out runs/puppet/variants

The last one wants the models that `train.preset` leaves on its way, the others only the preset.
Each row streams the clips once, and some of them for longer, with one
thing changed, and judges them as `liveavatar-jax evaluate` does. What was judged is not judged
again. The teacher cannot stream: it makes the first 84 frames of each clip at once. `coder` are
the true clips through the VAE and back, which is the most that any row can reach.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.data.audio import load_audio
from liveavatar_jax.data.image import to_pixels
from liveavatar_jax.data.takes import FPS, Take, read_takes
from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax.data.voice import FRAME
from liveavatar_jax.diffusion.flow import euler, sampling_levels
from liveavatar_jax.evaluate import encode_prompts, evaluate
from liveavatar_jax.generate import portrait
from liveavatar_jax.metrics.readers import READERS
from liveavatar_jax.models.clip import bidirectional, condition
from liveavatar_jax.models.mel import log_mel
from liveavatar_jax.models.vae import VAE
from liveavatar_jax.player import load, load_avatar
from liveavatar_jax.protocol import Request, frames_of
from liveavatar_jax.types import Array, LiveAvatarError
from liveavatar_jax.weights import checkpoint
from train.clips import CRF
from train.networks import posed
from train.preset import OUT, SHIPPED
from train.puppets import sounding

FRAMES, TEACHER_STEPS = 84, 20  # of what a teacher makes
COLUMNS = ("mouth", "worst", "shuffled", "lag", "amplitude", "sharpness", "dynamic_ratio", "seam",
           "steps", "expression", "looks", "psnr", "psnr_mouth")  # fmt: skip
GROWTH = ("looks", "looks_trend", "colour", "colour_trend")  # of the longer streams


@dataclasses.dataclass(frozen=True)
class Row:
    """A model with changes of its config; `longer` ones are streamed for longer as well."""

    says: str
    model: Path | None = None  # the preset
    changes: tuple[str, ...] = ()
    steps: int | None = None
    longer: bool = False


ROWS = {
    "full": Row("the preset", longer=True),
    "static": Row("the sink stays the portrait", changes=("stream.sink_after=null",), longer=True),
    "fixed": Row("the sink's phase does not roll", changes=("stream.distance=null",), longer=True),
    "clean": Row("history run again clean", changes=("stream.history=0.0",), longer=True),
    "level": Row("history run again at level 0.3", changes=("stream.history=0.3",), longer=True),
    "forcing": Row("stage 1 alone", OUT / "forcing_model", longer=True),
    "steps-1": Row("1 step", steps=1),
    "steps-2": Row("2 steps", steps=2),
    "steps-3": Row("3 steps", steps=3),
    **{
        f"blocks-{n}": Row(
            f"blocks of {n} latent{'s' * (n > 1)}, of as much history",
            changes=(
                f"stream.block_frames={n}",
                f"stream.ring_blocks={12 // n}",
                f"stream.sink_after={12 // n}",
            ),
        )
        for n in (1, 2, 4)
    },
    "coder": Row("the true clips, coded and decoded"),
    "teacher": Row(f"the teacher, both ways, {TEACHER_STEPS} steps", OUT / "teacher_model"),
}
PIPELINE = "pipeline"  # compares two drivers of one model, so it is no row of the table


def main(argv: Sequence[str] | None = None) -> int:
    """0 = done, 2 = refused with one sentence, 130 = interrupted; what is judged is kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--clips", type=Path, default=OUT / "clips" / "clips.csv")
    parser.add_argument("--preset", type=Path, default=SHIPPED, metavar="DIR",
                        help="what is judged (default: the built-in one)")  # fmt: skip
    parser.add_argument("--rows", nargs="+", choices=(*ROWS, PIPELINE), default=(*ROWS, PIPELINE))
    parser.add_argument("--seconds", type=float, default=60, help="of the longer streams")
    parser.add_argument("--limit", type=int, default=8, help="how many clips are streamed longer")
    args = parser.parse_args(argv)
    try:
        for name in args.rows:
            if name != PIPELINE:
                judge(name, args.preset, args.out, args.clips, args.seconds, args.limit)
        print(as_markdown(args.out))
        if PIPELINE in args.rows:
            print(compare_drivers(args.preset, args.out, read_takes(args.clips, 1)[0]))
        return 0
    except LiveAvatarError as error:
        print(f"variants: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def judge(name: str, preset: Path, out: Path, clips: Path, seconds: float, limit: int) -> None:
    row = ROWS[name]
    model = row.model or preset
    asked = Request(
        clips, out / name / "short", model, readers=preset / READERS, steps=row.steps,
        changes=row.changes, timing=False,
    )  # fmt: skip
    if name in ("teacher", "coder"):
        make, seconds_of = (taught, FRAMES / FPS) if name == "teacher" else (coded, None)
        videos = out / name / "videos"
        videos.mkdir(parents=True, exist_ok=True)
        make(model, read_takes(clips), videos)
        asked = dataclasses.replace(asked, weights=None, videos=videos, seconds=seconds_of, lead=0)
    reports = [evaluate(asked)]
    if row.longer:
        longer = dataclasses.replace(
            asked, out=out / name / "long", protocol="long", seconds=seconds, limit=limit
        )
        reports.append(evaluate(longer))
    if not all(report.finished for report in reports):
        raise KeyboardInterrupt


# ---- the teacher


def taught(folder: Path, takes: Sequence[Take], out: Path) -> None:
    """Videos of a teacher: whole clips at once, from noise that a clip's number makes."""
    cfg = checkpoint.load_config(folder)
    left = [i for i, take in enumerate(takes) if not (out / f"{take.id}.mp4").is_file()]
    if not left:
        return
    contexts = encode_prompts(folder, cfg, [take.caption for take in takes])
    avatar = load_avatar(folder, cfg)
    make = jax.jit(_taught)
    for i in left:
        take = takes[i]
        picture, samples = portrait(take.image, cfg), load_audio(take.audio)
        wanted = FRAMES * FRAME
        heard = np.pad(samples[:wanted], (0, max(0, wanted - len(samples))))
        features = _features(cfg, heard)
        pixels = to_pixels(picture)[None]
        frames = make(avatar, pixels, contexts[i][None], features, jax.random.key(i))
        with _film(out, take, picture.shape[:2]) as video:
            video.write(np.asarray(frames)[0][: -(-len(samples) // FRAME)])


def _features(cfg: ModelConfig, waveform: np.ndarray) -> Array:
    assert cfg.log_mel is not None
    return log_mel(jnp.asarray(sounding(cfg, waveform))[None], cfg.log_mel)[:, None]


def _taught(
    avatar: stream.Avatar, picture: Array, context: Array, features: Array, key: Array
) -> Array:
    shown = stream.encode_portrait(avatar, picture)
    given = condition(avatar.dit, shown.reference, shown.motion, context, features)
    given = posed(given, avatar.cfg)
    _, _, *cell = shown.reference.shape
    x = jax.random.normal(key, (1, FRAMES // 4, *cell))
    levels = sampling_levels(TEACHER_STEPS, avatar.cfg.shift)
    for now, then in itertools.pairwise(levels):
        velocity = bidirectional(avatar.dit, x, jnp.full(1, now), given)
        x = euler(x, velocity, jnp.asarray(now), jnp.asarray(then))
    frames, _ = avatar.vae.decode(x, shown.decoder)
    return stream.pixels(jnp.clip(frames, -1.0, 1.0))


# ---- the coder


def coded(folder: Path, takes: Sequence[Take], out: Path) -> None:
    """The true videos, through the VAE and back."""
    cfg = checkpoint.load_config(folder)
    vae, through = load(folder, "vae", "float32"), jax.jit(_through)
    for take in takes:
        if (out / f"{take.id}.mp4").is_file():
            continue
        if take.file is None:
            raise LiveAvatarError(f"{take.id} has no true video; list one under `file`")
        true = np.stack(list(frames_of(take.file)))
        more = -len(true) % vae.cfg.frames_per_latent  # the last frame stands still
        filled = np.concatenate([true, np.repeat(true[-1:], more, axis=0)])
        picture = to_pixels(portrait(take.image, cfg))[None]
        frames = stream.pixels(through(vae, picture, to_pixels(filled)[None]))
        with _film(out, take, true.shape[1:3]) as video:
            video.write(np.asarray(frames)[0][: len(true)])


def _through(vae: VAE, picture: Array, video: Array) -> Array:
    """After a portrait that stands still, as in a stream."""
    key, cache = vae.encode(picture[:, None])
    latents, _ = vae.encode(video, cache)
    frames, _ = vae.decode(latents, vae.primed(key, picture))
    return jnp.clip(frames, -1.0, 1.0)


def _film(out: Path, take: Take, size: tuple[int, ...]) -> VideoWriter:
    """As true clips are kept."""
    path = out / f"{take.id}.mp4"
    return VideoWriter(path, (size[0], size[1]), fps=FPS, crf=CRF, pixels="yuv444p")


# ---- one device, and the pipeline


def compare_drivers(preset: Path, out: Path, take: Take) -> str:
    """The same clip by one device and by 4 + 1 fake ones: what both report, and how far apart
    the frames of the two files are."""
    told, films = [], []
    out.mkdir(parents=True, exist_ok=True)
    for name, more in (("one", ()), ("pipeline", ("--mesh", "stage=4,vae=1", "--fake-devices",
                                                  "5"))):  # fmt: skip
        film = out / f"{name}.mp4"
        words = ("generate", "--weights", preset, "--image", take.image, "--audio", take.audio,
                 "--out", film, "--device", "cpu", "--scale", "1", *more)  # fmt: skip
        command = [sys.executable, "-m", "liveavatar_jax.cli", *map(str, words)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if run.returncode:
            raise LiveAvatarError(f"{' '.join(command)} ended with {run.returncode}")
        told.append(run.stdout.strip().splitlines()[-1])
        films.append(np.stack(list(frames_of(film))).astype(np.int16))
    apart = np.abs(films[0] - films[1])
    differ = f"frames differ by at most {apart.max()} of 255, by {apart.mean():.2g} on average"
    return "\n".join((*told, differ))


# ---- the table


def as_markdown(out: Path) -> str:
    """Of all rows that are judged, with 95 % intervals."""
    lines = ["| row | " + " | ".join(COLUMNS) + " | " + " | ".join(f"long: {g}" for g in GROWTH)]
    lines = [lines[0] + " |", "| --- " * (1 + len(COLUMNS) + len(GROWTH)) + "|"]
    for name, row in ROWS.items():
        if (file := out / name / "short" / "metrics.json").is_file():
            longer = out / name / "long" / "metrics.json"
            cells = [_cell(file, key) for key in COLUMNS]
            cells += [_cell(longer, key) for key in GROWTH]
            lines.append(f"| `{name}` {row.says} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(file: Path, key: str) -> str:
    found: dict[str, Any] = json.loads(file.read_text())["metrics"] if file.is_file() else {}
    if key not in found:
        return "–"
    line = found[key]
    sure = np.isfinite(line["low"])
    return f"{line['value']:.3g}" + (f" ({line['low']:.3g}, {line['high']:.3g})" if sure else "")


if __name__ == "__main__":
    sys.exit(main())
