"""Keys and values of a shared beginning: the same tokens with and without them, and for nobody else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.quant.codec import Raw32
from isthmus.runtime.back import BackEngine
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.batcher import Batcher
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.prefix_cache import BLOCK, ENTRY_BYTES, Prefix, PrefixCache
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.server.sessions import Session, Work
from isthmus.runtime.skipping import NO_BYPASS, Bypass, SkipSchedule
from isthmus.runtime.wire import isthmus_pb2 as pb
from isthmus.runtime.wire.framing import kv_message, parse_client_message, step_message
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity
from isthmus.runtime.wire.tokens import issue_token

ROOM = 1 << 24
ENTRY = ENTRY_BYTES + 64


def block(value: int) -> np.ndarray:
    return np.full(64, value, np.uint8)


def filled(cache: PrefixCache, chain: str) -> list[str]:
    """Offer a chain whose keys are the beginnings of a word; those that the cache has then."""
    keys = [chain[: end + 1].encode() for end in range(len(chain))]
    for end, key in enumerate(keys, 1):
        cache.add(keys[: end - 1], [key + b"-", key], lambda key=key: block(len(key)))
    return [key.decode() for key in keys if cache.find(key) is not None]


def test_the_longest_unused_goes_first_and_ends_go_before_beginnings() -> None:
    cache = PrefixCache(4 * ENTRY)
    assert filled(cache, "abc") == ["a", "ab", "abc"]
    assert filled(cache, "x") == ["x"]
    assert filled(cache, "xy") == ["x", "xy"]  # in place of abc
    assert [cache.find(key) is not None for key in (b"a", b"ab", b"abc")] == [True, True, False]
    cache.touch([b"a", b"ab"])
    assert filled(cache, "z") == ["z"]
    assert cache.find(b"xy") is None
    assert len(cache) == 4
    assert cache.bytes == 4 * ENTRY


def test_what_no_lookup_could_reach_is_not_kept() -> None:
    cache = PrefixCache(3 * ENTRY)
    assert filled(cache, "abcdef") == ["a", "ab", "abc"]  # its end must not push its own beginning out
    cache.add([b"q"], [b"qr"], lambda: block(0))
    assert cache.find(b"qr") is None


@given(st.lists(st.text("ab", min_size=1, max_size=6), max_size=30), st.integers(0, 6))
def test_every_kept_block_can_be_reached_and_all_fit(chains: list[str], room: int) -> None:
    cache = PrefixCache(room * ENTRY)
    for chain in chains:
        filled(cache, chain)
        kept = set(cache._blocks)
        assert all(len(key) == 1 or key[:-1] in kept for key in kept)
        assert set(cache._block_with) == kept | {key + b"-" for key in kept}
        assert cache.bytes == len(cache) * ENTRY <= room * ENTRY


def parsed(message: bytes) -> pb.Step:
    return parse_client_message(message).step


class Device:
    """Sends ids, in frames of given sizes, to a session of the predictable engine."""

    def __init__(
        self,
        engine: Any,
        hidden: Any,
        cache: PrefixCache | None,
        seed: int,
        scope: str = "",
        bypass: Bypass = NO_BYPASS,
    ) -> None:
        compute = engine.new_session(512, Sampling(seed=seed))
        prefix = None if cache is None else Prefix(cache, compute, scope, bypass)
        self.session = Session(engine, compute, 512, ServerLimits(), prefix)
        self.compute = compute
        self._hidden, self._step = hidden, 0

    def send(self, ids: Sequence[int], position: int, drafted: int | None = None, sample: bool = True) -> pb.Result:
        self._step += 1
        drafts = () if drafted is None else ids[len(ids) - drafted :]
        message = step_message(
            self._step, position, len(ids), sample, self._hidden(ids, position).tobytes(), list(drafts)
        )
        return self.session.step(parsed(message), Raw32(), 0.0).result


# Mostly equal, so that texts begin alike, and so do those that were rolled back.
ids = st.builds(lambda same, other: [1] * same + [2] * other, st.integers(1, 40), st.sampled_from([0, 0, 1, 2]))
actions = st.tuples(ids, st.booleans(), st.integers(0, 3), st.integers(0, 60))


def test_results_are_those_without_a_cache_whatever_devices_send(engine: Any, hidden: Any) -> None:
    """Beginnings that are shared now and then, drafts, rollbacks to anywhere; few blocks have room."""
    reused = []

    @settings(deadline=None)
    @given(st.lists(st.lists(actions, min_size=1, max_size=6), min_size=1, max_size=6), st.integers(0, 12))
    def check(texts: list[list[Any]], room: int) -> None:
        cache = PrefixCache(room * (ENTRY_BYTES + BLOCK * 64))
        for seed, text in enumerate(texts):
            devices = [Device(engine, hidden, each, seed) for each in (cache, None)]
            for piece, sample, drafted, back in text:
                position = max(0, devices[1].compute.length - back)
                drafts = min(drafted, len(piece) - 1) if sample else None
                results = [device.send(piece, position, drafts, sample) for device in devices]
                for result in results:
                    result.compute_us = result.decode_us = result.queue_us = 0
                assert results[0] == results[1]
                assert devices[0].compute._rows == devices[1].compute._rows
        reused.append(cache.reused)

    check()
    assert any(reused), "nothing was ever shared: too easy a test"


def test_a_shared_beginning_runs_once(engine: Any, hidden: Any) -> None:
    cache = PrefixCache(ROOM)
    shared, first, second = [5] * 40, [1] * 10, [2] * 10
    Device(engine, hidden, cache, 0).send(shared + first, 0)
    device = Device(engine, hidden, cache, 0)
    device.send(shared + second, 0)
    assert (cache.asked, cache.reused) == (2 * 49, 40)  # to the last row that is shared
    # All blocks of it, in whatever frames it comes.
    again = Device(engine, hidden, cache, 0)
    again.send((shared + second)[:20], 0, sample=False)
    again.send((shared + second)[20:], 20)
    assert cache.reused == 40 + 3 * BLOCK
    assert again.compute._rows == device.compute._rows


def test_blocks_that_begin_alike_are_both_found(engine: Any, hidden: Any) -> None:
    room = ENTRY_BYTES + BLOCK * 64
    cache = PrefixCache(2 * room)
    one, other = [5] * 10 + [1] * 6, [5] * 10 + [2] * 6
    for text in (one, other):
        Device(engine, hidden, cache, 0).send(text, 0, sample=False)
    assert cache.reused == 10
    for text in (one, other, [5] * 12):
        Device(engine, hidden, cache, 0).send(text, 0, sample=False)
    assert cache.reused == 10 + 16 + 16 + 10
    # When one of them goes, the other is still found by what is its alone.
    Device(engine, hidden, cache, 0).send([7] * 16, 0, sample=False)
    Device(engine, hidden, cache, 0).send(other, 0, sample=False)
    assert cache.reused == 10 + 16 + 16 + 10 + 16
    Device(engine, hidden, cache, 0).send([8] * 16, 0, sample=False)
    Device(engine, hidden, cache, 0).send([9] * 16, 0, sample=False)
    assert len(cache._block_with) == 2 * BLOCK


def test_a_piece_that_is_all_there_is_answered_at_once(engine: Any, hidden: Any) -> None:
    cache = PrefixCache(ROOM)
    Device(engine, hidden, cache, 0).send([4] * 32, 0, sample=False)
    before = engine.advanced
    device = Device(engine, hidden, cache, 0)
    result = device.send([4] * 32, 0, sample=False)
    assert (result.length, result.HasField("token")) == (32, False)
    assert cache.reused == 32
    assert engine.order[before:] == [device.compute] * 2  # two blocks appended, nothing run


def test_new_tokens_are_kept_too(engine: Any, hidden: Any) -> None:
    """The next turn of a chat begins with this one's answer."""
    cache = PrefixCache(ROOM)
    device, text = Device(engine, hidden, cache, 0), [9] * 5
    device.send(text, 0)
    for token in [3] * 30:
        device.send([token], len(text))
        text.append(token)
    Device(engine, hidden, cache, 0).send(text, 0)
    assert cache.reused == 2 * BLOCK


