"""What is said about a puppet clip: its expression in many words, and something of its looks.

A caption is a frame ("{woman} {speaks} with {smile}{place}.") whose fields are filled from a
lexicon. Training and held-out captions share no frame with the same word in it: some frames are
held out with all words, and of the others every seventh word, another one for each frame.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from liveavatar_jax.data.puppet import EXPRESSIONS
from liveavatar_jax.types import LiveAvatarError

# Words of an expression by the field of a frame that they fill.
LEXICON: dict[str, dict[str, tuple[str, ...]]] = {
    "neutral": {
        "cheerful": ("calm", "neutral", "relaxed", "composed", "serious", "expressionless",
                     "unmoved", "indifferent", "quiet", "matter-of-fact", "sober", "plain",
                     "unemotional", "neither happy nor sad", "poker-faced", "impassive"),
        "smiles": ("stays calm", "keeps a straight face", "shows no emotion", "does not smile",
                   "remains serious", "looks straight ahead", "keeps a neutral face",
                   "doesn't smile", "never smiles", "stares blankly", "remains unmoved"),
        "smiling": ("staying calm", "keeping a straight face", "showing no emotion",
                    "not smiling", "looking straight ahead", "remaining serious"),
        "smile": ("a neutral expression", "a straight face", "a blank look", "no smile",
                  "no emotion", "a calm face", "a serious look", "an empty expression",
                  "a relaxed face", "a poker face", "no particular expression"),
        "happily": ("calmly", "neutrally", "plainly", "evenly", "soberly", "seriously",
                    "without emotion", "without a smile", "quietly", "in a flat voice"),
    },
    "smiling": {
        "cheerful": ("cheerful", "happy", "smiling", "joyful", "merry", "delighted", "glad",
                     "pleased", "jolly", "sunny", "good-humoured", "friendly", "amused",
                     "content", "radiant", "joyous", "overjoyed", "cheery", "laughing", "warm"),
        "smiles": ("smiles", "grins", "beams", "laughs", "chuckles", "smiles broadly",
                   "lights up with joy", "smiles warmly", "grins happily", "giggles",
                   "is full of joy", "radiates happiness", "is having fun"),
        "smiling": ("smiling", "grinning", "beaming", "laughing", "chuckling", "smiling warmly",
                    "smiling broadly", "giggling", "full of joy", "having fun"),
        "smile": ("a smile", "a broad grin", "a happy face", "a big smile", "a warm smile",
                  "a friendly smile", "a cheerful look", "joy", "a laughing face", "delight",
                  "a grin", "happiness", "a joyful expression", "a smile on the lips"),
        "happily": ("happily", "cheerfully", "joyfully", "merrily", "gladly", "with joy",
                    "in a good mood", "in high spirits", "delightedly", "in a cheerful voice"),
    },
    "sad": {
        "cheerful": ("sad", "gloomy", "unhappy", "miserable", "sorrowful", "downcast", "dejected",
                     "melancholy", "depressed", "upset", "heartbroken", "tearful", "mournful",
                     "glum", "blue and sad", "despondent", "disappointed", "crying", "low",
                     "crestfallen"),
        "smiles": ("frowns sadly", "looks sad", "weeps", "sobs", "cries", "sulks", "grieves",
                   "hangs the corners of the mouth", "is close to tears", "mourns", "pouts",
                   "is full of sorrow", "feels down"),
        "smiling": ("weeping", "sobbing", "crying", "sulking", "grieving", "frowning sadly",
                    "close to tears", "mourning", "pouting", "full of sorrow"),
        "smile": ("a sad face", "a gloomy look", "tears in the eyes", "sorrow", "sadness",
                  "a sorrowful expression", "a frown of grief", "an unhappy face", "grief",
                  "a downcast look", "the corners of the mouth down", "a miserable expression"),
        "happily": ("sadly", "gloomily", "unhappily", "sorrowfully", "miserably", "mournfully",
                    "in a bad mood", "in low spirits", "with sorrow", "in a sad voice"),
    },
    "surprised": {
        "cheerful": ("surprised", "astonished", "amazed", "startled", "stunned", "astounded",
                     "shocked", "wide-eyed", "speechless", "taken aback", "dumbfounded",
                     "baffled", "flabbergasted", "thunderstruck", "incredulous", "perplexed"),
        "smiles": ("raises the eyebrows", "gapes", "marvels", "opens the eyes wide",
                   "gasps", "stares in amazement", "cannot believe it", "gets a surprise",
                   "is lost in wonder", "jumps with surprise", "gawks"),
        "smiling": ("gaping", "marvelling", "raising the eyebrows", "gasping", "gawking",
                    "opening the eyes wide", "staring in amazement", "lost in wonder"),
        "smile": ("a surprised face", "raised eyebrows", "wide open eyes", "surprise",
                  "astonishment", "amazement", "an astonished look", "a startled expression",
                  "shock", "big round eyes", "a look of wonder", "an amazed expression"),
        "happily": ("in surprise", "in amazement", "with astonishment", "in wonder",
                    "with raised eyebrows", "in disbelief", "in astonishment",
                    "in a surprised voice"),
    },
}  # fmt: skip

TRAINED = (
    "{cheerful woman} {speaks}{place}", "{cheerful woman}{place}", "{cheerful woman}",
    "{woman} {smiles}{place}", "{woman} {smiles}", "{woman} {smiles} and {speaks}{place}",
    "{woman} {speaks} and {smiles}{place}", "{woman} is {smiling}{place}", "{smiling} {woman}",
    "{smiling}, {woman} {speaks}{place}", "{woman}{place} {looks} {very} {cheerful}",
    "{woman} {looks} {cheerful}", "{woman} {speaks} with {smile}{place}",
    "{woman} has {smile}{place}", "with {smile}, {woman} {speaks}{place}", "{woman} with {smile}",
    "{woman} {speaks} {happily}{place}", "{happily}, {woman} {speaks}{place}",
    "a portrait of {woman}, {smiling}{place}", "{woman}{place}. the mood is {cheerful}",
    "{woman} {speaks}{place}, expression: {cheerful}", "{cheerful}", "{smiling}", "{smile}",
    "{very} {cheerful}", "{speaking} {happily}", "{woman}{place}, {speaking} with {smile}",
    "{pronoun} {looks} {very} {cheerful}", "{pronoun} {smiles}", "{smile} on the face of {woman}",
    "{woman}, {cheerful}, {speaks}{place}", "{cheerful woman}, {smiling}{place}",
    # As silent ones begin, lest these words alone be read as neutral.
    "{woman} looks into the camera with {smile}{place}", "a portrait of {cheerful woman}{place}",
    "{smiling}, {woman} looks into the camera and {speaks}{place}", "{cheerful} mood",
    "{woman} faces the camera and {smiles}{place}", "{woman} faces the camera, {smiling}",
    "{woman} looks into the camera and speaks naturally, with lively expression, {smiling}",
    "{woman} {smiles} and {speaks} naturally{place}", "make {woman} look {cheerful}",
)  # fmt: skip
HELD_OUT = (
    "{smiling} while {speaking}, {woman} faces the camera{place}",
    "we see {woman}{place}, who {looks} {very} {cheerful}",
    "{speaking} {happily}: {woman}{place}",
    "there is {smile} on the face of {woman}{place}",
    "{woman} who {smiles}{place}",
    "a close-up of {cheerful woman}{place}, {speaking} to us",
    "{pronoun} {speaks} {happily}",
    "this is {cheerful woman}{place}",
)
SILENT = (  # of the expression: neutral ones
    "{woman} {speaks}{place}", "{woman}{place}", "{woman} is {speaking}{place}",
    "{woman} looks into the camera and {speaks}{place}", "a portrait of {woman}{place}",
    "{woman} looks into the camera and speaks naturally, with lively expression", "{woman}",
    "{pronoun} {speaks}", "{woman} faces the camera{place}", "{woman} {speaks} naturally{place}",
)  # fmt: skip

WHO = ("person", "woman", "man", "girl", "boy", "character", "face", "speaker", "puppet", "lady",
       "figure", "cartoon", "cartoon character", "young woman", "young man", "someone", "child",
       "talking head", "gentleman", "old man", "human", "avatar")  # fmt: skip
FIELDS = {
    "pronoun": ("she", "he", "it", "they", "somebody"),
    "looks": ("looks", "seems", "appears", "is", "feels"),
    "very": ("very", "quite", "really", "a bit", "rather", "so", "extremely", "slightly"),
    "speaks": ("speaks", "talks", "says something", "tells a story", "talks to the camera",
               "speaks to us", "is speaking", "gives a speech", "is talking", "chats"),
    "speaking": ("speaking", "talking", "telling a story", "talking to the camera", "chatting"),
}  # fmt: skip
AROUND = ("in this video", "medium shot", "high quality", "on a quiet day", "as always", "4k",
          "the camera does not move", "soft light", "studio light", "in the evening", "close-up",
          "a clip from a talk show", "animation", "flat colours",
          "seen from the front")  # fmt: skip

# Sentences about anything else, and the words that the tokenizer should know.
THING = (
    "time year way day world life hand part place case week company system program question "
    "work government number night point home water room mother area money story fact month "
    "lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team "
    "minute idea body information back parent level office door health art war history "
    "party result change morning reason research moment air teacher force education food "
    "tree river mountain road train ship bird horse dog cat field stone bridge garden "
    "window kitchen table computer letter song music picture camera weather"
).split()
DOES = (
    "makes finds gives tells asks uses needs keeps turns starts shows hears plays runs moves "
    "likes lives believes holds brings happens writes provides sits stands loses pays meets "
    "includes continues sets learns leads understands watches follows stops creates reads "
    "allows adds spends grows opens walks wins offers remembers loves considers appears buys "
    "waits serves sends builds stays falls reaches passes sells requires reports"
).split()
LIKE = (
    "good new first last long great little own other old right big high different small "
    "large next early young important few public bad same able red green blue white black "
    "brown yellow orange purple grey pink dark light short curly round wooden quiet cold "
    "heavy fast slow deep wide simple modern local strong clear free full open real"
).split()
WHERE = "in on at by near under behind above after before with without over along across".split()
CUES = frozenset(
    word
    for slots in LEXICON.values()
    for phrases in slots.values()
    for phrase in phrases
    for word in re.findall(r"[a-z]+", phrase)
)


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption and what it says: "" stands for a trait that it does not mention."""

    text: str
    expression: str
    said: Mapping[str, str]


