"""One token replaced, the same noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isthmus.cli.main import main
from isthmus.errors import RequestError
from isthmus.runtime.edge.counterfactual import read_run, regenerate
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling

PROMPT = "What if?"
SAMPLING = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.1, seed=11)


@pytest.fixture(scope="module")
def model(tiny: Any) -> EdgeModel:
    return EdgeModel(tiny.bundle(bits=4) / "device")


@pytest.fixture
def recorded(model: EdgeModel, tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(model.generate(PROMPT, max_new_tokens=20, sampling=SAMPLING).to_dict()))
    return path


def by_hand(model: EdgeModel, run: Any, replace: dict[int, int], new_tokens: int) -> list[int]:
    """Token by token, each the one that is chosen there or the one that is put there."""
    written: list[int] = []
    while len(written) < new_tokens:
        next_ = model.generate([*run.prompt_ids, *written], max_new_tokens=1, sampling=run.sampling).token_ids[0]
        written.append(replace.get(len(written), next_))
    return written


def test_nothing_replaced_is_the_run_itself(model, recorded):
    run = read_run(recorded)
    result = regenerate(model, run, {}, max_new_tokens=20)
    assert result.token_ids == list(run.token_ids)
    assert result.to_dict()["sampling"]["seed"] == 11


@pytest.mark.parametrize("replace", [{0: 65}, {7: 66}, {3: 65, 4: 66, 12: 67}, {19: 70}, {20: 70}])
def test_the_text_goes_on_from_the_replaced_token_with_its_noise(model, recorded, replace):
    run = read_run(recorded)
    result = regenerate(model, run, replace, max_new_tokens=24)
    assert result.token_ids == by_hand(model, run, replace, 24)


@pytest.mark.parametrize("replace", [{-1: 5}, {23: 5}, {21: 5}, {3: 256}])
def test_places_and_tokens_that_do_not_exist_are_refused(model, recorded, replace):
    with pytest.raises(RequestError, match=r"position|token id"):
        regenerate(model, read_run(recorded), replace, max_new_tokens=24)


def test_a_run_of_another_model_is_refused(tiny, recorded):
    other = EdgeModel(tiny.bundle(bits=8) / "device")
    with pytest.raises(RequestError, match="the run is of export"):
        regenerate(other, read_run(recorded), {1: 1})


@pytest.mark.parametrize("content", ["", "{}", '{"prompt_ids": 3}', "[1]"])
def test_a_file_that_is_no_run_is_refused(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(RequestError, match="no recorded run"):
        read_run(path)
    with pytest.raises(RequestError, match="no recorded run"):
        read_run(tmp_path / "missing")


@pytest.mark.parametrize("part", [{"skip_schedule": "4:2:12"}, {"ffn_skip": 0.9}, {"exited": 3}])
def test_a_run_that_the_full_model_did_not_write_is_refused(recorded, part):
    recorded.write_text(json.dumps(json.loads(recorded.read_text()) | part))
    with pytest.raises(RequestError, match=rf"did not write all of this one \({next(iter(part))}\)"):
        read_run(recorded)


def test_the_command_replays_a_printed_run(tiny, model, recorded, capsys):
    device = str(tiny.bundle(bits=4) / "device")
    command = ["generate", device, "--noise-of", str(recorded), "-n", "20", "--json"]
    assert main([*command, "--replace", "5=66"]) == 0
    printed = json.loads(capsys.readouterr().out)
    run = read_run(recorded)
    assert printed["token_ids"][:6] == [*run.token_ids[:5], 66]
    assert printed["prompt_ids"] == list(run.prompt_ids)
    assert main([*command, "--replace", "x=1"]) != 0
    assert "--replace 'x=1'" in capsys.readouterr().err
    assert main(["generate", device, "-p", "x", "--replace", "1=1"]) != 0
    assert "--noise-of" in capsys.readouterr().err