def test_what_comes_in_place_of_what_was_rolled_back_is_kept_too(engine: Any, hidden: Any) -> None:
    cache = PrefixCache(ROOM)
    device = Device(engine, hidden, cache, 0)
    for text in ([1] * 40, [1] * 20 + [2] * 20, [2] * 40):
        device.send(text, 0)
    assert len(cache) == 2 + 1 + 2
    device.send([1] * 40, 0)
    assert cache.reused == 20 + 2 * BLOCK


def test_keys_and_values_that_a_device_made_are_for_itself_alone(engine: Any, hidden: Any) -> None:
    cache = PrefixCache(ROOM)
    liar = Device(engine, hidden, cache, 0)
    chunk = pb.KVChunk(tokens=20, first_layer=2, last_layer=5)
    chunk.payload = np.zeros((3, 2, 1, 20, 8), np.float32).tobytes()
    liar._step = 1
    liar.session.step(parsed(kv_message(1, 0, chunk)), Raw32(), 0.0)
    liar.send([1] * 40, 20)
    assert len(cache) == 0
    liar.send([1] * 40, 0)  # from the beginning: all is known again
    assert len(cache) == 2


@pytest.mark.parametrize("shared", [False, True])
def test_scopes_do_not_meet(engine: Any, hidden: Any, shared: bool) -> None:
    cache = PrefixCache(ROOM)
    for scope in ("", "") if shared else ("kitchen", "phone"):
        Device(engine, hidden, cache, 0, scope).send([6] * 40, 0)
    assert cache.reused == (2 * BLOCK if shared else 0)


