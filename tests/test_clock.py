"""Sound and picture on one count of samples, under a clock that the test turns."""

import asyncio
import heapq
import random
import types
from collections import defaultdict
from collections.abc import Callable, Coroutine, Generator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from serve.clock import LAG, LOOP, PIECE, QUIET, Overflow, Shown, Timeline, publish
from serve.engine import Seat
from serve.wire import FPS, PER_FRAME, RATE, Block

FRAMES, AHEAD, BEAT = 12, 1920, 1 / FPS
BLOCK = FRAMES * PER_FRAME
FIRST = BLOCK + AHEAD  # samples of the first block


class Day:
    """A clock that jumps to whatever comes next."""

    def __init__(self) -> None:
        self.time, self.end, self._plans, self._count = 0.0, 0.0, [], 0

    def now(self) -> float:
        return self.time

    def at(self, time: float, does: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._plans, (time, self._count, does))

    async def sleep(self, seconds: float) -> None:
        until = self.time + seconds
        while self._plans and self._plans[0][0] <= until:
            time, _, does = heapq.heappop(self._plans)
            self.time = max(self.time, time)
            does()
        self.time = max(self.time, until)
        while self.time >= self.end:
            await pause()


@types.coroutine
def pause() -> Generator[None]:
    yield


class World:
    """A timeline, its publisher and an engine that takes `seconds` for a block. A frame says whose
    it is: its epoch, and its place in it."""

    def __init__(self, seconds: float = 0.1, **options) -> None:
        self.day, self.line = Day(), Timeline(FRAMES, AHEAD, **options)
        self.seconds, self._free = seconds, 0.0
        self.seat = Seat("", 0, 0, BLOCK, AHEAD)
        self.asked: list[tuple[float, np.ndarray]] = []
        self.shown: list[tuple[float, Shown]] = []
        self.stalled = 0.0
        self.sent = 0  # of speech, all epochs
        self.furthest = 0
        self._publisher: Coroutine | None = None

    def run(self, until: float) -> "World":
        """On to a time of the day."""
        self.day.end = until
        if self._publisher is None:
            self._publisher = publish(self.line, self.ask, self.show, self.day, self.stall)
        self._publisher.send(None)
        return self

    # ---- who speaks

    def say(self, count: int) -> np.ndarray:
        """Speech of which every sample is another, and none is silence."""
        samples = speech(self.sent, count)
        self.sent += count
        self.line.push(samples)
        return samples

    def say_at(self, time: float, count: int, end: bool = False) -> None:
        self.day.at(time, lambda: self.say(count))
        if end:
            self.day.at(time, self.line.end)

    def say_live(self, begin: float, seconds: float, piece: float = 0.02) -> None:
        """In small pieces, in time."""
        for i in range(round(seconds / piece)):
            self.day.at(begin + (i + 1) * piece, lambda: self.say(round(piece * RATE)))

    def clear(self) -> float:
        played = self.line.clear()
        self.seat.clear(self.line.epoch)
        return played

    # ---- the engine, and who watches

    def ask(self, samples: np.ndarray) -> None:
        self.asked.append((self.day.time, samples))
        self.furthest = max(self.furthest, self.line.asked - self.line.played)
        self.seat.hear(self.line.epoch, samples)
        while (window := self.seat.window()) is not None:
            self._free = max(self._free, self.day.time) + self.seconds
            first = window.first // PER_FRAME
            frames = np.array([(window.epoch, first + i) for i in range(FRAMES)])
            block = Block("", window.epoch, window.first, frames, {})
            self.day.at(self._free, lambda block=block: self.line.arrive(block))

    def show(self, shown: Shown) -> None:
        self.shown.append((self.day.time, shown))

    def stall(self, seconds: float) -> None:
        self.stalled += seconds

    # ---- what was seen

    def sound(self, epoch: int | None = None) -> np.ndarray:
        pieces = [x.samples for _, x in self.shown if epoch in (None, x.epoch)]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int16)

    def spoken(self, epoch: int | None = None) -> np.ndarray:
        sound = self.sound(epoch)
        return sound[sound != 0]

    def events(self, *names: str) -> list[tuple[float, str, dict]]:
        return [(time, name, fields) for time, x in self.shown for name, fields in x.events
                if not names or name in names]  # fmt: skip

    def when(self, sample: int) -> float:
        """When the frame with a sample of the speech was shown."""
        spoken = np.cumsum([np.count_nonzero(x.samples) for _, x in self.shown])
        assert spoken[-1] > sample, f"sample {sample} was not shown"
        return self.shown[int(np.argmax(spoken > sample))][0]


