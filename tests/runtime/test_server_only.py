"""A bundle whose whole model is on the server: token ids cross, and nothing else is different."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.cli.main import main
from isthmus.errors import BundleError, CodecError, ProtocolError, RequestError
from isthmus.quant.ids import Ids
from isthmus.runtime.bundle import open_bundle
from isthmus.runtime.chain import Chain
from isthmus.runtime.codecs import default_codec, open_codec
from isthmus.runtime.edge.bench import bench
from isthmus.runtime.edge.generate import PREFILL_CHUNK
from isthmus.runtime.edge.link import RemoteBack
from isthmus.runtime.edge.link_probe import measure_link
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.evaluate import BundleReference, evaluate_text
from isthmus.runtime.install import install_bundle
from isthmus.runtime.memory import half_memory
from isthmus.runtime.sampling import Sampling
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity

PROMPT = np.random.default_rng(3).integers(1, 256, 200).tolist()  # two chunks
SAMPLED = Sampling(temperature=1.1, top_p=0.95, repetition_penalty=1.2, seed=7)


@pytest.fixture(scope="module")
def folder(tiny: Any) -> Path:
    return tiny.bundle(split=0)


@pytest.fixture(scope="module")
def alone(tiny: Any) -> EdgeModel:
    return EdgeModel(tiny.bundle() / "device", threads=1)


@pytest.fixture
def back(folder: Path, user_config: Path) -> Iterator[BackServer]:
    with BackServer.from_bundle(folder / "server", threads=1) as server:
        yield server


@pytest.fixture
def model(folder: Path, back: BackServer) -> EdgeModel:
    return EdgeModel(folder / "device", server=back.address, security=ChannelSecurity(), threads=1)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], PROMPT[:129]])
def test_its_tokens_are_those_of_the_whole_model_on_the_device(model, alone, prompt, sampling):
    options = {"max_new_tokens": 40, "sampling": sampling}
    result = model.generate(prompt, **options)
    assert result.token_ids == alone.generate(prompt, **options).token_ids
    assert result.codec == "ids"
    assert {token.layers for token in result.tokens} == {4}
    assert {token.source for token in result.tokens} <= {"server", "ngram"}


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED])
def test_a_session_that_is_attached_again_goes_on_with_the_same_tokens(folder, back, alone, make_proxy, sampling):
    proxy = make_proxy(back.address)
    model = EdgeModel(folder / "device", server=proxy.address, security=ChannelSecurity(), threads=1)
    stream = model.tokens(PROMPT, max_new_tokens=24, sampling=sampling, end_tokens=())
    tokens = []
    try:
        for token in stream:
            tokens.append(token.id)
            if len(tokens) % 8 == 0:
                proxy.cut()
        assert stream._back.reattached >= 2
    finally:
        stream.close()
    expected = alone.tokens(PROMPT, max_new_tokens=24, sampling=sampling, end_tokens=())
    assert tokens == [token.id for token in expected]


def test_a_token_costs_its_id_and_the_framing(model):
    result = model.generate(PROMPT, max_new_tokens=8, draft="off")
    assert result.prefill_bytes_up < 2 * len(PROMPT) + 2 * 32
    assert {token.bytes_up for token in result.tokens[1:]} == {
        2 + 20
    }  # positions from 128 on take a byte more, and steps


class Crafted(Ids):
    """Sends what it is told to in place of the ids."""

    def __init__(self, payload: bytes) -> None:
        super().__init__(256)
        self._payload = payload

    def encode(self, hidden, token_ids=()):
        return self._payload


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"\1\0\0\1", "token id 256"),
        (b"\xff\xff\1\0", "token id 65535"),
        (b"\1\0", "payload of 2 bytes"),
        (b"\1\0" * 3, "payload of 6 bytes"),
        (b"", "payload of 0 bytes"),
    ],
)
def test_a_crafted_frame_is_refused_and_the_server_lives_on(folder, back, model, alone, payload, says):
    digest = open_bundle(folder / "device").manifest_sha256
    common = {"manifest_sha256": digest, "split": 0, "d_model": 64, "security": ChannelSecurity()}
    with RemoteBack(back.address, codec=Crafted(payload), **common) as link:
        link.open(8, Sampling())
        with pytest.raises(ProtocolError, match=f"BAD_FRAME.*{says}"):
            link.step(np.zeros((2, 64), np.float32), 0, [1, 2], sample=True)
    assert model.generate(PROMPT, max_new_tokens=4).token_ids == alone.generate(PROMPT, max_new_tokens=4).token_ids


def test_a_client_with_another_codec_is_refused(folder, back):
    class Raw32(Crafted):
        name = "raw32"

    digest = open_bundle(folder / "device").manifest_sha256
    common = {"manifest_sha256": digest, "split": 0, "d_model": 64, "security": ChannelSecurity()}
    link = RemoteBack(back.address, codec=Raw32(b""), **common)
    with pytest.raises(ProtocolError, match=r"UNSUPPORTED_CODEC.*this server decodes ids"):
        link.open(8, Sampling())


def test_ids_are_its_only_codec_and_no_other_bundle_s(folder, tiny):
    device, server = open_bundle(folder / "device"), open_bundle(folder / "server")
    assert device.manifest.codecs == ("ids",)
    assert default_codec(device) == "ids"
    payload = open_codec(device, "ids").encode(np.zeros((2, 64), np.float32), [5, 6])
    assert np.isfinite(open_codec(server, "ids").decode(payload, 2, 64)).all()
    with pytest.raises(CodecError, match="no embedding"):
        open_codec(device, "ids").decode(payload, 2, 64)
    with pytest.raises(CodecError, match="choose one of ids"):
        EdgeModel(folder / "device", server="127.0.0.1:1", codec="klt")
    with pytest.raises(CodecError, match="ids has no levels"):
        open_codec(device, "ids", 1)
    with pytest.raises(CodecError, match="'ids' is not for this bundle"):
        open_codec(open_bundle(tiny.bundle(split=2) / "device"), "ids")


def test_what_it_cannot_do_is_an_error_that_says_so(folder):
    with pytest.raises(RequestError, match="no server given: layers 0–3"):
        EdgeModel(folder / "device")
    with pytest.raises(RequestError, match="deadline needs a split bundle"):
        EdgeModel(folder / "device", server="127.0.0.1:1", deadline_ms=50)
    with pytest.raises(RequestError, match="token id 256"):
        EdgeModel(folder / "device", server="127.0.0.1:1").generate([256])
    with pytest.raises(RequestError, match="too few bytes to measure"):
        measure_link(open_bundle(folder / "device"), "127.0.0.1:1", ChannelSecurity())
    with pytest.raises(BundleError, match="no weights to pack"):
        install_bundle(folder / "device")
    assert not (folder / "device" / "installed").exists()


def test_a_device_without_weights_needs_hardly_more_than_the_interpreter(folder, tiny):
    zero, split = (open_bundle(path / "device") for path in (folder, tiny.bundle(split=1)))
    short, full = (half_memory(zero, positions, chunk=PREFILL_CHUNK) for positions in (64, 512))
    assert short.total_mb == full.total_mb < half_memory(split, 64, chunk=PREFILL_CHUNK).total_mb
    beside = {part: mb for part, mb in full.parts.items() if part != "interpreter and libraries"}
    assert sum(beside.values()) < 1


def test_a_chain_of_it_predicts_as_the_whole_model_and_counts_the_ids(folder, tiny):
    whole = Chain.open(tiny.bundle() / "device", threads=1)
    chain = Chain.open(folder / "device", folder / "server", threads=1)
    windows = [PROMPT[:150], PROMPT[150:]]
    (result,) = evaluate_text(chain, windows, chain.codecs(["ids"]), BundleReference(whole, windows))
    assert (result.kl, result.top1, result.codec, result.bytes_per_token) == (0.0, 1.0, "ids", 2.0)
    again = BundleReference(chain, windows)
    whole.truncate(0)
    assert np.array_equal(again.logits(0, slice(0, 9)), whole.logits(whole.front(windows[0])[:9]))
    with pytest.raises(BundleError, match="layers 0–3 lie in the server half"):
        Chain.open(folder / "device", threads=1)


def test_bench_leaves_out_the_share_of_a_front_without_layers(model):
    report = bench(model, prompt_tokens=(4,), new_tokens=(3,), repetitions=1)
    assert [cost.encode_percent for cost in report.codec] == [None, None]
    assert report.breakdown is not None
    assert report.breakdown.front_ms == 0
    json.loads(json.dumps(report.to_dict()))


def test_the_commands_read_it(folder, tiny, tmp_path, capsys):
    for half in ("", "device", "server"):
        assert main(["inspect", str(folder / half)]) == 0
        out = capsys.readouterr().out
        assert "the whole model on the server" in out
        assert "context: server 1024 bytes" in out
    text = tmp_path / "text.txt"
    text.write_text("a text of some tokens " * 9)
    command = ["eval", str(folder / "device"), "--back", str(folder / "server"), "--text", str(text), "--window", "64"]
    command += ["--reference", str(tiny.bundle()), "--cache", str(tmp_path), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["codec"] == "ids"
    assert main([*command, "--codec", "tabq"]) == 1
    assert "choose one of ids" in capsys.readouterr().err
