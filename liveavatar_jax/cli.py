"""The `liveavatar-jax` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from liveavatar_jax.devices import prepare
from liveavatar_jax.parallel import hosts
from liveavatar_jax.types import LiveAvatarError

PHOTO = (
    "the built-in model has seen drawn puppets alone, and moves a photograph where a puppet has "
    "eyes and mouth: give a square crop of a frontal face, eyes just above the middle and mouth "
    "three quarters down, or convert the published weights, which are for real faces"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 = done, 1 = `doctor` found a fault, 2 = refused with one sentence,
    130 = interrupted."""
    args = _parser().parse_args(argv)
    try:
        if args.run not in (_plan, _doctor):  # one touches no device, one looks for them itself
            prepare(args)
        with hosts.guard():
            return args.run(args)
    except LiveAvatarError as error:
        print(f"liveavatar-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("liveavatar-jax: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="liveavatar-jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(run.__name__.strip("_"), help=text, description=text)
        p.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="default: the best there is")
        p.set_defaults(run=run)
        return p

    p = command(_generate, "Make a video of a portrait that speaks a recording.")
    p.add_argument("--image", type=Path, help="portrait: jpg, png, ... (default: the model's own)")
    p.add_argument("--audio", type=Path, help="speech: wav, mp3, ... (default: the model's own)")
    p.add_argument("--out", type=Path, default=Path("avatar.mp4"), help="the mp4 file to write "
                   "(default: %(default)s)")  # fmt: skip
    p.add_argument("--prompt", help="what the video shows (default: a person who speaks)")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, help="folder made by `liveavatar-jax convert`")
    source.add_argument("--preset", metavar="NAME", help="a built-in model (default: puppet)")
    p.add_argument("--size", help="pixels of the picture, as WIDTH*HEIGHT, in the portrait's "
                   "shape (default: 720*400, or what the model knows)")  # fmt: skip
    p.add_argument("--scale", type=int, metavar="N", help="times the picture's size is the video's "
                   "(default: 1, or what makes a small model's visible)")  # fmt: skip
    p.add_argument("--fit", choices=("cover", "published"), default="cover", help="no borders, or "
                   "the released code's black rows (default: %(default)s)")  # fmt: skip
    p.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's, 4)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="default: float32 on a CPU, bfloat16 elsewhere")  # fmt: skip
    p.add_argument("--mesh", help="devices to use, such as stage=4,vae=1 or stage=4,tensor=2; one "
                   "stage a denoising step (default: one device)")  # fmt: skip
    p.add_argument("--warm", type=int, default=0, metavar="N", help="make the first N blocks on "
                   "all stages at once: an earlier first frame (default: 0)")  # fmt: skip
    p.add_argument("--quantise", choices=("int8", "fp8"), help="weights and products of the DiT's "
                   "blocks in 8 bits: half the memory (default: no)")  # fmt: skip
    p.add_argument("--badge", action="store_true", help='"AI" in a corner of every frame')
    p.add_argument("--certificate", type=Path, help="PEM chain that signs the file (C2PA)")
    p.add_argument("--certificate-key", type=Path, help="its ES256 key")
    hosts.add_arguments(p)

    p = command(_convert, "Convert the published weights; an interrupted run goes on.")
    p.add_argument("--base", type=Path, required=True, help="the downloaded Wan2.2-S2V-14B folder")
    p.add_argument("--lora", type=Path, help="LoRA of Live Avatar: file, or folder with one")
    p.add_argument("--lora-alpha", type=float, help="default: as stored, else half the rank")
    p.add_argument("--out", type=Path, required=True, help="folder to make")

    p = command(_encode, "Encode clips into shards for training; an interrupted run goes on.")
    p.add_argument("--list", type=Path, required=True, help="csv: AVSpeech's columns, or with a "
                   "header of id or file, start, end, x, y, caption")  # fmt: skip
    p.add_argument("--clips", type=Path, required=True, help="folder of the clips' files")
    p.add_argument("--out", type=Path, required=True, help="folder of the shards")
    p.add_argument("--weights", type=Path, required=True,
                   help="folder made by `liveavatar-jax convert`")  # fmt: skip
    p.add_argument("--size", default="720*400", help="pixels, as WIDTH*HEIGHT, multiples of 16 "
                   "(default: %(default)s)")  # fmt: skip
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                   help="of the windows, as latents=21 stride=84 least_past=0")  # fmt: skip
    p.add_argument("--caption", help="of clips without one (default: a person who speaks)")
    p.add_argument("--negative", metavar="TEXT", help="what guidance leans away from in training; "
                   "its rows go to OUT/negative.safetensors")  # fmt: skip
    p.add_argument("--scores", type=Path, help="csv or json: numbers about clips, by id")
    p.add_argument("--require", nargs="+", action="extend", default=[], metavar="SCORE>=N",
                   help="of a clip's scores, as 'sync>=3' 'quality>=40'")  # fmt: skip
    p.add_argument("--part", default="1/1", metavar="I/N", help="of the list, to share it out "
                   "among machines or devices (default: all)")  # fmt: skip
    p.add_argument("--per-shard", type=int, default=64, metavar="CLIPS",
                   help="of the list (default: %(default)s)")  # fmt: skip
    p.add_argument("--workers", type=int, help="processes that decode (default: one a core, 8)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="of the VAE (default: float32 on a CPU, bfloat16 elsewhere)")  # fmt: skip

    p = command(_evaluate, "Judge a model, or finished videos: GenBench's protocol.")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, help="folder made by `liveavatar-jax convert`")
    source.add_argument("--preset", metavar="NAME", help="a built-in model (default: puppet)")
    source.add_argument("--videos", type=Path, help="folder of finished videos, ID.mp4 each")
    p.add_argument("--clips", type=Path, required=True, help="csv with a header: id,image,audio "
                   "and, where there are, file,caption,truth")  # fmt: skip
    p.add_argument("--out", type=Path, required=True, help="folder of the report")
    p.add_argument("--protocol", choices=("short", "long", "horizon"), default="short",
                   help="once, 5 minutes, or windows up to 10000 s (default: short)")  # fmt: skip
    p.add_argument("--limit", type=int, metavar="N", help="the first N clips of the list")
    p.add_argument("--seconds", type=float, help="of each stream at most; of long ones exactly")
    p.add_argument("--readers", type=Path, metavar="FILE", help="networks that read puppets "
                   "(default: readers.safetensors beside the weights)")  # fmt: skip
    p.add_argument("--faces", action="store_true", help="look at real faces (extra `faces`)")
    p.add_argument("--embeddings", type=Path, metavar="DIR", help="ID.npz each: sync_video and "
                   "sync_audio, NAME and NAME_reference")  # fmt: skip
    p.add_argument("--real", nargs="+", action="extend", default=[], metavar="NAME=FILE",
                   help="real features for Fréchet distances, as fid=inception.npz")  # fmt: skip
    p.add_argument("--size", help="pixels of a picture, as WIDTH*HEIGHT (default: as generate)")
    p.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                   help="of the model's config, as stream.history=0.0")  # fmt: skip
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rows", type=int, metavar="N", help="streams at once (default: 8 of small "
                   "pictures, else 1)")  # fmt: skip
    p.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="default: float32 on a CPU, bfloat16 elsewhere")  # fmt: skip
    p.add_argument("--no-timing", action="store_true", help="do not time `generate` as well")

    p = command(_bench, "Time every component, compiled, on random weights.")
    p.add_argument("--sizes", nargs="+", default=["laptop"], metavar="NAME",
                   help="tiny, laptop, 14b, puppet (default: laptop)")  # fmt: skip
    p.add_argument("--only", nargs="+", metavar="COMPONENT", help="audio, prefill, denoise, ...")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--json", type=Path, help="write the figures there, too")

    p = command(_plan, "What a mesh of chips would give, without having one.")
    p.add_argument("--train", metavar="CONFIG", help="plan the steps of this experiment, as "
                   "configs/distill_pod.py (from the root of the project)")  # fmt: skip
    p.add_argument("--topology", metavar="CHIP:SHAPE", default="v5p:4x4x4", help="for --train: a "
                   "slice of TPUs, or h100:64 (default: %(default)s)")  # fmt: skip
    p.add_argument("--mesh", help="default: stage=4,vae=1, or that of the experiment")
    p.add_argument("--chip", default="h800", help="h100, h800, h200, b200, v5e, v5p, v6e "
                   "(default: %(default)s)")  # fmt: skip
    p.add_argument("--weights", choices=("bf16", "int8", "fp8"), default="bf16")
    p.add_argument("--size", default="720*400", help="pixels, as WIDTH*HEIGHT (default: "
                   "%(default)s)")  # fmt: skip
    p.add_argument("--sessions", type=int, nargs="+", default=[1], metavar="N",
                   help="at once; the first number is compiled (default: 1)")  # fmt: skip
    p.add_argument("--steps", type=int, nargs="+", metavar="N",
                   help="to project (default: 2, 3, 4 and the mesh's stages)")  # fmt: skip
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="ROOM.FIELD=VALUE",
                   help="of the model's config, as dit.layers=60 stream.steps=2; with --train of "
                   "the experiment's, as data.batch=16 model.dit.remat=full")  # fmt: skip
    p.add_argument("--no-compile", action="store_true", help="count only; needs no extra")
    p.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS",
                   help="for each program to compile (default: %(default)g)")  # fmt: skip
    p.add_argument("--json", type=Path, help="write the figures there, too")

    said = lambda name: os.environ.get(f"AVATAR_SERVE_{name}", "")  # as `python -m serve` has it
    p = command(_doctor, "Look whether all is there to make videos, and to serve them.")
    p.add_argument("--weights", type=Path, default=said("WEIGHTS") or None,
                   help="folder made by `liveavatar-jax convert`")  # fmt: skip
    p.add_argument("--host", default=said("HOST") or "127.0.0.1", help="of the server (default: "
                   "%(default)s)")  # fmt: skip
    p.add_argument("--port", type=int, default=said("PORT") or 8080, help="(default: %(default)s)")
    p.add_argument("--udp", metavar="RANGE", default=said("UDP"), help="as 50000-50099")
    p.add_argument("--ice", metavar="URL,URL", default=said("ICE"), help="stun: and turn: servers")
    p.add_argument("--turn-secret", metavar="TEXT", default=said("TURN_SECRET"))
    p.add_argument("--turn-user", metavar="NAME", default=said("TURN_USER"))
    p.add_argument("--turn-password", metavar="TEXT", default=said("TURN_PASSWORD"))
    p.add_argument("--certificate", type=Path, metavar="FILE", default=said("CERTIFICATE") or None,
                   help="chain that signs files")  # fmt: skip
    p.add_argument("--json", action="store_true", help="for programs, instead of the table")
    return parser


