"""A procedural talking head, drawn anti-aliased at any size, with numpy or (jitted) with JAX.

    who = identity(uniforms)                        # [b, IDENTITY_NOISE]
    pose = gestures(normals, expression, mouth)     # [b, WARM + F, GESTURE_NOISE], [b], [b, F, 3]
    video = draw(who, pose, 64)                     # [b, F, 64, 64, 3] in [-1, 1]

The same code serves both: it asks its arrays for their namespace. Shapes are painted one over
another, each by how much of a pixel it covers. Round shapes know the distance to their edge to
first order (value over gradient, so that a flat ellipse grows no whiskers); lips, lids, brows and
teeth are bands between two curves, whose share of a pixel's height is exact however thin.
"""

import dataclasses
from typing import Any

from liveavatar_jax.data.gestures import EXPRESSIONS, GESTURE_NOISE, WARM, Pose, gestures
from liveavatar_jax.data.identity import IDENTITY_NOISE, Either, Identity, identity, traits
from liveavatar_jax.types import Float, struct

__all__ = [
    "EXPRESSIONS", "GESTURE_NOISE", "IDENTITY_NOISE", "WARM", "Identity", "Pose", "Regions",
    "boxes", "draw", "gestures", "identity", "regions", "traits",
]  # fmt: skip

LINE = 0.045  # width of outlines: 1.4 pixels of 64
DEPTH = {"hair": -0.010, "ear": -0.018, "face": 0.012, "features": 0.040, "nose": 0.060}
WHITE, TOOTH, TONGUE = (0.98, 0.98, 0.97), (0.97, 0.96, 0.92), (0.84, 0.36, 0.38)
CAVITY, PUPIL = (0.16, 0.03, 0.05), (0.04, 0.04, 0.06)


