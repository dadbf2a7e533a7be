"""The published names of the DiT (Wan2.2-S2V-14B) and of the LoRA of Live Avatar on top of it."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from liveavatar_jax.config import DiTConfig
from liveavatar_jax.models.lora import Factors, init
from liveavatar_jax.paths import leaves
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.rules import LINEAR, Rule, affine


def _patch(source: str, target: str, *window: int) -> tuple[Rule, Rule]:
    """A convolution whose stride is its window, as a matrix over flattened patches."""
    sizes = dict(zip("tpq", window, strict=True))
    return affine(source, target, "o c t p q -> (t p q c) o", sizes)


def _conv(source: str, target: str) -> tuple[Rule, Rule]:
    return affine(source + r"\.conv", target, "o i k -> k i o")


_BLOCK = r"blocks\.(\d+)\."
_AUDIO = r"casual_audio_encoder\."
_INJECTOR = r"audio_injector\.injector\.(\d+)\."

DIT_RULES: tuple[Rule, ...] = (
    *_patch(r"patch_embedding", "patch", 1, 2, 2),
    *_patch(r"cond_encoder", "pose", 1, 2, 2),
    *affine(r"text_embedding\.0", "text_in"),
    *affine(r"text_embedding\.2", "text_out"),
    *affine(r"time_embedding\.0", "time_in"),
    *affine(r"time_embedding\.2", "time_out"),
    *affine(r"time_projection\.1", "time_proj"),
    Rule(_BLOCK + r"modulation", r"blocks[\1].modulation", "1 s dim -> s dim"),
    *affine(_BLOCK + r"(self|cross)_attn\.([qkvo])", r"blocks[\1].\2_attn.\3"),
    Rule(_BLOCK + r"(self|cross)_attn\.norm_([qk])\.weight", r"blocks[\1].\2_attn.norm_\3.scale"),
    Rule(_BLOCK + r"norm3\.weight", r"blocks[\1].cross_norm.scale"),
    Rule(_BLOCK + r"norm3\.bias", r"blocks[\1].cross_norm.bias"),
    *affine(_BLOCK + r"ffn\.0", r"blocks[\1].ffn_in"),
    *affine(_BLOCK + r"ffn\.2", r"blocks[\1].ffn_out"),
    Rule(_AUDIO + r"weights", "audio.layer_weights", "1 l 1 1 -> l"),
    Rule(_AUDIO + r"encoder\.padding_tokens", "audio.pad_token", "1 1 1 dim -> dim"),
    *_conv(_AUDIO + r"encoder\.conv1_(local|global)", r"audio.conv1_\1"),
    *_conv(_AUDIO + r"encoder\.conv([23])", r"audio.conv\1"),
    *affine(_AUDIO + r"encoder\.final_linear", "audio.final"),
    *affine(_INJECTOR + r"([qkvo])", r"injectors[\1].attn.\2"),
    Rule(_INJECTOR + r"norm_([qk])\.weight", r"injectors[\1].attn.norm_\2.scale"),
    *affine(r"audio_injector\.injector_adain_layers\.(\d+)\.linear", r"injectors[\1].adain"),
    Rule(r"trainable_cond_mask\.weight", "type_embedding"),
    *_patch(r"frame_packer\.proj", "packer.near", 1, 2, 2),
    *_patch(r"frame_packer\.proj_2x", "packer.mid", 2, 4, 4),
    *_patch(r"frame_packer\.proj_4x", "packer.far", 4, 8, 8),
    Rule(r"head\.modulation", "head.modulation", "1 s dim -> s dim"),
    *affine(r"head\.head", "head.out"),
)


def lora_rules(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Where the two factors of a PEFT-style LoRA go, for every linear layer of a weight table.

    The table targets the pytree of `models.lora`: A [rank, in] becomes `a` [in, rank], B
    [out, rank] becomes `b` [rank, out]. Written keys have no prefix and the middle part
    ".default", as the released code wants them; both may be either way when read.
    """
    return tuple(
        replace(
            rule,
            source=r"(?:base_model\.model\.)?"
            + rule.source.removesuffix(r"\.weight")
            + rf"\.lora_{factor}(?:\.default\.|\.)weight",
            target=f"{rule.target}.{factor.lower()}",
        )
        for rule in rules
        if rule.pattern == LINEAR
        for factor in "AB"
    )


LORA_RULES = lora_rules(DIT_RULES)

# what the released LoRA adapts: attention of blocks and injectors, and the feed-forward layers
LORA_TARGETS = ("q", "k", "v", "o", "ffn_in", "ffn_out")


def abstract_lora(module: Any, tensors: Mapping[str, Any], *, where: str) -> dict[str, Factors]:
    """The shapes of the LoRA that `tensors` are, to `load` or `match` them by LORA_RULES.

    It adapts each stack of layers (say, q of self-attention) of which the file touches one, so
    that a layer left out is a missing tensor. Raises LiveAvatarError when no name fits at all.
    """
    places = [place for name in tensors for rule in LORA_RULES if (place := rule.place(name))]
    touched = {place.leaf.rpartition(".")[0] for place in places} & leaves(module).keys()
    if not touched:
        example = next(iter(tensors), "nothing")
        raise LiveAvatarError(
            f"{where} adapts no layer of {type(module).__name__}, its first tensor is {example}; "
            "a LoRA has names such as blocks.0.self_attn.q.lora_A.default.weight"
        )
    rank = next((t.shape[0] for n, t in tensors.items() if ".lora_A." in n and t.shape), 1)
    targets = "|".join(re.escape(path.removesuffix(".kernel")) for path in touched)
    return jax.eval_shape(lambda: init(module, targets, rank, key=jax.random.key(0)))


def dit_config(
    published: Mapping[str, Any], tensors: Mapping[str, Any], where: str, **changes: Any
) -> DiTConfig:
    """DiTConfig from the published config.json, and from the file's shapes what is not in there.

    Raises LiveAvatarError when a field is missing, or asks for another network than the one
    released as Wan2.2-S2V-14B.
    """
    for field, want in _TRAITS.items():
        if published.get(field, want) != want:
            raise LiveAvatarError(
                f"{where} has {field} = {published[field]!r}, but only {want!r} is supported; "
                "use a checkpoint of the Wan2.2-S2V-14B kind"
            )
    if absent := [field for field in _REQUIRED if field not in published]:
        raise LiveAvatarError(f"{where} lacks {', '.join(absent)}; take config.json as published")
    sizes = {ours: published[theirs] for ours, theirs in _SIZES.items() if theirs in published}
    if "casual_audio_encoder.weights" in tensors:
        sizes["audio_layers"] = tensors["casual_audio_encoder.weights"].shape[1]
    sizes["inject_layers"] = tuple(sizes["inject_layers"])
    return DiTConfig(**{**sizes, **changes})


_SIZES = dict(
    dim="dim",
    ffn_dim="ffn_dim",
    heads="num_heads",
    layers="num_layers",
    latent_channels="in_dim",
    freq_dim="freq_dim",
    audio_dim="audio_dim",
    text_dim="text_dim",
    text_len="text_len",
    audio_tokens="num_audio_token",
    inject_layers="audio_inject_layers",
)
_REQUIRED = ("dim", "ffn_dim", "num_heads", "num_layers", "audio_inject_layers")
_TRAITS = dict(
    model_type="s2v",
    eps=1e-6,
    enable_adain=True,
    adain_mode="attn_norm",
    zero_timestep=True,
    enable_motioner=False,
    add_last_motion=True,
    enable_framepack=True,
    framepack_drop_mode="padd",
    enable_tsm=False,
)
