"""Which layers a checkpoint has, in which scheme, of what sizes: from names and headers, without reading weights."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .files import Checkpoint
from .headers import Entry
from .schemes import BY_NAME, EXPERT, HARMLESS, INPUT_SCALES, SCHEMES, Scheme

_CODES = ("U8", "I8", "F4")
_SCALES = ("U8", "F8_E8M0")
_NVFP4_SCALES = ("F8_E4M3",)
_FLOATS = ("BF16", "F16", "F32")
_SHOWN = 6  # layers, prefixes, names in a message


@dataclass(frozen=True, kw_only=True)
class FoundLayer:
    """The experts of one layer, as names show them.

    Attributes:
        prefix: all that stands before the layer's number, such as "model.layers.".
        num_experts: one more than the highest number, where each has tensors of its own; else None.
    """

    scheme: Scheme
    prefix: str
    layer: int
    num_experts: int | None

    def name(self, projection: str, suffix: str, expert: int | None = None) -> str:
        """A tensor's full name."""
        return self.scheme.tensor(self.prefix, self.layer, projection, suffix, expert)


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """What a layer's headers say."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_bias: bool
    codes: str  # dtypes as safetensors writes them
    scales: str | None
    has_input_scales: bool = False  # of NVFP4

    def __str__(self) -> str:
        return f"{self.num_experts} experts, hidden size {self.hidden_size}, intermediate size {self.intermediate_size}"


def find_layers(names: Iterable[str], schemes: Iterable[Scheme] = SCHEMES) -> Iterator[FoundLayer]:
    """Every layer that some scheme's names fit, by prefix and number; one may fit several, which dtypes tell apart."""
    return (found for found, lacking in _matches(names, schemes) if not lacking)


def _matches(names: Iterable[str], schemes: Iterable[Scheme]) -> Iterator[tuple[FoundLayer, list[str]]]:
    """Layers with the codes of a first projection, and which names of the scheme the last of its experts lacks."""
    by_name = {scheme.name: scheme for scheme in schemes}
    by_ending: dict[str, list[Scheme]] = defaultdict(list)
    for scheme in by_name.values():
        by_ending[scheme.ending].append(scheme)
    endings, every = tuple(by_ending), set(names)
    last: dict[tuple[str, int, str], int | None] = {}
    for name in every:
        if not name.endswith(endings):
            continue
        for scheme in (scheme for ending, some in by_ending.items() if name.endswith(ending) for scheme in some):
            if match := scheme.pattern.fullmatch(name):
                key = match["prefix"], int(match["layer"]), scheme.name
                last[key] = max(last.get(key) or 0, int(match["expert"])) if scheme.per_expert else None
    for (prefix, layer, scheme_name), expert in sorted(last.items(), key=lambda item: item[0]):
        scheme = by_name[scheme_name]
        count = None if expert is None else expert + 1
        found = FoundLayer(scheme=scheme, prefix=prefix, layer=layer, num_experts=count)
        wanted = [found.name(p, suffix, expert) for p in scheme.projections for suffix in scheme.tensor_suffixes]
        if scheme.needs_bias and scheme.bias is not None:
            wanted += [found.name(p, scheme.bias, expert) for p in scheme.projections]
        yield found, [name for name in wanted if name not in every]


def choose_layer(
    checkpoint: Checkpoint,
    layer: int,
    *,
    prefix: str | None = None,
    scheme: str | None = None,
    among: Iterable[Scheme] = SCHEMES,
) -> FoundLayer:
    """The one layer that is meant.

    Raises:
        ValueError: no such layer, another scheme than was named, weights of another format, or several that fit; the
            message says what the checkpoint has.
    """
    if scheme is not None:
        if scheme not in BY_NAME:
            raise ValueError(f"scheme: expected one of {', '.join(map(repr, BY_NAME))}, got {scheme!r}")
        among = (replace(BY_NAME[scheme], needs_bias=False),)
    among = tuple(among)
    every = list(find_layers(checkpoint.names(), among))
    if prefix is None:
        prefix = _only_prefix(every)
    here = [found for found in every if found.layer == layer and prefix in (None, found.prefix)]
    if not here:
        raise ValueError(_no_layer(checkpoint, every, layer, prefix, among))
    refused: list[str] = []
    fitting = []
    for found in here:
        why = other_format(checkpoint, found)
        if why is None:
            fitting.append(found)
        else:
            refused.append(why)
    if not fitting:
        raise ValueError(refused[0])
    if len(fitting) > 1:
        choices = ", ".join(repr(found.scheme.name) for found in fitting)
        raise ValueError(f"scheme: expected one of {choices}, since layer {layer} has tensors of each; got None")
    return fitting[0]


