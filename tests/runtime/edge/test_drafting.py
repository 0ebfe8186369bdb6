"""Generation with drafts over real sockets: the tokens are those without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from isthmus.cli.main import main
from isthmus.errors import ProtocolError, RequestError
from isthmus.export.plan import Candidate, Plan
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.edge.controller import Controller
from isthmus.runtime.edge.drafting import MAX_DRAFTS, DraftedTokens
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.edge.verification import Answer
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.limits import ServerLimits
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire import framing
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity

PROMPT = "to be or not to be or not to be, that is the question to be or not"
SAMPLINGS = {
    "greedy": Sampling(),
    "penalty": Sampling(repetition_penalty=1.2),
    "sampled": Sampling(temperature=0.7, seed=3),
    "filtered": Sampling(temperature=1.1, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.1, seed=2**63),
}

SOURCES = {
    "ngram": {"server", "ngram"},
    "chain": {"server", "draft"},
    "tree": {"server", "draft"},
    "auto": {"server", "ngram", "draft"},
}


@pytest.fixture(scope="module")
def folder(repeating: Path) -> Path:
    return repeating


@pytest.fixture(scope="module")
def address(repeating_address: str) -> str:
    return repeating_address


def open_model(folder: Path, address: str, **options: Any) -> EdgeModel:
    options = {"codec": "raw32", "threads": 1} | options
    return EdgeModel(folder / "device", server=address, security=ChannelSecurity(insecure=True), **options)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("codec", ["raw32", "tabq"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "wait"])
@pytest.mark.parametrize("draft", SOURCES)
def test_drafted_tokens_are_the_undrafted_ones(folder, address, eager, draft, overlap, codec, sampling):
    model = open_model(folder, address, codec=codec, overlap=overlap)
    plain = model.generate(PROMPT, max_new_tokens=100, sampling=sampling, draft="off")
    drafted = model.generate(PROMPT, max_new_tokens=100, sampling=sampling, draft=draft)
    assert drafted.token_ids == plain.token_ids
    assert drafted.text == plain.text
    assert drafted.drafts.accepted == sum(token.source != "server" for token in drafted.tokens)
    assert {token.source for token in drafted.tokens} <= SOURCES[draft]
    assert drafted.drafts.accepted <= drafted.drafts.drafted
    assert sum(drafted.drafts.right) == drafted.drafts.accepted
    assert {token.source for token in plain.tokens} == {"server"}


def test_many_tokens_come_in_one_round_trip(folder, address, eager):
    model = open_model(folder, address, overlap=False)
    result = model.generate(PROMPT, max_new_tokens=150, draft="ngram")
    assert result.drafts.accepted > 20
    assert result.round_trips == result.new_tokens - result.drafts.accepted
    printed = result.to_dict()
    assert printed["tokens_per_round_trip"] == pytest.approx(150 / result.round_trips)
    assert printed["drafted"] == result.drafts.drafted
    assert {"ngram", "server"} == {token["source"] for token in printed["tokens"]}


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 17])
def test_no_draft_goes_beyond_the_last_token(folder, address, eager, new_tokens):
    model = open_model(folder, address, context=len(PROMPT) + new_tokens)
    plain = model.generate(PROMPT, draft="off")
    assert plain.new_tokens == new_tokens
    for draft in SOURCES:
        assert model.generate(PROMPT, draft=draft).token_ids == plain.token_ids


def test_an_end_token_ends_a_drafted_text_as_any_other(folder, address, eager):
    model = open_model(folder, address)
    stream = model.tokens(PROMPT, max_new_tokens=100, draft="off")
    plain = [token.id for token in stream]
    stream.close()
    for number, end in enumerate(sorted(set(plain))):
        draft = list(SOURCES)[number % 4]
        stream = model.tokens(PROMPT, max_new_tokens=100, end_tokens=[end], draft=draft)
        try:
            assert [token.id for token in stream] == plain[: plain.index(end) + 1]
        finally:
            stream.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_server_that_is_asked_to_takes_more_guesses(folder, address, eager, temperature):
    model = open_model(folder, address, overlap=False)
    exact, relaxed = (
        model.generate(
            PROMPT,
            max_new_tokens=150,
            draft="ngram",
            sampling=Sampling(temperature=temperature, top_k=8, accept_distance=distance),
        )
        for distance in (0.0, 0.9)
    )
    assert relaxed.drafts.accepted > exact.drafts.accepted
    assert relaxed.round_trips < exact.round_trips
    assert relaxed.token_ids != exact.token_ids


@pytest.mark.parametrize("length", [1, 3])
def test_the_draft_length_bounds_the_guesses(folder, address, eager, length):
    model = open_model(folder, address, draft_length=length, overlap=False)
    result = model.generate(PROMPT, max_new_tokens=100, draft="ngram")
    assert 0 < len(result.drafts.tried) <= length


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("overlap", [True, False])
def test_frames_stay_within_the_server_s_limit(folder, eager, overlap, rows):
    limits = ServerLimits(max_frame_tokens=rows)
    security = ServerSecurity(insecure=True)
    with BackServer.from_bundle(folder / "server", threads=1, security=security, limits=limits) as server:
        model = open_model(folder, server.address, overlap=overlap)
        plain = model.generate(PROMPT, max_new_tokens=60, draft="off")
        for draft in SOURCES:
            assert model.generate(PROMPT, max_new_tokens=60, draft=draft).token_ids == plain.token_ids


@pytest.mark.parametrize("length", [0, MAX_DRAFTS + 1])
def test_a_draft_length_out_of_range_is_refused(folder, address, length):
    with pytest.raises(RequestError, match=str(length)):
        open_model(folder, address, draft_length=length)


def test_a_server_that_does_not_verify_gets_no_drafts(folder, monkeypatch, caplog):
    monkeypatch.setattr("isthmus.runtime.wire.framing.PROTOCOL_MINOR", framing.DRAFT_MINOR - 1)
    with BackServer.from_bundle(folder / "server", threads=1, security=ServerSecurity(insecure=True)) as server:
        model = open_model(folder, server.address)
        result = model.generate(PROMPT, max_new_tokens=20)
        assert result.drafts.drafted == 0
        model.generate(PROMPT, max_new_tokens=2)
    assert caplog.text.count("too old to verify drafts") == 1


def test_drafts_where_nothing_crosses_a_link_are_refused(tiny, folder, address):
    with pytest.raises(RequestError, match="no round trip"):
        EdgeModel(tiny.bundle(bits=4) / "device", draft="ngram")
    assert EdgeModel(tiny.bundle(bits=4) / "device").generate("x", max_new_tokens=4).drafts.drafted == 0
    with pytest.raises(RequestError, match="one of auto"):
        open_model(folder, address, draft="forest")


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "wait"])
def test_a_deadline_is_kept_with_drafts_and_without_more_than_it_allows(folder, address, eager, monkeypatch, overlap):
    model = open_model(folder, address, codec="tabq", level=0, overlap=overlap, deadline_ms=60_000)
    result = model.generate(PROMPT, max_new_tokens=100)
    assert result.token_ids == model.generate(PROMPT, max_new_tokens=100, draft="off").token_ids
    assert result.drafts.accepted > 0
    assert {token.level for token in result.tokens} == {0}
    for allowed in (0, 1):
        on_the_way: list[int] = []
        monkeypatch.setattr(Controller, "_bound_drafts", lambda self, allowed=allowed: setattr(self, "drafts", allowed))
        monkeypatch.setattr(DraftedTokens, "_run", _noting(on_the_way))
        model.generate(PROMPT, max_new_tokens=100)
        assert max(on_the_way[40:]) == allowed  # the first were before the controller had seen a token


def _noting(on_the_way: list[int], run: Any = DraftedTokens._run) -> Any:
    def noting(self: DraftedTokens, nodes: Any) -> None:
        on_the_way.append(len(self._steps) + len(self._unsent) + len(nodes) - 1 if nodes[0].guess is not None else 0)
        run(self, nodes)

    return noting


def test_token_ids_are_drafted_for_a_device_without_layers(tiny, eager):
    folder = tiny.bundle(bits=4, split=0, max_length=256)
    with BackServer.from_bundle(folder / "server", threads=1, security=ServerSecurity(insecure=True)) as server:
        model = open_model(folder, server.address, codec="ids")
        plain = model.generate(PROMPT, max_new_tokens=100, draft="off")
        drafted = model.generate(PROMPT, max_new_tokens=100)
    assert drafted.token_ids == plain.token_ids
    assert drafted.drafts.accepted > 0


@pytest.mark.parametrize("forged", ["skipped", "invented"])
def test_a_server_that_is_wrong_about_what_follows_is_found_out(folder, address, eager, monkeypatch, forged):
    from isthmus.runtime.edge.link import RemoteBack

    collect = RemoteBack.collect

    def forge(self: RemoteBack) -> Answer:
        continues = self._questions[0].continues
        answer = collect(self)
        if forged == "skipped" and continues:
            return answer._replace(tokens=())
        return answer._replace(tokens=answer.tokens or (1,)) if forged == "invented" else answer

    monkeypatch.setattr(RemoteBack, "collect", forge)
    model = open_model(folder, address)
    with pytest.raises(ProtocolError, match="guess"):
        for seed in range(20):
            model.generate(PROMPT, max_new_tokens=60, draft="ngram", sampling=Sampling(temperature=0.3, seed=seed))


def test_a_cut_link_changes_no_drafted_token(folder, address, eager, make_proxy):
    expected = open_model(folder, address).generate(PROMPT, max_new_tokens=120, draft="off").token_ids
    proxy = make_proxy(address)
    model = open_model(folder, proxy.address)
    with model.stream(PROMPT, max_new_tokens=120) as stream:
        for number, _ in enumerate(stream):
            if number in (3, 20, 60):
                proxy.cut()
    assert stream.result.token_ids == expected


@pytest.mark.parametrize(("length", "drafted"), [(0, False), (2, True)])
def test_generate_drafts_as_a_plan_says(folder, address, eager, tmp_path, capsys, length, drafted):
    command = [
        "generate",
        str(folder / "device"),
        "-p",
        PROMPT,
        "-n",
        "60",
        "--server",
        address,
        "--insecure",
        "--json",
    ]
    assert main([*command, "--plan", str(planned(folder, tmp_path, length))]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["drafted"] > 0) == drafted
    assert main([*command, "--plan", str(planned(folder, tmp_path, length)), "--draft", "ngram"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == result["token_ids"]


def test_a_plan_with_drafts_needs_a_bundle_with_a_draft(folder, address, tmp_path, capsys):
    shutil.copytree(folder / "device", tmp_path / "device", ignore=shutil.ignore_patterns("draft"))
    command = ["generate", str(tmp_path / "device"), "-p", PROMPT, "--server", address, "--insecure"]
    assert main([*command, "--plan", str(planned(folder, tmp_path, 4))]) == 1
    assert "the plan drafts 4 tokens, this bundle has no trained draft" in capsys.readouterr().err


def planned(folder: Path, tmp_path: Path, length: int) -> Path:
    """A plan file for the bundle."""
    manifest = open_bundle(folder, "device").manifest
    chosen = Candidate(
        mode="split",
        split=manifest.split,
        front_bits=manifest.front_bits,
        back_bits=manifest.back_bits,
        kv_bits=32,
        codec="raw32",
        level=-1,
        draft_length=length,
        **dict.fromkeys(("memory_mb", "server_memory_mb", "ttft_ms", "ms_per_token", "worst_ms"), 1.0),
        **dict.fromkeys(("bytes_per_token", "drop", "time_uncertainty", "drop_se"), 1.0),
    )
    source = manifest.source
    plan = Plan(source.name, source.files, chosen, 256, None, "device", "link", "server")
    plan.write(tmp_path / "plan.toml")
    return tmp_path / "plan.toml"
