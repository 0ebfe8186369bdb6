"""ONNX models of a few operators, written as bytes: the device does without the onnx package.

An ONNX file is a protobuf message; only the fields that onnxruntime needs are written here. Their numbers are those
of ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IR_VERSION = 10
OPSET = 21
CONTRIB = "com.microsoft"

Array = NDArray[np.float32] | NDArray[np.uint8] | NDArray[np.int32]

_TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int32): 6}
_VARINT, _BYTES = 0, 2
_ATTRIBUTE_INT = 2


def tensor(name: str, array: Array) -> bytes:
    """A TensorProto: a weight of that name."""
    dims = b"".join(_integer(1, size) for size in array.shape)
    kind = _integer(2, _TYPES[array.dtype])
    return b"".join((dims, kind, _text(8, name), _field(9, np.ascontiguousarray(array).tobytes())))


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: int) -> bytes:
    """A NodeProto; an empty name leaves an input or output out."""
    parts = [_text(1, name) for name in inputs] + [_text(2, name) for name in outputs] + [_text(4, op)]
    parts += [
        _field(5, _text(1, name) + _integer(3, value) + _integer(20, _ATTRIBUTE_INT))
        for name, value in attributes.items()
    ]
    return b"".join((*parts, _text(7, domain)))


def value(name: str, dtype: type[np.float32 | np.int32], shape: Sequence[int | str]) -> bytes:
    """A ValueInfoProto: an input or output of the graph, with names for dimensions that vary."""
    dims = [_field(1, _text(2, size) if isinstance(size, str) else _integer(1, size)) for size in shape]
    tensor_type = _integer(1, _TYPES[np.dtype(dtype)]) + _field(2, b"".join(dims))
    return _text(1, name) + _field(2, _field(1, tensor_type))


def model(nodes: Sequence[bytes], weights: Sequence[bytes], inputs: Sequence[bytes], outputs: Sequence[bytes]) -> bytes:
    """A ModelProto of `node`, `tensor` and `value` messages."""
    numbered = ((1, nodes), (5, weights), (11, inputs), (12, outputs))
    graph = b"".join([_text(2, "graph"), *(_field(number, item) for number, items in numbered for item in items)])
    opsets = [_field(8, _text(1, domain) + _integer(2, version)) for domain, version in (("", OPSET), (CONTRIB, 1))]
    return b"".join((_integer(1, IR_VERSION), _field(7, graph), *opsets))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _integer(field: int, number: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(number)


def _field(field: int, payload: bytes) -> bytes:
    return b"".join((_varint(field << 3 | _BYTES), _varint(len(payload)), payload))


def _text(field: int, text: str) -> bytes:
    return _field(field, text.encode())
