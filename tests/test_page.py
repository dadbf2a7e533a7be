"""The page, as a browser with a microphone shows it."""

import contextlib
import dataclasses
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.processes import free_port

pytest.importorskip("fastapi", reason="needs the extra serve")
httpx = pytest.importorskip("httpx", reason="needs httpx")
api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser")
                 if Path(path).exists()), None)  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --no-proxy-server "
    "--use-fake-device-for-media-stream --deny-permission-prompts "
    "--autoplay-policy=no-user-gesture-required"
).split()
SPEAKS = ("microphone",)  # what a visitor allows
STEP = 0.02  # seconds between two looks
LOOKS = 6.0  # seconds of them
NEAR = 0.2  # seconds by which a lag that is known may be wrong, on a machine that does other things

# Sound that a page plays from buffers, for `LOOK`.
TAP = """
const connect = AudioBufferSourceNode.prototype.connect;
AudioBufferSourceNode.prototype.connect = function (to) {
  if (window.tap?.context !== this.context) window.tap = this.context.createAnalyser();
  connect.call(this, window.tap);
  return connect.call(this, to);
};
"""

# Once a step: the time, how loud the microphone is, and what is heard, how open the mouth of the
# mock's face is (how much of the strip below the middle is dark), and the seconds that what comes
# now waits in the page, or in the browser's buffer.
LOOK = """([seconds, step]) => {
  const video = document.getElementById("video"), canvas = document.getElementById("canvas");
  const source = video.hidden ? canvas : video, context = new AudioContext();
  const pen = new OffscreenCanvas(4, 128).getContext("2d", { willReadFrequently: true });
  const ear = (tracks) => {
    const analyser = context.createAnalyser();
    context.createMediaStreamSource(new MediaStream(tracks)).connect(analyser);
    return analyser;
  };
  const spoken = __avatar.stream && ear(__avatar.stream.getAudioTracks());
  const heard = video.hidden ? window.tap : ear(video.srcObject.getAudioTracks());
  const wave = new Float32Array(1024);
  const loudness = (analyser) => {
    if (!analyser) return 0;
    analyser.fftSize = wave.length;
    analyser.getFloatTimeDomainData(wave);
    return Math.sqrt(wave.reduce((sum, x) => sum + x * x, 0) / wave.length);
  };
  const opening = () => {
    const width = source.videoWidth || source.width, height = source.videoHeight || source.height;
    pen.drawImage(source, width * 126 / 256, height / 2, width / 64, height / 2, 0, 0, 4, 128);
    const { data } = pen.getImageData(0, 0, 4, 128);
    let dark = 0;
    for (let i = 0; i < data.length; i += 4) dark += data[i] + data[i + 1] + data[i + 2] < 180;
    return dark / 4 / 60;
  };
  let stored = 0, emitted = 0, wait = 0;
  const buffer = async () => (await __avatar.peer.getStats()).forEach((x) => {
    if (x.kind !== "video" || !(x.jitterBufferEmittedCount > emitted)) return;
    wait = (x.jitterBufferDelay - stored) / (x.jitterBufferEmittedCount - emitted);
    [stored, emitted] = [x.jitterBufferDelay, x.jitterBufferEmittedCount];
  });
  const rows = [], begun = performance.now();
  window.looked = new Promise((done) => {
    const timer = setInterval(() => {
      const now = performance.now(), at = (performance.timeOrigin + now) / 1000;
      if (__avatar.peer) buffer();
      else wait = __avatar.next - __avatar.context.currentTime;
      rows.push([at, loudness(spoken), loudness(heard), opening(), wait]);
      if (now - begun < 1000 * seconds) return;
      clearInterval(timer);
      context.close();
      done(rows);
    }, 1000 * step);
  });
}"""


# ---- what is tested


