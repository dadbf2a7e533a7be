"""The DiT piece by piece, prefilled, streamed, and as trained, against the original's numbers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.models import layers, lora
from liveavatar_jax.models.attention import KV, ONE_DEVICE, KVCache, attention
from liveavatar_jax.models.clip import Condition, causal
from liveavatar_jax.models.condition import condition_phase, patchify
from liveavatar_jax.models.dit import PATCH, Level
from liveavatar_jax.models.layers import Phase, rotate
from liveavatar_jax.weights import files, rules, wan

from .conftest import after_repeats, by_head, features, latents, part, published


def pair(turn: Phase) -> np.ndarray:
    return np.stack([turn.cos[0], turn.sin[0]], axis=-1)


def levels(dit, t) -> Level:
    return dit.level(jnp.asarray(t, jnp.float32) / 1000)


@pytest.fixture(scope="module")
def common(fixture):
    return fixture("dit_common")


@pytest.fixture(scope="module")
def text(dit, common) -> KV:
    return dit.text(jnp.asarray(common["in.context"])[None])


@pytest.fixture(scope="module")
def sink(dit, common, text) -> KV:
    reference, motion = (latents(common[f"in.{n}_latents"]) for n in ("ref", "motion"))
    return jax.jit(lambda m, *a: m.prefill(*a))(dit, reference, motion, text)


@pytest.fixture(scope="module")
def empty(dit, common, sink):
    side = common.sidecar
    slots = side["kv_cache_frames"] * side["latent_size"]["tokens_per_frame"]
    ring = jnp.zeros((1, dit.cfg.layers, 1, dit.cfg.heads, slots, dit.cfg.head_dim))
    return KVCache(ring=KV(k=ring, v=ring), sink=sink)


@jax.jit
def denoise(dit, x, level, cache, text, audio, block, position, distance, speakers, pose):
    return dit.denoise(
        x,
        level,
        cache,
        text,
        audio,
        step=0,
        block=block[None],
        position=position[None],
        distance=distance[None],
        speakers=speakers,
        pose=pose,
    )


LIVE = jnp.ones(1, bool)


def one_step(cache: KVCache) -> KV:
    return jax.tree.map(lambda a: a[0], cache.ring)


def everywhere(common, speakers=1) -> jnp.ndarray:
    return jnp.ones((1, speakers, 1, common.sidecar["latent_size"]["tokens_per_frame"]))


# ---- parts


@pytest.fixture(scope="module")
def parts(fixture):
    return fixture("dit_parts")


@pytest.mark.parametrize("ours, theirs, given", [
    ("patch", "patch_embedding", "in.patch.x"),
    ("pose", "cond_encoder", "in.cond.x"),
])  # fmt: skip
def test_patch_and_pose_embedding(dit, parts, ours, theirs, given):
    x = latents(parts[given])
    f, h, w = x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    y = getattr(dit, ours)(patchify(x, PATCH))
    y = y.reshape(1, f, h, w, -1).transpose(0, 4, 1, 2, 3)
    parts.check(theirs, y)


def test_time_embedding(dit, parts):
    t = jnp.asarray(parts["time.t"])
    parts.check("time.sinusoid", layers.timestep_sinusoid(t, dit.cfg.freq_dim))
    level = levels(dit, parts["time.t"][None])
    parts.check("time.e", level.head[0])
    parts.check("time.e0", level.blocks[0])


def test_text_embedding(dit, common, parts):
    x = jnp.asarray(common["in.context"])[None]
    x = jnp.pad(x, ((0, 0), (0, dit.cfg.text_len - x.shape[1]), (0, 0)))
    y = dit.text_out(jax.nn.gelu(dit.text_in(x), approximate=True))
    parts.check("text.embedded", y)


def test_audio_adapter(dit, common, parts):
    one = features(parts["in.audio.block"])
    adapt = jax.jit(lambda m, x: m.audio(x))
    tokens = adapt(dit, after_repeats(one))
    parts.check("audio.global", tokens.global_[0, :, :, None])
    parts.check("audio.tokens", tokens.local[0])
    # All steps of the published code, which pads each convolution with repeats: the same as
    # eight more repeats of the first frame.
    repeats = common.sidecar["motion_frames"]["video"] + 8
    many = jnp.concatenate([jnp.repeat(one[:, :, :1], repeats, axis=2), one], axis=2)
    tokens = adapt(dit, many)
    parts.check("audio.global_all", tokens.global_[0, :, :, None])
    parts.check("audio.tokens_all", tokens.local[0])
    two = adapt(dit, after_repeats(features(parts["in.audio.two_streams"])))
    parts.check("audio2.global", two.global_[0, :, :, None])
    parts.check("audio2.tokens", two.local[0])


def test_frame_packer(dit, common, parts):
    motion = latents(common["in.motion_latents"])
    pack = jax.jit(lambda m, x: m.packer(x))
    parts.check("framepack.tokens", pack(dit, motion))
    for name in parts.tensors:
        if few := re.fullmatch(r"framepack\.tokens_from_(\d+)_frames", name):
            parts.check(name, pack(dit, motion[:, -int(few[1]) :]))
    turn = condition_phase(
        *motion.shape[2:4], roll=jnp.zeros(1, jnp.int32), head_dim=dit.cfg.head_dim
    )
    parts.check("framepack.rope", pair(turn)[-len(parts["framepack.rope"]) :])


def test_rotary_tables(dit, common, parts):
    size = common.sidecar["latent_size"]
    frames = common.sidecar["frames_per_block"]
    for name in parts.tensors:
        if name.startswith("rope.noise.start") and name.endswith(".table"):
            start = int(name.split(".")[2].removeprefix("start"))
            turn = dit.turn(jnp.full(1, start, jnp.int32), frames, size["rows"], size["cols"])
            parts.check(name, pair(turn))
            if (rotated := name.replace("table", "q_rotated")) in parts.tensors:
                parts.check(rotated, by_head(rotate(by_head(parts["in.rope.q"]), turn)))
        if name.startswith("rope.cond.roll") and name.endswith(".table"):
            roll = int(name.split(".")[2].removeprefix("roll"))
            turn = condition_phase(
                size["rows"],
                size["cols"],
                roll=jnp.full(1, roll, jnp.int32),
                head_dim=dit.cfg.head_dim,
            )
            parts.check(name, pair(turn))
            if (rotated := name.replace("table", "q_rotated")) in parts.tensors:
                parts.check(rotated, by_head(rotate(by_head(parts["in.rope.cond_q"]), turn)))


def layer(stack, i):
    return jax.tree.map(lambda leaf: leaf[i], stack)


def test_one_block(dit, common, parts, text):
    size, frames = common.sidecar["latent_size"], common.sidecar["frames_per_block"]
    tokens = frames * size["tokens_per_frame"]
    (index,) = parts.said(r"layer \d+ alone")
    (start,) = parts.said(r"frame position \d+ \(second block\)")[:1]
    (roll,) = parts.said(r"rolled by \d+")
    block = layer(dit.blocks, index)
    turn = dit.turn(jnp.full(1, start, jnp.int32), frames, size["rows"], size["cols"])
    sink_turn = condition_phase(
        size["rows"], size["cols"], roll=jnp.full(1, roll, jnp.int32), head_dim=dit.cfg.head_dim
    )
    past = [by_head(parts[f"block.{n}"]) for n in ("hist_k", "hist_v", "cond_k", "cond_v")]
    seen = {}

    def attend(*qkv):
        q, k, v = (by_head(a.reshape(1, tokens, *a.shape[3:])) for a in qkv)
        k = rotate(k, turn)
        keys = jnp.concatenate([past[0], k, rotate(past[2], sink_turn)], axis=2)
        values = jnp.concatenate([past[1], v, past[3]], axis=2)
        y = by_head(attention(rotate(q, turn), keys, values))
        seen["self_attn"] = block.self_attn.o(y.reshape(1, tokens, -1))
        return y.reshape(qkv[0].shape), KV(k=k, v=v)

    def cross(q):
        prompt = layer(text, index)
        return ONE_DEVICE.cross(q, prompt.k, prompt.v, "chunked")

    x = jnp.asarray(parts["in.block.x"]).reshape(1, frames, size["tokens_per_frame"], -1)
    level = levels(dit, np.full((1, frames), parts["time.t"][1]))
    out, fresh = block(x, level.blocks, attend, cross)
    parts.check("block.self_attn", seen["self_attn"])
    parts.check("block.new_k", by_head(fresh.k))
    parts.check("block.new_v", by_head(fresh.v))
    parts.check("block.out", out.reshape(1, tokens, -1))


def test_audio_injection(dit, common, parts):
    size, frames = common.sidecar["latent_size"], common.sidecar["frames_per_block"]
    injector = layer(dit.injectors, 1)
    audio = dit.audio(after_repeats(features(parts["in.audio.block"])))
    x = jnp.asarray(parts["in.inject.x"]).reshape(1, frames, size["tokens_per_frame"], -1)
    parts.check("inject.adain_hidden", injector.adapt(x, audio)[0, 0])
    out = injector(x, audio, everywhere(common))
    parts.check("inject.out", out.reshape(1, -1, dit.cfg.dim))


def test_head(dit, common, parts):
    size, frames = common.sidecar["latent_size"], common.sidecar["frames_per_block"]
    x = jnp.asarray(parts["in.head.x"]).reshape(1, frames, size["tokens_per_frame"], -1)
    level = levels(dit, np.full((1, frames), parts["time.t"][1]))
    y = dit.head(x, level.head)
    parts.check("head.out", y.reshape(1, -1, y.shape[-1]))
    y = dit.unpatchify(y, size["rows"], size["cols"])
    parts.check("head.unpatchified", published(y))


# ---- the three uses


def test_sink_prefill(dit, fixture, sink):
    want = fixture("dit_sink")
    for i in range(dit.cfg.layers):
        want.check(f"cond_k.layer{i}", by_head(sink.k[i]))
        want.check(f"cond_v.layer{i}", by_head(sink.v[i]))
    assert (want["cond_end"] == sink.tokens).all()


def test_denoise_first_next_rolled_and_far_blocks(dit, fixture, common, text, empty):
    want = fixture("dit_denoise")
    frames = common.sidecar["frames_per_block"]
    level = levels(dit, np.full((1, frames), want["t"][0]))
    audio, pose = features(want["in.audio"]), latents(want["in.cond_states"])
    compiled, checked = denoise._cache_size(), set()

    def check(stage, block, keys):
        """Whatever the fixture has of these keys and values, by layer."""
        for name in want.tensors:
            if at := re.fullmatch(rf"cache_{stage}_?block{block}\.([kv])\.layer(\d+)", name):
                want.check(name, by_head(getattr(keys, at[1])[int(at[2])]))
                checked.add(name)

    main, *_ = want.sidecar["calls"]["relative_dist"]
    for distance in want.sidecar["calls"]["relative_dist"]:
        cache = empty
        for j, block in enumerate(want.sidecar["calls"]["block_sequence"]):
            before = cache
            velocity, fresh = denoise(
                dit,
                latents(want["in.x"][j]),
                level,
                cache,
                text,
                dit.audio(after_repeats(part(audio, j, frames))),
                # The jump to a far block keeps the ring full, as the original's slot rule does.
                block=jnp.int32(block),
                position=jnp.int32(frames * block),
                distance=jnp.int32(distance),
                speakers=everywhere(common),
                pose=pose[:, frames * j : frames * (j + 1)],
            )
            cache = cache.append(fresh, 0, jnp.full(1, block, jnp.int32), LIVE)
            if (name := f"velocity.rd{distance}.block{block}") in want.tensors:
                want.check(name, published(velocity))
                checked.add(name)
            if distance == main:
                check("before_", block, one_step(before))
                check(r"new\.", block, fresh)
                check("after_", block, one_step(cache))
    assert checked == {n for n in want.tensors if n.startswith(("velocity.rd", "cache_"))}
    assert denoise._cache_size() <= compiled + 1


def test_denoise_with_a_level_per_frame(dit, fixture, common, text, empty):
    want = fixture("dit_denoise")
    frames = common.sidecar["frames_per_block"]
    velocity, _ = denoise(
        dit,
        latents(want["in.x"][0]),
        levels(dit, want["in.t_per_frame"]),
        empty,
        text,
        dit.audio(after_repeats(part(features(want["in.audio"]), 0, frames))),
        block=jnp.int32(0),
        position=jnp.int32(0),
        distance=jnp.int32(want.sidecar["calls"]["relative_dist"][0]),
        speakers=everywhere(common),
        pose=latents(want["in.cond_states"])[:, :frames],
    )
    want.check("velocity.per_frame_t.block0", published(velocity))


def test_velocity_with_the_lora_merged(dit, fixture, parity, common, empty):
    want, calls = fixture("lora"), fixture("dit_denoise")
    frames = common.sidecar["frames_per_block"]
    tensors = files.read(parity / "tiny_checkpoint" / "LiveAvatar" / "liveavatar.safetensors")
    shapes = wan.abstract_lora(dit, tensors, where="lora")
    factors = rules.load(shapes, tensors, wan.LORA_RULES, where="lora")
    merged = lora.merge(dit, factors, want.sidecar["config"]["scale"])
    reference, motion = (latents(common[f"in.{n}_latents"]) for n in ("ref", "motion"))
    text = merged.text(jnp.asarray(common["in.context"])[None])
    sink = jax.jit(lambda m, *a: m.prefill(*a))(merged, reference, motion, text)
    velocity, _ = denoise(
        merged,
        latents(calls["in.x"][0]),
        levels(merged, np.full((1, frames), calls["t"][0])),
        KVCache(ring=empty.ring, sink=sink),
        text,
        merged.audio(after_repeats(part(features(calls["in.audio"]), 0, frames))),
        block=jnp.int32(0),
        position=jnp.int32(0),
        distance=jnp.int32(calls.sidecar["calls"]["relative_dist"][0]),
        speakers=everywhere(common),
        pose=latents(calls["in.cond_states"])[:, :frames],
    )
    peak = want.sidecar["suggested_tolerance"]["velocity"]["peak_relative"]
    want.check("velocity_with_merged_weights.block0", published(velocity), peak)


@pytest.mark.parametrize("name, alone", [
    ("velocity", False), ("velocity_single_stream_of_actor0", True)
])  # fmt: skip
def test_several_speakers(dit, fixture, common, text, empty, name, alone):
    want = fixture("dit_multi_character")
    frames = common.sidecar["frames_per_block"]
    (distance,) = want.said(r"relative_dist \d+")
    audio, pose = features(want["in.audio"]), latents(want["in.cond_states"])
    # The original takes the mask of the first frames whatever the block, one for each of its own.
    mask = jnp.asarray(want["in.mask"][None, :, :frames, :, :, 0])
    mask = mask.reshape(*mask.shape[:3], -1)
    if alone:
        audio, mask = audio[:, :1], everywhere(common)
    cache = empty
    for j in range(len(want["in.x"])):
        velocity, fresh = denoise(
            dit,
            latents(want["in.x"][j]),
            levels(dit, np.full((1, frames), want["t"][0])),
            cache,
            text,
            dit.audio(after_repeats(part(audio, j, frames))),
            block=jnp.int32(j),
            position=jnp.int32(frames * j),
            distance=jnp.int32(distance),
            speakers=mask,
            pose=pose[:, frames * j : frames * (j + 1)],
        )
        cache = cache.append(fresh, 0, jnp.full(1, j, jnp.int32), LIVE)
        want.check(f"{name}.block{j}", published(velocity))


def clip(want, common, text, t):
    audio = features(want["in.audio"])
    x, pose = latents(want["in.x"]), latents(want["in.cond_states"])
    reference, motion = (latents(common[f"in.{n}_latents"]) for n in ("ref", "motion"))

    @functools.partial(jax.jit, static_argnames="block_frames")
    def velocity(dit, block_frames):
        text = dit.text(jnp.asarray(common["in.context"])[None])
        heard = dit.audio(after_repeats(audio))
        given = Condition(reference, motion, text, heard, everywhere(common), pose)
        return causal(dit, x, jnp.asarray(want[t]) / 1000, given, block_frames=block_frames)

    return velocity


@pytest.mark.parametrize("name, t, frame_causal", [
    ("blockwise_t", "in.t_blockwise", False),
    ("per_frame_t", "in.t_per_frame", False),
    ("per_frame_t_frame_causal", "in.t_per_frame", True),
])  # fmt: skip
def test_training_forward(dit, fixture, common, text, name, t, frame_causal):
    want = fixture("dit_train")
    block_frames = 1 if frame_causal else want.sidecar["frames_per_block"]
    velocity = clip(want, common, text, t)(dit, block_frames=block_frames)
    want.check(f"velocity.{name}", published(velocity))


def test_training_gradients(dit, fixture, common, text):
    want = fixture("dit_train")
    velocity = clip(want, common, text, "in.t_blockwise")
    target, frames = latents(want["in.target"]), want.sidecar["frames_per_block"]
    loss, grads = jax.jit(
        jax.value_and_grad(lambda m: jnp.mean((velocity(m, block_frames=frames) - target) ** 2))
    )(dit)
    want.check("loss", loss[None])
    grads = rules.export(grads, wan.DIT_RULES)
    for name in want.tensors:
        if name.startswith("grad."):
            want.check(name, grads[name.removeprefix("grad.")])
    rtol = want.sidecar["suggested_tolerance"]["rtol"]
    for name, norm in want.sidecar["gradient_norms"].items():
        ours = np.linalg.norm(np.asarray(grads[name], np.float64))
        np.testing.assert_allclose(ours, norm, rtol=rtol, err_msg=name)
