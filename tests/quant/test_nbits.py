"""Packed weights mean what onnxruntime's ``MatMulNBits`` makes of them."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from isthmus.devices.row_rule import row_rule
from isthmus.errors import ExportError
from isthmus.quant.nbits import PACKED_BITS, PackedWeight, dequantize, quantize_rtn, unpack
from isthmus.quant.opsc import BLOCK_SIZES

ALL_BLOCK_SIZES = (16, 32, 64, 128)
FLOAT_LEVELS, INT8_LEVEL = (0, 1), 4  # accuracy levels: float32 activations, int8 activations
FLOAT32 = np.finfo(np.float32)

Array = NDArray[np.float32]


def matmul_nbits(activations: Array, packed: PackedWeight, accuracy_level: int) -> Array:
    """``activations @ weight.T`` by the operator itself, its weights constant as in a segment."""
    return kernel(packed, accuracy_level).run(None, {"a": activations})[0]


def kernel(packed: PackedWeight, accuracy_level: int) -> ort.InferenceSession:
    rows = len(packed.codes)
    constants = {"codes": packed.codes, "scales": packed.scales}
    if packed.zero_points is not None:
        constants["zero_points"] = packed.zero_points
    node = helper.make_node(
        "MatMulNBits",
        ["a", *constants],
        ["y"],
        domain="com.microsoft",
        K=packed.columns,
        N=rows,
        bits=packed.bits,
        block_size=packed.block_size,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "kernel",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["m", packed.columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", rows])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def random_weight(rows: int, columns: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32)


def block_sums(values: Array, block_size: int) -> Array:
    """Sum over each block of columns, the last one padded with zeros: ``[rows, blocks]``."""
    return np.add.reduceat(values, np.arange(0, values.shape[1], block_size), axis=1)


def block_maxima(values: Array, block_size: int) -> Array:
    return np.maximum.reduceat(values, np.arange(0, values.shape[1], block_size), axis=1)


kernel_shapes = pytest.mark.parametrize(
    ("bits", "block_size", "columns"),
    [
        (bits, size, columns)
        for bits in PACKED_BITS
        for size in ALL_BLOCK_SIZES
        for columns in (40, size, 2 * size + 24)
    ],
)


every_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


@kernel_shapes
@pytest.mark.parametrize("accuracy_level", FLOAT_LEVELS)
@pytest.mark.parametrize("tokens", [1, 3])
@every_symmetry
def test_the_float_kernel_multiplies_with_the_dequantized_weight(
    bits: int, block_size: int, columns: int, accuracy_level: int, tokens: int, symmetric: bool
) -> None:
    packed = quantize_rtn(random_weight(24, columns), bits, block_size, symmetric=symmetric)
    activations = random_weight(tokens, columns, seed=1)
    weight = dequantize(packed).astype(np.float64)
    # Float32 sums of K products: an error of at most K half-ulps of the sum of magnitudes.
    bound = columns * FLOAT32.eps * (np.abs(activations) @ np.abs(weight).T)
    actual = matmul_nbits(activations, packed, accuracy_level)
    assert (np.abs(actual - activations @ weight.T) <= bound).all()


@kernel_shapes
@pytest.mark.parametrize("tokens", [1, 3])
@every_symmetry
def test_the_int8_kernel_differs_by_no_more_than_its_rounding_of_activations(
    bits: int, block_size: int, columns: int, tokens: int, symmetric: bool
) -> None:
    packed = quantize_rtn(random_weight(24, columns), bits, block_size, symmetric=symmetric)
    activations = random_weight(tokens, columns, seed=1)
    weight = dequantize(packed).astype(np.float64)
    # Activations are rounded to 127 steps a block: each is off by half a step at most.
    half_step = block_maxima(np.abs(activations), block_size) / 254
    bound = half_step @ block_sums(np.abs(weight), block_size).T + 1e-4
    actual = matmul_nbits(activations, packed, INT8_LEVEL)
    assert (np.abs(actual - activations @ weight.T) <= bound).all()


@pytest.mark.parametrize(
    ("bits", "block_size"), [(bits, size) for bits, sizes in BLOCK_SIZES.items() for size in sizes]
)
@pytest.mark.parametrize("columns", [48, 100, 576])
@every_symmetry
def test_a_row_has_the_same_bits_beside_as_many_rows_as_the_rule_asks_for(
    bits: int, block_size: int, columns: int, symmetric: bool
) -> None:
    session = kernel(quantize_rtn(random_weight(37, columns), bits, block_size, symmetric=symmetric), INT8_LEVEL)
    activations = random_weight(34, columns, seed=1)
    whole = session.run(None, {"a": activations})[0]
    rule = row_rule([(bits, block_size)])
    for tokens in sorted({rule.fill(tokens) for tokens in (1, 2, 3, 4, 5, 7, 8, 16, 33)}):
        for first in (0, 11, 34 - tokens):
            rows = slice(first, first + tokens)
            if rows.stop <= 34:
                assert np.array_equal(session.run(None, {"a": activations[rows]})[0], whole[rows])


SPECIAL_ROWS = {
    "zero": np.zeros(64),
    "negative zero": np.full(64, -0.0),
    "constant": np.full(64, 0.7),
    "constant negative": np.full(64, -0.7),
    "one value among zeros": np.eye(1, 64, 5)[0] * 3.0,
    "one negative value among zeros": np.eye(1, 64, 5)[0] * -3.0,
    "negative extreme": np.linspace(-2.0, 1.0, 64),
    "positive extreme": np.linspace(-1.0, 2.0, 64),
    "both extremes": np.linspace(-1.0, 1.0, 64),
    "huge": np.linspace(-1e38, 3e37, 64),
    "huge beside tiny": np.where(np.arange(64) % 2, 1e38, 1e-38),
    "tiny": np.linspace(-1e-30, 1e-30, 64),
    "denormal": np.linspace(-1e-40, 1e-40, 64),
}


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("name", SPECIAL_ROWS)
def test_special_rows_survive_the_kernel(name: str, bits: int) -> None:
    packed = quantize_rtn(SPECIAL_ROWS[name].astype(np.float32)[None], bits, 32)
    weight = dequantize(packed)
    assert np.isfinite(weight).all()
    assert np.isfinite(packed.scales).all()
    one_hot = np.eye(64, dtype=np.float32)
    assert np.array_equal(matmul_nbits(one_hot, packed, 0)[:, 0], weight[0])
    # A lone activation is its block's extreme, which int8 holds to the last bits; the zero point is subtracted after
    # the sum, so that the error is relative to the greatest weight.
    atol = 1e-6 * np.abs(weight).max()
    np.testing.assert_allclose(matmul_nbits(one_hot, packed, INT8_LEVEL)[:, 0], weight[0], rtol=1e-6, atol=atol)


def test_a_constant_block_is_exact_up_to_the_scale_s_rounding() -> None:
    for bits in PACKED_BITS:
        for value in (0.7, -0.7, 1e-20, 1e30):
            weight = np.full((1, 32), value, np.float32)
            np.testing.assert_allclose(dequantize(quantize_rtn(weight, bits, 32)), weight, rtol=1e-6)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_magnitude_takes_the_lowest_code(bits: int, sign: int) -> None:
    weight = np.zeros((1, 32), np.float32)
    weight[0, :3] = sign * np.array([8.0, -4.0, 2.0], np.float32)
    packed = quantize_rtn(weight, bits, 32)
    middle = 1 << (bits - 1)
    assert packed.scales[0, 0] == -sign * 8.0 / middle
    assert unpack(packed.codes, bits)[0, 0, 0] == 0
    assert dequantize(packed)[0, 0] == weight[0, 0]


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(bits: int, value: float) -> None:
    weight = random_weight(3, 64)
    weight[1, 40] = value
    with pytest.raises(ExportError, match="NaN or infinity"):
        quantize_rtn(weight, bits, 32)


values = st.one_of(st.floats(-bound, bound, width=32) for bound in (2.0**126, 2.0, 2.0**-120))
weights = st.tuples(st.integers(1, 3), st.integers(1, 80)).flatmap(lambda s: hnp.arrays(np.float32, s, elements=values))


@given(weights, st.sampled_from(PACKED_BITS), st.sampled_from(ALL_BLOCK_SIZES))
def test_every_value_is_rounded_to_the_nearest_code(weight: Array, bits: int, block_size: int) -> None:
    packed = quantize_rtn(weight, bits, block_size)
    assert packed.codes.shape == (len(weight), -(-weight.shape[1] // block_size), block_size * bits // 8)
    restored = dequantize(packed)
    assert restored.shape == weight.shape
    step = np.abs(np.repeat(packed.scales, block_size, axis=1)[:, : weight.shape[1]]).astype(np.float64)
    # Of two opposite extremes one has no code: there are as many codes below zero as above and zero together.
    highest = step * ((1 << (bits - 1)) - 1)
    opposite = np.sign(weight) == np.sign(np.repeat(packed.scales, block_size, axis=1)[:, : weight.shape[1]])
    within = ~opposite | (np.abs(weight) <= highest)
    error = np.abs(restored.astype(np.float64) - weight)
    # A block whose scale would be subnormal becomes zero.
    slack = 1e-5 * np.abs(weight) + float(FLOAT32.tiny) * (1 << (bits - 1))
    assert (error[within] <= (step / 2 + slack)[within]).all()
    assert (error <= step + slack).all()


@settings(max_examples=30, deadline=None)
@given(weights, st.sampled_from(PACKED_BITS), st.sampled_from(ALL_BLOCK_SIZES), st.booleans())
def test_the_kernel_reads_every_code_where_packing_put_it(
    weight: Array, bits: int, block_size: int, symmetric: bool
) -> None:
    packed = quantize_rtn(weight, bits, block_size, symmetric=symmetric)
    one_hot = np.eye(packed.columns, dtype=np.float32)
    assert np.array_equal(matmul_nbits(one_hot, packed, 0).T, dequantize(packed))


@given(
    st.sampled_from(PACKED_BITS),
    st.integers(1, 4).flatmap(lambda n: hnp.arrays(np.uint8, (n, 16), elements=st.integers(0, 255))),
)
def test_codes_unpack_lowest_bits_first(bits: int, packed: NDArray[np.uint8]) -> None:
    codes = unpack(packed, bits)
    assert codes.shape == (len(packed), 16 * 8 // bits)
    for column in range(codes.shape[1]):
        byte, lane = divmod(column * bits, 8)
        assert np.array_equal(codes[:, column], (packed[:, byte] >> lane) & ((1 << bits) - 1))
