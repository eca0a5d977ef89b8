"""How many rows an expert gets when tokens choose uniformly. Pure; standard library alone."""

from __future__ import annotations

import functools
import math

from .facts import Layer

_EXACT_MEAN = 64.0
_NORMAL_VALUES = 64


@functools.cache
def _normal() -> tuple[float, ...]:
    """Equally likely values of the standard normal distribution."""
    from statistics import NormalDist  # it imports much, and few calls come here

    return tuple(NormalDist().inv_cdf((place + 0.5) / _NORMAL_VALUES) for place in range(_NORMAL_VALUES))


@functools.lru_cache(maxsize=1024)
def row_probabilities(tokens: int, top_k: int, experts: int) -> tuple[tuple[float, float], ...]:
    """(rows, probability) of one expert when each token picks top_k experts uniformly, as different ones as there are.

    With more choices than experts every token has each expert at least once. The rest is a binomial. Up to a mean of 64
    rows it is written out, as far as eight standard deviations; beyond, the normal distribution stands for it, at 64
    values that are equally likely.
    """
    each, rest = divmod(top_k, experts)
    always, p, mean = tokens * each, rest / experts, tokens * rest / experts
    if rest == 0:
        return ((always, 1.0),)
    deviation = math.sqrt(mean * (1 - p))
    if mean > _EXACT_MEAN:
        return tuple((always + mean + deviation * place, 1 / _NORMAL_VALUES) for place in _normal())
    high = min(tokens, math.ceil(mean + 8 * deviation) + 8)
    log_p, log_q, log_all = math.log(p), math.log1p(-p), math.lgamma(tokens + 1)

    def probability(rows: int) -> float:
        ways = log_all - math.lgamma(rows + 1) - math.lgamma(tokens - rows + 1)
        return math.exp(ways + rows * log_p + (tokens - rows) * log_q)

    return tuple((always + rows, probability(rows)) for rows in range(high + 1))


def expected_m_tiles(tokens: int, layer: Layer, m: int) -> float:
    """Mean number of m-tiles over all experts: each expert's rows round up to whole tiles."""
    rows = row_probabilities(tokens, layer.top_k, layer.experts)
    return layer.experts * sum(probability * math.ceil(count / m) for count, probability in rows)


def expected_active(tokens: int, layer: Layer) -> float:
    """Mean number of experts with a row."""
    missed = max(1.0 - layer.top_k / layer.experts, 0.0)  # by one token
    return layer.experts * (1.0 - float(missed**tokens))
