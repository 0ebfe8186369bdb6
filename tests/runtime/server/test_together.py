"""A real back half behind a real server, with many sessions at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from isthmus.errors import RequestError
from isthmus.runtime.edge.load import load_test
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.server import BackServer

NEW_TOKENS = 24


def batch_sizes(server: BackServer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the runs that the server does from now on."""
    sizes: list[int] = []
    advance = server._engine.advance

    def counted(parts: Any) -> None:
        sizes.append(len(parts))
        advance(parts)

    monkeypatch.setattr(server._engine, "advance", counted)
    return sizes


@pytest.mark.parametrize(("bits", "kv_bits"), [(4, 32), (8, 8), (32, 4)])
def test_sessions_of_many_devices_get_the_tokens_of_one_alone(
    tiny: Any, serve: Callable[..., BackServer], monkeypatch: pytest.MonkeyPatch, bits: int, kv_bits: int
) -> None:
    folder = tiny.bundle(bits=bits, split=2, front_kv_bits=kv_bits, back_kv_bits=kv_bits)
    alone = serve(folder, max_batch=1)
    server = serve(folder)
    sizes = batch_sizes(server, monkeypatch)
    rng = np.random.default_rng(0)
    # Prompts from one token to several pieces; some draft.
    requests = [
        (rng.integers(1, 256, length).tolist(), Sampling(temperature=1.0, seed=seed), draft)
        for seed, (length, draft) in enumerate(zip((1, 5, 40, 150, 17, 2), ("off", "ngram") * 3, strict=True))
    ]

    def generate(address: str, request: Any, out: list[list[int]], place: int) -> None:
        prompt, sampling, draft = request
        model = EdgeModel(folder / "device", server=address, codec="raw32", threads=1, draft=draft)
        stream = model.tokens(prompt, max_new_tokens=NEW_TOKENS, sampling=sampling, end_tokens=())
        out[place] = [token.id for token in stream]
        stream.close()

    expected: list[list[int]] = [[] for _ in requests]
    for place, request in enumerate(requests):
        generate(alone.address, request, expected, place)
    got: list[list[int]] = [[] for _ in requests]
    threads = [
        threading.Thread(target=generate, args=(server.address, request, got, place))
        for place, request in enumerate(requests)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == expected
    assert all(len(tokens) == NEW_TOKENS for tokens in got)
    assert max(sizes) > 1, "nothing ever ran together: too easy a test"


def test_a_load_of_sessions_all_finish_with_the_recorded_tokens(
    tiny: Any, serve: Callable[..., BackServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.bundle(bits=8, split=2)
    server = serve(folder)
    sizes = batch_sizes(server, monkeypatch)
    report = load_test(
        folder / "device", server.address, sessions=12, new_tokens=20, prompt_tokens=(3, 60), codec="raw32", threads=1
    )
    numbers = report.to_dict()
    assert report.identical
    assert (numbers["sessions"], numbers["finished"], numbers["errors"]) == (12, 12, {})
    assert numbers["prompt_tokens"] == [3, 60]
    assert set(numbers["ms_per_token"]) == {"p50", "p95", "max"}
    assert numbers["ms_per_token"]["p50"] <= numbers["ms_per_token"]["p95"] <= numbers["ms_per_token"]["max"]
    assert max(sizes) > 2
    assert len(server._engine._stack.pool) == server.sessions == 0


def test_a_load_tells_who_was_refused(tiny: Any, serve: Callable[..., BackServer]) -> None:
    folder = tiny.bundle(bits=8, split=2)
    server = serve(folder, max_sessions=3)
    report = load_test(folder / "device", server.address, sessions=5, new_tokens=4, codec="raw32", threads=1)
    numbers = report.to_dict()
    assert numbers["errors"] == {"SERVER_FULL": 2}
    assert numbers["finished"] == 3
    assert report.identical


def test_a_load_tells_of_other_tokens(
    tiny: Any, serve: Callable[..., BackServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.bundle(bits=8, split=2)
    server = serve(folder)
    new_session, opened = server._engine.new_session, []

    def seeded(max_tokens: int, sampling: Sampling, *rest: Any) -> Any:
        opened.append(max_tokens)
        hot = Sampling(temperature=100.0, seed=len(opened)) if len(opened) > 4 else sampling
        return new_session(max_tokens, hot, *rest)

    monkeypatch.setattr(server._engine, "new_session", seeded)
    report = load_test(folder / "device", server.address, sessions=2, new_tokens=6, codec="raw32", threads=1)
    assert report.to_dict()["finished"] == 2
    assert not report.identical


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sessions": 0}, "sessions 0"),
        ({"sessions": 1, "new_tokens": 0}, "new tokens 0"),
        ({"sessions": 1, "prompt_tokens": ()}, "at least one prompt"),
        ({"sessions": 1, "prompt_tokens": (500,), "new_tokens": 60}, "together at most 512"),
    ],
)
def test_a_load_that_cannot_be_is_refused(tiny: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_test(tiny.bundle(bits=8, split=2) / "device", "127.0.0.1:1", **options)


def test_a_device_only_bundle_has_no_server_to_load(tiny: Any) -> None:
    with pytest.raises(RequestError, match="wholly on the device"):
        load_test(tiny.bundle(bits=8) / "device", "127.0.0.1:1", sessions=1)


def test_one_at_a_time_uses_no_pool(tiny: Any, serve: Callable[..., BackServer]) -> None:
    folder = tiny.bundle(bits=8, split=2)
    assert not hasattr(serve(folder, max_batch=1)._engine._stack, "pool")
    assert hasattr(serve(folder)._engine._stack, "pool")


def test_without_the_address_space_sessions_take_turns(
    tiny: Any, serve: Callable[..., BackServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("isthmus.runtime.pool._reserve", refuse)
    folder = tiny.bundle(bits=8, split=2)
    server = serve(folder)
    assert server.limits.max_batch == 1
    assert "take turns" in caplog.text
    report = load_test(folder / "device", server.address, sessions=3, new_tokens=4, codec="raw32", threads=1)
    assert report.identical
    assert report.to_dict()["finished"] == 3
