"""The planner against its own rules: brute force over what it enumerates, limits, relaxations, monotony."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from isthmus.cli.main import main
from isthmus.devices.link import link_profile
from isthmus.devices.profile import load_profile
from isthmus.errors import PlanError
from isthmus.export.accuracy import AccuracyTable, CodecPoint, accuracy_path
from isthmus.export.checkpoint import open_checkpoint
from isthmus.export.costs import Costs
from isthmus.export.draft_costs import DRAFT_LENGTHS, DraftFigures, Wait
from isthmus.export.grid import Grid
from isthmus.export.limits import Limits
from isthmus.export.plan import read_plan
from isthmus.export.planner import export_options, make_plan, search
from isthmus.runtime.bundle import Architecture, open_bundle
from isthmus.runtime.server.server import BackServer
from isthmus.runtime.wire.framing import step_message
from isthmus.runtime.wire.security import ServerSecurity

LAYERS = 6
ARCH = Architecture("llama", LAYERS, 576, 9, 3, 64, 1536, 49152, 1e-5, 1e4, 8192, tied_embeddings=True)
COST = {2: 0.05, 4: 0.004, 8: 0.0001, 16: 0.0, 32: 0.0}


def accuracy_table(layers: int = LAYERS, hashes: dict[str, str] | None = None) -> AccuracyTable:
    codecs = [("raw32", None, 32.0, 0.0), ("raw16", None, 16.0, 0.001)]
    codecs += [("klt", level, bits, kl) for level, (bits, kl) in enumerate([(4, 0.004), (2, 0.02), (1, 0.1)])]
    return AccuracyTable(
        model="model",
        hashes=hashes or {"model.gguf": "0" * 64},
        layers=layers,
        tokens=1000,
        text="a text",
        activations=0.003,
        weights={bits: (cost,) * layers for bits, cost in COST.items()},
        weights_se=dict.fromkeys(COST, 0.1),
        embed=dict.fromkeys((8, 16, 32), 0.0),
        head=dict.fromkeys((8, 16, 32), 0.0),
        kv={32: (0.0,) * layers, 8: (0.0002,) * layers, 4: (0.005,) * layers},
        codecs=tuple(
            CodecPoint(split, codec, level, bits, bits, kl, kl / 20)
            for split in (1, layers - 1)
            for codec, level, bits, kl in codecs
        ),
    )


def grid(device="raspberry-pi-4", link="wifi", server="cpu-server", **limits) -> Grid:
    back = load_profile(server) if server else None
    options = {"max_drop": 20.0} | limits
    return Grid(ARCH, accuracy_table(), load_profile(device), link_profile(link), back, Limits(**options))


@pytest.fixture(scope="module")
def everything():
    return grid().candidates()


def test_every_mode_and_precision_is_looked_at(everything):
    assert {candidate.mode for candidate in everything} == {"device-only", "split", "server-only", "hand-over"}
    splits = {(c.split, c.front_bits, c.back_bits) for c in everything if c.mode == "split"}
    pairs = [(front, back) for front, back in itertools.product(COST, COST) if front <= back]
    assert splits == {(split, *pair) for split in range(1, LAYERS) for pair in pairs}


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"memory_mb": 150.0},
        {"deadline_ms": 20.0},
        {"max_drop": 1.0, "memory_mb": 200.0},
        {"first_token_ms": 200.0, "max_drop": 3.0},
    ],
)
def test_the_chosen_one_keeps_all_limits_and_none_that_does_is_clearly_faster(limits):
    machine = grid(**limits)
    report = search(machine)
    assert report.chosen is not None
    assert machine.feasible(report.chosen)
    fastest = min(c.ms_per_token for c in machine.candidates() if machine.feasible(c))
    assert report.chosen.ms_per_token <= 1.03 * fastest
    for value, limit in report.slack.values():
        assert value <= limit


def test_what_would_have_to_change_is_enough_and_necessary():
    limits = {"memory_mb": 120.0, "max_drop": 0.5, "deadline_ms": 3.0}
    report = search(grid(link="nb-iot", **limits))
    assert report.chosen is None
    assert set(report.relaxations) >= {"memory_mb", "deadline_ms", "max_drop"}
    for name, value in report.relaxations.items():
        if value is not None and name in limits:
            assert search(grid(link="nb-iot", **limits | {name: value * 1.0001})).chosen is not None
            assert search(grid(link="nb-iot", **limits | {name: value * 0.999})).chosen is None


def test_a_slower_link_takes_longer_and_more_sessions_slow_the_server(everything):
    def time_of(candidates, mode):
        return min(c.ms_per_token for c in candidates if c.mode == mode)

    slow = grid(link="rtt=200ms,rate=100kbit").candidates()
    assert time_of(slow, "split") > time_of(everything, "split") + 100
    assert time_of(slow, "device-only") == time_of(everything, "device-only")
    assert time_of(grid(sessions=16).candidates(), "server-only") > 2 * time_of(everything, "server-only")


def test_fewer_bits_take_less_memory_and_lose_more(everything):
    by_bits = {c.front_bits: c for c in everything if c.mode == "device-only" and c.kv_bits == 32}
    memories = [by_bits[bits].memory_mb for bits in sorted(by_bits)]
    drops = [by_bits[bits].drop for bits in sorted(by_bits)]
    assert memories == sorted(memories)
    assert drops == sorted(drops, reverse=True)


def test_a_candidate_s_drop_is_the_table_s(everything):
    candidate = next(c for c in everything if c.mode == "split" and c.codec == "klt" and c.kv_bits == 8)
    kl, _ = accuracy_table().drop(
        split=candidate.split,
        front_bits=candidate.front_bits,
        back_bits=candidate.back_bits,
        front_kv_bits=8,
        codec="klt",
        level=candidate.level,
    )
    from isthmus.export.accuracy import drop_percent

    assert candidate.drop == pytest.approx(drop_percent(kl))


def test_the_parts_of_a_token_s_time_are_its_time():
    machine = grid()
    for mode in ("device-only", "split", "server-only"):
        candidate = next(c for c in machine.candidates() if c.mode == mode)
        assert sum(machine.time_parts(candidate).values()) == pytest.approx(candidate.ms_per_token)


def test_a_hand_over_needs_the_memory_of_all_layers_and_its_worst_token_waits_for_the_move(everything):
    moved = next(c for c in everything if c.mode == "hand-over")
    split = next(
        c
        for c in everything
        if c.mode == "split"
        and all(
            getattr(c, name) == getattr(moved, name) for name in ("split", "front_bits", "back_bits", "codec", "level")
        )
    )
    assert moved.memory_mb > split.memory_mb
    assert moved.worst_ms > moved.ms_per_token


@pytest.mark.parametrize("payload", [2, 100, 108, 127, 330, 2304, 20000])
@pytest.mark.parametrize(
    ("context", "prompt", "tokens"), [(100, 50, 1), (512, 464, 1), (2048, 512, 1), (2048, 100, 128)]
)
def test_a_steps_bytes_are_those_of_its_message(payload, context, prompt, tokens):
    device, limits = load_profile("raspberry-pi-4"), Limits(context=context, prompt_tokens=prompt)
    costs = Costs(ARCH, accuracy_table(), device, link_profile("wifi"), None, limits)
    message = step_message(context - prompt, context, tokens, True, bytes(payload))
    assert costs.step_bytes(payload, tokens=tokens) == len(message)


def test_sending_token_ids_costs_what_a_step_of_them_does_and_needs_no_weights(everything):
    candidates = [c for c in everything if c.mode == "server-only"]
    assert {(c.split, c.codec, c.level, c.bytes_per_token) for c in candidates} == {(0, "ids", -1, 23)}
    one = min(c.memory_mb for c in everything if c.mode == "split")
    assert all(c.memory_mb < one for c in candidates)


WAIT = Wait(drafts=10, wrong=4.0, gap=1.5, acceptance=(0.5, 0.7, 0.8))
DRAFT = DraftFigures(d_ff=1024, vocabulary=4608, waits=(WAIT,))


@pytest.fixture(scope="module")
def drafting() -> Grid:
    """With a draft for split 3."""
    return dataclasses.replace(grid(device="raspberry-pi-5", link="lte"), drafts={3: DRAFT})


def test_cuts_with_a_draft_are_planned_with_every_length_and_others_with_none(drafting):
    candidates = drafting.candidates()
    assert {c.draft_length for c in candidates if c.mode == "split" and c.split == 3} == {0, *DRAFT_LENGTHS}
    others = [c for c in candidates if c.mode != "split" or c.split != 3 or c.front_bits < 4]
    assert {c.draft_length for c in others} == {0}
    undrafted = dataclasses.replace(drafting, drafts={}).candidates()
    assert sorted(map(repr, undrafted)) == sorted(repr(c) for c in candidates if not c.draft_length)


def test_a_draft_costs_memory_and_bytes_and_no_accuracy(drafting):
    same = {"mode": "split", "split": 3, "front_bits": 4, "back_bits": 8, "kv_bits": 8, "codec": "klt", "level": 1}
    found = {
        c.draft_length: c
        for c in drafting.candidates()
        if all(getattr(c, name) == value for name, value in same.items())
    }
    plain, drafted = found[0], found[4]
    # 2.2 million weights of the layer in 8 bits and 2.7 million of the head in 4; cache and states of 1024 positions.
    assert drafted.memory_mb - plain.memory_mb == pytest.approx(3 + 2.8 + 1.7 + 3.9, abs=1.5)
    assert drafted.bytes_per_token > plain.bytes_per_token * 0.99
    assert (drafted.drop, drafted.drop_se, drafted.ttft_ms) == (plain.drop, plain.drop_se, plain.ttft_ms)
    assert drafted.ms_per_token < plain.ms_per_token < drafted.worst_ms


def test_the_parts_of_a_drafted_token_s_time_are_its_time(drafting):
    candidate = next(c for c in drafting.candidates() if c.draft_length == 4)
    parts = drafting.time_parts(candidate)
    assert sum(parts.values()) == pytest.approx(candidate.ms_per_token)
    assert min(parts.values()) >= 0


def test_the_chosen_one_is_still_the_fastest_that_fits(drafting):
    report = search(drafting)
    fitting = [c for c in drafting.candidates() if drafting.feasible(c)]
    assert report.chosen.ms_per_token <= 1.03 * min(c.ms_per_token for c in fitting)


def test_without_a_server_only_the_device_is_planned():
    assert {c.mode for c in grid(server=None).candidates()} == {"device-only"}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"memory_mb": 50.0}, "interpreter"),
        ({"max_drop": -1.0}, "max_drop=-1"),
        ({"deadline_ms": 0.0}, "deadline_ms=0"),
        ({"context": 100, "prompt_tokens": 100}, "prompt of 100"),
        ({"context": 10000}, "8192 positions"),
        ({"sessions": 0}, "sessions=0"),
    ],
)
def test_limits_that_nothing_can_keep_are_errors(limits, message):
    with pytest.raises(PlanError, match=message):
        grid(**limits)


def test_modes_that_do_not_exist_or_need_a_server_are_errors():
    with pytest.raises(PlanError, match="must be some of"):
        dataclasses.replace(grid(), modes=("sideways",))
    with pytest.raises(PlanError, match="need a server"):
        dataclasses.replace(grid(server=None), modes=("split",))


@pytest.fixture
def measured(tiny, tmp_path):
    """A checkpoint, and a cache that holds its accuracy table."""
    path = tiny.checkpoint()
    hashes = open_checkpoint(path).file_hashes()
    accuracy_table(4, hashes).save(accuracy_path(hashes, tmp_path))
    return str(path), tmp_path


LIMITS = Limits(context=64, prompt_tokens=8, max_drop=50.0)


def test_a_plan_file_says_what_to_export_and_the_bundle_follows_it(measured, tmp_path, capsys):
    model, cache = measured
    path = tmp_path / "plan.toml"
    common = ["--device", "raspberry-pi-4", "--server", "cpu-server", "--link", "wifi", "--cache", str(cache)]
    common += ["--context", "64", "--prompt-tokens", "8", "--max-drop", "50%"]
    assert main(["plan", model, *common, "--mode", "split", "-o", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["chosen"]["mode"] == "split"
    assert set(printed) >= {"chosen", "candidates", "constraints", "relaxations"}
    plan = read_plan(path)
    assert plan.chosen.to_dict() == printed["chosen"]
    assert main(["export", model, "-o", str(tmp_path / "out"), "--plan", str(path), "--calibration-tokens", "0"]) == 0
    manifest = open_bundle(tmp_path / "out" / "device").manifest
    assert (manifest.split, manifest.front_bits, manifest.max_length) == (plan.chosen.split, plan.chosen.front_bits, 64)
    plan.check_bundle(manifest)
    with pytest.raises(PlanError, match=f"this bundle {manifest.split + 1}"):
        plan.check_bundle(dataclasses.replace(manifest, split=manifest.split + 1))


def test_generate_follows_a_plan_and_refuses_another_bundle_s(measured, tiny, tmp_path, capsys):
    model, cache = measured
    path = tmp_path / "plan.toml"
    planned = make_plan(model, "raspberry-pi-4", "wifi", limits=LIMITS, cache=cache)
    planned.plan.write(path)
    options = export_options(path, model)
    bits = options["front_bits"]
    folder = tmp_path / "out"
    assert main(["export", model, "-o", str(folder), "--plan", str(path), "--calibration-tokens", "0"]) == 0
    capsys.readouterr()
    assert main(["generate", str(folder / "device"), "-p", "x", "-n", "4", "--plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] <= 4
    other = tiny.bundle(bits=8 if bits != 8 else 4)
    assert main(["generate", str(other / "device"), "-p", "x", "--plan", str(path)]) == 1
    assert "this bundle" in capsys.readouterr().err


def test_a_planned_hand_over_keeps_all_layers_on_the_device(measured, tmp_path, capsys):
    model, cache = measured
    path = tmp_path / "plan.toml"
    planned = make_plan(
        model, "raspberry-pi-4", "wifi", server="cpu-server", limits=LIMITS, modes=("hand-over",), cache=cache
    )
    planned.plan.write(path)
    assert export_options(path, model)["device_layers"] == "all"
    folder = tmp_path / "out"
    assert main(["export", model, "-o", str(folder), "--plan", str(path), "--calibration-tokens", "0"]) == 0
    capsys.readouterr()
    command = ["generate", str(folder / "device"), "--prompt-ids", "1,2,3,4,5,6,7,8", "-n", "40", "--json"]
    with BackServer.from_bundle(folder / "server", security=ServerSecurity(insecure=True)) as server:
        assert main([*command, "--server", server.address, "--insecure", "--codec", "raw16", "--plan", str(path)]) == 0
    result = json.loads(capsys.readouterr().out)
    if result["new_tokens"] + 8 > planned.plan.chosen.hand_over_at:
        assert [move["to"] for move in result["moves"]] == ["server"]


def test_a_plan_to_send_token_ids_is_exported_and_followed(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    model, cache = measured
    path, folder = tmp_path / "plan.toml", tmp_path / "out"
    command = ["plan", model, "--device", "raspberry-pi-4", "--server", "cpu-server", "--link", "wifi"]
    command += ["--cache", str(cache), "--context", "64", "--prompt-tokens", "8", "--max-drop", "50%"]
    assert main([*command, "--deadline", "1s", "--mode", "server-only", "-o", str(path)]) == 0
    assert "isthmus export --plan FILE" in capsys.readouterr().out
    assert export_options(path, model)["split"] == 0
    assert main(["export", model, "-o", str(folder), "--plan", str(path)]) == 0
    read_plan(path).check_bundle(open_bundle(folder / "device").manifest)
    capsys.readouterr()
    with BackServer.from_bundle(folder / "server", security=ServerSecurity(insecure=True)) as server:
        reached = ["--server", server.address, "--insecure", "--plan", str(path)]
        assert main(["generate", str(folder / "device"), "-p", "x", "-n", "4", *reached, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["codec"] == "ids"
    assert result["deadline_ms"] is None  # there is no level to keep it with


def test_a_plan_for_another_model_is_refused(measured, tiny, tmp_path):
    model, cache = measured
    path = tmp_path / "plan.toml"
    make_plan(model, "raspberry-pi-4", "wifi", limits=LIMITS, cache=cache).plan.write(path)
    with pytest.raises(PlanError, match="run `isthmus plan"):
        export_options(path, str(tiny.checkpoint("llama-untied")))


def test_an_option_that_contradicts_the_plan_is_refused(measured, tmp_path, capsys):
    model, cache = measured
    path = tmp_path / "plan.toml"
    make_plan(model, "raspberry-pi-4", "wifi", limits=LIMITS, cache=cache).plan.write(path)
    assert main(["export", model, "-o", str(tmp_path / "out"), "--plan", str(path), "--front-bits", "8"]) == 1
    assert "--front-bits and --plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("isthmus_plan = 1", "isthmus_plan = 9"),
        ('mode = "device-only"', 'mode = "sideways"'),
        ("split = 4", 'split = "four"'),
        ("split = 4", "splitt = 4"),
        ("[for]", "[four]"),
        ("[plan]", "[plan"),
    ],
)
def test_a_damaged_plan_is_a_clear_error(measured, tmp_path, old, new):
    model, cache = measured
    path = tmp_path / "plan.toml"
    make_plan(model, "raspberry-pi-4", "wifi", limits=LIMITS, cache=cache).plan.write(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(PlanError, match=r"plan"):
        read_plan(path)


def test_a_model_without_a_table_says_how_to_measure_one(tiny, tmp_path):
    with pytest.raises(PlanError, match="--for-plan"):
        make_plan(str(tiny.checkpoint()), "raspberry-pi-4", "wifi", cache=tmp_path)


def test_if_nothing_fits_the_command_says_what_would(measured, capsys):
    model, cache = measured
    arguments = ["plan", model, "--device", "raspberry-pi-4", "--link", "wifi", "--cache", str(cache)]
    arguments += ["--context", "64", "--prompt-tokens", "8"]
    assert main([*arguments, "--memory", "102MB"]) == 1
    assert "it would have to be" in capsys.readouterr().out
    assert main([*arguments, "--memory", "110"]) == 1
    assert "with its unit" in capsys.readouterr().err
    assert main([*arguments, "--max-drop", "much"]) == 1
    assert "percent" in capsys.readouterr().err


def test_the_picture_is_drawn(measured, tmp_path, capsys):
    model, cache = measured
    path = tmp_path / "plan.png"
    arguments = ["plan", model, "--device", "raspberry-pi-4", "--link", "wifi", "--server", "cpu-server"]
    arguments += ["--cache", str(cache), "--context", "64", "--prompt-tokens", "8", "--max-drop", "50"]
    assert main([*arguments, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
