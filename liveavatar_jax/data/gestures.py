"""How a puppet moves: what speech does to its mouth, and what it does besides.

    noise = normals of shape [b, WARM + F, GESTURE_NOISE]
    pose = gestures(noise, expression, mouth)      # the poses of the last F of these frames

Everything but the mouth and the expression is a filter over the noise that looks back WARM
frames, so that a long clip may be posed in parts: equal noise gives equal poses.
"""

from typing import Any

import numpy as np

from liveavatar_jax.data.identity import Either
from liveavatar_jax.types import Float, Int, struct

EXPRESSIONS = ("neutral", "smiling", "sad", "surprised")
FPS = 25
WARM = 64  # frames of noise before the first one that is posed
CHANNELS = ("x", "y", "zoom", "yaw", "pitch", "roll", "breath", "gaze_x", "gaze_y", "brow",
            "mood", "blink")  # fmt: skip
GESTURE_NOISE = len(CHANNELS)
SLOW, QUICK = 10.0, 5.0  # deviation, in frames, of the Gaussians that smooth the noise
BLINK = (0.55, 1.0, 1.0, 0.75, 0.35, 0.1)  # how far the lids are shut, frame by frame
BLINK_AT = 2.3  # noise above it starts a blink: every 3.7 seconds

# What an expression does: columns smile, brow, tilt, lids.
EFFECTS = ((0.0, 0.0, 0.0, 1.0), (1.0, 0.25, 0.0, 0.86), (-1.0, 0.0, 1.0, 0.74),
           (0.0, 1.0, 0.1, 1.28))  # fmt: skip


@struct
class Pose:
    """Of each frame. The first three come from speech and are what a metric compares with."""

    open: Float[Either, "b F"]  # of the mouth, 0 shut .. 1
    width: Float[Either, "b F"]  # 0 narrow .. 1 wide; 0.5 at rest
    round: Float[Either, "b F"]  # of the lips, 0..1
    smile: Float[Either, "b F"]  # -1 corners down .. 1 up
    brow: Float[Either, "b F"]  # raised by, about -0.3 .. 1
    tilt: Float[Either, "b F"]  # 1: the inner ends of the brows are up
    lids: Float[Either, "b F"]  # 0 shut, 1 open, more: wide
    gaze_x: Float[Either, "b F"]  # -1 left .. 1 right, of the picture
    gaze_y: Float[Either, "b F"]
    x: Float[Either, "b F"]  # of the head, in halves of the picture
    y: Float[Either, "b F"]
    zoom: Float[Either, "b F"]  # about 1
    yaw: Float[Either, "b F"]  # about -1 .. 1
    pitch: Float[Either, "b F"]
    roll: Float[Either, "b F"]  # radians
    breath: Float[Either, "b F"]  # about -1 .. 1


def gestures(
    noise: Float[Either, "b n k"], expression: Int[Either, " b"], mouth: Float[Either, "b F 3"]
) -> Pose:
    """Normals, indices of EXPRESSIONS and (open, width, round) of each frame to poses.

    noise: n = WARM + F frames of GESTURE_NOISE channels. Zeros are a puppet that keeps still.
    """
    xp: Any = noise.__array_namespace__()
    frames = mouth.shape[1]
    slow, quick = (_smooth(xp, noise, frames, width) for width in (SLOW, QUICK))
    at = {name: slow[:, :, i] for i, name in enumerate(CHANNELS)}
    effect = xp.asarray(np.array(EFFECTS, np.float32))[expression][:, None, :]
    smile, brow, tilt, lids = (effect[:, :, i] for i in range(4))
    mood = 1 + 0.12 * at["mood"]  # an expression comes and goes a little
    quick = {name: quick[:, :, i] for i, name in enumerate(CHANNELS)}
    shut = _blinks(xp, noise[:, :, CHANNELS.index("blink")], frames)
    return Pose(
        open=mouth[:, :, 0],
        width=mouth[:, :, 1],
        round=mouth[:, :, 2],
        smile=smile * mood,
        brow=brow * mood + 0.16 * quick["brow"],
        tilt=tilt * mood,
        lids=lids * (1 - shut),
        gaze_x=_glance(xp, quick["gaze_x"]),
        gaze_y=0.6 * _glance(xp, quick["gaze_y"]) + 0.3 * xp.maximum(tilt, 0.0),
        x=0.028 * at["x"],
        y=0.020 * at["y"],
        zoom=1 + 0.014 * at["zoom"],
        yaw=0.75 * at["yaw"],
        pitch=0.55 * at["pitch"] + 0.25 * xp.maximum(tilt, 0.0),
        roll=0.035 * at["roll"],
        breath=at["breath"],
    )


def _smooth(
    xp: Any, noise: Float[Either, "b n k"], frames: int, width: float
) -> Float[Either, "b F k"]:
    """Of unit variance, and with the middle of the filter WARM / 2 frames back."""
    tap = np.arange(WARM + 1)
    weight = np.exp(-0.5 * ((tap - WARM / 2) / width) ** 2)
    weight /= np.sqrt((weight**2).sum())
    matrix = np.zeros((frames, WARM + frames), np.float32)
    for i in range(frames):
        matrix[i, i : i + WARM + 1] = weight
    return xp.matmul(xp.asarray(matrix)[None], noise)


def _blinks(xp: Any, noise: Float[Either, "b n"], frames: int) -> Float[Either, "b F"]:
    shut = 0.0 * noise[:, WARM:]
    for age, amount in enumerate(BLINK):
        first = WARM - age
        starts = noise[:, first : first + frames] > BLINK_AT
        shut = xp.maximum(shut, amount * starts.astype(noise.dtype))
    return shut


def _glance(xp: Any, value: Float[Either, "b F"]) -> Float[Either, "b F"]:
    """Straight ahead most of the time, and now and then to a side."""
    return xp.tanh(2.5 * (value - xp.clip(value, -0.6, 0.6)))
