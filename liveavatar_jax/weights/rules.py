r"""How published tensors become our weights: one rule a line, applied or inverted by one engine.

    Rule(r"blocks\.(\d+)\.attn\.([qkvo])\.weight", r"blocks[\1].attn.\2.kernel", "o i -> i o")

A source is a regex over the whole published name, made of literals, capturing groups, and
`(?:a|b)` for alternative or `(?:a)?` for optional spellings; export writes the first alternative
and leaves the optional part out. Exactly one rule must fit each tensor, and exactly one tensor
must fill each leaf (each slice of it, when the leaf is stacked); whatever does not is an error,
and all errors are shown together.
"""

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.files import Tensors


@dataclass(frozen=True)
class Rule:
    """One line of a weight table.

    source: regex over the published name; target: path of our leaf, with groups as `\\1` and the
    index into stacked axes in brackets; pattern: einops, published axes to ours, empty when they
    are the same; sizes: the axis sizes that its inverse needs.
    """

    source: str
    target: str
    pattern: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)

    def ours(self, tensor: Any) -> Any:
        """The published tensor with our axes."""
        return _rearrange(tensor, self.pattern, self.sizes)

    def place(self, name: str) -> "Place | None":
        """Where the tensor of this published name goes; None when the name does not fit."""
        fit = re.fullmatch(self.source, name)
        if fit is None:
            return None
        target = fit.expand(self.target)
        index = tuple(int(i) for i in re.findall(r"\[(\d+)\]", target))
        return Place(re.sub(r"\[\d+\]", "", target), index, self)

    def published(self, tensor: Any) -> Any:
        """Our slice with the published axes."""
        return _rearrange(tensor, " -> ".join(self.pattern.split(" -> ")[::-1]), self.sizes)


LINEAR = "o i -> i o"


def affine(
    source: str, target: str, pattern: str = LINEAR, sizes: Mapping[str, int] | None = None
) -> tuple[Rule, Rule]:
    """The two lines of a linear layer or convolution: its weight, rearranged, and its bias."""
    kernel = Rule(source + r"\.weight", target + ".kernel", pattern, sizes or {})
    return kernel, Rule(source + r"\.bias", target + ".bias")


@dataclass(frozen=True)
class Place:
    """Where one published tensor lives in our module: the leaf, and its slice when stacked."""

    leaf: str
    index: tuple[int, ...]
    rule: Rule


def places(module: Any, rules: Sequence[Rule]) -> dict[str, Place]:
    """The published name of every leaf and slice: what a file made for this module holds.

    Leaves that no rule fills are absent.
    """
    named: dict[str, Place] = {}
    taken = set()
    for path, leaf in leaves(module).items():
        for inverse in filter(lambda inverse: inverse.leaf.fullmatch(path), map(_invert, rules)):
            for index in np.ndindex(leaf.shape[: len(inverse.index)]):
                name = inverse.name(path, index)
                if name and (path, index) not in taken:
                    named[name] = Place(path, index, inverse.rule)
                    taken.add((path, index))
    return named


def match(
    module: Any,
    tensors: Mapping[str, Any],
    rules: Sequence[Rule],
    *,
    where: str,
    ignore: Sequence[str] = (),
) -> dict[str, Place]:
    """The place of every tensor, found from names, shapes and dtypes alone; nothing is read.

    Raises LiveAvatarError listing every missing, unknown, misshapen, doubly matched and
    non-float tensor at once, with what the reader found wrong (`tensors.faults`). `ignore` holds
    regexes of tensors that we have no use for.
    """
    shapes, expected = leaves(module), places(module, rules)
    found: dict[str, Place] = {}
    filled: dict[tuple[str, tuple[int, ...]], str] = {}
    unknown, faults = [], []
    if isinstance(tensors, Tensors):
        faults, tensors = list(tensors.faults.values()), tensors.stored
    for name, tensor in tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in ignore):
            continue
        fits = [place for rule in rules if (place := rule.place(name))]
        if len(fits) > 1:
            faults.append(f"ambiguous: {name} fits {' and '.join(p.rule.source for p in fits)}")
        elif not fits or not _exists(fits[0], shapes):
            unknown.append(name)
        elif other := filled.get((fits[0].leaf, fits[0].index)):
            faults.append(f"double: {name} and {other} are the same weight")
        else:
            found[name] = place = fits[0]
            filled[place.leaf, place.index] = name
            faults += _misfit(name, tensor, place, shapes[place.leaf])
    missing = [name for name, p in expected.items() if (p.leaf, p.index) not in filled]
    ruled = {place.leaf for place in expected.values()}
    faults += [f"missing: {name}" for name in missing]
    faults += [f"missing: a rule for our {path}" for path in shapes if path not in ruled]
    faults += [f"unknown: {name}{_nearest(name, missing or list(expected))}" for name in unknown]
    if faults:
        raise LiveAvatarError(
            f"{where} does not fit {_kind(module)} in {len(faults)} place(s); take the "
            "file as published, or a config of its sizes:\n  " + "\n  ".join(sorted(faults))
        )
    return found


