"""The agent's side of an avatar in a LiveKit room: three lines in an agent of livekit-agents.

    avatar = AvatarSession("https://avatar.example.org", key, avatar_id="ada")
    await avatar.start(session, room=ctx.room)
    await session.start(agent, room=ctx.room)

`AvatarSession(dispatch="avatar", avatar_id="ada")` names no server: LiveKit sends the one that has
room, of all that are registered under that name (`--livekit-name`).
"""

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from liveavatar_jax.types import LiveAvatarError
from serve.wire import RATE

try:
    import aiohttp
    from livekit import api, rtc
    from livekit.agents import get_job_context
    from livekit.agents.voice import avatar
    from livekit.protocol.agent import JobStatus
except ImportError:
    raise LiveAvatarError("rooms need livekit-agents; install the extra livekit") from None

BEHALF = "lk.publish_on_behalf"  # attribute of an avatar: the identity of its agent
COMES = 25.0  # seconds that an avatar may take into the room
LOOK = 0.25  # seconds between two looks whether it is there
KEYS = "say livekit_api_key and livekit_api_secret, or LIVEKIT_API_KEY and LIVEKIT_API_SECRET"


class AvatarSession(avatar.AvatarSession):
    """An avatar for an AgentSession: of the server at `base_url`, or of one that LiveKit chooses
    among those of the name `dispatch`. Either one that they offer, or a picture file of one's own.
    more: of `POST /v1/sessions`, as prompt and seed."""

    def __init__(
        self, base_url: str = "", api_key: str = "", *, dispatch: str = "",
        avatar_id: str | None = None, image: bytes | None = None, identity: str = "avatar",
        **more: Any,
    ):  # fmt: skip
        super().__init__()
        if bool(base_url) == bool(dispatch):
            raise LiveAvatarError("say where the avatar comes from: base_url, of one server, or "
                                  "dispatch, the name of servers at LiveKit")  # fmt: skip
        picture = None if image is None else base64.b64encode(image).decode()
        face = {"id": avatar_id, "image": picture}
        more["avatar"] = more.get("avatar", {}) | {k: v for k, v in face.items() if v is not None}
        self._url, self._key, self._dispatch = base_url, api_key, dispatch
        self._identity, self._wanted = identity, more
        self._made: str | None = None  # the path of our session, or the id of our dispatch
        self._place: tuple[str, str | None, str | None, str] = ("", None, None, "")

    @property
    def avatar_identity(self) -> str:
        return self._identity

    @property
    def provider(self) -> str:
        return "liveavatar-jax"

    async def start(
        self, agent_session: Any, room: rtc.Room, *, livekit_url: str | None = None,
        livekit_api_key: str | None = None, livekit_api_secret: str | None = None,
    ) -> None:  # fmt: skip
        """Before `agent_session.start`. What is not given is taken from LIVEKIT_URL,
        LIVEKIT_API_KEY and LIVEKIT_API_SECRET. Raises LiveAvatarError, as for a full server."""
        url, job = livekit_url or os.environ.get("LIVEKIT_URL"), get_job_context(required=False)
        if not url:
            raise LiveAvatarError("say where the room is: livekit_url, or LIVEKIT_URL")
        agent = room.local_participant.identity if job is None else job.local_participant_identity
        self._place = (url, livekit_api_key, livekit_api_secret, room.name)
        await (self._send_for(agent) if self._dispatch else self._ask(agent))
        await super().start(agent_session, room)
        agent_session.output.replace_audio_tail(
            avatar.DataStreamAudioOutput(
                room, destination_identity=self._identity, sample_rate=RATE,
                wait_remote_track=rtc.TrackKind.KIND_VIDEO, wait_playback_start=True,
            )
        )  # fmt: skip

    async def aclose(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            with contextlib.suppress(LiveAvatarError, aiohttp.ClientError):
                if self._dispatch:
                    async with self._livekit() as server:
                        await server.agent_dispatch.delete_dispatch(made, self._place[3])
                else:
                    await self._call("DELETE", made)
        await super().aclose()

    # ---- of one server

    async def _ask(self, agent: str) -> None:
        url, key, secret, room = self._place
        try:
            token = api.AccessToken(key, secret).with_kind("agent")
        except ValueError:
            raise LiveAvatarError(KEYS) from None
        token = token.with_identity(self._identity).with_attributes({BEHALF: agent})
        token = token.with_grants(api.VideoGrants(room_join=True, room=room)).to_jwt()
        place = {"transport": "livekit", "livekit": {"url": url, "token": token}}
        said = await self._call("POST", "/v1/sessions", self._wanted | place)
        try:
            self._made = said["urls"]["session"]
        except (KeyError, TypeError):
            raise LiveAvatarError(f"what answers at {self._url} is no avatar server") from None

    async def _call(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        said = None
        try:
            async with (
                aiohttp.ClientSession(headers=headers) as http,
                http.request(method, self._url.rstrip("/") + path, json=body) as answer,
            ):
                with contextlib.suppress(ValueError):  # a page, of a proxy before it
                    said = await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError) as error:
            why = str(error) or "it does not answer in time"
            raise LiveAvatarError(f"no avatar server answers at {self._url}: {why}") from None
        if answer.status >= 400:
            detail = said.get("detail") if isinstance(said, dict) else None
            detail = detail or answer.reason
            raise LiveAvatarError(f"the avatar server refuses ({answer.status}): {detail}")
        return said

    # ---- of whichever LiveKit chooses

    async def _send_for(self, agent: str) -> None:
        """Returns once the avatar is in the room."""
        wanted = self._wanted | {"agent": agent, "identity": self._identity}
        async with self._livekit() as server:
            made = await server.agent_dispatch.create_dispatch(api.CreateAgentDispatchRequest(
                agent_name=self._dispatch, room=self._place[3], metadata=json.dumps(wanted)
            ))  # fmt: skip
            self._made = made.id
            try:
                await asyncio.wait_for(self._comes(server, agent), COMES)
            except BaseException as error:
                self._made = None
                with contextlib.suppress(api.TwirpError, aiohttp.ClientError):
                    await server.agent_dispatch.delete_dispatch(made.id, self._place[3])
                if not isinstance(error, TimeoutError):
                    raise
                detail = f"no avatar came within {COMES:.0f} s; are servers registered as"
                raise LiveAvatarError(f"{detail} {self._dispatch!r}, and not full?") from None

    async def _comes(self, server: api.LiveKitAPI, agent: str) -> None:
        room = self._place[3]
        while True:
            there = await server.room.list_participants(api.ListParticipantsRequest(room=room))
            for who in there.participants:
                if who.identity == self._identity and who.attributes.get(BEHALF) == agent:
                    return
            ours = await server.agent_dispatch.get_dispatch(self._made or "", room)
            for job in [] if ours is None else ours.state.jobs:
                if job.state.status == JobStatus.JS_FAILED:
                    raise LiveAvatarError(f"the avatar server refuses: {job.state.error}")
            await asyncio.sleep(LOOK)

    @contextlib.asynccontextmanager
    async def _livekit(self) -> AsyncIterator[api.LiveKitAPI]:
        """LiveKit's API, whose errors are LiveAvatarErrors."""
        url, key, secret, _ = self._place
        try:
            server = api.LiveKitAPI(url, key, secret)
        except ValueError:
            raise LiveAvatarError(KEYS) from None
        try:
            async with server:
                yield server
        except api.TwirpError as error:
            raise LiveAvatarError(f"LiveKit refuses ({error.status}): {error.message}") from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise LiveAvatarError(f"LiveKit cannot be reached at {url}: {error}") from None
