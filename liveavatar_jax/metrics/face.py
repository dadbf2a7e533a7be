"""Real faces: how far the mouth is open and who it is, by small networks that a package carries.

Extra `faces` (104 MB, nothing is downloaded at run time): dlib-bin, whose code is under the Boost
licence, and face_recognition_models, which carries Davis King's models: public domain or CC0 as
they say. But the 68 landmarks were learnt from the iBUG 300-W pictures, whose terms exclude
commercial use: ask for another landmark model before that.

mediapipe's face mesh is no choice here: the version that carries its models wants numpy below 2.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from liveavatar_jax.types import Float, LiveAvatarError, UInt8

SAME = 0.6  # distance of two pictures of one person at most, as the network's author has it
INSTALL = "install liveavatar-jax[faces]"


class Faces:
    """Finds the largest face of each picture. Raises LiveAvatarError where the extra is missing."""

    def __init__(self) -> None:
        try:
            import dlib  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise LiveAvatarError(f"looking at real faces needs dlib; {INSTALL}") from None
        where = importlib.util.find_spec("face_recognition_models")
        if where is None or not where.submodule_search_locations:
            raise LiveAvatarError(f"looking at real faces needs its models; {INSTALL}")
        # Not imported: its __init__ asks for pkg_resources, which setuptools has dropped.
        models = Path(where.submodule_search_locations[0]) / "models"
        load = lambda make, name: make(str(models / name))
        self._find = dlib.get_frontal_face_detector()
        self._mark = load(dlib.shape_predictor, "shape_predictor_68_face_landmarks.dat")
        self._who = load(
            dlib.face_recognition_model_v1, "dlib_face_recognition_resnet_model_v1.dat"
        )

    def opening(self, frames: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, " F"]:
        """Gap between the inner lips over the distance of the eyes; nan without a face."""
        return np.array([self._gap(frame) for frame in frames], np.float64)

    def identity(self, frames: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "F 128"]:
        """The face network's 128 numbers: Euclidean distances above SAME are another person.
        nan without a face. 0.15 s a picture, so give a few."""
        none = np.full(128, np.nan)
        found = [(frame, self._landmarks(frame)) for frame in frames]
        rows = [
            none if marks is None else self._who.compute_face_descriptor(frame, marks)
            for frame, marks in found
        ]
        return np.array([np.asarray(row) for row in rows]).reshape(-1, 128)

    def _landmarks(self, frame: np.ndarray) -> Any:
        frame = np.ascontiguousarray(frame)
        faces = self._find(frame, _doublings(frame.shape[0], frame.shape[1]))
        return self._mark(frame, max(faces, key=lambda box: box.area())) if faces else None

    def _gap(self, frame: np.ndarray) -> float:
        marks = self._landmarks(frame)
        if marks is None:
            return float("nan")
        at = np.array([(marks.part(i).x, marks.part(i).y) for i in range(68)], float)
        gap = np.linalg.norm(at[[61, 62, 63]] - at[[67, 66, 65]], axis=1).mean()
        eyes = np.linalg.norm(at[36:42].mean(axis=0) - at[42:48].mean(axis=0))
        return float(gap / max(eyes, 1e-6))


@functools.cache
def _doublings(height: int, width: int) -> int:
    """The detector sees faces of 80 pixels and more, so small pictures are enlarged."""
    return 2 if min(height, width) < 100 else 1 if min(height, width) < 400 else 0