def load(
    module: Any,
    tensors: Mapping[str, Any],
    rules: Sequence[Rule],
    *,
    where: str,
    ignore: Sequence[str] = (),
) -> Any:
    """The module with every leaf filled from `tensors`, in the module's own dtypes.

    `module` may be abstract (`jax.eval_shape`); so may be the tensors, and then nothing is
    filled, only checked. Raises as `match` does.
    """
    found = match(module, tensors, rules, where=where, ignore=ignore)
    if any(isinstance(tensors[name], jax.ShapeDtypeStruct) for name in found):
        return module
    arrays = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves(module).items()}
    for name, place in found.items():
        arrays[place.leaf][place.index] = place.rule.ours(np.asarray(tensors[name]))
    return replace(module, {path: jnp.asarray(array) for path, array in arrays.items()})


def export(module: Any, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """The published tensors of a module: the inverse of `load`."""
    arrays = {path: np.asarray(leaf) for path, leaf in leaves(module).items()}
    return {
        name: np.ascontiguousarray(place.rule.published(arrays[place.leaf][place.index]))
        for name, place in places(module, rules).items()
    }


def _kind(module: Any) -> str:
    return "the model" if isinstance(module, Mapping) else type(module).__name__


def _rearrange(tensor: Any, pattern: str, sizes: Mapping[str, int]) -> Any:
    if not pattern:
        return tensor
    if isinstance(tensor, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda a: einops.rearrange(a, pattern, **sizes), tensor)
    return einops.rearrange(tensor, pattern, **sizes)


def _exists(place: Place, shapes: Mapping[str, Any]) -> bool:
    if place.leaf not in shapes:
        return False
    return all(i < n for i, n in zip(place.index, shapes[place.leaf].shape, strict=False))


def _misfit(name: str, tensor: Any, place: Place, leaf: Any) -> list[str]:
    faults = []
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        faults.append(f"not a float: {name} holds {tensor.dtype}")
    want = jax.ShapeDtypeStruct(leaf.shape[len(place.index) :], leaf.dtype)
    try:
        fits = place.rule.ours(jax.ShapeDtypeStruct(tensor.shape, leaf.dtype)).shape == want.shape
    except einops.EinopsError:
        fits = False
    if not fits:
        shape = place.rule.published(want).shape
        faults.append(f"misshapen: {name} has shape {tuple(tensor.shape)}, not {shape}")
    return faults


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 1, cutoff=0.8)
    return f" (nearest name: {near[0]})" if near else ""


@dataclass(frozen=True)
class _Inverse:
    """A rule read backwards: which leaf it fills, and under which published name."""

    rule: Rule
    leaf: re.Pattern[str]
    index: tuple[str, ...]  # what the brackets hold: a group, "\1", or a number
    groups: Mapping[int, str]  # the regexes of the source's groups
    words: tuple[str | int, ...]  # the published name; numbers stand for groups

    def name(self, path: str, index: tuple[int, ...]) -> str | None:
        fit = self.leaf.fullmatch(path)
        values = {int(k[1:]): v for k, v in fit.groupdict().items()} if fit else {}
        for token, i in zip(self.index, map(str, index), strict=True):
            if not token.startswith("\\"):
                agrees = token == i
            else:
                group = int(token[1:])
                known = values.setdefault(group, i)
                agrees = known == i and re.fullmatch(self.groups[group], i) is not None
            if not agrees:
                return None
        return "".join(values[word] if isinstance(word, int) else word for word in self.words)


_SOURCE = re.compile(
    r"\\(?P<escaped>\W)|\(\?:(?P<optional>[^()]*)\)\?|\(\?:(?P<choice>[^()]*)\)"
    r"|\((?P<group>[^()?][^()]*)\)|(?P<plain>[^\\()\[\]{}*+?|^$])"
)
_TARGET = re.compile(r"\[(?P<index>\\\d|\d+)\]|\\(?P<group>\d)|(?P<plain>[^\\\[\]]+)")


@functools.cache
def _invert(rule: Rule) -> _Inverse:
    words: list[str | int] = []
    groups: dict[int, str] = {}
    for token in _tokens(_SOURCE, rule.source):
        if token.lastgroup == "group":
            groups[len(groups) + 1] = token["group"]
            words.append(len(groups))
        elif token.lastgroup == "choice":
            words.append(token["choice"].split("|")[0].replace("\\", ""))
        elif token.lastgroup != "optional":
            words.append(token["escaped"] or token["plain"])
    leaf, index, seen = "", [], set()
    for token in _tokens(_TARGET, rule.target):
        if token.lastgroup == "index":
            index.append(token["index"])
        elif token.lastgroup == "plain":
            leaf += re.escape(token["plain"])
        else:
            n = int(token["group"])
            leaf += f"(?P=g{n})" if n in seen else f"(?P<g{n}>{groups[n]})"
            seen.add(n)
    lost = set(groups) - seen - {int(i[1:]) for i in index if i.startswith("\\")}
    if lost:
        raise ValueError(f"{rule.target!r} drops group(s) {sorted(lost)} of {rule.source!r}")
    return _Inverse(rule, re.compile(leaf), tuple(index), groups, tuple(words))


def _tokens(grammar: re.Pattern[str], text: str) -> list[re.Match[str]]:
    tokens, at = [], 0
    while at < len(text):
        token = grammar.match(text, at)
        if token is None:
            raise ValueError(f"a rule cannot be inverted from {text[at:]!r} on in {text!r}")
        tokens.append(token)
        at = token.end()
    return tokens
