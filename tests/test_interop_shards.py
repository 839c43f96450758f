"""Foreign weight files: what is known before reading, and what is said of broken ones."""

import argparse
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from eagle_moe.interop.shards import OPEN_CLIP_STEMS, STEMS, open_shards

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.arange(4).to(torch.bfloat16)}


def read(shards):
    return {key: value for shard in shards for key, value in shard.read()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "old.bin"])
def test_names_shapes_and_dtypes_come_first(tmp_path, name):
    path = tmp_path / name
    if name == "w.safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name != "old.bin")
    (shard,) = open_shards(path)
    assert shard.path == path
    assert shard.shapes == {"a.weight": (2, 3), "b": (4,)}
    assert shard.dtypes == {"a.weight": torch.float32, "b": torch.bfloat16}
    assert same(read([shard]), TENSORS)


def test_a_safetensors_file_is_read_a_tensor_at_a_time(tmp_path):
    save_file({str(i): torch.full((2,), float(i)) for i in range(5)}, tmp_path / "w.safetensors")
    (shard,) = open_shards(tmp_path / "w.safetensors")
    stream = shard.read()
    first = next(stream)
    stream.close()
    assert first[0] == "0" and torch.equal(first[1], torch.zeros(2))


def test_the_best_of_a_folders_files_is_taken(tmp_path):
    torch.save({"pickle": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert set(open_shards(tmp_path)[0].shapes) == {"pickle"}
    save_file({"safe": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert set(open_shards(tmp_path)[0].shapes) == {"safe"}
    save_file({"clip": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    assert set(open_shards(tmp_path)[0].shapes) == {"safe"}
    stems = (*OPEN_CLIP_STEMS, *STEMS)
    assert set(open_shards(tmp_path, stems=stems)[0].shapes) == {"clip"}


def sharded(folder, ending="safetensors"):
    """Two shards and their index, as transformers writes them."""
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = {key: f"{stem}-0000{i}-of-00002.{ending}" for i, key in enumerate(TENSORS, 1)}
    for key, name in names.items():
        write = save_file if ending == "safetensors" else torch.save
        write({key: TENSORS[key]}, folder / name)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": names}))
    return names, index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards(tmp_path, ending):
    sharded(tmp_path, ending)
    shards = open_shards(tmp_path)
    assert len(shards) == 2 and same(read(shards), TENSORS)


def test_a_missing_shard(tmp_path):
    names, _ = sharded(tmp_path)
    (tmp_path / names["b"]).unlink()
    with pytest.raises(ValueError, match=rf"1 of 2 shards are missing: {names['b']}"):
        open_shards(tmp_path)


def test_a_shard_that_lacks_what_the_index_promises(tmp_path):
    names, _ = sharded(tmp_path)
    save_file({"c": torch.zeros(1)}, tmp_path / names["b"])
    with pytest.raises(ValueError, match=rf"{names['b']}: lacks 1 tensors that .* such as b"):
        open_shards(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_an_index_that_is_none(tmp_path, text):
    _, index = sharded(tmp_path)
    index.write_text(text)
    with pytest.raises(ValueError, match="index.json: is not an index of shards"):
        open_shards(tmp_path)


@pytest.mark.parametrize(
    ("top", "inner", "steps"),
    [
        (TENSORS, ("model",), ()),
        ({"model": TENSORS, "epoch": 3}, ("ema", "model"), ("model",)),
        ({"model": {}, "ema": TENSORS}, ("ema", "model"), ("ema",)),
        ({"module": {"model": TENSORS}}, ("ema", "module", "model"), ("module", "model")),
    ],
)
def test_a_state_dict_inside_a_training_state(tmp_path, top, inner, steps):
    torch.save(top, tmp_path / "w.pth")
    (shard,) = open_shards(tmp_path / "w.pth", inner)
    assert shard.inner == steps and same(read([shard]), TENSORS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([TENSORS], "holds no dictionary of tensors, but something of type list"),
        ({"epoch": 3}, "`epoch` is not a tensor but of type int"),
        ({1: torch.zeros(1)}, "holds no dictionary of tensors"),
        ({"args": argparse.Namespace()}, r"refused \(argparse.Namespace\)"),
    ],
)
def test_a_pickle_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"w.pth: {message}"):
        open_shards(tmp_path / "w.pth")


class Code:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda top, path: path.write_bytes(pickle.dumps(top))]
)
def test_code_is_refused_and_does_not_run(tmp_path, save):
    witness = tmp_path / "ran"
    save({"a": Code(f"touch {witness}")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth: refused") as error:
        open_shards(tmp_path / "w.pth")
    assert not witness.exists()
    assert "weights_only" not in str(error.value)  # torch's advice how to load it all the same


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_program_is_refused(tmp_path):
    path = tmp_path / "ViT-L-14-336px.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError, match=r"refused \(a TorchScript program\)"):
        open_shards(path)


def zipped(old):
    def make(path):
        torch.save({"a": torch.zeros(500)}, path, _use_new_zipfile_serialization=not old)
        return path.read_bytes()

    return make


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("make", [zipped(False), zipped(True)], ids=["zip", "bare"])
def test_a_truncated_pickle(tmp_path, make, share):
    path = tmp_path / "w.pth"
    whole = make(path)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"w.pth: (cannot be read as weights|neither a file)"):
        open_shards(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_safetensors_file(tmp_path, share):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(500)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"w.safetensors: cannot be read .*Copy it again"):
        open_shards(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("w.pth", "hello\n" * 20, "neither a file of torch.save nor called"),
        ("w.pth", "<!DOCTYPE html><title>Sign in</title>", "neither a file of torch.save"),
        ("w.safetensors", "hello\n" * 20, "cannot be read"),
        ("w.pth", "version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
        ("w.safetensors", "version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
    ],
)
def test_text_that_is_called_weights(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        open_shards(tmp_path / name)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="gone: no such file or folder"):
        open_shards(tmp_path / "gone")
    with pytest.raises(ValueError, match="no weights in it: neither model.safetensors nor"):
        open_shards(tmp_path)


def test_a_type_that_no_checkpoint_uses(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="w.safetensors: tensors of type 'C64' are not supported"):
        open_shards(tmp_path / "w.safetensors")