def caption(
    rng: np.random.Generator,
    expression: str,
    traits: Mapping[str, str] | None = None,
    *,
    held_out: bool = False,
) -> str:
    """One of many captions of a clip, other ones if `held_out`.

    expression: of EXPRESSIONS. traits: as `puppet.traits` has them, {"hair": "short red hair",
    "beard": "no beard", "background": "blue background", ...}; a few of them are mentioned.
    """
    return draw(rng, expression, traits, held_out=held_out).text


def draw(
    rng: np.random.Generator,
    expression: str,
    traits: Mapping[str, str] | None = None,
    *,
    held_out: bool = False,
) -> Caption:
    """`caption`, and what it says. Raises LiveAvatarError for an unknown expression."""
    if expression not in EXPRESSIONS:
        raise LiveAvatarError(f"expression {expression!r} must be one of {', '.join(EXPRESSIONS)}")
    if expression == "neutral" and not held_out and rng.random() < 0.4:
        frame, words = _pick(rng, SILENT), {}
    else:
        frame, words = _framed(rng, expression, held_out)
    text, said = _fill(rng, frame, words, traits or {})
    return Caption(_finish(rng, text), expression, said)


def unrelated(rng: np.random.Generator) -> str:
    """A sentence that says nothing of a face."""
    words = lambda of: _pick(rng, of)
    text = f"{_pick(rng, ('the', 'a', 'this', 'my', 'her', 'our'))} "
    text += f"{words(LIKE)} " if rng.random() < 0.5 else ""
    text += f"{words(THING)} {words(DOES)} the "
    text += f"{words(LIKE)} " if rng.random() < 0.5 else ""
    text += words(THING)
    text += f" {words(WHERE)} the {words(THING)}" if rng.random() < 0.5 else ""
    return _finish(rng, text)


