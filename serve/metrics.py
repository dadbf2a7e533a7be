"""What operators see: Prometheus metrics, without session ids, faces or sound."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    3.0,
    5.0,
    10.0,
)
SKEW = (-0.5, -0.25, -0.125, -0.045, -0.02, -0.005, 0.005, 0.02, 0.045, 0.125, 0.25, 0.5)
SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """All of one server; names as dashboards know them (seconds, bytes, ratios)."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(name, says, labels, registry=registry)

        def gauge(name: str, says: str, *labels: str) -> Gauge:
            return Gauge(name, says, labels, registry=registry)

        def histogram(
            name: str, says: str, *labels: str, buckets: Sequence[float] = SECONDS
        ) -> Histogram:
            return Histogram(name, says, labels, registry=registry, buckets=buckets)

        self.sessions = gauge("la_sessions", "sessions by state", "state")
        self.admissions = counter("la_session_admissions", "asked for, by result", "result")
        self.length = histogram(
            "la_session_seconds", "how long sessions were",
            buckets=(1, 10, 30, 60, 300, 900, 1800, 3600, 7200, 86400),
        )  # fmt: skip
        self.ended = counter("la_session_ends", "by reason", "reason")
        self.turn = histogram("la_turn_latency_seconds", "first speech sample in to its frame out")
        self.first_frame = histogram("la_first_frame_seconds", "session asked for to first frame")
        self.clear = histogram("la_clear_latency_seconds", "interrupt to its acknowledgement")
        # make is audio, denoise and vae, and what is between; send the pipe to here; publish the
        # wait for its place in the stream; encode is of one frame, for one who watches.
        self.block = histogram("la_block_seconds", "what a block takes, by stage", "stage")
        self.realtime = gauge(
            "la_realtime_factor", "video over time that the slowest engine needs for its sessions"
        )
        self.fps = gauge("la_output_fps", "frames a second, of the session with the fewest")
        self.skew = histogram(
            "la_av_skew_seconds", "picture after its sound on the way to the line", buckets=SKEW
        )
        self.rtt = histogram("la_rtc_rtt_seconds", "round trip of a call")
        self.loss = histogram(
            "la_rtc_loss_ratio", "of packets that a call should have got", "way", buckets=SHARES
        )
        self.frames = counter("la_frames", "frames sent out")
        self.stalls = counter("la_stall_seconds", "picture that came late")
        self.dropped = counter("la_frames_dropped", "frames nobody saw", "why")
        self.gaps = counter("la_input_gap_seconds", "silence in speech that came late, or was lost")
        # Of all sessions: the most that waits for the engine and in it, the least picture.
        self.buffer = gauge("la_buffer_seconds", "what waits: input, engine or picture", "where")
        self.load = gauge("la_load", "of real time, that one session more would make it need", "of")
        self.compiling = gauge("la_compile_seconds", "compiling, of the engine that came last")
        self.cached = counter("la_compile_cache_hits", "programs that were compiled before")
        self.memory = gauge("la_device_memory_bytes", "in use", "worker", "device")
        self.restarts = counter("la_engine_restarts", "engines started again")
        self.ready = gauge("la_engine_ready", "1 when warm")
