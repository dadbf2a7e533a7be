"""Looks whether all is there to make videos and to serve them, and says what to do where not."""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import av
import jax

from liveavatar_jax.config import ModelConfig
from liveavatar_jax.devices import prepare
from liveavatar_jax.paths import leaves
from liveavatar_jax.plan.cost import Size, held
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import checkpoint, files, packed
from liveavatar_jax.weights.convert import TOKENIZER

OK, WARN, FAIL = "ok", "warn", "fail"
NAME, GIB = "liveavatar-jax", 2**30
PATIENCE, WAIT = 60.0, 3.0  # seconds for a check, and for another machine's answer
SOON = 30  # days
NVIDIA = Path("/dev/nvidia0")


class Seen(NamedTuple):
    """What a check returns. One that fails may raise LiveAvatarError: "seen; todo"."""

    state: str
    seen: str
    todo: str = ""


def doctor(args: argparse.Namespace) -> int:
    """Prints what the checks saw; 0 = nothing fails, 1 = something does."""
    found = [(what, _attempt(partial(check, args))) for what, check in CHECKS.items()]
    if dict(found)["serve"].state == OK:
        found += [(what, _attempt(check)) for what, check in _serving(args)]
    count = Counter(seen.state for _, seen in found)
    if args.json:
        checks = [{"what": what, **seen._asdict()} for what, seen in found]
        print(json.dumps({"ok": not count[FAIL], "checks": checks}, indent=1))
    else:
        for what, seen in found:
            print(f"{what:13} {seen.state:4}  {seen.seen}")
            if seen.todo:
                print(f"{'':20}-> {seen.todo}")
        print(f"{len(found)} checks: {count[FAIL]} fail, {count[WARN]} warn")
    return int(count[FAIL] > 0)


