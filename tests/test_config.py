"""Configs are strict, and survive JSON."""

import json

import pytest

from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig, change, from_dict, to_dict
from liveavatar_jax.types import LiveAvatarError


@pytest.mark.parametrize("cfg", [
    ModelConfig(), ModelConfig.tiny(), ModelConfig(stream=StreamConfig(distance=7, history=0.5))
])  # fmt: skip
def test_json_keeps_a_config(cfg):
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg


@pytest.mark.parametrize("values, named", [
    ({"dti": {}}, "did you mean 'dit'"),
    ({"dit": {"head": 4}}, "did you mean 'heads'"),
    ({"dit": {"dim": "5120"}}, "ModelConfig.dit.dim = '5120' must be int"),
    ({"dit": {"dim": True}}, "must be int"),
    ({"stream": {"history": 1.5}}, "StreamConfig.history"),
])  # fmt: skip
def test_unknown_and_ill_typed_fields_are_named(values, named):
    with pytest.raises(LiveAvatarError) as error:
        from_dict(ModelConfig, values)
    assert named in str(error.value)


@pytest.mark.parametrize("field, value", [
    ("heads", 7), ("inject_layers", (40,)), ("inject_layers", (3, 2)), ("dim", 81)
])  # fmt: skip
def test_impossible_networks_are_refused_by_field(field, value):
    with pytest.raises(LiveAvatarError, match=r"DiTConfig\.(dim|heads|inject_layers)"):
        DiTConfig(**{field: value})


@pytest.mark.parametrize("changes", [
    {"steps": 0}, {"sink_after": 0}, {"distance": (10, 4)}, {"distance": 31},
    {"audio_past": "none"}, {"ring_blocks": 0},
])  # fmt: skip
def test_impossible_policies_are_refused_by_field(changes):
    with pytest.raises(LiveAvatarError, match="StreamConfig." + next(iter(changes))):
        StreamConfig(**changes)


def test_changes_that_belong_together_are_made_together():
    """A width that 40 heads do not divide, with the heads that do."""
    cfg = change(ModelConfig(), ["dit.dim=6144", "dit.heads=48"])
    assert (cfg.dit.dim, cfg.dit.heads) == (6144, 48)
    with pytest.raises(LiveAvatarError, match=r"--set dit\.haeds: .* did you mean 'heads'"):
        change(ModelConfig(), ["dit.haeds=48"])
