"""The tree of guesses on the device, over caches that hold one path of it at a time.

Its root is the last sure token. Each node was run through the front after those on its path; where the caches leave a
path, the keys and values of its positions are kept beside the nodes, and put back when it is taken up again. Both are
copies: a path that comes back has the bits that it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..segments import AbsentEmbedding, Embedding, StackSession
from .draft_pace import Guess
from .trained_draft import DraftSession

Hidden = NDArray[np.float32]


@dataclass(eq=False)
class Node:
    """A token at a position, sure or guessed.

    Attributes:
        guess: why it is here, None if the server chose it first.
        place: after the token that was sure when it was guessed.
        sent_at: `time.perf_counter` when the step was sent that it is the first of.
        hidden: ``[1, d_model]`` at the split, once it was run.
        options: what may come after it and was not run yet, the likeliest first; None if nobody asked.
        front_rows: its keys and values in the front, while the caches hold another path.
        draft_rows: the same in the trained draft.
    """

    token: int
    position: int
    parent: Node | None = None
    guess: Guess | None = None
    place: int = 0
    sent_at: float = 0.0
    hidden: Hidden | None = None
    options: list[Guess] | None = None
    children: list[Node] = field(default_factory=list)
    front_rows: NDArray[Any] | None = None
    draft_rows: NDArray[Any] | None = None


class DraftTree:
    """See the module.

    Args:
        embedding: of the tokens.
        front: a fresh session.
        trained: the trained draft's session, if there is one.

    Attributes:
        root: the last sure token.
    """

    def __init__(
        self, embedding: Embedding | AbsentEmbedding, front: StackSession, trained: DraftSession | None
    ) -> None:
        self._embedding, self._front, self._trained = embedding, front, trained
        self._front_s = self._front_onnxruntime_s = 0.0
        self._first = 0  # position of the first node in `_live`
        self._live: list[Node] = []  # whose keys and values the caches hold, one after the other
        self.root = Node(0, -1)

    @property
    def tip(self) -> Node:
        """The node that was run, or put back, last."""
        return self._live[-1]

    def prefill(self, ids: Sequence[int]) -> Hidden:
        """Run tokens of the prompt; the last one becomes the root."""
        hidden = self._forward(ids)
        self._first = self._front.cache.length - 1
        self.root = Node(ids[-1], self._first, hidden=hidden[-1:])
        self._live = [self.root]
        return hidden

    def run(self, nodes: list[Node]) -> None:
        """Run nodes that follow each other; the first one's parent was run, and they become part of the tree."""
        parent = nodes[0].parent
        if parent is not None:
            self._switch(parent)
        hidden = self._forward([node.token for node in nodes])
        for at, node in enumerate(nodes):
            node.hidden = hidden[at : at + 1]
            if node.parent is not None and node is not self.root:
                node.parent.children.append(node)
        self._live += nodes

    def path(self, node: Node) -> list[int]:
        """Tokens from the root, itself left out, to a node."""
        tokens = []
        while node is not self.root and node.parent is not None:
            tokens.append(node.token)
            node = node.parent
        return tokens[::-1]

    def grown(self) -> Iterator[tuple[Node, list[Guess]]]:
        """Every node that was run, with the guesses on its path."""
        waiting: list[tuple[Node, list[Guess]]] = [(self.root, [])]
        while waiting:
            node, before = waiting.pop()
            yield node, before
            waiting += [(child, [*before, child.guess]) for child in node.children if child.guess is not None]

    def advance(self, token: int) -> Node:
        """Make the next sure token the root: the child that has it, or a new one."""
        before = self.root
        found = next((child for child in before.children if child.token == token), None)
        self.root = found or Node(token, before.position + 1, before)
        return self.root

    def settle(self) -> None:
        """After `advance`: let the caches hold the root, or its parent if it was not run; forget what is past."""
        last = self.root if self.root.hidden is not None or self.root.parent is None else self.root.parent
        if last is not self.root or not self._holds(last):  # what comes after the root may stay
            self._switch(last)
        del self._live[: last.position - self._first]
        self._first = last.position
        last.parent = None

    def follows(self, node: Node) -> bool:
        """Whether a node is the root or comes after it."""
        above: Node | None = node
        while above is not None and above is not self.root:
            above = above.parent
        return above is not None

    def take_times(self) -> tuple[float, float]:
        """Seconds in the front, and of them inside onnxruntime, since the last call."""
        times = self._front_s, self._front_onnxruntime_s
        self._front_s = self._front_onnxruntime_s = 0.0
        return times

    def _forward(self, ids: Sequence[int]) -> Hidden:
        begun, busy = perf_counter(), self._front.onnxruntime_seconds
        hidden = self._front.forward(self._embedding.rows(list(ids))).copy()
        if self._trained is not None:
            self._trained.observe(hidden)
        self._front_s += perf_counter() - begun
        self._front_onnxruntime_s += self._front.onnxruntime_seconds - busy
        return hidden

    def _switch(self, node: Node) -> None:
        """Let the caches hold the path to a node, and nothing after it."""
        missing: list[Node] = []
        while not self._holds(node):
            missing.append(node)
            assert node.parent is not None
            node = node.parent
        self._cut(node.position + 1)
        for back in reversed(missing):
            assert back.front_rows is not None and back.hidden is not None
            self._front.cache.append(back.front_rows)
            if self._trained is not None:
                self._trained.restore(back.hidden, back.draft_rows)
            self._live.append(back)

    def _holds(self, node: Node) -> bool:
        at = node.position - self._first
        return 0 <= at < len(self._live) and self._live[at] is node

    def _cut(self, length: int) -> None:
        """Roll the caches back to ``length`` positions; the nodes keep what was theirs."""
        for node in self._live[length - self._first :]:
            at = node.position
            node.front_rows = self._front.cache.rows(at, at + 1)
            node.draft_rows = self._trained.rows(at) if self._trained is not None else None
        del self._live[length - self._first :]
        self._front.cache.truncate(length)
        if self._trained is not None:
            self._trained.truncate(length)
