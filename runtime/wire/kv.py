"""Keys and values on the wire: what a hand-over sends of a KV cache, to bytes and back.

A chunk holds consecutive positions of all the server's layers, so that a session is whole after every one. Its payload
is one array ``[layers, 2, kv_heads, tokens, row_width]``, keys before values, either as the cache stores it (float32,
or the codes of a quantized cache: exact), or for a float cache in 8 bits: int8 codes of that shape, then a float16
scale for each row, ``[layers, 2, kv_heads, tokens]`` (`isthmus.quant.kv.quantize_rows`). Numbers are little endian.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CodecError, NonFiniteError
from ...quant.kv import dequantize_rows, quantize_rows
from ..bundle import KVSpec
from . import isthmus_pb2 as pb

KVRows = NDArray[Any]
"""Keys and values ``[layers, 2, kv_heads, tokens, row_width]``, of the cache's dtype."""


def encode_rows(rows: KVRows, *, exact: bool) -> tuple[pb.KVChunk.Coding, bytes]:
    """How a chunk is sent, and its payload; in 8 bits if the cache is float32 and ``exact`` is not asked for.

    Raises:
        NonFiniteError: they hold NaN or infinity.
    """
    if rows.dtype != np.float32:
        return pb.KVChunk.STORED, rows.tobytes()
    _check_finite(rows)
    if not exact:
        codes, scales = quantize_rows(rows)
        if np.isfinite(scales).all():
            return pb.KVChunk.ROWS8, codes.tobytes() + scales.astype("<f2", copy=False).tobytes()
    return pb.KVChunk.STORED, rows.astype("<f4", copy=False).tobytes()


def decode_rows(chunk: pb.KVChunk, spec: KVSpec, layers: range) -> KVRows:
    """Keys and values of a chunk for a cache of these layers, every size checked before anything is allocated.

    Raises:
        CodecError: other layers, an unknown coding, or a payload that does not have the length of its tokens.
        NonFiniteError: it decodes to NaN or infinity.
    """
    if (chunk.first_layer, chunk.last_layer) != (layers.start, layers.stop):
        raise CodecError(
            f"keys and values of layers [{chunk.first_layer}, {chunk.last_layer}): this server's cache holds "
            f"[{layers.start}, {layers.stop}); send all of them"
        )
    if chunk.coding not in (pb.KVChunk.STORED, pb.KVChunk.ROWS8):
        raise CodecError(f"keys and values in coding {chunk.coding}: this server knows stored (0) and rows8 (1)")
    if chunk.coding == pb.KVChunk.ROWS8 and spec.bits != 32:
        raise CodecError(
            f"keys and values in rows8: this bundle's cache has {spec.bits} bits; send its codes as stored"
        )
    heads = len(layers), 2, spec.kv_heads, chunk.tokens
    values = math.prod(heads) * spec.row_width
    width = 1 if chunk.coding == pb.KVChunk.ROWS8 else np.dtype(spec.dtype).itemsize
    scales = 2 * math.prod(heads) if chunk.coding == pb.KVChunk.ROWS8 else 0
    if len(chunk.payload) != values * width + scales:
        raise CodecError(
            f"keys and values in {len(chunk.payload)} bytes: {chunk.tokens} tokens of {len(layers)} layers take "
            f"{values * width + scales}; send the chunk again"
        )
    shape = (*heads, spec.row_width)
    if chunk.coding == pb.KVChunk.ROWS8:
        codes = np.frombuffer(chunk.payload, np.int8, values).reshape(shape)
        factors = np.frombuffer(chunk.payload, "<f2", offset=values).reshape(heads)
        if not (np.isfinite(factors) & (factors >= 0)).all():
            raise NonFiniteError("keys and values with a scale that is NaN, infinite or negative; send finite values")
        return dequantize_rows(codes, factors)
    if spec.bits != 32:
        return np.frombuffer(chunk.payload, spec.dtype).reshape(shape)
    rows = np.frombuffer(chunk.payload, "<f4").reshape(shape).astype(np.float32)
    _check_finite(rows)
    return rows


def _check_finite(rows: NDArray[np.float32]) -> None:
    if not np.isfinite(rows).all():
        raise NonFiniteError("keys and values hold NaN or infinity; they must be finite")
