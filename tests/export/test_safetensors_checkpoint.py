import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from isthmus.errors import ModelError
from isthmus.export.checkpoint import normalize_config, open_checkpoint

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 8,
    "eos_token_id": 2,
}


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A directory with a config and one shard of two tensors, without a tokenizer."""
    write_json(tmp_path / "config.json", CONFIG)
    save_file({"a.weight": np.eye(3, dtype=np.float32), "b": np.ones(5, np.float16)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def with_tokenizer(folder):
    """The same directory with a tokenizer of three special tokens."""
    tokenizer = Tokenizer(BPE({"<s>": 0, "a": 1, "</s>": 2, "<|im_end|>": 3}, []))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_shard(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_are_read_as_float32(folder, dtype):
    values = np.random.default_rng(0).standard_normal((7, 3)).astype(dtype)
    save_file({"w": values, "scalar": np.array(2, dtype)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.names()) == ["scalar", "w"]
    assert checkpoint.shape("w") == (7, 3)
    for name, expected in (("w", values), ("scalar", np.array(2, dtype))):
        read = checkpoint.tensor(name)
        assert type(read) is np.ndarray and read.dtype == np.float32
        np.testing.assert_array_equal(read, expected.astype(np.float32))


def test_shards_are_joined_through_the_index(folder):
    (folder / "model.safetensors").unlink()
    save_file({"a": np.zeros(2, np.float32)}, folder / "model-1-of-2.safetensors")
    save_file({"b": np.ones(3, np.float32)}, folder / "model-2-of-2.safetensors")
    save_file({"c": np.ones(3, np.float32)}, folder / "consolidated.safetensors")
    weight_map = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.names()) == ["a", "b"]
    assert checkpoint.tensor("b").tolist() == [1, 1, 1]
    assert set(checkpoint.file_hashes()) == {"config.json", "model.safetensors.index.json", *weight_map.values()}


def test_missing_shard_is_named(folder):
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-7.safetensors"}})
    with pytest.raises(ModelError, match=r"model-7\.safetensors: missing"):
        open_checkpoint(folder)


def test_shard_without_a_promised_tensor_is_refused(folder):
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"z": "model.safetensors"}})
    with pytest.raises(ModelError, match="no tensor z"):
        open_checkpoint(folder)


def test_index_may_not_point_outside_the_directory(folder):
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../model.safetensors"}})
    with pytest.raises(ModelError, match="weight_map"):
        open_checkpoint(folder)


def test_missing_tensor_is_named(folder):
    checkpoint = open_checkpoint(folder)
    for read in (checkpoint.tensor, checkpoint.shape):
        with pytest.raises(ModelError, match=r"no tensor lm_head\.weight"):
            read("lm_head.weight")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "corrupt header"),
        (b"[]", b"", "corrupt header"),
        (b"{nonsense", b"", "corrupt header"),
        ({"w": {"dtype": "F32"}}, b"", "corrupt header"),
        ({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, bytes(4), "F8_E4M3; supported"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(15), "truncated"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, bytes(16), "unfit for shape"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}}, bytes(16), "unfit for shape"),
        ({"w": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}, bytes(16), "unfit for shape"),
    ],
)
def test_corrupt_shard_is_a_model_error(folder, header, data, message):
    write_shard(folder / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"\x10\x00", struct.pack("<Q", 1 << 60) + b"{}"])
def test_bad_header_length_is_a_model_error(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="header length"):
        open_checkpoint(folder)


def test_shard_cut_anywhere_is_a_model_error(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            open_checkpoint(folder)


def test_directory_without_readable_weights_is_refused(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="safe_serialization"):
        open_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path, folder):
    with pytest.raises(ModelError, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json and 0 \.gguf files"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(ModelError, match="give the directory"):
        open_checkpoint(folder / "model.safetensors")


def test_directory_with_one_gguf_file_is_that_file(tmp_path, source_tiny_gguf):
    source_tiny_gguf().write(tmp_path / "one.gguf")
    assert open_checkpoint(tmp_path).format == "gguf"
    source_tiny_gguf().write(tmp_path / "two.gguf")
    with pytest.raises(ModelError, match=r"2 \.gguf files"):
        open_checkpoint(tmp_path)


def test_already_quantized_weights_are_refused(folder):
    write_json(folder / "config.json", CONFIG | {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ModelError, match="gptq"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": "llama"}', '{"vocab_size": 3}'])
def test_corrupt_config_is_a_model_error(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_scaling": [1]}, "rotary settings"),
    ],
)
def test_impossible_config_values_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        normalize_config(CONFIG | changes, "config.json")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 500000}, 500000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, 5e5, LLAMA3),
    ],
)
def test_both_styles_of_rotary_settings_become_one(given, theta, scaling):
    config = normalize_config(CONFIG | given, "config.json")
    assert config["rope_theta"] == theta
    assert config["rope_scaling"] == scaling
    assert "rope_parameters" not in config


def test_defaults_are_filled_in():
    config = normalize_config(CONFIG | {"num_key_value_heads": None}, "config.json")
    assert (config["num_key_value_heads"], config["head_dim"], config["rms_norm_eps"]) == (4, 8, 1e-6)
    assert config["sliding_window"] is None and config["attention_bias"] is False


def test_sliding_window_that_is_switched_off_is_none():
    given = CONFIG | {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}
    assert normalize_config(given, "config.json")["sliding_window"] is None
    assert normalize_config(given | {"use_sliding_window": True}, "c")["sliding_window"] == 4096


def test_ties_follow_the_config_and_else_the_weights(folder):
    assert open_checkpoint(folder).config["tie_word_embeddings"] is True
    save_file({"lm_head.weight": np.zeros((8, 32), np.float32)}, folder / "model.safetensors")
    assert open_checkpoint(folder).config["tie_word_embeddings"] is False
    write_json(folder / "config.json", CONFIG | {"tie_word_embeddings": True})
    assert open_checkpoint(folder).config["tie_word_embeddings"] is True


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2"])
def test_model_saved_by_transformers_is_read_back(tmp_path, architecture):
    import transformers

    numbers = {k: v for k, v in CONFIG.items() if k != "model_type"}
    config = getattr(transformers, f"{architecture}Config")(**numbers, num_key_value_heads=2, rope_theta=3e4)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    assert sorted(checkpoint.names()) == sorted(state)
    for name, value in state.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), value)
    assert checkpoint.config["model_type"] == architecture.lower()
    assert checkpoint.config["rope_theta"] == 3e4


def test_snapshot_of_the_hub_is_called_by_its_id(folder, tmp_path):
    snapshot = tmp_path / "models--owner--tiny-model" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(snapshot / name)
    assert open_checkpoint(snapshot).name == "owner/tiny-model"


def test_tokenizer_files_are_gathered(with_tokenizer):
    write_json(
        with_tokenizer / "tokenizer_config.json",
        {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "chat_template": "{{ old }}"},
    )
    files = open_checkpoint(with_tokenizer).tokenizer()
    assert Tokenizer.from_str(files.tokenizer_json).encode("a").ids == [1]
    assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert files.bos_token == 0
    # </s> is declared, <|im_end|> known by its text.
    assert files.end_tokens == (2, 3)
    assert files.chat_template == "{{ old }}"
    (with_tokenizer / "chat_template.jinja").write_text("{{ new }}")
    assert open_checkpoint(with_tokenizer).tokenizer().chat_template == "{{ new }}"


def test_named_chat_templates_give_the_default_one(with_tokenizer):
    templates = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    write_json(with_tokenizer / "tokenizer_config.json", {"chat_template": templates})
    assert open_checkpoint(with_tokenizer).tokenizer().chat_template == "d"


def test_generation_config_may_list_end_tokens(with_tokenizer):
    write_json(with_tokenizer / "generation_config.json", {"eos_token_id": [1, 2]})
    assert open_checkpoint(with_tokenizer).tokenizer().end_tokens == (1, 2, 3)


def test_missing_tokenizer_says_how_to_make_one(folder):
    with pytest.raises(ModelError, match=r"AutoTokenizer\.from_pretrained"):
        open_checkpoint(folder).tokenizer()


@pytest.mark.parametrize("text", ["", "{}", "{cut"])
def test_corrupt_tokenizer_is_a_model_error(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="not a tokenizer"):
        open_checkpoint(folder).tokenizer()


def test_reading_tensor_by_tensor_keeps_one_tensor_in_memory(folder):
    shape, count = (1024, 1024), 8
    save_file({f"t{i}": np.ones(shape, ml_dtypes.bfloat16) for i in range(count)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    checkpoint.tensor("t0")
    tracemalloc.start()
    for name in checkpoint.names():
        checkpoint.tensor(name)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one = 4 * shape[0] * shape[1]
    assert left < one / 8
    assert peak < 1.2 * one
