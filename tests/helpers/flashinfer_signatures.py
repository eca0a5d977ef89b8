"""The signatures of a published FlashInfer that the drop-in has, read from its source without importing it.

`python tests/helpers/flashinfer_signatures.py FOLDER` writes flashinfer_signatures.json from the package that pip put
into FOLDER; ci/test-flashinfer.sh fetches it and compares.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")
_CORE, _PREPARE = "fused_moe/core.py", "fused_moe/prepare.py"
_FP8, _FP4 = "quantization/fp8_quantization.py", "quantization/fp4_quantization.py"
FUNCTIONS = {
    "cutlass_fused_moe": _CORE,
    "cutlass_fused_moe_workspace_size": _CORE,
    "get_cutlass_fused_moe_module": _CORE,
    "interleave_moe_scales_for_sm90_mixed_gemm": _PREPARE,
    "interleave_moe_weights_for_sm90_mixed_gemm": _PREPARE,
    "mxfp8_quantize": _FP8,
    "mxfp8_dequantize_host": _FP8,
    "block_scale_interleave": _FP4,
    "fp4_quantize": _FP4,
    "mxfp4_dequantize": _FP4,
    "mxfp4_dequantize_host": _FP4,
    "mxfp4_quantize": _FP4,
    "nvfp4_quantize": _FP4,
}
ENUMS = {"ActivationType": "tllm_enums.py", "SfLayout": "tllm_enums.py"}


def read(folder: Path) -> dict[str, Any]:
    """The table of the package in a folder."""
    package = folder / "flashinfer"
    (metadata,) = folder.glob("flashinfer_python-*.dist-info")
    version = metadata.name.removesuffix(".dist-info").partition("-")[2]
    parsed = {
        file: ast.parse((package / file).read_text(encoding="utf-8")) for file in {*FUNCTIONS.values(), *ENUMS.values()}
    }
    functions, enums = {}, {}
    for name, file in FUNCTIONS.items():
        (found,) = [node for node in parsed[file].body if isinstance(node, ast.FunctionDef) and node.name == name]
        functions[name] = _parameters(found.args)
    for name, file in ENUMS.items():
        (enum,) = [node for node in parsed[file].body if isinstance(node, ast.ClassDef) and node.name == name]
        enums[name] = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in enum.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
    return {"version": version, "functions": functions, "enums": enums}


def _parameters(args: ast.arguments) -> list[dict[str, Any]]:
    """Name, kind by inspect's name, and default as it is written, where there is one."""
    assert not args.posonlyargs
    assert args.vararg is None
    assert args.kwarg is None
    plain = [*[None] * (len(args.args) - len(args.defaults)), *args.defaults]
    found = [(one, "POSITIONAL_OR_KEYWORD", default) for one, default in zip(args.args, plain, strict=True)]
    found += [(one, "KEYWORD_ONLY", d) for one, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return [
        {"name": one.arg, "kind": kind} | ({} if default is None else {"default": ast.unparse(default)})
        for one, kind, default in found
    ]


def text(table: dict[str, Any]) -> str:
    """As the file has it: a line for each parameter."""
    functions = ",\n".join(
        f'    "{name}": [\n' + ",\n".join(f"      {json.dumps(one)}" for one in parameters) + "\n    ]"
        for name, parameters in table["functions"].items()
    )
    enums = json.dumps(table["enums"], indent=2).replace("\n", "\n  ")
    version = json.dumps(table["version"])
    return f'{{\n  "version": {version},\n  "functions": {{\n{functions}\n  }},\n  "enums": {enums}\n}}\n'


if __name__ == "__main__":
    TABLE.write_text(text(read(Path(sys.argv[1]))), encoding="utf-8")
