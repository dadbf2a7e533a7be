"""The puppet preset, from nothing to what is shipped:

    python -m train.preset                  everything that is missing, below runs/puppet
    python -m train.preset --until shards   up to a part

    vae             configs/puppet_vae.py
    model           VAE, text encoder and the config of all networks
    shards          clips, drawn and encoded
    start           a network that knows where faces move, and no more
    teacher         configs/puppet_teacher.py: both ways, many steps
    forcing         configs/puppet_forcing.py: stage 1
    distill         configs/puppet_distill.py: stage 2
    preset          all weights in 16 bits, as they are shipped
    clips, judge    held-out puppets, and `liveavatar-jax evaluate` on them

Each part is a command of its own that goes on where it was, so this one does: stop it at any
moment and start it again. What reads captions and pictures (`train.text`, `train.readers`) is
taken as it is shipped, for what is trained here has learnt its rows; and so is the VAE, unless it
is to be trained --anew or that was begun.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import reduce
from flax import nnx

from liveavatar_jax.config import DiTConfig, MelConfig, ModelConfig, StreamConfig, VAEConfig
from liveavatar_jax.data import puppet
from liveavatar_jax.data.clips import Shards
from liveavatar_jax.diffusion.losses import Focus
from liveavatar_jax.models.cells import MOTION
from liveavatar_jax.models.vae import VAE
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.player import load as load_network
from liveavatar_jax.types import Float, LiveAvatarError
from liveavatar_jax.weights import checkpoint, packed
from liveavatar_jax.weights.convert import TOKENIZER
from train import export
from train.clips import at_rest
from train.experiment import Autoencoder, slowly
from train.networks import fresh
from train.run import load
from train.text import TEXT, TEXT_LEN

OUT, SIZE = Path("runs/puppet"), 64
SHIPPED = packed.PRESETS / packed.PRESET
MODEL, SHARDS, PRESET = OUT / "model", OUT / "shards", OUT / "preset"
START = OUT / "start"
CLIPS = 2400  # to train
LATENTS = 21  # of a clip: 7 blocks
FLOOR = 0.25  # of the mean weight of latents
PORTRAITS = 64  # whose slopes tell what motion changes


def networks(vae: VAEConfig, size: int) -> ModelConfig:
    """The preset's model around a VAE."""
    mel = MelConfig(bins=40, layers=16, ahead=12, flat=True)
    layers, width = mel.made
    dit = DiTConfig(
        dim=192, ffn_dim=768, heads=6, layers=4, freq_dim=128,
        latent_channels=vae.z_dim, text_dim=TEXT.dim, text_len=TEXT_LEN, audio_dim=width,
        audio_layers=layers, audio_tokens=4, inject_layers=(0, 1, 2), param_dtype="float32",
        predicts="offset", places=(size // 16, size // 16),
    )  # fmt: skip
    stream = StreamConfig(shift=1.0, distance=(4, 12), audio_past="true", pose="portrait",
                          dtype="float32")  # fmt: skip
    return ModelConfig(dit=dit, vae=vae, text=TEXT, stream=stream, mel=mel, size=size)


def focus() -> Focus:
    """How much each latent counts: as much as it changes pixels, by the linear code of the VAE or
    by how much a picture changes when it moves; and a quarter of the mean at least: what makes
    pictures sharp changes few. Codes of eyes and mouths count four times that, and where mouths
    open 40 times: else what sound explains is a twentieth of the error, and networks learn to shut
    it out before they learn to use it."""
    cfg = checkpoint.load_config(MODEL)
    kernel = np.asarray(load_network(MODEL, "vae", "float32").decoder.show.kernel[...])
    code = np.sum(kernel**2, axis=-1)
    weight = np.concatenate([slopes(cfg), code], axis=-1) * np.square(cfg.vae.latent_std)
    weight = np.maximum(weight, FLOOR * weight.mean())
    weight[2:4, 1:7, MOTION:] *= 4.0
    weight[4:7, 2:6, MOTION:] *= 4.0
    weight[5, 3:5, MOTION:] *= 10.0
    return tuple(tuple(tuple(map(float, x)) for x in row) for row in weight / weight.mean())


def slopes(cfg: ModelConfig) -> Float[np.ndarray, "h w motion"]:
    """Of portraits of puppets, over a latent of each place: the square change of all pixels where
    they move by a pixel along x, along y, and by one more each frame."""
    size, group = cfg.vae.pixels_per_latent, cfg.vae.frames_per_latent
    noise = np.random.default_rng(0).random((PORTRAITS, puppet.IDENTITY_NOISE), np.float32)
    rest = jax.tree.map(lambda x: np.repeat(x, PORTRAITS, axis=0), at_rest())
    pictures: Any = puppet.draw(puppet.identity(noise), rest, cfg.size or SIZE)
    found = []
    for axis in (3, 2):
        square = np.mean(np.gradient(pictures[:, 0], axis=axis - 1) ** 2, axis=0)
        found.append(group * reduce(square, "(h p) (w q) c -> h w", "sum", p=size, q=size))
    growth = np.mean((np.arange(group) - (group - 1) / 2) ** 2)
    return np.stack([*found, *(growth * x for x in found)], axis=-1)


def adam(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adam. The convolutions that hear 1,920 inputs, none of which is centred, go slowly: at the
    full rate one step moves what they say by more than sound ever does."""
    return slowly(optax.adam(rate, 0.9, 0.98), 0.05, "audio.conv1")


# ---- the parts


def is_shipped() -> bool:
    """Whether the VAE is taken as it is shipped: there is one, and no run of another."""
    there = packed.file_of(SHIPPED, "vae").is_file() and (SHIPPED / "config.json").is_file()
    return there and not (OUT / "vae").exists()


def make_vae() -> None:
    if not is_shipped():
        command("train.autoencoder", "configs/puppet_vae.py", "--out", OUT / "vae")()


def command(*words: str | Path) -> Callable[[], None]:
    """A part that is a command of its own; what it says is enough where it fails."""

    def run() -> None:
        code = subprocess.call([sys.executable, "-m", *map(str, words)])
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise LiveAvatarError(f"python -m {' '.join(map(str, words))} ended with {code}")

    return run


def make_model() -> None:
    """Config, VAE and text encoder, for everything after the VAE."""
    _copy(SHIPPED, ("text.safetensors", TOKENIZER), MODEL)
    if is_shipped():
        cfg = checkpoint.load_config(SHIPPED)
        _copy(SHIPPED, ("vae.safetensors",), MODEL)
        packed.pack(MODEL, networks(cfg.vae, cfg.size or SIZE), {})
        return
    exp = load(Path("configs/puppet_vae.py"), (Autoencoder,))
    step, arrays = export.weights(OUT / "vae", "average")
    if step < exp.steps:
        raise LiveAvatarError(f"{OUT / 'vae'} is at step {step} of {exp.steps}; let it finish")
    vae = jax.eval_shape(lambda: VAE(exp.vae, rngs=nnx.Rngs(0)))
    packed.pack(MODEL, networks(exp.vae, exp.size), {"vae": replace(vae, _on_device(arrays))})


def make_start() -> None:
    """A network that has learnt nothing but where pictures differ from portraits, and how much."""
    cfg, shards = checkpoint.load_config(MODEL), Shards((str(SHARDS),), TEXT_LEN, 0.0)
    apart = lambda clip: clip.latents.astype(np.float32) - clip.references[:1]
    squares = [np.mean(apart(shards[i]) ** 2, axis=0) for i in range(min(300, len(shards)))]
    dit = fresh(cfg.dit, seed=0)
    spread = np.minimum(1.0, np.sqrt(np.mean(squares, axis=0)))
    dit = replace(dit, leaves(dit) | {"spread": jnp.asarray(spread)})
    _copy(MODEL, ("vae.safetensors", "text.safetensors", TOKENIZER), START)
    packed.pack(START, cfg, {"dit": dit}, "float32")


def pack_dit(run: Path, out: Path) -> Callable[[], None]:
    """The average of a run's student beside the other networks."""

    def make() -> None:
        cfg = checkpoint.load_config(MODEL)
        _, arrays = export.weights(run, "average")
        dit = replace(checkpoint.abstract(cfg, "dit"), _on_device(arrays))
        _copy(MODEL, ("vae.safetensors", "text.safetensors", TOKENIZER), out)
        packed.pack(out, cfg, {"dit": dit}, "float32" if out != PRESET else "float16")

    return make


def make_preset() -> None:
    """All that `liveavatar_jax/presets/puppet` needs; to be copied there if it is the better."""
    pack_dit(OUT / "distill", PRESET)()
    rest = ("readers.safetensors", packed.PORTRAIT, packed.SPEECH, "LICENSE-speech", "README.md")
    _copy(SHIPPED, rest, PRESET)


def _on_device(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return {path: jnp.asarray(array) for path, array in arrays.items()}


def _copy(source: Path, names: Sequence[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(source / name, out / name)


def parts() -> dict[str, Callable[[], None]]:
    train = lambda stage, name: command(
        f"train.{stage}", f"configs/puppet_{name}.py", "--out", OUT / name
    )
    return {
        "vae": make_vae,
        "model": make_model,
        "shards": command("train.puppets", "--model", MODEL, "--out", SHARDS, "--count",
                          str(CLIPS), "--latents", str(LATENTS)),
        "start": make_start,
        "teacher": train("forcing", "teacher"),
        "pack teacher": pack_dit(OUT / "teacher", OUT / "teacher_model"),
        "forcing": train("forcing", "forcing"),
        "pack forcing": pack_dit(OUT / "forcing", OUT / "forcing_model"),
        "distill": train("distill", "distill"),
        "preset": make_preset,
        "clips": command("train.clips", "--out", OUT / "clips", "--count", "24"),
        "judge": command("liveavatar_jax.cli", "evaluate", "--weights", PRESET, "--clips",
                         OUT / "clips" / "clips.csv", "--out", OUT / "judged"),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """0 = done, 2 = refused with one sentence, 130 = interrupted."""
    all_parts = parts()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--anew", action="store_true", help="train a VAE, too")
    parser.add_argument("--until", choices=tuple(all_parts), help="the last part to do")
    args = parser.parse_args(argv)
    if args.anew:
        (OUT / "vae").mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            for name, make in all_parts.items():
                print(f"== {name}", file=sys.stderr)
                make()
                if name == args.until:
                    break
            return 0
        except LiveAvatarError as error:
            print(f"preset: {error}", file=sys.stderr)
            return 2
    return 130


if __name__ == "__main__":
    sys.exit(main())
