"""What says that a picture was made: a signed C2PA manifest in files, and a badge in frames."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from liveavatar_jax.data.video import DISK_FULL
from liveavatar_jax.types import LiveAvatarError

SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@contextlib.contextmanager
def signer(certificate: Path, key: Path) -> Iterator[Any]:
    """Of the operator's chain of certificates (PEM, own one first) and ES256 key.

    Raises LiveAvatarError where c2pa-python or the certificate will not, also within.
    """
    try:
        import c2pa
    except ImportError:
        raise LiveAvatarError(
            "files are signed with c2pa-python; install the extra serve"
        ) from None
    try:
        given = c2pa.C2paSignerInfo(
            alg=b"es256", sign_cert=certificate.read_bytes(), private_key=key.read_bytes(),
            ta_url=None,
        )  # fmt: skip
        with c2pa.Signer.from_info(given) as made:
            yield made
    except OSError as error:
        raise LiveAvatarError(f"cannot sign: {error.strerror}, {error.filename}") from None
    except c2pa.C2paError as error:
        raise LiveAvatarError(f"the certificate in {certificate} cannot sign: {error}") from None


class Draft(io.FileIO):
    """A file that keeps why it could not be written; c2pa-python says only that it could not."""

    wrong: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.wrong = error
            raise


def sign(path: Path, certificate: Path, key: Path) -> None:
    """Signs an MP4 file in place: made by a trained model. Raises LiveAvatarError as `signer`, and
    where the disk will not; then the file is as it was."""
    manifest = {
        "claim_generator_info": [{"name": "liveavatar-jax"}],
        "title": path.name,
        "assertions": [{
            "label": "c2pa.actions",
            "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": SOURCE}]},
        }],
    }  # fmt: skip
    draft = path.with_name(f"signed-{path.name}")
    try:
        with signer(certificate, key) as signing:
            _write(path, draft, json.dumps(manifest), signing)
    except LiveAvatarError as error:
        raise LiveAvatarError(f"{error}; {path} is there, but not signed") from None
    finally:
        draft.unlink(missing_ok=True)


def _write(path: Path, draft: Path, manifest: str, signing: Any) -> None:
    import c2pa

    raw = None
    try:
        with (
            c2pa.Builder(manifest) as builder,
            path.open("rb") as film,
            Draft(draft, "w+") as raw,
            io.BufferedRandom(raw) as out,
        ):
            builder.sign(signing, "video/mp4", film, out)
        os.replace(draft, path)
    except (OSError, c2pa.C2paError) as error:
        wrong = error if isinstance(error, OSError) else raw and raw.wrong
        if wrong is None:
            raise
        why = "the disk is full" if wrong.errno in DISK_FULL else str(wrong.strerror).lower()
        raise LiveAvatarError(f"cannot sign: {why}") from None


def badge(frame: np.ndarray) -> np.ndarray:
    """The frame, uint8 [H, W, 3], with "AI" in its lower right corner."""
    mark = _mark(max(8, frame.shape[0] // 10))
    marked = frame.copy()
    marked[-len(mark) :, -mark.shape[1] :] = mark
    return marked


@cache
def _mark(height: int) -> np.ndarray:
    drawn = Image.new("RGB", (15, 11), "black")
    ImageDraw.Draw(drawn).text((2, 0), "AI", fill="white")
    size = (height * 15 // 11, height)
    return np.asarray(drawn.resize(size, Image.Resampling.BOX))
