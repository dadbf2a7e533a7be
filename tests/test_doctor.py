"""What `doctor` sees, well and ill, and that nothing stops it."""

import json
import re
import shutil
import socket
import threading
from argparse import Namespace
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import av
import jax
import pytest

from liveavatar_jax import cli, doctor
from liveavatar_jax.config import ModelConfig, to_dict
from liveavatar_jax.doctor import FAIL, GIB, OK, WARN, Seen
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import packed

from .processes import free_port

ROOT = Path(__file__).resolve().parents[1]
ARGS = Namespace(device=None, weights=None)


def see(check, *given) -> Seen:
    return doctor._attempt(partial(check, *given))


def says(seen: Seen, state: str, *words: str) -> bool:
    assert seen.state == state and all(word in f"{seen.seen} -> {seen.todo}" for word in words), (
        seen
    )
    return True


@pytest.fixture(autouse=True)
def cache(tmp_path):
    """A private one, as `prepare` makes it; under pytest there are too many devices for one."""
    before, where = jax.config.jax_compilation_cache_dir, tmp_path / "cache" / "xla"
    where.mkdir(parents=True)
    where.parent.chmod(0o700)
    jax.config.update("jax_compilation_cache_dir", str(where))
    yield where
    jax.config.update("jax_compilation_cache_dir", before)


# ---- the command


def test_where_all_is_well_nothing_fails(capsys):
    port, other = free_port(), free_port()
    given = ["--port", str(port), "--udp", f"{other}-{other}"]
    assert cli.main(["doctor", "--json", *given]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True
    names = [check["what"] for check in said["checks"]]
    assert names[:7] == [*doctor.CHECKS] and names[7:] in ([], ["port", "udp"])
    assert all(set(check) == {"what", "state", "seen", "todo"} for check in said["checks"])
    assert cli.main(["doctor", *given]) == 0
    assert re.search(r"^python +ok +Python 3.*^devices +ok +8 x CPU.*^model +ok +puppet is whole",
                     capsys.readouterr().out, re.M | re.S)  # fmt: skip


@pytest.mark.parametrize("state, code", [(OK, 0), (WARN, 0), (FAIL, 1)])
def test_the_exit_code_tells_of_failures_alone(state, code, monkeypatch, capsys):
    checks = {
        "one": lambda args: Seen(state, "this", "do that"),
        "serve": lambda args: Seen(WARN, ""),
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert cli.main(["doctor"]) == code
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["one", state, "this"] and out[1].strip() == "-> do that"
    assert out[-1].startswith(f"2 checks: {code} fail")
    assert cli.main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["ok"] is (code == 0)


@pytest.mark.parametrize(
    "error, words",
    [
        (LiveAvatarError("the sky is down; hold it up"), ("the sky is down", "hold it up")),
        (ZeroDivisionError("one\ntwo"), ("ZeroDivisionError: one", "report")),
        (OSError(), ("OSError: no more is known",)),
        (SystemExit(3), ("SystemExit: 3",)),
    ],
)
def test_a_check_that_raises_is_a_line_of_the_table(error, words, monkeypatch, capsys):
    def raises(args):
        raise error

    checks = {"one": raises, "two": lambda args: Seen(OK, "there"), "serve": raises}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr()
    assert all(word in said.out for word in words) and "there" in said.out
    assert "two\n" not in said.out and "Traceback" not in said.out + said.err


def test_a_check_that_never_answers_is_left(monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 0.05)
    held = threading.Event()
    assert says(see(lambda: held.wait()), FAIL, "no answer within 0.05 s")
    held.set()


def test_without_the_device_that_is_named_the_rest_is_looked_at(monkeypatch, capsys):
    asked = []

    def prepare(args):
        asked.append(args.device)
        if args.device == "tpu":
            raise LiveAvatarError("--device tpu: no such device here; install it")

    monkeypatch.setattr(doctor, "prepare", prepare)
    assert cli.main(["doctor", "--device", "tpu", "--port", str(free_port())]) == 1
    out = capsys.readouterr().out
    assert asked == ["tpu", "cpu"] and "-> install it" in out and "puppet is whole" in out


def test_it_looks_at_what_the_server_would_take(monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "doctor", lambda args: seen.append(args) or 0)
    names = ("WEIGHTS", "HOST", "PORT", "UDP", "ICE", "TURN_SECRET", "TURN_USER", "TURN_PASSWORD",
             "CERTIFICATE")  # fmt: skip
    for name in names:
        monkeypatch.setenv(f"AVATAR_SERVE_{name}", "7" if name == "PORT" else name)
    assert cli.main(["doctor"]) == 0 and cli.main(["doctor", "--port", "8", "--ice", "x"]) == 0
    first, second = seen
    assert [getattr(first, name.lower()) for name in names] == [
        Path("WEIGHTS"), "HOST", 7, "UDP", "ICE", "TURN_SECRET", "TURN_USER", "TURN_PASSWORD",
        Path("CERTIFICATE"),
    ]  # fmt: skip
    assert (second.port, second.ice) == (8, "x")


# ---- to make videos


def test_packages_are_in_their_ranges_or_named(monkeypatch):
    assert says(see(doctor._packages, "", ARGS), OK, "jax ", "flax ")
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda x: "0.1" if x == "flax" else version(x))
    assert says(see(doctor._packages, "", ARGS), FAIL, "flax 0.1 is not <0.13,>=0.12.8", "anew")
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.2")
    assert says(see(doctor._packages, "", ARGS), FAIL, "Python 3.9.2 is not >=3.11")


def test_missing_packages_are_named_and_those_of_the_server_are_no_failure(monkeypatch, capsys):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert says(see(doctor._packages, "", ARGS), FAIL, "jax is missing", "install liveavatar-jax")
    seen = see(doctor._packages, "serve", ARGS)
    assert says(seen, WARN, "aiortc is missing", "install liveavatar-jax[serve]")
    monkeypatch.setattr(doctor, "CHECKS", {"serve": partial(doctor._packages, "serve")})
    assert cli.main(["doctor", "--port", "99999"]) == 0  # not even looked at
    assert "port" not in capsys.readouterr().out


def test_a_gpu_that_jax_does_not_see_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "prepare", lambda args: None)
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "nvidia0")
    assert says(see(doctor._devices, ARGS), OK, "8 x CPU", "of the host free")
    doctor.NVIDIA.touch()
    seen = see(doctor._devices, ARGS)
    assert says(seen, WARN, "does not see the NVIDIA GPU", "liveavatar-jax[cuda]")
    assert says(see(doctor._devices, Namespace(device="cpu")), OK)
    monkeypatch.setattr(doctor, "_free", lambda: GIB / 2)
    assert says(see(doctor._devices, Namespace(device="cpu")), WARN, "512 MiB of the host")


