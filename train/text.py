"""Trains the tokenizer and the text encoder of a small preset, on captions of puppets.

    python -m train.text --out DIR    # DIR/text.safetensors, spiece.model, text.json

The encoder learns to tell expression and looks from captions that are written as it goes; the
readers on top of it are thrown away. Every row of its output has to tell the expression, for the
DiT sees rows, and so does their mean. Words that say nothing are left out at random, and texts
that say nothing of a face stand for a neutral one. In the end it is measured on held-out captions
and on prompts that no template makes.
"""

import argparse
import dataclasses
import functools
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from flax import nnx
from tqdm import tqdm

from liveavatar_jax.config import TextConfig
from liveavatar_jax.data import captions
from liveavatar_jax.data.captions import EXPRESSIONS, Caption
from liveavatar_jax.data.prompt import PROMPT, Tokenizer, clean
from liveavatar_jax.data.puppet import IDENTITY_NOISE, identity, traits
from liveavatar_jax.devices import prepare
from liveavatar_jax.models.layers import Linear
from liveavatar_jax.models.text import TextEncoder
from liveavatar_jax.types import Array, Float, Int, LiveAvatarError, struct
from liveavatar_jax.weights import packed
from liveavatar_jax.weights.convert import TOKENIZER
from train.state import Learner, begin, learn

TEXT = TextConfig(vocab=1200, dim=128, attn_dim=128, ffn_dim=256, heads=4, layers=2,
                  max_distance=64, param_dtype="float32")  # fmt: skip
TEXT_LEN = 32
LEARNT_LEN = 24  # few captions are longer
BATCH = 64
NEUTRAL = EXPRESSIONS.index("neutral")
FREE = {  # as a user may put it
    "neutral": ("A man is reading the news", "a person", "She explains how it works",
                "presenter in a studio, talking", "a woman with a straight face", "no smile please",
                PROMPT, "he is completely calm", "", "a boy with glasses talks about his day"),
    "smiling": ("happy", "a very happy girl", "She smiles at you", "make him smile",
                "he is laughing and having fun", "a cheerful woman with red hair smiles",
                "joyful mood, big smile", "A friendly man, smiling warmly while he speaks",
                "grinning from ear to ear", "SMILING WOMAN"),
    "sad": ("sad", "looks gloomy", "she is very unhappy today", "a crying man", "he feels down",
            "a person with tears in the eyes tells bad news", "sorrowful, melancholy mood",
            "The boy is upset and close to tears", "make her look sad", "a miserable old man"),
    "surprised": ("surprised", "she is shocked", "a man who cannot believe what he sees",
                  "wow, amazed", "with raised eyebrows and wide open eyes", "astonished face",
                  "He looks startled", "make her look surprised", "a girl gasps in surprise",
                  "a stunned woman with black hair"),
}  # fmt: skip


