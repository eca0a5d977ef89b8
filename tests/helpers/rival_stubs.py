"""Stand-ins for packages that need a GPU which is not here: the calls that `bench` makes of them, computed in float32.

Each reads weights and scales in the layout that the package's source says it takes, so that a wrong one shows. Written
into a folder as packages.
"""

from __future__ import annotations

from pathlib import Path

_FLASHINFER = """
from mxfp4_moe.flashinfer_api import cutlass_fused_moe as _call, mxfp8_quantize

def checked(*args, **named):
    tokens, hidden = args[0].shape
    assert hidden % 128 == 0 and args[4].shape[2] * 16 % 128 == 0, "FlashInfer's own checks"
    assert args[1].shape == args[2].shape == (tokens, args[1].shape[1])
    return _call(*args, **named)
"""

_COMMON = """
import torch
from mxfp4_moe.formats import dequantize_mxfp4

def swiglu(x, limit):
    up, gate = x.chunk(2)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * gate.sigmoid() * up

def layer(x, ids, weights, w13, w2, limit):
    out = torch.zeros_like(x, dtype=torch.float32)
    for t in range(len(x)):
        for e, weight in zip(ids[t].tolist(), weights[t].tolist()):
            out[t] += weight * (w2[e] @ swiglu(w13[e] @ x[t].float(), limit))
    return out
"""

_SM12X = {
    "moe_mxfp8_q0_route_triton": """
def make_mxfp8_q0_route_workspace(x, topk_ids, num_experts):
    return (x.shape, topk_ids.shape)

def mxfp8_q0_route_triton(x, ids, weights, experts, *, workspace, enable_pdl):
    assert workspace == (x.shape, ids.shape)
    return "offsets", ids, weights, x, "scale"
""",
    "moe_mxfp8_mxfp4_fc1_act_q1": """
kept = []

def out_sf_shape(m, n, experts):
    return (-(-n // 512), m)

def cute_dsl_sm12x_fc1_act_q1_mxfp8_mxfp4(
    codes, scale, w, w_scale, offsets, *, tune, enable_pdl, activation, swiglu_limit, out_q, out_sf
):
    kept[:] = [(codes, w, w_scale, swiglu_limit)]
""",
    "moe_mxfp8_mxfp4_fc2_finalize": """
from flashinfer.common import layer, dequantize_mxfp4
from .moe_mxfp8_mxfp4_fc1_act_q1 import kept

def values(w, scale):
    experts, rows, half_k = w.shape
    assert half_k % 64 == 0
    assert scale.shape == (experts, half_k // 64, 4 * rows)
    plain = scale.view(experts, half_k // 64, rows, 4).transpose(1, 2).reshape(experts, rows, -1)
    return dequantize_mxfp4(w, plain)

def cute_dsl_sm12x_fc2_finalize_mxfp8_mxfp4(
    codes, scale, w, w_scale, offsets, ids, weights, tokens, *, tune, enable_pdl, out
):
    (x, w13, w13_scale, limit), = kept
    assert tokens == len(x)
    out.copy_(layer(x, ids, weights, values(w13, w13_scale), values(w, w_scale), limit))
""",
}

_B12X = """
from .common import layer, dequantize_mxfp4

def plan_weights(*, quant_modes, source_format, activation, params_dtype, num_experts, hidden_size, intermediate_size,
                 w13_layout):
    assert (quant_modes, source_format, activation, w13_layout) == ("w4a8_mx", "fp4_e8m0_k32", "silu", "up_gate")
    return (num_experts, hidden_size, intermediate_size)

def prepare_weights(*, plan, params_dtype, w1_fp4, w2_fp4, w1_global_scale, w2_global_scale, w1_blockscale,
                    w2_blockscale, a1_gscale, a2_gscale):
    experts, hidden, inter = plan
    assert w1_fp4.shape == (experts, 2 * inter, hidden // 2)
    assert w1_blockscale.shape == (experts, 2 * inter, hidden // 32)
    return dequantize_mxfp4(w1_fp4, w1_blockscale), dequantize_mxfp4(w2_fp4, w2_blockscale)

class Caps:
    def __init__(self, *, max_tokens, num_topk, device, weight_plan, quant_mode):
        self.max_tokens = max_tokens

class _Scratch:
    def shapes_and_dtypes(self):
        import torch
        return (((64,), torch.uint8),)

def plan(caps):
    return _Scratch()

def bind(plan, *, scratch, a, experts, topk_weights, topk_ids, output):
    assert len(scratch) == 1
    return (a, topk_ids, topk_weights, *experts, output)

def run(*, binding):
    *call, output = binding
    return output.copy_(layer(*call, float("inf")))
"""


def write(folder: Path) -> None:
    """Puts both packages into a folder."""
    files = {
        "flashinfer/__init__.py": _FLASHINFER,
        "flashinfer/common.py": _COMMON,
        "flashinfer/fused_moe/__init__.py": "from flashinfer import checked as cutlass_fused_moe",
        "flashinfer/fused_moe/cute_dsl/__init__.py": "",
        "flashinfer/fused_moe/cute_dsl/blackwell_sm12x/__init__.py": "",
        "flashinfer/tllm_enums.py": "from mxfp4_moe.flashinfer_api import ActivationType",
        "b12x/__init__.py": "",
        "b12x/moe/__init__.py": "",
        "b12x/moe/fused_moe/__init__.py": _B12X,
        "b12x/moe/fused_moe/api.py": "",
        "b12x/moe/fused_moe/common.py": _COMMON,
    }
    files |= {f"flashinfer/fused_moe/cute_dsl/blackwell_sm12x/{name}.py": text for name, text in _SM12X.items()}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
