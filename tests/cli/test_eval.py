"""`isthmus eval`: its output, its errors, and that a killed one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from isthmus.cli.main import main


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"line %d of a text\r\n" % at for at in range(40)))
    return path


@pytest.fixture
def items(tmp_path: Path) -> Path:
    """A task's file."""
    path = tmp_path / "items.jsonl"
    rows = [{"query": f"Number {at} is", "choices": ["even", "odd"], "gold": at % 2} for at in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def evaluate(tiny: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    folder = tiny.bundle("llama", split=2)

    def run(*options: str, reference: str | None = str(tiny.checkpoint("llama"))) -> tuple[int, str, str]:
        command = ["eval", str(folder / "device"), "--back", str(folder / "server"), "--cache", str(tmp_path / "cache")]
        command += ["--reference", reference] if reference else []
        command += [] if "--text" in options or "--task" in options else ["--text", str(text)]
        status = main([*command, *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_one_codec_is_one_object(evaluate: Any) -> None:
    status, out, err = evaluate("--tokens", "300", "--window", "100", "--codec", "tabq", "--level", "1", "--json")
    assert status == 0
    result = json.loads(out)
    assert (result["codec"], result["level"], result["tokens"], result["windows"]) == ("tabq", 1, 300, 3)
    for name in ("perplexity", "perplexity_se", "reference_perplexity", "perplexity_ratio", "kl", "top1"):
        assert result[name] > 0
    assert 2 < result["bits_per_element"] < 16
    assert result["bytes_per_token"] == result["bits_per_element"] * 8
    assert "40 CRLF line ends read as LF" in err


def test_several_are_a_list_or_a_table(evaluate: Any) -> None:
    options = ("--tokens", "200", "--codec", "raw32,tabq", "--level", "0,1")
    status, out, _ = evaluate(*options, "--json")
    assert status == 0
    assert [(row["codec"], row["level"]) for row in json.loads(out)] == [("raw32", None), ("tabq", 0), ("tabq", 1)]
    status, out, _ = evaluate(*options)
    assert status == 0
    assert [line.split("  ")[0] for line in out.splitlines()[2:5]] == ["raw32", "tabq 0", "tabq 1"]


def test_a_bundle_as_reference_with_itself_is_at_distance_0(evaluate: Any, tiny: Any) -> None:
    for folder in (tiny.bundle("llama"), tiny.bundle("llama", split=2) / "device"):
        status, out, _ = evaluate("--codec", "raw32", "--json", reference=str(folder))
        assert status == 0
        assert json.loads(out)["kl"] == 0


def test_a_finished_evaluation_leaves_the_reference_only_unless_it_was_given_a_journal(
    evaluate: Any, tmp_path: Path
) -> None:
    _, first, _ = evaluate("--journal", str(tmp_path / "mine.jsonl"), "--json")
    assert [path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".npy"]
    assert len((tmp_path / "mine.jsonl").read_text().splitlines()) > 1
    assert evaluate("--journal", str(tmp_path / "mine.jsonl"), "--json")[1] == first
    assert evaluate("--json")[1] == first
    assert [path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".npy"]


# The command, slowed down so that a kill comes in its middle.
SLOW = """
import sys, time
from isthmus.cli.main import main
from isthmus.runtime.chain import Chain

front = Chain.front
Chain.front = lambda *arguments: (time.sleep(0.2), front(*arguments))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("mode", ["text", "task"])
def test_a_killed_evaluation_goes_on(
    evaluate: Any, tiny: Any, text: Path, items: Path, tmp_path: Path, mode: str
) -> None:
    if mode == "task":
        pytest.importorskip("lm_eval")
        wanted = ["--task", "openbookqa", "--data", str(items), "--codec", "tabq", "--level", "0,3"]
    else:
        wanted = ["--text", str(text), "--window", "50", "--reference", str(tiny.checkpoint("llama"))]
    expected = json.loads(evaluate(*wanted, "--json", reference=None)[1])
    folder, journal = tiny.bundle("llama", split=2), tmp_path / "killed.jsonl"
    wanted += ["--journal", str(journal), "--json"]
    command = [sys.executable, "-c", SLOW, "eval", str(folder / "device"), "--back", str(folder / "server"), *wanted]
    environment = os.environ | {"ISTHMUS_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") >= 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_text().splitlines()[1:]
    with journal.open("a") as file:
        file.write('{"name": "window 9", "resu')  # what a kill in the middle of a line leaves
    status, out, _ = evaluate(*wanted, reference=None)
    assert status == 0
    assert json.loads(out) == expected
    lines = [line for line in journal.read_text().splitlines()[1:] if line.endswith("}")]
    assert lines[: len(done)] == done
    assert len(lines) == len({json.loads(line)["name"] for line in lines}) > len(done) >= 3


def test_a_task_is_one_object_or_a_table(evaluate: Any, items: Path, tiny: Any) -> None:
    pytest.importorskip("lm_eval")
    options = ("--task", "openbookqa", "--data", str(items), "--limit", "5")
    status, out, _ = evaluate(*options, "--codec", "raw32", "--json", reference=None)
    assert status == 0
    result = json.loads(out)
    assert (result["task"], result["items"], result["bits_per_element"]) == ("openbookqa", 5, 32)
    assert 0 <= result["accuracy"] <= 1
    status, out, _ = evaluate(*options, "--level", "all", reference=str(tiny.bundle("llama")))
    assert status == 0
    assert [line.split("  ")[0] for line in out.splitlines()[2:7]] == [f"tabq {level}" for level in range(5)]
    assert "5 items of openbookqa" in out
    assert "reference accuracy" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "swag", "--data", "DATA"), "task 'swag' is unknown"),
        (("--task", "openbookqa"), "give it with --data"),
        (("--task", "openbookqa", "--data", "missing.jsonl"), "missing.jsonl: no such file"),
        (("--task", "arc_easy", "--data", "DATA"), "line 1: a query that does not begin"),
        (("--task", "openbookqa", "--data", "DATA", "--limit", "0"), "limit=0"),
        (("--task", "openbookqa", "--data", "DATA", "--tokens", "9"), "--tokens has no meaning with --task"),
        (("--task", "openbookqa", "--data", "DATA", "--reference", "MODEL"), "a task is compared with a bundle"),
        (("--text", "TEXT", "--limit", "9"), "--limit has no meaning with --text"),
    ],
)
def test_bad_input_of_a_task_is_one_line(
    evaluate: Any, items: Path, text: Path, tiny: Any, options: tuple[str, ...], message: str
) -> None:
    names = {"DATA": str(items), "TEXT": str(text), "MODEL": str(tiny.checkpoint("llama"))}
    status, out, err = evaluate(*(names.get(option, option) for option in options), reference=None)
    assert (status, out) == (1, "")
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "missing.txt"), "missing.txt"),
        (("--tokens", "100000"), "100000 are needed"),
        (("--window", "600"), "context holds 512"),
        (("--level", "9"), "level 9"),
        (("--level", "fine"), "--level 'fine': must be numbers"),
        (("--codec", "zip"), "codec 'zip' is unknown"),
        (("--codec", ","), "--codec ',': name at least one"),
        (("--threads", "0"), "threads=0"),
    ],
)
def test_bad_input_is_one_line(evaluate: Any, options: tuple[str, ...], message: str) -> None:
    status, out, err = evaluate(*options)
    assert status == 1
    assert out == ""
    assert message in err.splitlines()[-1]


def test_a_missing_reference_and_a_missing_half_say_what_to_give(
    evaluate: Any, tiny: Any, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give --reference" in evaluate(reference=None)[2]
    assert "not in the catalog" in evaluate(reference="nowhere")[2]
    assert main(["eval", str(tiny.bundle("llama", split=2) / "device"), "--text", str(text)]) == 1
    assert "--back OUT/server" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["curve.png", "curve.svg"])
def test_a_picture_has_a_curve_for_each_codec(evaluate: Any, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    options = ("--tokens", "200", "--window", "100", "--codec", "raw16,tabq", "--level", "all", "--plot", str(path))
    status, out, _ = evaluate(*options)
    assert status == 0
    assert "tabq 4" in out
    assert [p.name for p in tmp_path.glob("*curve*")] == [name]
    content = path.read_bytes()
    if name.endswith("svg"):
        assert content.count(b'<g id="axes_') == 2
        assert content.count(b'<g id="legend_') == 2
    else:
        assert content.startswith(b"\x89PNG")


def test_a_picture_of_a_task_and_of_a_reference_at_distance_0(
    evaluate: Any, items: Path, tmp_path: Path, tiny: Any
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("lm_eval")
    same = str(tiny.bundle("llama"))
    path = tmp_path / "curve.svg"
    task = ("--task", "openbookqa", "--data", str(items))
    assert evaluate(*task, "--codec", "raw32,tabq", "--plot", str(path), reference=same)[0] == 0
    assert path.read_bytes().count(b'<g id="axes_') == 1
    assert evaluate("--codec", "raw32", "--plot", str(path), reference=same)[0] == 0
    assert path.read_bytes().count(b'<g id="axes_') == 2


@pytest.mark.parametrize(
    ("plot", "message"), [("curve.pdf", "must end in .png or .svg"), ("no/folder/curve.png", "make it first")]
)
def test_a_picture_that_cannot_be_drawn_is_refused_first(evaluate: Any, plot: str, message: str) -> None:
    status, out, err = evaluate("--plot", plot)
    assert (status, out) == (1, "")
    assert message in err


def test_a_picture_needs_matplotlib_and_a_link(
    evaluate: Any, tiny: Any, text: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(tiny.bundle("llama") / "device"), "--text", str(text), "--plot", "curve.png"]
    assert main(command) == 1
    assert "sends nothing" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'isthmus[eval]'" in evaluate("--plot", "curve.png")[2]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the measurement was asked for; it takes no time."""
    from isthmus.export import accuracy_measurement
    from isthmus.export.accuracy import AccuracyTable, CodecPoint

    asked: list[dict[str, Any]] = []

    def measure(model: str, **options: Any) -> AccuracyTable:
        asked.append({"model": model} | options)
        rows = {bits: (1 / bits,) * 4 for bits in (2, 4, 8, 16, 32)}
        return AccuracyTable(
            model="tiny",
            hashes={"model.safetensors": "aa"},
            layers=4,
            tokens=options["tokens"],
            text="a text",
            activations=0.01,
            weights=rows,
            weights_se=dict.fromkeys(rows, 0.1),
            embed={8: 0.001, 16: 0.0, 32: 0.0},
            head={8: 0.002, 16: 0.0, 32: 0.0},
            kv={bits: rows[bits] for bits in (4, 8, 32)},
            codecs=(CodecPoint(2, "raw32", None, 32, 32, 0, 0), CodecPoint(2, "klt", 1, 2.5, 2.75, 0.02, 0.001)),
        )

    monkeypatch.setattr(accuracy_measurement, "measure_accuracy", measure)
    return asked


def test_for_plan_prints_the_table_and_where_it_lies(
    planned: list[dict[str, Any]], tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny.checkpoint("llama"))
    command = ["eval", model, "--for-plan", "--cache", str(tmp_path)]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert Path(result["path"]).parent == tmp_path / "accuracy"
    assert (result["layers"], result["activations"], result["codecs"][1]["bits"]) == (4, 0.01, 2.5)
    assert main([*command, "--text", "some.txt", "--tokens", "512"]) == 0
    out = capsys.readouterr().out
    assert result["path"] in out.splitlines()[-1]
    assert ["klt", "1", "2", "2.50", "2.75", "0.02000", "±", "0.00100", "2.02", "%"] in [
        line.split() for line in out.splitlines()
    ]
    assert ["weights", "4", "1.00000", "1.00000", "171.83", "%"] in [line.split() for line in out.splitlines()]
    assert out.split()[:5] == ["layers", "bits", "0–3", "all", "perplexity"]
    assert [asked["tokens"] for asked in planned] == [2048, 512]
    assert [asked["text"] for asked in planned] == [None, "some.txt"]
    assert {asked["model"] for asked in planned} == {model}


def test_for_plan_of_a_bundle_takes_its_checkpoint(
    planned: list[dict[str, Any]], tiny: Any, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from isthmus.export import reference

    bundle = tiny.bundle("llama", split=2)
    for folder in (bundle, bundle / "device"):
        assert main(["eval", str(folder), "--for-plan", "--cache", str(tmp_path)]) == 1
        assert "no reference: this bundle was made from checkpoint-llama" in capsys.readouterr().err
    monkeypatch.setattr(reference, "find_source", lambda source, **options: tmp_path / source.name)
    assert main(["eval", str(bundle), "--for-plan", "--cache", str(tmp_path)]) == 0
    assert [asked["model"] for asked in planned] == [str(tmp_path / "checkpoint-llama")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to measure: give --text FILE, --task NAME or --for-plan"),
        (("--for-plan", "--task", "piqa"), "--task has no meaning with --for-plan"),
        (("--for-plan", "--codec", "klt"), "--codec has no meaning with --for-plan"),
        (("--for-plan", "--window", "9"), "--window has no meaning with --for-plan"),
        (("--for-plan", "--tokens", "9"), "tokens=9: must be at least 256"),
        (("--for-plan", "--text", "missing.txt"), "missing.txt: No such file"),
    ],
)
def test_bad_input_of_for_plan_is_one_line(
    tiny: Any, tmp_path: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny.checkpoint("llama")), *options, "--cache", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]


def test_for_plan_of_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "nowhere", "--for-plan"]) == 1
    assert "not in the catalog" in capsys.readouterr().err
