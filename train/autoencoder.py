"""The VAE of a small preset, on puppets that are drawn as they are needed.

    python -m train.autoencoder configs/puppet_vae.py --out runs/puppet/vae

The encoder searches motion and has a linear code, which is worked out, so latents are known before
the first step; what learns is the decoder. Each step draws a batch of new identities. What is
shown here are errors, weighted towards mouth and eyes: of the pixels, of their gradients over rows
and columns and over frames.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from liveavatar_jax.config import VAEConfig
from liveavatar_jax.data import puppet
from liveavatar_jax.devices import prepare
from liveavatar_jax.models.cells import MOTION, along_latents, by_frame, into_cells
from liveavatar_jax.models.motion import over_pixels, search, warped
from liveavatar_jax.models.vae import VAE
from liveavatar_jax.parallel import hosts
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.player import load as load_network
from liveavatar_jax.types import Array, Float, Int, Key, LiveAvatarError, UInt8, struct
from train.checkpoints import Checkpoints
from train.clips import at_rest
from train.experiment import Autoencoder
from train.metrics import Watch
from train.run import load
from train.signals import stopping
from train.state import Learner, Metrics, averaged, begin, learn

# When a run goes on; what it learns from may be weighed anew.
MAY_DIFFER = ("steps", "save_every", "keep", "judge_every", "focus", "square", "edges", "motion")
JUDGED = 24  # clips that the decoder is measured on
CLOSED = "retouch.out.kernel"  # what the decoder's convolutions end with
PEOPLE, CROWDS = 64, 64  # puppets whose pixels the linear code is made from
WHOLE = 0.02  # how much a code is of what is shown, beside how that differs from a key
POINTS = 3  # frames between two random targets of a mouth


@struct
class State:
    learner: Learner
    average: Any


@struct
class Clips:
    """Puppets at rest and in motion, and where mouth and eyes are."""

    key: Float[Array, "b 1 H W 3"]
    video: Float[Array, "b F H W 3"]
    mouth: Float[Array, "b F H W"]
    eyes: Float[Array, "b F H W"]


@struct
class Seen:
    """Clips with the latents of their keys and of themselves."""

    clips: Clips
    key: Float[Array, "b 1 h w c"]
    latents: Float[Array, "b f h w c"]


def drawn(key: Key[Array, ""], batch: int, frames: int, size: int) -> Clips:
    """Clips of new identities, whose mouths go from one random form to the next."""
    keys = jax.random.split(key, 5)
    who = puppet.identity(jax.random.uniform(keys[0], (batch, puppet.IDENTITY_NOISE)))
    shape = (batch, puppet.WARM + frames, puppet.GESTURE_NOISE)
    mood = jax.random.randint(keys[1], (batch,), 0, len(puppet.EXPRESSIONS))
    points = jax.random.uniform(keys[2], (batch, frames // POINTS + 2, 3))
    shut = jax.random.bernoulli(keys[3], 0.25, points.shape[:2])
    points = jnp.where(shut[..., None] & (jnp.arange(3) == 0)[None, None], 0.0, points)
    low, part = np.divmod(np.arange(frames), POINTS)
    part = jnp.asarray(part / POINTS, jnp.float32)[None, :, None]
    mouth = points[:, low] * (1 - part) + points[:, low + 1] * part
    pose = puppet.gestures(jax.random.normal(keys[4], shape), mood, mouth)
    rest = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), at_rest())
    at: Any = puppet.regions(who, pose, size)
    draw: Any = puppet.draw
    return Clips(draw(who, rest, size), draw(who, pose, size), mouth=at.mouth, eyes=at.eyes)


def fresh(exp: Autoencoder, key: Key[Array, ""]) -> VAE:
    """A VAE that has learnt nothing but the best linear code. Its residuals add nothing yet."""
    keys = jax.random.split(key)
    vae = jax.jit(lambda key: VAE(exp.vae, rngs=nnx.Rngs(key)))(keys[0])
    known = leaves(vae)
    new = {path: jnp.zeros_like(x) for path, x in known.items() if path.endswith(CLOSED)}
    look, show, dull, mean = components(exp, keys[1])
    new |= {"encoder.look.kernel": look, "encoder.look.bias": dull}
    new |= {"decoder.show.kernel": show, "decoder.show.bias": mean}
    return replace(vae, known | new)


def components(exp: Autoencoder, key: Key[Array, ""]) -> tuple[Array, Array, Array, Array]:
    """The best linear code of each place: kernels of `look` and of `show`, and their biases.

    It is fitted to how frames, moved back, differ from their key, and a little (WHOLE) to what
    they show: where nothing changes, a code tells who it is. Of the principal components of a
    place that basis is taken which is nearest to the components of all places together: so a
    channel means much the same everywhere, as the diffusion model's patches want it.
    """
    size, group = exp.vae.pixels_per_latent, exp.vae.frames_per_latent
    z = exp.vae.z_dim - MOTION

    @jax.jit
    def sums(clips: Clips, frames: Array) -> tuple[Array, ...]:
        x, first = (rearrange(into_cells(video, group, size), "b 1 h w k -> (h w) b k")
                    for video in (frames, jnp.repeat(clips.key, group, axis=1)))  # fmt: skip
        apart = x - first
        return jnp.sum(x, axis=1), jnp.matmul(x.mT, x), jnp.matmul(apart.mT, apart)

    # As one program with a loop this took a CPU 565 s; as three, 75 s.
    draw = jax.jit(lambda key: drawn(key, PEOPLE, group, exp.size))
    back = jax.jit(functools.partial(moved_back, exp.vae))
    crowds = map(draw, jax.random.split(key, CROWDS))
    parts = (sums(clips, back(clips)) for clips in crowds)
    total = functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)
    mean, square, apart = (x / (PEOPLE * CROWDS) for x in total)
    rows, columns = exp.vae.grid
    middle, outer = jnp.mean(mean, axis=0), lambda a, b: a[..., :, None] * b[..., None, :]
    own = apart + WHOLE * (square - outer(mean, mean))
    shared = jnp.linalg.eigh(jnp.mean(own, axis=0))[1][:, -z:]
    own = jnp.linalg.eigh(own)[1][:, :, -z:]
    u, _, v = jnp.linalg.svd(jnp.matmul(own.mT, shared[None]), full_matrices=False)
    own = jnp.matmul(own, jnp.matmul(u, v))
    cross = outer(mean, middle[None])
    about = square - cross - cross.mT + outer(middle, middle)[None]
    spread = jnp.sqrt(jnp.mean(jnp.sum(own * jnp.matmul(about, own), axis=1), axis=0))
    look, show = own / spread[None, None], own.mT * spread[None, :, None]
    dull = -jnp.matmul(middle[None], look)  # [places, 1, z]
    usual = jnp.matmul(mean[:, None], look) + dull  # the code of what a place mostly shows
    back = mean - jnp.matmul(usual, show)[:, 0]
    fold = lambda x: x.reshape(rows, columns, *x.shape[1:])
    return fold(look), fold(show), fold(dull[:, 0]), fold(back)


def moved_back(cfg: VAEConfig, clips: Clips) -> Float[Array, "b F H W 3"]:
    """Frames as an encoder sees them after its search."""
    size, group = cfg.pixels_per_latent, cfg.frames_per_latent
    motion = along_latents(search(clips.key, clips.video, size), group)
    return warped(clips.video, -over_pixels(by_frame(motion, group), size))


def coded(vae: VAE, clips: Clips) -> tuple[Float[Array, "b 1 h w c"], Float[Array, "b f h w c"]]:
    """Latents of keys, and of their clips."""
    key, cache = vae.latents(clips.key, None)
    return key, vae.latents(clips.video, cache)[0]


def shown(vae: VAE, clips: Clips, key: Array, latents: Array) -> Float[Array, "b F H W 3"]:
    return vae.shown(latents, vae.primed(key, clips.key[:, 0]))[0]


def loss(
    exp: Autoencoder, vae: VAE, seen: Seen, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Metrics]:
    clips, keys, z = seen.clips, jax.random.split(key), seen.latents
    # Little more often than much. None on motion: what moves elsewhere could but be blurred.
    width = exp.noise * jax.random.uniform(keys[0], (len(z), 1, 1, 1, 1)) ** 2
    still = jnp.arange(z.shape[-1]) < MOTION
    width = jnp.where(still[None, None, None, None], 0.0, width)
    made = shown(vae, clips, seen.key, z + width * jax.random.normal(keys[1], z.shape))
    lips, eyes = (focus - 1 for focus in exp.focus)
    weight = 1 + jnp.maximum(lips * clips.mouth, eyes * clips.eyes)[..., None]
    weight = weight / jnp.mean(weight)
    error = made - clips.video
    pixels, square = jnp.mean(weight * jnp.abs(error)), jnp.mean(weight * error**2)
    along = lambda axis: jnp.mean(
        jax.lax.slice_in_dim(weight, 1, None, axis=axis) * jnp.abs(jnp.diff(error, axis=axis))
    )
    edges, motion = along(2) + along(3), along(1)
    total = pixels + exp.square * square + exp.edges * edges + exp.motion * motion
    return total, {"pixels": pixels, "edges": edges, "motion": motion}


def start(exp: Autoencoder, vae: VAE) -> State:
    """The state before the first step."""
    return State(begin(vae, exp.optimiser), jax.tree.map(jnp.copy, vae))


def batches(exp: Autoencoder) -> Callable[[VAE, Array], Seen]:
    """What is seen in an update. In programs of their own: XLA's CPU compiler takes eight times as
    long over the gradient of a step that also draws."""
    code = jax.jit(coded)

    @jax.jit
    def draw(update: Int[Array, ""]) -> Clips:
        key = jax.random.fold_in(jax.random.key(exp.seed + 2), update)
        return drawn(key, exp.batch, exp.frames, exp.size)

    def batch(vae: VAE, update: Int[Array, ""]) -> Seen:
        clips = draw(update)
        return Seen(clips, *code(vae, clips))

    return batch


def train_step(exp: Autoencoder, state: State, seen: Seen) -> tuple[State, Metrics]:
    key = jax.random.fold_in(jax.random.key(exp.seed + 1), state.learner.updates)
    grads, metrics = jax.grad(functools.partial(loss, exp), has_aux=True)(
        state.learner.params, seen, key
    )
    learner, more = learn(state.learner, exp.optimiser, grads, exp.clip)
    average = averaged(state.average, learner.params, exp.average, learner.updates, 20)
    return State(learner, average), metrics | more


def unseen(exp: Autoencoder, vae: VAE) -> Seen:
    """Clips of identities that are in no update."""
    clips = jax.jit(lambda key: drawn(key, JUDGED, exp.frames + 8, exp.size))(
        jax.random.key(10_000 + exp.seed)
    )
    return Seen(clips, *jax.jit(coded)(vae, clips))


def judge(exp: Autoencoder, vae: VAE, seen: Seen) -> tuple[Metrics, UInt8[Array, "F H W 3"]]:
    """PSNR in dB, of all, mouths and eyes; how much changes from frame to frame within latents and
    from one to the next, over truth; and the first few clips, truth above."""
    clips = seen.clips
    made = jnp.clip(shown(vae, clips, seen.key, seen.latents), -1.0, 1.0)
    square = jnp.mean((made - clips.video) ** 2, axis=-1)
    decibel = lambda error: 10 * jnp.log10(4.0 / error)
    mouth = jnp.sum(square * clips.mouth) / jnp.sum(clips.mouth)
    eyes = jnp.sum(square * clips.eyes) / jnp.sum(clips.eyes)
    numbers = {"psnr": decibel(jnp.mean(square)), "psnr_mouth": decibel(mouth),
               "psnr_eyes": decibel(eyes)}  # fmt: skip
    changes = [jnp.mean(jnp.abs(jnp.diff(x, axis=1)), axis=(0, 2, 3, 4))
               for x in (made, clips.video)]  # fmt: skip
    across = (1 + np.arange(len(changes[0]))) % exp.vae.frames_per_latent == 0
    for name, where in (("within", ~across), ("across", across)):
        numbers[name] = jnp.sum(changes[0][where]) / jnp.sum(changes[1][where])
    rows = [jnp.concatenate(list(x[:6]), axis=2) for x in (clips.video, made)]
    sheet = jnp.concatenate(rows, axis=1)
    return numbers, jnp.round((sheet + 1) * 127.5).astype(jnp.uint8)


def main(argv: Sequence[str] | None = None) -> int:
    """0 = done or asked to stop, 2 = refused with one sentence, 130 = interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a file with `def config()`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; goes on there")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="default: the best")
    hosts.add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        prepare(args)
        return train(load(args.config, (Autoencoder,), args.set), args.out)
    except LiveAvatarError as error:
        print(f"autoencoder: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def latest(exp: Autoencoder, out: Path) -> State:
    """The state of the newest step of a run. Raises LiveAvatarError when there is none."""
    with Checkpoints(out, exp, keep=exp.keep, may_differ=MAY_DIFFER) as save:
        return save.restore(_abstract(exp))[0]


def _abstract(exp: Autoencoder) -> State:
    return jax.eval_shape(lambda: start(exp, VAE(exp.vae, rngs=nnx.Rngs(0))))


def _first(exp: Autoencoder) -> VAE:
    if exp.start is None:
        return fresh(exp, jax.random.key(exp.seed))
    return load_network(Path(exp.start), "vae", "float32")


def train(exp: Autoencoder, out: Path) -> int:
    """The loop. Returns the exit code."""
    measure = jax.jit(functools.partial(judge, exp))
    see = batches(exp)
    step_of = jax.jit(functools.partial(train_step, exp), donate_argnums=0)
    with Checkpoints(out, exp, keep=exp.keep, may_differ=MAY_DIFFER) as save:
        done = save.latest or 0
        if done:
            state = save.restore(_abstract(exp))[0]
        else:
            state = jax.jit(functools.partial(start, exp))(_first(exp))
        test = unseen(exp, state.average)
        with (
            Watch(out, exp.steps, start=done, last_good=lambda: save.latest) as watch,
            stopping() as stop,
        ):
            for step in range(done + 1, exp.steps + 1):
                save.check()
                seen = see(state.average, state.learner.updates)
                state, metrics = step_of(state, seen)
                numbers, sheet = {}, None
                if step % exp.judge_every == 0 or step == exp.steps:
                    numbers, sheet = measure(state.average, test)
                watch(step, metrics | numbers)
                stopped = stop.agreed()
                if stopped or step % exp.save_every == 0 or step == exp.steps:
                    with watch.aside():
                        save.save(step, state, {})
                if sheet is not None:
                    with watch.aside():
                        watch.sample(step, np.asarray(sheet))
                if stopped:
                    break
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
