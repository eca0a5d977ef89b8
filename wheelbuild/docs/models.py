"""docs/models.md: the models that the loaders know, what each needs and whether it runs, and how checkpoints are named.

`python -m wheelbuild.docs.models` writes it, from the package's _checkpoints/models.py and schemes.py; `--check` says
whether it is current.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wheelbuild import ROOT, tile_model

if TYPE_CHECKING:
    from mxfp4_moe import activations
    from mxfp4_moe._checkpoints import config, models, router, schemes
else:  # by path, as tile_model.py loads `tiles`: the package need not be installed
    import importlib

    _PACKAGE = tile_model.archs.__package__
    activations = importlib.import_module(f"{_PACKAGE}.activations")
    config, models, router, schemes = (
        importlib.import_module(f"{_PACKAGE}._checkpoints.{name}") for name in ("config", "models", "router", "schemes")
    )

DOCUMENT = Path("docs/models.md")
MAX_EXPERTS = 1024  # csrc/moe/kernels.h, kMaxExperts

INTRODUCTION = """# Models

Written by `python -m wheelbuild.docs.models` from `_checkpoints/models.py` and `schemes.py`; a test keeps it current.

```
mxfp4-moe inspect PATH         # layers, naming, sizes, activation, router, and the calls that load a layer
```

```python
weights = mxfp4_moe.MoEWeights.from_pretrained("PATH", layer=3, device="cuda")
router = mxfp4_moe.load_router("PATH", layer=3, device="cuda")
out = mxfp4_moe.fused_moe_from_logits(hidden_states, router_logits, router, weights)
```

PATH is a model's directory, one of its .safetensors files, or its index. Names, dtypes and shapes come from the files'
headers; the activation and its numbers from the config.json beside them, whose sizes must be those of the tensors. What
you pass wins, with a warning where it contradicts. `ep_rank`, `ep_size`, `tp_rank` and `tp_size` read one rank's part.

## What each model needs

"Runs" is about the experts: sizes, activation and number of experts that this version has kernels for. Every model's
router is a `mxfp4_moe.Router`, which `load_router` reads from its config.json and files; the gate, which makes the
logits, stays the model's. Experts that are fixed by token id are a call with ids:
`select_experts(router_logits, router, topk_ids=tid2eid[input_ids])` weighs them. Every model has been loaded from a
small checkpoint in each of its namings, written by the tests, and compared with float64 on CPU, router included.

"""

NAMINGS = """
## What loading costs

`python -m mxfp4_moe.bench.layer_load` writes a layer of gpt-oss-120b's sizes with random weights and reads it, the
layer or one rank's part, each in a process of its own. Bytes are what the process read, headers included; memory is the
most that it had beyond the prepared layer, which two experts as the files have them bound (26.6 MB). torch 2.13 on two
cores of a CPU that others used too:

| part | CPU seconds | read, MB | prepared, MB | beyond it, MB |
|:--|--:|--:|--:|--:|
| the layer | 92 | 1733 | 1699 | 20.3 |
| rank 1 of 4, a quarter of the experts | 18 | 433 | 425 | 17.2 |
| rank 1 of 4, a quarter of each expert | 32 | 1708 | 434 | 13.5 |

A quarter of each expert reads nearly all: rows of one matrix are cut along the other's columns, so experts are read
whole and cut in memory. On a terminal a bar shows the experts that are done, after two seconds.

## Namings

N is a layer's number, E an expert's. Whatever stands before `layers.` fits, so that language models inside of others
load too; where several fit, `prefix=` says which, and where names alone do not tell, `scheme=` with a name from here.
uint8, int8 and float4_e2m1fn_x2 are taken as codes, uint8 and float8_e8m0fnu as scales: bytes, all of them.

Weights in bfloat16, float16 or float32 are quantized to MXFP4 when they are loaded. NVFP4 loads to the CPU, and in
wheels of profile `full` to GPUs, where hidden and intermediate size are multiples of 32. hf_quant_config.json and
config.json must not say that NVFP4 is something else, nor that MXFP4 is NVFP4. FP8, MXFP8 and integer weights have the
same names in places and are refused by their dtypes.

