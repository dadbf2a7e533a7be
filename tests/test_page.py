"""The page, as a browser with a microphone shows it."""

import contextlib
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest

from tests.processes import free_port

pytest.importorskip("fastapi", reason="needs the extra serve")
httpx = pytest.importorskip("httpx", reason="needs httpx")
api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser")
                 if Path(path).exists()), None)  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update "
    "--use-fake-device-for-media-stream --autoplay-policy=no-user-gesture-required"
).split()
PERIOD, STEP = 8.0, 0.05  # seconds of the recording, which goes round; and between two looks

# The mouth of the mock's face: how much of the strip below the middle is dark.
LOOK = """() => {
  const video = document.getElementById("video"), shown = document.getElementById("canvas");
  const source = video.hidden ? shown : video, canvas = new OffscreenCanvas(256, 256);
  const pen = canvas.getContext("2d");
  pen.drawImage(source, 0, 0, 256, 256);
  const { data } = pen.getImageData(126, 128, 4, 127);
  let dark = 0;
  for (let i = 0; i < data.length; i += 4) dark += data[i] + data[i + 1] + data[i + 2] < 180;
  return dark / 4 / 60;
}"""


@contextlib.contextmanager
def serving(slots: int):
    """A server of drawn frames, in a process of its own; its client."""
    port = free_port()
    words = ("--engine", "mock", "--port", port, "--slots", slots, "--rate", 100, "--drain", 0.1)
    command = [sys.executable, "-m", "serve", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def loudness() -> np.ndarray:
    """Of the recording, once a `STEP`: words of random length."""
    rng = np.random.default_rng(3)
    words = np.repeat(rng.random(40) > 0.5, rng.integers(2, 9, 40))
    return words[: round(PERIOD / STEP)].astype(np.float64)


@pytest.fixture(scope="module")
def microphone(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "microphone.wav"
    loud = np.repeat(loudness(), round(48_000 * STEP))
    tone = 9000 * loud * np.sin(2 * np.pi * 300 * np.arange(len(loud)) / 48_000)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes(tone.astype("<i2").tobytes())
    return path


@contextlib.contextmanager
def page(address: str, microphone: Path | None):
    """A new browser at the page, once the model is ready; without a microphone it is denied."""
    flags = [*FLAGS, "--deny-permission-prompts"]
    if microphone is not None:
        flags = [*FLAGS, "--use-fake-ui-for-media-stream",
                 f"--use-file-for-fake-audio-capture={microphone}"]  # fmt: skip
    with api.sync_playwright() as known:
        browser = known.chromium.launch(executable_path=CHROMIUM, args=flags)
        shown = browser.new_context().new_page()
        faults = []
        shown.on("pageerror", lambda error: faults.append(str(error)))
        end = time.monotonic() + 40
        while True:
            try:
                shown.goto(address)
                break
            except api.Error:
                assert time.monotonic() < end
                time.sleep(0.2)
        until(shown, "window.__avatar?.state === 'ready'")
        yield shown
        assert faults == []
        browser.close()


def until(shown, what: str, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not shown.evaluate(what):
        assert time.monotonic() < end, f"{what}; it says: {shown.inner_text('#status')}"
        time.sleep(0.1)


def follows(shown) -> float:
    """The correlation of mouth and sound at the lag where it is the largest."""
    seen, begun = [], time.monotonic()
    while (now := time.monotonic() - begun) < PERIOD:
        seen.append((now, shown.evaluate(LOOK)))
        time.sleep(STEP)
    at, mouth = np.array(seen).T
    mouth = np.interp(np.arange(0, PERIOD, STEP), at, mouth)
    loud = loudness()[: len(mouth)]
    return max(np.corrcoef(mouth, np.roll(loud, lag))[0, 1] for lag in range(len(loud)))


@pytest.mark.parametrize("way", ["webrtc", "ws"])
def test_the_mouth_follows_what_is_said(way, microphone):
    """And an interrupt is answered, a lost line is taken up, another face is another session, and
    the end is one."""
    with serving(slots=2) as server, page(str(server.base_url), microphone) as shown:
        shown.select_option("#way", way)
        shown.click("#start")
        until(shown, "__avatar.state === 'running'")
        until(shown, "__avatar.events.includes('speech.started')")
        assert follows(shown) > 0.6
        assert shown.evaluate("__avatar.stats.fps") > 20
        shown.keyboard.press("Escape")
        until(shown, "__avatar.cleared?.epoch === 1")
        if way == "webrtc":  # its line fails, and is taken up again
            shown.evaluate("""() => {
              Object.defineProperty(__avatar.peer, "connectionState", { get: () => "failed" });
              __avatar.peer.dispatchEvent(new Event("connectionstatechange"));
            }""")
            until(shown, "document.getElementById('status').innerText.includes('are back')")
            assert shown.evaluate("__avatar.peer.connectionState") == "connected"
            assert follows(shown) > 0.6
        before = shown.evaluate("__avatar.session.id")
        shown.locator(".faces input").nth(2).check(force=True)
        until(shown, f"__avatar.state === 'running' && __avatar.session?.id !== '{before}'")
        assert server.get(f"/v1/sessions/{before}").status_code == 404
        shown.click("#stop")
        until(shown, "__avatar.state === 'ready'")
        end = time.monotonic() + 5  # the engine gives a place back when it has done its block
        while (free := server.get("/readyz").json()["free"]) != 2:
            assert time.monotonic() < end, free
            time.sleep(0.1)


def test_a_page_that_is_left_frees_its_place_and_a_full_server_says_so(microphone):
    with serving(slots=1) as server, page(str(server.base_url), microphone) as shown:
        shown.click("#start")
        until(shown, "__avatar.state === 'running'")
        other = shown.context.new_page()
        other.goto(str(server.base_url))
        until(other, "window.__avatar?.state === 'ready'")
        other.click("#start")
        until(other, "__avatar.state === 'waiting'")
        assert "places are taken" in other.inner_text("#status")
        shown.reload()
        until(other, "__avatar.state === 'running'")
        other.close()


def test_others_watch_by_a_link(microphone):
    """A picture that moves, no microphone, and a word when it is over."""
    with serving(slots=1) as server, page(str(server.base_url), microphone) as shown:
        shown.context.grant_permissions(["clipboard-read", "clipboard-write"])
        shown.click("#start")
        until(shown, "__avatar.state === 'running'")
        shown.click("#share")
        until(shown, "document.getElementById('status').innerText.includes('can watch')")
        link = shown.evaluate("navigator.clipboard.readText()")
        other, faults, asked = shown.context.new_page(), [], []
        other.on("pageerror", lambda error: faults.append(str(error)))
        other.on("request", lambda request: asked.append(request.url))
        other.goto(link)
        until(other, "window.__avatar?.state === 'running'")
        assert follows(other) > 0.6
        assert not any(link.partition("#")[2] in url for url in asked)
        assert other.is_hidden("#start") and other.is_hidden("#mic")
        assert other.evaluate("!__avatar.stream && document.getElementById('video').muted")
        other.click("#sound")
        assert not other.evaluate("document.getElementById('video').muted")
        shown.click("#stop")
        until(other, "__avatar.state === 'over'", 10.0)
        assert other.inner_text("#status") == "The session is over."
        assert other.is_hidden("#video") and other.is_disabled("#sound")
        other.goto(link.partition("#")[0] + "#nothing")
        other.reload()
        until(other, "window.__avatar?.state === 'over'")
        until(other, "document.getElementById('status').innerText.includes('not good here')")
        assert faults == []


def test_a_denied_microphone_is_explained():
    with serving(slots=1) as server, page(str(server.base_url), None) as shown:
        shown.click("#start")
        until(shown, "document.getElementById('status').dataset.kind === 'bad'")
        assert "microphone was denied" in shown.inner_text("#status")
        assert server.get("/readyz").json()["free"] == 1
