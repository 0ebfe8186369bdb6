"""Chat templates: messages to the prompt text that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls  # noqa: N812
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import RequestError


class ChatTemplate:
    """A checkpoint's Jinja template, rendered in a sandbox with the names that transformers offers.

    Args:
        source: the template.
        special_tokens: variables of the template, for example ``{"bos_token": "<s>"}``.

    Raises:
        RequestError: the template is no valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise RequestError(f"the bundle's chat template is broken ({error}); use a plain prompt") from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation.

        Args:
            messages: each with a ``role`` and a ``content``, both strings.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            RequestError: no messages, a message of another form, or one that the template refuses.
        """
        if not messages:
            raise RequestError("messages=[]: a chat needs at least one message")
        for message in messages:
            if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
                raise RequestError(f"message {message!r}: must have a 'role' and a 'content', both strings")
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        # A template is a program: what it does to values of the wrong type ends in Python's own errors.
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise RequestError(f"the chat template refused the messages: {error}") from error


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's tokens for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
