"""A run from the command line: devices, base, data, checkpoints and reports around a loop."""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from liveavatar_jax.config import change
from liveavatar_jax.data.clips import Batches, open_clips, open_synthetic
from liveavatar_jax.data.records import Shapes
from liveavatar_jax.devices import prepare
from liveavatar_jax.models.attention import Layout
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.models.vae import VAE
from liveavatar_jax.parallel import hosts
from liveavatar_jax.parallel.batches import place, rows_of
from liveavatar_jax.parallel.mesh import TrainMesh
from liveavatar_jax.parallel.sharding import layout, trained
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.plan.training import model_flops
from liveavatar_jax.types import Array, LiveAvatarError
from liveavatar_jax.weights import checkpoint, files
from train.checkpoints import Checkpoints
from train.experiment import Distill, Forcing
from train.export import read_lora
from train.metrics import Watch, parse_profile
from train.networks import Frozen, fresh, initial
from train.sample import decoded, sampled
from train.signals import Stop, stopping

# What a run may change when it goes on: where it runs and how it is watched, not what it learns.
MAY_DIFFER = ("mesh", "steps", "save_every", "keep", "keep_every", "sample_every", "weights",
              "start", "data.sources", "data.threads", "data.ahead", "data.broken_share",
              "model.dit.remat", "model.dit.attention")  # fmt: skip


def command(
    text: str | None, kind: type, train: Callable[["Run"], int], argv: Sequence[str] | None = None
) -> int:
    """Runs a stage; 0 = done or asked to stop, 2 = refused with one sentence, 130 = interrupted."""
    args = _parser(text).parse_args(argv)
    try:
        prepare(args)
        with hosts.guard(), Run(args, kind) as run:
            return train(run)
    except LiveAvatarError as error:
        print(f"{kind.__name__.lower()}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a file with `def config()`")
    parser.add_argument("--out", required=True, help="folder of the run, or a bucket as gs://B/RUN "
                        "(reports stay in ./runs/RUN then); goes on there")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                        help="of the experiment, as data.batch=64 or steps=10")  # fmt: skip
    parser.add_argument("--mesh", help="such as data=2,fsdp=16,sequence=2 or dcn_data=2,fsdp=64")
    parser.add_argument("--resume-step", type=int, metavar="N", help="default: the newest")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="steps to trace into the run")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="of a device, in bf16, for "
                        "the utilisation (default: known ones)")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="default: the best")
    hosts.add_arguments(parser)
    return parser