"""

COLUMNS = (
    *("Model", "hidden", "intermediate", "experts", "per token", "activation", "router"),
    *("what else", "namings", "runs"),
)


def _row(model: models.Model) -> list[str]:
    between, reason = _between(model)
    return [
        model.name,
        *(f"{size}" for size in (model.hidden_size, model.intermediate_size, model.num_experts, model.top_k)),
        between,
        _router(model),
        model.note,
        ", ".join(f"`{name}`" for name in model.schemes),
        reason or "yes",
    ]


def _between(model: models.Model) -> tuple[str, str]:
    """What stands between the model's GEMMs, and why it does not run, or ""."""
    stated = config.expert_config(Path("config.json"), model.config)
    reasons = [f"more than {MAX_EXPERTS} experts"] if model.num_experts > MAX_EXPERTS else []
    reasons += ["sizes"] if model.hidden_size % 32 or model.intermediate_size % 32 else []
    said = []
    for layer in (0, 1):  # limits may differ from layer to layer
        try:
            between = stated.between(layer)
        except ValueError:
            act = stated.raw.get("hidden_act")
            return f"{act}", "; ".join([*reasons, f"not yet: no kernel for {act}"])
        numbers = [("alpha", between.alpha), ("beta", between.beta)] if between.activation == "swiglu_oai" else []
        numbers += [("beta", between.beta)] if between.activation == "situ" else []
        numbers += [("limit", between.limit)] if between.limit is not None else []
        text = ", ".join([f"`{activations.Activation(between.activation).value}`", *(f"{n} {v:g}" for n, v in numbers)])
        said += [text] if text not in said else []
    return " or ".join(said), "; ".join(reasons)


def _router(model: models.Model) -> str:
    """What the model's config.json says of its router, in words."""
    stated = config.expert_config(Path("config.json"), model.config)
    scheme = router.router_scheme(stated)
    fields = router.config_fields(stated, scheme)
    words = [f"`{fields['scoring_func']}`"] + (["correction bias"] if router.has_bias(stated, scheme) else [])
    if "num_expert_group" in fields:
        words.append(f"the best {fields['topk_group']} of {fields['num_expert_group']} groups")
    words += ["renormalized"] if fields.get("renormalize", True) else []
    words += [f"times {fields['routed_scaling_factor']:g}"] if "routed_scaling_factor" in fields else []
    return ", ".join(words)


def _scheme(scheme: schemes.Scheme) -> str:
    prefix = f"{scheme.containers[0]}."
    rows = []
    for projection in scheme.projections:
        suffixes = (scheme.codes, scheme.scales, scheme.scale_2, scheme.input_scale, scheme.bias)
        for suffix in filter(None, suffixes):
            rows.append(scheme.tensor(prefix, "N", projection, suffix, "E"))
        if scheme.codes == "":
            rows.insert(-1, scheme.tensor(prefix, "N", projection, "", "E"))
    order = {"interleaved": "gate and up rows in turns", "gate_up": "gates, then ups"}[scheme.gate_up_order]
    layout = "one tensor for each expert" if scheme.per_expert else "experts stacked"
    gates = order if len(scheme.w13) == 1 else "gate and up in tensors of their own"
    facts = [layout, gates if scheme.gated else "no gate"]
    if scheme.is_nvfp4:
        kind = "divide what is read" if scheme.divide else "multiply what is read"
        facts.append(f"E4M3 scales of 16 values, and float32 scales that {kind}; those of inputs may be missing")
    facts += [] if scheme.is_packed else ["floating point" + (", stored [E, in, out]" if scheme.transposed else "")]
    facts += ["biases, where they are there" if not scheme.needs_bias else "biases"] if scheme.bias else []
    text = f"**`{scheme.name}`**: {scheme.written_by}; {', '.join(facts)}. Read in {'; '.join(scheme.sources)}."
    return _paragraph(text) + "\n\n```\n" + "\n".join(rows) + "\n```\n"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, width=120, break_long_words=False, break_on_hyphens=False)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; numbers to the right."""
    rule = ["--:" if name in ("hidden", "intermediate", "experts", "per token") else ":--" for name in COLUMNS]
    return "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, rule, *rows)) + "\n"


def document() -> str:
    """The text of docs/models.md."""
    by_sources: dict[tuple[str, ...], list[str]] = {}
    for model in models.MODELS:
        by_sources.setdefault(model.sources, []).append(model.name)
    sources = [_paragraph(f"{', '.join(names)}: {'; '.join(read)}.") for read, names in by_sources.items()]
    routers = [
        _paragraph(f"Router of {', '.join(row.model_types)}: {'; '.join(row.sources)}.") for row in router.ROUTERS
    ]
    words = (
        "Keys of config.json and routers were read in what follows. Sizes and routers' numbers are those that the "
        "models' makers publish; no model's own file was opened to compare them."
    )
    read_in = f"\n{_paragraph(words)}\n\n" + "\n\n".join([*sources, *routers]) + "\n"
    namings = NAMINGS + "\n".join(_scheme(scheme) for scheme in schemes.SCHEMES)
    return INTRODUCTION + _table([_row(model) for model in models.MODELS]) + read_in + namings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help=f"only say whether {DOCUMENT} is current")
    path, text = ROOT / DOCUMENT, document()
    if not parser.parse_args().check:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        print(f"{DOCUMENT} is not current: python -m wheelbuild.docs.models", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
