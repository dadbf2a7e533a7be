"""The published names of the VAE, as in Wan2.1_VAE.pth."""

from collections.abc import Mapping
from typing import Any

from liveavatar_jax.config import VAEConfig
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.rules import Rule, affine

_CUBE = "o i t h w -> t h w i o"
_SQUARE = "o i h w -> h w i o"
_TIME = "o i t 1 1 -> t i o"
_POINT = "o i 1 1 1 -> i o"
_GAIN = "c 1 1 1 -> c"


def _residual(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(theirs + r"residual\.0\.gamma", ours + "norm1.scale", _GAIN),
        *affine(theirs + r"residual\.2", ours + "conv1", _CUBE),
        Rule(theirs + r"residual\.3\.gamma", ours + "norm2.scale", _GAIN),
        *affine(theirs + r"residual\.6", ours + "conv2", _CUBE),
        *affine(theirs + "shortcut", ours + "shortcut", _POINT),
    )


_DOWN, _OUR_DOWN = r"encoder\.downsamples\.(\d+)\.", r"encoder.down.\1."
_UP, _OUR_UP = r"decoder\.upsamples\.(\d+)\.", r"decoder.up.\1."
_CODER = r"(encoder|decoder)\."

VAE_RULES = (
    *affine(_CODER + "conv1", r"\1.conv_in", _CUBE),
    *_residual(_DOWN, _OUR_DOWN),
    *affine(_DOWN + r"resample\.1", _OUR_DOWN + "conv", _SQUARE),
    *affine(_DOWN + "time_conv", _OUR_DOWN + "time_conv", _TIME),
    *_residual(_CODER + r"middle\.([02])\.", r"\1.middle.\2."),
    Rule(_CODER + r"middle\.1\.norm\.gamma", r"\1.middle.1.norm.scale", "c 1 1 -> c"),
    *affine(_CODER + r"middle\.1\.to_qkv", r"\1.middle.1.qkv", "o i 1 1 -> i o"),
    *affine(_CODER + r"middle\.1\.proj", r"\1.middle.1.out", "o i 1 1 -> i o"),
    *_residual(_UP, _OUR_UP),
    *affine(_UP + r"resample\.1", _OUR_UP + "conv", _SQUARE),
    *affine(_UP + "time_conv", _OUR_UP + "time_conv", _CUBE),
    Rule(_CODER + r"head\.0\.gamma", r"\1.head.norm.scale", _GAIN),
    *affine(_CODER + r"head\.2", r"\1.head.conv", _CUBE),
    *affine("conv1", "to_moments", _POINT),
    *affine("conv2", "from_latents", _POINT),
)


def vae_config(tensors: Mapping[str, Any], **changes: Any) -> VAEConfig:
    """The sizes of a VAE file, which carries no config of its own, from its tensors' shapes.

    Raises LiveAvatarError when the tensors are not those of the Wan2.1 VAE.
    """
    layer = "encoder.downsamples.{}.{}.weight".format
    halvings = [i for i in range(len(tensors)) if layer(i, "resample.1") in tensors]
    levels = [0, *(i + 1 for i in halvings)]
    try:
        dim = tensors["encoder.conv1.weight"].shape[0]
        z_dim = tensors["conv2.weight"].shape[0]
        widths = [tensors[layer(i, "residual.2")].shape[0] for i in levels]
        blocks = sum(layer(i, "residual.2") in tensors for i in range(len(tensors)))
    except KeyError as missing:
        raise LiveAvatarError(
            f"the VAE's file has no tensor {missing}; it must be the one that is published as "
            "Wan2.1_VAE.pth"
        ) from None
    return VAEConfig(
        dim=dim,
        z_dim=z_dim,
        dim_mult=tuple(width // dim for width in widths),
        res_blocks=blocks // len(levels),
        time_down=tuple(layer(i, "time_conv") in tensors for i in halvings),
        **changes,
    )
