"""What a checkpoint holds of experts: layers, naming, sizes, activation, router, and the calls that load a layer.

Reads headers and config.json, no weights. Exit status 0 where every layer with experts can be loaded, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from .._checkpoints.router import FoundRouter
from .._checkpoints.summary import Group, Summary, summarize
from .._router_rules import GroupScore, ScoringFunc

HELP = "what a checkpoint holds, and how it is loaded"

_SCHEMA = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a .safetensors file, an index, or a model's directory")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(arguments: argparse.Namespace) -> int:
    try:
        summary = summarize(arguments.path)
    except (FileNotFoundError, ValueError) as error:
        if arguments.json:
            print(json.dumps({"schema": _SCHEMA, "path": arguments.path, "problem": str(error)}, indent=1))
        else:
            print(error, file=sys.stderr)
        return 1
    print(json.dumps(summary_data(summary), indent=1) if arguments.json else summary_text(summary))
    return int(any(group.problem for group in summary.groups))


def summary_data(summary: Summary) -> dict[str, Any]:
    config = summary.config
    return {
        "schema": _SCHEMA,
        "path": str(summary.path),
        "model_type": None if config is None else config.model_type,
        "experts_per_token": None if config is None else config.top_k,
        "groups": [_group_data(group) for group in summary.groups],
    }


def _group_data(group: Group) -> dict[str, Any]:
    data = asdict(group)
    if group.router is not None:
        bias = group.router.bias
        data["router"] = {
            **vars(group.router.rule),
            "e_score_correction_bias": None if bias is None else {"name": bias.name, "dtype": bias.dtype},
            "table": group.router.table or None,
        }
    return data


def summary_text(summary: Summary) -> str:
    lines = [str(summary.path)]
    if summary.config is None:
        lines.append("  no config.json: nothing says what the activation is, but where the naming is one model's alone")
    else:
        lines.append(f"  config.json: {summary.config.model_type or 'no model_type'}")
    for group in summary.groups:
        lines += ["", *_group_lines(group, summary)]
    return "\n".join(lines)


def _group_lines(group: Group, summary: Summary) -> list[str]:
    count = len(group.layers)
    rows = {
        "layers": f"{group.prefix}{{{group.numbers}}}" + (f" ({count})" if count > 1 else ""),
        "naming": f"{group.scheme}: {group.written_by}",
    }
    if group.sizes is not None:
        top_k = summary.config.top_k if summary.config is not None else None
        per_token = f", {top_k} for each token" if top_k else ""
        rows["experts"] = f"{group.sizes.num_experts}{per_token}"
        rows["sizes"] = f"hidden {group.sizes.hidden_size}, intermediate {group.sizes.intermediate_size}"
        stored = (
            group.sizes.codes if group.sizes.scales is None else f"{group.sizes.codes}, scales {group.sizes.scales}"
        )
        quantized = "" if group.sizes.scales else ": quantized to MXFP4 when it is loaded"
        more = (", biases" * group.sizes.has_bias) + (", scales of inputs" * group.sizes.has_input_scales)
        rows["stored as"] = f"{stored}{quantized}{more}"
    if group.between is not None:
        numbers = {"limit": group.between.limit} if group.between.limit is not None else {}
        if group.between.activation == "swiglu_oai":
            numbers = {"alpha": group.between.alpha, "beta": group.between.beta, **numbers}
        if group.between.activation == "situ":
            numbers = {"beta": group.between.beta, **numbers}
        rows["activation"] = ", ".join(
            [group.between.activation, *(f"{name} {value}" for name, value in numbers.items())]
        )
    elif group.unknown:
        rows["activation"] = f"not known: {group.unknown}"
    if group.problem:
        rows["problem"] = group.problem
    else:
        rows["load"] = group.call
        if group.router is None:
            rows["router"] = f"not known: {group.router_unknown}"
        else:
            rows["router"] = _router_text(group.router)
            rows["weigh experts" if group.router.table else "load router"] = group.router_call
    width = max(map(len, rows))
    return [f"  {name:<{width}}  {text}" for name, text in rows.items()]


def _router_text(router: FoundRouter) -> str:
    rule = router.rule
    words = [ScoringFunc(rule.scoring_func).value]
    words += [f"correction bias ({router.bias.dtype})"] if router.bias is not None else []
    words += [f"experts by token id ({router.table})"] if router.table else [f"top-{rule.top_k}"]
    if rule.num_expert_group > 1:
        by = "its two highest added" if rule.group_score == GroupScore.TOP2_SUM else "its highest"
        words.append(f"the best {rule.topk_group} of {rule.num_expert_group} groups, each by {by}")
    words.append("renormalized" if rule.renormalize else "not renormalized")
    words += [f"times {rule.routed_scaling_factor:g}"] if rule.routed_scaling_factor != 1.0 else []
    return ", ".join(words)
