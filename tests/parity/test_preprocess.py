import numpy as np
from PIL import Image

from liveavatar_jax.data.image import (
    fit_portrait,
    load_portrait,
    parse_size,
    resized_size,
    target_size,
    to_pixels,
)


def areas(row):
    return {parse_size(key): want for key, want in row.items() if isinstance(want, dict)}


def test_every_row_of_the_size_table(fixture):
    rows = fixture("preprocess").sidecar["size_table"]
    checked = 0
    for row in rows:
        shape = row["input_height"], row["input_width"]
        for area, want in areas(row).items():
            if "error" in want:
                continue
            size = target_size(*shape, area)
            assert size == (want["height"], want["width"]), (shape, area)
            resized = resized_size(*shape, size, "published")
            assert resized == (want["resized_height"], want["resized_width"]), (shape, area)
            pads = any(have < side for have, side in zip(resized, size, strict=True))
            assert pads == want["crop_pads"], (shape, area)
            checked += 1
    assert checked >= len(rows)


def test_published_fit_gives_the_published_picture(fixture):
    preprocess = fixture("preprocess")
    for name, case in preprocess.sidecar["cases"].items():
        image = preprocess[f"in.{name}.image"]
        size = target_size(*image.shape[:2], case["target_area"])
        assert size == tuple(case["output"])
        ours = fit_portrait(image, size, "published")
        assert ours.dtype == np.uint8
        off = np.abs(ours.astype(int) - preprocess[f"{name}.uint8"]).max()
        assert off <= 1, f"{name}: off by {off} grey levels"


def test_pixels_are_the_published_ones(fixture):
    preprocess = fixture("preprocess")
    atol = preprocess.sidecar["suggested_tolerance"]["pixels"]["atol"]
    for name in preprocess.sidecar["cases"]:
        if f"{name}.pixels" not in preprocess.tensors:
            continue
        image = preprocess[f"in.{name}.image"]
        size = tuple(preprocess.sidecar["cases"][name]["output"])
        ours = to_pixels(fit_portrait(image, size, "published"))
        want = np.moveaxis(preprocess[f"{name}.pixels"][0, :, 0], 0, -1)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, want, rtol=0, atol=atol)


def test_a_file_gives_what_its_pixels_give(fixture, tmp_path):
    preprocess = fixture("preprocess")
    for name, case in preprocess.sidecar["cases"].items():
        image = preprocess[f"in.{name}.image"]
        Image.fromarray(image).save(tmp_path / "portrait.png")
        ours = load_portrait(tmp_path / "portrait.png", case["target_area"], fit="published")
        np.testing.assert_array_equal(ours, fit_portrait(image, tuple(case["output"]), "published"))
