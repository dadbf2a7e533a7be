"""Foreign files are mapped, checked from their headers, and can run no code."""

import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.files import read
from liveavatar_jax.weights.rules import Rule, load
from tests.torch_zip import Storage, Tensor, fake_torch, save_pth

X = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def torch(monkeypatch):
    return fake_torch(monkeypatch)


def test_pth_gives_tensors_as_stored(tmp_path, torch):
    wide = Storage(torch.FloatStorage, "0", X)
    half = Storage(torch.BFloat16Storage, "1", X.astype(ml_dtypes.bfloat16))
    state = OrderedDict(
        row=Tensor(wide, 6, (6,), (1,)),
        transposed=Tensor(wide, 0, (6, 4), (1, 6)),
        half=Tensor(half, 0, (4, 6), (6, 1)),
        scalar=Tensor(wide, 23, (), ()),
        empty=Tensor(wide, 0, (0, 3), (3, 1)),
    )
    tensors = read(save_pth(tmp_path / "net.pth", state, wide, half))
    np.testing.assert_array_equal(tensors["row"], X[1])
    np.testing.assert_array_equal(tensors["transposed"], X.T)
    np.testing.assert_array_equal(tensors["half"].astype(np.float32), X)
    assert tensors["scalar"] == 23 and tensors["empty"].shape == (0, 3)


def test_pth_may_wrap_its_state_dict(tmp_path, torch):
    storage = Storage(torch.FloatStorage, "0", X)
    state = {"state_dict": {"x": Tensor(storage, 0, (4, 6), (6, 1))}}
    assert list(read(save_pth(tmp_path / "net.pth", state, storage))) == ["x"]


class Attack:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, getattr, __import__, print])
def test_pth_runs_no_code(tmp_path, torch, function, capfd):
    target = tmp_path / "ran"
    args = (str(target),) if function is os.mkdir else (f"touch {target}",)
    path = save_pth(tmp_path / "net.pth", {"x": Attack(function, *args)})
    with pytest.raises(LiveAvatarError, match=rf"net\.pth asks to run \w+\.{function.__name__},"):
        read(path)
    assert not target.exists() and not capfd.readouterr().out


def test_pth_with_unknown_storage_is_refused(tmp_path, torch):
    storage = Storage(torch.SecretStorage, "0", X)
    path = save_pth(tmp_path / "net.pth", {"x": Tensor(storage, 0, (4, 6), (6, 1))}, storage)
    with pytest.raises(LiveAvatarError, match=r"torch\.SecretStorage"):
        read(path)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(1, (4, 6), (6, 1)), (0, (5, 6), (6, 1)), (0, (4,), (-6,)), (-1, (4,), (1,)), (0, (2,), ())],
)
def test_pth_cannot_look_outside_its_storage(tmp_path, torch, offset, shape, strides):
    storage = Storage(torch.FloatStorage, "0", X)
    state = {"x": Tensor(storage, offset, shape, strides)}
    with pytest.raises(LiveAvatarError, match=r"net\.pth is damaged"):
        read(save_pth(tmp_path / "net.pth", state, storage))


def test_pth_with_short_storage_is_refused(tmp_path, torch):
    storage = Storage(torch.FloatStorage, "0", X)
    state = {"x": Tensor(storage, 0, (4, 6), (6, 1))}
    short = Storage(torch.FloatStorage, "0", X[:2])
    with pytest.raises(LiveAvatarError, match=r"48 bytes for 24 numbers"):
        read(save_pth(tmp_path / "net.pth", state, short))


def test_pth_that_is_no_state_dict_is_refused(tmp_path, torch):
    with pytest.raises(LiveAvatarError, match="holds a list, not a state dict"):
        read(save_pth(tmp_path / "net.pth", [1, 2]))
    with pytest.raises(LiveAvatarError, match="epoch is a int, not a tensor"):
        read(save_pth(tmp_path / "net.pth", {"epoch": 3}))


