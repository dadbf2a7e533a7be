"""Who may do what: long keys for backends, short tokens for browsers.

A backend holds a bearer key and creates sessions. Each session has a client token, a signed JWT
that is good for that session alone and for no longer than it may last; so a browser never sees
the key. A viewer's token may only watch.
"""

import dataclasses
import hmac
import secrets
import time
from collections.abc import Sequence

import jwt

ALGORITHM, ISSUER = "HS256", "avatar-serve"


class Denied(Exception):
    """No key, or one that is not good for this; in one sentence. known: whose it is is known."""

    def __init__(self, detail: str, known: bool = False):
        super().__init__(detail)
        self.known = known


@dataclasses.dataclass(frozen=True)
class Grant:
    """What a caller may do: everything as a backend, or one session's things."""

    session: str | None = None  # None: all of them
    role: str = "backend"  # or client, viewer

    def check(self, session: str, *, speak: bool = True) -> None:
        """Raises Denied where the caller has no business with a session."""
        if self.session not in (None, session):
            raise Denied("this token is another session's", known=True)
        if speak and self.role == "viewer":
            raise Denied("this token is for watching only", known=True)


class Auth:
    """keys: of backends; none leaves the door open, for a machine of one's own. secret: signs
    tokens; a new one at each start ends all older tokens with it."""

    def __init__(self, keys: Sequence[str] = (), secret: str | None = None):
        self.keys = tuple(keys)
        self._secret = secret or secrets.token_urlsafe(32)

    def backend(self, header: str | None) -> Grant:
        """Of `Authorization: Bearer KEY`. Raises Denied."""
        if not self.keys:
            return Grant()
        key = bearer(header)
        if key is None:
            raise Denied("no key; send Authorization: Bearer KEY")
        if not any(hmac.compare_digest(key.encode(), known.encode()) for known in self.keys):
            raise Denied("this key is not known here")
        return Grant()

    def caller(self, token: str | None) -> Grant:
        """A backend's key, or the token of a session. Raises Denied."""
        if token is None:
            raise Denied("no token; use the client_token that the session was created with")
        given = token.encode("utf-8", "replace")
        if any(hmac.compare_digest(given, known.encode()) for known in self.keys):
            return Grant()
        try:
            said = jwt.decode(
                given, self._secret, [ALGORITHM], issuer=ISSUER,
                options={"require": ["exp", "sub", "role"]},
            )  # fmt: skip
        except jwt.ExpiredSignatureError:
            raise Denied("this token has expired; create a new session") from None
        except jwt.InvalidTokenError:
            raise Denied("this token is not good here") from None
        return Grant(said["sub"], said["role"])

    def token(self, session: str, seconds: float, role: str = "client") -> str:
        """For one session, good for so long."""
        said = {"sub": session, "role": role, "iss": ISSUER, "exp": time.time() + seconds}
        return jwt.encode(said, self._secret, ALGORITHM)


def bearer(header: str | None) -> str | None:
    """The token of an Authorization header."""
    kind, _, token = (header or "").partition(" ")
    return token.strip() or None if kind.lower() == "bearer" else None


class Bucket:
    """A rate limit: `most` at once, `rate` a second after that. Of each caller by name."""

    def __init__(self, rate: float, most: float, callers: int = 10_000):
        self.rate, self.most, self.callers = rate, most, callers
        self._left: dict[str, tuple[float, float]] = {}  # name: (left, when)

    def take(self, name: str, now: float) -> float:
        """0 when there was one, else the seconds until there is."""
        left, when = self._left.pop(name, (self.most, now))
        left = min(self.most, left + (now - when) * self.rate)
        wait = 0.0 if left >= 1 else (1 - left) / self.rate
        self._left[name] = (left - 1 if not wait else left, now)
        while len(self._left) > self.callers:  # the one that was seen longest ago
            self._left.pop(next(iter(self._left)))
        return wait
