import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.errors import ModelError
from isthmus.export import gguf_file
from isthmus.export.catalog import pull
from isthmus.export.checkpoint import open_checkpoint
from isthmus.export.gguf_file import GGUFFile

BLOCK_TYPES = [
    t
    for t in gguf.GGMLQuantizationType
    if t.name.startswith(("Q4", "Q5", "Q8_0", "Q2", "Q3", "Q6", "IQ", "TQ", "BF16", "F16", "F32", "MXFP4"))
]


def write_tensor(path, raw, kind):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tensors_have_hugging_face_names_and_row_order(tmp_path, source_tiny_gguf, architecture):
    tiny = source_tiny_gguf(architecture)
    checkpoint = open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))
    assert sorted(checkpoint.names()) == sorted(tiny.weights)
    for name, value in tiny.weights.items():
        assert checkpoint.shape(name) == value.shape
        np.testing.assert_array_equal(checkpoint.tensor(name), value, err_msg=name)


def test_metadata_becomes_config(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf()
    checkpoint = open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))
    assert (checkpoint.name, checkpoint.format) == ("tiny", "gguf")
    assert checkpoint.config == {
        "model_type": "llama",
        "vocab_size": len(tiny.tokens),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }


def test_untied_head_and_bias_show_in_config(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf("qwen2")
    tiny.tensors["output.weight"] = tiny.tensors["token_embd.weight"] + 1
    checkpoint = open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.config["attention_bias"] is True
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), tiny.tensors["output.weight"])


def test_llama3_rope_factors_appear_as_scaling(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf()
    tiny.tensors["rope_freqs.weight"] = np.array([1, 1, 4, 8], np.float32)
    checkpoint = open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))
    assert checkpoint.config["rope_scaling"] == {"rope_type": "factors", "factors": [1, 1, 4, 8]}
    assert not any("rope" in name for name in checkpoint.names())


def test_rope_factors_of_the_wrong_length_are_refused(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf()
    tiny.tensors["rope_freqs.weight"] = np.array([1, 1, 4], np.float32)
    with pytest.raises(ModelError, match="rope_freqs"):
        open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))