@dataclasses.dataclass(frozen=True)
class Served:
    process: subprocess.Popen
    http: "httpx.Client"
    url: str

    @property
    def free(self) -> int:
        return self.http.get("/readyz").json()["free"]

    def is_free(self, slots: int = 2) -> None:
        """Soon: the engine gives a place back when it has done its block."""
        end = time.monotonic() + 20
        while (free := self.free) != slots:
            assert time.monotonic() < end, free
            time.sleep(0.1)

    @property
    def engine(self) -> int:
        """Its process."""
        of = self.process.pid
        return int(Path(f"/proc/{of}/task/{of}/children").read_text().split()[0])


@contextlib.contextmanager
def serving(slots: int, **more: object):
    """A server of drawn frames, in a process of its own, which is ready."""
    port, host = free_port(), more.get("host", "127.0.0.1")
    options = {"engine": "mock", "port": port, "slots": slots, "rate": 100, "drain": 0.1} | more
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    process = subprocess.Popen([sys.executable, "-m", "serve", *words], stderr=subprocess.DEVNULL)
    url = f"http://{host}:{port}"
    try:
        with httpx.Client(base_url=url, trust_env=False) as client:
            served, end = Served(process, client, url), time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if served.free == slots:
                        break
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.1)
            yield served
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGKILL)


def loudness() -> np.ndarray:
    """Of the recording, which goes round after 8 s, each 0.05 s: words of random length."""
    rng = np.random.default_rng(3)
    return np.repeat(rng.random(40) > 0.5, rng.integers(2, 9, 40))[:160].astype(np.float64)


