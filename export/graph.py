"""One ONNX file under construction, its weights streamed to an external data file as they come.

Only the tensor in hand is in memory: `GraphWriter.weight` appends to the data file and keeps a reference.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

ALIGNMENT = 4096  # a page, so that onnxruntime can map each tensor from the file
INLINE_BYTES = 1024
OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"

Dimension = int | str


class GraphWriter:
    """Builds ``<name>.onnx`` with ``<name>.onnx.data`` in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.graph_path = folder / f"{name}.onnx"
        self.data_path = folder / f"{name}.onnx.data"
        self.offsets: dict[str, int] = {}
        self._name = name
        self._data = self.data_path.open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._shapes: list[onnx.ValueInfoProto] = []
        self._counter = itertools.count()

    def input(self, name: str, shape: list[Dimension], dtype: int = TensorProto.FLOAT) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: list[Dimension], dtype: int = TensorProto.FLOAT) -> None:
        """Declare a graph output, produced by a node of that name."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def shape(self, name: str, shape: list[Dimension]) -> str:
        """State the shape of a float value where onnxruntime cannot infer it."""
        self._shapes.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def weight(self, name: str, array: NDArray[Any], *, external: bool = False) -> str:
        """Add an initializer; large ones, or any if ``external``, go to the data file at once."""
        array = np.ascontiguousarray(array)
        if array.nbytes < INLINE_BYTES and not external:
            self._weights.append(numpy_helper.from_array(array, name))
            return name
        padding = -self._data.tell() % ALIGNMENT
        self._data.write(bytes(padding))
        offset = self._data.tell()
        self._data.write(array.data)
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.data_path.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.offsets[name] = offset
        self._weights.append(tensor)
        return name

    def constant(self, name: str, array: NDArray[Any], *, external: bool = False) -> str:
        """Add an initializer once; later calls with the same name reuse it."""
        if all(tensor.name != name for tensor in self._weights):
            self.weight(name, array, external=external)
        return name

    def node(
        self, op: str, inputs: list[str], *, output: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Append a node with one output; returns the output's name."""
        return self.node_outputs(op, inputs, [output or self.fresh(op)], domain=domain, **attributes)[0]

    def node_outputs(
        self, op: str, inputs: list[str], outputs: list[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node with the outputs named; an empty name leaves one out."""
        self._nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs

    def fresh(self, stem: str) -> str:
        """A value name that is not taken."""
        return f"{stem}.{next(self._counter)}"

    def save(self) -> None:
        """Write the graph file and close the data file."""
        self._data.close()
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, self._weights, value_info=self._shapes
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
            producer_name="isthmus",
        )
        model.ir_version = IR_VERSION
        self.graph_path.write_bytes(model.SerializeToString())
