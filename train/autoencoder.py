"""The VAE of a small preset, on puppets that are drawn as they are needed.

    python -m train.autoencoder configs/puppet_vae.py --out runs/puppet/vae

Each step draws a batch of new identities. What is shown here are errors, weighted towards mouth
and eyes: of the pixels, of their gradients over rows and columns and over frames; and the
divergence of the posterior. With `start`, the decoder of a finished one learns on.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from liveavatar_jax.data import puppet
from liveavatar_jax.devices import prepare
from liveavatar_jax.models.vae import VAE, normalise
from liveavatar_jax.parallel import hosts
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.player import load as load_network
from liveavatar_jax.types import Array, Float, Int, Key, LiveAvatarError, UInt8, struct
from train.checkpoints import Checkpoints
from train.experiment import Autoencoder
from train.metrics import Watch
from train.run import load
from train.signals import stopping
from train.state import Learner, Metrics, averaged, begin, learn

# When a run goes on; what it learns from may be weighed anew.
MAY_DIFFER = ("steps", "save_every", "keep", "judge_every", "focus", "square", "edges", "motion")
JUDGED = 24  # clips that the decoder is measured on
CLOSED = "out.kernel"  # what residuals, attention and heads end with
PEOPLE, CROWDS = 256, 16  # puppets whose pixels the first code is made from
POINTS = 3  # frames between two random targets of a mouth


@struct
class State:
    learner: Learner
    average: Any


@struct
class Clips:
    """Puppets, and where mouth and eyes are."""

    video: Float[Array, "b F H W 3"]
    mouth: Float[Array, "b F H W"]
    eyes: Float[Array, "b F H W"]


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
    at: Any = puppet.regions(who, pose, size)
    video: Any = puppet.draw(who, pose, size)
    return Clips(video=video, mouth=at.mouth, eyes=at.eyes)


def fresh(exp: Autoencoder, key: Key[Array, ""]) -> VAE:
    """A VAE that has learnt nothing but the best linear code. Its residuals add nothing yet; and
    its posterior is narrow: as wide as its means, it would drown them."""
    cfg, keys = exp.vae, jax.random.split(key)
    vae = VAE(cfg, rngs=nnx.Rngs(keys[0]))
    known = leaves(vae)
    new = {path: jnp.zeros_like(x) for path, x in known.items() if path.endswith(CLOSED)}
    new |= {f"{path}.kernel": jnp.eye(len(known[f"{path}.kernel"]))
            for path in ("to_moments", "from_latents")}  # fmt: skip
    new["encoder.head.out.bias"] = known["encoder.head.out.bias"].at[cfg.z_dim :].set(-5.0)
    look, show, dull, mean = components(exp, keys[1])
    new |= {"encoder.look.kernel": look, "encoder.look.bias": dull}
    new |= {"decoder.show.kernel": show, "decoder.show.bias": mean}
    return replace(vae, known | new)


def components(exp: Autoencoder, key: Key[Array, ""]) -> tuple[Array, Array, Array, Array]:
    """The best linear code of each place: kernels of `look` and of `show`, and their biases.

    Of the principal components of a place's own pixels that basis is taken which is nearest to
    the components of all places together: so a channel means much the same everywhere, as the
    diffusion model's patches want it, and a place still has what only it needs, as mouths have
    motion. A quarter of the clips stand still, as first frames do.
    """
    size, group, z = exp.vae.pixels_per_latent, exp.vae.frames_per_latent, exp.vae.z_dim

    def some(total: tuple[Array, Array], key: Key[Array, ""]) -> tuple[tuple[Array, Array], None]:
        video = drawn(key, PEOPLE, group, exp.size).video
        still = jnp.repeat(video[: PEOPLE // 4, :1], group, axis=1)
        video = jnp.concatenate([video[PEOPLE // 4 :], still])
        x = rearrange(video, "b t (h p) (w q) c -> (h w) b (t p q c)", p=size, q=size)
        return (total[0] + jnp.sum(x, axis=1), total[1] + jnp.matmul(x.mT, x)), None

    rows, columns = exp.vae.grid
    pixels = 3 * group * size**2
    zeros = jnp.zeros((rows * columns, pixels)), jnp.zeros((rows * columns, pixels, pixels))
    (sums, squares), _ = jax.lax.scan(some, zeros, jax.random.split(key, CROWDS))
    mean, square = sums / (PEOPLE * CROWDS), squares / (PEOPLE * CROWDS)
    middle = jnp.mean(mean, axis=0)
    outer = lambda x: x[..., :, None] * x[..., None, :]
    power, shared = jnp.linalg.eigh(jnp.mean(square, axis=0) - outer(middle))
    shared, spread = shared[:, -z:], jnp.sqrt(power[-z:])
    _, own = jnp.linalg.eigh(square - outer(mean))
    own = own[:, :, -z:]
    u, _, v = jnp.linalg.svd(jnp.matmul(own.mT, shared[None]), full_matrices=False)
    own = jnp.matmul(own, jnp.matmul(u, v))
    look, show = own / spread[None, None], own.mT * spread[None, :, None]
    dull = -jnp.matmul(middle[None], look)  # [places, 1, z]
    usual = jnp.matmul(mean[:, None], look) + dull  # the code of what a place mostly shows
    back = mean - jnp.matmul(usual, show)[:, 0]
    fold = lambda x: x.reshape(rows, columns, *x.shape[1:])
    return fold(look), fold(show), fold(dull[:, 0]), fold(back)


def loss(
    exp: Autoencoder, vae: VAE, clips: Clips, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Metrics]:
    mean, spread = jnp.split(whole(vae.moments, clips.video), 2, axis=-1)
    spread = jnp.clip(spread, -20.0, 10.0)
    keys = jax.random.split(key)
    noise = jax.random.normal(keys[0], mean.shape)
    if exp.start is None:
        z = normalise(mean + jnp.exp(0.5 * spread) * noise, exp.vae)
    else:
        z = normalise(jax.lax.stop_gradient(mean), exp.vae)
        z = z + exp.noise * jax.random.uniform(keys[1], (len(z), 1, 1, 1, 1)) * noise
    made = whole(vae.shown, z)
    lips, eyes = (focus - 1 for focus in exp.focus)
    weight = 1 + jnp.maximum(lips * clips.mouth, eyes * clips.eyes)[..., None]
    weight = weight / jnp.mean(weight)
    error = made - clips.video
    pixels, square = jnp.mean(weight * jnp.abs(error)), jnp.mean(weight * error**2)
    along = lambda axis: jnp.mean(
        jax.lax.slice_in_dim(weight, 1, None, axis=axis) * jnp.abs(jnp.diff(error, axis=axis))
    )
    edges, motion = along(2) + along(3), along(1)
    divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(spread) - 1 - spread)
    total = pixels + exp.square * square + exp.edges * edges + exp.motion * motion
    if exp.start is None:
        total = total + exp.divergence * divergence
    return total, {"pixels": pixels, "edges": edges, "motion": motion, "divergence": divergence}


def whole(code: Any, x: Float[Array, "b f h w c"]) -> Float[Array, "b g y x k"]:
    """A clip through a coder: where it begins, and all the rest at once."""
    first, cache = code(x[:, :1], None)
    return jnp.concatenate([first, code(x[:, 1:], cache)[0]], axis=1)


def start(exp: Autoencoder, vae: VAE | None = None) -> State:
    """The state before the first step; of a new VAE, if none is given."""
    vae = fresh(exp, jax.random.key(exp.seed)) if vae is None else vae
    return State(begin(vae, exp.optimiser), jax.tree.map(jnp.copy, vae))


def batch(exp: Autoencoder, update: Int[Array, ""]) -> Clips:
    """The clips of an update. A program of its own: XLA's CPU compiler takes eight times as long
    over the gradient of a step that also draws."""
    key = jax.random.fold_in(jax.random.key(exp.seed + 2), update)
    return drawn(key, exp.batch, exp.frames, exp.size)


def train_step(exp: Autoencoder, state: State, clips: Clips) -> tuple[State, Metrics]:
    key = jax.random.fold_in(jax.random.key(exp.seed + 1), state.learner.updates)
    grads, metrics = jax.grad(functools.partial(loss, exp), has_aux=True)(
        state.learner.params, clips, key
    )
    learner, more = learn(state.learner, exp.optimiser, grads, exp.clip)
    average = averaged(state.average, learner.params, exp.average, learner.updates, 20)
    return State(learner, average), metrics | more


def judge(exp: Autoencoder, vae: VAE) -> tuple[Metrics, UInt8[Array, "F H W 3"]]:
    """PSNR in dB of clips of unseen identities, all and of the mouth; how much changes from frame
    to frame within latents and from one to the next, over truth; and the first few clips, truth
    above."""
    clips = drawn(jax.random.key(10_000 + exp.seed), JUDGED, exp.frames + 8, exp.size)
    latents, _ = vae.encode(clips.video)
    made = jnp.clip(vae.decode(latents)[0], -1.0, 1.0)
    square = jnp.mean((made - clips.video) ** 2, axis=-1)
    decibel = lambda error: 10 * jnp.log10(4.0 / error)
    mouth = jnp.sum(square * clips.mouth) / jnp.sum(clips.mouth)
    eyes = jnp.sum(square * clips.eyes) / jnp.sum(clips.eyes)
    numbers = {"psnr": decibel(jnp.mean(square)), "psnr_mouth": decibel(mouth),
               "psnr_eyes": decibel(eyes)}  # fmt: skip
    changes = [jnp.mean(jnp.abs(jnp.diff(x, axis=1)), axis=(0, 2, 3, 4))
               for x in (made, clips.video)]  # fmt: skip
    across = np.arange(len(changes[0])) % exp.vae.frames_per_latent == 0
    for name, where in (("within", ~across), ("across", across)):
        numbers[name] = jnp.sum(changes[0][where]) / jnp.sum(changes[1][where])
    rows = [jnp.concatenate(list(x[:6]), axis=2) for x in (clips.video, made)]
    shown = jnp.concatenate(rows, axis=1)
    return numbers, jnp.round((shown + 1) * 127.5).astype(jnp.uint8)


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
        return save.restore(jax.eval_shape(functools.partial(start, exp), *_given(exp)))[0]


def _given(exp: Autoencoder) -> tuple[VAE, ...]:
    return () if exp.start is None else (load_network(Path(exp.start), "vae", "float32"),)


def train(exp: Autoencoder, out: Path) -> int:
    """The loop. Returns the exit code."""
    begun = functools.partial(start, exp)
    measure = jax.jit(functools.partial(judge, exp))
    draw = jax.jit(functools.partial(batch, exp))
    step_of = jax.jit(functools.partial(train_step, exp), donate_argnums=0)
    with Checkpoints(out, exp, keep=exp.keep, may_differ=MAY_DIFFER) as save:
        done = save.latest or 0
        given = _given(exp)
        state = save.restore(jax.eval_shape(begun, *given))[0] if done else jax.jit(begun)(*given)
        with (
            Watch(out, exp.steps, start=done, last_good=lambda: save.latest) as watch,
            stopping() as stop,
        ):
            for step in range(done + 1, exp.steps + 1):
                save.check()
                state, metrics = step_of(state, draw(state.learner.updates))
                numbers, shown = {}, None
                if step % exp.judge_every == 0 or step == exp.steps:
                    numbers, shown = measure(state.average)
                watch(step, metrics | numbers)
                stopped = stop.agreed()
                if stopped or step % exp.save_every == 0 or step == exp.steps:
                    with watch.aside():
                        save.save(step, state, {})
                if shown is not None:
                    with watch.aside():
                        watch.sample(step, np.asarray(shown))
                if stopped:
                    break
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