def is_draft(prefix: str) -> bool:
    """Whether layers behind a prefix are those of a draft model (multi-token prediction), which count from 0 too."""
    return "mtp" in prefix.split(".")


def _only_prefix(every: list[FoundLayer]) -> str | None:
    """The prefix that is meant where none is named: the model's, if there is one model.

    Also where another model has the number alone, it is not taken for what was asked.
    """
    prefixes = sorted({found.prefix for found in every})
    models = [prefix for prefix in prefixes if not is_draft(prefix)]
    if len(models) > 1 or (prefixes and not models):
        why = "each has layers of its own" if models else "they are a draft model's"
        raise ValueError(f"prefix: expected one of {', '.join(map(repr, prefixes))}, since {why}; got None")
    return models[0] if models else None


def other_format(checkpoint: Checkpoint, found: FoundLayer) -> str | None:
    """Why a layer whose names fit is of another format than the scheme's; None where it is of that."""
    scheme, expert = found.scheme, 0 if found.scheme.per_expert else None
    codes_name = found.name(scheme.w13[0], scheme.codes, expert)
    if codes_name not in checkpoint:
        return f"{codes_name}: no such tensor in {checkpoint.listing}, though there are others of its layer"
    codes = checkpoint.entry(codes_name)
    if scheme.scales is None:
        if codes.dtype in _FLOATS:
            return None
        return f"{codes_name}: expected {', '.join(_FLOATS)}, got {codes}: {_kind(codes.dtype, None)}"
    scales = checkpoint.entry(found.name(scheme.w13[0], scheme.scales, expert))
    allowed = _scale_dtypes(scheme)
    if codes.dtype in _CODES and scales.dtype in allowed:
        return None
    return (
        f"{codes_name}: expected {'NVFP4' if scheme.is_nvfp4 else 'MXFP4'}, codes in {', '.join(_CODES)} and scales in "
        f"{', '.join(allowed)}, got {codes} and scales {scales}: {_kind(codes.dtype, scales.dtype)}"
    )


def _scale_dtypes(scheme: Scheme) -> tuple[str, ...]:
    return _NVFP4_SCALES if scheme.is_nvfp4 else _SCALES


def _kind(codes: str, scales: str | None) -> str:
    """What the dtypes speak for, and what can be done with it."""
    other = "quantize the unquantized model with from_pretrained, or use its MXFP4 checkpoint"
    if codes == "F8_E4M3":
        return f"FP8 or MXFP8 weights, which this library has no kernels for; {other}"
    if scales == "F8_E4M3":
        lacks = "which comes with float32 scales (.weight_scale_2 or .weight_global_scale) that are not there"
        return f"NVFP4, whose blocks of 16 have E4M3 scales, and {lacks}; {other}"
    if codes in ("I32", "U32", "I64"):
        return f"integer weights packed in words (INT4, GPTQ, AWQ); {other}"
    if codes in _FLOATS:
        return "floating point weights under the names of quantized ones"
    return f"a format that is not known here; {other}"


