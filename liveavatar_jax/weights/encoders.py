"""The published names of the text encoder (umT5) and the speech encoder (wav2vec2)."""

from collections.abc import Mapping
from typing import Any

from liveavatar_jax.config import SpeechConfig, TextConfig
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.rules import Rule, affine

_TEXT_LAYER = r"blocks\.(\d+)\."

TEXT_RULES = (
    Rule(r"token_embedding\.weight", "embedding"),
    Rule(_TEXT_LAYER + r"(norm[12])\.weight", r"layers[\1].\2.scale"),
    Rule(_TEXT_LAYER + r"attn\.([qkvo])\.weight", r"layers[\1].\2.kernel", "o i -> i o"),
    Rule(_TEXT_LAYER + r"ffn\.gate\.0\.weight", r"layers[\1].gate.kernel", "o i -> i o"),
    Rule(_TEXT_LAYER + r"ffn\.(fc[12])\.weight", r"layers[\1].\2.kernel", "o i -> i o"),
    Rule(_TEXT_LAYER + r"pos_embedding\.embedding\.weight", r"layers[\1].position"),
    Rule(r"norm\.weight", "norm.scale"),
)

_CONV = r"wav2vec2\.feature_extractor\.conv_layers\.(\d+)\."
_PROJECTION = r"wav2vec2\.feature_projection\."
_ENCODER = r"wav2vec2\.encoder\."
_POSITION = _ENCODER + r"pos_conv_embed\.conv\."
_LAYER = _ENCODER + r"layers\.(\d+)\."
_GAIN = r"(?:weight_g|parametrizations\.weight\.original0)"
_DIRECTION = r"(?:weight_v|parametrizations\.weight\.original1)"

SPEECH_RULES = (
    *affine(_CONV + "conv", r"convs.\1", "o i k -> k i o"),
    Rule(_CONV + r"layer_norm\.weight", r"convs.\1.norm.scale"),
    Rule(_CONV + r"layer_norm\.bias", r"convs.\1.norm.bias"),
    Rule(_PROJECTION + r"layer_norm\.weight", "project_norm.scale"),
    Rule(_PROJECTION + r"layer_norm\.bias", "project_norm.bias"),
    *affine(_PROJECTION + "projection", "project"),
    Rule(_POSITION + _GAIN, "pos_conv.g", "1 1 k -> k"),
    Rule(_POSITION + _DIRECTION, "pos_conv.v", "o i k -> k i o"),
    Rule(_POSITION + r"bias", "pos_conv.bias"),
    *affine(_LAYER + r"attention\.([qkv]|out)_proj", r"layers[\1].\2"),
    Rule(_LAYER + r"layer_norm\.weight", r"layers[\1].attn_norm.scale"),
    Rule(_LAYER + r"layer_norm\.bias", r"layers[\1].attn_norm.bias"),
    *affine(_LAYER + r"feed_forward\.intermediate_dense", r"layers[\1].expand"),
    *affine(_LAYER + r"feed_forward\.output_dense", r"layers[\1].shrink"),
    Rule(_LAYER + r"final_layer_norm\.weight", r"layers[\1].ffn_norm.scale"),
    Rule(_LAYER + r"final_layer_norm\.bias", r"layers[\1].ffn_norm.bias"),
    Rule(_ENCODER + r"layer_norm\.weight", "norm.scale"),
    Rule(_ENCODER + r"layer_norm\.bias", "norm.bias"),
)

# what only training and transcription use
SPEECH_IGNORE = (r"wav2vec2\.masked_spec_embed", r"lm_head\..*")


def text_config(tensors: Mapping[str, Any], **changes: Any) -> TextConfig:
    """The sizes of a umT5 file, which carries no config of its own, from its tensors' shapes.

    Raises LiveAvatarError when the tensors are not those of a umT5 encoder.
    """
    try:
        vocab, dim = tensors["token_embedding.weight"].shape
        buckets, heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
        attn_dim, _ = tensors["blocks.0.attn.q.weight"].shape
        ffn_dim, _ = tensors["blocks.0.ffn.fc1.weight"].shape
    except KeyError as missing:
        raise LiveAvatarError(
            f"the text encoder's file has no tensor {missing}; it must be the umT5 encoder that is "
            "published as models_t5_umt5-xxl-enc-bf16.pth"
        ) from None
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    sizes = dict(vocab=vocab, dim=dim, attn_dim=attn_dim, ffn_dim=ffn_dim, heads=heads)
    return TextConfig(**sizes, layers=layers, buckets=buckets, **changes)


def speech_config(published: Mapping[str, Any], where: str, **changes: Any) -> SpeechConfig:
    """SpeechConfig from the config.json of a published wav2vec2 folder.

    Raises LiveAvatarError when a field is missing or the model is of another kind than
    wav2vec2-large-xlsr-53, whose traits the network has built in.
    """
    usual = dict(hidden_act="gelu", feat_extract_activation="gelu", layer_norm_eps=1e-5)
    traits = dict(feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True) | usual
    names = dict(
        dim="hidden_size",
        ffn_dim="intermediate_size",
        heads="num_attention_heads",
        layers="num_hidden_layers",
        pos_kernel="num_conv_pos_embeddings",
        pos_groups="num_conv_pos_embedding_groups",
    )
    tuples = ("conv_dim", "conv_kernel", "conv_stride")
    published = {**usual, **published}  # what a file may leave out
    for field in (*traits, *names.values(), *tuples):
        if field not in published:
            raise LiveAvatarError(f"{where} lacks {field!r}; take config.json as published")
    for field, want in traits.items():
        if published[field] != want:
            raise LiveAvatarError(
                f"{where} has {field} = {published[field]!r}, but only {want!r} is supported; "
                "use a speech encoder of the wav2vec2-large-xlsr-53 kind"
            )
    sizes = {ours: published[theirs] for ours, theirs in names.items()}
    return SpeechConfig(**sizes, **{f: tuple(published[f]) for f in tuples}, **changes)
