"""What weights refuse, and in which words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from mxfp4_moe.weights import MoEWeights


class TestRefuses:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"w13": [[1]]}, TypeError, r"w13: expected uint8 \[E, 2I, H/2\], got list"),
            (
                {"w13": torch.zeros(3, 320, 48)},
                TypeError,
                r"w13: expected uint8 \[E, 2I, H/2\], got float32 \[3, 320, 48\]",
            ),
            ({"w13": (320, 48)}, ValueError, r"w13: expected uint8 \[E, 2I, H/2\], got uint8 \[320, 48\]"),
            (
                {"w13": (3, 320, 3, 8)},
                ValueError,
                r"w13: expected uint8 \[E, 2I, H/32, 16\], got uint8 \[3, 320, 3, 8\]",
            ),
            (
                {"w13": (3, 320, 40)},
                ValueError,
                r"w13: expected H .* a multiple of 32, got 80 from uint8 \[3, 320, 40\]",
            ),
            ({"w13": (3, 80, 48)}, ValueError, r"w13: expected I .* a multiple of 32, got 40 from uint8 \[3, 80, 48\]"),
            ({"w13": (3, 321, 48)}, ValueError, r"w13: expected .* an even number of rows, got uint8 \[3, 321, 48\]"),
            ({"w13": (0, 320, 48)}, ValueError, r"w13: expected at least one expert .*, got uint8 \[0, 320, 48\]"),
            ({"w13": (3, 0, 48)}, ValueError, r"w13: expected I .* a multiple of 32, got 0 from uint8 \[3, 0, 48\]"),
            (
                {"w13_scale": (3, 320, 2)},
                ValueError,
                r"w13_scale: expected uint8 \[3, 320, 3\], got uint8 \[3, 320, 2\]",
            ),
            ({"w2": (3, 96, 64)}, ValueError, r"w2: expected uint8 \[3, 96, 80\], got uint8 \[3, 96, 64\]"),
            ({"w2": (2, 96, 80)}, ValueError, r"w2: expected uint8 \[3, 96, 80\], got uint8 \[2, 96, 80\]"),
            (
                {"w2_scale": (3, 96, 160)},
                ValueError,
                r"w2_scale: expected uint8 \[3, 96, 5\], got uint8 \[3, 96, 160\]",
            ),
            (
                {"w2_scale": torch.zeros(3, 96, 5)},
                TypeError,
                r"w2_scale: expected uint8 \[3, 96, 5\], got float32 \[3, 96, 5\]",
            ),
            (
                {"w13_bias": torch.zeros(3, 320, dtype=torch.float64)},
                TypeError,
                r"w13_bias: expected bfloat16 or float16 or float32 \[3, 320\], got float64 \[3, 320\]",
            ),
            (
                {"w13_bias": torch.zeros(3, 160)},
                ValueError,
                r"w13_bias: expected .* \[3, 320\], got float32 \[3, 160\]",
            ),
            ({"w2_bias": torch.zeros(96)}, ValueError, r"w2_bias: expected .* \[3, 96\], got float32 \[96\]"),
            (
                {"w2": torch.zeros(3, 96, 80, dtype=torch.uint8, device="meta")},
                ValueError,
                r"w2: expected uint8 \[3, 96, 80\] on cpu, got uint8 \[3, 96, 80\] on meta",
            ),
            (
                {"gate_up_order": "gates"},
                ValueError,
                "gate_up_order: expected one of 'interleaved', 'gate_up', 'up_gate', got",
            ),
            ({"activation": "mish"}, ValueError, "activation: expected one of 'swiglu', 'swiglu_oai', .*, got 'mish'"),
            ({"activation": "relu2"}, ValueError, r"w2: expected uint8 \[3, 96, 160\], got uint8 \[3, 96, 80\]"),
            ({"alpha": "1"}, TypeError, r"alpha: expected a number, or float32 \[3\], got str"),
            ({"alpha": [1.0]}, TypeError, r"alpha: expected a number, or float32 \[3\], got list"),
            ({"beta": torch.zeros(2)}, ValueError, r"beta: expected float32 \[3\], got float32 \[2\]"),
            ({"limit": torch.zeros(3).double()}, TypeError, r"limit: expected float32 \[3\], got float64 \[3\]"),
            ({"beta": math.nan}, ValueError, "beta: expected a finite number, got nan"),
            ({"limit": math.inf}, ValueError, "limit: expected a finite number, got inf"),
            ({"limit": 0}, ValueError, "limit: expected a number above 0, or None, got 0"),
            ({"ep_size": 4}, ValueError, "ep_size: expected 1 to 3 ranks for 3 experts, got 4"),
            ({"ep_size": 0}, ValueError, "ep_size: expected 1 to 3 ranks for 3 experts, got 0"),
            ({"ep_size": 3, "ep_rank": 3}, ValueError, "ep_rank: expected 0 to 2, got 3"),
            ({"ep_rank": 0.0}, TypeError, "ep_rank: expected an integer, got float"),
            (
                {"tp_size": 6},
                ValueError,
                "tp_size: expected 1 to 5 ranks for 5 blocks of 32 of an intermediate size of 160, got 6",
            ),
            ({"tp_size": 5, "tp_rank": -1}, ValueError, "tp_rank: expected 0 to 4, got -1"),
        ],
    )
    def test_from_mxfp4(
        self, checkpoint: dict[str, torch.Tensor], change: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        change = {n: torch.zeros(v, dtype=torch.uint8) if isinstance(v, tuple) else v for n, v in change.items()}
        with pytest.raises(error, match=f"^{message}"):
            MoEWeights.from_mxfp4(**{**checkpoint, **change})

    @pytest.mark.parametrize("name", ["w13_scale", "w2_scale"])
    def test_a_nan_scale(self, checkpoint: dict[str, torch.Tensor], name: str) -> None:
        scale = checkpoint[name].clone()
        scale[1, 17, 2] = 255
        message = rf"{name}: expected E8M0 bytes 0\.\.253 \(2\^126\), got 255 at \[1, 17, 2\]"
        with pytest.raises(ValueError, match=message):
            MoEWeights.from_mxfp4(**{**checkpoint, name: scale})
        scale[1, 17, 2] = 253
        MoEWeights.from_mxfp4(**{**checkpoint, name: scale})

    @pytest.mark.parametrize(
        ("name", "change", "error", "message"),
        [
            ("w13", lambda t: t.int(), TypeError, r"w13: expected uint8 \[E, 16640\], got int32 \[3, 16640\]"),
            ("w13", lambda t: t[:, :40], ValueError, r"w13: expected uint8 \[E, 16640\], got uint8 \[3, 40\]"),
            ("w13", lambda t: t[:0], ValueError, r"w13: expected at least one expert, got uint8 \[0, 16640\]"),
            (
                "w13",
                lambda t: t.mT.contiguous().mT,
                ValueError,
                r"w13: expected a contiguous tensor, got strides \[1, 3\]",
            ),
            ("w2", lambda t: t[:2], ValueError, r"w2: expected uint8 \[3, 11264\], got uint8 \[2, 11264\]"),
            ("w2", lambda t: None, TypeError, r"w2: expected uint8 \[3, 11264\], got NoneType"),
            ("w2", lambda t: t.to("meta"), ValueError, r"w2: expected .* on cpu, got .* on meta"),
            ("hidden_size", lambda h: 128, ValueError, r"w13: expected uint8 \[E, 21760\], got uint8 \[3, 16640\]"),
            ("hidden_size", lambda h: 90, ValueError, "hidden_size: expected a multiple of 32, got 90"),
            ("hidden_size", lambda h: 96.0, TypeError, "hidden_size: expected an integer, got float"),
            ("intermediate_size", lambda i: 0, ValueError, "intermediate_size: expected a multiple of 32, got 0"),
            ("intermediate_size", lambda i: 192, ValueError, r"w13: expected uint8 \[E, 19968\], got .*\[3, 16640\]"),
            ("word_order", lambda o: "pairs", TypeError, "word_order: expected a WordOrder, got 'pairs'"),
            (
                "w13_bias",
                lambda t: t.bfloat16(),
                TypeError,
                r"w13_bias: expected float32 \[3, 320\], got bfloat16 \[3, 320\]",
            ),
            ("w2_bias", lambda t: t[:, :32], ValueError, r"w2_bias: expected float32 \[3, 96\], got float32 \[3, 32\]"),
            ("activation", lambda a: "swiglu", TypeError, "activation: expected an Activation, got 'swiglu'"),
            ("gate_up_order", lambda o: "gate_up", TypeError, "gate_up_order: expected a GateUpOrder, got 'gate_up'"),
            ("alpha", lambda a: True, TypeError, "alpha: expected a number, .*got bool"),
            (
                "beta",
                lambda b: torch.ones(6)[::2],
                ValueError,
                r"beta: expected a contiguous tensor, got strides \[2\]",
            ),
            (
                "first_expert",
                lambda f: 1,
                ValueError,
                "first_expert: expected 0 to 0, where the 3 experts here fit into 3, got 1",
            ),
            ("first_expert", lambda f: True, TypeError, "first_expert: expected an integer, got bool"),
            ("num_global_experts", lambda n: 2, ValueError, "first_expert: expected 0 to -1"),
            ("limit", lambda a: -1.0, ValueError, r"limit: expected a number above 0, or None, got -1\.0"),
        ],
    )
    def test_inconsistent_prepared_weights(
        self, checkpoint: dict[str, torch.Tensor], name: str, change: Any, error: type[Exception], message: str
    ) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint)
        with pytest.raises(error, match=f"^{message}"):
            dataclasses.replace(weights, **{name: change(getattr(weights, name))})
