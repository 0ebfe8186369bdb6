import pytest
from tokenizers import Tokenizer

from isthmus.errors import ModelError
from isthmus.export.catalog import pull
from isthmus.export.checkpoint import open_checkpoint

TEXTS = [
    "Hello world",
    "In 2024 there were 365.25 days, 1,000,000 seconds short.",
    "naïve café, Zürich; Ελληνικά, Русский, العربية, हिन्दी",
    "日本語のテキスト 中文字符 한국어",
    "👩‍👩‍👧 family, 🎉🎉 and 🏳️‍🌈",
    "  leading, \t tabs,\n\n\nlines \r\n and trailing   ",
    "def f(x: int) -> float:\n    return x**2 # squared != x^2\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "don't I'LL we've",
    "a<|endoftext|>b",
    "",
]


def load(files):
    return Tokenizer.from_str(files.tokenizer_json)


def byte_level(tiny, path, **metadata):
    tiny.metadata.update(metadata)
    return open_checkpoint(tiny.write(path / "tiny.gguf")).tokenizer()


def pieces(tiny, path, text, **metadata):
    return load(byte_level(tiny, path, **metadata)).encode(text).tokens


def test_merges_and_special_tokens_encode_and_decode(tmp_path, source_tiny_gguf):
    tokenizer = load(byte_level(source_tiny_gguf(), tmp_path))
    encoded = tokenizer.encode("<|im_start|>hello é<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "hello", "Ġ", "Ã", "©", "<|im_end|>"]
    assert encoded.ids[0] == 1 and encoded.ids[-1] == 2
    assert tokenizer.decode(encoded.ids) == "hello é"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "<|im_start|>hello é<|im_end|>"


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_any_text_survive(tmp_path, source_tiny_gguf, text):
    tokenizer = load(byte_level(source_tiny_gguf(), tmp_path))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "digits"),
    [
        ("gpt-2", ["12345"]),
        ("default", ["12345"]),
        ("smollm", ["1", "2", "3", "4", "5"]),
        ("qwen2", ["1", "2", "3", "4", "5"]),
        ("tekken", ["1", "2", "3", "4", "5"]),
        ("llama-bpe", ["123", "45"]),
    ],
)
def test_each_pre_tokenizer_groups_digits_as_its_model_does(tmp_path, source_tiny_gguf, pre, digits):
    tiny = source_tiny_gguf()
    grown = ["12", "123", "45", "12345"]
    tiny.tokens += grown
    tiny.types += [1] * len(grown)
    tiny.merges += ["1 2", "12 3", "4 5", "123 45"]
    tiny.tensors["token_embd.weight"] = tiny.tensors["token_embd.weight"].repeat(2, axis=0)
    metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    assert pieces(tiny, tmp_path, "12345", **metadata) == digits


def test_qwen2_composes_characters_first(tmp_path, source_tiny_gguf):
    decomposed = "e\u0301"
    assert pieces(source_tiny_gguf(), tmp_path, decomposed, **{"tokenizer.ggml.pre": "qwen2"}) == ["Ã", "©"]
    assert pieces(source_tiny_gguf(), tmp_path, decomposed)[0] == "e"


def test_llama3_takes_a_word_that_is_a_token_without_merges(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf()
    tiny.merges = ["h e"]
    metadata = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}
    assert pieces(tiny, tmp_path, "hello", **metadata) == ["hello"]
    assert pieces(tiny, tmp_path, "hello", **{"tokenizer.ggml.pre": "smollm"}) == ["he", "l", "l", "o"]


def test_bos_is_added_only_where_the_checkpoint_says_so(tmp_path, source_tiny_gguf):
    key = "tokenizer.ggml.add_bos_token"
    assert pieces(source_tiny_gguf(), tmp_path, "he", **{key: True}) == ["<|im_start|>", "he"]
    assert pieces(source_tiny_gguf(), tmp_path, "he", **{key: False}) == ["he"]
    silent = source_tiny_gguf()
    del silent.metadata[key]
    assert pieces(silent, tmp_path, "he") == ["he"]
    assert pieces(silent, tmp_path, "he", **{"tokenizer.ggml.pre": "llama-bpe"}) == ["<|im_start|>", "he"]


def test_files_carry_template_end_tokens_and_special_texts(tmp_path, source_tiny_gguf):
    files = byte_level(source_tiny_gguf(), tmp_path)
    assert files.chat_template == "{{ messages }}"
    assert files.bos_token == 1
    # <|im_end|> is declared, <|endoftext|> is known by its text.
    assert files.end_tokens == (0, 2)
    assert files.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_declared_end_of_turn_token_counts(tmp_path, source_tiny_gguf):
    files = byte_level(source_tiny_gguf(), tmp_path, **{"tokenizer.ggml.eot_token_id": 9})
    assert files.end_tokens == (0, 2, 9)


