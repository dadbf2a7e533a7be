import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import nnx

from liveavatar_jax.config import TextConfig
from liveavatar_jax.data.prompt import Tokenizer, clean
from liveavatar_jax.models.text import TextEncoder, relative_buckets
from liveavatar_jax.paths import replace
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.encoders import TEXT_RULES, text_config
from liveavatar_jax.weights.rules import export, load

from .networks import random, same

TINY = TextConfig.tiny()
SENTENCES = [
    "a woman is speaking to the camera in a bright kitchen",
    "a man with a beard is laughing while he talks",
    "the camera stays still and the light is soft",
    "salt & pepper & a man & a woman",
    "she smiles, looks at the camera and begins to speak slowly",
]


@pytest.fixture(scope="module")
def encoder():
    return random(lambda: TextEncoder(TINY, rngs=nnx.Rngs(0)))


def prompts(lengths, t=20):
    ids = jax.random.randint(jax.random.key(1), (len(lengths), t), 0, TINY.vocab)
    mask = jnp.arange(t)[None] < jnp.array(lengths)[:, None]
    return ids, mask


@pytest.fixture(scope="module")
def run():
    return jax.jit(lambda m, ids, mask, dtype=None: m(ids, mask, dtype), static_argnums=3)


def test_padding_does_not_reach_the_prompt(encoder, run):
    ids, mask = prompts([9])
    long = run(encoder, ids, mask)[:, :9]
    changed = run(encoder, jnp.where(mask, ids, (ids + 5) % TINY.vocab), mask)[:, :9]
    short = run(encoder, ids[:, :9], mask[:, :9])
    np.testing.assert_array_equal(long, changed)
    np.testing.assert_allclose(long, short, rtol=1e-5, atol=1e-5)


def test_prompts_of_a_batch_do_not_see_each_other(encoder, run):
    ids, mask = prompts([9, 14])
    both = run(encoder, ids, mask)
    np.testing.assert_allclose(both[1:], run(encoder, ids[1:], mask[1:]), rtol=1e-5, atol=1e-5)


def test_masks_of_numbers_and_of_truth_values_are_the_same(encoder, run):
    ids, mask = prompts([9])
    np.testing.assert_array_equal(
        run(encoder, ids, mask), run(encoder, ids, mask.astype(jnp.int32))
    )


def test_every_layer_has_its_own_position_table(encoder, run):
    ids, mask = prompts([20])
    plain = run(encoder, ids, mask)
    for layer in range(TINY.layers):
        table = encoder.layers.position[...]
        without = replace(encoder, {"layers.position": table.at[layer].set(0.0)})
        assert jnp.abs(run(without, ids, mask) - plain).max() > 1e-2


def test_an_empty_mask_stays_finite(encoder, run):
    ids, mask = prompts([0])
    assert jnp.isfinite(run(encoder, ids, mask)).all()


def test_dtype_follows_the_weights_unless_told(encoder, run):
    ids, mask = prompts([20])
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), encoder)
    assert run(half, ids, mask).dtype == jnp.bfloat16
    told = run(half, ids, mask, "float32")
    assert told.dtype == jnp.float32
    rounded = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    np.testing.assert_allclose(told, run(rounded, ids, mask), rtol=1e-5, atol=1e-5)
    near = jnp.abs(run(half, ids, mask).astype(jnp.float32) - told).max() / jnp.abs(told).max()
    assert near < 0.05


def test_one_compilation_serves_every_prompt(encoder):
    run = jax.jit(lambda m, ids, mask: m(ids, mask))  # one of its own, to count
    for lengths in ([3], [20], [11]):
        run(encoder, *prompts(lengths))
    assert run._cache_size() == 1


def test_buckets_tell_before_from_after_and_grow_with_distance():
    table = relative_buckets(300, TextConfig())
    ahead, behind = table[0], table[:, 0]
    assert (np.diff(ahead[1:]) >= 0).all() and (np.diff(behind) >= 0).all()
    assert not set(ahead[1:]) & set(behind)
    assert ahead.max() == 31 and behind.max() == 15


def test_export_undoes_import(encoder):
    published = export(encoder, TEXT_RULES)
    assert text_config(published, param_dtype="float32") == TINY
    abstract = jax.eval_shape(lambda: TextEncoder(TINY, rngs=nnx.Rngs(0)))
    back = load(abstract, published, TEXT_RULES, where="here")
    same(back, encoder)


def test_another_file_is_not_taken_for_a_text_encoder():
    with pytest.raises(LiveAvatarError, match=r"no tensor 'token_embedding\.weight'.*umT5"):
        text_config({"lm_head.weight": np.zeros((2, 2))})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("Wan2.2-S2V-14B")
    place = root / "google" / "umt5-xxl"
    place.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (place / "spiece.model").write_bytes(model.getvalue())
    (root / "other.model").write_bytes(b"not this one")
    return root


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


def test_the_published_place_is_found_first(folder, tokenizer):
    assert tokenizer.path == folder / "google" / "umt5-xxl" / "spiece.model"
    assert Tokenizer(str(tokenizer.path)).vocab == tokenizer.vocab > 40


def test_a_prompt_becomes_its_pieces_end_of_sequence_and_padding(tokenizer):
    ids, mask = tokenizer(["a man is speaking", "she smiles"], text_len=40)
    assert ids.shape == mask.shape == (2, 40) and ids.dtype == mask.dtype == np.int32
    for row, text in enumerate(["a man is speaking", "she smiles"]):
        n = mask[row].sum()
        assert mask[row].tolist() == [1] * n + [0] * (40 - n)
        assert ids[row, n - 1] == 1 and (ids[row, n:] == 0).all() and (ids[row, : n - 1] > 2).all()
        assert tokenizer.model.Decode(ids[row, : n - 1].tolist()) == text


def test_a_long_prompt_keeps_its_end_of_sequence(tokenizer):
    ids, mask = tokenizer("she smiles and speaks " * 50, text_len=16)
    whole, _ = tokenizer("she smiles and speaks " * 50, text_len=2000)
    assert mask.all() and ids[0, -1] == 1
    np.testing.assert_array_equal(ids[0, :-1], whole[0, :15])


def test_an_empty_prompt_is_an_end_of_sequence(tokenizer):
    ids, mask = tokenizer("", text_len=4)
    assert ids.tolist() == [[1, 0, 0, 0]] and mask.tolist() == [[1, 0, 0, 0]]


def test_equal_text_in_other_clothes_gives_equal_ids(tokenizer):
    same = partial(tokenizer, text_len=40)
    want = same("a man & a woman")[0]
    for text in ("  a man &amp; a\n\twoman ", "a man &amp;amp; a woman", "a\u00a0man & a woman"):
        np.testing.assert_array_equal(same(text)[0], want)


def test_cleaning_mends_broken_characters():
    assert clean("schÃ¶n &lt;b&gt;  \n soft") == "schön <b> soft"


def test_a_folder_without_a_tokenizer_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(LiveAvatarError, match=r"no sentencepiece model.*put google/umt5-xxl"):
        Tokenizer(tmp_path)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    broken = tmp_path / "spiece.model"
    for content in (b"", b"not a model", bytes(range(256)) * 8):
        broken.write_bytes(content)
        with pytest.raises(LiveAvatarError, match=r"spiece\.model .*google/umt5-xxl"):
            Tokenizer(tmp_path)
