"""What weights refuse, and in which words."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import mxfp4_moe
from mxfp4_moe import reference
from mxfp4_moe._checkpoints import options
from mxfp4_moe.flashinfer_api import block_scale_interleave
from mxfp4_moe.problems import random_call
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
            ({"limit": math.inf}, ValueError, "limit: expected a finite number above 0, or None, got inf"),
            ({"limit": 0}, ValueError, "limit: expected a finite number above 0, or None, got 0"),
            ({"limit": -7.0}, ValueError, "limit: expected a finite number above 0, or None, got -7.0"),
            ({"limit": 1e-50}, ValueError, "limit: expected a finite number above 0, or None, got 1e-50"),  # in float32
            ({"alpha": 1e39}, ValueError, r"alpha: expected a finite number, got 1e\+39"),
            ({"beta": 10**400}, ValueError, "beta: expected a finite number, got 1000"),
            ({"alpha": None}, TypeError, r"alpha: expected a number, or float32 \[3\], got NoneType"),
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

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -2.5, 1e-46])
    @pytest.mark.parametrize("name", ["alpha", "beta", "limit"])
    def test_each_experts_numbers(self, checkpoint: dict[str, torch.Tensor], name: str, value: float) -> None:
        """What one number may not be, no expert's may be: of every way in, and of the reference."""
        numbers = torch.tensor([1.5, value, 2.0])
        kept = numbers[1].item()  # as float32 has it
        refused = not math.isfinite(kept) or (name == "limit" and kept <= 0)
        words = f"^{name}: expected finite numbers{' above 0' if name == 'limit' else ''}, got {kept} for expert 1$"
        weights = MoEWeights.from_mxfp4(**checkpoint)
        floats = {n: torch.zeros_like(checkpoint[n]).repeat(1, 1, 2).float() for n in ("w13", "w2")}
        packed = (checkpoint[n].view(torch.int64) for n in ("w13", "w2"))
        swizzled = [torch.stack([block_scale_interleave(e) for e in checkpoint[n]]) for n in ("w13_scale", "w2_scale")]
        shaped = [s.view(3, -1, 4 * k).view(torch.int32) for s, k in zip(swizzled, (1, 2), strict=True)]
        w13, w2 = packed
        ways: dict[str, Any] = {
            "from_mxfp4": lambda: MoEWeights.from_mxfp4(**checkpoint, **{name: numbers}),
            "from_float": lambda: MoEWeights.from_float(**floats, **{name: numbers}),
            "from_flashinfer": lambda: MoEWeights.from_flashinfer(w13, shaped[0], w2, shaped[1], **{name: numbers}),
            "replace": lambda: replace(weights, **{name: numbers}),
            "activate": lambda: reference.activate(
                torch.ones(3, 32), torch.arange(3), None, "swiglu_oai", **{name: numbers}
            ),
        }
        for way in ways.values():
            if refused:
                with pytest.raises(ValueError, match=words):
                    way()
            else:
                way()

    @pytest.mark.parametrize("value", [0.0, -4.0])
    def test_what_situ_divides_by(self, checkpoint: dict[str, torch.Tensor], value: float) -> None:
        """The same for one number and for each expert's; of the others, beta may be 0."""
        numbers = torch.tensor([1.5, value, 2.0])
        for beta, words in ((value, "a finite number"), (numbers, "finite numbers")):
            with pytest.raises(
                ValueError, match=f"^beta: expected {words} above 0 with activation 'situ', got {value}"
            ):
                MoEWeights.from_mxfp4(**checkpoint, activation="situ", beta=beta)
            MoEWeights.from_mxfp4(**checkpoint, activation="swiglu_oai", beta=beta)

    def test_several_experts_numbers(self, checkpoint: dict[str, torch.Tensor]) -> None:
        with pytest.raises(ValueError, match=r"got nan for expert 0 \(of 3 such experts\)$"):
            MoEWeights.from_mxfp4(**checkpoint, alpha=torch.full((3,), math.nan))

    def test_numbers_without_values_are_taken_as_they_are(self, checkpoint: dict[str, torch.Tensor]) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint, limit=torch.full((3,), 7.0)).to("meta")
        assert weights.limit.device.type == "meta"

    def test_a_call_reads_no_number(self, checkpoint: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
        """They are looked at when weights are made: a call would wait for the GPU."""
        weights = MoEWeights.from_mxfp4(**checkpoint, limit=torch.full((3,), 7.0))
        monkeypatch.setattr(options, "has_values", lambda tensor: pytest.fail("a number is read"))
        monkeypatch.setattr(reference, "fused_moe", lambda x, *_, **__: torch.zeros_like(x))
        call = random_call(2, 2, weights)
        mxfp4_moe.fused_moe(*call.args(), weights)

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
            (
                "num_global_experts",
                lambda n: 2,
                ValueError,
                "num_global_experts: expected 3 or more, which are",
            ),
            ("limit", lambda a: -1.0, ValueError, r"limit: expected a finite number above 0, or None, got -1\.0"),
        ],
    )
    def test_inconsistent_prepared_weights(
        self, checkpoint: dict[str, torch.Tensor], name: str, change: Any, error: type[Exception], message: str
    ) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint)
        with pytest.raises(error, match=f"^{message}"):
            dataclasses.replace(weights, **{name: change(getattr(weights, name))})