def test_devices_tell_their_own_memory(monkeypatch):
    stats = {"bytes_limit": 10 * GIB, "bytes_in_use": GIB}
    card = SimpleNamespace(platform="gpu", device_kind="Card", memory_stats=lambda: stats)
    monkeypatch.setattr(doctor, "prepare", lambda args: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [card, card])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert says(see(doctor._devices, ARGS), OK, "2 x Card", "9.0 GiB free on each")


def test_a_model_is_whole_and_fits_or_it_is_told(tmp_path, monkeypatch):
    folder = shutil.copytree(packed.preset(), tmp_path / "mine")
    args = Namespace(weights=folder)
    assert says(see(doctor._model, args), OK, "mine is whole")
    need = doctor._needed(doctor.checkpoint.load_config(folder), ["dit", "vae", "text"], "float32")
    for share, state in (([1.3], OK), ([1.1], WARN), ([0.9, 0.9], WARN), ([0.9], FAIL)):
        monkeypatch.setattr(doctor, "_room", lambda share=share: [x * need for x in share])
        assert says(see(doctor._model, args), state, "" if state == OK else "--mesh")
    whole = (folder / "dit.safetensors").read_bytes()
    (folder / "dit.safetensors").write_bytes(whole[:-1])
    (folder / "vae.safetensors").unlink()
    assert says(see(doctor._model, args), FAIL, "dit.safetensors, vae.safetensors missing or cut")
    assert says(see(doctor._model, Namespace(weights=tmp_path)), FAIL, "is not a converted check")


def test_a_converted_checkpoint_has_all_the_files_that_it_lists(tmp_path):
    names = ["dit/a", "vae/b", "speech/c"]
    for name in names:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"1234")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(ModelConfig.tiny())))
    listed = tmp_path / "files.json"
    listed.write_text(json.dumps(dict.fromkeys(names, 4)))
    args = Namespace(weights=tmp_path)
    assert says(see(doctor._model, args), OK)
    (tmp_path / "vae/b").write_bytes(b"123")
    (tmp_path / "dit/a").unlink()
    assert says(see(doctor._model, args), FAIL, "dit/a, vae/b missing or cut off")
    listed.write_text(json.dumps({}))
    assert says(see(doctor._model, args), FAIL, "dit.safetensors", "convert it anew")


def test_a_session_of_the_published_model_fits_no_device_of_80_gib():
    both = doctor._needed(ModelConfig(), ["dit", "vae", "text", "speech"], "bfloat16")
    assert 80 * GIB < both < 85 * GIB