def _attempt(check: Callable[[], Seen]) -> Seen:
    """What a check sees, also where it raises or never answers."""
    found = [Seen(FAIL, f"no answer within {PATIENCE:g} s")]

    def work() -> None:
        try:
            found.append(check())
        except LiveAvatarError as error:
            seen, _, todo = str(error).partition("; ")
            found.append(Seen(FAIL, seen, todo))
        except BaseException as error:  # extensions raise others than Exception
            said = (str(error).strip() or "no more is known").splitlines()[0]
            found.append(Seen(FAIL, f"{type(error).__name__}: {said}", "please report this one"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[-1]


# ---- to make videos


def _packages(extra: str, args: argparse.Namespace) -> Seen:
    """Python and what is needed, or what an extra needs beside that."""
    from packaging.requirements import Requirement

    there, faults = {}, []
    python = f"Python{metadata.metadata(NAME)['Requires-Python'] or ''}"
    for need in map(Requirement, [python, *(metadata.requires(NAME) or ())]):
        bare = need.marker is None or need.marker.evaluate({"extra": ""})
        within = need.marker is not None and need.marker.evaluate({"extra": extra})
        if bare == bool(extra) or not (bare or within):
            continue
        try:
            own = need.name == "Python"
            version = platform.python_version() if own else metadata.version(need.name)
            there[need.name] = version
            if not need.specifier.contains(version, prereleases=True):
                faults.append(f"{need.name} {version} is not {need.specifier}")
        except metadata.PackageNotFoundError:
            faults.append(f"{need.name} is missing")
    if faults:
        which = f"{NAME}[{extra}], to serve" if extra else f"{NAME} anew"
        return Seen(WARN if extra else FAIL, ", ".join(faults), f"install {which}")
    shown = [x for x in ("Python", "jax", "flax", "aiortc", "uvicorn") if x in there]
    first = ", ".join(f"{name} {there[name]}" for name in shown)
    return Seen(OK, f"{first}, {len(there) - len(shown)} more, all in their ranges")


def _devices(args: argparse.Namespace) -> Seen:
    try:
        prepare(args)
    except LiveAvatarError:
        prepare(argparse.Namespace(device="cpu"))  # for the checks after this one
        raise
    local, cpu = jax.local_devices(), jax.default_backend() == "cpu"
    kinds = Counter(f"CPU, {os.cpu_count()} cores" if cpu else d.device_kind for d in local)
    seen = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    seen += "" if cpu else f", {_size(min(_room()))} free on each"
    seen += f", {_size(_free())} of the host free"
    if cpu and NVIDIA.exists() and args.device != "cpu":
        return Seen(WARN, f"{seen}, but JAX does not see the NVIDIA GPU of this machine",
                    f"install {NAME}[cuda]; --device gpu tells more")  # fmt: skip
    return Seen(WARN, seen, "end others, to compile") if _free() < GIB else Seen(OK, seen)


def _model(args: argparse.Namespace) -> Seen:
    folder = args.weights or packed.preset()
    cfg, text = checkpoint.load_config(folder), (folder / TOKENIZER).is_file()
    networks = ["dit", "vae", *["text"] * text, *["speech"] * (cfg.log_mel is None)]
    if bad := _damaged(folder, networks):
        raise LiveAvatarError(f"{folder}: {', '.join(bad[:3])}{', ...' * (len(bad) > 3)} missing "
                              "or cut off; copy or convert it anew")  # fmt: skip
    room = _room()
    need = _needed(cfg, networks, "float32" if jax.default_backend() == "cpu" else "bfloat16")
    seen = f"{folder.name} is whole, one session keeps {_size(need)} of {_size(max(room))} free"
    if need < 0.8 * max(room):
        return Seen(OK, seen)
    todo = "share it out with --mesh, or generate with --quantise; `liveavatar-jax plan` counts"
    return Seen(FAIL if need > sum(room) else WARN, seen, todo)


def _cache(args: argparse.Namespace) -> Seen:
    where = Path(_kept() or "")
    doors = [path for path in (where, where.parent) if path.is_dir()]
    if not (_kept() and doors):
        return Seen(WARN, "none, every run compiles anew", "make the home folder (XDG_CACHE_HOME) "
                    "writable; with several CPU devices there is none on purpose")  # fmt: skip
    stats = [path.stat() for path in doors]
    if any(stat.st_uid not in (0, os.getuid()) for stat in stats):
        raise LiveAvatarError(f"{where} is another user's, who so can run code here; remove it")
    if all(stat.st_mode & 0o077 for stat in stats):
        state = FAIL if stats[0].st_mode & 0o022 else WARN
        can = "put programs there that run here" if state == FAIL else "read it"
        return Seen(state, f"{where}: others can {can}", f"chmod 700 {doors[0]}")
    kept = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
    return Seen(OK, f"{where}, private, {_size(kept)}")


def _disk(args: argparse.Namespace) -> Seen:
    cache = Path(_kept() or ".").absolute()
    place = next(path for path in (cache, *cache.parents) if path.is_dir())
    here, there = shutil.disk_usage(".").free, shutil.disk_usage(place).free
    seen, least = f"{_size(here)} free here, {_size(there)} for the cache", min(here, there)
    state = OK if least >= GIB else WARN if least >= GIB / 10 else FAIL
    return Seen(state, seen, "" if state == OK else "make room")


def _codecs(args: argparse.Namespace) -> Seen:
    names = ["libx264", "aac", "libvpx", "libopus", *["h264_nvenc"] * NVIDIA.exists()]
    missing = [name for name in names if name not in av.codecs_available]
    if not missing:
        return Seen(OK, ", ".join(names))
    state = FAIL if {"libx264", "aac"} & {*missing} else WARN  # without the others: no calls
    return Seen(state, f"FFmpeg lacks {', '.join(missing)}", "install the wheel of PyAV (av) anew")


CHECKS: dict[str, Callable[[argparse.Namespace], Seen]] = {
    "python": partial(_packages, ""), "devices": _devices, "model": _model,
    "compile cache": _cache, "disk": _disk, "codecs": _codecs, "serve": partial(_packages, "serve"),
}  # fmt: skip


# ---- to serve


def _serving(args: argparse.Namespace) -> list[tuple[str, Callable[[], Seen]]]:
    urls = [url.strip() for url in args.ice.split(",") if url.strip()]
    login = (args.turn_user, args.turn_password)
    if args.turn_secret:
        from serve import ice  # it wants the extra

        login = tuple(ice.login(args.turn_secret, "doctor", 2 * PATIENCE).values())
    return [
        ("port", partial(_port, args.host, args.port)),
        *[("udp", partial(_udp, args.udp))] * bool(args.udp),
        *[("ice", partial(_ice, url, *login)) for url in urls],
        *[("certificate", partial(_certificate, args.certificate))] * bool(args.certificate),
    ]


def _port(host: str, port: int) -> Seen:
    if not 0 <= port < 65536:
        raise LiveAvatarError(f"--port {port} does not exist; ports lie in 0..65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        said = str(error).partition(" (while")[0]
        raise LiveAvatarError(f"{host}:{port}: {said}; unless it is this server that runs already, "
                              "name another --port or --host") from None  # fmt: skip
    return Seen(OK, f"{host}:{port} is free")


def _udp(ports: str) -> Seen:
    ends = re.fullmatch(r"(\d{1,5})-(\d{1,5})", ports)
    first, last = map(int, ends.groups()) if ends else (0, 0)
    if not 0 < first <= last < 65536:
        raise LiveAvatarError(f"--udp {ports} is no range of ports; write it as 50000-50099")
    free = 0
    for port in range(first, last + 1):
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as udp:
            udp.bind(("", port))
            free += 1
    state = OK if free == last + 1 - first else WARN if free else FAIL
    seen = f"{free} of {last + 1 - first} ports are free, a call takes one an address of this host"
    return Seen(state, seen, "" if state == OK else "use another range, and open it to the outside")


def _ice(url: str, user: str, password: str) -> Seen:
    from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection

    async def gathered() -> list[str]:
        """Addresses that a call would have by this server."""
        peer = RTCPeerConnection(RTCConfiguration([RTCIceServer(url, user, password)]))
        try:
            peer.createDataChannel("")
            await peer.setLocalDescription(await peer.createOffer())
            return re.findall(r"(\S+ \d+) typ (?:srflx|relay)", peer.localDescription.sdp)
        finally:
            await peer.close()

    turn = url.startswith("turn")
    if turn and not (user and password):
        raise LiveAvatarError(f"{url}: TURN wants a user; give --turn-secret, or --turn-user and "
                              "--turn-password")  # fmt: skip
    try:
        found = asyncio.run(asyncio.wait_for(gathered(), WAIT))
    except TimeoutError:
        raise LiveAvatarError(f"{url}: no answer within {WAIT:g} s; start it, or open its port: "
                              "every call waits a second for it") from None  # fmt: skip
    except ValueError:
        found = []
    if not found:
        raise LiveAvatarError(f"{url} gives no address; is it up, are name and password or secret "
                              "right? (stun:HOST:PORT or turn:HOST:PORT, no IPv6)")  # fmt: skip
    return Seen(OK, f"{url} {'relays from' if turn else 'sees us at'} {found[0].replace(' ', ':')}")


def _certificate(path: Path) -> Seen:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        chain = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or "no certificates in it"
        raise LiveAvatarError(f"{path}: {said}; give a readable chain in PEM") from None
    left = min(one.not_valid_after_utc for one in chain) - datetime.now(UTC)
    seen = f"{chain[0].subject.rfc4514_string()}, {left.days} days left"
    if left.days < SOON:
        return Seen(WARN if left.total_seconds() > 0 else FAIL, seen, "renew it")
    key = chain[0].public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        return Seen(WARN, f"{seen}, but not for ES256", "take a P-256 key to sign files")
    return Seen(OK, seen)


def _kept() -> str | None:
    """The folder of compiled programs."""
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]


# ---- bytes


def _size(n: int | float) -> str:
    return f"{n / GIB:.1f} GiB" if n >= GIB else f"{n / 2**20:.0f} MiB"


def _room() -> list[int | float]:
    """Free bytes of each device; those of the host where devices have none of their own."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    own = all("bytes_limit" in stat for stat in stats)
    return [x["bytes_limit"] - x.get("bytes_in_use", 0) for x in stats] if own else [_free()]


def _free() -> float:
    """Bytes of the host's memory that can be had, within the limit of a container."""
    info, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not info.exists():  # no Linux
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    free = 1024 * float(re.findall(r"MemAvailable:\s+(\d+)", info.read_text())[0])
    most = limit.read_text().strip() if limit.exists() else "max"
    return free if most == "max" else min(free, float(most))


def _damaged(folder: Path, networks: list[str]) -> list[str]:
    """Files that are missing or cut off."""
    listed = folder / "files.json"
    sizes = json.loads(listed.read_text()) if listed.is_file() else {}
    bad = [x for x, n in sizes.items()
           if not (folder / x).is_file() or (folder / x).stat().st_size != n]  # fmt: skip
    paths = [packed.file_of(folder, which) for which in networks
             if not any(name.startswith(f"{which}/") for name in sizes)]  # fmt: skip
    return bad + [path.name for path in paths if not path.is_file() or files.read(path).faults]


def _needed(cfg: ModelConfig, networks: list[str], dtype: str) -> int | float:
    """Of weights, rings and sink of one session; without what a step works with."""
    kinds = {which: dtype if which in ("dit", "vae") else None for which in networks}
    weights = sum(leaf.size * leaf.dtype.itemsize for which, kind in kinds.items()
                  for leaf in leaves(checkpoint.abstract(cfg, which, kind)).values())  # fmt: skip
    kept = held(cfg, Size(*(2 * [cfg.size // 8] if cfg.size else (48, 88))))  # 720*400
    keys = kept["ring"] * cfg.stream.rings + kept["sink"] + kept["prompt"]  # in 16 bits
    return weights + keys * (2 if dtype == "float32" else 1)