def test_a_session_that_is_made_again_finds_what_it_had(
    make_server: Any, make_proxy: Any, make_generation: Any, expected: Any, eventually: Any
) -> None:
    server, prompt = make_server(lease_s=0.05), [2] * 40
    proxy = make_proxy(server.address)
    generation = make_generation(proxy.address, prompt)
    generation.run(3)
    proxy.cut()
    assert eventually(lambda: server.sessions == 0)
    assert generation.run(3) == expected(prompt, 6)
    assert server.prefixes.reused == 2 * BLOCK


# Real layers.


def test_positions_that_leave_blocks_out_are_others(engine: Any, hidden: Any) -> None:
    cache = PrefixCache(ROOM)
    reused = []
    for blocks in ({}, {2: 20}, {}, {2: 20}, {3: 20}, {2: 25}, {2: 20, 3: 30}):
        Device(engine, hidden, cache, 0, bypass=Bypass(blocks)).send([6] * 48, 0, sample=False)
        reused.append(cache.reused - sum(reused))
    assert reused == [0, 20, 48, 48, 20, 25, 30]


def test_positions_that_leave_networks_out_are_others(engine: Any, hidden: Any) -> None:
    cache = PrefixCache(ROOM)
    reused = []
    for bypass in (NO_BYPASS, Bypass({}, 0.9, 20), NO_BYPASS, Bypass({}, 0.9, 20), Bypass({}, 0.8, 25)):
        Device(engine, hidden, cache, 0, bypass=bypass).send([6] * 48, 0, sample=False)
        reused.append(cache.reused - sum(reused))
    assert reused == [0, 20, 48, 48, 25]


