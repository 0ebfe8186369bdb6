"""One ONNX file under construction, its weights streamed to an external data file as they come.

Only the tensor in hand is in memory: `GraphWriter.weight` appends to the data file and keeps a reference. So a second
graph over the same weights costs a few kilobytes: `GraphWriter.only` marks what the one has and the other has not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

ALIGNMENT = 4096  # a page, so that onnxruntime can map each tensor from the file
INLINE_BYTES = 1024
OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"
PLAIN = ""  # the variant that has no name of its own

Dimension = int | str
T = TypeVar("T")


class GraphWriter:
    """Builds ``<name>.onnx`` with ``<name>.onnx.data`` in a folder, and ``<name>.<variant>.onnx`` beside it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.graph_path = folder / f"{name}.onnx"
        self.data_path = folder / f"{name}.onnx.data"
        self.offsets: dict[str, int] = {}
        self._name = name
        self._data = self.data_path.open("wb")
        # Each with the one variant that has it, None where all have.
        self._nodes: list[tuple[str | None, onnx.NodeProto]] = []
        self._inputs: list[tuple[str | None, onnx.ValueInfoProto]] = []
        self._weights: list[onnx.TensorProto] = []
        self._outputs: list[tuple[str | None, onnx.ValueInfoProto]] = []
        self._shapes: list[onnx.ValueInfoProto] = []
        self._counter = itertools.count()
        self._variant: str | None = None

    @contextmanager
    def only(self, variant: str) -> Iterator[None]:
        """Declare inputs and outputs and append nodes that only one variant of the graph has."""
        self._variant = variant
        try:
            yield
        finally:
            self._variant = None

    def input(self, name: str, shape: list[Dimension], dtype: int = TensorProto.FLOAT) -> str:
        """Declare a graph input."""
        self._inputs.append((self._variant, helper.make_tensor_value_info(name, dtype, shape)))
        return name

    def output(self, name: str, shape: list[Dimension], dtype: int = TensorProto.FLOAT) -> None:
        """Declare a graph output, produced by a node of that name."""
        self._outputs.append((self._variant, helper.make_tensor_value_info(name, dtype, shape)))

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
        self._nodes.append((self._variant, helper.make_node(op, inputs, outputs, domain=domain, **attributes)))
        return outputs

    @contextmanager
    def branch(self, condition: str, chosen: str, otherwise: str, shape: list[Dimension]) -> Iterator[None]:
        """Append nodes that run where a condition holds.

        Args:
            condition: a bool of one element.
            chosen: the float value of these nodes that comes out.
            otherwise: the value, made before, that comes out where it does not hold.
            shape: of both.
        """
        first = len(self._nodes)
        yield
        inner = [node for _, node in self._nodes[first:]]
        del self._nodes[first:]
        as_is = helper.make_node("Identity", [otherwise], [self.fresh("otherwise")])
        branches = {
            name: helper.make_graph(
                nodes, name, [], [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, shape)]
            )
            for name, nodes in (("then_branch", inner), ("else_branch", [as_is]))
        }
        self.node("If", [condition], output=chosen, **branches)

    def fresh(self, stem: str) -> str:
        """A value name that is not taken."""
        return f"{stem}.{next(self._counter)}"

    def variant_path(self, variant: str) -> Path:
        """Where a variant is written."""
        return self.graph_path.with_suffix(f".{variant}.onnx") if variant else self.graph_path

    def save(self) -> None:
        """Write the graph file and those of its variants, and close the data file."""
        self._data.close()
        variants = {variant for variant, _ in self._nodes if variant}
        for variant in (PLAIN, *sorted(variants)):
            self.variant_path(variant).write_bytes(self._model(variant).SerializeToString())

    def _model(self, variant: str) -> onnx.ModelProto:
        nodes, inputs, outputs = _of(variant, self._nodes), _of(variant, self._inputs), _of(variant, self._outputs)
        read = set(_read(nodes))
        weights = [tensor for tensor in self._weights if tensor.name in read]
        made = {name for node in nodes for name in node.output}
        shapes = [shape for shape in self._shapes if shape.name in made]
        graph = helper.make_graph(nodes, self._name, inputs, outputs, weights, value_info=shapes)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
            producer_name="isthmus",
        )
        model.ir_version = IR_VERSION
        return model


def _read(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Names of all values that nodes and their branches take."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            yield from _read(attribute.g.node)


def _of(variant: str, entries: list[tuple[str | None, T]]) -> list[T]:
    """What a variant has, of entries with the one that has them or None for all."""
    return [entry for owner, entry in entries if owner in (None, variant)]