def _generate(args: argparse.Namespace) -> int:
    from liveavatar_jax.data.image import parse_size
    from liveavatar_jax.generate import Request, generate
    from liveavatar_jax.weights import packed

    if args.steps is not None and args.steps < 1:
        raise LiveAvatarError(f"--steps {args.steps} must be at least 1")
    if args.warm < 0:
        raise LiveAvatarError(f"--warm {args.warm} must be at least 0")
    if args.scale is not None and not 1 <= args.scale <= 16:
        raise LiveAvatarError(f"--scale {args.scale} must lie within 1..16")
    if not 0 <= args.seed < 2**32:
        raise LiveAvatarError(f"--seed {args.seed} must lie within 0..{2**32 - 1}")
    if (args.certificate is None) != (args.certificate_key is None):
        raise LiveAvatarError("--certificate and --certificate-key go together; give both")
    weights = args.weights or packed.preset(args.preset or packed.PRESET)
    image = args.image or packed.own(weights, packed.PORTRAIT, "portrait with --image")
    audio = args.audio or packed.own(weights, packed.SPEECH, "recording with --audio")
    if args.weights is None and args.image is not None and hosts.is_first():
        print(f"liveavatar-jax: {PHOTO}", file=sys.stderr)
    report = generate(
        Request(
            image=image,
            audio=audio,
            out=args.out,
            weights=weights,
            prompt=args.prompt,
            area=None if args.size is None else parse_size(args.size),
            fit=args.fit,
            steps=args.steps,
            seed=args.seed,
            dtype=args.dtype,
            quantise=args.quantise,
            mesh=args.mesh,
            warm=args.warm,
            scale=args.scale,
            badge=args.badge,
            signed=args.certificate and (args.certificate, args.certificate_key),
        )
    )
    if hosts.is_last():
        print(report)
    return 0 if report.finished else 130