def run_together(engine: BackEngine, cache: PrefixCache | None, requests: Sequence[Any]) -> list[Any]:
    """Sessions with prompts in the frames given, then some tokens, all in one batcher; tokens, and keys and values."""
    batcher, sessions, results = Batcher(engine, 8), [], []
    for _, sampling, _, bypass in requests:
        compute = engine.new_session(256, sampling, (), bypass)
        prefix = None if cache is None else Prefix(cache, compute, "", bypass)
        sessions.append((Session(engine, compute, 256, ServerLimits(), prefix), compute))
        results.append([])
    pending = [[*np.split(prompt, range(chunk, len(prompt), chunk))] for prompt, _, chunk, _ in requests]
    steps, waiting = [0] * len(requests), set(range(len(requests)))
    d_model = engine.manifest.architecture.d_model
    rows = {}
    while waiting:
        for number in sorted(waiting):
            session, compute = sessions[number]
            if session in rows or (not pending[number] and len(results[number]) == 6):
                continue
            if pending[number]:
                hidden, sample = pending[number].pop(0), not pending[number]
            else:  # what a device's front would make of the token
                hidden = np.random.default_rng([results[number][-1], compute.length]).normal(size=(1, d_model))
                sample = True
            hidden = hidden.astype(np.float32)
            steps[number] += 1
            message = step_message(steps[number], compute.length, len(hidden), sample, hidden.tobytes())
            answer = session.prepare(parsed(message), Raw32(), 0.0)
            if isinstance(answer, Work):
                rows[session] = number
                batcher.add(answer)
        for work, answer in batcher.run():
            assert isinstance(answer, pb.ServerMessage), answer
            number = rows.pop(work.session)
            if answer.result.HasField("token"):
                results[number].append(answer.result.token)
        waiting = {number for number in waiting if pending[number] or len(results[number]) < 6}
    found = []
    for tokens, (_, compute), (*_, bypass) in zip(results, sessions, requests, strict=True):
        rows = compute.rows(0, compute.length)
        for index, layer in enumerate(range(engine.manifest.split, engine.manifest.architecture.layers)):
            rows[index, :, :, bypass.blocks.get(layer, compute.length) :] = 0  # what it left out, nobody has computed
        found.append((tokens, rows))
    for session, _ in sessions:
        session.close()
    return found


@pytest.mark.parametrize(("kind", "bits", "kv_bits"), [("llama", 4, 32), ("mistral", 8, 8), ("qwen2", 32, 4)])
@pytest.mark.parametrize("together", [8, 0], ids=["together", "in turns"])
def test_sessions_in_one_batch_get_the_bits_of_a_server_that_keeps_nothing(
    tiny: Any, kind: str, bits: int, kv_bits: int, together: int
) -> None:
    bits_of_kv = {"front_kv_bits": kv_bits, "back_kv_bits": kv_bits}
    folder = tiny.bundle(kind, bits=bits, split=2, layers_per_block=1, **bits_of_kv)
    engine = BackEngine(open_bundle(folder / "server", "server"), 1, together=together, capacity=256)
    text = np.random.default_rng(1).normal(size=(120, engine.manifest.architecture.d_model)).astype(np.float32)

    reused = []

    @settings(max_examples=12, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        cache = PrefixCache(ROOM)
        for wave in range(2):
            requests = []
            for number in range(data.draw(st.integers(1, 4))):
                # The same beginning, then something of its own.
                shared, own = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 30))
                prompt = np.concatenate([text[:shared], text[::-1][number : number + own] + np.float32(wave)])
                heat = data.draw(st.sampled_from([0.0, 1.0]))
                bypass = Bypass(data.draw(st.sampled_from([{}, {}, {}, {2: 40}, {3: 40}])))
                requests.append(
                    (prompt, Sampling(temperature=heat, seed=number), data.draw(st.integers(5, 64)), bypass)
                )
            got = run_together(engine, cache, requests)
            for (tokens, rows), (expected, expected_rows) in zip(
                got, run_together(engine, None, requests), strict=True
            ):
                assert tokens == expected
                assert np.array_equal(rows, expected_rows)
        reused.append(cache.reused)

    check()
    assert any(reused), "nothing was ever shared: too easy a test"


# Real servers.


@pytest.fixture
def folder(tiny: Any) -> Path:
    return Path(tiny.bundle(bits=8, split=2, layers_per_block=1))


