"""A file of prompts, drafted and undrafted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from isthmus.cli.main import main
from isthmus.errors import RequestError
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.edge.prompt_bench import bench_prompts, read_prompts
from isthmus.runtime.wire.security import ChannelSecurity

LINES = ["a plain text", "", '{"prompt": "in JSON"}', '{"messages": [{"role": "user", "content": "a chat"}]}']


def test_a_file_s_prompts_are_read_in_any_form(tmp_path):
    path = tmp_path / "prompts"
    path.write_text("\n".join(LINES))
    assert read_prompts(path) == ["a plain text", "in JSON", [{"role": "user", "content": "a chat"}]]


@pytest.mark.parametrize("line", ["{", '{"text": "x"}', '{"messages": 3}', '{"messages": [{"role": "user"}]}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    path = tmp_path / "prompts"
    path.write_text(f"text\n{line}\n")
    with pytest.raises(RequestError, match="line 2: no prompt"):
        read_prompts(path)


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    path = tmp_path / "prompts"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match="prompts"):
        read_prompts(path)


def test_each_prompt_runs_both_ways_and_gives_the_same_tokens(repeating, repeating_address, eager):
    security = ChannelSecurity(insecure=True)
    model = EdgeModel(repeating / "device", server=repeating_address, security=security, codec="raw32", threads=1)
    seen = []
    report = bench_prompts(
        model, ["one one one", "two"], max_new_tokens=40, vs_undrafted=True, progress=lambda *at: seen.append(at)
    )
    assert seen == [("prompts", 1, 2), ("prompts", 2, 2)]
    assert report.identical
    assert [run.new_tokens for run in report.runs] == [40, 40]
    assert sum(report.right) == sum(run.accepted for run in report.runs) > 0
    assert math.isclose(report.tokens_per_round_trip, 80 / sum(run.round_trips for run in report.runs))
    assert report.ratio > 0
    alone = bench_prompts(model, ["one"], max_new_tokens=5)
    assert (alone.identical, alone.ratio, alone.runs[0].undrafted_tokens_per_s) == (None, None, None)


def test_the_command_prints_a_table_or_one_object(repeating: Path, repeating_address, tmp_path, capsys):
    path = tmp_path / "prompts"
    path.write_text("one one one\ntwo\n")
    link = ["--server", repeating_address, "--insecure", "--codec", "raw32", "--threads", "1"]
    command = ["bench", str(repeating / "device"), *link, "--prompts", str(path), "--new-tokens", "20"]
    assert main([*command, "--vs-undrafted", "--json", "--draft", "ngram", "--draft-length", "4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["identical"] is True
    assert len(printed["prompts"]) == 2
    assert len(printed["acceptance_by_place"]) <= 4
    assert main([*command, "--vs-undrafted", "--no-overlap"]) == 0
    assert "same tokens undrafted" in capsys.readouterr().out
    assert main([*command, "--draft", "off"]) == 0
    assert "none drafted" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--vs-undrafted"], ["--prompts", "FILE", "--new-tokens", "8,9"]])
def test_options_that_do_not_fit_are_refused(repeating, repeating_address, tmp_path, capsys, options):
    path = tmp_path / "prompts"
    path.write_text("text")
    options = [str(path) if option == "FILE" else option for option in options]
    assert main(["bench", str(repeating / "device"), "--server", repeating_address, "--insecure", *options]) != 0
    assert options[0] in capsys.readouterr().err or "--new-tokens" in capsys.readouterr().err
