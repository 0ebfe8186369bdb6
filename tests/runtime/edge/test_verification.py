"""Steps with drafts over real sockets, and answers that do not fit them."""

from __future__ import annotations

from typing import Any

import pytest

from isthmus.errors import ProtocolError, RequestError
from isthmus.runtime.edge.verification import Question, checked_tokens
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.transport import RESULTS_KEPT

PROMPT = [1, 2, 3, 4, 5]


def submit(link: Any, hidden: Any, ids: list[int], position: int, drafted: int = 0) -> None:
    link.submit(hidden(ids, position), position, ids, drafted=drafted)


def test_steps_are_submitted_together_and_collected_in_order(server, make_link, hidden, expected):
    tokens = expected(PROMPT, 8)
    link = make_link(server.address)
    link.open(64, Sampling())
    assert link.verifies
    submit(link, hidden, PROMPT, 0)
    submit(link, hidden, tokens[:2], 5, drafted=2)
    submit(link, hidden, [tokens[2], tokens[3] ^ 1], 7, drafted=2)
    submit(link, hidden, [tokens[4]], 9, drafted=1)
    assert link.on_the_way == 4
    answers = [link.collect().tokens for _ in range(4)]
    assert answers == [tuple(tokens[:1]), tuple(tokens[1:3]), tuple(tokens[3:4]), ()]
    assert (link.on_the_way, link.round_trips) == (0, 1)
    submit(link, hidden, [tokens[3], tokens[4]], 8, drafted=1)
    assert link.collect().tokens == tuple(tokens[4:6])
    assert link.round_trips == 2


def test_no_answer_is_lost_with_a_stream(server, make_link, make_proxy, hidden, expected, engine, eventually):
    tokens = expected(PROMPT, 12)
    proxy = make_proxy(server.address)
    link = make_link(proxy.address)
    link.open(64, Sampling())
    submit(link, hidden, PROMPT, 0)
    assert link.collect().tokens == (tokens[0],)
    engine.gate.clear()
    for number in range(6):
        submit(link, hidden, [tokens[number]], 5 + number, drafted=int(number > 0))
        if number == 2:
            proxy.cut()
    engine.gate.set()
    assert [link.collect().tokens for _ in range(6)] == [(token,) for token in tokens[1:7]]
    proxy.cut()
    submit(link, hidden, tokens[6:8], 11, drafted=1)
    assert link.collect().tokens == tuple(tokens[7:9])
    assert link.reattached >= 2


def test_no_more_steps_are_sent_than_results_are_kept(server, make_link, hidden):
    link = make_link(server.address)
    link.open(64, Sampling())
    submit(link, hidden, PROMPT, 0)
    for number in range(RESULTS_KEPT - 1):
        submit(link, hidden, [1], 5 + number, drafted=1)
    with pytest.raises(RequestError, match="collect"):
        submit(link, hidden, [1], 5, drafted=1)


@pytest.mark.parametrize(
    ("drafted", "result"),
    [
        (0, pb.Result(step=7, length=13)),
        (0, pb.Result(step=7, length=13, tokens=[1])),
        (0, pb.Result(step=7, length=12, token=1)),
        (2, pb.Result(step=7, length=13, token=1)),
        (2, pb.Result(step=7, length=13)),
        (2, pb.Result(step=7, length=13, tokens=[5, 6, 1, 1])),
        (2, pb.Result(step=7, length=12, tokens=[6, 6])),
        (2, pb.Result(step=7, length=11, tokens=[5])),
        (2, pb.Result(step=7, length=13, tokens=[5, 1])),
        (3, pb.Result(step=7, length=11, tokens=[5])),
        (2, pb.Result(step=8, length=12, tokens=[5, 1])),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(drafted, result):
    with pytest.raises(ProtocolError, match="step 7"):
        checked_tokens(Question(7, 10, (4, 5, 6), drafted, 1, 0.0, 0.0), result)


@pytest.mark.parametrize(
    ("drafted", "tokens", "length"), [(2, [5, 6, 1], 13), (2, [5, 1], 12), (2, [1], 11), (3, [5, 1], 12), (3, [], 3)]
)
def test_an_answer_that_fits_is_taken(drafted, tokens, length):
    result = pb.Result(step=7, length=length, tokens=tokens)
    assert checked_tokens(Question(7, 10, (4, 5, 6), drafted, 1, 0.0, 0.0), result) == tuple(tokens)
