"""Who a puppet is: the colours and sizes of its face, hair, clothes and background.

    who = identity(noise)      # uniforms [b, IDENTITY_NOISE] in [0, 1), numpy's or JAX's
    traits(who, 0)             # {"hair": "long red hair", "glasses": "round glasses", ...}

Lengths are in halves of the picture: the picture reaches from -1 to 1, y downwards, so one pixel
of 64 is 0.031. Places on the face count from its centre, before `scale` is applied.
"""

from typing import Any

import numpy as np

from liveavatar_jax.types import Array, Float, Int, struct

Either = Array | np.ndarray  # what the puppet's functions take and give back

SKINS = {
    "pale": (1.00, 0.87, 0.77), "light": (0.98, 0.79, 0.64), "peach": (0.94, 0.71, 0.54),
    "tan": (0.85, 0.61, 0.42), "olive": (0.76, 0.60, 0.40), "brown": (0.62, 0.41, 0.26),
    "dark brown": (0.50, 0.32, 0.21), "deep": (0.40, 0.25, 0.18),
}  # fmt: skip
HAIRS = {
    "black": (0.11, 0.10, 0.13), "dark brown": (0.27, 0.17, 0.11), "brown": (0.46, 0.28, 0.15),
    "red": (0.74, 0.27, 0.10), "blond": (0.93, 0.76, 0.36), "grey": (0.60, 0.61, 0.64),
    "white": (0.91, 0.90, 0.88), "blue": (0.18, 0.34, 0.72), "pink": (0.93, 0.45, 0.62),
}  # fmt: skip
EYES = {
    "brown": (0.38, 0.22, 0.10), "blue": (0.20, 0.48, 0.85), "green": (0.24, 0.58, 0.30),
    "grey": (0.42, 0.48, 0.55),
}  # fmt: skip
CLOTHES = {
    "red": (0.80, 0.18, 0.20), "orange": (0.94, 0.52, 0.16), "yellow": (0.95, 0.80, 0.25),
    "green": (0.20, 0.58, 0.34), "blue": (0.18, 0.38, 0.75), "purple": (0.48, 0.28, 0.66),
    "white": (0.94, 0.94, 0.92), "black": (0.15, 0.16, 0.20),
}  # fmt: skip
BACKGROUNDS = {
    "blue": (0.50, 0.72, 0.90), "green": (0.58, 0.78, 0.58), "grey": (0.70, 0.72, 0.75),
    "pink": (0.95, 0.72, 0.76), "yellow": (0.96, 0.86, 0.56), "purple": (0.70, 0.62, 0.85),
    "white": (0.94, 0.94, 0.94), "dark": (0.25, 0.28, 0.36),
}  # fmt: skip
GLASSES = ("no glasses", "no glasses", "no glasses", "round glasses", "square glasses")
FRAMES = ((0.10, 0.10, 0.12), (0.55, 0.14, 0.14), (0.13, 0.25, 0.52), (0.42, 0.27, 0.12))
ROSE, LIPSTICK = (0.72, 0.24, 0.27), (0.82, 0.14, 0.22)
NECKLINES = {  # how far down the neck is bare, how wide, and 0 round .. 1 pointed
    "a round neck": (0.12, 0.34, 0.0),
    "a V-neck": (0.26, 0.28, 1.0),
    "a high collar": (-0.16, 0.30, 0.0),
}
STYLE = ("cap", "line", "part", "temple", "back_w", "back_y", "back_h", "bun_x", "bun_y", "bun_r")
HAIRSTYLES = {  # columns as in STYLE, see Identity
    "short": (1.0, -0.53, 0.00, 0.75, 0.68, -0.22, 0.66, 0.0, -0.50, 0.05),
    "side-parted": (1.0, -0.53, 0.26, 0.55, 0.69, -0.24, 0.68, 0.0, -0.50, 0.05),
    "long": (1.0, -0.54, -0.05, 0.95, 0.77, 0.16, 1.02, 0.0, -0.50, 0.05),
    "bobbed": (1.0, -0.48, 0.00, 0.10, 0.77, -0.06, 0.78, 0.0, -0.50, 0.05),
    "curly": (1.0, -0.53, 0.00, 0.50, 0.84, -0.24, 0.78, 0.70, -0.16, 0.24),
    "tied-up": (1.0, -0.56, 0.00, 0.55, 0.67, -0.22, 0.66, 0.0, -0.84, 0.27),
    "pigtailed": (1.0, -0.53, 0.00, 0.45, 0.67, -0.22, 0.66, 0.78, 0.16, 0.25),
    "no": (0.0, -2.00, 0.00, 0.00, 0.10, 0.00, 0.10, 0.0, 0.00, 0.05),
}
CHINS = ("no beard", "moustache", "beard")
CHIN_CHANCES = (0.55, 0.75, 1.0)  # cumulative, of the styles that go with a beard
BEARDED = (1, 1, 0, 0, 1, 0, 0, 1)  # by hairstyle

# Numbers that are drawn evenly between two ends.
RANGES = {
    "face_w": (0.55, 0.62),  # half width
    "face_h": (0.66, 0.71),  # half height
    "jaw": (0.02, 0.22),  # how much narrower the chin is
    "square": (0.0, 0.45),  # 0: an ellipse
    "ear": (0.12, 0.17),
    "eye_x": (0.245, 0.275),
    "eye_y": (-0.10, -0.06),
    "eye_w": (0.155, 0.185),
    "eye_h": (0.115, 0.150),
    "eye_tilt": (-0.12, 0.12),
    "iris_r": (0.078, 0.092),
    "brow_y": (0.195, 0.220),  # above the eye
    "brow_t": (0.028, 0.050),  # half thickness
    "brow_bend": (0.3, 1.3),
    "nose_w": (0.065, 0.105),
    "nose_h": (0.055, 0.085),
    "nose_y": (0.115, 0.15),
    "mouth_y": (0.385, 0.41),
    "mouth_w": (0.26, 0.29),  # half width at rest
    "lip": (0.050, 0.080),  # thickness of the lower one
    "blush": (0.0, 0.35),
    "scale": (0.97, 1.05),
    "at_x": (-0.04, 0.04),
    "at_y": (-0.02, 0.03),
}
PICKS = ("skin", "hair", "iris", "clothes", "trim", "wall", "style", "chin", "glasses", "frame",
         "neckline", "lipstick")  # fmt: skip
