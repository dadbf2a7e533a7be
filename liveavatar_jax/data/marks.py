"""What says that a picture was made: a signed C2PA manifest in files, and a badge in frames."""

import contextlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

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


def sign(path: Path, certificate: Path, key: Path) -> None:
    """Signs a file in place: made by a trained model. Raises LiveAvatarError as `signer`."""
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
            import c2pa

            with c2pa.Builder(json.dumps(manifest)) as builder:
                builder.sign_file(str(path), str(draft), signing)
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


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
