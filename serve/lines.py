"""WebSockets that others do not notice: what comes over one is read in small pieces, between those
of all others, and who floods is cut, before anybody has looked at who it is."""

from asyncio import BaseTransport

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

PIECE = 4096  # bytes that are read at once; asyncio would take 64 times as many
FRAMES, BURST = (
    500.0,
    6000.0,
)  # of any kind: a second, and at once, as two minutes of sound may come


class Paced(WebSocketsSansIOProtocol):
    """A WebSocket of uvicorn."""

    _left, _when = BURST, 0.0

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self._when = self.loop.time()
        transport.max_size = PIECE  # type: ignore[attr-defined]

    def handle_events(self) -> None:
        now = self.loop.time()
        self._left = min(BURST, self._left + FRAMES * (now - self._when)) - len(self.conn.events)
        self._when = now
        if self._left >= 0:
            super().handle_events()
        elif not self.close_sent:
            self.conn.events.clear()
            self.close_sent = True
            if self.handshake_complete:
                self.conn.send_close(1008, "too many messages")
                self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()