class Reader(nnx.Module):
    """The encoder, and what tells expression and looks from its rows."""

    def __init__(self, cfg: TextConfig, looks: int, *, rngs: nnx.Rngs):
        self.encoder = TextEncoder(cfg, rngs=rngs)
        self.expression = Linear(cfg.dim, len(EXPRESSIONS), cfg.param_dtype, rngs=rngs)
        self.looks = Linear(cfg.dim, looks, cfg.param_dtype, rngs=rngs)

    def __call__(
        self, ids: Int[Array, "b t"], mask: Int[Array, "b t"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b t e"], Float[Array, "b k"]]:
        """Logits of the expression, from the mean row and from each, and of the looks."""
        rows = self.encoder(ids, mask)
        share = mask.astype(rows.dtype)[:, :, None]
        mean = jnp.sum(rows * share, axis=1) / jnp.sum(share, axis=1)
        return self.expression(mean), self.expression(rows), self.looks(mean)


@struct
class Batch:
    ids: Int[Array, "b t"]
    mask: Int[Array, "b t"]
    expression: Int[Array, " b"]
    looks: Float[Array, "b k"]  # 1 where a caption says this word of this trait


class Looks:
    """Looks as numbers: which word of which trait a caption says, such as ("hair", "red")."""

    def __init__(self, people: Sequence[Mapping[str, str]]):
        words: dict[str, list[set[str]]] = {}
        for person in people:
            for key, value in person.items():
                words.setdefault(key, []).append(set(value.split()))
        telling = lambda sets: set.union(*sets) - set.intersection(*sets)
        self.pairs = sorted((key, word) for key, of in words.items() for word in telling(of))

    def __call__(self, said: Mapping[str, str]) -> Float[np.ndarray, " k"]:
        tells = lambda key, word: word in said.get(key, "").split()
        return np.array([tells(key, word) for key, word in self.pairs], np.float32)


def people(rng: np.random.Generator, count: int) -> list[dict[str, str]]:
    """What random puppets look like, in words."""
    who = identity(rng.random((count, IDENTITY_NOISE)))
    return [traits(who, row) for row in range(count)]


def train_tokenizer(lines: Sequence[str], vocab: int) -> bytes:
    """A sentencepiece model that reads any text: unknown characters are spelt in bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="nmt_nfkc_cf",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def tokens(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    length: int = TEXT_LEN,
    rng: np.random.Generator | None = None,
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"]]:
    """ids and mask; with `rng` half of the texts are cut into other pieces than the likeliest,
    and some have pieces of other words between theirs, which are to mean nothing."""
    ids, mask = tokenizer(texts, length)
    if rng is None:
        return ids, mask
    model, others = tokenizer.model, _meaningless(tokenizer)
    for row, text in enumerate(texts):
        sampled = bool(rng.random() < 0.5)
        pieces = model.Encode(clean(text), enable_sampling=sampled, alpha=0.1)
        for _ in range(rng.integers(1, 5) if rng.random() < 0.3 else 0):
            pieces.insert(int(rng.integers(len(pieces) + 1)), int(rng.choice(others)))
        pieces = [*pieces[: length - 1], model.eos_id()]
        ids[row] = np.pad(pieces, (0, length - len(pieces)))
        mask[row] = np.arange(length) < len(pieces)
    return ids, mask


@functools.lru_cache(maxsize=1)
def _meaningless(tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    """Pieces that are no word that may tell an expression."""
    model = tokenizer.model
    plain = (i for i in range(model.vocab_size()) if not (model.IsByte(i) or model.IsControl(i)))
    word = lambda i: model.IdToPiece(i).removeprefix("▁")
    return np.array([i for i in plain if word(i) not in captions.CUES and not model.IsUnknown(i)])


def sample(rng: np.random.Generator, who: Sequence[Mapping[str, str]]) -> Caption:
    """A text to learn from."""
    kind = rng.random()
    if kind < 0.15:
        return Caption(captions.unrelated(rng) if kind < 0.12 else "", "neutral", {})
    expression = EXPRESSIONS[int(rng.integers(len(EXPRESSIONS)))]
    made = captions.draw(rng, expression, who[int(rng.integers(len(who)))])
    text, said = made.text, made.said
    if rng.random() < 0.5:
        text = captions.thinned(rng, text, 0.2)
        said = {key: value for key, value in said.items() if value in text}
    if rng.random() < 0.2:
        other = captions.unrelated(rng)
        text = f"{text} {other}" if rng.random() < 0.5 else f"{other} {text}"
    return Caption(text, expression, said)


def batches(
    rng: np.random.Generator, tokenizer: Tokenizer, looks: Looks, who: Sequence[Mapping[str, str]]
) -> Iterator[Batch]:
    while True:
        made = [sample(rng, who) for _ in range(BATCH)]
        ids, mask = tokens(tokenizer, [caption.text for caption in made], LEARNT_LEN, rng)
        expression = np.array([EXPRESSIONS.index(c.expression) for c in made], np.int32)
        said = np.stack([looks(caption.said) for caption in made])
        yield Batch(*(jnp.asarray(values) for values in (ids, mask, expression, said)))


def loss(reader: Reader, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What is learnt from, and the share of expressions that are told wrong."""
    pooled, rows, looks = reader(batch.ids, batch.mask)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    mask = batch.mask.astype(jnp.float32)
    each = entropy(rows, jnp.broadcast_to(batch.expression[:, None], batch.ids.shape))
    total = jnp.mean(entropy(pooled, batch.expression)) + jnp.sum(each * mask) / jnp.sum(mask)
    said = jnp.sum(optax.sigmoid_binary_cross_entropy(looks, batch.looks), axis=-1)
    total = total + 0.3 * jnp.mean(said)
    return total, jnp.mean((jnp.argmax(pooled, axis=-1) != batch.expression).astype(jnp.float32))


def fresh(cfg: TextConfig, looks: int, seed: int) -> Reader:
    """T5 does not scale its logits, so queries begin that much smaller; so do the rows of the
    vocabulary, or rare words would take long to move."""
    reader = Reader(cfg, looks, rngs=nnx.Rngs(seed))
    reader.encoder.embedding = nnx.Param(0.25 * reader.encoder.embedding[...])
    queries = reader.encoder.layers.q
    queries.kernel = nnx.Param(queries.kernel[...] * (cfg.attn_dim // cfg.heads) ** -0.5)
    return reader


def fit(reader: Reader, data: Iterator[Batch], steps: int) -> Reader:
    """The reader after so many batches."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(50, steps // 10), steps)
    optimiser = optax.adamw(rate, weight_decay=0.01)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(learner: Learner, batch: Batch) -> tuple[Learner, Array, Array]:
        (total, wrong), grads = jax.value_and_grad(loss, has_aux=True)(learner.params, batch)
        learner, _ = learn(learner, optimiser, grads, 1.0)
        return learner, total, wrong

    learner = begin(reader, optimiser)
    with tqdm(range(steps), unit="step") as bar:
        for number in bar:
            learner, total, wrong = step(learner, next(data))
            if number % 50 == 0:
                bar.set_postfix(loss=f"{float(total):.3f}", wrong=f"{float(wrong):.3f}")
    return learner.params


class Judge:
    """How well expression and looks are told from a text."""

    def __init__(self, reader: Reader, tokenizer: Tokenizer, looks: Looks):
        self.reader, self.tokenizer, self.looks = reader, tokenizer, looks
        self.run = jax.jit(lambda reader, ids, mask: reader(ids, mask))

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Index of the expression, and the looks that are told as 0 or 1."""
        ids, mask = tokens(self.tokenizer, texts)
        pooled, _, looks = self.run(self.reader, ids, mask)
        return np.asarray(pooled).argmax(-1), np.asarray(looks) > 0

    def measure(self, rng: np.random.Generator, count: int) -> dict[str, Any]:
        """Shares that are right: on held-out captions, other sentences, and free prompts."""
        who = people(rng, 500)
        made = [
            captions.draw(rng, EXPRESSIONS[i % 4], who[i % len(who)], held_out=True)
            for i in range(count)
        ]
        told, looks = self([caption.text for caption in made])
        right = told == np.array([EXPRESSIONS.index(caption.expression) for caption in made])
        said = np.stack([self.looks(caption.said) for caption in made]) > 0
        other, _ = self([captions.unrelated(rng) for _ in range(count // 4)])
        free = {name: self(texts)[0] for name, texts in FREE.items()}
        wrong = {
            text: EXPRESSIONS[index]
            for name, texts in FREE.items()
            for text, index in zip(texts, free[name], strict=True)
            if EXPRESSIONS[index] != name
        }
        share = lambda values: round(float(np.mean(values)), 4)
        return {
            "expression": share(right),
            "by expression": {name: share(right[i::4]) for i, name in enumerate(EXPRESSIONS)},
            "looks said and told": share(looks[said]),
            "looks told and said": share(said[looks]),
            "other sentences are neutral": share(other == NEUTRAL),
            "free prompts": share([text not in wrong for texts in FREE.values() for text in texts]),
            "free prompts told wrong": wrong,
            "captions told wrong": [c.text for c, ok in zip(made, right, strict=True) if not ok][
                :20
            ],
            "longest": int(tokens(self.tokenizer, [c.text for c in made])[1].sum(-1).max()),
        }


def run(out: Path, steps: int = 1200, seed: int = 0, judged: int = 4000) -> dict[str, Any]:
    """Trains and writes both; returns what was measured. Held-out puppets are of another seed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LiveAvatarError(f"cannot write {out}: {error.strerror}") from None
    rng = np.random.default_rng((seed, 0))
    who = people(rng, 2000)
    sentencepiece.set_random_generator_seed(seed)
    (out / TOKENIZER).write_bytes(train_tokenizer(captions.corpus(rng, who, 30_000), TEXT.vocab))
    tokenizer, looks = Tokenizer(out), Looks(who)
    reader = fresh(TEXT, len(looks.pairs), seed)
    reader = fit(reader, batches(rng, tokenizer, looks, who), steps)
    path = packed.file_of(out, "text")
    packed.write(path, reader.encoder)
    reader.encoder = packed.read(path, reader.encoder)  # as it was rounded
    measured = Judge(reader, tokenizer, looks).measure(np.random.default_rng((seed, 2)), judged)
    about = {"text": dataclasses.asdict(TEXT), "text_len": TEXT_LEN, "steps": steps, "seed": seed}
    (out / "text.json").write_text(json.dumps(about | {"measured": measured}, indent=1))
    return measured


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--steps", type=int, default=1200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="default: the best")
    args = parser.parse_args(argv)
    try:
        if args.steps < 1:
            raise LiveAvatarError(f"--steps {args.steps} must be at least 1")
        prepare(args)
        print(json.dumps(run(args.out, args.steps, args.seed), indent=1))
        return 0
    except LiveAvatarError as error:
        print(f"text: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
