"""The tokenizer in a GGUF file's metadata, rebuilt as tokenizer.json.

Two kinds exist for the supported architectures: byte-level BPE (``gpt2``, with the pre-tokenizer named by
``tokenizer.ggml.pre``) and SentencePiece BPE (``llama``, merges implied by scores, bytes as fallback).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ..errors import ModelError
from .checkpoint import TokenizerFiles, end_token_ids
from .gguf_file import GGUFFile

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = "\u2581"

# Splits text before BPE, as each model's own tokenizer.json does.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"llama3": _LLAMA3_PATTERN, "qwen2": _QWEN2_PATTERN, "tekken": _TEKKEN_PATTERN}
# tokenizer.ggml.pre, to the kind of pre-tokenizer.
_PRE_TOKENIZERS = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "smollm": "smollm",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "tekken": "tekken",
}
# Kinds that take a word that is a token as it is, and want a BOS token unless the file says otherwise.
_WHOLE_WORDS_AND_BOS = ("llama3", "tekken")


def build_tokenizer(file: GGUFFile, vocab_size: int) -> TokenizerFiles:
    """Rebuild the tokenizer.

    Args:
        file: the file, of which only the metadata is read.
        vocab_size: rows of the embedding, which may exceed the number of tokens.

    Raises:
        ModelError: no tokenizer, an unknown kind, or one whose parts contradict each other.
    """
    tokens = file.get("tokenizer.ggml.tokens", list)
    if not tokens:
        raise ModelError(f"{file.path}: no tokenizer inside; give the Hugging Face directory of the model")
    if len(tokens) > vocab_size:
        raise ModelError(f"{file.path}: {len(tokens)} tokens for {vocab_size} embedding rows; corrupt, fetch it again")
    types = _per_token(file, "tokenizer.ggml.token_type", tokens)
    ids = {name: _token_id(file, name, tokens) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    model = file.get("tokenizer.ggml.model", str)
    if model == "gpt2":
        tokenizer, adds_bos = _byte_level(file, tokens)
    elif model == "llama":
        tokenizer, adds_bos = _sentencepiece(file, tokens, types, tokens[ids["unknown"] or 0]), True
    else:
        raise ModelError(f"{file.path}: tokenizer kind {model!r}; supported are gpt2 and llama")

    special = {text: i for i, text in enumerate(tokens) if types[i] in (_CONTROL, _UNKNOWN)}
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    defined = [text for text, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in defined])
    bos = ids["bos"]
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", bool, adds_bos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    texts = {key: tokens[number] for key, name in names.items() if (number := ids[name]) is not None}
    declared = [number for name in ("eos", "eot", "eom") if (number := ids[name]) is not None]
    return TokenizerFiles(
        tokenizer_json=tokenizer.to_str(),
        chat_template=file.get("tokenizer.chat_template", str),
        end_tokens=end_token_ids(declared, special),
        bos_token=bos,
        special_tokens=texts,
    )


def _token_id(file: GGUFFile, name: str, tokens: list[str]) -> int | None:
    value = file.get(f"tokenizer.ggml.{name}_token_id", int)
    if value is not None and not 0 <= value < len(tokens):
        raise ModelError(f"{file.path}: {name} token {value} of {len(tokens)}; corrupt, fetch it again")
    return value


def _per_token(file: GGUFFile, key: str, tokens: list[str]) -> list[Any]:
    """An array with one number for each token."""
    values = file.get(key, np.ndarray)
    if values is None or len(values) != len(tokens):
        raise ModelError(f"{file.path}: {key} has not one entry for each token; corrupt, fetch it again")
    return list(values.tolist())


def _byte_level(file: GGUFFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE with its pre-tokenizer, and whether such models want a BOS token by default."""
    pre = file.get("tokenizer.ggml.pre", str, "default") or "default"
    if pre not in _PRE_TOKENIZERS:
        raise ModelError(f"{file.path}: pre-tokenizer {pre!r}; supported are {', '.join(_PRE_TOKENIZERS)}")
    kind = _PRE_TOKENIZERS[pre]
    vocabulary = {text: i for i, text in enumerate(tokens)}
    merges = []
    for merge in file.get("tokenizer.ggml.merges", list) or []:
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelError(f"{file.path}: merge {merge!r} is not of tokens; corrupt, fetch it again")
        merges.append((left, right))
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=kind in _WHOLE_WORDS_AND_BOS))
    # `use_regex` is GPT-2's own pattern.
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in _PATTERNS)]
    if kind in _PATTERNS:
        steps.insert(0, pre_tokenizers.Split(Regex(_PATTERNS[kind]), "isolated"))
    elif kind == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, kind in _WHOLE_WORDS_AND_BOS


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[Any], unknown: str) -> Tokenizer:
    """SentencePiece BPE: a merge for each way to split a token in two tokens, the best score first."""
    scores = _per_token(file, "tokenizer.ggml.scores", tokens)
    vocabulary = {text: i for i, text in enumerate(tokens)}
    ranked = []
    for text, kind, score in zip(tokens, types, scores, strict=True):
        if kind != _NORMAL:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((score, len(left), len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    merges = [merge[3:] for merge in ranked]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", _SPACE)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
