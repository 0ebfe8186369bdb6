"""What a device asks of a step with drafts, and whether the answer fits it."""

from __future__ import annotations

from typing import NamedTuple

from ...errors import ProtocolError
from ..wire import isthmus_pb2 as pb
from .generate import StepReport


class Question(NamedTuple):
    """A step that was sent and asks for tokens.

    Attributes:
        ids: of its positions.
        drafted: how many of the last ids are guesses.
        trip: round trips, one after the other, until its answer is in.
        encode_s: that the codec took.
        encoded: `time.perf_counter` after that.
        bytes_up: of its message.
    """

    step: int
    position: int
    ids: tuple[int, ...]
    drafted: int
    trip: int
    encode_s: float
    encoded: float
    bytes_up: int = 0

    @property
    def continues(self) -> bool:
        """Whether its first id is a guess, too: at what an earlier step chose."""
        return self.drafted == len(self.ids)

    @property
    def checked(self) -> tuple[int, ...]:
        """The guesses that the step's own tokens are compared with."""
        return self.ids[len(self.ids) - self.drafted + self.continues :]

    @property
    def first(self) -> int:
        """Position of the step's first token."""
        return self.position + len(self.ids) - len(self.checked)


class Answer(NamedTuple):
    """What a step gave.

    Attributes:
        tokens: the first guesses, as many as were right, and one more; none if the step went on from a wrong guess.
        report: what it cost; bytes are those that crossed since the last report.
        bytes_up: of the step itself.
    """

    tokens: tuple[int, ...]
    report: StepReport
    bytes_up: int = 0


def checked_tokens(question: Question, result: pb.Result) -> tuple[int, ...]:
    """The tokens of a step's result.

    Raises:
        ProtocolError: they, or the session's length, cannot be an answer to what was sent.
    """

    def unfit(what: str) -> ProtocolError:
        return ProtocolError("BAD_RESULT", f"step {question.step}: {what}; the server does not keep the protocol")

    if result.step != question.step:
        raise unfit(f"the server answered step {result.step} and lost this one's result")
    if not question.drafted:
        if not result.HasField("token") or result.tokens:
            raise unfit(f"{len(result.tokens)} tokens for a step without drafts, one was due")
        tokens: tuple[int, ...] = (result.token,)
    else:
        tokens = tuple(result.tokens)
        if not tokens and question.continues:
            return ()
        guesses = question.checked
        if not 1 <= len(tokens) <= len(guesses) + 1:
            raise unfit(f"{len(tokens)} tokens for {len(guesses)} drafts")
        right = len(tokens) - 1
        if tokens[:right] != guesses[:right] or (right < len(guesses) and tokens[right] == guesses[right]):
            raise unfit(f"tokens {list(tokens)} do not stop at the first wrong one of the drafts {list(guesses)}")
    if result.length != question.first + len(tokens) - 1:
        raise unfit(f"the session has {result.length} positions, {question.first + len(tokens) - 1} were due")
    return tokens
