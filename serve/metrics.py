"""What operators see: Prometheus metrics, without session ids, faces or sound."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class Metrics:
    """All of one server; names as dashboards know them (seconds, bytes, ratios)."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(name, says, labels, registry=registry)

        def gauge(name: str, says: str, *labels: str) -> Gauge:
            return Gauge(name, says, labels, registry=registry)

        def histogram(name: str, says: str, *labels: str) -> Histogram:
            return Histogram(name, says, labels, registry=registry, buckets=SECONDS)

        self.sessions = gauge("la_sessions", "sessions by state", "state")
        self.admissions = counter("la_session_admissions", "asked for, by result", "result")
        self.length = Histogram(
            "la_session_seconds", "how long sessions were", registry=registry,
            buckets=(1, 10, 30, 60, 300, 900, 1800, 3600, 7200, 86400),
        )  # fmt: skip
        self.ended = counter("la_session_ends", "by reason", "reason")
        self.turn = histogram("la_turn_latency_seconds", "first speech sample in to its frame out")
        self.first_frame = histogram("la_first_frame_seconds", "session asked for to first frame")
        self.clear = histogram("la_clear_latency_seconds", "interrupt to its acknowledgement")
        self.block = histogram("la_block_seconds", "making a block", "stage")
        self.frames = counter("la_frames", "frames sent out")
        self.stalls = counter("la_stall_seconds", "picture that came late")
        self.dropped = counter("la_frames_dropped", "frames nobody saw", "why")
        self.gaps = counter("la_input_gap_seconds", "silence put into speech that came late")
        self.buffer = gauge("la_buffer_seconds", "picture made and not shown, the least of all")
        self.load = gauge("la_load", "of real time, that one session more would make it need", "of")
        self.restarts = counter("la_engine_restarts", "engines started again")
        self.ready = gauge("la_engine_ready", "1 when warm")
