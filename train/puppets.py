"""Puppet clips, straight into the shards that training reads:

    python -m train.puppets --model runs/puppet/model --out runs/puppet/shards --count 2000

What `train.clips` would write as files and `liveavatar-jax encode` would read again is drawn and
encoded here at once. The reference is the puppet at rest, as the portrait of a stream will be, and
stands still before the clip. --model is a packed folder with the config, the VAE and the text
encoder. A run that was stopped goes on at the shard that is missing.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from liveavatar_jax.config import ModelConfig
from liveavatar_jax.data import puppet
from liveavatar_jax.data.records import PER_LATENT, SUFFIX, About, Clip, pack, write_shard
from liveavatar_jax.data.sentences import SPLITS
from liveavatar_jax.data.voice import FRAME
from liveavatar_jax.evaluate import encode_prompts
from liveavatar_jax.models.mel import log_mel
from liveavatar_jax.models.vae import VAE
from liveavatar_jax.player import load
from liveavatar_jax.stream import MOTION_VIDEO_FRAMES
from liveavatar_jax.types import Array, Float, LiveAvatarError
from liveavatar_jax.weights import checkpoint
from train.clips import Scene, stage

PER_SHARD = 100
AT_ONCE = 10  # clips in one call


def main(argv: Sequence[str] | None = None) -> int:
    """0 = done, 2 = refused with one sentence, 130 = interrupted; whole shards are kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="packed folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=2000, help="of clips (default: %(default)s)")
    parser.add_argument("--latents", type=int, default=21, help="of a clip (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="of a picture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        for name in ("count", "latents", "size"):
            if getattr(args, name) < 1:
                raise LiveAvatarError(f"--{name} {getattr(args, name)} must be at least 1")
        write(args.model, args.out, args.split, args.count, args.latents, args.size, args.seed)
        return 0
    except LiveAvatarError as error:
        print(f"puppets: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def write(
    model: Path, out: Path, split: str, count: int, latents: int, size: int, seed: int = 0
) -> None:
    """Writes the shards that are missing. Raises LiveAvatarError where that does not go."""
    cfg = checkpoint.load_config(model)
    vae = load(model, "vae", "float32")
    # Two programs: convolutions in one that also draws take XLA's CPU compiler's slow way.
    draw = jax.jit(functools.partial(_drawn, size=size))
    encode = jax.jit(functools.partial(_encoded, cfg))
    make = lambda drawn, heard: encode(vae, *draw(drawn), heard)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LiveAvatarError(f"cannot write {out}: {str(error.strerror).lower()}") from None
    with tqdm(total=count, unit="clip", disable=None) as bar:
        for first in range(0, count, PER_SHARD):
            numbers = range(first, min(first + PER_SHARD, count))
            path = out / f"{split}-{first // PER_SHARD:05}{SUFFIX}"
            if not path.exists():
                write_shard(
                    path, map(pack, _clips(cfg, model, make, numbers, split, latents, seed, bar))
                )
            else:
                bar.update(len(numbers))


def _clips(
    cfg: ModelConfig, model: Path, make: Any, numbers: range, split: str, latents: int, seed: int,
    bar: tqdm,
) -> Iterator[Clip]:  # fmt: skip
    scenes = [stage(split, number, PER_LATENT * latents, seed) for number in numbers]
    texts = encode_prompts(model, cfg, [scene.caption for scene in scenes])
    for first in range(0, len(scenes), AT_ONCE):
        some = scenes[first : first + AT_ONCE]
        filled = some + some[-1:] * (AT_ONCE - len(some))  # one compiled program for all calls
        heard = np.stack([sounding(cfg, scene.said.waveform) for scene in filled])
        made = make(_drawn_by(filled), heard)
        video, reference, still, audio = (np.asarray(x, np.float16) for x in made)
        for i, scene in enumerate(some):
            yield Clip(
                latents=video[i],
                motion=still[i],
                references=reference[i],
                stills=still[i][None],
                text=np.asarray(texts[first + i], np.float16),
                audio=audio[i],
                about=About(
                    id=scene.id, start=0.0, frames=PER_LATENT * latents, caption=scene.caption,
                ),
            )  # fmt: skip
            bar.update()


def sounding(cfg: ModelConfig, waveform: np.ndarray) -> Float[np.ndarray, " samples"]:
    """A recording of whole frames with the silence around it that its features are made of."""
    mel = cfg.log_mel
    if mel is None:
        raise LiveAvatarError("the model has no log-mel features; set `mel` in its config")
    frames = len(waveform) // FRAME
    return np.pad(waveform[: frames * FRAME].astype(np.float32), (mel.past, mel.future))


def _drawn_by(scenes: Sequence[Scene]) -> tuple[puppet.Identity, puppet.Pose, puppet.Pose]:
    """Who they are, how they move, and how they rest."""
    join = lambda *parts: np.concatenate(parts)
    return tuple(
        jax.tree.map(join, *(getattr(scene, name) for scene in scenes))
        for name in ("who", "pose", "rest")
    )  # type: ignore[return-value]


def _drawn(drawn: Any, size: int) -> tuple[Array, Array]:
    """The clips, and the puppets at rest."""
    who, pose, rest = drawn
    draw: Any = puppet.draw
    return draw(who, pose, size), draw(who, rest, size)


def _encoded(
    cfg: ModelConfig, vae: VAE, video: Array, portrait: Array, heard: Float[Array, "b samples"]
) -> tuple[Array, ...]:
    """Latents of the clips, of the puppets at rest, of that standing still; and what is heard."""
    assert cfg.log_mel is not None
    reference, key = vae.encode(portrait)
    latents, _ = vae.latents(video, key)
    still = vae.still(portrait[:, 0], MOTION_VIDEO_FRAMES)
    return latents, reference, still, log_mel(heard, cfg.log_mel)


if __name__ == "__main__":
    sys.exit(main())
