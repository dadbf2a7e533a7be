"""What an operator decides: flags over environment (AVATAR_SERVE_...) over a TOML file."""

import argparse
import dataclasses
import ipaddress
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from liveavatar_jax.types import LiveAvatarError
from serve import ice
from serve.session import Limits

PREFIX = "AVATAR_SERVE_"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Each field is a flag (--max-body), a variable (AVATAR_SERVE_MAX_BODY) and a line of the
    file (max_body = ...). Lists are split at commas in flags and variables."""

    host: str = "127.0.0.1"
    port: int = 8080
    engine: str = "model"  # or "mock", which draws frames without a model
    weights: str = ""  # converted checkpoint; the built-in puppet when empty
    workers: int = 1  # engine processes
    slots: int = 1  # sessions of each
    size: str = "720*400"  # of models that know more than one
    device: str = ""  # cpu, gpu, tpu; the best when empty
    devices: tuple[str, ...] = ()  # numbers of GPUs or TPU chips, shared out over the workers
    mesh: str = ""  # of each worker, as stage=4,vae=1; one device when empty
    fake_devices: int = 0  # of a CPU, to try a mesh on
    quantise: str = ""  # int8 or fp8: the DiT's trunk, in 8 bits
    keys: tuple[str, ...] = ()  # of backends; none: open, which only loopback hosts may be
    secret: str = ""  # signs client tokens; a new one at each start when empty
    origins: tuple[str, ...] = ()  # other web pages that may call, as https://avatar.example
    uploads: str = "auto"  # portraits of callers: yes, no, or where only this machine calls
    consent: bool = False  # uploads need a consent record
    badge: bool = False  # "AI" in a corner of every frame
    certificate: str = ""  # PEM chain that signs files (C2PA), and its ES256 key
    certificate_key: str = ""
    tls_certificate: str = ""  # PEM chain for https://, and its key; else a proxy has them
    tls_key: str = ""
    max_body: int = 16_000_000  # bytes of a request
    rate: float = 2.0  # sessions that an address may create a second; and calls, and videos
    drain: float = 30.0  # seconds for who is there, on the way down
    ice: tuple[str, ...] = ()  # stun: and turn: URLs for browsers and us
    turn_secret: str = ""  # shared with it: each session gets a login that ends; else one for all
    turn_user: str = ""
    turn_password: str = ""
    udp: str = ""  # ports for WebRTC, as 50000-50099; any when empty
    livekit_url: str = ""  # ws: or wss: of a LiveKit server, whose dispatch sends sessions here
    livekit_key: str = ""  # of its API, and its secret
    livekit_secret: str = ""
    livekit_name: str = "avatar"  # under which dispatches ask for this server, and others like it
    jobs: str = ""  # folder of offline jobs; a temporary one when empty
    longest: float = Limits.longest
    idle: float = Limits.idle
    grace: float = Limits.grace
    lookahead: int = Limits.lookahead
    viewers: int = Limits.viewers
    busy: float = Limits.busy  # of real time, that one session more may make engine or front need

    def __post_init__(self):
        if self.engine not in ("model", "mock"):
            raise LiveAvatarError(f"engine = {self.engine!r} must be model or mock")
        if self.uploads not in ("auto", "yes", "no"):
            raise LiveAvatarError(f"uploads = {self.uploads!r} must be auto, yes or no")
        for name in ("workers", "slots", "lookahead", "max_body"):
            if getattr(self, name) < 1:
                raise LiveAvatarError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.quantise not in ("", "int8", "fp8"):
            raise LiveAvatarError(f"quantise = {self.quantise!r} must be int8 or fp8")
        if self.fake_devices < 0:
            raise LiveAvatarError(f"fake_devices = {self.fake_devices} must be at least 0")
        if len(self.devices) % self.workers:
            raise LiveAvatarError(
                f"devices = {','.join(self.devices)} cannot be shared out evenly over "
                f"{self.workers} workers"
            )
        for number in self.devices:
            if not number.isdecimal():
                raise LiveAvatarError(f"devices = {number!r} must be numbers, as 0,1,2,3")
        for name in ("longest", "idle", "grace", "rate", "drain", "busy"):
            if not 0 < getattr(self, name) < math.inf:
                raise LiveAvatarError(f"{name} = {getattr(self, name)} must be above 0, and finite")
        if self.viewers < 0:
            raise LiveAvatarError(f"viewers = {self.viewers} must be at least 0")
        ice.check(self)
        for names in (("certificate", "certificate_key"), ("tls_certificate", "tls_key")):
            if len({bool(getattr(self, name)) for name in names}) > 1:
                raise LiveAvatarError(f"{' and '.join(names)} go together; set both")
        self._livekit()
        if 0 < len(self.secret) < 16:
            raise LiveAvatarError("secret must have at least 16 characters; it can be guessed")
        if not 0 <= self.port < 65536:
            raise LiveAvatarError(f"port = {self.port} must lie in 0..65535")
        if not self.keys and not self.loopback:
            raise LiveAvatarError(
                f"host = {self.host} lets others in; set keys (AVATAR_SERVE_KEYS), or serve on "
                "127.0.0.1 behind a proxy that asks for one"
            )

    def _livekit(self) -> None:
        names = ("livekit_url", "livekit_key", "livekit_secret")
        missing = [name for name in names if not getattr(self, name)]
        if 0 < len(missing) < len(names):
            raise LiveAvatarError(f"livekit_url, livekit_key and livekit_secret go together; set "
                                  f"{' and '.join(missing)} too")  # fmt: skip
        if self.livekit_url and not self.livekit_url.startswith(("ws://", "wss://")):
            raise LiveAvatarError(f"livekit_url = {self.livekit_url!r} must begin with ws:// or "
                                  "wss://")  # fmt: skip
        if not self.livekit_name:  # LiveKit sends who has none into every room
            raise LiveAvatarError("livekit_name must not be empty")

    @property
    def loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def takes_uploads(self) -> bool:
        ours = self.loopback and not (self.keys or self.origins or self.livekit_url)
        return self.uploads == "yes" or (self.uploads == "auto" and ours)

    @property
    def limits(self) -> Limits:
        return Limits(self.longest, self.idle, self.grace, lookahead=self.lookahead,
                      viewers=self.viewers, busy=self.busy)  # fmt: skip

    def command(self) -> list[str]:
        """The words of an engine."""
        if self.engine == "mock":
            return ["--mock", "--slots", str(self.slots)]
        words = ["--slots", str(self.slots), "--size", self.size]
        for name in ("weights", "device", "mesh", "fake_devices", "quantise"):
            if value := getattr(self, name):
                words += [f"--{name.replace('_', '-')}", str(value)]
        return words

    def sees(self, worker: int) -> dict[str, str]:
        """Variables of an engine that show it its own devices alone."""
        count = len(self.devices) // self.workers
        own = ",".join(self.devices[worker * count :][:count])
        # libtpu wants to know, too, that each process is a slice of its own.
        alone = {"TPU_VISIBLE_CHIPS": own, "TPU_PROCESS_BOUNDS": "1,1,1",
                 "TPU_CHIPS_PER_PROCESS_BOUNDS": f"1,{count},1"}  # fmt: skip
        return {"CUDA_VISIBLE_DEVICES": own} | alone if own else {}


def read(
    argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> Settings:
    """Raises LiveAvatarError for what is unknown or of the wrong kind, and says where it stands."""
    hints = get_type_hints(Settings)
    parser = argparse.ArgumentParser(
        prog="python -m serve", description="Talk to an avatar in a browser, or from an agent.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML, one line a setting")
    for field in dataclasses.fields(Settings):
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", metavar=_kind(hints[field.name]),
                            help=f"default: {default!r}")  # fmt: skip
    given = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    for variable in environment:
        if variable.startswith(PREFIX) and variable[len(PREFIX) :].lower() not in hints:
            raise LiveAvatarError(f"there is no setting {variable}")
    if (path := given.pop("config")) is not None:
        values |= _file(path, hints)
    for name, kind in hints.items():
        variable = PREFIX + name.upper()
        if variable in environment:
            values[name] = _as(kind, environment[variable], variable)
        if given[name] is not None:
            values[name] = _as(kind, given[name], f"--{name.replace('_', '-')}")
    return Settings(**values)


def _file(path: Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    try:
        lines = tomllib.loads(path.read_text())
    except OSError as error:
        raise LiveAvatarError(f"cannot read {path}: {str(error.strerror).lower()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LiveAvatarError(f"{path} is no TOML: {error}") from None
    values = {}
    for name, value in lines.items():
        if name not in hints:
            raise LiveAvatarError(f"{path}: there is no setting {name}")
        lists = hints[name] not in (int, float, bool, str)
        if isinstance(value, dict) or (isinstance(value, list) and not lists):
            raise LiveAvatarError(f"{path}: {name} = {value!r} must be {_kind(hints[name])}")
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        values[name] = _as(hints[name], text, f"{path}: {name}")
    return values


def _kind(kind: Any) -> str:
    return {int: "N", float: "X", bool: "yes|no", str: "TEXT"}.get(kind, "A,B")


def _as(kind: Any, text: str, where: str) -> Any:
    try:
        if kind is bool:
            return {"yes": True, "true": True, "1": True, "no": False, "false": False,
                    "0": False}[text.strip().lower()]  # fmt: skip
        if kind in (int, float):
            return kind(text)
    except (ValueError, KeyError):
        raise LiveAvatarError(f"{where} = {text!r} must be {_kind(kind)}") from None
    if kind is str:
        return text
    return tuple(part.strip() for part in text.split(",") if part.strip())