@pytest.fixture(scope="module")
def microphone(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "microphone.wav"
    loud = np.repeat(loudness(), round(48_000 * 0.05))
    tone = 9000 * loud * np.sin(2 * np.pi * 300 * np.arange(len(loud)) / 48_000)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes(tone.astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def browser(microphone):
    flags = [*FLAGS, f"--use-file-for-fake-audio-capture={microphone}"]
    with api.sync_playwright() as known:
        browser = known.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server():
    with serving(slots=2) as served:
        yield served


@contextlib.contextmanager
def page(browser, url: str | None, *allowed: str):
    """A new visitor, who allows this and nothing else; at the page, once the model is ready."""
    context = browser.new_context(permissions=allowed)
    context.add_init_script(TAP)
    faults = []
    context.on("weberror", lambda error: faults.append(str(error.error)))
    try:
        shown = context.new_page()
        if url is not None:
            shown.goto(url)
            until(shown, "window.__avatar?.state === 'ready'")
        yield shown
        assert faults == []
    finally:
        context.close()


def until(shown, what: str, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not shown.evaluate(what):
        assert time.monotonic() < end, f"{what}; it says: {shown.inner_text('#status')}"
        time.sleep(0.1)


def says(shown, text: str, seconds: float = 40.0) -> None:
    """The status line does, sooner or later."""
    until(shown, f"document.getElementById('status').textContent.includes({text!r})", seconds)


# ---- sound and lips


@dataclasses.dataclass(frozen=True)
class Looked:
    """What a page had, once a `STEP`."""

    spoken: np.ndarray
    heard: np.ndarray
    mouth: np.ndarray
    wait: np.ndarray

    @property
    def skew(self) -> float:
        """Seconds by which the mouth comes after the sound that is heard."""
        lags = np.arange(-0.6, 0.6, STEP)
        found = alike(self.mouth, self.heard, lags)
        assert found.max() > 0.6
        return float(lags[found.argmax()])


def looked(*pages, seconds: float = LOOKS) -> list[Looked]:
    """What each of them had at the same times."""
    for one in pages:
        one.evaluate(LOOK, [seconds, STEP])
    rows = [np.array(one.evaluate("looked")).T for one in pages]
    grid = np.arange(max(at[0] for at, *_ in rows), min(at[-1] for at, *_ in rows), STEP)
    return [Looked(*(np.interp(grid, at, x) for x in had)) for at, *had in rows]


def alike(late: np.ndarray, early: np.ndarray, lags: np.ndarray) -> np.ndarray:
    """The correlation of one with the other, so many seconds earlier."""
    size = len(late)
    pairs = [(late[max(n, 0) : size + min(n, 0)], early[max(-n, 0) : size - max(n, 0)])
             for n in np.round(lags / STEP).astype(int).tolist()]  # fmt: skip
    return np.array([np.corrcoef(*pair)[0, 1] for pair in pairs])


def follows(shown, speaker=None) -> None:
    """The mouth is as the microphone was and as the sound is, or it fails. A machine that does
    other things may stand still meanwhile: up to three looks are taken."""
    speaker = speaker or shown
    until(speaker, "__avatar.stats.turn_ms")
    for _ in range(3):
        if not (wrong := is_wrong(shown, speaker)):
            return
    raise AssertionError(wrong)


def is_wrong(shown, speaker) -> str:
    """What is, if anything. The lag from microphone to mouth is known: what a turn takes, as the
    server says, and the line; and how long the page lets wait what came."""
    rows = looked(*dict.fromkeys((shown, speaker)))
    here, there = rows[0], rows[-1]
    known = number(speaker, "s-turn") + number(speaker, "s-rtt") + float(np.median(here.wait))
    lags = np.arange(0, known + 1.0, STEP)
    found, off = alike(here.mouth, there.spoken, lags), np.abs(lags - known)
    best, other = found[off < NEAR].max(), found[off > 2 * NEAR].max()
    if best < max(0.6, other + 0.3):
        most = lags[found.argmax()]
        return f"{best:.2f} after {known:.2f} s, {other:.2f} elsewhere; most after {most:.2f} s"
    read = number(shown, "s-skew") if shown is speaker else here.skew
    if abs(here.skew) > 0.25 or abs(here.skew - read) > 0.2:
        return f"the mouth comes {here.skew:.2f} s after the sound, {read:.2f} as the page has it"
    return ""


def number(shown, of: str) -> float:
    """What the page shows, once it is one; seconds, where it is milliseconds."""
    until(shown, f"/\\d/.test(document.getElementById('{of}').textContent)")
    value, unit = shown.inner_text(f"#{of}").split(" ", 1)
    return float(value) / (1000 if unit == "ms" else 1)


@pytest.mark.parametrize("way", ["webrtc", "ws"])
def test_the_mouth_follows_what_is_said(way, browser, server):
    """And an interrupt is answered, a lost line is taken up, another face is another session, and
    the end is one."""
    with page(browser, server.url, *SPEAKS) as shown:
        shown.select_option("#way", way)
        shown.click("#start")
        until(shown, "__avatar.events?.includes('speech.started')")
        follows(shown)
        assert number(shown, "s-fps") > 20
        shown.keyboard.press("Escape")
        until(shown, "__avatar.cleared?.epoch === 1")
        if way == "webrtc":  # its line fails, and is taken up again
            shown.evaluate("""() => {
              Object.defineProperty(__avatar.peer, "connectionState", { get: () => "failed" });
              __avatar.peer.dispatchEvent(new Event("connectionstatechange"));
            }""")
            says(shown, "are back")
            assert shown.evaluate("__avatar.peer.connectionState") == "connected"
        else:  # pictures that come late are seen to
            shown.evaluate("""() => {
              const decode = createImageBitmap;
              window.createImageBitmap = async (file) => {
                await new Promise((go) => setTimeout(go, 400));
                return decode(file);
              };
            }""")
            until(shown, "parseInt(document.getElementById('s-skew').textContent) > 150")
            (had,) = looked(shown, seconds=4.0)
            assert had.skew > 0.15
            assert abs(had.skew - number(shown, "s-skew")) < 0.1
            shown.evaluate("__avatar.next += 1")  # as after a second without a network
            until(shown, "__avatar.next - __avatar.context.currentTime > 0.8", 5.0)
            until(shown, "__avatar.next - __avatar.context.currentTime < 0.5")
        before = shown.evaluate("__avatar.session.id")
        shown.locator(".faces input").nth(2).check(force=True)
        until(shown, f"__avatar.state === 'running' && __avatar.session?.id !== '{before}'")
        assert server.http.get(f"/v1/sessions/{before}").status_code == 404
        if way == "webrtc":
            until(shown, "__avatar.events.includes('speech.started')")
            follows(shown)
        shown.evaluate("""() => new Promise((go) => {
          const meter = document.getElementById("meter"), timer = setInterval(() => {
            if (meter.getAttribute("aria-valuenow") < 20) return;
            clearInterval(timer);
            go(document.getElementById("stop").click());
          }, 5);
        })""")
        until(shown, "__avatar.state === 'ready'")
        assert shown.inner_text("#s-skew") == "–"
        assert shown.get_attribute("#meter", "aria-valuenow") == "0"
        server.is_free()


def test_a_page_that_is_left_frees_its_place_and_a_full_server_says_so(browser):
    """Who waits may stop to; and when the engine dies, it is said."""
    with serving(slots=1) as server, page(browser, server.url, *SPEAKS) as shown:
        shown.click("#start")
        until(shown, "__avatar.state === 'running'")
        other = shown.context.new_page()
        other.goto(server.url)
        until(other, "window.__avatar?.state === 'ready'")
        other.click("#start")
        until(other, "__avatar.state === 'waiting'")
        says(other, "All places are taken; try again later. Trying again in ")
        other.click("#stop")
        says(other, "Stopped.")
        other.click("#start")
        until(other, "__avatar.state === 'waiting'")
        shown.reload()
        until(other, "__avatar.state === 'running'")
        os.kill(server.engine, signal.SIGKILL)
        says(other, "The session is over: the engine failed.")
        assert other.is_visible("#portrait") and other.is_hidden("#video")
        other.click("#start")
        says(other, "The model is not ready")


def test_others_watch_by_a_link(browser, server):
    """A picture that moves, no microphone, and a word when it is over."""
    allowed = (*SPEAKS, "clipboard-read", "clipboard-write")
    with page(browser, server.url, *allowed) as shown:
        shown.click("#start")
        until(shown, "__avatar.state === 'running'")
        shown.click("#share")
        says(shown, "can watch")
        link = shown.evaluate("navigator.clipboard.readText()")
        other, asked = shown.context.new_page(), []
        other.on("request", lambda request: asked.append(request.url))
        other.goto(link)
        until(other, "window.__avatar?.state === 'running'")
        follows(other, shown)
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
        says(other, "not good here")


# ---- what may go wrong


class Cable:
    """A TCP line to a port, which can be cut."""

    def __init__(self, port: int):
        self._listener, self._to = socket.create_server(("127.0.0.1", 0)), port
        self._ends: set[socket.socket] = set()
        self.whole, self.url = True, f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.whole = False
        for end in list(self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            if not self.whole:
                return
            with socket.create_connection(("127.0.0.1", self._to)) as far:
                self._ends |= {near, far}
                back = threading.Thread(target=_pour, args=(far, near), daemon=True)
                back.start()
                _pour(near, far)
                back.join()
                self._ends -= {near, far}


def _pour(here: socket.socket, there: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := here.recv(1 << 16):
            there.sendall(data)
    with contextlib.suppress(OSError):
        there.shutdown(socket.SHUT_WR)


def test_a_line_that_is_lost_comes_back_or_is_over(browser):
    with serving(slots=1, grace=6) as server:
        cable = Cable(int(server.url.rpartition(":")[2]))
        with contextlib.closing(cable), page(browser, cable.url, *SPEAKS) as shown:
            shown.select_option("#way", "ws")
            shown.click("#start")
            until(shown, "__avatar.state === 'running' && __avatar.drawn > 0")
            cable.cut()
            says(shown, "The line was lost; trying again.")
            cable.whole = True
            says(shown, "The line is back.")
            drawn = shown.evaluate("__avatar.drawn")
            until(shown, f"__avatar.drawn > {drawn} + 0.5")
            tries = []
            shown.on("websocket", lambda line: tries.append(line.url))
            server.process.kill()
            says(shown, "The line was lost; trying again.")
            says(shown, "The session is over: the line was lost.")
            assert 2 < len(tries) < 8  # one a second
            shown.click("#start")
            says(shown, "The server does not answer.")
            assert shown.is_enabled("#start")


def test_a_denied_microphone_is_explained(browser, server):
    with page(browser, server.url) as shown:
        shown.click("#start")
        says(shown, "The microphone was denied.")
        assert shown.get_attribute("#status", "data-kind") == "bad"
        server.is_free()


def picture(kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.effect_mandelbrot((96, 128), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(out, kind)
    return out.getvalue()


def bring(shown, name: str, data: bytes) -> None:
    file = {"name": name, "mimeType": "image/jpeg", "buffer": data}
    shown.locator(".upload input").set_input_files([file])


def host() -> str:
    """An address of this machine that is not its loopback; or the test is skipped."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # of documentation: nothing is sent
            address = asked.getsockname()[0]
        except OSError:
            address = "127.0.0.1"
    if address.startswith("127."):
        pytest.skip("needs an address that is not loopback")
    return address


def test_an_insecure_page_speaks_recordings_with_a_key_and_a_consent(browser, microphone):
    """As browsers have it, a page of plain http is insecure but on loopback."""
    policy = {"keys": "sesame", "uploads": "yes", "consent": "yes"}
    with serving(slots=2, host=host(), **policy) as server, page(browser, server.url) as shown:
        assert not shown.evaluate("window.isSecureContext")
        says(shown, "secure pages only")
        shown.click("#start")
        says(shown, "secure pages only")
        assert server.free == 2

        shown.set_input_files("#file", microphone)
        says(shown, "No key; send")
        shown.get_by_label("Key of this server").fill("open")
        shown.set_input_files("#file", microphone)
        says(shown, "This key is not known here.")
        shown.get_by_label("Key of this server").fill("sesame")

        assert shown.is_hidden("#consent")
        bring(shown, "own.jpg", picture())
        until(shown, "document.querySelector('[name=face]:checked').value === 'own'")
        assert shown.get_attribute("#portrait", "src").startswith("data:image/jpeg")
        shown.set_input_files("#file", microphone)
        says(shown, "Say who agreed to this picture, and what proves it.")
        assert shown.evaluate("document.activeElement.id") == "who" and server.free == 2
        shown.get_by_label("Who agreed to this picture").fill("Ada")
        shown.set_input_files("#file", microphone)
        until(shown, "document.activeElement.id === 'proof'")
        shown.get_by_label("What proves it").fill("her letter of May")
        shown.get_by_role("radio", name="bo").check(force=True)
        assert shown.is_hidden("#consent")
        shown.get_by_role("radio", name="your own").check(force=True)
        with shown.expect_request("**/v1/sessions") as asked:
            shown.set_input_files("#file", microphone)
        said = asked.value.post_data_json["avatar"]
        assert said["consent"].items() >= {"who": "Ada", "proof": "her letter of May"}.items()
        until(shown, "__avatar.events?.includes('speech.started')")
        assert server.free == 1 and shown.is_disabled("#mute")


# ---- who has a small screen, no mouse, or does not see


def tree(shown) -> list[dict]:
    """What a screen reader is told: role, name, value and properties of each node."""
    nodes = shown.context.new_cdp_session(shown).send("Accessibility.getFullAXTree")["nodes"]
    value = lambda node, name: node.get(name, {}).get("value", "")
    return [{"role": value(x, "role"), "name": value(x, "name"), "value": value(x, "value"),
             **{each["name"]: each["value"].get("value") for each in x.get("properties", ())}}
            for x in nodes if not x["ignored"]]  # fmt: skip


def told(shown, of: str) -> set[tuple]:
    """One property of each node, by its role."""
    return {(x["role"], x.get(of)) for x in tree(shown)}


def named(shown, role: str, name: str) -> dict:
    """The node; there is one."""
    (found,) = [x for x in tree(shown) if (x["role"], x["name"]) == (role, name)]
    return found


def focused(shown) -> str:
    """What has the keyboard's focus, and shows it: its id, or its label's picture."""
    return shown.evaluate("""() => {
      const at = document.activeElement, ring = at.closest(".faces label") || at;
      const { outlineStyle, outlineWidth } = getComputedStyle(ring);
      if (outlineStyle !== "solid" || parseInt(outlineWidth) < 2) return `${at.id} is not seen`;
      return at.id || at.value || at.getAttribute("aria-label");
    }""")


# What a page has, by role and name, for who sees nothing of it.
CONTROLS = {
    ("button", "Start"), ("button", "Interrupt"), ("button", "Mute"), ("button", "Stop"),
    ("button", "Apply"), ("button", "Speak a recording"), ("button", "Copy a link to watch"),
    ("button", "Copy as curl"), ("button", "A portrait of your own"), ("textbox", "Prompt"),
    ("combobox", "Microphone"), ("combobox", "Connection"), ("meter", "Loudness"),
    ("group", "Portrait"), ("heading", "Talk to it"),
}  # fmt: skip


def test_keyboards_and_screen_readers_have_all_of_it(browser, server):
    """From a model that is not ready, whose progress is told, to a session by keys alone."""
    engine = {"state": "starting", "stage": "compile", "done": 0.42, "restarts": 0}
    progress = {"ready": False, "draining": False, "free": 0, "engines": [engine]}
    with page(browser, None, *SPEAKS) as shown:
        shown.route("**/readyz", lambda route: route.fulfill(status=503, json=progress))
        shown.goto(server.url)
        says(shown, "The model gets ready: compile, 42 %")
        assert named(shown, "progressbar", "The model gets ready")["value"] == 42
        assert shown.is_disabled("#start") and shown.locator(".faces img").count() == 6
        engine["done"] = 0.43
        says(shown, "The model gets ready: compile, 43 %")
        assert ("status", None) in told(shown, "live")  # percents are not read out one by one
        engine |= {"stage": "warm-up", "done": 0.9}
        says(shown, "The model gets ready: warm-up, 90 %")
        shown.unroute("**/readyz")
        shown.route("**/readyz", lambda route: route.abort())
        says(shown, "The server does not answer; trying again.")
        shown.unroute("**/readyz")
        says(shown, "Ready. Press Start and allow the microphone.")
        assert shown.is_hidden("#progress")

        assert ("status", "polite") in told(shown, "live")
        found = tree(shown)
        assert {(x["role"], x["name"]) for x in found} >= CONTROLS
        assert not [x for x in found if x.get("focusable") and not x["name"]]
        faces = [x for x in found if x["role"] == "radio"]
        assert (
            len({x["name"] for x in faces}) == 6 and sum(x["checked"] == "true" for x in faces) == 1
        )
        assert all(x["name"] for x in found if x["role"] == "image")

        keys = shown.keyboard
        keys.press("Tab")
        assert focused(shown) == "start"
        keys.press("Enter")
        until(shown, "__avatar.state === 'running'")
        assert focused(shown) == "interrupt"
        keys.press("Space")
        until(shown, "__avatar.cleared?.epoch === 1")
        keys.press("Escape")
        until(shown, "__avatar.cleared?.epoch === 2")
        end = time.monotonic() + 20
        while named(shown, "meter", "Loudness")["value"] < 20:
            assert time.monotonic() < end
        assert ("Video", "The avatar") in told(shown, "name")
        went = []
        for _ in range(11):
            keys.press("Tab")
            went.append(focused(shown))
        assert went == ["mute", "stop", "ada", "A portrait of your own", "prompt", "apply", "mic",
                        "choose", "way", "share", "curl"]  # fmt: skip
        for _ in range(8):
            keys.press("Shift+Tab")
        before = shown.evaluate("__avatar.session.id")
        keys.press("ArrowRight")
        shown.wait_for_function("__avatar.state === 'starting'", polling=5)
        keys.press("ArrowRight")  # while the first one is on its way
        assert focused(shown) == "cleo"
        until(shown, f"__avatar.state === 'running' && __avatar.session?.id !== '{before}' && "
              "__avatar.picked.value === 'cleo'")  # fmt: skip
        assert focused(shown) == "cleo"
        before = shown.evaluate("__avatar.session.id")
        shown.select_option("#mic", index=1)
        until(shown, f"__avatar.state === 'running' && __avatar.session.id !== '{before}'")
        keys.press("Shift+Tab")
        keys.press("Space")
        until(shown, "__avatar.state === 'ready'")
        assert focused(shown) == "start"


# What can be hit that lies beyond the edge or is smaller than a finger, and what is written with
# less contrast than people need (4.5, as WCAG 2 reckons it).
FAULTS = """() => {
  const seen = (which) => [...document.querySelectorAll(which)]
    .filter((x) => x.checkVisibility() && !x.disabled);
  const ground = (x) => {
    const { backgroundColor } = getComputedStyle(x);
    return /, 0\\)/.test(backgroundColor) ? ground(x.parentElement) : backgroundColor;
  };
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((x) => x / 255)
      .map((x) => x > .04 ? ((x + .055) / 1.055) ** 2.4 : x / 12.92);
    return .2126 * r + .7152 * g + .0722 * b + .05;
  };
  const hit = seen("button, select, textarea, .faces label").filter((x) => {
    const { left, right, width, height } = x.getBoundingClientRect();
    return left < 0 || right > innerWidth || width < 40 || height < 40;
  });
  const read = seen("h1, h2, p, dt, dd, .upload, textarea, select, button").filter((x) => {
    const part = light(getComputedStyle(x).color) / light(ground(x));
    return Math.max(part, 1 / part) < 4.5;
  });
  const wide = document.documentElement.scrollWidth > innerWidth ? [document.body] : [];
  return [...wide, ...hit, ...read].map((x) => x.id || x.outerHTML.slice(0, 60));
}"""


def test_a_phone_has_room_for_it(browser, server):
    """Nothing lies beyond the edge, fingers hit what there is, and eyes can read it, by day and by
    night. Portraits of one's own are taken where nobody asks for a consent."""
    with page(browser, server.url, *SPEAKS) as shown:
        shown.set_viewport_size({"width": 360, "height": 740})
        for colours in ("light", "dark"):
            shown.emulate_media(color_scheme=colours)
            assert shown.evaluate(FAULTS) == []
        bring(shown, "own.jpg", b"no picture")
        says(shown, "This file holds no picture that the browser can read.")
        assert shown.evaluate(FAULTS) == []  # of a message that something is wrong
        bring(shown, "own.jpg", picture())
        until(shown, "document.querySelector('[name=face]:checked').value === 'own'")
        assert shown.is_hidden("#consent")
        with shown.expect_request("**/v1/sessions") as asked:
            shown.click("#start")
        assert asked.value.post_data_json["avatar"]["image"].startswith("data:image/jpeg;base64,")
        until(shown, "__avatar.state === 'running'")
        for colours in ("light", "dark"):
            shown.emulate_media(color_scheme=colours)
            assert shown.evaluate(FAULTS) == []
        tops = """() => [...document.querySelectorAll(".acts button")]
            .map((x) => x.getBoundingClientRect().top)"""
        assert len(set(shown.evaluate(tops))) == 1  # what is pressed while it speaks is in one row
        shown.click("#stop")
        server.is_free()
