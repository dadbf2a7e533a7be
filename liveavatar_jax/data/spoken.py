"""Speech that was made beforehand, in files that training maps into memory.

    data = open_speech("speech", "train")
    waveform, mouth = data.draw(rng, 8, 84, past=cfg.past, future=cfg.future)   # [8, n], [8, 84, 3]

A folder holds parts of each split, and every part stands for fixed numbers of clips:

    speech.json                     how it was made
    train-00000.waveform.npy        int16 [clips, samples], 16 kHz
    train-00000.mouth.npy           float16 [clips, F, 3]: open, width, round, at 25 fps
    train-00000.json                texts and voices; written last, so the part is whole
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from liveavatar_jax.data.sentences import SPLITS
from liveavatar_jax.data.voice import FRAME, recite
from liveavatar_jax.types import Float, LiveAvatarError

ABOUT = "speech.json"


class Speech:
    """The clips of a split, all equally long."""

    def __init__(self, parts: Sequence[Path]):
        try:
            about = [json.loads(part.read_text()) for part in parts]
            self._waveforms = [_map(part, "waveform") for part in parts]
            self._mouths = [_map(part, "mouth") for part in parts]
        except (OSError, ValueError) as error:
            raise LiveAvatarError(
                f"{parts[0].parent} holds damaged speech ({error}); delete the part and make it "
                "again with python -m train.speech"
            ) from None
        self.texts = [text for part in about for text in part["texts"]]
        self.voices = [voice for part in about for voice in part["voices"]]
        self.frames = self._mouths[0].shape[1]  # of every clip
        self._first = np.cumsum([0, *(len(mouth) for mouth in self._mouths)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def window(
        self, clip: int, start: int, frames: int, past: int = 0, future: int = 0
    ) -> tuple[Float[np.ndarray, " samples"], Float[np.ndarray, "F 3"]]:
        """Some frames of a clip: their sound in -1..1, float32, with `past` samples before the
        first and `future` after the last (zeros beyond the clip), and their mouth."""
        if not 0 <= start <= start + frames <= self.frames:
            raise LiveAvatarError(
                f"frames {start} to {start + frames} do not lie in clips of {self.frames}; make "
                "longer ones with python -m train.speech --seconds"
            )
        part = int(np.searchsorted(self._first, clip, "right")) - 1
        row = clip - int(self._first[part])
        sound = self._waveforms[part][row]
        first, last = start * FRAME - past, (start + frames) * FRAME + future
        inside = sound[max(first, 0) : max(last, 0)].astype(np.float32) / 32768
        waveform = np.zeros(last - first, np.float32)
        at = max(-first, 0)
        waveform[at : at + len(inside)] = inside
        return waveform, self._mouths[part][row, start : start + frames].astype(np.float32)

    def draw(
        self, rng: np.random.Generator, count: int, frames: int, past: int = 0, future: int = 0
    ) -> tuple[Float[np.ndarray, "b samples"], Float[np.ndarray, "b F 3"]]:
        """Windows at any place of any clips."""
        clips = rng.integers(len(self), size=count)
        starts = rng.integers(max(0, self.frames - frames) + 1, size=count)
        pairs = zip(clips, starts, strict=True)
        windows = [self.window(int(c), int(s), frames, past, future) for c, s in pairs]
        waveforms, mouths = zip(*windows, strict=True)
        return np.stack(waveforms), np.stack(mouths)


def open_speech(folder: str | Path, split: str) -> Speech:
    """The speech of a split. Raises LiveAvatarError where there is none."""
    parts = sorted(Path(folder).glob(f"{split}-[0-9]*.json"))
    if not parts:
        raise LiveAvatarError(
            f"{folder} holds no speech of the split {split!r} ({', '.join(SPLITS)}); make it with "
            f"python -m train.speech --out {folder}"
        )
    return Speech(parts)


def part_path(folder: Path, split: str, part: int) -> Path:
    """The file whose presence says that a part is whole."""
    return folder / f"{split}-{part:05}.json"


def write_part(path: Path, split: str, clips: Sequence[int], frames: int, seed: int) -> None:
    """Makes some of a split's clips, by their numbers; what one says is drawn from its number."""
    made = [
        recite(np.random.default_rng((seed, SPLITS.index(split), clip)), split, frames)
        for clip in clips
    ]
    pcm = np.stack([np.round(said.waveform * 32767).astype(np.int16) for said in made])
    _save(path.with_suffix(".waveform.npy"), pcm)
    _save(path.with_suffix(".mouth.npy"), np.stack([said.mouth for said in made]).astype("float16"))
    about = {"texts": [m.text for m in made], "voices": [m.voice.name for m in made]}
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(about))
    os.replace(draft, path)


def settle(folder: Path, about: dict[str, int]) -> None:
    """Notes how the speech of a folder is made, or refuses to make it otherwise than before."""
    file = folder / ABOUT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            had = json.loads(file.read_text())
            for name, value in about.items():
                if had.get(name) != value:
                    raise LiveAvatarError(
                        f"{folder} was made with {name} = {had.get(name)} and not {value}; give "
                        "the same, or another --out"
                    )
        else:
            draft = file.with_suffix(".part")
            draft.write_text(json.dumps(about))
            os.replace(draft, file)
    except OSError as error:
        raise LiveAvatarError(f"cannot write {folder}: {str(error.strerror).lower()}") from None


def _map(part: Path, name: str) -> np.ndarray:
    return np.load(part.with_suffix(f".{name}.npy"), mmap_mode="r")


def _save(path: Path, array: np.ndarray) -> None:
    draft = path.with_suffix(".part")
    with draft.open("wb") as file:
        np.save(file, array)
    os.replace(draft, path)
