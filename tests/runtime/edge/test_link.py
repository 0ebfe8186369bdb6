"""The device's end against a real server over real sockets."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest

from isthmus.errors import CodecError, LinkError, ProtocolError, RequestError
from isthmus.quant.codec import Raw16
from isthmus.runtime.edge.remote_session import LOCAL_ATTEMPTS
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.skipping import NO_BYPASS
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.stream import ClientStream
from isthmus.runtime.wire.transport import PIPELINE_DEPTH

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_generation_over_tls_gives_the_tokens_of_the_engine(server, make_generation, expected):
    generation = make_generation(server.address, PROMPT, seed=5)
    assert generation.run(20) == expected(PROMPT, 20, seed=5)
    assert generation.link.round_trips == 20


def test_sampling_arrives_at_the_server_exactly(server, make_link, engine, monkeypatch):
    seen = []
    new_session = engine.new_session
    monkeypatch.setattr(
        engine, "new_session", lambda n, sampling, *rest: seen.append((n, sampling, *rest)) or new_session(n, sampling)
    )
    sampling = Sampling(0.7, 40, 0.9, 0.05, 1.1, 2**64 - 1)
    make_link(server.address).open(99, sampling, [3, 1, 4])
    assert seen == [(99, sampling, [3, 1, 4], NO_BYPASS)]


def test_prefill_frames_travel_together_up_to_the_pipeline_depth(server, make_link, engine, hidden, eventually):
    engine.gate.clear()
    link = make_link(server.address)
    link.open(64, Sampling())
    for position in range(PIPELINE_DEPTH - 1):
        report = link.step(hidden([1], position), position, sample=False)
        assert report.token is None
        assert report.bytes_down == 0
    assert engine.advanced == 0
    engine.gate.set()
    assert eventually(lambda: engine.advanced == PIPELINE_DEPTH - 1)
    report = link.step(hidden([1], PIPELINE_DEPTH - 1), PIPELINE_DEPTH - 1, sample=True)
    assert report.token is not None
    assert link.round_trips == 1


def test_report_counts_bytes_and_times(server, make_link, hidden):
    link = make_link(server.address)
    link.open(64, Sampling())
    report = link.step(hidden([1, 2], 0), 0, sample=True)
    assert report.bytes_up > 2 * 16 * 4
    assert 0 < report.bytes_down < 64
    assert report.wait_s >= report.server_decode_s + report.server_queue_s + report.server_compute_s
    assert report.encode_s > 0


def test_smaller_position_rolls_the_session_back(server, make_generation, expected):
    generation = make_generation(server.address, PROMPT)
    first = list(generation.run(6))
    generation.position, generation.tokens = len(PROMPT) + 1, first[:2]
    assert generation.run(4) == expected(PROMPT, 6)


def test_closing_frees_the_session_and_may_be_repeated(server, make_generation, engine):
    link = make_generation(server.address, PROMPT).link
    assert len(engine.sessions) == 1
    link.close()
    assert engine.sessions == []
    link.close()
    with pytest.raises(LinkError, match="open"):
        link.step(np.zeros((1, 16), np.float32), 0, sample=True)


def test_a_link_can_be_opened_again_after_close(server, make_generation, make_link, expected):
    generation = make_generation(server.address, PROMPT)
    with pytest.raises(RequestError, match="close"):
        generation.link.open(64, Sampling())
    generation.run(2)
    generation.link.close()
    generation.link.open(64, Sampling())
    generation.tokens, generation.position = [], 0
    assert generation.run(3) == expected(PROMPT, 3)


def test_interrupt_cancels_the_session_and_its_waiting_steps(server, make_link, engine, hidden, eventually):
    engine.gate.clear()
    with pytest.raises(KeyboardInterrupt), make_link(server.address) as link:
        link.open(64, Sampling())
        for position in range(3):
            link.step(hidden([1], position), position, sample=False)
        threading.Timer(0.2, engine.gate.set).start()
        raise KeyboardInterrupt
    assert eventually(lambda: engine.sessions == [])
    assert engine.advanced <= 1, "steps that waited were computed after the cancel"


def test_non_finite_hidden_states_are_not_sent(server, make_link, engine):
    link = make_link(server.address)
    link.open(64, Sampling())
    with pytest.raises(CodecError, match="finite"):
        link.step(np.full((1, 16), np.nan, np.float32), 0, sample=True)
    assert engine.advanced == 0
    assert link.step(np.ones((1, 16), np.float32), 0, sample=True).token is not None


# The link breaks.


def test_generation_goes_on_where_the_connection_was_cut(server, make_proxy, make_generation, expected, bystander):
    proxy = make_proxy(server.address)
    generation = make_generation(proxy.address, PROMPT)
    for _ in range(3):
        generation.run(4)
        proxy.cut()
    assert generation.run(4) == expected(PROMPT, 16)
    assert generation.link.reattached == 3


@pytest.mark.parametrize("after", [0, 40, 90, 150, 400])
def test_a_cut_in_the_middle_of_the_prefill_loses_and_repeats_nothing(
    server, make_proxy, make_generation, expected, after
):
    proxy = make_proxy(server.address)
    generation = make_generation(proxy.address, list(range(40)))
    proxy.after_bytes_up = after
    assert generation.run(5) == expected(range(40), 5)
    assert generation.link.reattached == 1


def test_a_result_that_was_lost_is_sent_again_without_computing_it_again(
    server, make_proxy, make_generation, engine, expected, eventually
):
    proxy = make_proxy(server.address)
    generation = make_generation(proxy.address, [1, 2])
    generation.run(3)
    engine.gate.clear()
    before = engine.advanced

    def cut_while_the_server_computes():
        time.sleep(0.2)
        proxy.cut()
        time.sleep(0.2)
        engine.gate.set()

    thread = threading.Thread(target=cut_while_the_server_computes)
    thread.start()
    generation.run(1)
    thread.join()
    assert generation.tokens == expected([1, 2], 4)
    assert engine.advanced == before + 1


def test_a_link_that_comes_back_late_is_found(server, make_proxy, make_generation, expected):
    proxy = make_proxy(server.address)
    generation = make_generation(proxy.address, PROMPT)
    generation.run(2)
    proxy.accepting = False
    proxy.cut()
    threading.Timer(0.5, setattr, (proxy, "accepting", True)).start()
    assert generation.run(2) == expected(PROMPT, 4)
    assert generation.link.reattached == 1


def test_attempts_to_attach_are_finite(server, make_proxy, make_generation):
    proxy = make_proxy(server.address)
    generation = make_generation(proxy.address, PROMPT, on_server_loss="local")
    generation.run(1)
    proxy.accepting = False
    proxy.cut()
    with pytest.raises(LinkError, match=f"{LOCAL_ATTEMPTS} attempts to restore the session failed"):
        generation.run(1)


def test_a_session_whose_lease_has_ended_is_named(make_server, make_proxy, make_generation, engine, eventually):
    proxy = make_proxy(make_server(lease_s=0.1).address)
    generation = make_generation(proxy.address, PROMPT, on_server_loss="local")
    generation.run(1)
    proxy.cut()
    assert eventually(lambda: engine.sessions == [])
    with pytest.raises(LinkError):
        generation.run(1)


def test_a_server_that_ends_mid_generation_is_a_link_error(server, make_generation):
    generation = make_generation(server.address, PROMPT, on_server_loss="local")
    generation.run(1)
    server.stop(0)
    with pytest.raises(LinkError, match="attempts to restore"):
        generation.run(1)


def test_a_step_without_an_answer_meets_its_deadline(server, make_generation, engine):
    generation = make_generation(server.address, PROMPT, step_timeout=0.2, on_server_loss="fail")
    engine.gate.clear()
    with pytest.raises(LinkError, match=r"no answer within 0\.2 s"):
        generation.run(1)


def test_a_late_answer_is_still_taken_after_the_deadline(server, make_generation, engine, expected):
    generation = make_generation(server.address, PROMPT, step_timeout=0.5)
    generation.run(1)
    engine.gate.clear()
    threading.Timer(0.7, engine.gate.set).start()
    assert generation.run(3) == expected(PROMPT, 4)
    assert generation.link.reattached >= 1


# The link damages frames.


def corrupting(monkeypatch: pytest.MonkeyPatch, steps: list[int], damage) -> list[int]:
    """Damage the steps of these numbers on their way, each as often as it is listed; the numbers of all sent."""
    send = ClientStream.send
    sent = []

    def damaging_send(stream: ClientStream, data: bytes) -> None:
        message = pb.ClientMessage.FromString(data)
        if message.HasField("step"):
            sent.append(message.step.step)
            if message.step.step in steps:
                steps.remove(message.step.step)
                damage(message.step)
                data = message.SerializeToString()
        send(stream, data)

    monkeypatch.setattr(ClientStream, "send", damaging_send)
    return sent


def flip_payload(step: pb.Step) -> None:
    payload = bytearray(step.frame.payload)
    payload[5] ^= 1
    step.frame.payload = bytes(payload)


def flip_position(step: pb.Step) -> None:
    step.position ^= 1


def flip_number(step: pb.Step) -> None:
    step.step ^= 4


@pytest.mark.parametrize("damage", [flip_payload, flip_position, flip_number])
def test_damaged_steps_are_sent_again(server, make_generation, expected, monkeypatch, damage, bystander):
    generation = make_generation(server.address, list(range(30)))
    corrupting(monkeypatch, [2, 3, 3, 8, 12], damage)
    assert generation.run(8) == expected(range(30), 8)
    assert generation.link.reattached == 0


def test_steps_behind_a_damaged_one_are_sent_again_once(server, make_generation, expected, monkeypatch):
    generation = make_generation(server.address, PROMPT)
    sent = corrupting(monkeypatch, [1], flip_payload)
    assert generation.run(1) == expected(PROMPT, 1)
    assert sent == [1, 2, 3, 4, 1, 2, 3, 4]


def test_a_link_that_damages_every_frame_is_given_up(server, make_generation, monkeypatch):
    generation = make_generation(server.address, PROMPT)
    corrupting(monkeypatch, [1] * 100, flip_payload)
    with pytest.raises(ProtocolError, match="damaged") as caught:
        generation.run(1)
    assert caught.value.code == "BAD_CRC"


# The server cannot be reached, or does not fit.


def test_nobody_listening_is_a_link_error_that_names_the_address(make_link):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(LinkError, match=f"{address}.*check the address"):
        make_link(address).open(64, Sampling())


def test_a_server_that_never_answers_meets_the_connect_timeout(make_link):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(LinkError, match="no answer within"):
            make_link(address, connect_timeout=0.5).open(64, Sampling())
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:99999", "127.0.0.1:http", ":7070", "::1:7070"])
def test_an_address_of_another_form_is_named(make_link, address):
    with pytest.raises(LinkError, match="address"):
        make_link(address).open(64, Sampling())


def test_a_server_of_another_export_is_refused(server, make_link, engine, bystander):
    with pytest.raises(ProtocolError, match=f"{'b' * 64}.*{'a' * 64}") as caught:
        make_link(server.address, manifest_sha256="b" * 64).open(64, Sampling())
    assert caught.value.code == "MANIFEST_MISMATCH"


def test_a_full_server_says_when_to_come_again(make_server, make_generation, make_link):
    server = make_server(max_sessions=1)
    generation = make_generation(server.address, PROMPT)
    with pytest.raises(ProtocolError, match="try again in 1 s") as caught:
        make_link(server.address).open(64, Sampling())
    assert caught.value.code == "SERVER_FULL"
    generation.link.close()
    make_generation(server.address, PROMPT).run(1)


def test_chunks_fit_the_limits_of_the_server(make_server, make_link, hidden):
    server = make_server(max_frame_tokens=7)
    link = make_link(server.address, codec=Raw16())
    with pytest.raises(LinkError, match="open"):
        link.chunk_limit()
    link.open(64, Sampling())
    assert link.chunk_limit() == 7
    assert link.step(hidden(range(7), 0), 0, sample=True).token is not None
    with pytest.raises(ProtocolError, match="1 to 7"):
        link.step(hidden(range(8), 7), 7, sample=True)


def test_closing_ends_the_threads_of_the_link(server, make_generation):
    make_generation(server.address, PROMPT).link.close()  # the server's compute thread starts with its first work
    before = threading.active_count()
    links = [make_generation(server.address, PROMPT).link for _ in range(3)]
    for link in links:
        link.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [t.name for t in threading.enumerate() if t.name == "isthmus-link"]
    assert threading.active_count() <= before
