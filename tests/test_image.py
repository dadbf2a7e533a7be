import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from liveavatar_jax.data.image import (
    WHITE,
    fit_portrait,
    load_portrait,
    parse_size,
    read_picture,
    resized_size,
    target_size,
    to_pixels,
)
from liveavatar_jax.types import LiveAvatarError

PORTRAIT = Path(__file__).parent / "data" / "portrait.jpg"
AREA = 720 * 400
SHAPES = [(720, 400), (1280, 720), (720, 1280), (640, 480), (512, 512), (300, 200), (101, 70)]


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 48, 3), dtype=np.uint8)


def smooth(height, width):
    """A picture without a black pixel whose rows and columns all differ."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [60 + 180 * y / height, 60 + 180 * x / width, 150 + 0 * x]
    return np.stack(channels, axis=-1).astype(np.uint8)


def saved(tmp_path, picture, name="portrait.png", **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def test_a_real_portrait_gets_the_published_size():
    image = load_portrait(PORTRAIT, AREA)
    assert image.dtype == np.uint8
    with Image.open(PORTRAIT) as original:
        assert image.shape == (*target_size(original.height, original.width, AREA), 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_whole_cells_within_the_area(shape):
    for area in (AREA, 704 * 384, 256 * 256, 64 * 64):
        height, width = target_size(*shape, area)
        assert height % 64 == width % 64 == 0 and 0 < height * width <= area


@pytest.mark.parametrize("shape", SHAPES)
def test_cover_has_no_bars_and_keeps_the_aspect(shape):
    size = target_size(*shape, AREA)
    image = fit_portrait(smooth(*shape), size)
    assert image.shape == (*size, 3)
    assert image.min() >= 55, "a black bar"
    rows, columns = resized_size(*shape, size, "cover")
    assert abs(rows / columns - shape[0] / shape[1]) < 1.5 / min(rows, columns) * rows / columns


@pytest.mark.parametrize("shape", SHAPES)
def test_cover_is_published_where_nothing_is_padded(shape):
    size = target_size(*shape, AREA)
    published = fit_portrait(smooth(*shape), size, "published")
    cover = fit_portrait(smooth(*shape), size, "cover")
    resized = resized_size(*shape, size, "published")
    padded = any(have < want for have, want in zip(resized, size, strict=True))
    assert np.array_equal(published, cover) != padded
    assert (published.min() == 0) == padded


def test_unknown_fit_is_refused():
    with pytest.raises(Exception, match="fit"):
        resized_size(10, 10, (64, 64), "stretch")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.fromarray(smooth(90, 60))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, stored, exif=exif)
    np.testing.assert_array_equal(read_picture(path), np.asarray(upright))


def test_transparency_shows_the_background(tmp_path, image):
    alpha = np.zeros((60, 48, 1), np.uint8)
    alpha[30:] = 255
    path = saved(tmp_path, Image.fromarray(np.concatenate([image, alpha], axis=-1)))
    ours = read_picture(path)
    assert (ours[:30] == WHITE).all()
    np.testing.assert_array_equal(ours[30:], image[30:])
    assert (read_picture(path, background=(1, 2, 3))[:30] == (1, 2, 3)).all()


def test_a_transparent_palette_colour_shows_the_background(tmp_path):
    picture = Image.new("P", (64, 64), 0)
    picture.putpalette([200, 10, 10, 10, 200, 10])
    picture.paste(1, (0, 0, 64, 32))
    path = saved(tmp_path, picture, transparency=0)
    ours = read_picture(path)
    assert (ours[:32] == (10, 200, 10)).all() and (ours[32:] == WHITE).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_kind_of_pixel_becomes_the_same_grey(tmp_path, mode):
    grey = Image.new("L", (64, 64), 255 if mode == "1" else 102)  # 102: in the web palette
    if mode == "I;16":
        picture = Image.fromarray(np.full((64, 64), 102 * 257, np.uint16))
    else:
        picture = grey.convert("RGB").convert(mode)
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    path = saved(tmp_path, picture, f"portrait.{suffix}")
    off = np.abs(read_picture(path).astype(int) - np.asarray(grey.convert("RGB"))).max()
    assert off <= 1


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path):
    red = Image.new("RGB", (64, 64), (200, 40, 40)).convert("CMYK")
    ours = read_picture(saved(tmp_path, red, "portrait.jpg", quality=95))
    assert np.abs(ours.astype(int) - (200, 40, 40)).max() <= 6


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name == "a.webp" else {}
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
        assert (read_picture(path) == (255, 0, 0)).all(), name


def test_one_pixel_is_a_portrait(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (1, 1), (9, 99, 199)))
    image = load_portrait(path, AREA)
    assert image.shape == (64, 64, 3) and (image == (9, 99, 199)).all()


@pytest.mark.parametrize("shape", [(10_000, 10), (10, 10_000), (1, 10_000), (63, 1)])
def test_pictures_that_are_all_length_are_refused(tmp_path, shape):
    path = saved(tmp_path, Image.new("RGB", shape))
    with pytest.raises(LiveAvatarError, match=r"portrait\.png: .*crop it around the face"):
        load_portrait(path, AREA)


def test_a_long_picture_that_is_mostly_seen_is_taken(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (1000, 100)))
    assert load_portrait(path, AREA).shape == (128, 1024, 3)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(LiveAvatarError, match=r"nobody\.png: no such file"):
        load_portrait(tmp_path / "nobody.png", AREA)
    with pytest.raises(LiveAvatarError, match="is a directory"):
        load_portrait(tmp_path, AREA)


@pytest.mark.parametrize("damage", ["empty", "text", "sound", "cut", "garbled"])
def test_damaged_files_are_refused_in_one_sentence(tmp_path, damage):
    whole = PORTRAIT.read_bytes()
    content = {
        "empty": b"",
        "text": b"not a picture",
        "sound": PORTRAIT.with_name("speech.wav").read_bytes()[:1000],
        "cut": whole[: len(whole) // 2],
        "garbled": whole[:20] + bytes(1000),
    }[damage]
    path = tmp_path / "portrait.jpg"
    path.write_bytes(content)
    with pytest.raises(LiveAvatarError, match=rf"portrait\.jpg \({len(content)} bytes\) is not a"):
        load_portrait(path, AREA)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    with pytest.raises(LiveAvatarError, match=r"bomb\.png has more than 89 million pixels"):
        load_portrait(path, AREA)


def test_pixels_span_minus_one_to_one():
    pixels = to_pixels(np.array([[[0, 51, 255]]], np.uint8))
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, [[[-1, -0.6, 1]]], rtol=0, atol=1e-7)


def test_size_counts_by_its_product():
    assert parse_size("720*400") == parse_size("400x720") == parse_size(" 720 × 400 ") == AREA


@pytest.mark.parametrize("text", ["", "720", "720x", "720x400x3", "-720x400", "7.2x400", "a*b"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(LiveAvatarError, match="two whole numbers"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0x400", "63x64"])
def test_a_size_below_one_cell_is_refused(text):
    with pytest.raises(LiveAvatarError, match="at least 64x64"):
        parse_size(text)


def test_a_model_of_one_size_gets_a_square_with_the_head_in_it(tmp_path):
    tall = np.zeros((120, 60, 3), np.uint8)
    tall[20:40] = 255
    Image.fromarray(tall).save(tmp_path / "tall.png")
    square = load_portrait(tmp_path / "tall.png", 720 * 400, side=128)
    assert square.shape == (128, 128, 3)
    rows = np.flatnonzero(square[:, 64, 0] > 128)
    assert abs(rows[0] - 11) <= 1 and abs(rows[-1] - 53) <= 1  # 32 of 128 rows are cut off above
    Image.fromarray(np.zeros((10, 30, 3), np.uint8)).save(tmp_path / "strip.png")
    with pytest.raises(LiveAvatarError, match=r"strip.png.*crop it around the face"):
        load_portrait(tmp_path / "strip.png", 720 * 400, side=128)
