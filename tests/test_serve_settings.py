"""What an operator says is understood, or refused by its name."""

import dataclasses

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from hypothesis import given, settings
from hypothesis import strategies as some

from liveavatar_jax.types import LiveAvatarError
from serve.__main__ import Server
from serve.link import Link
from serve.settings import PREFIX, Settings, read

from .test_jobs import chain as certified


@pytest.fixture
def file(tmp_path):
    def written(text: str) -> str:
        path = tmp_path / "serve.toml"
        path.write_text(text)
        return str(path)

    return written


def test_flags_go_before_the_environment_and_that_before_the_file(file):
    path = file('port = 1\nslots = 1\nkeys = ["a", "b"]\nidle = 7\nbadge = true\nengine = "mock"\n')
    environment = {PREFIX + "PORT": "2", PREFIX + "SLOTS": "2", "PATH": "/bin"}
    said = read(["--config", path, "--port", "3"], environment)
    assert (said.port, said.slots, said.keys, said.idle) == (3, 2, ("a", "b"), 7.0)
    assert said.badge is True and said.engine == "mock"
    assert read([], {}) == Settings()


@pytest.mark.parametrize(
    "text, value",
    [("yes", True), ("true", True), ("1", True), ("No", False), ("FALSE", False), ("0", False)],
)
def test_yes_and_no_are_said_in_many_ways(text, value, file):
    assert read(["--badge", text], {}).badge is value
    assert read([], {PREFIX + "CONSENT": text}).consent is value
    assert read(["--config", file(f'badge = "{text}"')], {}).badge is value


def test_lists_are_split_at_commas():
    said = read(["--ice", "stun:a:1, stun:b:2,"], {PREFIX + "KEYS": "one,two"})
    assert said.ice == ("stun:a:1", "stun:b:2") and said.keys == ("one", "two")


@pytest.mark.parametrize(
    "flags, environment, text, words",
    [
        ([], {}, "prot = 1", "there is no setting prot"),
        ([], {}, "[serve]\nport = 1", "there is no setting serve"),
        ([], {}, "port = ", "is no TOML"),
        ([], {}, "port = 2.5", "port = '2.5' must be N"),
        ([], {}, "port = true", "port = 'True' must be N"),
        ([], {}, 'idle = "long"', "idle = 'long' must be X"),
        ([], {}, "badge = 2", "badge = '2' must be yes|no"),
        ([], {}, 'host = ["a", "b"]', "must be TEXT"),
        ([], {}, "keys = {a = 1}", "must be A,B"),
        ([], {PREFIX + "KEYZ": "x"}, None, "there is no setting AVATAR_SERVE_KEYZ"),
        ([], {PREFIX + "SLOTS": "many"}, None, "AVATAR_SERVE_SLOTS = 'many' must be N"),
        (["--slots", "1.5"], {}, None, "--slots = '1.5' must be N"),
        (["--max-body", ""], {}, None, "--max-body = '' must be N"),
        (["--badge", "maybe"], {}, None, "--badge = 'maybe' must be yes|no"),
        (["--engine", "steam"], {}, None, "engine = 'steam' must be model or mock"),
        (["--uploads", "some"], {}, None, "uploads = 'some' must be auto, yes or no"),
        (["--workers", "0"], {}, None, "workers = 0 must be at least 1"),
        (["--lookahead", "0"], {}, None, "lookahead = 0 must be at least 1"),
        (["--max-body", "-5"], {}, None, "max_body = -5 must be at least 1"),
        (["--viewers", "-1"], {}, None, "viewers = -1 must be at least 0"),
        (["--longest", "0"], {}, None, "longest = 0.0 must be above 0"),
        (["--idle", "nan"], {}, None, "idle = nan must be above 0"),
        (["--grace", "inf"], {}, None, "grace = inf must be above 0, and finite"),
        (["--port", "65536"], {}, None, "port = 65536 must lie in 0..65535"),
        (["--certificate", "a.pem"], {}, None, "certificate and certificate_key go together"),
        (["--tls-key", "a.pem"], {}, None, "tls_certificate and tls_key go together"),
        (["--quantise", "4bit"], {}, None, "quantise = '4bit' must be int8 or fp8"),
        (["--fake-devices", "-1"], {}, None, "fake_devices = -1 must be at least 0"),
        (["--devices", "0,one"], {}, None, "devices = 'one' must be numbers"),
        (
            ["--devices", "0,1,2", "--workers", "2"],
            {},
            None,
            "devices = 0,1,2 cannot be shared out evenly over 2 workers",
        ),
        (["--livekit-url", "wss://x"], {}, None, "set livekit_key and livekit_secret too"),
        ([], {PREFIX + "LIVEKIT_KEY": "k"}, 'livekit_secret = "s"', "set livekit_url too"),
        (
            ["--livekit-url", "http://x", "--livekit-key", "k", "--livekit-secret", "s"],
            {},
            None,
            "livekit_url = 'http://x' must begin with ws:// or wss://",
        ),
        (["--livekit-name", ""], {}, None, "livekit_name must not be empty"),
        (["--host", "0.0.0.0"], {}, None, "host = 0.0.0.0 lets others in; set keys"),
        ([], {PREFIX + "HOST": "::"}, None, "host = :: lets others in"),
        ([], {}, 'host = "avatar.example"', "host = avatar.example lets others in"),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_name(flags, environment, text, words, file):
    config = [] if text is None else ["--config", file(text)]
    with pytest.raises(LiveAvatarError) as caught:
        read([*config, *flags], environment)
    assert words in str(caught.value)
    if text is not None and not {"lets", "too"} & set(words.split()):  # of several settings
        assert "serve.toml" in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LiveAvatarError, match=r"cannot read .*nothing\.toml: no such file"):
        read(["--config", str(tmp_path / "nothing.toml")], {})


@pytest.mark.parametrize("flags", [["--prot", "1"], ["--por", "1"], ["x"], ["--port"]])
def test_flags_that_are_none_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        read(flags, {})
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "host, open", [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True)]
)
def test_a_host_of_ones_own_needs_no_key(host, open):
    assert Settings(host=host).loopback is open
    assert Settings(host=host).takes_uploads and not Settings(host=host, uploads="no").takes_uploads


