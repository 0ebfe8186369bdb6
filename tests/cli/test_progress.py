"""Progress where stderr is no terminal."""

from isthmus.cli import progress as module


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    with module.progress_bar() as progress:
        for done, at in ((1, 101.0), (2, 129.0), (3, 131.0), (4, 140.0), (5, 161.5)):
            now[0] = at
            progress("segments", done, 9)
    assert capsys.readouterr().err == "segments: 3 of 9\nsegments: 5 of 9\n"
