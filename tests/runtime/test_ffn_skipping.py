"""Feed-forward networks that tokens leave out: row by row, whatever the chunks, the cut, or the wire between."""

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
from isthmus.errors import ExportError, LinkError, ProtocolError, RequestError
from isthmus.export.feed_forward import skippable_layers
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.segments import Embedding, LayerStack
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.skipping import FFN_WARM_UP, Bypass, SkipSchedule
from isthmus.runtime.wire import framing

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6] * 4
NEW = 24
SIMILARITY = 0.8
TEXT = [7, 2, 9, 200, 31, 5, 77, 140, 18, 3, 3, 250, 64, 90, 11, 1]


def skipping(tiny: Any, kind: str = "llama", bits: int = 8, split: int | None = None, **options: Any) -> Path:
    """A bundle of four layers, of which the third may leave its network out."""
    options = {"layers_per_block": 4} | options
    folder: Path = tiny.bundle(kind, bits=bits, split=split, ffn_skip=True, **options)
    return folder


def states(folder: Path, ids: list[int], bypass: Bypass, half: Any = "device") -> np.ndarray:
    bundle = open_bundle(folder, half)
    rows: np.ndarray = LayerStack(bundle, 1).session(len(ids) + 8, bypass).forward(Embedding(bundle).rows(ids))
    return rows.copy()


# --- graphs


@pytest.mark.parametrize(
    ("block", "layers", "expected"),
    [
        (range(10), 30, range(4, 10)),  # three layers are cold, and the fourth has nobody before it to ask
        (range(10, 20), 30, range(11, 20)),
        (range(20, 30), 30, range(21, 27)),
        (range(4), 4, range(2, 3)),
        (range(2), 4, range(2, 2)),
    ],
)
def test_layers_between_the_cold_ones_may_leave_their_network_out(block: range, layers: int, expected: range) -> None:
    assert skippable_layers(block, layers) == expected


@pytest.mark.parametrize("bits", [4, 32])
def test_where_nothing_is_left_out_the_bits_are_those_of_a_plain_bundle(tiny: Any, bits: int) -> None:
    plain = tiny.bundle(bits=bits, layers_per_block=4)
    rows = states(plain, TEXT, Bypass())
    assert np.array_equal(states(skipping(tiny, bits=bits), TEXT, Bypass()), rows)
    late = Bypass({}, SIMILARITY, len(TEXT))
    assert np.array_equal(states(skipping(tiny, bits=bits), TEXT, late), rows)