def test_compressed_pth_is_refused(tmp_path, torch):
    storage = Storage(torch.FloatStorage, "0", X)
    state = {"x": Tensor(storage, 0, (4, 6), (6, 1))}
    path = save_pth(tmp_path / "n.pth", state, storage, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(LiveAvatarError, match=r"n\.pth is compressed"):
        read(path)


def test_truncated_and_old_pth_say_so(tmp_path, torch):
    storage = Storage(torch.FloatStorage, "0", X)
    path = save_pth(tmp_path / "net.pth", {"x": Tensor(storage, 0, (4, 6), (6, 1))}, storage)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(LiveAvatarError, match=r"cut off, or older than torch 1\.6"):
        read(path)
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    with pytest.raises(LiveAvatarError, match=r"cut off, or older than torch 1\.6"):
        read(path)


def shards(folder: Path) -> Path:
    a, b = {"a": X, "b": X[0].astype(ml_dtypes.bfloat16)}, {"c": X.T.copy()}
    save_file(a, folder / "m-1.safetensors")
    save_file(b, folder / "m-2.safetensors")
    listed = dict.fromkeys(a, "m-1.safetensors") | dict.fromkeys(b, "m-2.safetensors")
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    return index


def test_shards_read_as_one(tmp_path):
    tensors = read(shards(tmp_path).parent)
    assert set(tensors) == {"a", "b", "c"} and not tensors.faults
    assert tensors["b"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensors["c"], X.T)
    assert len(tensors.files) == 3


def test_missing_shard_is_named(tmp_path):
    shards(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(LiveAvatarError, match=r"index\.json lists m-2\.safetensors, which is miss"):
        read(tmp_path)


def test_index_that_names_an_absent_tensor_is_a_fault(tmp_path):
    index = shards(tmp_path)
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": listed | {"d": "m-1.safetensors"}}))
    assert "absent: d is not in" in read(tmp_path).faults["d"]


def test_tensor_in_two_files_is_a_fault(tmp_path):
    save_file({"a": X}, tmp_path / "1.safetensors")
    save_file({"a": X}, tmp_path / "2.safetensors")
    assert "double: a is in" in read(tmp_path).faults["a"]


@pytest.mark.parametrize("content", [b"", b"\x01\x02", b"\x00" * 64, b"\xff" * 64, b"{}" * 32])
def test_corrupt_safetensors_is_named(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(LiveAvatarError, match=r"x\.safetensors is not a safetensors file"):
        read(path)


def test_corrupt_index_is_named(tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    for content in ("", "[]", "{}", '{"weight_map": 3}'):
        path.write_text(content)
        with pytest.raises(LiveAvatarError, match="is not an index of shards"):
            read(path)


def test_missing_file_and_empty_folder_are_named(tmp_path):
    with pytest.raises(LiveAvatarError, match=r"x\.pth is missing"):
        read(tmp_path / "x.pth")
    with pytest.raises(LiveAvatarError, match=r"holds no \.safetensors"):
        read(tmp_path)


class Net(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.x, self.y, self.z = (nnx.Linear(6, 4, use_bias=False, rngs=rngs) for _ in "xyz")


RULES = (Rule(r"([xyz])\.weight", r"\1.kernel", "o i -> i o"),)


def test_truncated_missing_extra_and_misshapen_tensors_are_listed_at_once(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"a.weight": X, "x.weight": X.T.copy(), "y.weight": X}, path)
    path.write_bytes(path.read_bytes()[:-1])
    tensors = read(path)
    with pytest.raises(LiveAvatarError) as error:
        load(jax.eval_shape(lambda: Net(rngs=nnx.Rngs(0))), tensors, RULES, where=path.name)
    said = str(error.value)
    assert "net.safetensors does not fit Net in 4 place(s)" in said
    assert "missing: z.weight" in said and "unknown: a.weight" in said
    assert "misshapen: x.weight has shape (6, 4), not (4, 6)" in said
    assert "truncated: y.weight ends at byte" in said
    with pytest.raises(LiveAvatarError, match="truncated: y"):
        tensors["y.weight"]


def test_a_tensor_is_mapped_and_not_copied(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"x.weight": X}, path)
    tensor = read(path)["x.weight"]
    assert isinstance(tensor, np.memmap) and not tensor.flags.writeable