@struct
class Regions:
    """Boxes as masks of 0 and 1."""

    mouth: Float[Either, "b F size size"]
    eyes: Float[Either, "b F size size"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the pixels lie in the coordinates of a part, and how large they are there."""

    xp: Any
    x: Float[Either, "b F size size"]
    y: Float[Either, "b F size size"]
    pixel: Float[Either, "b F 1 1"]

    def moved(self, dx: Any, dy: Any) -> "Place":
        return dataclasses.replace(self, x=self.x - dx, y=self.y - dy)

    def mirrored(self) -> "Place":
        """The right half, twice."""
        return dataclasses.replace(self, x=self.xp.abs(self.x))

    def ellipse(self, w: Any, h: Any, square: Any = 0.0, grow: Any = 0.0) -> Either:
        """The share of each pixel within half sizes w, h; `square`, up to 1, fills the corners."""
        return self.cover(self.distance(w, h, square) - grow)

    def distance(self, w: Any, h: Any, square: Any = 0.0) -> Either:
        """To the edge of an ellipse, to first order; negative within."""
        u, v = self.x * (1 / w), self.y * (1 / h)
        uu, vv = u * u, v * v
        fill_u = 1 - square * self.xp.minimum(vv, 1.0)
        fill_v = 1 - square * self.xp.minimum(uu, 1.0)
        du, dv = u * fill_u * (1 / w), v * fill_v * (1 / h)
        return 0.5 * (uu * fill_u + vv - 1) / self.xp.sqrt(du * du + dv * dv + 1e-6)

    def cover(self, distance: Either) -> Either:
        return self.xp.clip(0.5 - distance / self.pixel, 0.0, 1.0)

    def below(self, curve: Either) -> Either:
        return self.xp.clip(0.5 + (self.y - curve) / self.pixel, 0.0, 1.0)

    def within(self, half: Any) -> Either:
        return self.xp.clip(0.5 + (half - self.xp.abs(self.x)) / self.pixel, 0.0, 1.0)

    def band(self, top: Either, bottom: Either) -> Either:
        """The share of each pixel's height that lies between two curves."""
        half = 0.5 * self.pixel
        low = self.xp.minimum(self.y + half, bottom)
        high = self.xp.maximum(self.y - half, top)
        return self.xp.clip((low - high) / self.pixel, 0.0, 1.0)


class Sheet:
    """The numbers and colours of an identity or a pose, spread over [b, F, size, size]."""

    def __init__(self, values: dict[str, Either]):
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def draw(who: Identity, pose: Pose, size: int) -> Float[Either, "b F size size 3"]:
    """Pictures of size x size pixels in [-1, 1]; jit it with a static size."""
    xp, face, of, p = _place(who, pose, size)
    room = Place(xp, *_grid(xp, pose, size))
    picture = _backdrop(room, of)
    hair = face.moved(DEPTH["hair"] * p.yaw, DEPTH["hair"] * p.pitch)
    head = face.moved(DEPTH["face"] * p.yaw, DEPTH["face"] * p.pitch)
    front = face.moved(DEPTH["features"] * p.yaw, DEPTH["features"] * p.pitch)
    picture = _hair_behind(picture, hair, of)
    picture = _body(picture, room, face, of, p)
    picture = _skull(picture, face, head, of, p)
    picture = _nose(picture, face.moved(DEPTH["nose"] * p.yaw, DEPTH["nose"] * p.pitch), of)
    picture = _mouth(picture, front, of, p)
    picture = _hair_in_front(picture, head, of)
    picture = _eyes(picture, front, of, p)
    picture = _glasses(picture, front, of)
    return xp.moveaxis(2 * picture - 1, 0, -1)


def boxes(who: Identity, pose: Pose) -> tuple[Float[Either, "b F 4"], Float[Either, "b F 4"]]:
    """Around the mouth and around both eyes: top, left, bottom, right in 0..1 of the picture."""
    xp, _, of, p = _place(who, pose, 1)
    found = []
    for y, half_w, half_h in ((of.mouth_y + 0.07, 0.36, 0.26), (of.eye_y - 0.05, 0.48, 0.24)):
        dx = DEPTH["features"] * p.yaw - p.roll * y
        dy = DEPTH["features"] * p.pitch + y
        at_x, at_y = of.at_x + p.x + p.scale * dx, of.at_y + p.y + p.scale * dy
        w, h = half_w * p.scale, half_h * p.scale
        edges = [at_y - h, at_x - w, at_y + h, at_x + w]
        found.append(xp.stack([0.5 + 0.5 * edge[:, :, 0, 0] for edge in edges], axis=-1))
    return found[0], found[1]


def regions(who: Identity, pose: Pose, size: int) -> Regions:
    """The boxes as masks: a pixel is in when its middle is."""
    xp: Any = pose.open.__array_namespace__()
    at = (xp.arange(size, dtype=pose.open.dtype) + 0.5) / size
    row, column = at[None, None, :, None], at[None, None, None, :]
    masks = []
    for box in boxes(who, pose):
        top, left, bottom, right = (box[:, :, i, None, None] for i in range(4))
        inside = (row >= top) & (row <= bottom) & (column >= left) & (column <= right)
        masks.append(inside.astype(pose.open.dtype))
    return Regions(*masks)


def _grid(xp: Any, pose: Pose, size: int) -> tuple[Either, Either, Either]:
    at = (xp.arange(size, dtype=pose.open.dtype) * 2 + 1) / size - 1
    zero = 0 * pose.open[:, :, None, None]
    x, y = zero + at[None, None, None, :], zero + at[None, None, :, None]
    return xp.broadcast_to(x, (*zero.shape[:2], size, size)), xp.broadcast_to(
        y, (*zero.shape[:2], size, size)
    ), zero + 2.0 / size  # fmt: skip


def _place(who: Identity, pose: Pose, size: int) -> tuple[Any, Place, Any, Any]:
    """The face's own coordinates, upright and unscaled; identity and pose spread over pixels."""
    xp: Any = pose.open.__array_namespace__()
    wide = {n: v[:, None, None, None] for n, v in (who.size | who.style).items()}
    for field in ("beard", "moustache", "glasses", "glasses_square"):
        wide[field] = getattr(who, field)[:, None, None, None]
    colours = {n: xp.moveaxis(v, 1, 0)[:, :, None, None, None] for n, v in who.colour.items()}
    neck = {f"neck_{n}": who.neck[:, i, None, None, None] for i, n in enumerate("hwv")}
    of = Sheet(wide | colours | neck)
    fields = {f.name: getattr(pose, f.name)[:, :, None, None] for f in dataclasses.fields(pose)}
    fields["scale"] = of.scale * fields["zoom"]
    p = Sheet(fields)
    x, y, pixel = _grid(xp, pose, size)
    x, y = (x - of.at_x - p.x) / p.scale, (y - of.at_y - p.y) / p.scale
    cos, sin = xp.cos(p.roll), xp.sin(p.roll)
    face = Place(xp, cos * x + sin * y, cos * y - sin * x, pixel / p.scale)
    return xp, face, of, p


def _over(picture: Either, colour: Any, cover: Either) -> Either:
    """Paints one colour: [b, 1, 1, 1, 3] or three numbers."""
    if isinstance(colour, tuple):
        xp: Any = picture.__array_namespace__()
        colour = xp.asarray(colour, dtype=picture.dtype)[:, None, None, None, None]
    return picture + cover[None] * (colour - picture)


def _backdrop(room: Place, of: Any) -> Either:
    """A wall that is lighter around the head."""
    glow = 1 - 0.35 * (room.x * room.x + (room.y + 0.2) * (room.y + 0.2))
    return of.wall * (0.80 + 0.20 * room.xp.clip(glow, 0.0, 1.0)[None])


def _hair_behind(picture: Either, hair: Place, of: Any) -> Either:
    """One shape with its outline, darker where it hangs behind the neck."""
    bun = hair.mirrored().moved(of.bun_x, of.bun_y).distance(of.bun_r, of.bun_r)
    wide = of.back_w + of.face_w - 0.60
    back = hair.moved(0.0, of.back_y).distance(wide, of.back_h, 0.35)
    edge = hair.xp.minimum(bun, back)
    picture = _over(picture, 0.5 * of.hair, hair.cover(edge - LINE))
    shadow = 1 - 0.25 * hair.xp.clip(hair.y + 0.1, 0.0, 1.0)
    return _over(picture, of.hair * shadow[None], hair.cover(edge))


def _body(picture: Either, room: Place, face: Place, of: Any, p: Any) -> Either:
    """Shoulders, the neck, and the neckline, which rise with the breath."""
    body = room.moved(of.at_x + 0.4 * p.x, of.at_y + 0.3 * p.y - 0.012 * p.breath)
    xp = body.xp
    shoulders = body.moved(0.0, 1.22).distance(0.98, 0.52, 0.3)
    chest = body.cover(shoulders)
    picture = _over(picture, 0.5 * of.clothes, body.cover(shoulders - LINE))
    picture = _over(picture, of.clothes, chest)
    u = xp.abs(body.x) * (1 / of.neck_w)
    shape = (1 - of.neck_v) * (1 - u * u) + of.neck_v * (1 - u)
    steep = xp.where(of.neck_h < 0, 8.0, 1.0).astype(u.dtype)  # a collar stands up
    line = 0.77 + of.neck_h * xp.clip(steep * shape, 0.0, 1.0)
    throat = body.within(0.25) * body.band(0.3 + 0 * line, 0.77 + 0 * line)
    bare = body.within(of.neck_w) * body.band(0.6 + 0 * line, line) * chest
    shade = 0.62 + 0.2 * xp.clip((face.y - 0.6) * 3, 0.0, 1.0)  # below the chin
    picture = _over(picture, of.skin * shade[None], xp.maximum(throat, bare))
    high = body.within(of.neck_w) * body.band(line, 0.78 + 0 * line)
    picture = _over(picture, of.clothes, high)
    flat = xp.where(of.neck_h < 0, 0.85, 1.0).astype(u.dtype) * of.neck_w
    trim = body.within(flat) * body.band(line - 0.005, line + 0.055)
    return _over(picture, of.trim, trim)


def _skull(picture: Either, face: Place, head: Place, of: Any, p: Any) -> Either:
    """Ears and face with its outline, cheeks, and a beard."""
    xp = face.xp
    ears = face.moved(DEPTH["ear"] * p.yaw, DEPTH["ear"] * p.pitch).mirrored()
    ear = ears.moved(of.face_w + 0.03, 0.02).distance(of.ear * 0.8, of.ear * 1.15)
    picture = _over(picture, 0.5 * of.skin, ears.cover(ear - LINE))
    picture = _over(picture, 0.88 * of.skin, ears.cover(ear))
    # the chin follows the jaw
    low = xp.maximum(head.y, 0.0) / of.face_h
    shaped = dataclasses.replace(head, x=head.x * (1 + of.jaw * low * low))
    height = xp.where(head.y > 0, of.face_h + 0.075 * p.open, of.face_h)
    edge = shaped.distance(of.face_w, height, of.square)
    picture = _over(picture, 0.5 * of.skin, head.cover(edge - LINE))
    inside = head.cover(edge)
    picture = _over(picture, of.skin, inside)
    cheeks = head.mirrored().moved(0.36, 0.20)
    far = (cheeks.x * cheeks.x + cheeks.y * cheeks.y) / 0.022
    red = (of.blush + 0.25 * xp.maximum(p.smile, 0.0)) * xp.clip(1 - far, 0.0, 1.0)
    picture = _over(picture, of.lips, red)
    x = head.x / of.face_w
    grown = head.below(0.30 - 0.42 * x * x * x * x) * inside * of.beard
    return _over(picture, 0.92 * of.hair, grown)


def _nose(picture: Either, nose: Place, of: Any) -> Either:
    """A crescent: a shaded ellipse with another of skin over it."""
    nose = nose.moved(0.0, of.nose_y)
    inside = nose.ellipse(of.nose_w, of.nose_h)
    picture = _over(picture, of.skin * 0.62, inside)
    return _over(picture, of.skin, inside * nose.moved(0.0, -0.045).ellipse(of.nose_w, of.nose_h))


def _mouth(picture: Either, front: Place, of: Any, p: Any) -> Either:
    """Lips around a dark cavity with teeth and tongue. A shut mouth is a line between the lips."""
    xp = front.xp
    mouth = front.moved(0.0, of.mouth_y)
    wide = 0.80 + 0.40 * p.width - 0.42 * p.round
    half = of.mouth_w * wide * (1 + 0.12 * xp.maximum(p.smile, 0.0))
    u = mouth.x / half
    arch = xp.maximum(1 - u * u, 0.0)
    curve = xp.sqrt(arch)
    full = xp.where(p.round > 0.99, curve, curve * (0.45 + 0.4 * p.round) + arch * (
        0.55 - 0.4 * p.round))  # fmt: skip
    middle = 0.085 * p.smile * (0.45 - xp.minimum(u * u, 1.4))
    top = middle - 0.085 * p.open * full
    bottom = middle + 0.215 * p.open * full
    lip = of.lip * (1 + 0.25 * p.round - 0.1 * p.open)
    # lips reach a little beyond the corners
    v = mouth.x / (half + 0.035)
    round_off = xp.sqrt(xp.maximum(1 - v * v, 0.0))
    lips = mouth.band(top - 0.75 * lip * round_off, bottom + lip * round_off)
    moustache = mouth.within(half * 1.05) * mouth.band(
        top - 0.75 * lip - 0.115 + 0.05 * u * u, top - 0.6 * lip + 0.04 * u * u
    )
    picture = _over(picture, 0.8 * of.hair, moustache * of.moustache)
    picture = _over(picture, of.lips, lips)
    seam = mouth.band(middle - 0.022 * round_off, middle + 0.022 * round_off)
    picture = _over(picture, 0.42 * of.lips, xp.maximum(seam * mouth.within(half), 0.0))
    cavity = mouth.band(top, bottom)
    picture = _over(picture, CAVITY, cavity)
    gap = bottom - top
    tongue = mouth.band(
        bottom - xp.minimum(0.45 * xp.maximum(gap - 0.10, 0.0), 0.085 * arch), bottom
    )
    picture = _over(picture, TONGUE, cavity * tongue * mouth.within(0.72 * half))
    thick = xp.minimum(0.35 * xp.maximum(gap - 0.05, 0.0), 0.065 * curve)
    teeth = mouth.band(top, top + thick)
    return _over(picture, TOOTH, teeth * mouth.within(0.86 * half))


def _eyes(picture: Either, front: Place, of: Any, p: Any) -> Either:
    """Both at once, mirrored: white, iris, pupil, a glint, the lash line; and the brows."""
    xp = front.xp
    side = xp.where(front.x < 0, -1.0, 1.0).astype(front.x.dtype)
    both = front.mirrored()
    eye = both.moved(of.eye_x, of.eye_y)
    u = eye.x / of.eye_w
    arch = xp.maximum(1 - u * u, 0.0)
    lean = of.eye_tilt * eye.x
    bottom = lean + of.eye_h * 0.85 * arch * (1 - 0.25 * xp.maximum(p.smile, 0.0))
    top = bottom - of.eye_h * 1.85 * p.lids * xp.sqrt(arch)
    top = xp.minimum(top + 0.045 * p.tilt * u * xp.sqrt(arch), bottom)
    ball = eye.band(top, bottom)
    picture = _over(picture, 0.45 * of.skin, eye.band(top - 0.02, bottom + 0.03) * eye.within(
        of.eye_w))  # fmt: skip
    picture = _over(picture, WHITE, ball)
    iris = eye.moved(side * 0.055 * p.gaze_x, 0.04 * p.gaze_y - 0.01)
    picture = _over(picture, of.iris, ball * iris.ellipse(of.iris_r, of.iris_r))
    picture = _over(picture, PUPIL, ball * iris.ellipse(0.045, 0.045))
    glint = iris.moved(0.028 * side, -0.032).ellipse(0.026, 0.026)
    picture = _over(picture, WHITE, ball * glint)
    ends = xp.sqrt(xp.maximum(1 - u * u / 1.15, 0.0))
    lash = eye.band(top - 0.042 * ends, top + 0.012)
    picture = _over(picture, PUPIL, lash * eye.within(1.04 * of.eye_w))
    brow = both.moved(of.eye_x + 0.01, of.eye_y - of.brow_y - 0.09 * p.brow)
    b = brow.x / 0.185
    line = -0.05 * (1 - b * b) * of.brow_bend + 0.085 * p.tilt * b
    thick = of.brow_t * (1.1 - 0.35 * b)
    return _over(
        picture, 0.62 * of.hair, brow.within(0.185) * brow.band(line - thick, line + thick)
    )


def _hair_in_front(picture: Either, head: Place, of: Any) -> Either:
    """What grows from the top of the head: all of a cap above the hairline, and a shine on it."""
    edge = head.moved(0.0, -0.08).distance(of.face_w + 0.062, of.face_h + 0.045, of.square)
    xx = head.x * head.x
    line = of.line + of.part * head.x + 2.6 * of.temple * xx * xx
    cap = head.cover(edge) * of.cap
    picture = _over(picture, 0.5 * of.hair, cap * (1 - head.below(line + LINE)))
    picture = _over(picture, of.hair, cap * (1 - head.below(line)))
    shine = head.moved(-0.12, -0.66)
    arc = 0.35 * shine.x * shine.x
    light = 0.5 * of.hair + 0.5 * head.xp.sqrt(of.hair)
    return _over(picture, light, shine.band(arc - 0.03, arc + 0.03) * shine.within(0.26) * of.cap)


def _glasses(picture: Either, front: Place, of: Any) -> Either:
    """Two frames with a bridge, and temples to the ears."""
    xp = front.xp
    lens = front.mirrored().moved(of.eye_x, of.eye_y - 0.01)
    edge = lens.distance(0.225, 0.205, 0.9 * of.glasses_square)
    frame = lens.cover(xp.abs(edge) - 0.021)
    bridge = front.within(0.06) * front.moved(0.0, of.eye_y).band(-0.045 + 0 * front.x, 0 * front.x)
    arm = front.moved(0.0, of.eye_y).band(-0.05 + 0 * front.x, 0 * front.x) * (
        front.within(of.face_w) - front.within(of.eye_x + 0.23)
    )
    cover = xp.maximum(frame, xp.maximum(bridge, arm))
    return _over(picture, of.frame, cover * of.glasses)