@pytest.mark.parametrize(
    "inner, outer, state",
    [
        (0o755, 0o700, OK), (0o700, 0o755, OK), (0o755, 0o755, WARN), (0o777, 0o711, FAIL),
        (0o775, 0o750, FAIL),
    ],
)  # fmt: skip
def test_the_cache_is_ones_own(inner, outer, state, cache):
    (cache / "program").write_bytes(bytes(3 << 20))
    cache.chmod(inner)
    cache.parent.chmod(outer)
    assert says(see(doctor._cache, ARGS), state, "private, 3 MiB" if state == OK else "chmod 700")


def test_a_cache_that_is_not_there_or_another_users_is_told(cache, monkeypatch):
    cache.rmdir()
    assert says(see(doctor._cache, ARGS), OK, "private, 0 MiB")  # the first program makes it
    stat = SimpleNamespace(st_uid=54_321, st_mode=0o40700)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", lambda self, **more: stat)
        seen = see(doctor._cache, ARGS)
    assert says(seen, FAIL, "another user's", "remove it")
    jax.config.update("jax_compilation_cache_dir", None)
    assert says(see(doctor._cache, ARGS), WARN, "every run compiles anew", "XDG_CACHE_HOME")


@pytest.mark.parametrize("free, state", [(GIB, OK), (GIB / 2, WARN), (GIB / 20, FAIL)])
def test_a_full_disk_is_told(free, state, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(free))
    assert says(see(doctor._disk, ARGS), state, "" if state == OK else "make room")


@pytest.mark.parametrize("without, state", [("aac", FAIL), ("libx264", FAIL), ("libvpx", WARN)])
def test_codecs_that_are_not_there_are_named(without, state, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "none")
    assert says(see(doctor._codecs, ARGS), OK, "libx264, aac, libvpx, libopus")
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {without, "h264_nvenc"})
    assert says(see(doctor._codecs, ARGS), state, f"lacks {without}", "PyAV")
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path)
    assert says(see(doctor._codecs, ARGS), state, f"lacks {without}, h264_nvenc")


# ---- to serve


def test_a_port_is_free_or_not():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert says(see(doctor._port, "127.0.0.1", port), FAIL, "in use", "another --port")
    assert says(see(doctor._port, "127.0.0.1", port), OK, f"127.0.0.1:{port} is free")
    assert says(see(doctor._port, "127.0.0.1", 99_999), FAIL, "--port 99999", "0..65535")
    assert says(see(doctor._port, "no host", 8080), FAIL, "no host:8080")


def test_udp_ports_are_counted():
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        assert says(see(doctor._udp, f"{port}-{port}"), FAIL, "0 of 1", "another range")
        assert says(see(doctor._udp, f"{port - 99}-{port}"), WARN, " of 100 ports are free")
    assert says(see(doctor._udp, f"{port}-{port}"), OK, "1 of 1")


@pytest.mark.parametrize("ports", ["", "5", "9-5", "0-5", "1-65536", "a-b", "-1-5", "1-2-3"])
def test_a_range_that_is_none_is_told(ports):
    assert says(see(doctor._udp, ports), FAIL, "no range of ports", "50000-50099")


@pytest.fixture
def relay():
    """A STUN and TURN server, of the user "me" with the password "secret"."""
    pytest.importorskip("aiortc", reason="needs the extra serve")
    from aioice import stun
    from aioice.turn import make_integrity_key

    key = make_integrity_key("me", "here", "secret")

    def answer(request, address):
        kind = {"message_method": request.message_method, "transaction_id": request.transaction_id}
        open = request.message_method == stun.Method.BINDING
        if not open and not request.check_message_integrity(key):
            said = {"ERROR-CODE": (401, "Unauthorized"), "REALM": "here", "NONCE": b"n"}
            return stun.Message(message_class=stun.Class.ERROR, attributes=said, **kind)
        said = {"XOR-MAPPED-ADDRESS": address}
        if not open:
            said |= {"XOR-RELAYED-ADDRESS": ("192.0.2.9", 4242), "LIFETIME": 600}
        reply = stun.Message(message_class=stun.Class.RESPONSE, attributes=said, **kind)
        if not open:
            reply.add_message_integrity(key)
        return reply

    with socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))

        def serve():
            while (got := udp.recvfrom(2048))[0] != b"end":
                udp.sendto(bytes(answer(stun.parse_message(got[0]), got[1])), got[1])

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{udp.getsockname()[1]}"
        with socket.socket(type=socket.SOCK_DGRAM) as end:
            end.sendto(b"end", udp.getsockname())
        thread.join()


