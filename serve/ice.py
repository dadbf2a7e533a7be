"""STUN and TURN: the servers that calls go by, what browsers are told of them, and how long their
logins are good."""

import base64
import functools
import hashlib
import hmac
import re
import time
from typing import TYPE_CHECKING, Any

from liveavatar_jax.types import LiveAvatarError
from serve.sessions import lasting

if TYPE_CHECKING:
    from aiortc import RTCPeerConnection

    from serve.settings import Settings

GATHER = 1  # seconds that an answer waits for them: enough to ask again what a network lost

# As browsers and aiortc both read it (RFC 7064 and 7065): either would fail at every call.
HOST = r"[A-Za-z0-9.-]+(?::(\d{1,5}))?"
URL = re.compile(rf"stuns?:{HOST}|turns?:{HOST}(?:\?transport=(?:udp|tcp))?")


def check(settings: "Settings") -> None:
    """Raises LiveAvatarError for servers that no call could use."""
    for url in settings.ice:
        found = URL.fullmatch(url)
        port = next(filter(None, found.groups()), "1") if found else "0"
        if not 0 < int(port) < 65536:
            raise LiveAvatarError(f"ice = {url!r} must be stun:HOST:PORT or turn:HOST:PORT, maybe "
                                  "with ?transport=tcp; an IPv6 address needs a name")  # fmt: skip
    known = settings.turn_user, settings.turn_password
    if any(url.startswith("turn") for url in settings.ice):
        if not (settings.turn_secret or all(known)):
            raise LiveAvatarError("ice names a TURN server; set turn_secret, or turn_user and "
                                  "turn_password, too")  # fmt: skip
    if not all(text.isascii() and text.isprintable() for text in known):  # they stand in a header
        raise LiveAvatarError("turn_user and turn_password must be printable ASCII")


def servers(settings: "Settings", who: str) -> list[dict[str, Any]]:
    """As a browser wants them. who: the session, by which a TURN server can count."""
    known = {"username": settings.turn_user, "credential": settings.turn_password}
    if settings.turn_secret:
        known = login(settings.turn_secret, who, lasting(settings.limits))
    return [{"urls": [url]} | (known if url.startswith("turn") else {}) for url in settings.ice]


def login(secret: str, who: str, seconds: float) -> dict[str, str]:
    """One that ends by itself, of a secret that only the TURN server and we know (coturn's
    `use-auth-secret`; draft-uberti-behave-turn-rest)."""
    name = f"{int(time.time() + seconds)}:{who}"
    proof = hmac.digest(secret.encode(), name.encode(), hashlib.sha1)
    return {"username": name, "credential": base64.b64encode(proof).decode()}


def links(known: list[dict[str, Any]]) -> str:
    """The servers as a header (RFC 9725, section 4.6)."""
    said = []
    for server in known:
        words = {"rel": "ice-server"}
        if "credential" in server:
            words |= {key: server[key] for key in ("username", "credential")}
            words["credential-type"] = "password"
        about = "; ".join(f"{key}={_quoted(text)}" for key, text in words.items())
        said += [f"<{url}>; {about}" for url in server["urls"]]
    return ", ".join(said)


def _quoted(text: str) -> str:
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def hurry(peer: "RTCPeerConnection") -> None:
    """A server that is silent must not hold up an answer: it goes out with the addresses that are
    known. aioice waits for 5 s, and aiortc has no setting for it."""
    for transceiver in peer.getTransceivers():
        found = transceiver.sender.transport.transport.iceGatherer._connection
        found.get_component_candidates = functools.partial(
            found.get_component_candidates, timeout=GATHER
        )