def layer_sizes(checkpoint: Checkpoint, found: FoundLayer, *, gated: bool = True) -> LayerSizes:
    """The sizes of a layer, once all its tensors' shapes and dtypes are known to fit each other.

    Args:
        gated: whether w13 has two rows per output, a gate and an up, or one.

    Raises:
        ValueError: a tensor that is missing, or of another shape or dtype than the others ask for.
    """
    scheme, count, gated = found.scheme, found.num_experts, gated and found.scheme.gated

    def entry(projection: str, suffix: str, expert: int | None) -> Entry:
        return checkpoint.entry(found.name(projection, suffix, expert))

    first = 0 if scheme.per_expert else None
    w13, w2 = entry(scheme.w13[0], scheme.codes, first), entry(scheme.w2, scheme.codes, first)
    skip = 0 if scheme.per_expert else 1
    experts = count if count is not None else (w13.shape[0] if w13.shape else 0)
    hidden, rows = _matrix(w13, scheme, skip)
    inter, _ = _matrix(w2, scheme, skip)
    rows_expected = (2 if gated else 1) * inter // len(scheme.w13)
    if min(experts, hidden, inter) < 1 or hidden % scheme.block or inter % scheme.block or rows != rows_expected:
        raise ValueError(
            f"{w13.name}: expected {rows_expected} rows for an intermediate size of {inter}, which {w2.name} has, and "
            f"sizes that are multiples of {scheme.block}; got {w13}, which is {rows} rows of {hidden}"
        )
    biased = [scheme.bias is not None and found.name(p, scheme.bias, first) in checkpoint for p in scheme.projections]
    has_bias = any(biased)  # and then all have
    has_inputs = scheme.input_scale is not None and any(  # and then all have
        found.name(p, scheme.input_scale, e) in checkpoint for e in range(experts) for p in scheme.projections
    )
    singles = [suffix for suffix in (scheme.scale_2, scheme.input_scale if has_inputs else None) if suffix is not None]
    scales: str | None = None
    for expert in range(experts) if scheme.per_expert else (None,):
        for projection in scheme.projections:
            n, k = (hidden, inter) if projection == scheme.w2 else (rows, hidden)
            lead = () if scheme.per_expert else (experts,)
            codes = entry(projection, scheme.codes, expert)
            _check(codes, (w13.dtype,), _shapes(lead, n, k, scheme))
            if scheme.scales is not None:
                scale = entry(projection, scheme.scales, expert)
                _check(scale, (scales,) if scales else _scale_dtypes(scheme), [(*lead, n, k // scheme.block)])
                scales = scale.dtype
            for suffix in singles:
                _check(entry(projection, suffix, expert), ("F32",), [(), (1,)])
            if has_bias:
                assert scheme.bias is not None
                _check(entry(projection, scheme.bias, expert), _FLOATS, [(*lead, n)])
    _refuse_others(checkpoint, found, has_bias)
    return LayerSizes(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=inter,
        has_bias=has_bias,
        codes=w13.dtype,
        scales=scales,
        has_input_scales=has_inputs,
    )


def _refuse_others(checkpoint: Checkpoint, found: FoundLayer, has_bias: bool) -> None:
    """Refuses tensors beside a projection's own that would have a say in its values, such as zero points."""
    scheme = found.scheme
    path, _, _ = scheme.path.partition(EXPERT)
    stem = f"{found.prefix}{found.layer}.{path if scheme.per_expert else scheme.path + '.'}"
    number = r"\d+\." if scheme.per_expert else ""
    projections = "|".join(map(re.escape, scheme.projections))
    pattern = re.compile(rf"{re.escape(stem)}{number}(?:{projections})(?P<suffix>[._].*)?")
    known = {*scheme.tensor_suffixes, *HARMLESS} | ({scheme.bias or ""} if has_bias else set())
    if scheme.is_nvfp4:  # another writer's scales of inputs would be left out
        known -= {*INPUT_SCALES} - {scheme.input_scale}
    for name in checkpoint.names():
        match = pattern.fullmatch(name) if name.startswith(stem) else None
        if match and (match["suffix"] or "") not in known:
            having = ", ".join(sorted(filter(None, known)))
            raise ValueError(
                f"{name}: expected nothing but {having} of a projection in the naming of {scheme.name}, got "
                f"{checkpoint.entry(name)}: what it says of the weights is not known here"
            )


def _matrix(entry: Entry, scheme: Scheme, skip: int) -> tuple[int, int]:
    """(K, N) of a projection's codes."""
    shape = entry.shape[skip:]
    if len(shape) < 2:
        return 0, 0
    if not scheme.is_packed:
        return (shape[0], shape[1]) if scheme.transposed else (shape[1], shape[0])
    return 2 * math.prod(shape[1:]), shape[0]


def _shapes(lead: tuple[int, ...], n: int, k: int, scheme: Scheme) -> list[tuple[int, ...]]:
    if not scheme.is_packed:
        return [(*lead, k, n) if scheme.transposed else (*lead, n, k)]
    return [(*lead, n, k // 2)] if scheme.is_nvfp4 else [(*lead, n, k // 2), (*lead, n, k // scheme.block, 16)]


def _check(entry: Entry, dtypes: tuple[str, ...], shapes: list[tuple[int, ...]]) -> None:
    if entry.dtype not in dtypes or entry.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{entry.name}: expected {' or '.join(dtypes)} {expected}, got {entry} in {entry.file}")


def _no_layer(
    checkpoint: Checkpoint, every: list[FoundLayer], layer: int, prefix: str | None, among: tuple[Scheme, ...]
) -> str:
    """Why there is no such layer, beginning with a name that was looked for."""
    partial = [
        (lacking, found.scheme)
        for found, lacking in _matches(checkpoint.names(), among)
        if found.layer == layer and prefix in (None, found.prefix)
    ]
    if partial:
        lacking, scheme = min(partial, key=lambda item: len(item[0]))
        message = f"{lacking[0]}: no such tensor in {checkpoint.listing}, and {scheme.name} needs it"
        if not scheme.needs_bias:
            return message
        return (
            f"{message}: other models have the other names too, and other layouts; scheme={scheme.name!r} says that it "
            "is this one, and MoEWeights.from_float takes any tensors"
        )
    like = [found for found in every if prefix in (None, found.prefix)]
    shown = _of_this_format(checkpoint, like)
    scheme = shown.scheme if shown else among[0]
    looked_for = scheme.tensor(
        shown.prefix if shown else (prefix or "model.layers."),
        layer,
        scheme.w13[0],
        scheme.codes,
        0 if scheme.per_expert else None,
    )
    message = f"{looked_for}: no such tensor in {checkpoint.listing}"
    if shown:
        return f"{message}; it has experts in layers {numbers_in_words(f.layer for f in like)} ({scheme.name})"
    if every:
        return f"{message}; it has experts under the prefixes {', '.join(sorted({repr(f.prefix) for f in every}))}"
    if other := _of_this_format(checkpoint, list(find_layers(checkpoint.names()))):
        return (
            f"{message}; it has experts in the naming of {other.scheme.name}: "
            f"MoEWeights.from_pretrained({str(checkpoint.path)!r}, layer={other.layer})"
        )
    return f"{message}; {no_experts(checkpoint)}"


def _of_this_format(checkpoint: Checkpoint, layers: list[FoundLayer]) -> FoundLayer | None:
    """The first layer whose dtypes are its scheme's too; several schemes may have a layer's names."""
    for found in layers:
        try:
            if other_format(checkpoint, found) is None:
                return found
        except (ValueError, FileNotFoundError):  # its file is damaged or missing
            continue
    return layers[0] if layers else None


def no_experts(checkpoint: Checkpoint) -> str:
    """What to say of a checkpoint in which no naming was found."""
    names = sorted(checkpoint.names())
    names = [name for name in names if "expert" in name] or [name for name in names if ".mlp." in name] or names
    shown = ", ".join(names[:_SHOWN]) or "none"
    return (
        f"{checkpoint.listing}: no experts in a naming that is known (docs/models.md); it has tensors such as {shown}; "
        "MoEWeights.from_mxfp4 and from_float take tensors of any name"
    )


def numbers_in_words(layers: Iterable[int]) -> str:
    """0 to 3, 5, 7 to 9."""
    runs: list[list[int]] = []
    for number in sorted(set(layers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
