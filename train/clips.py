"""Writes puppet clips as files, with all that is known about them:

    python -m train.clips --out clips --split held-out --count 24 --seconds 10

One list serves both who is judged by it (`liveavatar-jax evaluate --clips clips/clips.csv`) and
the ordinary way of clips into shards (`liveavatar-jax encode --list clips/clips.csv`). Paths in it
count from its folder:

    clips.csv    id,file,image,audio,caption,truth
    <id>.mp4     file: the true video with its sound
    <id>.png     image: a portrait of the same puppet, neutral, still and with a shut mouth
    <id>.wav     audio: 16 kHz mono, 640 samples a frame
    <id>.npz     truth: mouth [F, 3] (open, width, round), expression (index in puppet.EXPRESSIONS),
                 mouth_box and eyes_box [F, 4] (top, left, bottom, right in 0..1), colours [n, 3]
                 named by colour_names, traits (JSON), text, voice, fps, and the noise of which
                 identity and gestures are made

A clip is whole when its .npz is there; a run that was stopped goes on at the first that lacks it.
"""

import argparse
import csv
import dataclasses
import functools
import io
import json
import os
import sys
import wave
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from liveavatar_jax.data import puppet
from liveavatar_jax.data.captions import caption
from liveavatar_jax.data.mouth import FPS, REST
from liveavatar_jax.data.sentences import SPLITS
from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax.data.voice import RATE, Utterance, recite
from liveavatar_jax.types import Float, LiveAvatarError, UInt8

COLUMNS = ("id", "file", "image", "audio", "caption", "truth")
SHOWN = ("skin", "hair", "iris", "clothes", "wall")  # colours that are told
CHUNK = 50  # frames that are drawn at once
CRF = 2  # of the video, with its colours in full: 64 pixels have none to spare


@dataclasses.dataclass(frozen=True)
class Scene:
    """A clip before it is drawn: everything it is made of."""

    id: str
    said: Utterance
    expression: int
    identity_noise: Float[np.ndarray, "1 identity"]
    gesture_noise: Float[np.ndarray, "1 n gestures"]
    caption: str

    @functools.cached_property
    def who(self) -> puppet.Identity:
        return puppet.identity(self.identity_noise)

    @functools.cached_property
    def pose(self) -> puppet.Pose:
        expression = np.array([self.expression])
        return puppet.gestures(self.gesture_noise, expression, self.said.mouth[None])

    @property
    def rest(self) -> puppet.Pose:
        return at_rest()


def at_rest() -> puppet.Pose:
    """One frame, neutral and still."""
    noise = np.zeros((1, puppet.WARM + 1, puppet.GESTURE_NOISE), np.float32)
    return puppet.gestures(noise, np.array([0]), np.array([[REST]], np.float32))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--split", choices=SPLITS, default="held-out")
    parser.add_argument("--count", type=int, default=24, help="of clips (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="of each (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="of a picture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        for name, least in ("count", 1), ("seconds", 1 / FPS), ("size", 16), ("seed", 0):
            if getattr(args, name) < least:
                raise LiveAvatarError(f"--{name} {getattr(args, name)} must be at least {least}")
        frames = round(args.seconds * FPS)
        path = write_clips(args.out, args.split, args.count, frames, args.size, args.seed)
    except LiveAvatarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(path)
    return 0


def write_clips(out: Path, split: str, count: int, frames: int, size: int, seed: int = 0) -> Path:
    """Writes the clips that are missing, and their list; returns the path of the list.

    Raises LiveAvatarError for odd sizes and folders that cannot be written.
    """
    draw = jax.jit(puppet.draw, static_argnums=2)
    rows = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number in tqdm(range(count), unit="clip", disable=None):
            scene = stage(split, number, frames, seed)
            files = {"file": "mp4", "image": "png", "audio": "wav", "truth": "npz"}
            row = {name: f"{scene.id}.{ending}" for name, ending in files.items()}
            rows.append({"id": scene.id, "caption": scene.caption, **row})
            if not _is_same(out / row["truth"], scene, size):
                _write(out, row, scene, size, draw)
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _replace(out / "clips.csv", table.getvalue().encode())
    except OSError as error:
        raise LiveAvatarError(f"cannot write {out}: {str(error.strerror).lower()}") from None
    return out / "clips.csv"


def stage(split: str, number: int, frames: int, seed: int = 0) -> Scene:
    """The clip of a split with this number. Expressions take turns."""
    rng = np.random.default_rng((seed, SPLITS.index(split), number))
    said = recite(rng, split, frames)
    expression = number % len(puppet.EXPRESSIONS)
    face = rng.random((1, puppet.IDENTITY_NOISE), dtype=np.float32)
    shape = (1, puppet.WARM + frames, puppet.GESTURE_NOISE)
    gesture = rng.standard_normal(shape, dtype=np.float32)
    words = puppet.traits(puppet.identity(face), 0)
    text = caption(rng, puppet.EXPRESSIONS[expression], words, held_out=split == "held-out")
    return Scene(f"{split}-{number:04}", said, expression, face, gesture, text)


def _write(out: Path, row: dict[str, str], scene: Scene, size: int, draw) -> None:
    """All files of a clip, the truth last."""
    portrait = to_bytes(np.asarray(draw(scene.who, scene.rest, size)))[0, 0]
    Image.fromarray(portrait).save(out / row["image"])
    pcm = np.round(scene.said.waveform * 32767).astype("<i2")
    with wave.open(str(out / row["audio"]), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(pcm.tobytes())
    frames = len(scene.said.mouth)
    path, sound = out / row["file"], out / row["audio"]
    with VideoWriter(path, (size, size), audio=sound, crf=CRF, pixels="yuv444p") as video:
        for start in range(0, frames, CHUNK):
            at = np.minimum(np.arange(start, start + CHUNK), frames - 1)
            part = jax.tree.map(lambda x, at=at: x[:, at], scene.pose)
            picture = to_bytes(np.asarray(draw(scene.who, part, size)))[0]
            video.write(picture[: frames - start])
    mouth_box, eyes_box = puppet.boxes(scene.who, scene.pose)
    truth = io.BytesIO()
    np.savez_compressed(
        truth,
        mouth=scene.said.mouth,
        fps=np.float64(FPS),
        size=np.int64(size),
        expression=np.int64(scene.expression),
        mouth_box=mouth_box[0],
        eyes_box=eyes_box[0],
        identity_noise=scene.identity_noise[0],
        gesture_noise=scene.gesture_noise[0],
        colours=np.stack([scene.who.colour[name][0] for name in SHOWN]),
        colour_names=np.array(SHOWN),
        traits=np.array(json.dumps(puppet.traits(scene.who, 0))),
        text=np.array(scene.said.text),
        voice=np.array(scene.said.voice.name),
    )
    _replace(out / row["truth"], truth.getvalue())


def to_bytes(picture: Float[np.ndarray, "*b H W 3"]) -> UInt8[np.ndarray, "*b H W 3"]:
    return np.clip(np.round((picture + 1) * 127.5), 0, 255).astype(np.uint8)


def _is_same(path: Path, scene: Scene, size: int) -> bool:
    """Whether the clip is there already, and is this one."""
    try:
        with np.load(path) as truth:
            return (
                int(truth["size"]) == size
                and np.array_equal(truth["mouth"], scene.said.mouth)
                and np.array_equal(truth["gesture_noise"], scene.gesture_noise[0])
            )
    except (OSError, ValueError, KeyError, EOFError):
        return False


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(data)
    os.replace(draft, path)


if __name__ == "__main__":
    sys.exit(main())