SHADES = ("skin", "hair", "iris", "clothes", "wall")  # colours that vary a little: 3 numbers each
IDENTITY_NOISE = len(RANGES) + len(PICKS) + 3 * len(SHADES)


@struct
class Identity:
    """All that stays the same in a clip. Colours are in 0..1 (sRGB), lengths as above."""

    size: dict[str, Float[Either, " b"]]  # by the names of RANGES
    style: dict[str, Float[Either, " b"]]  # of the hair: by the names of STYLE
    colour: dict[str, Float[Either, "b 3"]]  # by the names of COLOURS
    beard: Float[Either, " b"]  # 0 or 1
    moustache: Float[Either, " b"]
    glasses: Float[Either, " b"]
    glasses_square: Float[Either, " b"]
    neck: Float[Either, "b 3"]  # a row of NECKLINES
    picks: dict[str, Int[Either, " b"]]  # by the names of PICKS: which word of its list


COLOURS = ("skin", "hair", "iris", "clothes", "trim", "wall", "lips", "frame")


def identity(noise: Float[Either, "b k"]) -> Identity:
    """Uniforms in [0, 1), IDENTITY_NOISE of each puppet, to who it is; numpy in, numpy out.

    Those of a split come from np.random.default_rng((seed, split)): 0 to train, 1 to validate,
    2 held out.
    """
    xp: Any = noise.__array_namespace__()
    columns = iter([noise[:, i] for i in range(IDENTITY_NOISE)])
    size = {name: low + (high - low) * next(columns) for name, (low, high) in RANGES.items()}
    drawn = {name: next(columns) for name in PICKS}
    lists = {"skin": SKINS, "hair": HAIRS, "iris": EYES, "clothes": CLOTHES, "trim": CLOTHES,
             "wall": BACKGROUNDS, "style": HAIRSTYLES, "glasses": GLASSES, "frame": FRAMES,
             "neckline": NECKLINES}  # fmt: skip
    picks = {name: _index(xp, drawn[name], len(words)) for name, words in lists.items()}

    def row(name: str, table: Any) -> Either:
        values = table.values() if isinstance(table, dict) else table
        return xp.asarray(np.array(list(values), np.float32))[picks[name]]

    colour = {name: row(name, lists[name]) for name in ("skin", "hair", "iris", "clothes", "trim",
                                                        "wall", "frame")}  # fmt: skip
    for name in SHADES:
        light, *hue = [next(columns) - 0.5 for _ in range(3)]
        shift = xp.stack([light + 0.5 * hue[0], light, light + 0.5 * hue[1]], axis=-1)
        colour[name] = xp.clip(colour[name] * (1 + 0.16 * shift), 0.0, 1.0)
    made_up = drawn["lipstick"][:, None]
    rose, bright = (xp.asarray(np.array([c], np.float32)) for c in (ROSE, LIPSTICK))
    natural = 0.45 * colour["skin"] + 0.55 * rose
    colour["lips"] = xp.where(made_up < 0.65, natural, 0.25 * natural + 0.75 * bright)

    may = xp.asarray(np.array(BEARDED, np.int32))[picks["style"]]
    bounds = xp.asarray(np.array([CHIN_CHANCES[:-1]], np.float32))
    picks["chin"] = may * xp.sum(drawn["chin"][:, None] >= bounds, axis=1, dtype=xp.int32)
    picks["lipstick"] = (drawn["lipstick"] >= 0.65).astype(xp.int32)
    flag = lambda condition: condition.astype(noise.dtype)
    styles = row("style", HAIRSTYLES)
    return Identity(
        size=size,
        style={name: styles[:, i] for i, name in enumerate(STYLE)},
        colour=colour,
        beard=flag(picks["chin"] == 2),
        moustache=flag(picks["chin"] >= 1),
        glasses=flag(picks["glasses"] >= 3),
        glasses_square=flag(picks["glasses"] == 4),
        neck=row("neckline", NECKLINES),
        picks=picks,
    )


def traits(who: Identity, row: int) -> dict[str, str]:
    """Words for a caption: skin, hair, eyes, beard, glasses, clothes, background."""
    pick = {name: int(values[row]) for name, values in who.picks.items()}
    word = lambda name, words: list(words)[pick[name]]
    style = word("style", HAIRSTYLES)
    hair = "no hair" if style == "no" else f"{style} {word('hair', HAIRS)} hair"
    neckline = word("neckline", NECKLINES)
    return {
        "skin": f"{word('skin', SKINS)} skin",
        "hair": hair,
        "eyes": f"{word('iris', EYES)} eyes",
        "beard": word("chin", CHINS),
        "glasses": word("glasses", GLASSES),
        "clothes": f"{word('clothes', CLOTHES)} clothes with {neckline}",
        "background": f"{word('wall', BACKGROUNDS)} background",
    }


def _index(xp: Any, uniform: Float[Either, " b"], count: int) -> Int[Either, " b"]:
    return xp.clip((uniform * count).astype(xp.int32), 0, count - 1)