def test_rows_leave_out_what_the_rule_says(tiny: Any) -> None:
    """Against transformers, whose networks are left out by hooks: the third layer's, by what the second's did."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.checkpoint(), dtype=torch.float32)
    layers, before, similar = model.model.layers, {}, {}
    for index in (1, 2):
        layers[index].post_attention_layernorm.register_forward_pre_hook(
            lambda _, arguments, index=index: before.update({index: arguments[0]})
        )

    def decide(_module: Any, _arguments: Any, output: Any) -> None:
        cosine = torch.nn.functional.cosine_similarity(before[1], before[1] + output, dim=-1)
        similar["rows"] = cosine >= SIMILARITY

    layers[1].mlp.register_forward_hook(decide)
    layers[2].mlp.register_forward_hook(lambda _, __, output: torch.where(similar["rows"][..., None], 0.0, output))
    states_seen: list[Any] = []
    layers[3].register_forward_hook(lambda _, __, output: states_seen.append(output))
    with torch.no_grad():
        model(torch.tensor([TEXT]))
    output = states_seen[0]
    expected = (output[0] if isinstance(output, tuple) else output).reshape(len(TEXT), -1).numpy()
    assert 0 < int(similar["rows"].sum()) < len(TEXT)
    rows = states(skipping(tiny, bits=32), TEXT, Bypass({}, SIMILARITY, 0))
    assert np.abs(rows - expected).max() < 1e-4
    assert np.abs(rows - states(skipping(tiny, bits=32), TEXT, Bypass())).max() > 0.1


@pytest.mark.parametrize(("kind", "bits"), [("llama", 4), ("mistral", 8), ("qwen2", 32)])
@settings(max_examples=15)
@given(data=st.data())
def test_no_chunking_changes_a_bit(tiny: Any, kind: str, bits: int, data: st.DataObject) -> None:
    folder = skipping(tiny, kind, bits)
    bundle = open_bundle(folder, "device")
    stack, embedding = LayerStack(bundle, 1), Embedding(bundle)
    ids = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=30))
    bypass = Bypass({}, data.draw(st.sampled_from([0.5, 0.7, 0.8, 0.9, 1.0])), data.draw(st.integers(0, 20)))
    session = stack.session(len(ids) + 8, bypass)
    parts: list[np.ndarray] = []
    while (at := session.cache.length) < len(ids):
        count = data.draw(st.integers(1, len(ids) - at))
        if data.draw(st.booleans(), "guess wrongly first"):
            session.forward(embedding.rows([7] * data.draw(st.integers(1, 8))))
            session.cache.truncate(at)
        parts.append(session.forward(embedding.rows(ids[at : at + count])).copy())
    assert np.array_equal(np.concatenate(parts), states(folder, ids, bypass))


# --- generations


def generated(model: EdgeModel, prompt: list[int], sampling: Sampling | None = None, **options: Any) -> list[int]:
    stream = model.tokens(prompt, max_new_tokens=NEW, sampling=sampling, end_tokens=(), **options)
    try:
        return [token.id for token in stream]
    finally:
        stream.close()


def edge(folder: Path, server: BackServer, **options: Any) -> EdgeModel:
    return EdgeModel(folder / "device", server=server.address, codec="raw32", **options)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:3]], ids=["long", "shorter than the warm-up"])
def test_prompt_and_warm_up_run_whole(tiny: Any, prompt: list[int]) -> None:
    folder = skipping(tiny)
    ids = generated(EdgeModel(folder / "device", ffn_skip=SIMILARITY), prompt)
    bypass = Bypass({}, SIMILARITY, max(FFN_WARM_UP, len(prompt)))
    model = EdgeModel(folder / "device")
    assert model._head is not None
    rows = states(folder, prompt + ids[:-1], bypass)[len(prompt) - 1 :]
    assert model._head.logits_many(rows).argmax(1).tolist() == ids


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=5)])
@pytest.mark.parametrize("split", [1, 3])  # neither cuts between the two layers of which one asks the other
@pytest.mark.parametrize("draft", ["off", "ngram"])
def test_split_and_drafted_tokens_are_those_of_the_whole_model(
    tiny: Any, serve: Callable[[Path], BackServer], split: int, draft: Any, sampling: Sampling
) -> None:
    expected = generated(EdgeModel(skipping(tiny) / "device", ffn_skip=SIMILARITY), PROMPT, sampling)
    folder = skipping(tiny, split=split)
    server = serve(folder)
    assert generated(edge(folder, server, draft=draft, ffn_skip=SIMILARITY), PROMPT, sampling) == expected
    assert generated(edge(folder, server), PROMPT, sampling) != expected


def test_a_session_that_is_made_again_and_one_that_is_handed_over_leave_out_the_same(
    tiny: Any, serve: Callable[[Path], BackServer], tokens_though_stopped: Callable[..., list[int]]
) -> None:
    from isthmus.runtime.edge.handover import HandOver

    expected = generated(EdgeModel(skipping(tiny) / "device", ffn_skip=SIMILARITY), PROMPT)
    folder = skipping(tiny, split=1)
    first, second = serve(folder), serve(folder)
    addresses = f"{first.address},{second.address}"
    model = EdgeModel(folder / "device", server=addresses, codec="raw32", draft="off", ffn_skip=SIMILARITY)
    assert tokens_though_stopped(model, PROMPT, NEW, first) == expected
    whole = skipping(tiny, split=1, device_layers="all")
    model = edge(whole, serve(whole), ffn_skip=SIMILARITY)
    for send in ("kv", "hidden"):
        assert generated(model, PROMPT, hand_over=HandOver(len(PROMPT) + 7, send)) == expected


def test_together_with_a_skip_schedule(tiny: Any, serve: Callable[[Path], BackServer]) -> None:
    folder = tiny.bundle(bits=8, split=1, device_layers="all", layers_per_block=2, ffn_skip=True)
    schedule = SkipSchedule(4, 2, 12)  # leaves the block with the skipping layer out, but not from the first token on
    ways = [{"skip_schedule": schedule, "ffn_skip": SIMILARITY}, {"skip_schedule": schedule}, {"ffn_skip": SIMILARITY}]
    alone = [generated(EdgeModel(folder / "device", **way), PROMPT) for way in ways]
    assert [generated(edge(folder, serve(folder), **way), PROMPT) for way in ways] == alone
    assert len(set(map(tuple, alone))) == 3


# --- what is refused


def test_thresholds_and_bundles_that_cannot_be_are_refused(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = skipping(tiny) / "device"
    for similarity in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(RequestError, match=r"must be a cosine above 0, and 1 at most, as in 0\.98"):
            EdgeModel(folder, ffn_skip=similarity)
    with pytest.raises(RequestError, match=r"export it again with --ffn-skip"):
        EdgeModel(tiny.bundle(bits=8) / "device", ffn_skip=0.9)
    with pytest.raises(RequestError, match="calibrated at full depth, and a skip schedule or ffn skip leaves a part"):
        EdgeModel(skipping(tiny, split=1) / "device", server="127.0.0.1:1", exit_agreement=0.9, ffn_skip=0.9)
    with pytest.raises(ExportError, match="4 layers in blocks of 1: the first network of a block always runs"):
        skipping(tiny, layers_per_block=1)
    assert main(["generate", str(folder), "-p", "a", "--ffn-skip", "1.5"]) == 1
    assert "must be a cosine above 0" in capsys.readouterr().err


def test_an_older_server_is_not_taken_for_one_that_skips(
    tiny: Any, serve: Callable[[Path], BackServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = skipping(tiny, split=1)
    server = serve(folder)
    monkeypatch.setattr(framing, "PROTOCOL_MINOR", framing.FFN_SKIP_MINOR - 1)
    model = edge(folder, server, ffn_skip=SIMILARITY)
    with pytest.raises(LinkError, match=r"speaks protocol 1\.3: to skip feed-forward networks needs 1\.4; update the"):
        model.generate(PROMPT, max_new_tokens=4)


@pytest.mark.parametrize("similarity", [1.5, -1.0])
def test_a_server_refuses_what_is_no_threshold(
    tiny: Any, serve: Callable[[Path], BackServer], similarity: float
) -> None:
    from isthmus.runtime.edge.link import RemoteBack

    folder = skipping(tiny, split=1)
    back = edge(folder, serve(folder))._back(edge(folder, serve(folder))._levels[0], None)
    assert isinstance(back, RemoteBack)
    with pytest.raises(ProtocolError, match="must be a cosine above 0"):
        back.open(20, Sampling(), (), Bypass({}, similarity, 5))


def test_the_command_line(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    export = ["export", str(tiny.checkpoint()), "-o", str(out), "--split", "all", "--ffn-skip"]
    assert main([*export, "--calibration-tokens", "0"]) == 0
    assert "feed-forward networks may be left out: generate --ffn-skip" in capsys.readouterr().out
    generate = ["generate", str(out / "device"), "--prompt-ids", ",".join(map(str, PROMPT)), "-n", str(NEW), "--json"]
    texts = []
    for options in ([], ["--ffn-skip", str(SIMILARITY)]):
        assert main([*generate, *options]) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] != texts[1]
