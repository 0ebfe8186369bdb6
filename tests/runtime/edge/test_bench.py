"""The bench runs what it says, as often as it says; speeds themselves are not asserted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import RequestError
from isthmus.runtime.edge.bench import BenchResult, Breakdown, bench, generate_exactly
from isthmus.runtime.edge.generate import StepReport, Token
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity


@pytest.fixture(scope="module")
def model(tiny: Any) -> EdgeModel:
    return EdgeModel(tiny.bundle() / "device")


@pytest.fixture
def split_model(tiny: Any) -> Iterator[EdgeModel]:
    folder: Path = tiny.bundle(split=2)
    with BackServer.from_bundle(folder / "server", security=ServerSecurity(insecure=True)) as server:
        security = ChannelSecurity(insecure=True)
        yield EdgeModel(folder / "device", server=server.address, security=security, codec="raw32")


def token(front: float, front_onnxruntime: float, total: float, **report: float) -> Token:
    return Token(
        id=1,
        source="server",
        layers=4,
        bytes_up=0,
        bytes_down=0,
        front_s=front,
        front_onnxruntime_s=front_onnxruntime,
        total_s=total,
        report=StepReport(token=1, **report),
    )


def test_each_length_is_a_test_with_the_repetitions_asked_for(model: EdgeModel) -> None:
    report = bench(model, prompt_tokens=(5, 9), new_tokens=(3,), repetitions=2)
    assert [result.test for result in report.results] == ["pp5", "pp9", "tg3"]
    for result in report.results:
        assert len(result.samples) == 2
        assert min(result.samples) > 0
        assert result.threads == model.threads


def test_prompt_and_generation_lengths_are_exact_whatever_the_end_tokens(
    model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_id = tuple(range(model.manifest.architecture.vocab_size))
    monkeypatch.setattr(model, "manifest", dataclasses.replace(model.manifest, end_tokens=every_id))
    seconds, tokens = generate_exactly(model, prompt_tokens=7, new_tokens=6)
    assert len(tokens) == 6
    assert 0 < sum(token.total_s for token in tokens) <= seconds


def test_two_runs_see_the_same_tokens(model: EdgeModel) -> None:
    runs = [[token.id for token in generate_exactly(model, 4, 8)[1]] for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_report_prints_as_json_of_the_promised_shape(model: EdgeModel) -> None:
    report = json.loads(json.dumps(bench(model, prompt_tokens=(4,), new_tokens=(2,), repetitions=1).to_dict()))
    assert set(report) == {"results", "peak_rss_mb", "peak_anon_mb"}
    for result in report["results"]:
        assert set(result) == {"test", "threads", "tokens_per_s", "sd", "repetitions"}
    assert report["peak_rss_mb"] > 0


def test_mean_and_deviation_are_those_of_a_sample() -> None:
    result = BenchResult("tg4", 1, (10.0, 12.0, 17.0))
    assert result.tokens_per_s == pytest.approx(13.0)
    assert result.sd == pytest.approx(13.0**0.5)
    assert BenchResult("tg4", 1, (10.0,)).sd == 0.0


def test_progress_tells_of_every_repetition(model: EdgeModel) -> None:
    seen: list[tuple[str, int, int]] = []
    bench(model, prompt_tokens=(4,), new_tokens=(2,), repetitions=2, progress=lambda *step: seen.append(step))
    assert seen == [(test, done, 2) for test in ("pp4", "tg2") for done in (0, 1, 2)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"prompt_tokens": (), "new_tokens": ()}, "no test"),
        ({"prompt_tokens": (0,)}, "a test of 0 tokens"),
        ({"new_tokens": (512,)}, "a test of 512 tokens"),
        ({"repetitions": 0}, "repetitions=0"),
    ],
)
def test_what_cannot_be_measured_is_refused(model: EdgeModel, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        bench(model, **arguments)


def test_a_split_model_is_broken_down_into_where_a_token_spends_its_time(split_model: EdgeModel) -> None:
    report = bench(split_model, prompt_tokens=(6,), new_tokens=(4,), repetitions=2)
    assert report.breakdown is not None
    parts = report.to_dict()["breakdown"]
    assert set(parts) == {field.name for field in dataclasses.fields(Breakdown)}
    for name in ("front_ms", "back_ms", "link_ms", "encode_ms"):
        assert 0 < parts[name] < parts["total_ms"]
    assert parts["overhead_ms"] < parts["total_ms"]


def test_the_parts_of_one_token_add_up_to_its_total() -> None:
    costs = {"encode_s": 0.001, "wait_s": 0.050, "server_decode_s": 0.002, "server_queue_s": 0.003}
    one = token(0.020, 0.016, 0.075, server_compute_s=0.040, onnxruntime_s=0.035, **costs)
    parts = Breakdown.of([one])
    assert dataclasses.asdict(parts) == pytest.approx(
        {
            "front_ms": 16.0,
            "device_ms": 8.0,
            "encode_ms": 1.0,
            "decode_ms": 2.0,
            "queue_ms": 3.0,
            "back_ms": 35.0,
            "server_ms": 5.0,
            "link_ms": 5.0,
            "total_ms": 75.0,
            "overhead_ms": 24.0,
        }
    )


def test_a_breakdown_is_of_medians() -> None:
    tokens = [token(0.01, 0.01, total) for total in (0.02, 0.03, 9.0)]
    assert Breakdown.of(tokens).total_ms == pytest.approx(30.0)
    assert Breakdown.of(tokens).overhead_ms == pytest.approx(20.0)


def test_a_device_with_all_layers_and_no_server_is_measured_as_one_that_has_no_link(tiny: Any) -> None:
    report = bench(EdgeModel(tiny.bundle(split=2, device_layers="all") / "device"), new_tokens=(3,), repetitions=1)
    assert (report.breakdown, report.codec) == (None, ())
    assert [result.test for result in report.results] == ["pp128", "tg3"]