def test_a_host_for_others_takes_no_uploads_unless_it_is_said():
    assert not Settings(host="0.0.0.0", keys=("k",)).takes_uploads
    assert Settings(host="0.0.0.0", keys=("k",), uploads="yes").takes_uploads
    livekit = {"livekit_url": "wss://x", "livekit_key": "k", "livekit_secret": "s"}
    assert not Settings(**livekit).takes_uploads
    assert Settings(**livekit, uploads="yes").takes_uploads


@settings(deadline=None, max_examples=100, database=None)
@given(
    some.sampled_from(["PORT", "IDLE", "BADGE", "KEYS", "ENGINE", "RATE"]),
    some.text('aN01.-e é漢😀"\0\n,'),
)
def test_no_text_is_more_than_refused(name, text):
    try:
        read([], {PREFIX + name: text})
    except LiveAvatarError as error:
        assert name.lower() in str(error).lower()


def test_each_engine_sees_its_own_devices_alone():
    said = read(["--workers", "2", "--devices", "4,5,6,7"], {})
    assert [said.sees(number)["CUDA_VISIBLE_DEVICES"] for number in (0, 1)] == ["4,5", "6,7"]
    assert said.sees(1)["TPU_VISIBLE_CHIPS"] == "6,7"
    link = Link(["x"], print, print, sees=said.sees(1))
    assert link.environment["CUDA_VISIBLE_DEVICES"] == "6,7" and "PATH" in link.environment
    assert read([], {}).sees(0) == {}


def test_an_engine_is_told_what_it_runs_on():
    words = "--weights w --mesh stage=4,vae=1 --fake-devices 5 --quantise int8".split()
    assert read(words, {}).command() == ["--slots", "1", "--size", "720*400", *words]


def test_a_page_over_https_has_a_certificate_and_its_key(tmp_path):
    pytest.importorskip("cryptography")
    chain, key = map(str, certified(tmp_path))
    pair = Settings(engine="mock", tls_certificate=chain, tls_key=key)
    (config := Server(pair).config).load()
    assert config.is_ssl and config.ssl is not None
    for wrong, words in ((key, "pem"), (str(tmp_path / "none"), "no such file")):
        bad = dataclasses.replace(pair, tls_certificate=wrong)
        with pytest.raises(LiveAvatarError, match=words):
            Server(bad)
