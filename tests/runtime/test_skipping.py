"""Skip decoding: blocks that positions leave out, whatever the chunks, the batch or the wire between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.cli.main import main
from isthmus.errors import LinkError, ProtocolError, RequestError
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.segments import Embedding, LayerStack
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.skipping import Bypass, SkipSchedule, bypass_order, running_layers
from isthmus.runtime.wire import framing

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NEW = 24
SCHEDULE = SkipSchedule(4, 2, 10)  # of four layers; blocks of one, so that two may be left out


def small_blocks(tiny: Any, split: int | None = 2, **options: Any) -> Path:
    folder: Path = tiny.bundle(bits=8, split=split, layers_per_block=1, **options)
    return folder


# --- schedules


@given(st.data())
def test_a_schedule_runs_the_fewest_blocks_that_its_budget_allows_and_never_one_again(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=9))
    starts = np.cumsum([0, *sizes])
    blocks = [range(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    layers, inner = sum(sizes), data.draw(st.permutations(blocks[1:-1]))
    most = data.draw(st.integers(1, layers))
    least = data.draw(st.integers(min(most, layers - sum(map(len, inner))), most))
    schedule, prompt = SkipSchedule(most, least, data.draw(st.integers(1, 30))), data.draw(st.integers(1, 9))
    try:
        bypass = schedule.blocks(inner, layers, prompt)
    except RequestError:
        too_few, too_many = layers - sum(map(len, inner)), layers - len(inner[0])
        assert least < too_few or too_many < least < layers
        return
    before = layers
    for token in range(40):
        gone = [block for block in inner if bypass.get(block.start, 1000) <= prompt + token]
        assert gone == inner[: len(gone)]
        running = layers - sum(map(len, gone))
        assert schedule.budget(token) <= running <= before
        assert len(gone) == len(inner) or running - len(inner[len(gone)]) < schedule.budget(token)
        before = running
    assert all(position >= prompt for position in bypass.values())


def test_a_budget_falls_linearly() -> None:
    schedule = SkipSchedule.parse("30:18:128")
    assert [schedule.budget(token) for token in (0, 32, 64, 128, 500)] == [30, 27, 24, 18, 18]
    assert str(schedule) == "30:18:128"


@pytest.mark.parametrize("text", ["", "30", "30:18", "30:18:x", "18:30:128", "30:0:128", "30:18:0", "1:2:3:4"])
def test_a_schedule_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"as in 30:24:128|at least one token"):
        SkipSchedule.parse(text)


def test_a_schedule_that_a_bundle_cannot_keep_is_refused_before_anything_runs(tiny: Any) -> None:
    folder = small_blocks(tiny, None) / "device"
    with pytest.raises(RequestError, match="the model has 4 layers"):
        EdgeModel(folder, skip_schedule=SkipSchedule(5, 2, 4))
    with pytest.raises(RequestError, match="2 of 4 layers always run"):
        EdgeModel(folder, skip_schedule=SkipSchedule(4, 1, 4))
    with pytest.raises(RequestError, match=r"nothing is ever left out, .* 2 layers; end with 4 or fewer"):
        SkipSchedule(6, 5, 4).blocks([range(2, 4)], 6, 1)
    with pytest.raises(RequestError, match="has 2 blocks"):
        EdgeModel(tiny.bundle(bits=8) / "device", skip_schedule=SCHEDULE)


# --- layers


def test_export_weighs_the_blocks_between_the_first_and_the_last(tiny: Any) -> None:
    manifest = open_bundle(small_blocks(tiny), "device").manifest
    influence = manifest.validation["influence"]
    assert set(influence) == {"block-01-01", "block-02-02"}
    assert all(value > 0 for value in influence.values())
    least = min(influence, key=lambda name: influence[name])
    assert bypass_order(manifest)[0].start == int(least.split("-")[1])


def by_blocks(folder: Path, ids: list[int], bypass: dict[int, int]) -> np.ndarray:
    """Hidden states of a text, one block after the other, each over the positions that run it."""
    device = open_bundle(folder, "device")
    hidden = Embedding(device).rows(ids)
    stack = LayerStack(device, 1)
    for start in stack.starts:
        alone = {other: 0 for other in stack.starts if other != start}
        end = bypass.get(start, len(ids))
        rows = stack.session(len(ids), Bypass(alone)).forward(hidden[:end]) if end else hidden[:0]
        hidden = np.concatenate([rows, hidden[end:]])
    return hidden


@pytest.mark.parametrize(("kind", "bits"), [("llama", 4), ("mistral", 8), ("qwen2", 32)])
@settings(max_examples=15)
@given(data=st.data())
def test_no_chunking_changes_a_bit(tiny: Any, kind: str, bits: int, data: st.DataObject) -> None:
    folder = tiny.bundle(kind, bits=bits, layers_per_block=1)
    stack = LayerStack(open_bundle(folder, "device"), 1)
    ids = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=30))
    elsewhere = [98, 99]  # blocks of the other half
    starts = data.draw(st.sets(st.sampled_from([*stack.starts, *elsewhere])))
    bypass = {start: data.draw(st.integers(0, 30)) for start in starts}
    session, embedding = stack.session(len(ids) + 8, Bypass(bypass)), Embedding(open_bundle(folder, "device"))
    parts: list[np.ndarray] = []
    while (at := session.cache.length) < len(ids):
        count = data.draw(st.integers(1, len(ids) - at))
        if data.draw(st.booleans(), "guess wrongly first"):
            session.forward(embedding.rows([7] * data.draw(st.integers(1, 8))))
            session.cache.truncate(at)
        parts.append(session.forward(embedding.rows(ids[at : at + count])).copy())
    assert np.array_equal(np.concatenate(parts), by_blocks(folder, ids, bypass))


def test_stretches_of_equal_length_and_blocks_keep_their_rows(tiny: Any) -> None:
    folder = tiny.bundle("llama", bits=4, layers_per_block=1)
    device = open_bundle(folder, "device")
    bypass, ids = {98: 4, 99: 8}, list(range(1, 13))  # cuts by blocks of the other half
    rows = LayerStack(device, 1).session(12, Bypass(bypass)).forward(Embedding(device).rows(ids))
    assert np.array_equal(rows, by_blocks(folder, ids, {}))


# --- generations


def generated(model: EdgeModel, sampling: Sampling | None = None, **options: Any) -> tuple[list[int], list[int]]:
    """Ids of generated tokens, and the layers of each."""
    stream = model.tokens(PROMPT, max_new_tokens=NEW, sampling=sampling, end_tokens=(), **options)
    try:
        tokens = list(stream)
    finally:
        stream.close()
    return [token.id for token in tokens], [token.layers for token in tokens]


def expected(tiny: Any, sampling: Sampling | None = None) -> tuple[list[int], list[int]]:
    """What the unsplit model generates."""
    return generated(EdgeModel(small_blocks(tiny, None) / "device", skip_schedule=SCHEDULE), sampling)


def test_the_whole_model_on_the_device_leaves_out_what_the_schedule_says(tiny: Any) -> None:
    folder = small_blocks(tiny, None)
    ids, layers = expected(tiny)
    manifest = open_bundle(folder, "device").manifest
    blocks = SCHEDULE.blocks(bypass_order(manifest), 4, len(PROMPT))
    assert layers[0] == 4
    assert layers[-1] == 2
    assert layers == [running_layers(Bypass(blocks), manifest, len(PROMPT) + number - 1) for number in range(NEW)]
    model = EdgeModel(folder / "device")
    hidden = by_blocks(folder, PROMPT + ids[:-1], blocks)
    assert model._head is not None
    logits = model._head.logits_many(hidden[len(PROMPT) - 1 :])
    assert logits.argmax(1).tolist() == ids


def edge(folder: Path, server: BackServer, **options: Any) -> EdgeModel:
    return EdgeModel(folder / "device", server=server.address, codec="raw32", **options)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=5)])
@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("draft", ["off", "ngram"])
def test_split_and_drafted_tokens_are_those_of_the_whole_model(
    tiny: Any, serve: Callable[[Path], BackServer], split: int, draft: Any, sampling: Sampling
) -> None:
    folder = small_blocks(tiny, split)
    model = edge(folder, serve(folder), draft=draft, skip_schedule=SCHEDULE)
    assert generated(model, sampling) == expected(tiny, sampling)
    assert generated(model, sampling) != generated(edge(folder, serve(folder)), sampling)


def test_a_session_that_is_made_again_leaves_out_the_same(
    tiny: Any, serve: Callable[[Path], BackServer], tokens_though_stopped: Callable[..., list[int]]
) -> None:
    folder = small_blocks(tiny)
    first, second = serve(folder), serve(folder)
    addresses = f"{first.address},{second.address}"
    model = EdgeModel(folder / "device", server=addresses, codec="raw32", draft="off", skip_schedule=SCHEDULE)
    assert tokens_though_stopped(model, PROMPT, NEW, first) == expected(tiny)[0]


def test_a_hand_over_leaves_out_the_same(tiny: Any, serve: Callable[[Path], BackServer]) -> None:
    from isthmus.runtime.edge.handover import HandOver

    folder = small_blocks(tiny, 2, device_layers="all")
    model = edge(folder, serve(folder), skip_schedule=SCHEDULE)
    for send in ("kv", "hidden"):
        plan = HandOver(len(PROMPT) + 7, send)  # after a block of the server's was left out
        stream = model.tokens(PROMPT, max_new_tokens=NEW, hand_over=plan, end_tokens=())
        tokens = list(stream)
        stream.close()
        assert [token.id for token in tokens] == expected(tiny)[0]
        assert {token.source for token in tokens} == {"local", "server"}


def test_exits_and_a_schedule_are_not_both_kept(tiny: Any) -> None:
    with pytest.raises(RequestError, match="calibrated at full depth"):
        EdgeModel(small_blocks(tiny) / "device", server="127.0.0.1:1", exit_agreement=0.9, skip_schedule=SCHEDULE)


# --- the wire


def test_an_older_server_is_not_taken_for_one_that_skips(
    tiny: Any, serve: Callable[[Path], BackServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_blocks(tiny)
    server = serve(folder)
    monkeypatch.setattr(framing, "PROTOCOL_MINOR", framing.SKIP_MINOR - 1)
    model = edge(folder, server, skip_schedule=SCHEDULE)
    with pytest.raises(LinkError, match=r"speaks protocol 1\.2: a skip schedule needs 1\.3; update the server"):
        model.generate(PROMPT, max_new_tokens=4)


@pytest.mark.parametrize("bypass", [{1: 5}, {7: 5}, {0: 5, 2: 9}])
def test_blocks_that_are_not_the_servers_are_refused(
    tiny: Any, serve: Callable[[Path], BackServer], bypass: dict[int, int]
) -> None:
    from isthmus.runtime.edge.link import RemoteBack

    folder = small_blocks(tiny)
    model = edge(folder, serve(folder))
    back = model._back(model._levels[0], None)
    assert isinstance(back, RemoteBack)
    with pytest.raises(ProtocolError, match="each must begin a block of this server's half"):
        back.open(20, Sampling(), (), Bypass(bypass))


def test_the_command_tells_how_many_layers_ran(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(small_blocks(tiny, None) / "device"), "--prompt-ids", "3,1,4", "-n", "20"]
    assert main([*command, "--skip-schedule", "4:2:6", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["skip_schedule"], result["ffn_skip"]) == ("4:2:6", None)
    assert result["mean_layers"] == sum(token["layers"] for token in result["tokens"]) / result["new_tokens"] < 4
    assert main([*command, "--skip-schedule", "4:2:6"]) == 0
    assert f"{result['mean_layers']:.1f} layers a token" in capsys.readouterr().err
    assert main([*command, "--skip-schedule", "2:4"]) == 1
    assert "must be MOST:LEAST:TOKENS" in capsys.readouterr().err
