"""A text some of whose tokens the draft decides: its ids, and the hidden states that the server has not got yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..segments import AbsentEmbedding, Embedding, StackSession
from .generate import PREFILL_CHUNK, Token

if TYPE_CHECKING:
    from .trained_draft import DraftSession


class UnsentText:
    """Runs the front and shows the draft what comes out; the loops with exits decide when that is sent.

    Args:
        embedding: of the tokens.
        front: a fresh session, of at least the prompt's and ``max_new_tokens`` positions.
        draft: a fresh session.
        prompt_ids: at least one.
        chunk_limit: most rows that the back takes in one frame.
        max_new_tokens: that are generated at most.
        end_tokens: that end the text.
        keeps: hidden states that were sent, for `unsend`: ``4 * d_model`` bytes a position.

    Attributes:
        ids: prompt and tokens so far.
        front: the session.
        draft: the session.
        chunk: most rows of a frame.
        waiting: positions, the last ones, whose hidden states were not sent.
    """

    def __init__(
        self,
        embedding: Embedding | AbsentEmbedding,
        front: StackSession,
        draft: DraftSession,
        prompt_ids: Sequence[int],
        *,
        chunk_limit: int,
        max_new_tokens: int,
        end_tokens: Sequence[int],
        keeps: bool = False,
    ) -> None:
        self.ids = list(prompt_ids)
        self.front, self.draft = front, draft
        self.chunk = min(chunk_limit, PREFILL_CHUNK)
        self.waiting = 0
        self._embedding = embedding
        self._prompt = len(self.ids)
        self._max_new_tokens, self._end_tokens = max_new_tokens, frozenset(end_tokens)
        self._keeps = keeps
        self._sent: list[NDArray[np.float32]] = []
        self._unsent: list[NDArray[np.float32]] = []

    @property
    def is_prompt(self) -> bool:
        """Whether no token was generated yet."""
        return len(self.ids) == self._prompt

    @property
    def behind(self) -> bool:
        """Whether there are ids that the front has not run."""
        return self.front.cache.length < len(self.ids)

    def run(self, most: int) -> None:
        """Run the front over the next ids, so many at most."""
        first = self.front.cache.length
        hidden = self.front.forward(self._embedding.rows(self.ids[first : first + most])).copy()
        self.draft.observe(hidden)
        self._unsent.append(hidden)
        self.waiting += len(hidden)

    def take(self) -> tuple[NDArray[np.float32], int, list[int]]:
        """The hidden states that were not sent, up to a frame of them, the first one's position, and their tokens.

        They count as sent.
        """
        rows, position = np.concatenate(self._unsent), self.front.cache.length - self.waiting
        rows, rest = rows[: self.chunk], rows[self.chunk :]
        self._unsent, self.waiting = [rest] if len(rest) else [], len(rest)
        if self._keeps:
            self._sent.append(rows)
        return rows, position, self.ids[position : position + len(rows)]

    def unsend(self) -> None:
        """Nothing counts as sent any more: the session is a new one."""
        self._unsent, self._sent = [*self._sent, *self._unsent], []
        self.waiting = self.front.cache.length

    def until_end(self, decide: Callable[[], Token]) -> Iterator[Token]:
        """Tokens as they are decided, until an end token (yielded too) or ``max_new_tokens``."""
        for _ in range(self._max_new_tokens):
            token = decide()
            self.ids.append(token.id)
            yield token
            if token.id in self._end_tokens:
                return
