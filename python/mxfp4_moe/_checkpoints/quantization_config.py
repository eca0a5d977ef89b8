"""What a checkpoint says of its quantization, beside what its tensors are: NVFP4's files have it in two places.

ModelOpt writes hf_quant_config.json ({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}), and it and
compressed-tensors write quantization_config in config.json (quant_algo, or format "nvfp4-pack-quantized"). The headers
decide; a file that says something else is another checkpoint's. Keys as vLLM 0.33 reads them
(layers/quantization/modelopt.py, compressed_tensors/compressed_tensors.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import Checkpoint

_FILES = ("hf_quant_config.json", "config.json")
_GROUP = 16


def compare_quantization(checkpoint: Checkpoint) -> None:
    """Refuses files that say another quantization than NVFP4, which the layer's headers have.

    A mixed one may have NVFP4 for experts; files that say nothing, or are not there, are no contradiction.

    Raises:
        ValueError: names the file, the key and both.
    """
    for file in (checkpoint.folder / name for name in _FILES):
        for stated in _stated(file):
            for key in ("quant_algo", "format"):
                value = stated.get(key)
                if isinstance(value, str) and not any(word in value.upper() for word in ("NVFP4", "MIXED")):
                    raise ValueError(
                        f"{file}: expected NVFP4 as {key}, which the tensors' headers have, got {value!r}: the file is "
                        "another checkpoint's, or the tensors are"
                    )
            group = stated.get("group_size")
            if isinstance(group, int) and group != _GROUP and "NVFP4" in str(stated.get("quant_algo")).upper():
                raise ValueError(f"{file}: expected a group_size of {_GROUP}, which NVFP4 has, got {group}")


def _stated(file: Path) -> Iterator[Mapping[str, Any]]:
    if not file.is_file():
        return
    try:
        raw = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if isinstance(raw, dict):
        for key in ("quantization", "quantization_config"):
            if isinstance(raw.get(key), dict):
                yield raw[key]
