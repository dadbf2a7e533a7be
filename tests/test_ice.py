"""The servers that calls go by: what is refused at the start, and what callers are told."""

import re
import time

import pytest

pytest.importorskip("aiortc", reason="needs the extra serve")

from aiortc import RTCIceServer
from aiortc.rtcicetransport import RTCIceGatherer

from liveavatar_jax.types import LiveAvatarError
from serve import __main__, ice
from serve.sessions import lasting
from serve.settings import Settings

LOGIN = {"turn_user": "me", "turn_password": "here"}
GOOD = (
    "stun:a.example.org", "stun:10.0.0.1:3478", "stuns:a:5349", "turn:a", "turn:a-b.c:1",
    "turn:a:65535?transport=udp", "turn:a?transport=tcp", "turns:a:443?transport=tcp",
)  # fmt: skip
BAD = (
    "a.example.org", "http://a", "stun:", "stun:a:", "stun:a:0", "stun:a:65536", "turn:a:x",
    "stun://a", "stun:[::1]:3478", "turn:me@a", "turn:a?transport=sctp", "stun:a?transport=udp",
    "turn:a?", "stun:a b", "stun:a\n", "stun:ä", "STUN:a",
)  # fmt: skip


@pytest.mark.parametrize("url", GOOD)
def test_what_is_taken_is_read_by_who_calls_them(url):
    settings = Settings(ice=(url,), **LOGIN)
    known = [RTCIceServer(**server) for server in ice.servers(settings, "a")]
    RTCIceGatherer(known)


@pytest.mark.parametrize("url", BAD)
def test_what_no_call_could_use_is_refused(url):
    with pytest.raises(LiveAvatarError, match=r"ice = .* must be stun:HOST:PORT or turn:HOST"):
        Settings(ice=("stun:fine", url), **LOGIN)


def test_the_server_does_not_start_with_it(capsys):
    assert __main__.main(["--engine", "mock", "--ice", "stun:fine,stun.example.org"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("serve: ice = 'stun.example.org' must be") and said.count("\n") == 1


def test_a_turn_server_wants_a_login():
    """Browsers would throw at every call."""
    for login in ({}, {"turn_user": "a"}, {"turn_password": "b"}):
        with pytest.raises(
            LiveAvatarError, match="set turn_secret, or turn_user and turn_password"
        ):
            Settings(ice=("turn:a",), **login)
    Settings(ice=("stun:a",))
    Settings(ice=("turn:a",), **LOGIN)
    Settings(ice=("turn:a",), turn_secret="c")


@pytest.mark.parametrize("text", ["é", "a\nb", "a\0"])
def test_a_login_that_no_header_can_hold_is_refused(text):
    for name in LOGIN:
        with pytest.raises(LiveAvatarError, match="printable ASCII"):
            Settings(**LOGIN | {name: text})


def test_a_login_of_a_secret_is_coturns(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_699_999_990.9)
    assert ice.login("north", "me", 10.0) == {  # as `openssl dgst -sha1 -hmac north` has it
        "username": "1700000000:me", "credential": "DZAmFJD+yRbyG0+e8cpTCwLxbuo=",
    }  # fmt: skip


def test_a_secret_goes_before_a_login_and_gives_one_to_each_session():
    settings = Settings(ice=("stun:a", "turn:b"), turn_secret="north", longest=100.0, **LOGIN)
    (plain, one), (_, two) = ice.servers(settings, "one"), ice.servers(settings, "two")
    assert plain == {"urls": ["stun:a"]} and one["urls"] == two["urls"] == ["turn:b"]
    end, _, who = one["username"].partition(":")
    assert who == "one" and two["username"].endswith(":two")
    assert 0 <= time.time() + lasting(settings.limits) - int(end) < 60
    assert one["credential"] != two["credential"]
    assert not {"north", "me", "here"} & {one["username"], one["credential"]}


def test_servers_are_told_in_a_header():
    password = r'a "b\c, d; e=f>'
    settings = Settings(
        ice=("stun:a", "turn:b:1?transport=tcp"), turn_user="m", turn_password=password
    )
    stun, turn = re.split(", (?=<)", ice.links(ice.servers(settings, "x")))
    assert stun == '<stun:a>; rel="ice-server"'
    words = re.fullmatch(r'<turn:b:1\?transport=tcp>; rel="ice-server"; username="m"; '
                         r'credential="((?:[^"\\]|\\.)*)"; credential-type="password"',
                         turn)  # fmt: skip
    assert words and re.sub(r"\\(.)", r"\1", words[1]) == password
    assert ice.links([]) == ""
