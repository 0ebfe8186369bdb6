"""Sessions that move between a device with the whole model and its server, over TLS, against the undisturbed run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import BundleError, LinkError, ProtocolError, RequestError, SecurityError
from isthmus.quant.codec import Raw32
from isthmus.runtime.back import BackSession
from isthmus.runtime.bundle import MANIFEST_NAME, open_bundle
from isthmus.runtime.edge import server_watch
from isthmus.runtime.edge.handover import HandOver
from isthmus.runtime.edge.link import RemoteBack
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.stream import ClientStream

PROMPT = list(range(40, 60))
NEW = 24
SAMPLED = Sampling(temperature=1.2, top_p=0.95, repetition_penalty=1.3, seed=11)
SAMPLINGS = [Sampling(), SAMPLED]


def endless(bundle: Path, target: Path) -> Path:
    """A copy of a bundle whose texts have no end token, which a random model may choose anywhere."""
    copy = shutil.copytree(bundle, target / "bundle")
    for manifest in copy.glob(f"*/{MANIFEST_NAME}"):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"end_tokens": []}))
    return copy


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless(tiny.bundle(split=1, device_layers="all"), tmp_path_factory.mktemp("split"))


@pytest.fixture
def server(serve: Callable[..., BackServer], folder: Path) -> BackServer:
    return serve(folder)


def device(folder: Path, address: str | None, codec: str = "raw32") -> EdgeModel:
    return EdgeModel(folder / "device", server=address, codec=codec, threads=1)


def run(model: EdgeModel, sampling: Sampling = SAMPLINGS[0], at: int | None = None, send: Any = "hidden") -> Any:
    plan = None if at is None else HandOver(at, send)
    return model.generate(PROMPT, max_new_tokens=NEW, sampling=sampling, hand_over=plan)


def sources(result: Any) -> str:
    """One letter for each generated token: who chose it."""
    return "".join(token.source[0] for token in result.tokens)


@pytest.fixture(scope="module")
def undisturbed(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[int]]:
    """Tokens of the same weights wholly on the device, exported without a split."""
    model = EdgeModel(endless(tiny.bundle(), tmp_path_factory.mktemp("whole")) / "device", threads=2)
    return lambda sampling: run(model, sampling).token_ids


# The bundle.


def test_the_device_holds_the_server_s_files_byte_for_byte(folder: Path) -> None:
    bundle = open_bundle(folder, "device")
    assert bundle.manifest.whole_on_device
    assert not bundle.manifest.device_only
    server_files = {entry.name for entry in bundle.manifest.files["server"]}
    assert server_files
    for name in server_files:
        assert (folder / "device" / name).read_bytes() == (folder / "server" / name).read_bytes()
    own = bundle.own_back()
    assert [s.name for s in own.segments("block")] == [s.name for s in open_bundle(folder, "server").segments("block")]
    assert bundle.segments("embed")[0].data_file == own.segments("head")[0].data_file  # tied: stored once


def test_each_folder_of_a_whole_bundle_is_still_known_for_the_half_that_it_is(folder: Path) -> None:
    assert open_bundle(folder / "device").half == "device"
    assert open_bundle(folder / "server").half == "server"
    assert open_bundle(folder, "server").folder == folder / "server"
    with pytest.raises(BundleError, match="is the device half"):
        open_bundle(folder / "device", "server")
    with pytest.raises(BundleError, match="is the server half"):
        open_bundle(folder / "server", "device")


def test_a_missing_or_altered_layer_of_the_device_s_copy_is_named(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "device", tmp_path / "device")
    block = copy / open_bundle(folder, "server").segments("block")[0].data_file
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 1
    block.write_bytes(content)
    with pytest.raises(BundleError, match=block.name):
        device(tmp_path, None)
    block.unlink()
    with pytest.raises(BundleError, match=f"{block.name}: missing"):
        device(tmp_path, None)


def test_other_bundles_have_no_back_of_their_own(tiny: Any) -> None:
    for other in (tiny.bundle(split=1), tiny.bundle()):
        with pytest.raises(BundleError, match="--device-layers all"):
            open_bundle(other, "device").own_back()


# Alone, and split as usual.


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_without_a_server_the_device_generates_alone(
    folder: Path, undisturbed: Callable[..., list[int]], sampling: Sampling
) -> None:
    result = run(device(folder, None), sampling)
    assert result.token_ids == undisturbed(sampling)
    assert sources(result) == "l" * NEW
    assert (result.bytes_up, result.round_trips, result.codec, result.moves) == (0, 0, "none", ())


def test_with_a_server_the_model_is_split_as_usual_and_the_own_back_stays_shut(
    folder: Path, server: BackServer, undisturbed: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = device(folder, server.address)
    monkeypatch.setattr(EdgeModel, "_own_back", property(lambda self: pytest.fail("the own back was opened")))
    result = run(model)
    assert result.token_ids == undisturbed(SAMPLINGS[0])
    assert sources(result) == "s" * NEW
    assert result.moves == ()


# Hand-over.


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("send", ["kv", "hidden"])
@pytest.mark.parametrize("at", [1, 2, 13, len(PROMPT), len(PROMPT) + 1, len(PROMPT) + 9])
def test_a_hand_over_at_any_token_changes_no_token(
    folder: Path,
    server: BackServer,
    undisturbed: Callable[..., list[int]],
    at: int,
    send: str,
    sampling: Sampling,
) -> None:
    result = run(device(folder, server.address), sampling, at, send)
    assert result.token_ids == undisturbed(sampling)
    alone = max(0, at - len(PROMPT))  # tokens chosen before token `at` was run
    assert sources(result) == "l" * alone + "s" * (NEW - alone)
    (move,) = result.moves
    assert (move.to, move.token, move.send, move.positions) == ("server", at, send, at - 1)
    assert 0 < move.bytes_up <= result.bytes_up
    assert result.bytes_up == sum(token.bytes_up for token in result.tokens)
    assert result.tokens[alone].bytes_up >= move.bytes_up
    assert all(token.bytes_up == 0 for token in result.tokens[:alone])
    assert result.round_trips == NEW - alone
    assert result.to_dict()["moves"] == [move._asdict()]


@pytest.mark.parametrize("send", ["kv", "hidden"])
def test_the_cache_after_a_hand_over_is_the_one_that_prefill_makes(
    folder: Path, server: BackServer, monkeypatch: pytest.MonkeyPatch, send: str
) -> None:
    caches = []
    close = BackSession.close
    monkeypatch.setattr(
        BackSession, "close", lambda session: caches.append(session.rows(0, len(PROMPT) + 5)) or close(session)
    )
    run(device(folder, server.address))
    run(device(folder, server.address), at=len(PROMPT) + 4, send=send)
    assert np.array_equal(*caches)


@pytest.mark.parametrize("send", ["kv", "hidden"])
def test_tokens_that_are_late_twice_move_the_session(
    folder: Path, server: BackServer, undisturbed: Callable[..., list[int]], send: Any
) -> None:
    model = device(folder, server.address)

    def moved(deadline_s: float, at: int | None = None) -> tuple[str, list[int]]:
        plan = HandOver(at, send, deadline_s)
        result = model.generate(PROMPT, max_new_tokens=NEW, hand_over=plan)
        assert result.token_ids == undisturbed(SAMPLINGS[0])
        return sources(result), [move.token for move in result.moves]

    # The first token does not count; the second and the third are late.
    assert moved(1e-9) == ("lll" + "s" * (NEW - 3), [len(PROMPT) + 3])
    assert moved(1e9) == ("l" * NEW, [])
    assert moved(1e-9, at=5) == ("s" * NEW, [5])
    assert moved(1e9, at=len(PROMPT) + 6)[1] == [len(PROMPT) + 6]


@pytest.mark.parametrize("send", ["kv", "hidden"])
def test_two_precisions_and_a_head_of_its_own_move_as_well(
    tiny: Any, serve: Callable[..., BackServer], send: str
) -> None:
    options = {"front_bits": 4, "back_bits": 8, "embed_bits": 16, "head_bits": 8}
    mixed = tiny.bundle("llama-untied", split=2, device_layers="all", **options)
    expected = run(device(mixed, None), SAMPLED).token_ids
    result = run(device(mixed, serve(mixed).address), SAMPLED, len(PROMPT) + 7, send)
    assert result.token_ids == expected
    assert sources(result) == "l" * 7 + "s" * (NEW - 7)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("at", [None, 1, len(PROMPT) + 2, len(PROMPT) + 5, 500])
def test_a_step_that_rolls_back_does_so_wherever_the_session_is(
    folder: Path, server: BackServer, undisturbed: Callable[..., list[int]], at: int | None, lost: bool
) -> None:
    model = device(folder, server.address)
    front = model._stack.session(len(PROMPT) + NEW)
    back = model._back(Raw32(), None if at is None else HandOver(at, "kv"))
    back.open(len(PROMPT) + NEW, SAMPLED, PROMPT)
    tokens: list[int] = []

    def advance(count: int) -> None:
        for _ in range(count):
            ids, position = tokens[-1:] or PROMPT, front.cache.length
            report = back.step(front.forward(model._embedding.rows(ids)), position, ids, sample=True)
            assert report.token is not None
            tokens.append(report.token)

    advance(10)
    front.cache.truncate(len(PROMPT) + 2)
    del tokens[3:]
    advance(3)
    if lost:
        server.stop(0)
    advance(NEW - 6)
    back.close()
    assert tokens == undisturbed(SAMPLED)
    assert back.source == ("local" if lost or at == 500 else "server")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("codec", ["raw32", "raw16"])
def test_a_quantized_cache_is_sent_as_its_codes(
    tiny: Any, serve: Callable[..., BackServer], bits: int, codec: str
) -> None:
    quantized = tiny.bundle(split=1, device_layers="all", front_kv_bits=bits, back_kv_bits=bits)
    expected = run(device(quantized, None)).token_ids
    at = len(PROMPT) + 6
    result = run(device(quantized, serve(quantized).address, codec), at=at, send="kv")
    if codec == "raw32":
        assert result.token_ids == expected
    token_bytes = 3 * 2 * 2 * 16 * bits // 8  # layers, sides, heads, width
    sent = (at - 1) * token_bytes + (4 if codec == "raw32" else 2) * 64
    assert sent < result.moves[0].bytes_up < sent + 200


def test_a_float_cache_takes_eight_bits_with_a_codec_that_is_not_exact(folder: Path, server: BackServer) -> None:
    at = len(PROMPT) + 6
    exact = run(device(folder, server.address), at=at, send="kv")
    coded = run(device(folder, server.address, "raw16"), at=at, send="kv")
    rows = (at - 1) * 3 * 2 * 2
    assert 4 * 16 * rows < exact.moves[0].bytes_up < 4 * 16 * rows + 500
    assert 18 * rows < coded.moves[0].bytes_up < 18 * rows + 400
    assert coded.token_ids[:6] == exact.token_ids[:6]


@pytest.mark.parametrize("send", ["kv", "hidden"])
def test_a_transfer_is_cut_into_frames_that_the_server_takes(
    folder: Path,
    serve: Callable[..., BackServer],
    undisturbed: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    send: str,
) -> None:
    sent: list[int] = []
    original = ClientStream.send
    monkeypatch.setattr(
        ClientStream, "send", lambda stream, message: sent.append(len(message)) or original(stream, message)
    )
    server = serve(folder, max_frame_tokens=3, max_frame_bytes=2000)
    result = run(device(folder, server.address), at=len(PROMPT) + 5, send=send)
    assert result.token_ids == undisturbed(SAMPLINGS[0])
    assert len(sent) > (len(PROMPT) + 4) // 3
    assert max(sent) <= 2000


@pytest.mark.parametrize("send", ["kv", "hidden"])
@pytest.mark.parametrize("after", [0, 700, 3000, 8000])
def test_a_link_that_breaks_in_the_transfer_loses_and_repeats_nothing(
    folder: Path,
    server: BackServer,
    make_proxy: Callable[..., Any],
    undisturbed: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    send: str,
    after: int,
) -> None:
    proxy = make_proxy(server.address)
    opened = RemoteBack.open

    def open_and_arm(link: RemoteBack, *arguments: Any) -> None:
        opened(link, *arguments)
        proxy.after_bytes_up = after
        links.append(link)

    links: list[RemoteBack] = []
    monkeypatch.setattr(RemoteBack, "open", open_and_arm)
    result = run(device(folder, proxy.address), SAMPLED, len(PROMPT) + 12, send)
    assert result.token_ids == undisturbed(SAMPLED)
    assert [move.to for move in result.moves] == ["server"]
    assert links[0].reattached == 1


@pytest.mark.parametrize("damaged", [[1], [2, 2], [1, 3, 4]])
def test_damaged_keys_and_values_are_sent_again(
    folder: Path,
    serve: Callable[..., BackServer],
    undisturbed: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    damaged: list[int],
) -> None:
    send = ClientStream.send
    left = list(damaged)

    def damaging_send(stream: ClientStream, data: bytes) -> None:
        message = pb.ClientMessage.FromString(data)
        if message.step.HasField("kv") and message.step.step in left:
            left.remove(message.step.step)
            payload = bytearray(message.step.kv.payload)
            payload[-3] ^= 64
            message.step.kv.payload = bytes(payload)
            data = message.SerializeToString()
        send(stream, data)

    monkeypatch.setattr(ClientStream, "send", damaging_send)
    server = serve(folder, max_frame_tokens=5)
    result = run(device(folder, server.address), SAMPLED, len(PROMPT) + 3, "kv")
    assert result.token_ids == undisturbed(SAMPLED)
    assert not left
    assert [move.to for move in result.moves] == ["server"]


def test_an_older_server_gets_hidden_states_and_no_keys_and_values(
    folder: Path,
    server: BackServer,
    undisturbed: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("isthmus.runtime.wire.framing.PROTOCOL_MINOR", 0)
    refused = run(device(folder, server.address), at=len(PROMPT) + 3, send="kv")
    assert "speaks protocol 1.0: keys and values need 1.1" in caplog.text
    assert server.sessions == 0
    moved = run(device(folder, server.address), at=len(PROMPT) + 3, send="hidden")
    assert refused.token_ids == moved.token_ids == undisturbed(SAMPLINGS[0])
    assert (refused.moves, len(moved.moves)) == ((), 1)


# Back to the device.


def stop_at(model: EdgeModel, server: BackServer, number: int, **options: Any) -> Any:
    """Generate, and stop the server once so many tokens are there."""
    stream = model.stream(PROMPT, max_new_tokens=NEW, **options)
    tokens = stream._tokens._tokens

    def watched() -> Iterator[Any]:
        for index, token in enumerate(tokens, 1):
            yield token
            if index == number:
                server.stop(0)

    stream._tokens._tokens = watched()
    for _ in stream:
        pass
    return stream.result


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("plan", [None, HandOver(1), HandOver(len(PROMPT) + 4, "kv")], ids=["split", "first", "later"])
def test_a_lost_server_is_not_the_end(
    folder: Path,
    server: BackServer,
    undisturbed: Callable[..., list[int]],
    caplog: pytest.LogCaptureFixture,
    plan: HandOver | None,
    sampling: Sampling,
) -> None:
    model = device(folder, server.address)
    result = stop_at(model, server, 9, sampling=sampling, hand_over=plan)
    assert result.token_ids == undisturbed(sampling)
    alone = 4 if plan and plan.at > 1 else 0
    assert sources(result) == "l" * alone + "s" * (9 - alone) + "l" * (NEW - 9)
    move = result.moves[-1]
    kept = len(PROMPT) + 3 if plan and plan.at > 1 else 0
    assert (move.to, move.token, move.positions) == ("local", len(PROMPT) + 9, len(PROMPT) + 9 - kept)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING and "goes on alone" in r.message]
    assert len(warnings) == 1
    assert f"from token {len(PROMPT) + 9} on" in warnings[0]


def test_a_session_that_the_server_forgot_comes_back(
    folder: Path,
    serve: Callable[..., BackServer],
    make_proxy: Callable[..., Any],
    undisturbed: Callable[..., list[int]],
    eventually: Callable[..., bool],
) -> None:
    server = serve(folder, lease_s=0.05)
    proxy = make_proxy(server.address)
    model = device(folder, proxy.address)
    stream = model.stream(PROMPT, max_new_tokens=NEW)
    pieces = iter(stream)
    while len(stream.result.token_ids) < 5:
        next(pieces)
    proxy.cut()
    assert eventually(lambda: server.sessions == 0)
    for _ in pieces:
        pass
    assert stream.result.token_ids == undisturbed(SAMPLINGS[0])
    assert stream.result.moves[-1].to == "local"


@pytest.mark.parametrize("send", ["kv", "hidden"])
def test_a_hand_over_to_a_server_that_is_not_there_fails_and_the_device_goes_on(
    folder: Path, undisturbed: Callable[..., list[int]], caplog: pytest.LogCaptureFixture, send: str
) -> None:
    result = run(device(folder, "127.0.0.1:1"), SAMPLED, len(PROMPT) + 4, send)
    assert result.token_ids == undisturbed(SAMPLED)
    assert sources(result) == "l" * NEW
    assert result.moves == ()
    assert "the hand-over at token 24 failed" in caplog.text


def test_a_full_server_leaves_the_session_on_the_device(
    folder: Path, serve: Callable[..., BackServer], undisturbed: Callable[..., list[int]]
) -> None:
    server = serve(folder, max_sessions=1)
    first = device(folder, server.address).stream(PROMPT, max_new_tokens=NEW)
    result = run(device(folder, server.address), at=len(PROMPT) + 2)
    first.close()
    assert result.token_ids == undisturbed(SAMPLINGS[0])
    assert sources(result) == "l" * NEW


def test_a_row_larger_than_a_frame_leaves_the_session_on_the_device(
    folder: Path, serve: Callable[..., BackServer], undisturbed: Callable[..., list[int]], caplog: Any
) -> None:
    server = serve(folder, max_frame_bytes=700)
    result = run(device(folder, server.address), at=len(PROMPT) + 2, send="kv")
    assert result.token_ids == undisturbed(SAMPLINGS[0])
    assert result.moves == ()
    assert "send hidden states" in caplog.text


def test_a_model_s_generations_do_not_touch_each_other(
    folder: Path, server: BackServer, undisturbed: Callable[..., list[int]]
) -> None:
    model = device(folder, server.address)
    for sampling, at, send in ((SAMPLED, 22, "kv"), (SAMPLINGS[0], None, "hidden"), (SAMPLED, 30, "hidden")):
        assert run(model, sampling, at, send).token_ids == undisturbed(sampling)
    assert server.sessions == 0


# And to the server again.


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("plan", [None, HandOver(len(PROMPT) + 4, "kv")], ids=["split", "handed over"])
def test_a_session_moves_to_the_server_again_when_it_can(
    folder: Path,
    server: BackServer,
    make_away: Callable[..., Any],
    undisturbed: Callable[..., list[int]],
    plan: HandOver | None,
    sampling: Sampling,
) -> None:
    away = make_away(server, partial(device, folder), PROMPT, sampling=sampling, hand_over=plan)
    away.until(6)
    away.lose()
    away.until(10)
    away.find()
    away.until(13)
    away.lose()
    away.until(17)
    away.find()
    ids, chosen_by, moves = away.end(NEW)
    assert ids == undisturbed(sampling)
    before = 4 if plan else 0
    assert chosen_by == "l" * before + "s" * (6 - before) + "l" * 4 + "s" * 3 + "l" * 4 + "s" * 7
    assert moves[-4:] == [("local", 6, ""), ("server", 10, "hidden"), ("local", 13, ""), ("server", 17, "hidden")]
    assert server.sessions <= 2  # those of the broken streams end with their leases


def test_a_session_that_the_server_forgot_is_begun_there_again(
    folder: Path,
    serve: Callable[..., BackServer],
    make_away: Callable[..., Any],
    undisturbed: Callable[..., list[int]],
    eventually: Callable[..., bool],
) -> None:
    server = serve(folder, lease_s=0.05)
    away = make_away(server, partial(device, folder), PROMPT)
    away.until(5)
    away.proxy.cut()
    assert eventually(lambda: server.sessions == 0)
    away.until(6)
    away.find()
    ids, chosen_by, _ = away.end(NEW)
    assert ids == undisturbed(SAMPLINGS[0])
    assert chosen_by == "s" * 5 + "l" + "s" * (NEW - 6)


def test_a_hand_over_that_failed_is_made_up_for(
    folder: Path, server: BackServer, make_away: Callable[..., Any], undisturbed: Callable[..., list[int]]
) -> None:
    away = make_away(server, partial(device, folder), PROMPT, hand_over=HandOver(len(PROMPT) + 2, "kv"))
    away.lose()
    away.until(5)
    away.find()
    ids, chosen_by, moves = away.end(NEW)
    assert ids == undisturbed(SAMPLINGS[0])
    assert chosen_by == "l" * 5 + "s" * (NEW - 5)
    assert moves == [("server", 5, "hidden")]


def test_a_server_that_is_lost_again_at_once_is_found_again(
    folder: Path, server: BackServer, make_away: Callable[..., Any], undisturbed: Callable[..., list[int]]
) -> None:
    away = make_away(server, partial(device, folder), PROMPT, sampling=SAMPLED)
    away.until(5)
    away.lose()
    away.until(9)
    away.find()
    away.lose()
    away.until(12)
    away.find()
    ids, chosen_by, moves = away.end(NEW)
    assert ids == undisturbed(SAMPLED)
    assert chosen_by == "s" * 5 + "l" * 7 + "s" * (NEW - 12)
    assert moves == [("local", 5, ""), ("server", 12, "hidden")]


def test_a_generation_that_ends_alone_asks_for_no_server_any_more(
    folder: Path, server: BackServer, make_away: Callable[..., Any], eventually: Callable[..., bool]
) -> None:
    away = make_away(server, partial(device, folder), PROMPT)
    away.until(5)
    away.lose()
    assert away.end(NEW)[1] == "s" * 5 + "l" * (NEW - 5)
    assert eventually(lambda: not away.watched)


def test_trials_end_where_none_will_succeed(eventually: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_watch, "FIRST_PAUSE_S", 0.001)
    errors = [LinkError("refused"), ProtocolError("SERVER_FULL", "full"), SecurityError("untrusted")]
    trials: list[LinkError] = []

    def trial() -> None:
        trials.append(errors[len(trials)])
        raise trials[-1]

    watch = server_watch.ServerWatch(trial, 0)
    assert eventually(lambda: trials == errors)
    assert not watch.found


# What is refused.


def test_a_hand_over_needs_a_server_and_a_whole_bundle(tiny: Any, folder: Path) -> None:
    with pytest.raises(RequestError, match="give the server's address"):
        run(device(folder, None), at=3)
    for other, address in ((tiny.bundle(split=1), "127.0.0.1:1"), (tiny.bundle(), None)):
        with pytest.raises(RequestError, match="--device-layers all"):
            run(device(other, address), at=3)


@pytest.mark.parametrize("at", [0, -1])
def test_a_hand_over_before_the_first_token_is_refused(at: int) -> None:
    with pytest.raises(RequestError, match=f"token {at}: must be at least 1"):
        HandOver(at)


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan")])
def test_a_deadline_that_is_not_positive_is_refused(deadline: float) -> None:
    with pytest.raises(RequestError, match="must be positive"):
        HandOver(deadline_s=deadline)


def test_a_hand_over_at_no_time_is_refused() -> None:
    with pytest.raises(RequestError, match="give the token or a deadline"):
        HandOver(send="kv")


def test_an_unknown_way_of_sending_is_refused() -> None:
    with pytest.raises(RequestError, match=r"hand-over of 'logits': must be one of kv, hidden"):
        HandOver(1, "logits")  # type: ignore[arg-type]


def test_a_kv_budget_is_the_token_that_would_pass_it(folder: Path) -> None:
    manifest = open_bundle(folder, "device", verify=False).manifest
    token_bytes = 4 * 2 * 2 * 16 * 4
    assert HandOver.within(manifest, 10 * token_bytes).at == 11
    assert HandOver.within(manifest, 11 * token_bytes - 1, "kv") == HandOver(11, "kv")
    assert HandOver.within(manifest, 0).at == 1


def test_a_server_that_is_not_there_at_the_start_is_an_error_while_nothing_is_lost(folder: Path) -> None:
    with pytest.raises(LinkError, match=r"127\.0\.0\.1:1"):
        run(device(folder, "127.0.0.1:1"))