def test_user_defined_tokens_are_whole_but_not_hidden(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf()
    tiny.tokens[-1], tiny.types[-1], tiny.merges = "<tool>", 4, []
    tokenizer = load(byte_level(tiny, tmp_path))
    encoded = tokenizer.encode("a<tool>")
    assert encoded.tokens == ["a", "<tool>"]
    assert tokenizer.decode(encoded.ids) == "a<tool>"


def sentencepiece(source_tiny_gguf):
    """A Llama-2-like vocabulary: three special tokens, 256 bytes, then pieces by falling score."""
    tiny = source_tiny_gguf()
    words = ["▁the", "▁t", "he", "▁", "t", "h", "e", "n", "▁th"]
    tiny.tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    tiny.types = [2, 3, 3] + [6] * 256 + [1] * len(words)
    tiny.scores = [0.0] * 259 + [-4.0, -1.0, -2.0, -9.0, -9.0, -9.0, -9.0, -9.0, -3.0]
    tiny.merges = None
    tiny.tensors["token_embd.weight"] = tiny.tensors["token_embd.weight"][:1].repeat(len(tiny.tokens), axis=0)
    tiny.metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.unknown_token_id": 0}
    del tiny.metadata["tokenizer.ggml.pre"], tiny.metadata["tokenizer.ggml.add_bos_token"]
    return tiny


def test_sentencepiece_merges_follow_the_scores(tmp_path, source_tiny_gguf):
    # ▁t before he before ▁th: "▁t" + "he" makes "▁the"; never "▁th" + "e".
    assert pieces(sentencepiece(source_tiny_gguf), tmp_path, "the then") == ["<s>", "▁the", "▁the", "n"]


def test_sentencepiece_falls_back_to_bytes_and_decodes_them(tmp_path, source_tiny_gguf):
    tokenizer = load(byte_level(sentencepiece(source_tiny_gguf), tmp_path))
    encoded = tokenizer.encode("the é\n", add_special_tokens=False)
    assert encoded.tokens == ["▁the", "▁", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert tokenizer.decode(encoded.ids) == "the é\n"


def test_sentencepiece_space_prefix_can_be_off(tmp_path, source_tiny_gguf):
    key = "tokenizer.ggml.add_space_prefix"
    files = byte_level(sentencepiece(source_tiny_gguf), tmp_path, **{key: False})
    tokenizer = load(files)
    encoded = tokenizer.encode("he the", add_special_tokens=False)
    assert encoded.tokens == ["he", "▁the"]
    assert tokenizer.decode(encoded.ids) == "he the"


def test_sentencepiece_special_texts(tmp_path, source_tiny_gguf):
    files = byte_level(sentencepiece(source_tiny_gguf), tmp_path)
    assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert files.end_tokens == (2,)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "'t5'; supported are gpt2 and llama"),
        ({"tokenizer.ggml.pre": "klingon"}, "'klingon'; supported are .*smollm"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "eos token 9999"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
        ({"tokenizer.ggml.model": 3}, "tokenizer.ggml.model is a int"),
    ],
)
def test_unsupported_or_contradicting_tokenizer_is_refused(tmp_path, source_tiny_gguf, metadata, message):
    with pytest.raises(ModelError, match=message):
        byte_level(source_tiny_gguf(), tmp_path, **metadata)


def test_merge_of_unknown_tokens_is_refused(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf()
    tiny.merges.append("he o")
    with pytest.raises(ModelError, match="merge 'he o'"):
        byte_level(tiny, tmp_path)


def test_more_tokens_than_embedding_rows_are_refused(tmp_path, source_tiny_gguf):
    tiny = source_tiny_gguf()
    tiny.tensors["token_embd.weight"] = tiny.tensors["token_embd.weight"][:-1]
    with pytest.raises(ModelError, match="embedding rows"):
        byte_level(tiny, tmp_path)


@pytest.mark.slow
def test_embedded_model_tokenizes_as_transformers_does():
    from transformers import AutoTokenizer

    path = pull("smollm2-135m-instruct")
    files = open_checkpoint(path).tokenizer()
    ours, theirs = load(files), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert files.end_tokens == (0, 2)
    messages = [{"role": "user", "content": "Hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, chat_template=files.chat_template)
    assert "<|im_start|>user\nHi<|im_end|>" in rendered


@pytest.mark.slow
def test_embedded_model_splits_every_digit():
    # SmolLM2's own tokenizer splits digits beyond ASCII too; transformers' reading of GGUF does not.
    tokenizer = load(open_checkpoint(pull("smollm2-135m-instruct")).tokenizer())
    assert tokenizer.encode("x2024").tokens == ["x", "2", "0", "2", "4"]
    assert tokenizer.encode("½²").tokens == ["Â½", "Â²"]