def speech(first: int, count: int) -> np.ndarray:
    """Loud and never 0; a sample is another one than the 30,000 before it."""
    return (1000 + (first + np.arange(count)) % 30_000).astype(np.int16)


def check_pairs(world: World) -> None:
    """What goes out together belongs together, and nothing is lost or comes twice."""
    heard: dict[int, list[np.ndarray]] = defaultdict(list)
    at, epoch = 0, 0
    for _, x in world.shown:
        assert x.epoch >= epoch
        at = 0 if x.epoch > epoch else at
        epoch = x.epoch
        assert x.first == at
        assert tuple(x.frame) == (x.epoch, at // PER_FRAME)
        assert len(x.samples) == PER_FRAME
        at += PER_FRAME
        heard[epoch].append(x.samples)
    assert world.line.total == len(world.shown) * PER_FRAME


# ---- pairs, and time


def test_a_frame_goes_out_with_the_samples_it_was_made_from():
    world = World(lookahead=2)
    world.say_at(1.03, 3 * RATE)
    world.say_at(2.5, RATE // 3, end=True)
    world.run(8.0)
    check_pairs(world)
    told = np.concatenate([samples for _, samples in world.asked])
    sound = world.sound()
    np.testing.assert_array_equal(sound, told[: len(sound)])


@pytest.mark.parametrize("hours", [1, pytest.param(24, marks=pytest.mark.slow)])
def test_nothing_drifts_in_a_day(hours):
    """Speech and silence by turns: frames are seconds times 25, samples frames times 640."""
    world, seconds = World(), hours * 3600
    shown = [0, 0, 0]  # frames, samples, and what was out of its place

    def show(x: Shown) -> None:
        shown[2] += x.first != shown[1] or x.frame[1] != shown[0] or len(x.samples) != PER_FRAME
        shown[0] += 1
        shown[1] += len(x.samples)

    world.show = show
    world.ask = lambda samples, ask=world.ask: (ask(samples), world.asked.clear())
    draw = random.Random(0)
    for minute in range(seconds // 60):
        begin = 60 * minute + draw.uniform(0, 20)
        world.say_at(begin, draw.randrange(RATE, 30 * RATE), end=True)
    world.run(seconds)
    assert shown[2] == 0 and world.stalled == 0
    assert shown[1] == shown[0] * PER_FRAME == world.line.total == world.line.played
    late = world.seconds + BEAT  # the first block's
    assert seconds - late <= shown[0] / FPS <= seconds
    assert len(world.line._heard) <= 4 and world.line.waiting == 0


def test_a_pair_goes_out_each_40_ms_and_never_sooner():
    world = World(seconds=0.3, margin=0.36)
    world.say_at(2.0, 10 * RATE)
    world.run(15.0)
    times = np.array([time for time, _ in world.shown])
    np.testing.assert_allclose(np.diff(times), BEAT, atol=1e-6)
    assert world.stalled == 0


# ---- how far ahead


def test_silence_is_made_just_in_time():
    world = World(margin=0.2).run(60.0)
    assert world.furthest <= 0.2 * RATE + BLOCK
    assert world.stalled == 0 and not world.spoken().size


def test_speech_that_waits_is_made_no_further_ahead_than_agreed():
    for lookahead in (1, 2, 4):
        world = World(lookahead=lookahead)
        world.say(60 * RATE)
        world.run(30.0)
        assert world.furthest <= (lookahead + 1) * BLOCK
        assert world.furthest > (lookahead - 1) * BLOCK


def test_more_speech_than_may_wait_is_refused_and_changes_nothing():
    world = World(limit=2.0)
    world.say(2 * RATE)
    with pytest.raises(Overflow, match="send no more than 2 s ahead"):
        world.line.push(speech(0, 1))
    assert world.line.waiting == 2 * RATE
    world.line.end()
    world.run(5.0)
    np.testing.assert_array_equal(world.spoken(), speech(0, 2 * RATE))


BOUND = (BLOCK + AHEAD) / RATE + 0.2 + BEAT  # block, look-ahead, margin, a frame


def test_after_long_silence_speech_is_shown_as_soon_as_ever():
    """Ten minutes of nothing, then somebody speaks: not behind queued silence."""
    draw = random.Random(1)
    world = World(margin=0.2)
    begins = [600 + 20 * i + draw.uniform(0, 2) for i in range(40)]
    for begin in begins:
        world.say_at(begin, 2 * RATE, end=True)
    world.run(begins[-1] + 5)
    started = [time for time, *_ in world.events("speech.started")]
    late = np.array(started) - np.array(begins)
    assert len(late) == 40 and late.max() <= BOUND + 1e-6
    assert world.stalled == 0


def test_speech_that_comes_in_small_pieces_waits_for_one_block_more():
    world = World(margin=0.2)
    world.say_live(600.0, 8.0)
    world.run(612.0)
    begin, middle = world.when(0) - 600, world.when(6 * RATE) - 606
    assert begin <= BOUND + FIRST / RATE
    assert middle <= BOUND + FIRST / RATE and begin <= middle + BLOCK / RATE
    np.testing.assert_array_equal(world.spoken(), speech(0, 8 * RATE))


# ---- speech that comes late


@pytest.mark.parametrize("seed", range(5))
def test_jitter_makes_gaps_but_loses_and_moves_nothing(seed):
    draw, world = random.Random(seed), World()
    at = 5.0
    for _ in range(200):
        at += draw.choice([0.02, 0.02, 0.02, 0.5, 1.0]) * draw.random()
        world.say_at(at, draw.randrange(1, 2000))
    world.day.at(at, world.line.end)
    world.run(at + 30)
    check_pairs(world)
    np.testing.assert_array_equal(world.spoken(), speech(0, world.sent))
    assert world.line.gaps > 0 and world.line.waiting == 0 and world.stalled == 0


def test_steady_speech_has_no_gaps_after_its_first():
    """A delay once made is kept: it meets the next jitter."""
    world = World()
    world.say_live(5.0, 60.0)
    world.run(66.0)
    sound = world.sound()
    said = np.flatnonzero(sound)
    steady = said[(said > 15 * RATE) & (said < 60 * RATE)]
    assert len(steady) == steady[-1] - steady[0] + 1


def test_what_is_shorter_than_a_block_is_said_when_its_end_is_known():
    world = World()
    world.say_at(5.0, RATE // 10)
    world.day.at(8.0, world.line.end)
    world.run(7.5)
    assert world.line.short and not world.spoken().size
    world.run(12.0)
    assert not world.line.short and world.when(0) <= 8.0 + BOUND
    np.testing.assert_array_equal(world.spoken(), speech(0, RATE // 10))


# ---- begin and end


def test_beginning_and_end_of_speech_are_said_with_their_frames():
    world = World()
    lengths = [RATE // 10, 3 * RATE + 7, BLOCK, 1, 5000]
    for i, length in enumerate(lengths):
        world.say_at(2 + 6 * i, length, end=True)
    world.run(40.0)
    names = [name for _, name, _ in world.events()]
    assert names == ["speech.started", "speech.ended"] * len(lengths)
    ended = [fields["played_ms"] for *_, fields in world.events("speech.ended")]
    assert ended == [round(1000 * n / RATE) for n in lengths]
    first = 0
    for (time, _, fields), length in zip(world.events("speech.started"), lengths, strict=True):
        assert world.sound()[fields["at_sample"]] == speech(first, 1)
        assert fields["source"] == first and world.when(first) == time
        first += length


def test_speeches_that_wait_together_end_apart():
    """Each mark stands where it was made, however much was sent after it."""
    world, lengths = World(), [4000, 12_345, 300, 60_000, 1]
    for length in lengths:
        world.say(length)
        world.line.end()
        world.line.end()  # twice is once
    world.run(12.0)
    ended = [fields["played_ms"] for *_, fields in world.events("speech.ended")]
    assert ended == [round(1000 * n / RATE) for n in lengths]
    np.testing.assert_array_equal(world.spoken(), speech(0, sum(lengths)))
    assert world.line.gaps == 0


def test_an_end_that_comes_when_all_was_shown_ends_no_later_speech():
    world = World()
    world.say(FIRST + BLOCK)  # whole blocks: nothing of it waits
    world.day.at(0.5, world.line.end)
    world.day.at(0.6, world.line.end)
    world.say_at(3.0, 100)  # the first piece of another
    world.say_at(3.1, RATE)
    world.run(3.05)
    assert [name for _, name, _ in world.events()] == ["speech.started", "speech.ended"]
    world.run(8.0)
    starts = world.events("speech.started")
    assert len(starts) == 2 and starts[1][2]["source"] == FIRST + BLOCK
    said = np.flatnonzero(world.sound())
    assert said[-1] - said[-RATE - 100] == RATE + 99  # in one piece


# ---- interrupts


def test_after_an_interrupt_nothing_older_is_shown_and_its_place_is_true():
    draw, world, at = random.Random(2), World(seconds=0.2), 1.0
    cleared: list[tuple[float, float, int]] = []

    def clear() -> None:
        before = [x for _, x in world.shown if x.epoch == world.line.epoch]
        starts = [i for i, x in enumerate(before) for name, _ in x.events
                  if name == "speech.started"]  # fmt: skip
        ends = [i for i, x in enumerate(before) for name, _ in x.events if name == "speech.ended"]
        true = 0
        if len(starts) > len(ends):
            sound = np.concatenate([x.samples for x in before[starts[-1] :]])
            first = speech(starts_source(before[starts[-1]]), 1)
            begin = int(np.argmax(sound == first))
            true = np.count_nonzero(sound[begin:])
        assert world.clear() == pytest.approx(true / RATE)
        cleared.append((world.day.time, true / RATE, world.line.epoch))
        world.sent = 0

    def starts_source(x: Shown) -> int:
        return next(fields["source"] for name, fields in x.events if name == "speech.started")

    for _ in range(200):
        for _ in range(draw.randrange(3)):
            world.say_at(at + draw.random(), draw.randrange(100, 30_000))
        if draw.random() < 0.5:
            world.day.at(at + 0.5 + draw.random() / 2, world.line.end)
        at += draw.choice([0.05, 1.0, 4.0]) * draw.random()
        world.day.at(at, clear)
    world.run(at + 3)
    check_pairs(world)
    assert world.line.epoch == 200 and sum(played > 0 for _, played, _ in cleared) > 20
    for time, x in world.shown:
        asked = [epoch for when, _, epoch in cleared if when <= time]
        assert x.epoch >= max(asked, default=0)


def test_gaps_do_not_count_as_played():
    world = World()
    world.say(FIRST)
    for at in (0.3, 0.7):
        world.say_at(at, 1000)  # too little for a block
    world.run(1.24)
    assert world.line.gaps > 0 and world.line.played > FIRST + BLOCK
    assert world.clear() == pytest.approx(np.count_nonzero(world.sound()) / RATE)


def test_the_first_frame_after_an_interrupt_waits_for_one_block_only():
    world = World(seconds=0.1)
    world.say(30 * RATE)
    world.day.at(10.0, world.clear)
    world.run(12.0)
    first = next(time for time, x in world.shown if x.epoch == 1)
    # what the engine had been asked for before is made first
    assert first <= 10.0 + 4 * world.seconds + 2 * BEAT


# ---- a microphone


def noise(count: int, loudness: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, loudness, count).astype(np.int16)


def test_a_microphone_that_lags_loses_what_is_quiet_and_nothing_else():
    """Two seconds come at once, after the network stood still: speech, quiet, speech."""
    world = World(live=True)
    loud = speech(0, 4 * RATE)
    quiet = noise(2 * RATE, QUIET / 4)
    burst = np.concatenate([loud[: 2 * RATE], quiet, loud[2 * RATE :]])
    for i in range(0, len(burst), PIECE):
        world.day.at(10.0, lambda x=burst[i : i + PIECE]: world.line.push(x))
    for i in range(500):
        at = 10 + (i + 1) * PIECE / RATE
        world.day.at(at, lambda i=i: world.line.push(noise(PIECE, QUIET / 4, i)))
    world.run(30.0)
    sound = world.sound()
    np.testing.assert_array_equal(sound[np.abs(sound) > 900], loud)
    assert world.line.dropped >= 2 * RATE - PIECE
    assert world.line._behind <= LAG


def test_a_delay_that_jitter_made_is_taken_back_while_nobody_speaks():
    world = World(live=True)
    stops = {10: 0.9, 20: 1.5, 30: 0.7}  # seconds for which nothing comes, and then all at once
    for i in range(round(60 * RATE / PIECE)):
        at = (i + 1) * PIECE / RATE
        begin = 10 * int(at / 10)
        held = begin + stops.get(begin, 0.0)
        said = speech(0, PIECE) if 50 <= at < 52 else noise(PIECE, QUIET / 4, i)
        world.day.at(max(at, held), lambda x=said: world.line.push(x))
    world.run(62.0)
    (started,) = world.events("speech.started")
    assert started[0] - 50 <= BOUND + FIRST / RATE + BEAT
    assert world.line.dropped > 0


def test_a_quiet_microphone_is_nobody_who_speaks():
    world = World(live=True)
    for i in range(1000):
        world.day.at(i * 0.02, lambda i=i: world.line.push(noise(PIECE, QUIET / 2, i)))
    world.run(20.0)
    assert not world.events() and not world.line.speaking and world.line.dropped == 0


# ---- nobody speaks, and nothing is made


def test_frozen_the_last_frame_stands_while_nobody_speaks():
    world = World(idle="freeze")
    world.run(60.0)
    assert len(world.shown) == FRAMES and len(world.asked) == 1
    world.say(2 * RATE)
    world.line.end()
    world.run(63.5)
    assert world.when(0) <= 60 + world.seconds + AHEAD / RATE + 2 * BEAT
    np.testing.assert_array_equal(world.spoken(), speech(0, 2 * RATE))
    count = len(world.asked)
    world.run(3600.0)
    assert len(world.asked) == count and world.stalled == 0
    check_pairs(world)
    assert [name for _, name, _ in world.events()] == ["speech.started", "speech.ended"]


def test_in_a_loop_silence_is_shown_again_and_nothing_is_made():
    """There and back; then what is said fades in, and counts go on as if all had been made."""
    world = World(idle="loop")
    world.run(60.0)
    made = world.line.made - world.line.again
    assert made == len(world.asked) * BLOCK <= (LOOP + 2 * FRAMES) * PER_FRAME
    again = [pair for _, pair in world.shown][made // PER_FRAME :]
    shown = lambda pair: int(pair.frame[1])
    last = made // PER_FRAME - 1
    there = [last - 1 - i for i in range(LOOP - 1)] + [last - LOOP + 2 + i for i in range(LOOP - 1)]
    assert [shown(pair) for pair in again[: len(there)]] == there
    assert not any(pair.samples.any() for pair in again)
    assert [pair.first for _, pair in world.shown] == [
        i * PER_FRAME for i in range(len(world.shown))
    ]
    world.say(2 * RATE)
    world.line.end()
    world.run(63.5)
    assert world.when(0) <= 60 + world.seconds + AHEAD / RATE + 2 * BEAT
    np.testing.assert_array_equal(world.spoken(), speech(0, 2 * RATE))
    count = len(world.asked)
    world.run(600.0)
    assert len(world.asked) <= count + LOOP // FRAMES + 3 and world.stalled == 0
    assert [name for _, name, _ in world.events()] == ["speech.started", "speech.ended"]
    assert world.clear() == 0.0 and world.line.again == 0
    world.run(601.0)
    assert world.shown[-1][1].epoch == 1


@pytest.mark.parametrize("seed", range(8))
def test_idle_may_change_at_any_time_and_no_sample_and_no_beat_is_lost(seed):
    rng = np.random.default_rng(seed)
    world, now = World(), 2.0
    for _ in range(40):
        world.run(now)
        world.line.idle = ("generate", "loop", "freeze")[rng.integers(3)]
        if rng.random() < 0.3:
            world.say(int(rng.integers(100, 2 * RATE)))
            world.line.end()
        now += rng.choice([0.1, 0.7, 5.0, 12.0]) * rng.random()
    world.line.idle = "generate"
    world.run(now + 10.0)
    np.testing.assert_array_equal(world.spoken(), speech(0, world.sent))
    times, pairs = zip(*world.shown, strict=True)
    assert [pair.first for pair in pairs] == [i * PER_FRAME for i in range(len(pairs))]
    assert world.stalled == 0 and min(np.diff(times)) > 0.99 * BEAT
    started, ended = world.events("speech.started"), world.events("speech.ended")
    assert len(started) == len(ended) > 0
    last = [time for time in times if time > now + 1.0]
    assert max(np.diff(last)) < 1.01 * BEAT  # it goes on


# ---- a late engine


def test_when_the_engine_is_late_picture_and_sound_are_held_together():
    world = World(seconds=0.1)
    world.say(20 * RATE)
    world.day.at(4.0, lambda: setattr(world, "_free", 9.0))  # it does nothing for five seconds
    world.run(30.0)
    check_pairs(world)
    np.testing.assert_array_equal(world.spoken(), speech(0, 20 * RATE))
    times = np.diff([time for time, _ in world.shown])
    held = times[times > 1.5 * BEAT]
    assert len(held) == 1 and world.stalled == pytest.approx(held[0] - BEAT, abs=1e-6)
    assert np.isclose(np.delete(times, times.argmax()), BEAT).all()


def test_an_engine_that_is_too_slow_stalls_and_keeps_its_pairs():
    world = World(seconds=0.6)  # for 0.48 s
    world.say(20 * RATE)
    world.run(40.0)
    check_pairs(world)
    np.testing.assert_array_equal(world.spoken(), speech(0, 20 * RATE))
    assert world.stalled > 0.1 * 20


def test_a_clock_that_jumps_is_a_stall_and_no_burst():
    world = World()
    world.day.at(5.0, lambda: setattr(world.day, "time", 8.0))
    world.run(20.0)
    times = np.diff([time for time, _ in world.shown])
    assert world.stalled == pytest.approx(3.0, abs=2 * BEAT)
    assert (times > BEAT / 2).all()
    check_pairs(world)


def test_a_short_delay_of_the_clock_is_caught_up_with():
    world = World(seconds=0.02)
    for at in range(5, 50):
        world.day.at(at, lambda at=at: setattr(world.day, "time", at + 0.15))
    world.run(60.0)
    assert world.stalled == 0
    assert len(world.shown) >= 60 * FPS - 10


def test_blocks_that_do_not_follow_each_other_are_refused():
    line, frames = Timeline(FRAMES, AHEAD), np.zeros((FRAMES, 1))
    line.due()
    line.arrive(Block("", 0, 0, frames, {}))
    with pytest.raises(ValueError, match="7680 comes next"):
        line.arrive(Block("", 0, 2 * BLOCK, frames, {}))
    line.arrive(Block("", 9, 5, frames, {}))
    assert line.stale == FRAMES and line.buffered == FRAMES / FPS


def test_publishing_goes_on_in_real_time_too():
    """Half a second of it, under asyncio's own clock."""
    from serve.clock import RealClock

    line, seat, shown = Timeline(FRAMES, AHEAD), Seat("", 0, 0, BLOCK, AHEAD), []

    def ask(samples: np.ndarray) -> None:
        seat.hear(0, samples)
        while (window := seat.window()) is not None:
            line.arrive(Block("", 0, window.first, np.zeros((FRAMES, 1)), {}))

    async def run() -> float:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        show = lambda x: (shown.append(x), len(shown) == 13 and done.set())
        begun = loop.time()
        task = asyncio.create_task(publish(line, ask, show, RealClock()))
        await asyncio.wait_for(done.wait(), 30)
        task.cancel()
        return loop.time() - begun

    assert asyncio.run(run()) >= 12 * BEAT - 0.2


# ---- whatever happens

deeds = some.lists(
    some.one_of(
        some.tuples(some.just("say"), some.integers(1, 20_000)),
        some.tuples(some.sampled_from(["end", "clear", "tick", "tick", "arrive"]), some.just(0)),
        some.tuples(some.just("ticks"), some.integers(2, 40)),
        some.tuples(some.just("idle"), some.integers(0, 1)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=100, database=None)
@given(deeds, some.sampled_from(["generate", "freeze"]), some.integers(1, 3), some.integers(0, 3))
def test_in_whatever_order_things_happen_nothing_is_lost_or_mixed(deeds, idle, lookahead, late):
    line = Timeline(FRAMES, AHEAD, idle=idle, lookahead=lookahead, limit=10.0)
    seat, flight = Seat("", 0, 0, BLOCK, AHEAD), []
    # of the epoch: samples pushed, what the engine was told, what was shown
    pushed, told, shown = 0, [], []
    begun, played = None, 0  # where the speech under way began; milliseconds of those that ended

    def tick() -> None:
        nonlocal begun, played
        while (samples := line.due()) is not None:
            assert len(samples) == (FIRST if line.sent == FIRST else BLOCK)
            told.append(samples)
            seat.hear(line.epoch, samples)
            while (window := seat.window()) is not None:
                first = window.first // PER_FRAME
                frames = np.array([(window.epoch, first + i) for i in range(FRAMES)])
                flight.append(Block("", window.epoch, window.first, frames, {}))
        most = max((lookahead + 1) * BLOCK, line.margin * RATE + BLOCK)
        assert line.made <= line.asked and line.asked - line.played <= most
        if len(flight) > late:
            line.arrive(flight.pop(0))
        if (pair := line.next()) is None:
            return
        assert (pair.epoch, pair.first) == (line.epoch, len(shown) * PER_FRAME)
        assert tuple(pair.frame) == (line.epoch, len(shown))
        shown.append(pair.samples)
        for name, fields in pair.events:
            if name == "speech.started":
                assert begun is None
                begun = fields["source"]
                at = fields["at_sample"] - pair.first
                assert pair.samples[at] == speech(begun, 1)
            else:
                assert begun is not None
                begun, played = None, played + fields["played_ms"]

    def check() -> np.ndarray:
        """All that was shown is what was told, and that is what was pushed, and gaps."""
        heard, seen = (np.concatenate([np.zeros(0, np.int16), *x]) for x in (told, shown))
        np.testing.assert_array_equal(seen, heard[: len(seen)])
        said, spoken = heard[heard != 0], seen[seen != 0]
        np.testing.assert_array_equal(said, speech(0, len(said)))
        assert line.waiting == pushed - len(said)
        return spoken

    for deed, count in deeds:
        if deed == "say":
            try:
                line.push(speech(pushed, count))
                pushed += count
            except Overflow:
                assert line.waiting + count > 10 * RATE
        elif deed == "end":
            line.end()
        elif deed == "idle":
            line.idle = ("generate", "freeze")[count]
        elif deed == "clear":
            true = 0 if begun is None else len(check()) - begun
            assert line.clear() == pytest.approx(true / RATE)
            seat.clear(line.epoch)
            pushed, told, shown, begun, played = 0, [], [], None, 0
        elif deed == "arrive" and flight:
            line.arrive(flight.pop(0))
        for _ in range({"tick": 1, "ticks": count}.get(deed, 0)):
            tick()
    check()
    line.end()
    late = 0
    for _ in range(1000):
        if not line.speaking:
            break
        tick()
    assert len(check()) == pushed and begun is None and not line.speaking
    assert abs(played - 1000 * pushed / RATE) <= len(deeds)  # rounded, each time
