import json
import random
from datetime import datetime

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from isthmus.errors import BundleError, RequestError
from isthmus.runtime.text import Detokenizer, StopStrings, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog was not amused, the fox was.",
    "Grüße aus Köln, naïve café. 日本語の文章と中文。 한국어 문장.",
    "👩‍👩‍👧 and 🎉🎉 and e\u0301 and \ufffd too",
]
TEXTS = [
    *CORPUS,
    "  two leading spaces, a\ttab\n\nand lines ",
    "family 👨‍👩‍👧‍👦 flag 🇨🇭 skin 👍🏽 keycap 1️⃣",
    "\U0001d518\U0001d52b \u0928\u092e\u0938\u094d\u0924\u0947 z\u0335\u0321\u0353a\u0308",
    "replacement \ufffd\ufffd\ufffd character \ufffd",
    "\ufffd" * 40,
    "",
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Say "hé" <b>'}]


def byte_level():
    """The kind of GPT-2, SmolLM2, Llama 3 and Qwen: tokens are pieces of UTF-8 bytes."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.add_tokens(["<tool>"])
    return backend


def sentencepiece():
    """The kind of Llama 2 and Mistral: tokens are text with a space sign, or single bytes."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,日本", "\ufffd"]
    words = ["th", "the", "▁the", "▁d", "og", "▁dog", "▁▁"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "d"), ("o", "g"), ("▁d", "og"), ("▁", "▁")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return backend


def metaspace():
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def word_suffix():
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


BACKENDS = {make.__name__: make() for make in (byte_level, sentencepiece, metaspace, word_suffix)}
TOKENIZERS = {name: Tokenizer(backend) for name, backend in BACKENDS.items()}
every_kind = pytest.mark.parametrize("kind", TOKENIZERS)


def stream(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(id) for id in ids), detokenizer.finish()]


# --- tokenizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode(kind, text):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_file_is_read_without_its_truncation_and_padding(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json", end_tokens=(2, 0))
    assert tokenizer.encode(CORPUS[0]) == TOKENIZERS["byte_level"].encode(CORPUS[0])
    assert tokenizer.end_tokens == {0, 2}


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(RequestError, match="surrogates"):
        TOKENIZERS["byte_level"].encode("from a shell: \udcff")


def test_special_tokens_and_unknown_ids_are_left_out_of_the_text():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("<s>the<|im_end|> <tool>dog")
    assert tokenizer.decode([*ids, 100_000]) == "the <tool>dog"
    assert "".join(stream(tokenizer, [*ids, 100_000])) == "the <tool>dog"


# --- chat -------------------------------------------------------------------------------------------------


def test_bos_is_added_to_plain_text_once():
    tokenizer = Tokenizer(sentencepiece(), special_tokens={"bos_token": "<s>"})
    assert tokenizer.encode("the dog")[0] == 1
    assert tokenizer.encode("the dog").count(1) == 1
    assert tokenizer.encode("<s>the dog").count(1) == 1


@pytest.mark.parametrize(("opening", "count"), [("{{ bos_token }}", 1), ("", 0)])
def test_special_tokens_of_a_chat_come_from_its_template_alone(opening, count):
    tokenizer = Tokenizer(sentencepiece(), opening + "{{ messages[0]['content'] }}", {"bos_token": "<s>"})
    assert tokenizer.encode_chat([{"role": "user", "content": "the dog"}]).count(1) == count


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{{ bos_token }}{% for m in messages %}\n  {% if loop.first %}\n    {{ m | tojson }}\n  {% endif %}\n"
        "{% endfor %}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content | tojson(indent=2) }}{% endfor %}",
        "{% generation %}\n{{ messages[-1]['content'] }}\n{% endgeneration %}\n{{ strftime_now('%Y') }}\n",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% if not tools and documents is none %}{{ messages | length }}{% endif %}",
    ],
)
def test_chat_is_rendered_as_transformers_does(template, add_generation_prompt):
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    expected = utilities.render_jinja_template(
        [MESSAGES], chat_template=template, add_generation_prompt=add_generation_prompt, bos_token="<s>"
    )[0][0]
    tokenizer = Tokenizer(BACKENDS["byte_level"], template, {"bos_token": "<s>"})
    assert tokenizer.apply_chat(MESSAGES, add_generation_prompt) == expected


def test_chatml_text_and_its_tokens():
    tokenizer = Tokenizer(BACKENDS["byte_level"], CHATML)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat(messages) == text
    ids = tokenizer.encode_chat(messages)
    assert [id for id in ids if id <= 2] == [1, 2, 1]


def test_template_sees_the_current_time():
    tokenizer = Tokenizer(BACKENDS["byte_level"], "{{ strftime_now('%Y-%m-%d') }}")
    before, text, after = datetime.now(), tokenizer.apply_chat(MESSAGES), datetime.now()
    assert text in {before.strftime("%Y-%m-%d"), after.strftime("%Y-%m-%d")}


def test_json_in_a_template_keeps_unicode_and_html():
    tokenizer = Tokenizer(BACKENDS["byte_level"], "{{ messages[1] | tojson }}")
    assert tokenizer.apply_chat(MESSAGES) == json.dumps(MESSAGES[1], ensure_ascii=False)


