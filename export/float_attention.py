"""Causal grouped-query attention with rotary embedding over one text, in NumPy, and its gradient.

Inside, the query heads that share a key head are *grouped*: ``[kv_heads, tokens * heads / kv_heads, head_dim]``, a
token's heads in neighbouring rows, so that one matrix product serves them all. Scores exist for `TILE_ROWS` tokens
at a time; the gradient computes them again, as FlashAttention does (Dao et al., arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.bundle import Architecture
from .rope import rope_tables

TILE_ROWS = 128  # tokens; a tile's scores then stay in the processor's cache

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Attention:
    """What the gradient needs of one attention, float32.

    Attributes:
        query: rotated and scaled, grouped.
        key: rotated, ``[kv_heads, tokens, head_dim]``.
        value: ``[kv_heads, tokens, head_dim]``.
        log_sums: logarithms of the softmax's denominators, one for each row of ``query``, ``[..., 1]``.
    """

    query: Floats
    key: Floats
    value: Floats
    log_sums: Floats


def attend(arch: Architecture, qkv: Floats) -> tuple[Floats, Attention]:
    """Attend to a text from its first token.

    Args:
        arch: heads, rotary settings and sliding window.
        qkv: projections of query, key and value side by side, ``[tokens, (heads + 2 * kv_heads) * head_dim]``;
            query and key are rotated in place.

    Returns:
        The mixed values ``[tokens, heads * head_dim]``, and what `attend_backward` needs.
    """
    _rotate(arch, qkv)
    width, kv_width = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    query, key, value = (_group(arch, part) for part in np.split(qkv, [width, width + kv_width], axis=1))
    query *= _query_scale(arch)
    mixed, log_sums = np.empty_like(query), np.empty((*query.shape[:2], 1), np.float32)
    for rows, keys, scores in _scores(arch, query, key):
        highest = scores.max(axis=2, keepdims=True)
        scores -= highest
        np.exp(scores, out=scores)
        sums = scores.sum(axis=2, keepdims=True)
        mixed[:, rows] = scores @ value[:, keys] / sums
        log_sums[:, rows] = np.log(sums) + highest
    return _ungroup(mixed, len(qkv)), Attention(query, key, value, log_sums)


def attend_backward(arch: Architecture, kept: Attention, attended: Floats, gradient: Floats) -> Floats:
    """Gradient with respect to the projections before their rotation, shaped like `attend`'s ``qkv``.

    Args:
        arch: as given to `attend`.
        kept: what it gave.
        attended: the values that it mixed.
        gradient: with respect to these, ``[tokens, heads * head_dim]``.
    """
    query, key, value = kept.query, kept.key, kept.value
    shared = _group(arch, gradient * attended).sum(axis=2, keepdims=True)
    mixed_gradient = _group(arch, gradient)
    query_gradient, key_gradient, value_gradient = np.empty_like(query), np.zeros_like(key), np.zeros_like(value)
    for rows, keys, scores in _scores(arch, query, key):
        scores -= kept.log_sums[:, rows]
        probabilities = np.exp(scores, out=scores)
        value_gradient[:, keys] += probabilities.swapaxes(1, 2) @ mixed_gradient[:, rows]
        score_gradient = mixed_gradient[:, rows] @ value[:, keys].swapaxes(1, 2)
        score_gradient -= shared[:, rows]
        score_gradient *= probabilities
        query_gradient[:, rows] = score_gradient @ key[:, keys]
        key_gradient[:, keys] += score_gradient.swapaxes(1, 2) @ query[:, rows]
    query_gradient *= _query_scale(arch)
    parts = (query_gradient, key_gradient, value_gradient)
    result = np.concatenate([_ungroup(part, len(gradient)) for part in parts], axis=1)
    _rotate(arch, result, back=True)
    return result


def _scores(arch: Architecture, query: Floats, key: Floats) -> Iterator[tuple[slice, slice, Floats]]:
    """Masked scores a few tokens at a time: grouped query rows, the keys that any of them sees, and their scores."""
    tokens, group = key.shape[1], arch.heads // arch.kv_heads
    window = arch.sliding_window or tokens
    for first in range(0, tokens, TILE_ROWS):
        last = min(first + TILE_ROWS, tokens)
        rows, keys = slice(first * group, last * group), slice(max(0, first + 1 - window), last)
        scores = query[:, rows] @ key[:, keys].swapaxes(1, 2)
        age = np.arange(first, last).repeat(group)[:, None] - np.arange(tokens)[keys]
        scores += np.where((age >= 0) & (age < window), np.float32(0), np.float32(-np.inf))
        yield rows, keys, scores


def _query_scale(arch: Architecture) -> np.float32:
    return np.float32(arch.head_dim**-0.5)


def _rotate(arch: Architecture, qkv: Floats, *, back: bool = False) -> None:
    """Apply the rotary embedding to query and key, or its transpose, in place."""
    rotated, half = arch.heads + arch.kv_heads, arch.head_dim // 2
    cos, sin = (table[:, None] for table in rope_tables(arch, len(qkv)))
    if back:
        sin = -sin
    heads = qkv.reshape(len(qkv), rotated + arch.kv_heads, arch.head_dim)[:, :rotated]
    first, second = heads[..., :half].copy(), heads[..., half:]
    heads[..., :half] = first * cos - second * sin
    second *= cos
    second += first * sin


def _group(arch: Architecture, columns: Floats) -> Floats:
    """``[tokens, n * head_dim]`` -> ``[kv_heads, tokens * n / kv_heads, head_dim]``."""
    by_head = columns.reshape(len(columns), arch.kv_heads, -1).swapaxes(0, 1)
    return np.ascontiguousarray(by_head.reshape(arch.kv_heads, -1, arch.head_dim))


def _ungroup(grouped: Floats, tokens: int) -> Floats:
    """The inverse of `_group`."""
    return grouped.reshape(len(grouped), tokens, -1).swapaxes(0, 1).reshape(tokens, -1)