def corpus(rng: np.random.Generator, traits: Sequence[Mapping[str, str]], count: int) -> list[str]:
    """Sentences that a tokenizer learns from: captions, and English about anything else."""
    lines = [unrelated(rng) for _ in range(count // 5)]
    for i in range(count - len(lines)):
        about = traits[i % len(traits)] if traits else None
        lines.append(caption(rng, EXPRESSIONS[i % 4], about))
    return lines


def thinned(rng: np.random.Generator, text: str, share: float) -> str:
    """The text without some of its words, but with all that may tell an expression."""
    keep = lambda word: bool(CUES & set(re.findall(r"[a-z]+", word.lower())))
    return " ".join(word for word in text.split() if keep(word) or rng.random() >= share)


def is_held_out(frame: str, words: Mapping[str, str]) -> bool:
    """Whether training never sees one of these words, by field, in this frame."""
    hashed = (zlib.crc32(f"{frame}|{word}".encode()) for word in words.values())
    return frame in HELD_OUT or any(number % 7 == 0 for number in hashed)


def _framed(
    rng: np.random.Generator, expression: str, held_out: bool
) -> tuple[str, dict[str, str]]:
    """A frame, and the words of the expression that go into it, by field."""
    frames = (HELD_OUT if rng.random() < 0.7 else TRAINED) if held_out else TRAINED
    while True:
        frame = _pick(rng, frames)
        fields = [f for f in LEXICON[expression] if re.search(rf"\{{{f}\b", frame)]
        words = {field: _pick(rng, LEXICON[expression][field]) for field in fields}
        if is_held_out(frame, words) == held_out:
            return frame, words


def _fill(
    rng: np.random.Generator, frame: str, words: Mapping[str, str], traits: Mapping[str, str]
) -> tuple[str, dict[str, str]]:
    """The text of a frame, and what of the traits it says."""
    # That something is not there is hardly ever worth a word.
    told = {k: v for k, v in traits.items() if v and (v[:3] != "no " or rng.random() < 0.1)}
    keys = [key for key in told if key != "background"] if "woman}" in frame else []
    said = {str(key): told[key] for key in rng.permutation(keys)[: rng.integers(0, 3)]}
    where = ""
    if "background" in told and "{place}" in frame and rng.random() < 0.4:
        said["background"] = told["background"]
        where = f" {_pick(rng, ('in front of', 'against', 'before'))} {_one(told['background'])}"
    who = _pick(rng, WHO) + _looks(rng, said)
    fields = {name: _pick(rng, options) for name, options in FIELDS.items()}
    fields |= {
        "woman": _with_article(rng, who),
        "cheerful woman": _with_article(rng, f"{words.get('cheerful', '')} {who}"),
        "place": where,
        **words,
    }
    return re.sub(r"\{([^}]+)\}", lambda match: fields[match[1]], frame), said


def _looks(rng: np.random.Generator, said: Mapping[str, str]) -> str:
    """Such as " with red hair and a beard, wearing blue clothes"."""
    worn = said.get("clothes", "")
    had = [_one(value) for key, value in said.items() if key not in ("clothes", "background")]
    text = f" {_pick(rng, ('with', 'who has', 'with'))} {' and '.join(had)}" if had else ""
    wears = _pick(rng, ("in", "wearing", "who wears", "dressed in"))
    return f"{text} {wears} {worn}" if worn else text


def _one(noun: str) -> str:
    """With an article where it takes one."""
    counted = noun.endswith(("background", "beard", "moustache")) and noun[:3] != "no "
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" if counted else noun


def _with_article(rng: np.random.Generator, noun: str) -> str:
    if noun.startswith("someone") or rng.random() < 0.2:
        return noun
    return f"the {noun}" if rng.random() < 0.3 else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _finish(rng: np.random.Generator, text: str) -> str:
    """Something around it, a capital and a full stop: or not."""
    if rng.random() < 0.15:
        text = f"{_pick(rng, AROUND)}, {text}"
    if rng.random() < 0.15:
        text = f"{text}, {_pick(rng, AROUND)}"
    text = text[0].upper() + text[1:] if rng.random() < 0.6 else text
    return text + (_pick(rng, (".", "!", "")) if rng.random() < 0.6 else "")


def _pick(rng: np.random.Generator, of: Sequence[str]) -> str:
    return of[int(rng.integers(len(of)))]