def test_bundle_without_a_template_refuses_a_chat_and_names_the_way_out():
    with pytest.raises(RequestError, match="no chat template; use a plain prompt"):
        TOKENIZERS["byte_level"].apply_chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "broken"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ ''.__class__.__mro__ }}", "refused"),
        ("{{ range(10000000) | list }}", "refused"),
        ("{{ messages[0]['content'] + 1 }}", "refused"),
    ],
)
def test_template_that_fails_is_a_named_error(template, message):
    with pytest.raises(RequestError, match=message):
        Tokenizer(BACKENDS["byte_level"], template).apply_chat(MESSAGES)


@pytest.mark.parametrize("messages", [[], [{}], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_messages_of_another_form_are_refused(messages):
    with pytest.raises(RequestError, match="message"):
        Tokenizer(BACKENDS["byte_level"], CHATML).apply_chat(messages)


# --- streaming --------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_decoded_text(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@every_kind
@settings(max_examples=300)
@given(data=st.data())
def test_pieces_of_random_ids_join_to_the_decoded_text(kind, data):
    tokenizer = TOKENIZERS[kind]
    size = BACKENDS[kind].get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=60))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(max_examples=300)
@given(payload=st.lists(st.sampled_from([0x41, 0x80, 0xBF, 0x9F, 0xC3, 0xE2, 0xEF, 0xBD, 0xF0, 0xF4, 0xFF])))
def test_pieces_of_broken_utf8_join_to_the_decoded_text(kind, payload):
    tokenizer = TOKENIZERS[kind]
    if kind == "sentencepiece":
        ids = [3 + byte for byte in payload]
    else:
        sign = {byte: sign for sign, byte in gpt2_bytes().items()}
        ids = [BACKENDS[kind].token_to_id(sign[byte]) for byte in payload]
        assert tokenizer.decode(ids) == bytes(payload).decode("utf-8", "replace")
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def gpt2_bytes():
    """The sign that stands for each byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@given(text=st.text(max_size=40))
def test_no_piece_holds_a_part_of_a_character(kind, text):
    tokenizer = TOKENIZERS[kind]
    text = text.replace("\ufffd", "")
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert not any("\ufffd" in piece for piece in pieces)


def test_character_goes_out_with_its_last_byte():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a\U0001d518b")
    assert len(ids) == 6
    assert stream(tokenizer, ids) == ["a", "", "", "", "\U0001d518", "b", ""]


def test_incomplete_character_at_the_end_comes_with_finish():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a\U0001d518")[:-1]
    assert stream(tokenizer, ids) == ["a", "", "", "", "\ufffd"]


def test_text_of_replacement_characters_is_not_held_back():
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(id) for id in tokenizer.encode("\ufffd" * 50))
    assert text == "\ufffd" * 49


@every_kind
@pytest.mark.parametrize("ids", ["random", "one"])
def test_work_per_token_does_not_grow_with_the_text(kind, ids):
    class Counting(Tokenizer):
        decoded = 0

        def decode(self, ids):
            self.decoded += len(ids)
            return super().decode(ids)

    tokenizer = Counting(BACKENDS[kind])
    generator = random.Random(0)
    size = BACKENDS[kind].get_vocab_size()
    stream(tokenizer, [generator.randrange(size) if ids == "random" else 20 for _ in range(3000)])
    assert 0 < tokenizer.decoded < 10 * 3000


# --- stop strings -----------------------------------------------------------------------------------------


def cut(stops, pieces):
    """The text that goes out, and whether it was stopped."""
    stop_strings = StopStrings(stops)
    out = []
    for piece in pieces:
        text, stopped = stop_strings.push(piece)
        out.append(text)
        if stopped:
            return "".join(out), True
    return "".join(out) + stop_strings.finish(), False


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["END"], "one END two", "one "),
        (["END"], "one EN", "one EN"),
        (["END"], "ENEND", "EN"),
        (["aab"], "aaab", "a"),
        (["\n\n", "User:"], "Hi\nUser: x\n\n", "Hi\n"),
        (["abcd", "c"], "abcd", "ab"),
        (["bc", "abc"], "xabc", "x"),
        (["👩‍👧"], "a👩b👩‍👧c", "a👩b"),
        ([], "anything", "anything"),
    ],
)
def test_text_ends_before_the_stop_string_that_is_complete_first(stops, text, expected):
    assert cut(stops, [text])[0] == expected
    assert cut(stops, list(text))[0] == expected


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=5), max_size=12),
)
def test_result_does_not_depend_on_how_the_text_is_cut(stops, pieces):
    text = "".join(pieces)
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    if ends:
        longest = max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
        expected = text[: ends[0] - longest], True
    else:
        expected = text, False
    assert cut(stops, pieces) == expected


def test_only_what_may_begin_a_stop_string_is_held_back():
    stop_strings = StopStrings(["STOP"])
    assert stop_strings.push("go ST") == ("go ", False)
    assert stop_strings.push("ART S") == ("START ", False)
    assert stop_strings.push("TO") == ("", False)
    assert stop_strings.finish() == "STO"


@pytest.mark.parametrize("stops", [[""], ["x", ""]])
def test_empty_stop_string_is_refused(stops):
    with pytest.raises(RequestError, match="empty"):
        StopStrings(stops)
