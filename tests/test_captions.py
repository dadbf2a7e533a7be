"""Captions say what a puppet shows, in many words, and a small encoder learns to read them."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.data import captions
from liveavatar_jax.data.captions import EXPRESSIONS, LEXICON
from liveavatar_jax.data.prompt import Tokenizer
from liveavatar_jax.models.text import TextEncoder
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import packed
from train import text

LOOKS = {
    "skin": "pale skin", "hair": "curly red hair", "eyes": "green eyes", "beard": "moustache",
    "glasses": "round glasses", "clothes": "yellow clothes with a V-neck",
    "background": "grey background",
}  # fmt: skip


def many(count, *, held_out=False, seed=0):
    rng = np.random.default_rng(seed)
    return [captions.draw(rng, EXPRESSIONS[i % 4], LOOKS, held_out=held_out) for i in range(count)]


def phrases(expression):
    return [phrase for words in LEXICON[expression].values() for phrase in words]


def test_a_seed_gives_the_same_captions():
    assert many(50) == many(50) != many(50, seed=1)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_caption_has_a_word_of_its_expression(held_out):
    for made in many(800, held_out=held_out):
        said = [phrase for phrase in phrases(made.expression) if phrase in made.text.lower()]
        assert said or (made.expression == "neutral" and not held_out), made
        assert "{" not in made.text and "  " not in made.text


def test_no_word_belongs_to_two_expressions():
    for slot in LEXICON["neutral"]:
        words = [word for expression in EXPRESSIONS for word in LEXICON[expression][slot]]
        assert len(set(words)) == len(words)


def test_what_is_said_of_the_looks_is_true():
    for made in many(800):
        for key, value in made.said.items():
            assert LOOKS[key] == value and value.lower() in made.text.lower()
        for key in LOOKS.keys() - made.said.keys():
            assert LOOKS[key].lower() not in made.text.lower()
    assert set().union(*(made.said for made in many(800))) == LOOKS.keys()


def test_articles_fit():
    text = " ".join(made.text.lower() for made in many(2000))
    assert not re.search(r"\ba [aeio]\w+ (?!neck)", text.replace("a unhappy", "a x"))
    assert " a moustache" in text and " a grey background" in text


def test_training_never_sees_a_held_out_word_in_its_frame():
    pairs = [(f, w) for f in captions.TRAINED for slots in LEXICON.values()
             for field, words in slots.items() if re.search(rf"\{{{field}\b", f)
             for w in words]  # fmt: skip
    held = [captions.is_held_out(frame, {"": word}) for frame, word in pairs]
    assert 0.1 < np.mean(held) < 0.2
    learnt = {w for (_, w), out in zip(pairs, held, strict=True) if not out}
    assert learnt == {w for e in EXPRESSIONS for w in phrases(e)}  # every word is learnt somewhere
    trained = {made.text for made in many(4000)}
    held_out = [made.text for made in many(4000, held_out=True, seed=1)]
    assert np.mean([text in trained for text in held_out]) < 0.01


def test_many_captions_differ():
    assert len({made.text for made in many(1000)}) > 850


def test_thinning_leaves_what_tells_the_expression():
    rng = np.random.default_rng(0)
    for made in many(400, held_out=True):
        thin = captions.thinned(rng, made.text, 0.5).lower()
        said = [phrase for phrase in phrases(made.expression) if phrase in made.text.lower()]
        assert any(set(re.findall(r"[a-z]+", p)) <= set(re.findall(r"[a-z]+", thin)) for p in said)


def test_an_unknown_expression_is_refused():
    with pytest.raises(LiveAvatarError, match="'angry' must be one of neutral, smiling"):
        captions.caption(np.random.default_rng(0), "angry")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few steps: nothing is learnt, all is written."""
    out = tmp_path_factory.mktemp("text")
    return out, text.run(out, steps=3, judged=200)


def test_a_run_writes_an_encoder_that_reads_any_text(trained):
    out, measured = trained
    about = json.loads((out / "text.json").read_text())
    assert about["measured"] == measured and 0 <= measured["expression"] <= 1
    tokenizer = Tokenizer(out)
    assert tokenizer.vocab == text.TEXT.vocab
    assert tokenizer("SMILING")[0].tolist() == tokenizer("smiling")[0].tolist()
    abstract = jax.eval_shape(lambda: text.fresh(text.TEXT, 1, 0)).encoder
    encoder: TextEncoder = packed.read(packed.file_of(out, "text"), abstract)
    ids, mask = map(jnp.asarray, tokenizer(["", "a gloomy woman", "日本語 🙂"], text.TEXT_LEN))
    assert (mask.sum(-1) < text.TEXT_LEN).all() and ids.max() < text.TEXT.vocab
    rows = encoder(ids, mask)
    assert rows.shape == (3, text.TEXT_LEN, text.TEXT.dim) and np.isfinite(rows).all()


def test_captions_fit_into_the_rows(trained):
    tokenizer = Tokenizer(trained[0])
    _, mask = tokenizer([made.text for made in many(2000)], 64)
    assert np.mean(mask.sum(-1) <= text.TEXT_LEN) > 0.99


def test_looks_are_words_that_tell_people_apart():
    looks = text.Looks([LOOKS, LOOKS | {"hair": "short black hair", "beard": "no beard"}])
    assert looks.pairs == [("beard", "beard"), ("beard", "moustache"), ("beard", "no"),
                           ("hair", "black"), ("hair", "curly"), ("hair", "red"),
                           ("hair", "short")]  # fmt: skip
    assert looks({"hair": "curly red hair"}).tolist() == [0, 0, 0, 0, 1, 1, 0]


@pytest.mark.slow
def test_held_out_captions_are_read(tmp_path):
    measured = text.run(tmp_path)
    assert measured["expression"] > 0.95 and measured["other sentences are neutral"] > 0.95
    assert measured["free prompts"] > 0.85


def test_bad_arguments_are_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert text.main(["--out", str(tmp_path / "file" / "out")]) == 2
    assert text.main(["--out", str(tmp_path), "--steps", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
