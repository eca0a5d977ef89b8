"""What a checkpoint says of its quantization, beside what its tensors are: two facts that have to agree.

ModelOpt writes hf_quant_config.json ({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}), and it and
compressed-tensors write quantization_config in config.json (quant_algo, or format "nvfp4-pack-quantized"; groups may
have formats of their own). The headers decide; a file that says something else is another checkpoint's. Keys as vLLM
0.33 reads them (layers/quantization/modelopt.py, compressed_tensors/compressed_tensors.py); it looks into text_config,
and for compression_config, too (config/model.py, get_model_quantization_config).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .config import NESTED
from .files import Checkpoint
from .schemes import Scheme

_FILES = ("hf_quant_config.json", "config.json")
_KEYS = ("quantization", "quantization_config", "compression_config")
_GROUP = 16
_WORDS = ("NVFP4", "MIXED")


def compare_quantization(checkpoint: Checkpoint, scheme: Scheme) -> None:
    """Refuses files that say another quantization than a layer's headers have: NVFP4, MXFP4 or none.

    A mixed one may have NVFP4 for experts; files that say nothing, or are not there, are no contradiction. Layers that
    are not quantized may be in one that leaves them out, and MXFP4 goes by many names, so that there only NVFP4 is one.

    Raises:
        ValueError: names the file, the key and both; or a file that is not JSON.
    """
    for file in (checkpoint.folder / name for name in _FILES):
        for stated in _stated(file):
            if scheme.is_nvfp4:
                _expect_nvfp4(file, stated)
            elif scheme.is_packed:
                _expect_mxfp4(file, stated)


def _expect_nvfp4(file: Path, stated: Mapping[str, Any]) -> None:
    for key in ("quant_algo", "format"):
        value = stated.get(key)
        if isinstance(value, str) and not any(word in value.upper() for word in _WORDS):
            raise ValueError(_another(file, "NVFP4", key, value))
    if (method := stated.get("quant_method")) == "mxfp4":
        raise ValueError(_another(file, "NVFP4", "quant_method", method))
    for part in (stated, *_groups(stated)):
        group = part.get("group_size")
        if isinstance(group, int) and group != _GROUP and _says_nvfp4(part):
            raise ValueError(f"{file}: expected a group_size of {_GROUP}, which NVFP4 has, got {group}")


def _expect_mxfp4(file: Path, stated: Mapping[str, Any]) -> None:
    for key in ("quant_algo", "format", "quant_method"):
        value = stated.get(key)
        if isinstance(value, str) and "NVFP4" in value.upper() and "MX" not in value.upper():
            raise ValueError(_another(file, "MXFP4", key, value))


def _another(file: Path, expected: str, key: str, value: str) -> str:
    return (
        f"{file}: expected {expected} as {key}, which the tensors' headers have, got {value!r}: the file is another "
        "checkpoint's, or the tensors are"
    )


def _says_nvfp4(part: Mapping[str, Any]) -> bool:
    return any("NVFP4" in str(part.get(key)).upper() for key in ("quant_algo", "format"))


def _groups(stated: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """compressed-tensors' groups of modules: what each says of its weights, in its own format or that of all."""
    groups = stated.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield {**weights, "format": group.get("format") or stated.get("format")}


def _stated(file: Path) -> Iterator[Mapping[str, Any]]:
    if not file.is_file():
        return
    try:
        raw = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected an object, got {type(raw).__name__}")
    for where in (raw, *(raw[key] for key in NESTED if isinstance(raw.get(key), dict))):
        yield from (where[key] for key in _KEYS if isinstance(where.get(key), dict))
