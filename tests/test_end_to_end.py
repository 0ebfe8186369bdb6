"""The commands as users run them: processes, real sockets, TLS."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from isthmus.runtime.wire import development

ISTHMUS = [sys.executable, "-m", "isthmus.cli.main"]
PROMPT = "A prompt of bytes."


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Variables that keep the development certificate out of the user's folder, and let SIGABRT print stacks."""
    home = str(tmp_path_factory.mktemp("home"))
    return os.environ | {"HOME": home, "XDG_CONFIG_HOME": home, "PYTHONFAULTHANDLER": "1"}


def run(environment: dict[str, str], *arguments: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """A command to its end; one that hangs tells where."""
    command = [*ISTHMUS, *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            pytest.fail(f"{command} still ran after {timeout} s\n{process.communicate()[1]}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@contextmanager
def serve(environment: dict[str, str], folder: Path, *options: str) -> Iterator[tuple[str, list[str]]]:
    """A server process: its address, and the client options that trust it."""
    command = [*ISTHMUS, "serve", str(folder), "--listen", "127.0.0.1:0", "--threads", "1", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        address = line.split(" on ")[1].split()[0]
        if "--insecure" in options:
            yield address, ["--insecure"]
        else:
            yield address, ["--tls-ca", line.strip().rstrip(")").split("certificate ")[1]]
    except BaseException as error:
        process.send_signal(signal.SIGABRT)
        error.add_note(f"the server at that time:\n{process.communicate()[1]}")
        raise
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def generate(environment: dict[str, str], folder: Path, *arguments: str) -> dict[str, object]:
    done = run(environment, "generate", folder, "-p", PROMPT, "-n", "24", "--threads", "1", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("split", [1, 2, 3])
def test_raw32_over_tls_gives_the_tokens_of_the_unsplit_model(tiny, environment, split):
    alone = generate(environment, tiny.bundle(bits=4) / "device")
    folder = tiny.bundle(bits=4, split=split)
    with serve(environment, folder / "server") as (address, trust):
        together = generate(environment, folder / "device", "--server", address, *trust, "--codec", "raw32")
    assert together["token_ids"] == alone["token_ids"]
    assert {token["source"] for token in together["tokens"]} == {"server"}
    assert {token["source"] for token in alone["tokens"]} == {"local"}


@pytest.mark.parametrize("send", ["kv", "hidden"])
def test_a_device_with_all_layers_hands_over_and_outlives_its_server(tiny, environment, send):
    alone = generate(environment, tiny.bundle(bits=4) / "device")
    folder = tiny.bundle(bits=4, split=1, device_layers="all")
    at = len(PROMPT) + 4
    plan = ["--hand-over-at", str(at), "--send", send, "--codec", "raw32"]
    with serve(environment, folder / "server") as (address, trust):
        moved = generate(environment, folder / "device", "--server", address, *trust, *plan)
        command = ["generate", folder / "device", "-p", PROMPT, "-n", "8", "--server", address, *trust, *plan]
        told = run(environment, *command)
    gone = generate(environment, folder / "device", "--server", address, *trust, *plan)
    lonely = generate(environment, folder / "device")
    assert moved["token_ids"] == gone["token_ids"] == lonely["token_ids"] == alone["token_ids"]
    assert [token["source"] for token in moved["tokens"]] == ["local"] * 4 + ["server"] * (len(moved["tokens"]) - 4)
    (move,) = moved["moves"]
    assert (move["to"], move["token"], move["send"], move["positions"]) == ("server", at, send, at - 1)
    assert 0 < move["bytes_up"] <= moved["tokens"][4]["bytes_up"]
    assert f"handed over at token {at}: {move['bytes_up']} bytes ({send})" in told.stderr
    assert {token["source"] for token in gone["tokens"] + lonely["tokens"]} == {"local"}
    assert gone["moves"] == lonely["moves"] == []


def test_a_killed_server_is_not_the_end_where_the_device_has_all_layers(tiny, environment):
    folder = tiny.bundle(bits=4, split=1, device_layers="all")
    new = ["-n", "400", "--temperature", "1.2", "--seed", "3", "--threads", "1"]
    expected = run(environment, "generate", folder / "device", "-p", PROMPT, *new)
    assert expected.returncode == 0, expected.stderr
    command = [*ISTHMUS, "serve", str(folder / "server"), "--listen", "127.0.0.1:0", "--threads", "1", "--insecure"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        address = server.stdout.readline().split(" on ")[1].split()[0]
        remote = ["--server", address, "--insecure", "--codec", "raw32"]
        command = [*ISTHMUS, "generate", str(folder / "device"), "-p", PROMPT, *new, *remote]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}  # what is read, not more
        process = subprocess.Popen(command, env=environment, **pipes)
        first = process.stdout.read(1)
        server.kill()
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert (first + rest).decode() == expected.stdout
    assert b"the device goes on alone" in errors
    assert b"back on the device at token" in errors
    assert b"Traceback" not in errors


@pytest.mark.parametrize("options", [[], ["--temperature", "1.1", "--top-p", "0.95", "--seed", "7"]])
def test_token_ids_over_tls_give_the_tokens_of_the_unsplit_model(tiny, environment, options):
    alone = generate(environment, tiny.bundle(bits=4) / "device", *options)
    folder = tiny.bundle(bits=4, split=0)
    with serve(environment, folder / "server") as (address, trust):
        together = generate(environment, folder / "device", "--server", address, *trust, *options)
    assert together["token_ids"] == alone["token_ids"]
    assert together["codec"] == "ids"


def test_sampling_with_a_seed_is_the_same_alone_and_split(tiny, environment):
    options = ["--temperature", "1.1", "--top-p", "0.95", "--repetition-penalty", "1.2", "--seed", "7"]
    alone = generate(environment, tiny.bundle(bits=4) / "device", *options)
    folder = tiny.bundle(bits=4, split=2)
    with serve(environment, folder / "server", "--insecure") as (address, trust):
        remote = ["--server", address, *trust, "--codec", "raw32"]
        together = generate(environment, folder / "device", *remote, *options)
        other = generate(environment, folder / "device", *remote, *options, "--seed", "8")
    assert together["token_ids"] == alone["token_ids"]
    assert other["token_ids"] != alone["token_ids"]


def test_generate_json_has_every_documented_field(tiny, environment):
    folder = tiny.bundle(bits=4, split=2)
    with serve(environment, folder / "server") as (address, trust):
        result = generate(environment, folder / "device", "--server", address, *trust, "--codec", "tabq")
    assert result.keys() >= {
        *("text", "token_ids", "prompt_tokens", "new_tokens", "finish_reason", "ttft_ms", "decode_tokens_per_s"),
        *("bytes_up", "prefill_bytes_up", "decode_bytes_up", "bytes_down", "round_trips", "codec", "tokens", "moves"),
    }
    assert result["codec"] == "tabq"
    assert result["prompt_tokens"] == len(PROMPT)
    assert result["new_tokens"] == len(result["token_ids"]) == len(result["tokens"]) == result["round_trips"]
    assert result["prefill_bytes_up"] == result["tokens"][0]["bytes_up"]
    assert (
        result["bytes_up"]
        == result["prefill_bytes_up"] + result["decode_bytes_up"]
        == sum(token["bytes_up"] for token in result["tokens"])
        > 0
    )
    assert all(token["layers"] == 4 for token in result["tokens"])


def test_codecs_cost_what_they_promise(tiny, environment):
    folder = tiny.bundle(bits=4, split=2)
    sent = {}
    with serve(environment, folder / "server") as (address, trust):
        for codec in ("raw32", "raw16", "tabq"):
            result = generate(environment, folder / "device", "--server", address, *trust, "--codec", codec)
            sent[codec] = result["bytes_up"] / (result["prompt_tokens"] + result["new_tokens"] - 1)
    assert 4 * 64 <= sent["raw32"] < 4 * 64 + 64
    assert 2 * 64 <= sent["raw16"] < 2 * 64 + 64
    assert sent["tabq"] < sent["raw16"]


def test_certificate_files_are_used_and_other_certificates_refused(tiny, environment, tmp_path):
    folder = tiny.bundle(bits=4, split=2)
    certificate, key = make_certificate(tmp_path / "ours")
    stranger, _ = make_certificate(tmp_path / "stranger")
    with serve(environment, folder / "server", "--tls-cert", str(certificate), "--tls-key", str(key)) as (address, _):
        remote = ["--server", address, "--codec", "raw32"]
        good = run(environment, "generate", folder / "device", "-p", "x", "-n", "2", *remote, "--tls-ca", certificate)
        bad = run(environment, "generate", folder / "device", "-p", "x", "-n", "2", *remote, "--tls-ca", stranger)
        plain = run(environment, "generate", folder / "device", "-p", "x", "-n", "2", *remote, "--insecure")
        again = run(environment, "generate", folder / "device", "-p", "x", "-n", "2", *remote, "--tls-ca", certificate)
    assert good.returncode == again.returncode == 0, good.stderr + again.stderr
    assert good.stdout == again.stdout
    for refused in (bad, plain):
        assert refused.returncode == 1
        assert refused.stderr.startswith("isthmus: error: ")
        assert "Traceback" not in refused.stderr


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for the loopback address, and its key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(development, "certificate_path", lambda: folder / "cert.pem")
        return development.development_certificate()


def test_halves_of_different_exports_do_not_meet(tiny, environment):
    ours, other = tiny.bundle(bits=4, split=2), tiny.bundle(bits=8, split=2)
    with serve(environment, other / "server", "--insecure") as (address, trust):
        done = run(environment, "generate", ours / "device", "-p", "x", "--server", address, *trust)
    assert done.returncode == 1
    assert "MANIFEST_MISMATCH" in done.stderr


def test_interrupt_ends_cleanly_and_keeps_the_text(tiny, environment):
    folder = tiny.bundle(bits=4, split=2)
    with serve(environment, folder / "server") as (address, trust):
        command = [*ISTHMUS, "generate", str(folder / "device"), "-p", PROMPT, "-n", "400", "--codec", "raw32"]
        process = subprocess.Popen(
            [*command, "--server", address, *trust], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        again = generate(environment, folder / "device", "--server", address, *trust)
    assert process.returncode == 130, errors
    assert b"interrupted" in errors
    assert b"Traceback" not in errors
    assert again["new_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", ""], "empty"),
        (["-p", "x" * 600], "600 tokens"),
        (["--prompt-ids", "1,256"], "token id 256"),
        (["--prompt-ids", "1,two"], "must be numbers"),
        (["-p", "x", "-n", "0"], "max_new_tokens=0"),
        (["-p", "x", "--temperature", "-1"], "temperature"),
        (["-p", "x", "--stop", ""], "stop"),
        (["-p", "x", "--chat"], "chat template"),
        (["-p", "x", "--server", "127.0.0.1:1"], "wholly on the device"),
        (["-p", "x", "--codec", "raw16", "--level", "1"], "raw16 has no levels"),
        (["-p", "x", "--system", "Be brief."], "needs --chat"),
        (["-p", "x", "--hand-over-at", "3"], "--device-layers all"),
        (["-p", "x", "--hand-over-at", "0"], "token 0: must be at least 1"),
        (["-p", "x", "--send", "kv"], "--send kv needs --hand-over-at"),
    ],
)
def test_a_bad_request_is_one_line_on_stderr(tiny, environment, arguments, says):
    done = run(environment, "generate", tiny.bundle(bits=4) / "device", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("isthmus: error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_server_that_is_not_there_is_named(tiny, environment):
    folder = tiny.bundle(bits=4, split=2)
    done = run(environment, "generate", folder / "device", "-p", "x", "--server", "127.0.0.1:1")
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr
    scheme = run(environment, "generate", folder / "device", "-p", "x", "--server", "https://127.0.0.1:1")
    assert scheme.returncode == 1
    assert "leave https:// out" in scheme.stderr
    missing = run(environment, "generate", folder / "device", "-p", "x")
    assert missing.returncode == 1
    assert "isthmus serve" in missing.stderr


def test_export_command_refuses_an_existing_folder_and_a_wrong_split(tiny, environment, tmp_path):
    model = tiny.checkpoint()
    exists = run(environment, "export", model, "-o", tmp_path, "--split", "2")
    assert exists.returncode == 1
    assert "exists" in exists.stderr
    out = tmp_path / "out"
    for split in ("-1", "5"):
        wrong = run(environment, "export", model, "-o", out, "--split", split)
        assert wrong.returncode == 1
        assert f"split {split}" in wrong.stderr
    assert not out.exists()


def test_export_and_inspect_print_the_same_manifest(tiny, environment, tmp_path):
    options = ["--split", "2", "--calibration-tokens", "0", "--json"]
    exported = run(environment, "export", tiny.checkpoint(), "-o", tmp_path / "out", *options)
    assert exported.returncode == 0, exported.stderr
    for folder in ("out", "out/device", "out/server"):
        inspected = run(environment, "inspect", tmp_path / folder, "--json")
        assert json.loads(inspected.stdout) == json.loads(exported.stdout)
    table = run(environment, "inspect", tmp_path / "out" / "device")
    assert "layers 0–1 on the device, 2–3 on the server" in table.stdout
    assert "which the device has, too" not in table.stdout
    report = json.loads(exported.stdout)["validation"]
    assert f"top-1 agreement {report['top1_agreement']:.4f}" in table.stdout
    assert np.isfinite(report["kl"])


def test_export_gives_the_device_all_layers_and_inspect_says_so(tiny, environment, tmp_path):
    options = ["--split", "2", "--calibration-tokens", "0", "--device-layers", "all"]
    exported = run(environment, "export", tiny.checkpoint(), "-o", tmp_path / "out", *options)
    assert exported.returncode == 0, exported.stderr
    assert "layers 0–1 on the device, 2–3 on the server, which the device has, too" in exported.stdout
    for folder in ("out", "out/device", "out/server"):
        assert run(environment, "inspect", tmp_path / folder).stdout == exported.stdout


def test_export_keeps_the_whole_model_on_the_device_if_told_to(tiny, environment, tmp_path):
    options = ["--split", "all", "--calibration-tokens", "0", "--json"]
    exported = run(environment, "export", tiny.checkpoint(), "-o", tmp_path / "out", *options)
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["split"] == 4
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["device"]
