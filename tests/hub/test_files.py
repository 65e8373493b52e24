"""Finding and reading a model's files, whole and damaged."""

import json
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distiljax.errors import UserError
from distiljax.hub import from_pretrained, load_tokenizer, save_pretrained
from distiljax.hub.files import read_config, read_weights, resolve


def one_line(error):
    return "\n" not in str(error.value)


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture
def saved(tmp_path, make_model):
    module, params = make_model()
    save_pretrained(module, params, tmp_path / "model")
    return tmp_path / "model", params


def test_reads_bfloat16_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    value = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    save_file({"a": value}, tmp_path / "model.safetensors")
    read = read_weights(tmp_path)["a"]
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read.astype(np.float32), value.astype(np.float32))


def shard(directory, weights, suffix, save):
    names = sorted(weights)
    places = {}
    for i, part in enumerate((names[: len(names) // 3], names[len(names) // 3 :]), 1):
        file = f"{suffix.split('.')[0]}-{i:05}-of-00002.{suffix.split('.')[1]}"
        save({name: weights[name] for name in part}, directory / file)
        places |= dict.fromkeys(part, file)
    (directory / f"{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_sharded_safetensors(saved):
    directory, params = saved
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shard(directory, weights, "model.safetensors", save_file)
    assert_equal(from_pretrained(directory)[1], params)

    index = directory / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    broken = {**places["weight_map"], next(iter(places["weight_map"])): "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": broken}))
    with pytest.raises(UserError, match="lacks the weight"):
        read_weights(directory)
    index.write_text(json.dumps(places))
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match="names the shard 'model-00002-of-00002.safetensors', which is not there"
    ):
        read_weights(directory)
    for bad in (
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {}},
        {},
        {"weight_map": {"a": 3}},
    ):
        index.write_text(json.dumps(bad))
        with pytest.raises(UserError, match="expected"):
            read_weights(directory)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch_weights(saved, sharded, dtype):
    torch = pytest.importorskip("torch")
    directory, params = saved
    weights = load_file(directory / "model.safetensors")
    tensors = {name: torch.from_numpy(x).to(getattr(torch, dtype)) for name, x in weights.items()}
    (directory / "model.safetensors").unlink()
    if sharded:
        shard(directory, tensors, "pytorch_model.bin", torch.save)
    else:
        torch.save(tensors, directory / "pytorch_model.bin")
    assert_equal(from_pretrained(directory)[1], jax.tree.map(lambda x: x.astype(dtype).astype("f4"), params))


def test_safetensors_go_first(saved):
    directory, params = saved
    (directory / "pytorch_model.bin").write_bytes(b"never read")
    assert_equal(from_pretrained(directory)[1], params)


class Touch:
    """Unpickled by an unsafe reader, this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pytorch_files_run_no_code(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": Touch(tmp_path / "touched")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read as PyTorch weights") as error:
        read_weights(tmp_path)
    assert not (tmp_path / "touched").exists() and one_line(error)


def test_pytorch_weights_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pip install torch"):
        read_weights(tmp_path)


def test_pytorch_file_that_is_no_state_dict(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no state dict"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights(saved, name):
    directory, _ = saved
    path = directory / name
    if name.endswith("bin"):
        torch = pytest.importorskip("torch")
        weights = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        torch.save({k: torch.from_numpy(x) for k, x in weights.items()}, path)
    whole = path.read_bytes()
    for damaged in (b"", b"\x00" * 64, whole[:5], whole[: len(whole) // 2], whole[:-1], b"\xff" * 8 + whole):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name} .*fetch it again") as error:
            from_pretrained(directory)
        assert one_line(error)


def test_missing_files(tmp_path, saved):
    directory, _ = saved
    (directory / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"holds no weights; expected model\.safetensors or pytorch_model\.bin"
    ):
        from_pretrained(directory)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no config.json"):
        from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '"bert"'])
def test_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json") as error:
        read_config(tmp_path)
    assert one_line(error)


def test_paths_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        tmp_path / "no",
        str(tmp_path / "no"),
        "./no",
        "../no",
        "~/no/such/model",
        "a/b/c",
        "no/",
        "",
    ):
        with pytest.raises(UserError, match="no such directory"):
            resolve(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        resolve("file")


def test_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for load in (from_pretrained, load_tokenizer):
        with pytest.raises(
            UserError, match="'some-user/some-model'.*cannot be reached.*local directory"
        ) as error:
            load("some-user/some-model")
        assert one_line(error)
    with pytest.raises(UserError, match="neither a directory nor a hub name"):
        from_pretrained("not a name")


@pytest.mark.parametrize("suffix", ["model.safetensors", "pytorch_model.bin"])
def test_hub_name_in_the_cache(saved, monkeypatch, tmp_path, suffix, vocabulary_dir):
    """The hub client's cache, filled beforehand, stands for the hub; conftest.py keeps the client offline."""
    import huggingface_hub

    directory, params = saved
    if suffix.endswith("bin"):
        torch = pytest.importorskip("torch")
        weights = load_file(directory / "model.safetensors")
        torch.save({name: torch.from_numpy(x) for name, x in weights.items()}, directory / suffix)
        (directory / "model.safetensors").unlink()
    repository = tmp_path / "cache" / "models--user--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(directory, repository / "snapshots" / ("0" * 40))
    shutil.copy(vocabulary_dir / "vocab.txt", repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert_equal(from_pretrained("user/name")[1], params)
    assert load_tokenizer("user/name").mask_token == "[MASK]"
