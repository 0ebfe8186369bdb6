"""Whatever branches the tree grows, each node's hidden state is that of its own text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.draft_bundle import open_draft
from isthmus.runtime.edge.draft_pace import Guess
from isthmus.runtime.edge.draft_tree import DraftTree, Node
from isthmus.runtime.edge.trained_draft import TrainedDraft
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.segments import Embedding, LayerStack

PROMPT = [1, 2, 3]


class Opened:
    """A device half with its draft, and texts run straight through both."""

    def __init__(self, folder: Path, trained: bool) -> None:
        bundle = open_bundle(folder, "device")
        self.embedding, self.stack = Embedding(bundle), LayerStack(bundle, 1)
        draft = open_draft(bundle) if trained else None
        self._draft = TrainedDraft(draft, 1) if draft is not None else None

    def tree(self) -> DraftTree:
        draft = self._draft.session(64, Sampling(), PROMPT) if self._draft is not None else None
        return DraftTree(self.embedding, self.stack.session(64), draft)

    def straight(self, ids: list[int]) -> tuple[np.ndarray, Any]:
        """The last hidden state of a text, and what the draft says comes next."""
        hidden = self.stack.session(64).forward(self.embedding.rows(ids)).copy()
        if self._draft is None:
            return hidden[-1], None
        session = self._draft.session(64, Sampling(), PROMPT)
        session.observe(hidden)
        return hidden[-1], session.guesses(ids, 3)


@pytest.fixture(scope="module")
def with_draft(repeating: Path) -> Opened:
    return Opened(repeating, trained=True)


@pytest.fixture(scope="module", params=[32, 8, 4])
def without_draft(tiny: Any, request: pytest.FixtureRequest) -> Opened:
    return Opened(Path(tiny.bundle(bits=4, split=2, max_length=64, front_kv_bits=request.param)), trained=False)


def grow(opened: Opened, data: st.DataObject) -> None:
    """Grow a tree at random places, and follow it, right or wrong, now and then."""
    tree = opened.tree()
    tree.prefill(PROMPT)
    ids = list(PROMPT)
    for _ in range(data.draw(st.integers(1, 14))):
        if tree.root.hidden is None:
            tree.run([tree.root])
        elif data.draw(st.integers(0, 3)):
            nodes = [node for node, _ in tree.grown() if node.position < 40]
            parent: Node = data.draw(st.sampled_from(nodes))
            new: list[Node] = []
            taken = {child.token for child in parent.children}
            for _ in range(data.draw(st.integers(1, 3))):
                token = data.draw(st.integers(0, 255).filter(lambda token, taken=taken: token not in taken))
                new.append(Node(token, parent.position + 1, parent, Guess(token, "ngram", 1, 0.5)))
                parent, taken = new[-1], set()
            for node in new[:-1]:
                node.options = []  # nobody asks what else may come within a frame
            tree.run(new)
        else:
            likely = [child.token for child in tree.root.children] or [7]
            token = data.draw(st.sampled_from([*likely, 9]))
            ids.append(token)
            tree.advance(token)
            tree.settle()
            if tree.root.hidden is None:
                tree.run([tree.root])
        for node, _ in tree.grown():
            hidden, _ = opened.straight([*ids, *tree.path(node)])
            assert node.hidden is not None
            assert np.array_equal(node.hidden[0], hidden)
        tip = tree.tip
        if tip.options is None and tree._trained is not None:
            text = [*ids, *tree.path(tip)]
            assert tree._trained.guesses(text, 3) == opened.straight(text)[1]
            tip.options = []


@settings(max_examples=40)
@given(data=st.data())
def test_every_node_has_the_bits_of_its_text_with_a_draft(with_draft, data):
    grow(with_draft, data)


@settings(max_examples=25)
@given(data=st.data())
def test_every_node_has_the_bits_of_its_text_at_every_cache_precision(without_draft, data):
    grow(without_draft, data)
