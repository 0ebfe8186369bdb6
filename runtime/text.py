"""Text to token ids and back: the tokenizer, streaming that never splits a character, stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import BundleError, RequestError
from .chat import ChatTemplate


class Tokenizer:
    """A ``tokenizer.json`` with what the manifest adds to it.

    Args:
        backend: of the `tokenizers` library; its truncation and padding are switched off.
        chat_template: Jinja source, or None if the checkpoint has none.
        special_tokens: by role, for example ``{"bos_token": "<s>", "eos_token": "</s>"}``.
        end_tokens: ids that end a generation.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        end_tokens: Sequence[int] = (),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template_source = chat_template
        self._special_tokens = dict(special_tokens or {})
        self.end_tokens = frozenset(end_tokens)
        self._special_ids = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self._byte_ids = self._find_byte_ids()

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        end_tokens: Sequence[int] = (),
    ) -> Tokenizer:
        """Read a ``tokenizer.json``; the other arguments are those of the class.

        Raises:
            BundleError: the file is missing or is no tokenizer.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise BundleError(f"{path}: not a readable tokenizer.json ({error}); repeat the export") from error
        return cls(backend, chat_template, special_tokens, end_tokens)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Ids of a text, with the special tokens that the checkpoint adds; none if the text begins with BOS.

        Args:
            text: what to encode.
            special_tokens: whether any are added.

        Raises:
            RequestError: the text holds lone surrogates.
        """
        bos = self._special_tokens.get("bos_token")
        return self._encode(text, add_special_tokens=special_tokens and not (bos and text.startswith(bos)))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of `apply_chat`; every special token comes from the template, as in transformers.

        Raises:
            RequestError: see `apply_chat`.
        """
        return self._encode(self.apply_chat(messages, add_generation_prompt), add_special_tokens=False)

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation, see `isthmus.runtime.chat.ChatTemplate.render`.

        Raises:
            RequestError: the bundle has no chat template, or the messages do not suit it.
        """
        return self._chat_template.render(messages, add_generation_prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens and ids without a token are left out, broken UTF-8 becomes U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def is_visible(self, token_id: int) -> bool:
        """Whether `decode` regards the id."""
        return token_id not in self._special_ids and self._backend.id_to_token(token_id) is not None

    def is_byte(self, token_id: int) -> bool:
        """Whether the id is a SentencePiece fallback token, which stands for one byte of a character."""
        return token_id in self._byte_ids

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        if self._chat_template_source is None:
            raise RequestError("the bundle has no chat template; use a plain prompt")
        return ChatTemplate(self._chat_template_source, self._special_tokens)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise RequestError("the text holds lone surrogates: it must be valid Unicode") from error

    def _find_byte_ids(self) -> frozenset[int]:
        """Ids of ``<0x00>`` to ``<0xFF>``, if the decoder takes them for bytes and not for plain text."""
        letter = self._backend.token_to_id("<0x41>")
        if letter is None or self._backend.decode([letter]) != "A":
            return frozenset()
        ids = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(id for id in ids if id is not None)


class Detokenizer:
    """Text of a growing id sequence, in pieces whose concatenation is `Tokenizer.decode` of all ids.

    A character goes out once all its bytes are there. Only a window of the last tokens is decoded again for
    each token: at least one token whose text is out already stays in it, since a decoder may treat the first
    token differently (leading space).
    """

    # A trailing U+FFFD may be the first one to three bytes of a character. Each visible token has at least a
    # byte, so the character begins within the last three tokens, and a UTF-8 decoder that starts in the
    # middle of an earlier one is in step again by then. The fourth token is one whose text is out.
    _WINDOW_MIN = 4
    _WINDOW_MAX = 8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._printed = 0  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is certain now, possibly empty."""
        if not self._tokenizer.is_visible(token_id):
            return ""
        self._window.append(token_id)
        # One invalid byte makes U+FFFD of the whole run of byte tokens, so wait for its end.
        if self._tokenizer.is_byte(token_id):
            return ""
        text = self._tokenizer.decode(self._window)
        held = int(text.endswith("\ufffd"))
        piece = text[self._printed : len(text) - held]
        self._printed = len(text) - held
        if len(self._window) > self._WINDOW_MAX:
            del self._window[: -self._WINDOW_MIN]
            self._printed = len(self._tokenizer.decode(self._window)) - held
        return piece

    def finish(self) -> str:
        """Return the text that was held back; an incomplete character comes as U+FFFD."""
        piece = self._tokenizer.decode(self._window)[self._printed :]
        self._window.clear()
        self._printed = 0
        return piece


class StopStrings:
    """Ends a text before the first stop string, however the text is cut into pieces.

    The first is the one that is complete first, and of several that end together the longest.

    Raises:
        RequestError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise RequestError(f"stop strings {list(stops)}: none may be empty; leave it out")
        self._stops = tuple(stops)
        self._pending = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            The text that precedes any stop string for certain, and whether one was found. After that
            nothing more may be pushed.
        """
        text = self._pending + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._pending = ""
            return text[: min(found)[1]], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """Return the text that was held back, when no more will come."""
        text, self._pending = self._pending, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