def generate(folder: Path, server: BackServer, prompt: list[int], **options: Any) -> list[int]:
    options = {"codec": "raw32", "threads": 1, "draft": "off"} | options
    model = EdgeModel(folder / "device", server=server.address, **options)
    stream = model.tokens(prompt, max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=2), end_tokens=())
    found = [token.id for token in stream]
    stream.close()
    return found


PROMPT = np.random.default_rng(3).integers(1, 256, 150).tolist()


@pytest.mark.parametrize("draft", ["off", "ngram"])
def test_a_prompt_that_comes_again_is_not_computed_again(
    folder: Path, serve: Callable[..., BackServer], draft: str
) -> None:
    server, plain = serve(folder), serve(folder, prefix_cache_bytes=0)
    expected = generate(folder, plain, PROMPT)
    assert plain.prefixes is not None
    assert server.prefixes is not None
    assert len(plain.prefixes) == 0
    for _ in range(2):
        assert generate(folder, server, PROMPT, draft=draft) == expected
    reused = server.prefixes.reused
    assert reused >= 149
    assert generate(folder, server, [*PROMPT[:100], 1, 2, 3]) == generate(folder, plain, [*PROMPT[:100], 1, 2, 3])
    assert server.prefixes.reused >= reused + 100
    # The next turn of a chat: the answer's tokens went up one by one, or as drafts, and come again in one frame.
    reused, turn = server.prefixes.reused, [*PROMPT, *expected, 7, 8]
    assert generate(folder, server, turn) == generate(folder, plain, turn)
    assert server.prefixes.reused >= reused + (150 + 11) // BLOCK * BLOCK


@pytest.mark.parametrize(("shared", "reused"), [(False, 0), (True, 149)])
def test_devices_meet_only_where_the_server_lets_them(
    folder: Path, serve: Callable[..., BackServer], tmp_path: Path, shared: bool, reused: int
) -> None:
    file = tmp_path / "tokens"
    securities = [ChannelSecurity(insecure=True, token=issue_token(file, name)) for name in ("kitchen", "phone")]
    server = serve(folder, ServerSecurity(insecure=True, tokens=file), prefixes_shared=shared)
    assert server.prefixes is not None
    for security in securities:
        generate(folder, server, PROMPT, security=security)
    assert server.prefixes.reused == reused
    generate(folder, server, PROMPT, security=securities[0])
    assert server.prefixes.reused == reused + 149


def test_what_left_blocks_out_is_not_for_those_that_do_not(
    folder: Path, serve: Callable[..., BackServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device leaves nothing out: its hidden states are equal."""
    monkeypatch.setattr("isthmus.runtime.edge.model.bypass_order", lambda manifest: [range(2, 3)])
    server, plain = serve(folder), serve(folder, prefix_cache_bytes=0)
    skipping = {"skip_schedule": SkipSchedule(4, 3, 1)}
    answer = generate(folder, server, PROMPT, **skipping)
    assert answer == generate(folder, plain, PROMPT, **skipping)
    assert server.prefixes is not None
    turn = [*PROMPT, *answer, *[9] * 20]
    assert generate(folder, server, turn) == generate(folder, plain, turn)
    assert server.prefixes.reused == len(PROMPT) + 1  # the second token of the answer left one out


def test_another_codec_s_states_are_others(folder: Path, serve: Callable[..., BackServer]) -> None:
    server = serve(folder)
    assert server.prefixes is not None
    exact = generate(folder, server, PROMPT)
    generate(folder, server, PROMPT, codec="raw16")
    assert server.prefixes.reused == 0
    assert generate(folder, server, PROMPT) == exact


def test_a_short_memory_keeps_less_and_sessions_come_first(caplog: pytest.LogCaptureFixture) -> None:
    limits = ServerLimits(kv_bytes=10_000, prefix_cache_bytes=1000)
    assert limits.within(20_000.0, 4000.0) == limits
    assert not caplog.text
    short = limits.within(6000.0, 4000.0)
    assert (short.prefix_cache_bytes, short.kv_bytes) == (500, 5500)
    assert "memory is short" in caplog.text
    assert limits.within(4000.0, 4000.0).kv_bytes == 4000
