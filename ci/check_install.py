"""Whether an installed wheel is whole and answers: its files, its import, its command, a small call on the CPU.

    python ci/check_install.py WHEEL

Run from outside the source tree, by the Python into which the wheel was installed. Exit status 1 and one sentence for
the first thing that is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def expect(condition: bool, sentence: str) -> None:
    if not condition:
        sys.exit(f"error: {sentence}")


def check_files(wheel: zipfile.ZipFile, package: Path) -> int:
    """Every file of the wheel's package is installed as it is in the wheel, and no other; returns their number."""
    expect(not package.is_relative_to(ROOT / "python"), f"mxfp4_moe is imported from the source tree, {package}")
    names = {name for name in wheel.namelist() if name.startswith("mxfp4_moe/") and not name.endswith("/")}
    for name in sorted(names):
        path = package.parent / name
        expect(path.exists(), f"{name} is in the wheel and not installed")
        expect(path.read_bytes() == wheel.read(name), f"{name} is installed with other contents than the wheel's")
    there = {str(path.relative_to(package.parent)) for path in package.rglob("*") if path.is_file()}
    others = sorted(name for name in there - names if "__pycache__" not in name)
    expect(not others, f"{package} has files that are not in the wheel: {', '.join(others)}")
    return len(names)


def command(*arguments: str) -> str:
    """What the installed `mxfp4-moe` says; its exit status is 0, or 1 where it warns that there is no GPU."""
    program = Path(sysconfig.get_path("scripts")) / "mxfp4-moe"
    expect(program.exists(), f"{program} was not installed")
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    said = (result.stderr or result.stdout).strip()
    expect(result.returncode in (0, 1), f"mxfp4-moe {' '.join(arguments)}: exit status {result.returncode}: {said}")
    expect("Traceback" not in said, f"mxfp4-moe {' '.join(arguments)}: {said}")
    return result.stdout


def check_call() -> None:
    """A layer of two experts on the CPU; ci/run_layer.py looks at the numbers."""
    import torch

    import mxfp4_moe

    g = torch.Generator().manual_seed(0)
    hidden, intermediate, experts, tokens = 64, 96, 2, 5
    weights = mxfp4_moe.MoEWeights.from_float(
        torch.randn(experts, 2 * intermediate, hidden, generator=g).bfloat16(),
        torch.randn(experts, hidden, intermediate, generator=g).bfloat16(),
        gate_up_order="interleaved",
    )
    hidden_states = torch.randn(tokens, hidden, generator=g).bfloat16()
    topk_weights, topk_ids = mxfp4_moe.topk_softmax(torch.randn(tokens, experts, generator=g), 2)
    out = mxfp4_moe.fused_moe(hidden_states, topk_weights, topk_ids, weights)
    expect(out.shape == (tokens, hidden) and bool(out.isfinite().all()), "fused_moe on the CPU gave no finite output")


def main(path: str) -> None:
    import mxfp4_moe

    with zipfile.ZipFile(path) as wheel:
        files = check_files(wheel, Path(mxfp4_moe.__file__).parent)
        report = json.loads(wheel.read("mxfp4_moe/build_report.json"))
    version = report["version"]
    expect(mxfp4_moe.__version__ == version, f"version is {mxfp4_moe.__version__}, the wheel's is {version}")
    expect(command("--version").split() == ["mxfp4-moe", version], f"mxfp4-moe --version does not say {version}")
    tiles = [tile["name"] for tile in json.loads(command("tiles", "--json"))["tiles"]]
    expect(
        tiles == list(report["tiles"]),
        f"mxfp4-moe tiles lists {len(tiles)} tiles, the wheel has {len(report['tiles'])}",
    )
    command("doctor")
    check_call()
    name = report["distribution"]
    print(f"{name} {version}: {files} files as in the wheel, {len(tiles)} tiles; command and CPU call work")


if __name__ == "__main__":
    main(sys.argv[1])
