"""The token loop with drafts: the device guesses tokens, and the server's answer to one frame may confirm several.

A guess is run through the front like a token, and its hidden state is sent; the server chooses the token at every
position and stops at the first that was guessed wrong (speculative decoding, Leviathan et al., arXiv 2211.17192; by
section 8 of the design both sides choose with the same noise, so that equal tokens are all there is to compare). The
tokens are those of the loop without drafts, bit for bit.

With overlap the device does not wait: while its steps are on their way it guesses on and sends what it has, each frame
in the hope that those before it hold. So a text that is guessed well streams at the front's speed, whatever the link's
delay. And it guesses what else may come: the guesses grow a tree, the likeliest leaf first (as in EAGLE-2, arXiv
2406.16858, section 4.1). Ours: there is no tree attention; a branch is one more frame, which the server takes as a
chain if the tokens before it were chosen, and skips otherwise. So trees keep the bits that chains have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from ...errors import ProtocolError
from ..segments import AbsentEmbedding, Embedding, StackSession
from .controller import Controller
from .draft_pace import DraftPace, Guess
from .draft_tree import DraftTree, Node
from .generate import PREFILL_CHUNK, StepReport, Token, total
from .ngrams import NGramIndex

if TYPE_CHECKING:  # gRPC loads only where a server is used
    from .link import RemoteBack
    from .trained_draft import DraftSession

MAX_DRAFTS = 24  # unanswered ones after each other
_MAX_STEPS = 48  # on their way; the server keeps the results of a few more
_FRAME_DRAFTS = 8  # n-grams' guesses at once: few rows take the front and the server little longer than one
_ALTERNATIVES = 5  # of the trained draft for one position
_SURE_MATCH = 0.7  # an n-gram's chance from which the trained draft need not be asked


@dataclass
class DraftCounts:
    """What came of the drafts of one generation.

    Attributes:
        drafted: guesses that were run through the front, whether or not their turn came.
        accepted: those that were right.
        tried: by place after the last confirmed token, from 1: guesses whose turn came.
        right: of them, those that were right.
    """

    drafted: int = 0
    accepted: int = 0
    tried: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)

    def note(self, place: int, right: bool) -> None:
        """Count a guess whose turn came."""
        while len(self.tried) < place:
            self.tried.append(0)
            self.right.append(0)
        self.accepted += right
        self.tried[place - 1] += 1
        self.right[place - 1] += right


class DraftedTokens:
    """One generation with drafts.

    Args:
        embedding: of the tokens.
        front: a fresh session, of at least the prompt's and ``max_new_tokens`` positions.
        back: its session is open, and it `verifies`.
        prompt_ids: at least one.
        trained: the trained draft's session, if there is one.
        ngrams: whether n-grams are looked up.
        branches: whether more than one guess is made for a position; only with ``overlap``.
        pace: decides how far to draft.
        length: most unanswered drafts after each other, at most `MAX_DRAFTS`.
        overlap: whether to draft while steps are on their way.
        layers: of the whole model.
        max_new_tokens: that are generated at most.
        end_tokens: that end the text.
        controller: keeps a deadline: learns from the steps of sure tokens, and bounds the drafts.

    Attributes:
        counts: of the drafts so far.
    """

    def __init__(
        self,
        embedding: Embedding | AbsentEmbedding,
        front: StackSession,
        back: RemoteBack,
        prompt_ids: Sequence[int],
        *,
        trained: DraftSession | None,
        ngrams: bool,
        branches: bool,
        pace: DraftPace,
        length: int,
        overlap: bool,
        layers: int,
        max_new_tokens: int,
        end_tokens: Sequence[int],
        controller: Controller | None = None,
    ) -> None:
        self.counts = DraftCounts()
        self._controller = controller
        self._sure_at = 0.0  # when the root became sure
        self._root_sent = 0.0, 1  # seconds after that, and rows of its step
        self._back = back
        self._trained = trained
        self._ngrams = NGramIndex() if ngrams else None
        self._branches = branches and overlap
        self._pace = pace
        self._length, self._overlap = length, overlap
        self._layers = layers
        self._end_tokens = frozenset(end_tokens)
        self._ids = list(prompt_ids)  # and the sure tokens after them
        self._prompt = len(self._ids)
        self._end = self._prompt + max_new_tokens
        self._chunk = min(back.chunk_limit(), PREFILL_CHUNK)  # most rows of a frame
        self._tree = DraftTree(embedding, front, trained)
        self._unsent: list[Node] = []  # one after the other
        self._sent_at = 0.0
        self._steps: deque[Node] = deque()  # the first node of each that is on its way

    def __iter__(self) -> Iterator[Token]:
        """Prefill the prompt, then yield tokens until an end token (yielded too) or ``max_new_tokens``."""
        started = perf_counter()
        reports = self._prefill()
        while len(self._ids) < self._end:
            if self._work():
                continue
            tokens, report = self._take_answer()
            reports.append(report)
            if tokens and len(self._ids) > self._prompt + 1:
                self._pace.emitted(perf_counter() - started, len(tokens))
            for token, source in tokens:
                yield self._token(token, source, total(reports), perf_counter() - started)
                if token in self._end_tokens:
                    return
                started, reports = perf_counter(), [StepReport()]

    def _prefill(self) -> list[StepReport]:
        """Send the prompt; its last chunk asks for the first token."""
        chunk = self._chunk
        reports = [StepReport()]
        for first in range(0, self._prompt, chunk):
            ids = self._ids[first : first + chunk]
            hidden = self._tree.prefill(ids)
            if first + chunk < self._prompt:
                reports.append(self._back.step(hidden, first, ids, sample=False))
            else:
                self._back.submit(hidden, first, ids)
        self._steps.append(self._tree.root)
        if self._ngrams is not None:
            self._ngrams.extend(self._ids)
        return reports

    def _work(self) -> bool:
        """Do the next thing that need not wait for an answer; whether there was one."""
        if self._tree.root.hidden is None:
            self._run([self._tree.root])
            if self._overlap:
                self._send()
            return True
        if self._steps and (not self._overlap or self._back.answered() or len(self._steps) >= _MAX_STEPS):
            return False
        begun = perf_counter()
        if drafts := self._likeliest(self._room()):
            self._run(drafts)
            self.counts.drafted += len(drafts)
            source = drafts[-1].guess.source if drafts[-1].guess is not None else "ngram"
            self._pace.drafted(source, (perf_counter() - begun) / len(drafts))
            # No faster than the server takes them: more rows in a frame cost it less.
            if self._overlap and perf_counter() - self._sent_at >= self._pace.server_s:
                self._send()
            return True
        if self._unsent:
            self._send()
            return True
        return False

    def _run(self, nodes: list[Node]) -> None:
        """Run tokens through the front; what was not sent goes first if they do not fit behind it into a frame."""
        full = len(self._unsent) + len(nodes) > self._chunk
        if self._unsent and (full or nodes[0].parent is not self._unsent[-1]):
            self._send()
        self._tree.run(nodes)
        self._unsent += nodes

    def _send(self) -> None:
        """Submit the hidden states that were not sent yet."""
        nodes, self._unsent = self._unsent, []
        first = nodes[0]
        sure = first is self._tree.root
        self._back.submit(
            np.concatenate([node.hidden for node in nodes if node.hidden is not None]),
            first.position,
            [node.token for node in nodes],
            drafted=len(nodes) - sure,
            path=[] if sure else self._tree.path(first)[:-1],
        )
        self._steps.append(first)
        first.sent_at = self._sent_at = perf_counter()
        if sure:
            self._root_sent = self._sent_at - self._sure_at, len(nodes)

    def _room(self) -> int:
        """Drafts more that the deadline allows on the way."""
        if self._controller is None:
            return MAX_DRAFTS
        return self._controller.drafts - (len(self._steps) + len(self._unsent) - 1)

    def _likeliest(self, room: int) -> list[Node]:
        """The next guess to run, and what n-grams say with it at once; nothing if none is worth it or ``room`` is 0."""
        if not self._pace.drafting or room < 1:
            return []
        tip = self._tree.tip
        if tip.options is None:
            tip.options = self._ask(tip)
        best: tuple[float, Node, list[Guess]] | None = None
        for node, before in self._tree.grown():
            if node.options and (self._branches or node is tip) and self._fits(node.position + 1):
                chance = node.options[0].chance
                for guess in before:
                    chance *= guess.chance
                if best is None or chance > best[0]:
                    best = chance, node, before
        if best is None:
            return []
        _, node, before = best
        drafts: list[Node] = []
        assert node.options
        following: Guess | None = node.options[0]
        while following is not None and self._pace.pays(following, before, waited_s=self._waited_s()):
            parent = drafts[-1] if drafts else node
            place = parent.position + 1 - self._tree.root.position
            drafts.append(Node(following.token, parent.position + 1, parent, following, place))
            before = [*before, following]
            full = len(drafts) == min(_FRAME_DRAFTS, self._chunk, room)
            if full or following.source == "draft" or not self._fits(drafts[-1].position + 1):
                break
            following = self._match([*self._ids, *self._tree.path(drafts[-1])])
            if following is not None and self._trained is not None and following.chance < _SURE_MATCH:
                break
        if drafts:
            del node.options[0]
        for draft in drafts[:-1]:
            draft.options = []
        return drafts

    def _waited_s(self) -> float | None:
        """Since the step was sent whose answer comes next; None without overlap."""
        if not self._overlap:
            return None
        return perf_counter() - self._tree.root.sent_at

    def _fits(self, position: int) -> bool:
        """Whether a guess may stand at a position: not too far, and not where the text has ended."""
        return position - self._tree.root.position <= self._length and position < self._end - 1

    def _ask(self, node: Node) -> list[Guess]:
        """What may come after the node that was run last, the likeliest first."""
        ids = [*self._ids, *self._tree.path(node)]
        match = self._match(ids)
        guesses = [match] if match is not None else []
        if self._trained is not None and (match is None or match.chance < _SURE_MATCH):
            ranked = self._trained.guesses(ids, _ALTERNATIVES if self._branches else 1)
            guesses += [self._pace.trained(token, share) for token, share in ranked]
        best: dict[int, Guess] = {}
        for guess in sorted(guesses, key=lambda guess: -guess.chance):
            if guess.token not in self._end_tokens:
                best.setdefault(guess.token, guess)
        return list(best.values())

    def _match(self, ids: Sequence[int]) -> Guess | None:
        """What n-grams say comes after some ids."""
        found = self._ngrams.follow(ids) if self._ngrams is not None else None
        if found is None or found[0] in self._end_tokens:
            return None
        return self._pace.ngram(*found)

    def _take_answer(self) -> tuple[list[tuple[int, str]], StepReport]:
        """Wait for the oldest step's tokens, and go where they lead.

        Returns:
            The new tokens with their sources, and what the step cost.
        """
        first = self._steps.popleft()
        held, prompt = first is self._tree.root, len(self._ids) == self._prompt
        tokens, report, bytes_up = self._back.collect()
        if held != bool(tokens):
            raise ProtocolError(
                "BAD_RESULT",
                "the server went on from a wrong guess, or did not from a right one; it breaks the protocol",
            )
        if held and first.guess is None and not prompt:
            self._pace.answered(report.wait_s, report.server_decode_s + report.server_compute_s)
        if self._controller is not None and held and first.guess is None:
            device_s, rows = self._root_sent
            self._controller.observe(
                bytes_up=report.bytes_up if prompt else bytes_up,
                device_s=device_s,
                server_s=report.server_s,
                link_s=report.wait_s - report.server_s,
                prompt=prompt,
                alone=rows == 1,
            )
        taken = [(token, self._confirm(token)) for token in tokens]
        if tokens:
            self._tree.settle()
            if self._unsent and not self._tree.follows(self._unsent[0]):
                self._unsent = []
        return taken, report

    def _confirm(self, token: int) -> str:
        """Take the next sure token; its source."""
        root = self._tree.root
        self._ids.append(token)
        self._sure_at = perf_counter()
        if self._ngrams is not None:
            self._ngrams.extend([token])
        guesses = [child.guess for child in root.children if child.guess is not None]
        for guess in (*guesses, *(root.options or ())):
            self._pace.learn(guess, guess.token == token)
        child = self._tree.advance(token)
        if guesses:
            self.counts.note(min(each.place for each in root.children), child.guess is not None)
        return child.guess.source if child.guess is not None else "server"

    def _token(self, token: int, source: str, report: StepReport, seconds: float) -> Token:
        front_s, onnxruntime_s = self._tree.take_times()
        return Token(
            id=token,
            source=source,
            layers=self._layers,
            bytes_up=report.bytes_up,
            bytes_down=report.bytes_down,
            front_s=front_s,
            front_onnxruntime_s=onnxruntime_s,
            total_s=seconds,
            report=report,
            level=self._controller.level if self._controller is not None else None,
        )