def test_servers_of_ice_are_asked_as_a_call_asks_them(relay):
    assert says(see(doctor._ice, f"stun:{relay}", "", ""), OK, f"stun:{relay} sees us at ")
    seen = see(doctor._ice, f"turn:{relay}", "me", "secret")
    assert says(seen, OK, f"turn:{relay} relays from 192.0.2.9:4242")
    assert says(see(doctor._ice, f"turn:{relay}", "me", "wrong"), FAIL, "no address", "password")
    assert says(see(doctor._ice, f"turn:{relay}", "", ""), FAIL, "TURN wants a user", "--turn-user")


@pytest.mark.parametrize("url", ["stun:[::1]:3478", "http://x", "stuns:127.0.0.1", "nonsense"])
def test_what_is_no_server_of_ice_is_told(url):
    pytest.importorskip("aiortc", reason="needs the extra serve")
    assert says(see(doctor._ice, url, "", ""), FAIL, f"{url} gives no address", "stun:HOST:PORT")


def test_a_server_that_is_silent_is_left(monkeypatch):
    pytest.importorskip("aiortc", reason="needs the extra serve")
    monkeypatch.setattr(doctor, "WAIT", 0.3)
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{silent.getsockname()[1]}"
        for url in (f"stun:{at}", f"turn:{at}"):
            assert says(see(doctor._ice, url, "me", "secret"), FAIL, "no answer within 0.3 s")


def certificate(path: Path, days: float, curve: str = "SECP256R1") -> Path:
    x509 = pytest.importorskip("cryptography.x509", reason="needs the extra serve")
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding

    key, now = ec.generate_private_key(getattr(ec, curve)()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "me")])
    made = x509.CertificateBuilder(
        name, name, key.public_key(), 1, now - timedelta(300), now + timedelta(days)
    ).sign(key, hashes.SHA256())
    path.write_bytes(made.public_bytes(Encoding.PEM))
    return path


@pytest.mark.parametrize(
    "days, curve, state, words",
    [
        (100.5, "SECP256R1", OK, ("CN=me, 100 days left",)),
        (10.5, "SECP256R1", WARN, ("10 days left", "renew it")),
        (-2.5, "SECP256R1", FAIL, ("-3 days left", "renew it")),
        (100.5, "SECP384R1", WARN, ("not for ES256", "P-256")),
    ],
)
def test_certificates_have_days_left(days, curve, state, words, tmp_path):
    assert says(see(doctor._certificate, certificate(tmp_path / "a", days, curve)), state, *words)


def test_a_chain_ends_with_its_first_end(tmp_path):
    long, short = certificate(tmp_path / "long", 100.5), certificate(tmp_path / "short", 3.5)
    long.write_bytes(long.read_bytes() + short.read_bytes())
    assert says(see(doctor._certificate, long), WARN, "3 days left")


def test_what_is_no_certificate_is_told(tmp_path):
    pytest.importorskip("cryptography", reason="needs the extra serve")
    (tmp_path / "a.pem").write_text("nothing")
    assert says(see(doctor._certificate, tmp_path / "a.pem"), FAIL, "a.pem: no cert", "in PEM")
    assert says(see(doctor._certificate, tmp_path / "b.pem"), FAIL, "No such file")


def test_what_is_asked_for_is_looked_at():
    args = Namespace(host="h", port=1, udp="", ice="", turn_secret="", turn_user="",
                     turn_password="", certificate=None)  # fmt: skip
    names = lambda: [what for what, _ in doctor._serving(args)]
    assert names() == ["port"]
    args.udp, args.ice, args.certificate = "5-6", "stun:a, ,turn:b", Path("c")
    assert names() == ["port", "udp", "ice", "ice", "certificate"]


def test_a_secret_of_turn_is_tried_with_a_login_of_its_own():
    pytest.importorskip("aiortc", reason="needs the extra serve")
    args = Namespace(host="h", port=1, udp="", ice="turn:a", turn_secret="s", turn_user="me",
                     turn_password="p", certificate=None)  # fmt: skip
    _, (_, check) = doctor._serving(args)
    url, user, password = check.args
    assert url == "turn:a" and re.fullmatch(r"\d+:doctor", user) and password not in ("s", "p")


def test_what_containers_set_are_settings():
    settings = pytest.importorskip("serve.settings", reason="needs the extra serve")
    files = [ROOT / "serve" / "docker" / name for name in ("Dockerfile", "compose.yaml")]
    for file in files:
        names = set(re.findall(r"AVATAR_SERVE_(\w+)", file.read_text()))
        assert names and {name.lower() for name in names} <= set(vars(settings.Settings())), file
