"""The device runtime's face on a bundle that runs wholly on the device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import BundleError, RequestError
from isthmus.export.export import export_bundle
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling

PROMPT = "Once upon a time"
MAX_LENGTH = 96
Models = Callable[[Path], Any]


@pytest.fixture(scope="module")
def folder(tiny: Any) -> Path:
    return tiny.bundle(max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def model(folder: Path) -> EdgeModel:
    return EdgeModel(folder / "device")


def test_greedy_tokens_are_those_of_the_segments_run_by_hand(
    folder: Path, model: EdgeModel, local_model: Models
) -> None:
    ids = model.prompt_ids(PROMPT)
    by_hand = local_model(folder).session(MAX_LENGTH)
    logits = by_hand.forward(ids)[1][-1]
    expected = []
    for _ in range(20):
        expected.append(int(logits.argmax()))
        logits = by_hand.forward(expected[-1:])[1][-1]
    result = model.generate(PROMPT, max_new_tokens=20)
    assert result.token_ids == expected
    assert result.finish_reason == "length"
    assert (result.prompt_tokens, result.new_tokens) == (len(PROMPT), 20)


def test_a_text_and_its_token_ids_are_the_same_prompt(model: EdgeModel) -> None:
    ids = model.prompt_ids(PROMPT)
    expected = model.generate(PROMPT, max_new_tokens=8).token_ids
    for prompt in (ids, tuple(ids), np.array(ids)):
        assert model.generate(prompt, max_new_tokens=8).token_ids == expected


def test_generations_leave_nothing_in_the_model(model: EdgeModel) -> None:
    first = model.generate(PROMPT, max_new_tokens=16).token_ids
    model.generate("something else", max_new_tokens=30, sampling=Sampling(temperature=2.0))
    assert model.generate(PROMPT, max_new_tokens=16).token_ids == first


def test_streamed_pieces_are_the_text(model: EdgeModel) -> None:
    with model.stream(PROMPT, max_new_tokens=40) as stream:
        pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == stream.result.text == model.tokenizer.decode(stream.result.token_ids)


def test_a_stream_that_is_left_early_was_interrupted(model: EdgeModel) -> None:
    with pytest.raises(KeyboardInterrupt), model.stream(PROMPT, max_new_tokens=40) as stream:
        for _ in stream:
            raise KeyboardInterrupt
    result = stream.result
    assert result.finish_reason == "interrupted"
    assert 1 <= result.new_tokens < 40
    assert model.generate(PROMPT, max_new_tokens=40).token_ids[: result.new_tokens] == result.token_ids


def test_an_end_token_ends_the_text_and_is_not_part_of_it(
    model: EdgeModel, tmp_path: Path, altered_checkpoint: Callable[..., Path]
) -> None:
    tokens = model.generate(PROMPT, max_new_tokens=12).token_ids
    end = tokens[-1]
    until = tokens[: tokens.index(end) + 1]
    checkpoint = altered_checkpoint("llama")
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, end]}))
    bits = dict.fromkeys(("front_bits", "embed_bits", "head_bits"), 4)
    export_bundle(str(checkpoint), tmp_path / "out", split=None, max_length=MAX_LENGTH, **bits)
    result = EdgeModel(tmp_path / "out" / "device").generate(PROMPT, max_new_tokens=40)
    assert result.token_ids == until
    assert result.finish_reason == "stop"
    assert result.text == model.tokenizer.decode(until[:-1])


def test_a_stop_string_ends_the_text_before_it(model: EdgeModel) -> None:
    text = model.generate(PROMPT, max_new_tokens=40).text
    stop = text[10:12]
    result = model.generate(PROMPT, max_new_tokens=40, stop=[stop])
    assert result.text == text[: text.index(stop)]
    assert result.finish_reason == "stop"
    assert result.new_tokens < 40


def test_a_chat_is_rendered_with_the_checkpoint_s_template(
    tmp_path: Path, altered_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = altered_checkpoint("llama")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<me>' if add_generation_prompt }}"
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    export_bundle(str(checkpoint), tmp_path / "out", split=None)
    model = EdgeModel(tmp_path / "out" / "device")
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert model.prompt_ids(chat) == model.prompt_ids("<system>be brief<user>hi<me>")


def test_a_chat_without_a_template_is_refused(model: EdgeModel) -> None:
    with pytest.raises(RequestError, match="no chat template; use a plain prompt"):
        model.generate([{"role": "user", "content": "hi"}])


def test_a_seed_reproduces_a_sample_and_another_seed_does_not(model: EdgeModel) -> None:
    def sample(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, top_p=0.95, seed=seed)
        return model.generate(PROMPT, max_new_tokens=30, sampling=sampling).token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_repetition_penalty_counts_the_prompt_and_what_was_generated(model: EdgeModel) -> None:
    sampling = Sampling(repetition_penalty=1000.0)
    result = model.generate(PROMPT, max_new_tokens=40, sampling=sampling)
    seen = [*model.prompt_ids(PROMPT), *result.token_ids]
    assert len(set(result.token_ids)) == 40
    assert len(set(seen)) == len(set(model.prompt_ids(PROMPT))) + 40


def test_the_context_ends_a_generation(model: EdgeModel) -> None:
    result = model.generate([1] * (MAX_LENGTH - 3), max_new_tokens=50)
    assert result.new_tokens == 3
    assert result.finish_reason == "length"


def test_the_json_form_holds_what_the_command_prints(model: EdgeModel) -> None:
    found = model.generate(PROMPT, max_new_tokens=3).to_dict()
    assert set(found) == {
        *("text", "token_ids", "prompt_tokens", "new_tokens", "finish_reason", "ttft_ms", "decode_tokens_per_s"),
        *("deadline_ms", "late_tokens", "level_changes", "drafted", "accepted", "tokens_per_round_trip"),
        *("exited", "mean_layers", "least_drafts", "skip_schedule", "ffn_skip"),
        *("prompt_ids", "sampling", "manifest_sha256", "replays"),
        *("bytes_up", "prefill_bytes_up", "decode_bytes_up", "bytes_down", "round_trips", "codec", "tokens", "moves"),
    }
    assert (found["bytes_up"], found["round_trips"], found["codec"]) == (0, 0, "none")
    json.dumps(found)
    assert all(token.pop("ms") > 0 for token in found["tokens"])
    assert found["tokens"] == [
        {"id": token, "source": "local", "layers": 4, "bytes_up": 0, "level": None} for token in found["token_ids"]
    ]


@pytest.mark.parametrize("prompt", ["", [], (), np.array([], int)], ids=repr)
def test_an_empty_prompt_is_refused(model: EdgeModel, prompt: Any) -> None:
    with pytest.raises(RequestError, match="the prompt is empty: give at least one token"):
        model.generate(prompt)


@pytest.mark.parametrize("length", [MAX_LENGTH, MAX_LENGTH + 100])
def test_a_prompt_longer_than_the_context_is_refused(model: EdgeModel, length: int) -> None:
    with pytest.raises(RequestError, match=f"{length} tokens: the context holds {MAX_LENGTH}.*--max-length"):
        model.generate([1] * length)


@pytest.mark.parametrize("token", [-1, 256, 1 << 60])
def test_ids_outside_the_vocabulary_are_refused(model: EdgeModel, token: int) -> None:
    for call in (model.generate, model.score):
        with pytest.raises(RequestError, match=f"token id {token}: must lie between 0 and 255"):
            call([1, token, 2])


@pytest.mark.parametrize("count", [0, -5])
def test_fewer_new_tokens_than_one_are_refused(model: EdgeModel, count: int) -> None:
    with pytest.raises(RequestError, match=f"max_new_tokens={count}: must be at least 1"):
        model.generate(PROMPT, max_new_tokens=count)


def test_an_empty_stop_string_is_refused(model: EdgeModel) -> None:
    with pytest.raises(RequestError, match="none may be empty"):
        model.generate(PROMPT, stop=["x", ""])


def test_a_server_is_given_exactly_if_the_bundle_is_split(tiny: Any, folder: Path) -> None:
    with pytest.raises(RequestError, match="runs wholly on the device; leave the server out"):
        EdgeModel(folder / "device", server="127.0.0.1:1")
    with pytest.raises(RequestError, match="no server given: layers 2–3 of this bundle run on one"):
        EdgeModel(tiny.bundle(split=2) / "device")


def test_a_split_bundle_cannot_score(tiny: Any) -> None:
    model = EdgeModel(tiny.bundle(split=2) / "device", server="127.0.0.1:1")
    with pytest.raises(RequestError, match="score needs the whole model on the device"):
        model.score([1, 2, 3])


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no manifest\.json there"):
        EdgeModel(tmp_path)


def test_a_text_as_long_as_the_context_can_be_scored_but_not_continued(tiny):
    model = EdgeModel(tiny.bundle(bits=4, max_length=32) / "device")
    ids = list(range(32))
    assert model.score(ids).shape == (32, 256)
    with pytest.raises(RequestError, match="32 tokens"):
        model.tokens(ids)
    with pytest.raises(RequestError, match="33 tokens"):
        model.score([*ids, 0])
