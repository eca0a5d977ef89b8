"""What is no checkpoint, or not all of one, is said to be that, with what to do; and headers are read as they are."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_checkpoints as checkpoints
import pytest
import torch
from model_checkpoints import same_bytes
from safetensors import safe_open
from safetensors.torch import save_file

from mxfp4_moe import MoEWeights
from mxfp4_moe._checkpoints.headers import read_header

E, H, INTER = 3, 96, 160


def layer_of(scheme: str, seed: int = 0) -> checkpoints.Layer:
    return checkpoints.layer_of(scheme, E, H, INTER, seed=seed)


def lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4792272488\n")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": [1, 2, 3]}, protocol=2))


def torch_saved(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def header_too_long(path: Path) -> None:
    save_file({"a": torch.zeros(4, 4)}, path)
    path.write_bytes(path.read_bytes()[:40])


def half(path: Path) -> None:
    save_file({"a": torch.zeros(64, 64)}, path)
    path.write_bytes(path.read_bytes()[:9000])


def raw(header: bytes, data: int = 0, length: int | None = None) -> Callable[[Path], None]:
    return lambda path: (
        path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(data)) and None
    )


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", "x")


NOT_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "git lfs": (lfs, "a Git LFS pointer, in place of the file; run `git lfs pull`"),
    "html": (
        lambda path: path.write_text("<!DOCTYPE html>\n<html><body>Sign in</body></html>"),
        "a web page; the address",
    ),
    "html, late": (lambda path: path.write_text("\n\n  <HTML lang='en'>404"), "a web page"),
    "gguf": (lambda path: path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 291, 25) + bytes(200)), "a GGUF file"),
    "pickle": (pickled, "a Python pickle, as torch.save writes; use the model's safetensors files"),
    "torch.save": (torch_saved, "a zip archive, as torch.save writes"),
    "zip": (zipped, "a zip archive"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(100)), "a compressed or tar archive; unpack it"),
    "tar": (lambda path: path.write_bytes(b"n" * 257 + b"ustar" + bytes(300)), "a compressed or tar archive"),
    "numpy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + bytes(100)), "a NumPy file"),
    "json": (lambda path: path.write_text('{"error": "Repository not found"}'), "JSON text; give the directory"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty; download it again"),
    "zeros": (lambda path: path.write_bytes(bytes(100)), "no safetensors file, and nothing else that is known"),
    "text": (lambda path: path.write_text("Access to model openai/gpt-oss-20b is restricted."), "no safetensors file"),
    "five bytes": (lambda path: path.write_bytes(b"\x05\x00\x00\x00\x00"), "no safetensors file"),
    "header cut off": (
        header_too_long,
        r"its header alone takes \d+ bytes, and the file has 40 .*: it was not written or",
    ),
    "data cut off": (half, r"its header speaks of 16,\d+ bytes, and the file has 9,000 \(54 %\)"),
    "header no JSON": (raw(b"{" + b"x" * 99), "its header is not JSON"),
    "header too large": (raw(b"{}", length=1 << 60), "no safetensors file"),
    "entry malformed": (raw(b'{"a":{"dtype":"U8","shape":[4]}}   ', 4), "a: cannot be read from .*malformed entry"),
    "entry too short": (raw(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}', 4), r"4 bytes for F32 \[4\]"),
    "entry backwards": (raw(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[8,4]}}', 8), "malformed entry"),
}


class TestNotACheckpoint:
    @pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
    @pytest.mark.parametrize("where", ["a file", "a directory", "a shard"])
    def test_is_said_with_what_to_do(self, tmp_path: Path, kind: str, where: str) -> None:
        make, message = NOT_CHECKPOINTS[kind]
        name = "model-00001-of-00001.safetensors" if where == "a shard" else "model.safetensors"
        make(tmp_path / name)
        if where == "a shard":
            names = checkpoints.tensors_of("gpt-oss", layer_of("gpt-oss"), 0)
            index = {"weight_map": dict.fromkeys(names, name)}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        for read in (MoEWeights.from_pretrained, MoEWeights.from_safetensors):
            with pytest.raises(ValueError, match=message) as caught:
                read(tmp_path / name if where == "a file" else tmp_path, layer=0)
            assert name in str(caught.value)

    def test_what_was_cut_off_anywhere_is_never_read(self, tmp_path: Path) -> None:
        """A download that stopped, at every tenth byte."""
        layer = checkpoints.layer_of("gpt-oss", 1, 32, 32)
        file = checkpoints.write(tmp_path, checkpoints.tensors_of("gpt-oss", layer, 0)) / "model.safetensors"
        whole = file.read_bytes()
        for size in range(0, len(whole), 10):
            file.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="cannot be read"):
                MoEWeights.from_pretrained(file, layer=0)
        file.write_bytes(whole)
        assert same_bytes(MoEWeights.from_pretrained(file, layer=0), layer)

    @pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "other.safetensors"])
    def test_a_link_that_leads_nowhere(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).symlink_to(tmp_path / "blobs" / "4d7a")
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(
                FileNotFoundError, match=r"is a link to .*4d7a, and there is no such file: the cache was"
            ):
                MoEWeights.from_pretrained(path, layer=0)

    def test_a_folder_whose_link_leads_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "model").symlink_to(tmp_path / "gone")
        with pytest.raises(FileNotFoundError, match=r"model is a link to .*gone, and there is no such folder"):
            MoEWeights.from_pretrained(tmp_path / "model" / "model.safetensors", layer=0)

    def test_a_shard_that_is_a_link_to_nowhere(self, tmp_path: Path) -> None:
        tensors = checkpoints.tensors_of("gpt-oss", layer_of("gpt-oss"), 0)
        checkpoints.write(tmp_path, tensors, shards=2)
        shard = tmp_path / "model-00002-of-00002.safetensors"
        shard.unlink()
        shard.symlink_to("nowhere")
        message = (
            r"index\.json says model-00002-of-00002\.safetensors, and there is no such file; .* is a link to nowhere"
        )
        with pytest.raises(ValueError, match=message):
            MoEWeights.from_pretrained(tmp_path, layer=0)

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (["model-Q4_K_M.gguf"], r"it holds GGUF \(\*\.gguf\); use the model's safetensors files"),
            (["pytorch_model.bin", "config.json"], "it holds PyTorch pickles"),
            (["consolidated.00.pth"], "it holds PyTorch pickles"),
            (["model.safetensors.incomplete"], "a download that did not end"),
            (
                ["snapshots/4d7a/model.safetensors", "refs/main"],
                "it is the folder of a Hub cache; give .*snapshots/4d7a",
            ),
            (["original/model.safetensors", "config.json"], "there are safetensors files in .*original"),
            (["config.json"], "or model.safetensors.index.json in the directory, got"),
        ],
    )
    def test_a_folder_of_something_else(self, tmp_path: Path, files: list[str], message: str) -> None:
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=message):
            MoEWeights.from_pretrained(tmp_path, layer=0)

    def test_a_models_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match="`hf download openai/gpt-oss-20b` prints where it put it"):
            MoEWeights.from_pretrained("openai/gpt-oss-20b", layer=0)
        with pytest.raises(FileNotFoundError, match="path: expected a file or directory, got .*nowhere"):
            MoEWeights.from_pretrained(tmp_path / "nowhere", layer=0)

    def test_a_shard_that_is_missing_without_an_index(self, tmp_path: Path) -> None:
        tensors = checkpoints.tensors_of("gpt-oss", layer_of("gpt-oss"), 0)
        checkpoints.write(tmp_path, tensors, shards=3, index=False)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(
            ValueError, match=r"expected the 3 files of model, got 2: number 00002 is missing; download it"
        ):
            MoEWeights.from_pretrained(tmp_path, layer=0)

    def test_one_tensor_twice(self, tmp_path: Path) -> None:
        tensors = checkpoints.tensors_of("gpt-oss", layer_of("gpt-oss"), 0)
        for name in ("a.safetensors", "b.safetensors"):
            save_file(tensors, tmp_path / name)
        with pytest.raises(
            ValueError, match=r"expected one tensor of this name, got one in .*a\.safetensors and in .*b\."
        ):
            MoEWeights.from_pretrained(tmp_path, layer=0)

    @pytest.mark.parametrize("text", ["<html></html>", "version https://git-lfs.github.com/spec/v1\n"])
    def test_an_index_that_is_none(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(
            ValueError, match=r'expected JSON with a "weight_map" object, got (a web page|a Git LFS pointer)'
        ):
            MoEWeights.from_pretrained(tmp_path, layer=0)


def test_headers_are_those_of_the_library(tmp_path: Path) -> None:
    """Every dtype, empty tensors and scalars, beside what safetensors itself reads."""

    dtypes = (torch.uint8, torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool)
    tensors = {str(dtype): torch.ones(3, 4).to(dtype) for dtype in dtypes}
    tensors |= {str(d): torch.ones(3, 4).to(d) for d in (torch.float8_e4m3fn, torch.float8_e5m2)}
    tensors["e8m0"] = torch.zeros(5, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors["fp4"] = torch.zeros(2, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    tensors |= {"none": torch.empty(0, 7), "scalar": torch.tensor(3.0)}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    header = read_header(file)
    assert set(header) == set(tensors)
    with safe_open(file, "pt") as stored:
        for name, tensor in tensors.items():
            assert header[name].shape == tuple(tensor.shape)
            assert header[name].nbytes == tensor.nbytes
            assert header[name].dtype == stored.get_slice(name).get_dtype()