def test_yarn_metadata_becomes_scaling(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf("qwen2")
    tiny.metadata |= {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32,
    }
    scaling = open_checkpoint(tiny.write(tmp_path / "tiny.gguf")).config["rope_scaling"]
    assert scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def test_unknown_rope_scaling_is_refused(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf()
    tiny.metadata["llama.rope.scaling.type"] = "longrope"
    with pytest.raises(ModelError, match=r"longrope.*linear and yarn"):
        open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_every_tensor_type_is_dequantized_as_gguf_does(tmp_path, monkeypatch, kind):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns, rows = max(block, 32), 37
    row_bytes = columns // block * block_bytes
    # Small byte values keep float16 scales finite.
    raw = np.random.default_rng(1).integers(0, 60, (rows, row_bytes), np.uint8)
    monkeypatch.setattr(gguf_file, "_CHUNK_ELEMENTS", 5 * columns)
    file = GGUFFile(write_tensor(tmp_path / "t.gguf", raw, kind))
    expected = gguf.quants.dequantize(raw, kind)
    assert file.tensors["t.weight"].shape == (rows, columns)
    np.testing.assert_array_equal(file.tensor("t.weight"), expected)


def test_tensor_type_that_gguf_cannot_dequantize_is_refused(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_1
    raw = np.zeros((2, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    with pytest.raises(ModelError, match=r"Q8_1.*another quantization"):
        GGUFFile(write_tensor(tmp_path / "t.gguf", raw, kind))


def test_reading_tensor_by_tensor_keeps_one_tensor_in_memory(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama")
    rows, columns, count = 2048, 1024, 12
    row_bytes = columns // 32 * 34
    for i in range(count):
        raw = np.zeros((rows, row_bytes), np.uint8)
        writer.add_tensor(f"t{i}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "big.gguf")
    file.tensor("t0.weight")
    tracemalloc.start()
    for name in file.tensors:
        file.tensor(name)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one = rows * columns * 4
    assert left < one / 8
    # One tensor, and the temporaries of one chunk of a million elements: scales, products, their join.
    assert peak < one + 4 * (1 << 20) * 4
    assert peak < count * one / 3


def test_missing_tensor_is_named(tmp_path, source_tiny_gguf):
    checkpoint = open_checkpoint(source_tiny_gguf().write(tmp_path / "tiny.gguf"))
    for read in (checkpoint.tensor, checkpoint.shape):
        with pytest.raises(ModelError, match=r"model\.layers\.7"):
            read("model.layers.7.mlp.up_proj.weight")


def test_unsupported_architecture_is_named_with_the_supported_ones(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"'mamba'.*llama, qwen2"):
        open_checkpoint(tmp_path / "m.gguf")


def test_tensor_without_a_place_is_refused(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf()
    tiny.tensors["blk.0.ffn_gate_inp.weight"] = np.zeros((4, 32), np.float32)
    with pytest.raises(ModelError, match="ffn_gate_inp"):
        open_checkpoint(tiny.write(tmp_path / "moe.gguf"))


def test_one_part_of_several_is_refused(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf()
    tiny.metadata["split.count"] = 3
    with pytest.raises(ModelError, match=r"3 parts.*gguf-split --merge"):
        open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.embedding_length": 64}, "embedding_length is 64"),
        ({"llama.attention.head_count": 0}, "num_attention_heads is 0"),
        ({"llama.block_count": "1"}, "block_count is a str"),
        ({"llama.rope.dimension_count": 4}, "4 of 8 dimensions"),
        ({"llama.attention.key_length": 7}, "7 of 7 dimensions"),
        ({"general.alignment": 0}, "alignment"),
    ],
)
def test_contradicting_metadata_is_refused(tmp_path, source_tiny_gguf, change, message):
    tiny = source_tiny_gguf()
    tiny.metadata |= change
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))


def test_rows_that_do_not_match_the_heads_are_refused(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf()
    tiny.tensors["blk.0.attn_q.weight"] = np.zeros((31, 32), np.float32)
    checkpoint = open_checkpoint(tiny.write(tmp_path / "tiny.gguf"))
    with pytest.raises(ModelError, match="31 rows, not 32"):
        checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "no GGUF file"),
        (b"GG", "no GGUF file"),
        (b"PK\x03\x04" + bytes(64), "does not start with GGUF"),
        (b"GGUF", "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "truncated"),
        # A key "a" with an array of 2^60 float32 values, and with value type 99.
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 6, 1 << 60), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99), "value type 99"),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"\xff"), "UTF-8"),
        # A tensor "a" of type 200, and one with 9 dimensions.
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 32, 200, 0), "type 200"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"a", 9), "9 dimensions"),
    ],
)
def test_corrupt_header_is_a_model_error(tmp_path, start, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(start)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(path)


def test_file_cut_anywhere_is_a_model_error(tmp_path, source_tiny_gguf):
    whole = source_tiny_gguf().write(tmp_path / "tiny.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    # The last tensor (the final norm) ends exactly at the end of the file.
    for size in [*range(0, 2000, 61), *range(2000, len(whole), 2503), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            open_checkpoint(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_header_bits_never_raise_anything_but_model_errors(tmp_path, source_tiny_gguf, data):
    path = tmp_path / "tiny.gguf"
    if not path.exists():
        source_tiny_gguf().write(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 8000))] ^= 1 << data.draw(st.integers(0, 7))
    flipped = tmp_path / "flipped.gguf"
    flipped.write_bytes(content)
    try:
        checkpoint = open_checkpoint(flipped)
        checkpoint.tokenizer()
        for name in checkpoint.names():
            checkpoint.tensor(name)
    except ModelError as error:
        assert str(flipped) in str(error)


def test_hash_is_that_of_the_file(tmp_path, source_tiny_gguf):
    path = source_tiny_gguf().write(tmp_path / "tiny.gguf")
    before = open_checkpoint(path).file_hashes()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert list(before) == ["tiny.gguf"]
    assert open_checkpoint(path).file_hashes() != before


@pytest.mark.slow
def test_embedded_model_equals_transformers_reading():
    import torch
    from transformers import AutoModelForCausalLM

    path = pull("smollm2-135m-instruct")
    checkpoint = open_checkpoint(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = model.state_dict()
    assert set(checkpoint.names()) == set(state) - {"lm_head.weight"}
    for name in checkpoint.names():
        np.testing.assert_array_equal(checkpoint.tensor(name), state[name].numpy(), err_msg=name)
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "tie_word_embeddings", "vocab_size"):
        assert checkpoint.config[key] == getattr(model.config, key)
    assert checkpoint.config["rope_theta"] == model.config.rope_parameters["rope_theta"]
