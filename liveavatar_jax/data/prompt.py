"""Prompts to token ids, as the published pipeline makes them (wan/modules/tokenizers.py)."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
import sentencepiece

from liveavatar_jax.types import LiveAvatarError

PROMPT = "A person looks into the camera and speaks naturally, with lively expression."  # default
# where the published folder keeps the model, then what other copies of it are called
PATTERNS = ("google/umt5-xxl/spiece.model", "spiece.model", "sentencepiece*.model", "*.model")


def clean(text: str) -> str:
    """Mends mis-decoded characters, undoes HTML escapes twice over, and single-spaces the rest."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """The umT5 sentencepiece tokenizer of a published folder (or of a .model file).

    Raises LiveAvatarError when the folder holds none, or the file is not a sentencepiece model.
    """

    def __init__(self, path: str | Path):
        self.path = find(Path(path))
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(self.path.read_bytes())
        except (OSError, RuntimeError) as reason:
            raise LiveAvatarError(
                f"{self.path} cannot be read as a sentencepiece model ({reason}); fetch the "
                "spiece.model of google/umt5-xxl again"
            ) from None
        if self.model.eos_id() < 0:
            raise LiveAvatarError(
                f"{self.path} has no end-of-sequence piece; it must be spiece.model of "
                "google/umt5-xxl"
            )

    @property
    def vocab(self) -> int:
        """Pieces of the model: TextConfig.vocab must be no smaller."""
        return self.model.vocab_size()

    def __call__(
        self, prompts: str | Sequence[str], text_len: int = 512
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids and mask, int32 [b, text_len]; mask is 1 on the prompt and its end-of-sequence.

        Longer prompts lose their end, not the end-of-sequence.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = np.full((len(prompts), text_len), max(0, self.model.pad_id()), np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            pieces = self.model.Encode(clean(prompt))[: text_len - 1]
            pieces.append(self.model.eos_id())
            ids[row, : len(pieces)] = pieces
            mask[row, : len(pieces)] = 1
        return ids, mask


def find(path: Path) -> Path:
    """The sentencepiece model at or beneath a path: the published place first."""
    if path.is_file():
        return path
    for pattern in PATTERNS:
        found = sorted(path.rglob(pattern), key=lambda p: (len(p.parts), p))
        if found:
            return found[0]
    raise LiveAvatarError(
        f"{path} holds no sentencepiece model, so prompts cannot be read; put google/umt5-xxl "
        "(with its spiece.model) of the published Wan2.2-S2V-14B folder there"
    )
