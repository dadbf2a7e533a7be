"""The published names of the VAE, as in Wan2.1_VAE.pth."""

from collections.abc import Mapping
from typing import Any

from liveavatar_jax.config import VAEConfig
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.rules import Rule

_CUBE = "o i t h w -> t h w i o"
_SQUARE = "o i h w -> h w i o"
_TIME = "o i t 1 1 -> t i o"
_POINT = "o i 1 1 1 -> i o"
_GAIN = "c 1 1 1 -> c"


def _residual(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(theirs + r"residual\.0\.gamma", ours + "norm1.scale", _GAIN),
        Rule(theirs + r"residual\.2\.weight", ours + "conv1.kernel", _CUBE),
        Rule(theirs + r"residual\.2\.bias", ours + "conv1.bias"),
        Rule(theirs + r"residual\.3\.gamma", ours + "norm2.scale", _GAIN),
        Rule(theirs + r"residual\.6\.weight", ours + "conv2.kernel", _CUBE),
        Rule(theirs + r"residual\.6\.bias", ours + "conv2.bias"),
        Rule(theirs + r"shortcut\.weight", ours + "shortcut.kernel", _POINT),
        Rule(theirs + r"shortcut\.bias", ours + "shortcut.bias"),
    )


_DOWN, _OUR_DOWN = r"encoder\.downsamples\.(\d+)\.", r"encoder.down.\1."
_UP, _OUR_UP = r"decoder\.upsamples\.(\d+)\.", r"decoder.up.\1."
_CODER = r"(encoder|decoder)\."

VAE_RULES = (
    Rule(_CODER + r"conv1\.weight", r"\1.conv_in.kernel", _CUBE),
    Rule(_CODER + r"conv1\.bias", r"\1.conv_in.bias"),
    *_residual(_DOWN, _OUR_DOWN),
    Rule(_DOWN + r"resample\.1\.weight", _OUR_DOWN + "conv.kernel", _SQUARE),
    Rule(_DOWN + r"resample\.1\.bias", _OUR_DOWN + "conv.bias"),
    Rule(_DOWN + r"time_conv\.weight", _OUR_DOWN + "time_conv.kernel", _TIME),
    Rule(_DOWN + r"time_conv\.bias", _OUR_DOWN + "time_conv.bias"),
    *_residual(_CODER + r"middle\.([02])\.", r"\1.middle.\2."),
    Rule(_CODER + r"middle\.1\.norm\.gamma", r"\1.middle.1.norm.scale", "c 1 1 -> c"),
    Rule(_CODER + r"middle\.1\.to_qkv\.weight", r"\1.middle.1.qkv.kernel", "o i 1 1 -> i o"),
    Rule(_CODER + r"middle\.1\.to_qkv\.bias", r"\1.middle.1.qkv.bias"),
    Rule(_CODER + r"middle\.1\.proj\.weight", r"\1.middle.1.out.kernel", "o i 1 1 -> i o"),
    Rule(_CODER + r"middle\.1\.proj\.bias", r"\1.middle.1.out.bias"),
    *_residual(_UP, _OUR_UP),
    Rule(_UP + r"resample\.1\.weight", _OUR_UP + "conv.kernel", _SQUARE),
    Rule(_UP + r"resample\.1\.bias", _OUR_UP + "conv.bias"),
    Rule(_UP + r"time_conv\.weight", _OUR_UP + "time_conv.kernel", _CUBE),
    Rule(_UP + r"time_conv\.bias", _OUR_UP + "time_conv.bias"),
    Rule(_CODER + r"head\.0\.gamma", r"\1.head.norm.scale", _GAIN),
    Rule(_CODER + r"head\.2\.weight", r"\1.head.conv.kernel", _CUBE),
    Rule(_CODER + r"head\.2\.bias", r"\1.head.conv.bias"),
    Rule(r"conv1\.weight", "to_moments.kernel", _POINT),
    Rule(r"conv1\.bias", "to_moments.bias"),
    Rule(r"conv2\.weight", "from_latents.kernel", _POINT),
    Rule(r"conv2\.bias", "from_latents.bias"),
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
