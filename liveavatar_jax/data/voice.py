"""Speech out of nothing, with phoneme times and the mouth that belongs to it.

    utterance = say("Hello there.", Voice("en-us+f2"))
    utterance.waveform, utterance.mouth        # [640 F] at 16 kHz, [F, 3]

It is made by espeak-ng, which the package `espeakng-loader` carries (`pip install
'liveavatar-jax[puppet]'`). The library keeps its state in globals and is not safe for threads, so
a lock lets one sentence through at a time; processes have each their own.
"""

import _ctypes
import ctypes
import dataclasses
import re
import threading
from typing import Any

import numpy as np
import soxr

from liveavatar_jax.data.mouth import FPS, SILENCE, Phoneme, mouth_shapes
from liveavatar_jax.data.sentences import SPLITS, sentence
from liveavatar_jax.types import Float, LiveAvatarError

RATE = 16_000
FRAME = RATE // FPS  # samples
LOCK = threading.Lock()

ACCENTS = {
    "train": ("en-us", "en", "en-gb-x-gbcwmd", "en-029"),
    "validation": ("en-us", "en-gb-x-rp"),
    "held-out": ("en-us", "en-gb-scotland", "en"),
}
SPEAKERS = {  # espeak's variants; none is in two splits
    "train": ("m1", "m3", "m4", "m5", "m7", "m8", "f1", "f2", "f4", "f5", "Alex", "Andrea", "Annie",
              "Denis", "Gene", "Hugo", "Lee", "Marco", "Mike", "adam", "anika", "aunty", "benjamin",
              "boris", "caleb", "david", "edward", "grandma", "ian", "iven", "john", "klatt",
              "klatt3", "linda", "max", "paul", "quincy", "robert", "shelby", "steph", "zac"),
    "validation": ("m6", "Alicia", "Henrique", "belinda", "travis", "klatt4"),
    "held-out": ("m2", "f3", "Jacky", "Michael", "michel", "ed", "norbert", "victor", "klatt2",
                 "Mario"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Voice:
    """Who speaks, and how."""

    name: str  # espeak's accent and variant, such as "en-us+f2"
    rate: int = 160  # words a minute
    pitch: int = 50  # 0..99
    range: int = 50  # of the pitch, 0..99


@dataclasses.dataclass(frozen=True)
class Utterance:
    """What was said: F frames of sound, and the truth about the mouth."""

    waveform: Float[np.ndarray, " samples"]  # 16 kHz, 640 F samples
    mouth: Float[np.ndarray, "F 3"]  # open, width, round in 0..1, at 25 fps
    phonemes: tuple[Phoneme, ...]
    text: str
    voice: Voice


def say(text: str, voice: Voice) -> Utterance:
    """Speaks one sentence or several; whole frames, the last one filled up with silence.

    Raises LiveAvatarError where espeak-ng is missing or does not know the voice.
    """
    with LOCK:
        rate, pcm, events = _speak(text, voice)
    waveform = soxr.resample(pcm.astype(np.float32) / 32768, rate, RATE, "HQ")
    frames = -(-len(waveform) // FRAME)
    waveform = np.pad(waveform, (0, frames * FRAME - len(waveform)))
    times = [(name, sample / rate) for name, sample in events]
    end = len(pcm) / rate
    starts = [start for _, start in times]
    phonemes = tuple(
        Phoneme(name, start, stop)
        for (name, start), stop in zip(times, [*starts[1:], end], strict=True)
        if stop > start
    )
    return Utterance(waveform, mouth_shapes(phonemes, frames), phonemes, text, voice)


def draw_voice(rng: np.random.Generator, split: str) -> Voice:
    """One of a split's speakers, accents, and any rate and pitch."""
    pick = lambda names: names[rng.integers(len(names))]
    name = f"{pick(ACCENTS[split])}+{pick(SPEAKERS[split])}"
    return Voice(name, int(rng.integers(115, 195)), int(rng.integers(20, 80)),
                 int(rng.integers(25, 80)))  # fmt: skip


def recite(rng: np.random.Generator, split: str, frames: int) -> Utterance:
    """Sentences of a split by one of its voices, with pauses, until so many frames are full.

    The loudness, the room and the noise behind it are drawn too: see `roughen`.
    """
    if split not in SPLITS:
        raise LiveAvatarError(f"split {split!r} is unknown; write {', '.join(SPLITS)}")
    voice = draw_voice(rng, split)
    sounds, phonemes, texts = [], [], []
    filled = int(rng.integers(0, 20))
    sounds.append(np.zeros(filled * FRAME, np.float32))
    while filled < frames:
        said = say(sentence(rng, split), voice)
        phonemes += [
            Phoneme(p.name, p.start + filled / FPS, p.end + filled / FPS) for p in said.phonemes
        ]
        pause = int(min(60, rng.exponential(12)))
        sounds += [said.waveform, np.zeros(pause * FRAME, np.float32)]
        texts.append(said.text)
        filled += len(said.mouth) + pause
    waveform = np.concatenate(sounds)[: frames * FRAME]
    heard = tuple(p for p in phonemes if p.end <= frames / FPS)
    mouth = mouth_shapes(phonemes, frames)
    return Utterance(roughen(rng, waveform), mouth, heard, " ".join(texts), voice)


def roughen(
    rng: np.random.Generator, waveform: Float[np.ndarray, " samples"]
) -> Float[np.ndarray, " samples"]:
    """As a microphone would hear it: tilted spectrum, an echo, noise, any loudness. In -1..1."""
    tilt, gain = rng.uniform(-0.55, 0.45), 10 ** (rng.uniform(-33, -15) / 20)
    below, hue = rng.uniform(18, 60), rng.uniform(0, 0.95)
    late, share = int(rng.integers(60, 500)), rng.uniform(0, 0.25) * rng.integers(0, 2)
    sound = np.append(waveform[:1], waveform[1:] + tilt * waveform[:-1])
    sound[late:] += share * sound[:-late]
    loud = np.abs(sound) > 0.02 * np.abs(sound).max()
    sound *= gain / (np.sqrt(np.mean(sound[loud] ** 2)) + 1e-9 if loud.any() else 1.0)
    noise = rng.standard_normal(len(sound)).astype(np.float32)
    spectrum = np.fft.rfft(noise)
    spectrum *= (1 + np.arange(len(spectrum)) / 100) ** -hue  # from white to nearly pink
    noise = np.fft.irfft(spectrum, len(sound))
    noise *= gain * 10 ** (-below / 20) / noise.std()
    return np.clip(sound + noise, -1, 1).astype(np.float32)


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int), ("unique", ctypes.c_uint), ("text", ctypes.c_int),
        ("length", ctypes.c_int), ("milliseconds", ctypes.c_int), ("sample", ctypes.c_int),
        ("user", ctypes.c_void_p), ("id", ctypes.c_char * 8),
    )  # fmt: skip


CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)
# Numbers of speak_lib.h
SYNCHRONOUS, PHONEME_EVENTS, PHONEME, UTF8 = 2, 1, 7, 1
SPEED, PITCH, RANGE = 1, 3, 4


