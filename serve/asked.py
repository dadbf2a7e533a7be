"""What callers ask for: the bodies of requests, and what is wrong with them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from liveavatar_jax.data.prompt import PROMPT
from serve.clock import Idle
from serve.socket import CHARACTERS, RATES
from serve.wire import RATE


class Consent(BaseModel):
    """Who agreed that this face be used, when, and what proves it."""

    model_config = ConfigDict(extra="forbid")
    who: str = Field(min_length=1, max_length=200)
    when: str = Field(min_length=4, max_length=64)
    proof: str = Field(min_length=1, max_length=2000)


class Face(BaseModel):
    """A portrait: one of `GET /v1/presets`, or a picture of one's own in base64."""

    model_config = ConfigDict(extra="forbid")
    id: Annotated[str | None, Field(max_length=64)] = None
    image: str | None = None
    consent: Consent | None = None


class Room(BaseModel):
    """A room of LiveKit, and a token that lets the avatar in."""

    model_config = ConfigDict(extra="forbid")
    url: str = Field(max_length=500, pattern="^wss?://")
    token: str = Field(max_length=8000)


class Sound(BaseModel):
    """What comes in over the WebSocket, unless its address says otherwise."""

    model_config = ConfigDict(extra="forbid")
    sample_rate: Literal[*RATES] = RATE  # type: ignore[valid-type]


class Ends(BaseModel):
    """Sooner than the server would end the session."""

    model_config = ConfigDict(extra="forbid")
    max_s: Annotated[float | None, Field(gt=0)] = None
    idle_s: Annotated[float | None, Field(gt=0)] = None


Note = Annotated[str, Field(max_length=512)]


class Wanted(BaseModel):
    """An avatar, wherever it is to appear."""

    model_config = ConfigDict(extra="forbid")
    avatar: Face = Field(default_factory=Face)
    prompt: str = Field(PROMPT, min_length=1, max_length=CHARACTERS)
    seed: int = Field(0, ge=0, lt=2**31)


class Create(Wanted):
    live: bool = False  # sound of a microphone, which never stops
    idle: Idle = "generate"
    size: Annotated[str, Field(max_length=16)] | None = None  # WIDTH*HEIGHT, if it must be that
    input: Sound = Field(default_factory=Sound)
    limits: Ends = Ends()
    metadata: dict[Note, Note] = Field(default_factory=dict, max_length=16)  # comes back as it is
    transport: Literal["any", "webrtc", "ws", "livekit"] = "any"  # all but rooms are always open
    livekit: Room | None = None
