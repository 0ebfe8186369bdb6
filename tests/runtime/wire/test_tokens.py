"""Bearer tokens: the file, and who gets in by it."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from isthmus.cli.main import main
from isthmus.errors import SecurityError
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.server.admission import Admission
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.security import ChannelSecurity, ServerSecurity
from isthmus.runtime.wire.tokens import TokenFile, checked_token, issue_token, read_token

PROMPT = [1, 2, 3]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def folder(tiny: Any) -> Path:
    return Path(tiny.bundle(bits=8, split=2))


def generate(folder: Path, address: str, token: str | None) -> list[int]:
    security = ChannelSecurity(insecure=True, token=token)
    model = EdgeModel(folder / "device", server=address, security=security, threads=1, draft="off")
    return model.generate(PROMPT, max_new_tokens=4).token_ids


def test_a_file_knows_names_but_no_tokens(tokens):
    issued = {name: issue_token(tokens, name) for name in ("camera-1", "phone")}
    text = tokens.read_text()
    assert all(token not in text for token in issued.values())
    assert stat.S_IMODE(tokens.stat().st_mode) == 0o600
    file = TokenFile(tokens)
    for name, token in issued.items():
        assert file.name_of(token) == name
        assert file.name_of(token[:-1]) is None
    assert file.name_of("") is None


def test_only_devices_with_a_token_get_in(folder, tokens, caplog):
    token = issue_token(tokens, "phone")
    security = ServerSecurity(insecure=True, tokens=tokens)
    with BackServer.from_bundle(folder / "server", threads=1, security=security) as server:
        assert len(generate(folder, server.address, token)) == 4
        for wrong in (None, issue_token(tokens.with_name("other"), "phone")):
            with pytest.raises(SecurityError, match="not accepted"):
                generate(folder, server.address, wrong)
        later = issue_token(tokens, "watch")
        assert len(generate(folder, server.address, later)) == 4
        tokens.write_text("".join(line for line in tokens.read_text().splitlines(True) if "phone" not in line))
        with pytest.raises(SecurityError, match="not accepted"):
            generate(folder, server.address, token)
    assert token not in caplog.text


def test_the_name_is_the_identity(tokens):
    token = issue_token(tokens, "phone")
    admission = Admission(ServerSecurity(insecure=True, tokens=tokens))
    assert admission.identity({}, [("user-agent", "x"), ("authorization", f"Bearer {token}")]) == "phone"
    for header in (f"Basic {token}", token, "Bearer ", "Bearer \udc80"):
        assert admission.identity({}, [("authorization", header)]) is None


def test_a_damaged_file_leaves_the_tokens_before_it_in_force(tokens, caplog):
    token = issue_token(tokens, "phone")
    file = TokenFile(tokens)
    tokens.write_text("phone nonsense\n")
    assert file.name_of(token) == "phone"
    assert "line 1" in caplog.text
    with pytest.raises(SecurityError, match="line 1"):
        TokenFile(tokens)


@pytest.mark.parametrize("name", ["", "two words", "a/b", "x" * 65])
def test_names_of_another_form_are_refused(tokens, name):
    with pytest.raises(SecurityError, match="letters"):
        issue_token(tokens, name)
    assert not tokens.exists()


def test_a_name_is_given_once(tokens):
    issue_token(tokens, "phone")
    before = tokens.read_bytes()
    with pytest.raises(SecurityError, match="already"):
        issue_token(tokens, "phone")
    assert tokens.read_bytes() == before


def test_plaintext_over_a_network_is_refused_on_both_ends(folder, tokens):
    token = issue_token(tokens, "phone")
    with pytest.raises(SecurityError, match="plaintext"):
        ChannelSecurity(insecure=True, token=token).channel("192.0.2.1:7070")
    security = ServerSecurity(insecure=True, tokens=tokens)
    server = BackServer.from_bundle(folder / "server", "0.0.0.0:0", threads=1, security=security)
    with pytest.raises(SecurityError, match="plaintext"):
        server.start()


def test_a_token_is_not_shown_by_accident():
    assert "secret" not in repr(ChannelSecurity(token="secret"))
    with pytest.raises(SecurityError) as caught:
        checked_token("short-secret", "FILE")
    assert "short-secret" not in str(caught.value)


def test_the_command_prints_a_token_once(tokens, capsys, tmp_path):
    assert main(["certs", "token", str(tokens), "phone"]) == 0
    token = capsys.readouterr().out.strip()
    assert TokenFile(tokens).name_of(token) == "phone"
    kept = tmp_path / "token"
    kept.write_text(token + "\n")
    assert read_token(kept) == token
    assert main(["certs", "token", str(tokens), "phone"]) == 1
    assert "already" in capsys.readouterr().err