def _convert(args: argparse.Namespace) -> int:
    from liveavatar_jax.weights.convert import convert

    convert(args.base, args.lora, args.out, alpha=args.lora_alpha)
    print(f"{args.out}: ready for `liveavatar-jax generate --weights {args.out}`")
    return 0


def _encode(args: argparse.Namespace) -> int:
    try:
        from liveavatar_jax.encode import Request, encode, parse_part, parse_windows
    except ImportError as error:
        raise LiveAvatarError(f"{error.name} is missing; install liveavatar-jax[train]") from None

    for name in ("per_shard", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise LiveAvatarError(f"--{name.replace('_', '-')} {value} must be at least 1")
    report = encode(
        Request(
            list=args.list,
            folder=args.clips,
            out=args.out,
            weights=args.weights,
            windows=parse_windows(args.size, args.set),
            caption=args.caption,
            scores=args.scores,
            demands=tuple(args.require),
            part=parse_part(args.part),
            per_shard=args.per_shard,
            workers=args.workers,
            dtype=args.dtype,
            negative=args.negative,
        )
    )
    print(report)
    if not report.windows:
        raise LiveAvatarError(f"no clip could be used; {args.out} tells why, clip by clip")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from liveavatar_jax.data.image import parse_size
    from liveavatar_jax.evaluate import evaluate
    from liveavatar_jax.protocol import Request
    from liveavatar_jax.weights import packed

    if not 0 <= args.seed < 2**32:
        raise LiveAvatarError(f"--seed {args.seed} must lie within 0..{2**32 - 1}")
    weights = args.weights
    if weights is None and args.videos is None:
        weights = packed.preset(args.preset or packed.PRESET)
    real = {}
    for text in args.real:
        name, given, file = text.partition("=")
        if not (name and given and file):
            raise LiveAvatarError(f"--real {text!r} is not NAME=FILE, as in fid=inception.npz")
        real[name] = Path(file)
    report = evaluate(
        Request(
            clips=args.clips,
            out=args.out,
            weights=weights,
            videos=args.videos,
            protocol=args.protocol,
            limit=args.limit,
            seconds=args.seconds,
            readers=args.readers,
            faces=args.faces,
            embeddings=args.embeddings,
            real=real,
            area=None if args.size is None else parse_size(args.size),
            steps=args.steps,
            changes=tuple(args.set),
            seed=args.seed,
            rows=args.rows,
            dtype=args.dtype,
            timing=not args.no_timing,
        )
    )
    print(report)
    return 0 if report.finished else 130


def _bench(args: argparse.Namespace) -> int:
    from liveavatar_jax.bench import bench

    print(bench(args.sizes, args.only, args.repeats, args.json))
    return 0


def _plan(args: argparse.Namespace) -> int:
    if args.train is not None:
        return _plan_training(args)
    from liveavatar_jax.plan.report import Request, plan
    from liveavatar_jax.plan.table import to_json, to_text

    report = plan(
        Request(
            mesh=args.mesh or "stage=4,vae=1",
            chip=args.chip,
            weights=args.weights,
            size=args.size,
            sessions=args.sessions,
            steps=args.steps,
            changes=args.set,
            compile=not args.no_compile,
            timeout=args.timeout,
        )
    )
    print(to_text(report))
    _write(args.json, to_json(report))
    return 0


def _plan_training(args: argparse.Namespace) -> int:
    sys.path.insert(0, str(Path.cwd()))  # where `train` lies beside the configs
    try:
        from liveavatar_jax.plan.pod import Request, plan
        from liveavatar_jax.plan.podtable import to_json, to_text
    except ModuleNotFoundError as error:
        raise LiveAvatarError(
            f"--train needs {error.name}: run it from the root of the project, with the extra "
            "`liveavatar-jax[train]`"
        ) from None
    report = plan(
        Request(
            config=args.train,
            topology=args.topology,
            mesh=args.mesh,
            changes=args.set,
            size=args.size,
            compile=not args.no_compile,
            timeout=args.timeout,
        )
    )
    print(to_text(report))
    _write(args.json, to_json(report))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from liveavatar_jax.doctor import doctor

    return doctor(args)


def _write(file: Path | None, values: dict) -> None:
    import json

    try:
        if file is not None:
            file.write_text(json.dumps(values, indent=1))
    except OSError as error:
        raise LiveAvatarError(f"{file}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