def load(path: Path, kinds: tuple[type, ...], changes: Sequence[str] = ()) -> Any:
    """The experiment that a config file builds, with changes; `kinds` are those it may be of.

    Raises LiveAvatarError when the file is missing, builds something else, or a change does not
    fit.
    """
    if not path.is_file():
        raise LiveAvatarError(f"{path} is not there; name a config file, as configs/*.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise LiveAvatarError(f"{path} is not a .py file; name a config file, as configs/*.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        experiment = module.config()
    except LiveAvatarError:
        raise
    except Exception as error:
        raise LiveAvatarError(f"{path} fails: {type(error).__name__}: {error}") from None
    if type(experiment) not in kinds:
        wanted = " or a ".join(kind.__name__ for kind in kinds)
        raise LiveAvatarError(
            f"{path}: config() returns a {type(experiment).__name__}, this stage takes a {wanted}"
        )
    return change(experiment, changes)


class Run:
    """What a loop works with. A context manager: what is being saved is waited for at the end."""

    def __init__(self, args: argparse.Namespace, kind: type):
        experiment: Any = load(args.config, (kind,), args.set)
        if args.mesh is not None:
            experiment = dataclasses.replace(experiment, mesh=TrainMesh.parse(args.mesh))
        self.experiment, self.args = experiment, args
        exp: Forcing = experiment
        exp.mesh.check(exp.model.dit, exp.data.batch // exp.accumulate)
        if exp.sample_every is not None and exp.weights is None:
            raise LiveAvatarError("sample_every needs the decoder of `weights`; leave one out")
        self.mesh = exp.mesh.make()
        self.layout: Layout = layout(self.mesh)
        self.profile = None if args.profile is None else parse_profile(args.profile)

    def __enter__(self) -> "Run":
        exp = self.experiment
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.set_mesh(self.mesh))
            steps = Checkpoints(
                self.args.out, exp, keep=exp.keep, keep_every=exp.keep_every, may_differ=MAY_DIFFER
            )
            self._save = stack.enter_context(steps)
            self.data = self._open()
            stack.callback(self.data.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # ---- before the loop

    def frozen(self) -> Frozen:
        """The base on its devices: converted weights, or random ones of the seed."""
        exp = self.experiment
        if exp.weights is None:
            make = lambda: fresh(exp.model.dit, exp.seed)
            base = jax.jit(make, out_shardings=trained(jax.eval_shape(make), self.mesh))()
        else:
            base = self._stored(exp.weights, exp.model.dit.param_dtype)
        return Frozen(base=base, negative=self._negative())

    def begin(self, start: Callable[..., Any], frozen: Frozen) -> tuple[Any, int]:
        """The state of the newest step on its devices, or that before the first, and its number."""
        shapes = jax.eval_shape(start, frozen)
        places = trained(shapes, self.mesh)
        latest = self._save.latest or 0
        if jax.process_count() > 1 and int(hosts.broadcast(np.int32(latest))) != latest:
            raise LiveAvatarError(
                f"{self.args.out}: not all processes see the same steps there; name a folder that "
                "they share"
            )
        if latest:
            place = lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at)
            state, position = self._save.restore(
                jax.tree.map(place, shapes, places), self.args.resume_step
            )
            self.data.restore(position)
            done = self.args.resume_step or latest
            if hosts.is_first():
                print(f"{self.args.out}: goes on after step {done}", file=sys.stderr)
            return state, done
        if self.args.resume_step is not None:
            raise LiveAvatarError(f"--resume-step: {self.args.out} has no step to go on from")
        given = () if self.experiment.start is None else (self._student(frozen),)
        return jax.jit(start, out_shardings=places)(frozen, *given), 0

    def compiled(self, step: Callable[..., Any], state: Any) -> Callable[..., Any]:
        """A step whose state is donated and stays where it lies."""
        places = jax.tree.map(lambda a: a.sharding, state)
        return jax.jit(step, donate_argnums=1, out_shardings=(places, None))

    # ---- in the loop

    @contextlib.contextmanager
    def watching(self, done: int) -> Iterator[tuple[Watch, Stop]]:
        """Reports of the steps from `done` on, and the signals that end the loop."""
        peak = None if self.args.peak is None else 1e12 * self.args.peak
        out = Path(self.args.out)
        watch = Watch(
            Path("runs", out.name) if "://" in self.args.out else out,
            self.experiment.steps, start=done, peak=peak, profile=self.profile,
            last_good=lambda: self._save.latest,
        )  # fmt: skip
        with watch, stopping() as stop:
            yield watch, stop
        for report in self.data.reports:
            if report.broken and hosts.is_first():
                print(report, file=sys.stderr)

    def flops(self, sides: Sequence[str]) -> dict[str, float]:
        """Model FLOPs of a step in which these sides learn, by phase, on all devices."""
        counted = self._flops
        return {f"{side}/{phase}" if len(counted) > 1 else phase: value
                for side in sides for phase, value in counted[side].items()}  # fmt: skip

    def next_batch(self) -> dict[str, Array]:
        """The next global batch, each row on its devices. Raises if a save has failed meanwhile."""
        self._save.check()
        self.batch = place(next(self.data), self.mesh, self.experiment.data.batch)
        return self.batch

    def due(self, step: int) -> bool:
        """Whether this step is to be saved."""
        return step % self.experiment.save_every == 0 or step == self.experiment.steps

    def save(self, step: int, state: Any) -> None:
        self._save.save(step, state, self.data.state())

    def due_sample(self, step: int) -> bool:
        every = self.experiment.sample_every
        return every is not None and step % every == 0

    def sample(self, watch: Watch, step: int, frozen: Frozen, state: Any) -> None:
        """A clip by the student as it is now, or on average, for the first row of the batch."""
        params = state.student.params if state.average is None else state.average
        made = (self.batch["still"], self._sampled(frozen, params, self.batch))
        if jax.process_count() > 1:
            made = multihost_utils.process_allgather(made, tiled=True)
        vae = self._vae  # read by all processes together
        if hosts.is_first():
            first = [np.asarray(x, np.float32)[:1] for x in made]
            with jax.set_mesh(Mesh(np.array(jax.local_devices()[:1]), ("device",))):
                watch.sample(step, decoded(vae, *first))

    # ---- parts

    def _open(self) -> Batches:
        exp = self.experiment
        rows = rows_of(self.mesh, exp.data.batch)
        if exp.synthetic is not None:
            self._require_fit(exp.synthetic)
            return open_synthetic(exp.data, exp.synthetic, rows=rows)
        data = open_clips(exp.data, rows=rows)
        self._require_fit(data.shapes)
        return data

    def _require_fit(self, has: Shapes) -> None:
        exp = self.experiment
        dit, size = exp.model.dit, exp.model.stream.block_frames
        blocks = (isinstance(exp, Distill) and exp.blocks) or has.f // size
        if blocks * size > has.f or (has.f % size and not getattr(exp, "blocks", None)):
            raise LiveAvatarError(
                f"clips of {has.f} latent frames do not make {blocks} whole blocks of {size}; "
                "encode longer ones, or change model.stream.block_frames or blocks"
            )
        if isinstance(exp, Distill) and exp.window is not None and exp.window > blocks:
            raise LiveAvatarError(f"window = {exp.window} must be at most the {blocks} blocks")
        if has.h % 2 or has.w % 2:
            raise LiveAvatarError(f"latents of {has.h} x {has.w} do not divide into patches of 2")
        wanted = {"c": dit.latent_channels, "layers": dit.audio_layers, "audio_dim": dit.audio_dim,
                  "text_dim": dit.text_dim}  # fmt: skip
        for name, value in wanted.items():
            if getattr(has, name) != value:
                raise LiveAvatarError(
                    f"the records have {name} = {getattr(has, name)}, and the model takes {value}; "
                    "encode the clips with the networks of this model"
                )

    def _stored(self, folder: str, dtype: str) -> CausalDiT:
        cfg, wanted = checkpoint.load_config(Path(folder)).dit, self.experiment.model.dit
        for field in dataclasses.fields(cfg):
            free = field.name in ("attention", "remat", "param_dtype")
            if not free and getattr(cfg, field.name) != getattr(wanted, field.name):
                raise LiveAvatarError(
                    f"model.dit.{field.name} is {getattr(wanted, field.name)}, and {folder} has "
                    f"{getattr(cfg, field.name)}; take the model of the weights"
                )
        shapes = jax.eval_shape(lambda: CausalDiT(wanted, rngs=nnx.Rngs(0)))
        places = leaves(trained(shapes, self.mesh))
        base = checkpoint.restore(Path(folder), "dit", places.__getitem__, dtype)
        return replace(shapes, leaves(base))

    def _student(self, frozen: Frozen) -> Any:
        """What the student begins with."""
        exp = self.experiment
        if exp.adapters is None:
            return self._stored(exp.start, "float32")
        factors, scale = read_lora(Path(exp.start), frozen.base, dtype="float32")
        wanted = jax.eval_shape(lambda base: initial(exp, base, jax.random.key(0)), frozen.base)
        theirs, ours = ({p: x.shape for p, x in leaves(t).items()} for t in (factors, wanted))
        if theirs != ours or scale != exp.adapters.scale:
            raise LiveAvatarError(
                f"{exp.start} is another LoRA than the experiment's (scale {scale} and "
                f"{exp.adapters.scale}, {len(theirs)} and {len(ours)} factors); set adapters to "
                "its rank, alpha and targets"
            )
        places = trained(factors, self.mesh)
        return jax.tree.map(jax.device_put, factors, places)

    def _negative(self) -> Array:
        dit, path = self.experiment.model.dit, self.experiment.negative
        rows = np.zeros((dit.text_len, dit.text_dim), np.float32)
        if path is not None:
            tensors = files.read(Path(path))
            if "text" not in tensors.stored:
                raise LiveAvatarError(
                    f'{path} has no tensor "text"; write the rows of the text encoder there'
                )
            found = tensors["text"]
            if found.ndim != 2 or found.shape[1] != dit.text_dim or len(found) > dit.text_len:
                raise LiveAvatarError(
                    f"{path}: text has shape {found.shape}; give at most {dit.text_len} rows of "
                    f"{dit.text_dim} from the text encoder"
                )
            rows[: len(found)] = found
        return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec()))

    @functools.cached_property
    def _flops(self) -> dict[str, dict[str, float]]:
        return model_flops(self.experiment, self.data.shapes)

    @functools.cached_property
    def _sampled(self) -> Callable[..., Array]:
        return jax.jit(functools.partial(sampled, self.experiment, self.layout))

    @functools.cached_property
    def _vae(self) -> VAE:
        """On a device of this process."""
        vae = checkpoint.restore(
            Path(self.experiment.weights), "vae", hosts.everywhere(), dtype="float32"
        )
        here = jax.local_devices()[0]
        return jax.tree.map(lambda a: jax.device_put(a.addressable_data(0), here), vae)
