"""Models written as bytes are what the onnx package reads, and what onnxruntime runs."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from isthmus.devices.onnx_bytes import CONTRIB, IR_VERSION, OPSET, model, node, tensor, value


def test_the_onnx_package_reads_the_same_model() -> None:
    weight = np.arange(300, dtype=np.float32).reshape(3, 100)
    written = model(
        [node("MatMul", ["x", "w"], ["h"]), node("Q", ["h", "", "c"], ["y"], CONTRIB, bits=4, N=300)],
        [tensor("w", weight), tensor("c", np.array([[1, 255]], np.uint8))],
        [value("x", np.float32, [1, "rows", 3]), value("n", np.int32, [])],
        [value("y", np.float32, [1, "rows", 100])],
    )
    read = onnx.load_from_string(written)
    assert read.ir_version == IR_VERSION
    assert {item.domain: item.version for item in read.opset_import} == {"": OPSET, CONTRIB: 1}
    graph = read.graph
    assert [(n.op_type, n.domain, list(n.input), list(n.output)) for n in graph.node] == [
        ("MatMul", "", ["x", "w"], ["h"]),
        ("Q", CONTRIB, ["h", "", "c"], ["y"]),
    ]
    assert {a.name: onnx.helper.get_attribute_value(a) for a in graph.node[1].attribute} == {"bits": 4, "N": 300}
    assert np.array_equal(numpy_helper.to_array(graph.initializer[0]), weight)
    assert np.array_equal(numpy_helper.to_array(graph.initializer[1]), [[1, 255]])
    dims = graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == [1, "rows", 3]
    assert graph.input[1].type.tensor_type.elem_type == onnx.TensorProto.INT32
    assert graph.input[1].type.tensor_type.HasField("shape")  # a scalar, not a tensor of unknown rank


def test_onnxruntime_runs_it() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 5), np.float32)
    written = model(
        [node("MatMul", ["x", "w"], ["y"])],
        [tensor("w", weight)],
        [value("x", np.float32, ["rows", 4])],
        [value("y", np.float32, ["rows", 5])],
    )
    x = np.ones((2, 4), np.float32)
    result = ort.InferenceSession(written, providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]
    np.testing.assert_allclose(result, x @ weight, rtol=1e-6)
