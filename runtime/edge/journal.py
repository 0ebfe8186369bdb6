"""What a device has sent of a session, so that another server can be brought to where the lost one was.

A session on a server is its sampling and the steps that made it. The steps are kept as they were sent, byte for byte: a
codec's payload decodes to the same hidden states again, these give the same keys and values, and noise is keyed by
position; so the tokens that follow are those that would have followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...devices.budget import JOURNAL_BYTES
from ...errors import LinkError
from ..wire import isthmus_pb2 as pb
from ..wire.framing import renumbered_step


@dataclass(slots=True)
class _Entry:
    step: int
    position: int
    message: bytes
    goes_on: bool  # it is done only if the session ends where it begins


class Journal:
    """The steps that a session consists of, in order.

    Args:
        limit: most bytes that are kept; a session that outgrows them cannot be made again.
    """

    def __init__(self, limit: int = JOURNAL_BYTES) -> None:
        self._limit = limit
        self._entries: list[_Entry] = []
        self._chosen: list[tuple[int, int, int]] = []  # step, length of the session before it, token
        self._bytes = 0
        self._outgrown = False

    def sent(self, step: int, position: int, message: bytes) -> None:
        """Note a step. One that begins before the end rolls back, unless it is done only if it goes on from the end."""
        goes_on = _goes_on(message)
        if not goes_on:
            self._roll_back(position)
            self._chosen = [choice for choice in self._chosen if choice[1] <= position]
        if self._outgrown:
            return
        self._entries.append(_Entry(step, position, message, goes_on))
        self._bytes += len(message)
        if self._bytes > self._limit:
            self._outgrown = True
            self._entries, self._bytes = [], 0

    def answered(self, result: pb.Result) -> None:
        """Note what a step gave."""
        tokens = list(result.tokens) if result.tokens else [result.token] if result.HasField("token") else []
        if tokens:
            first = result.length - len(tokens) + 1
            self._chosen += [(result.step, first + index, token) for index, token in enumerate(tokens)]
            return
        for index in reversed(range(len(self._entries))):
            entry = self._entries[index]
            if entry.step == result.step and entry.goes_on:  # from a wrong guess: it did nothing
                del self._entries[index]
                self._bytes -= len(entry.message)
                return

    @property
    def messages(self) -> list[bytes]:
        """The steps, as they were sent."""
        return [entry.message for entry in self._entries]

    @property
    def length(self) -> int:
        """Position of the last step."""
        return self._entries[-1].position if self._entries else 0

    def replay(self, acknowledged: int) -> tuple[list[bytes], list[int]]:
        """The session up to a step, for a new one.

        Steps ask for no token any more: the new session is told those tokens. But the last ones ask as they did, from
        the last on that did not begin with a guess: steps that are still on their way may go on from what they chose.

        Args:
            acknowledged: the last step that was answered; later ones are not part of it.

        Returns:
            The steps, numbered from 1, and the tokens that were chosen before the ones that ask again.

        Raises:
            LinkError: the session has outgrown the journal.
        """
        if self._outgrown:
            raise LinkError(
                f"the session has sent more than the {self._limit / 1e6:.0f} MB that are kept to make it again: start "
                "the generation again, with a smaller context or a codec of fewer bytes"
            )
        done = self._done(acknowledged)
        again = next((index for index in reversed(range(len(done))) if not done[index].goes_on), 0)
        messages = [renumbered_step(entry.message, index + 1, asks=index >= again) for index, entry in enumerate(done)]
        first = done[again].step if done else 0
        return messages, [token for step, _, token in self._chosen if step < first]

    def renumber(self, acknowledged: int, on_the_way: Mapping[int, int]) -> None:
        """Number the steps as the new session has them.

        Args:
            acknowledged: as in `replay`; the steps up to there got numbers from 1.
            on_the_way: the new numbers of those behind it.
        """
        numbers = {entry.step: number for number, entry in enumerate(self._done(acknowledged), 1)} | dict(on_the_way)
        self._entries = [entry for entry in self._entries if entry.step in numbers]
        self._bytes = sum(len(entry.message) for entry in self._entries)
        for entry in self._entries:
            entry.step = numbers[entry.step]
        self._chosen = [(numbers[step], length, token) for step, length, token in self._chosen]

    def _roll_back(self, position: int) -> None:
        """Forget the steps from a position on; of those that went on from guesses, the last need not lie farthest."""
        kept: list[_Entry] = []
        while self._entries and (self._entries[-1].goes_on or self._entries[-1].position >= position):
            entry = self._entries.pop()
            if entry.position < position:
                kept.append(entry)
            else:
                self._bytes -= len(entry.message)
        self._entries += reversed(kept)

    def _done(self, acknowledged: int) -> list[_Entry]:
        return [entry for entry in self._entries if entry.step <= acknowledged]


def context_of(opening: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """What the repetition penalty of a session that is made again counts; nothing if there is none."""
    return [*opening, *chosen] if opening else []


def _goes_on(message: bytes) -> bool:
    frame = pb.ClientMessage.FromString(message).step.frame
    return 0 < frame.tokens <= len(frame.drafted)
