"""A run of `mxfp4-moe bench` with round numbers, for tests of its tables and pictures."""

from __future__ import annotations

from mxfp4_moe.bench.ceilings import Ceilings
from mxfp4_moe.bench.kernel_records import KernelTime
from mxfp4_moe.bench.report import OURS, Failure, Measurement, Results
from mxfp4_moe.bench.shapes import PRESETS
from mxfp4_moe.bench.statistics import Summary, summarize


def exactly(us: float) -> Summary:
    """One timing."""
    return summarize([us])


def results() -> Results:
    """A run with round numbers: the GPU copies 4000 GB/s and multiplies 800 TFLOP/s."""
    ours = [
        (1, "m8n128_swap", True, 4.0, 20.0),
        (64, "m8n128_swap", True, 110.0, 500.0),
        (64, "m64n128", False, 110.0, 400.0),
    ]
    theirs = [(1, 4.0, 50.0), (64, 110.0, 440.0)]
    return Results(
        shape=PRESETS["gpt-oss-120b"],
        environment={"device": "NVIDIA <Test>", "driver": "1.2", "date": "2026-01-01", "torch": "2.13"},
        ceilings=Ceilings(copy_gb_per_s=4000, bf16_tflops=800, f16_tflops=790, fp8_tflops=None).as_dict(),
        measurements=[
            *(
                Measurement(implementation=OURS, tokens=t, tile=tile, automatic=auto, active_experts=e, us=exactly(us))
                for t, tile, auto, e, us in ours
            ),
            *(
                Measurement(
                    implementation="humming-w4a8",
                    tokens=t,
                    tile="",
                    automatic=False,
                    active_experts=e,
                    us=exactly(us),
                    relative_error=0.03,
                    kernels=(KernelTime(name="gemm", duration_us=9, own_us=8),),
                )
                for t, e, us in theirs
            ),
        ],
        failures=[Failure(implementation="marlin", tokens=None, reason="vLLM is not installed")],
        rivals={"humming-w4a8": "version 0.1.19: padded"},
        host={"tokens": 1, "fused_moe_from_logits_us": 32.0, "fused_moe_us": 30.0},
    )