def _speak(text: str, voice: Voice) -> tuple[int, np.ndarray, list[tuple[str, int]]]:
    """Samples a second, int16 samples, and phonemes with the sample where each begins.

    The library's waves and noise go on from sentence to sentence. To say the same in the same
    way whatever was said before, it is loaded anew each time, which takes 5 ms.
    """
    path, data = _installed()
    library = ctypes.CDLL(path)
    sounds: list[np.ndarray] = []
    phonemes: list[tuple[str, int]] = []

    def hear(pcm: Any, count: int, events: Any) -> int:
        if pcm and count > 0:
            sounds.append(np.ctypeslib.as_array(pcm, (count,)).copy())
        number = 0
        while events[number].type:
            event = events[number]
            if event.type == PHONEME:
                name = event.id.decode("utf-8", "replace")
                phonemes.append((_plain(name), int(event.sample)))
            number += 1
        return 0

    try:
        rate = library.espeak_Initialize(SYNCHRONOUS, 0, data.encode(), PHONEME_EVENTS)
        if rate <= 0:
            raise LiveAvatarError(
                f"espeak-ng cannot read its data in {data}; install espeakng-loader again"
            )
        callback = CALLBACK(hear)  # kept alive here, for the library holds no reference
        library.espeak_SetSynthCallback(callback)
        if library.espeak_SetVoiceByName(voice.name.encode()):
            raise LiveAvatarError(
                f"espeak-ng does not know the voice {voice.name!r}; write an accent and a variant, "
                "as in en-us+f2"
            )
        for parameter, value in (SPEED, voice.rate), (PITCH, voice.pitch), (RANGE, voice.range):
            library.espeak_SetParameter(parameter, value, 0)
        said = text.encode()
        library.espeak_Synth(said, len(said) + 1, 0, 1, 0, UTF8, None, None)
        library.espeak_Synchronize()
        library.espeak_Terminate()
    finally:
        unload = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary
        unload(library._handle)
    return rate, np.concatenate(sounds or [np.zeros(0, np.int16)]), phonemes


def _plain(name: str) -> str:
    """espeak's name without stress, length and variant: 'aI2 is aI, _: is silence."""
    name = name.lstrip("',%=|")
    if name.startswith("_") or not name:
        return SILENCE
    return name[:1] + re.sub(r"[^A-Za-z@]", "", name[1:])


def _installed() -> tuple[str, str]:
    """The library and the folder of its data."""
    try:
        import espeakng_loader
    except ImportError:
        raise LiveAvatarError(
            "speech for puppets needs espeak-ng; install it with pip install "
            "'liveavatar-jax[puppet]'"
        ) from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
