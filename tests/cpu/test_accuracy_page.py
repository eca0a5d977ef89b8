"""docs/examples/accuracy.py, which prints docs/accuracy.md's tables: it runs, and tells the two activations apart."""

from __future__ import annotations

import re
import subprocess
import sys

from mxfp4_moe.tiles import PAIRS
from wheelbuild import ROOT


def test_the_script_runs_and_bfloat16_is_nearer_than_mxfp8() -> None:
    command = [sys.executable, str(ROOT / "docs" / "examples" / "accuracy.py"), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    layers = re.findall(r"W4A8 ([\d.]+) %, W4A16[^\d]*([\d.]+) %", done.stdout)
    assert len(layers) == 2, done.stdout
    for eight, sixteen in layers:  # three bits of mantissa, against eight
        assert 2.0 < float(eight) < 7.0
        assert 0.05 < float(sixteen) < 0.6
    logits = [float(number) for number in re.findall(r"logits ([\d.]+) %", done.stdout)]
    assert len(logits) == 2
    assert logits[0] > 3 * logits[1] > 0


def test_the_table_of_pairs_has_every_pair_of_the_cpu() -> None:
    command = [sys.executable, str(ROOT / "docs" / "examples" / "accuracy_of_pairs.py"), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = {pair: float(percent) for pair, percent in re.findall(r"^normal: (\w+_\w+) ([\d.]+)%$", done.stdout, re.M)}
    assert set(errors) == set(PAIRS)
    for weights in ("mxfp4", "nvfp4"):  # bits of mantissa: eleven, eight, four and two, each a factor of four at least
        assert 0 < 4 * errors[f"{weights}_fp16"] < errors[f"{weights}_bf16"]
        assert 0.05 < errors[f"{weights}_bf16"] < 0.6
        assert 8 * errors[f"{weights}_bf16"] < errors["mxfp4_mxfp8"] < errors[f"{weights}_{weights}"] / 2 < 20
