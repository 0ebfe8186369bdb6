"""The probe: the fit finds costs that were put in, and a whole run gives a profile that holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.devices import kernels
from isthmus.devices import probe as module
from isthmus.devices.kernels import ModelShape
from isthmus.devices.probe import Timing, attention_rates, fit_decode, probe, read_bandwidth
from isthmus.devices.profile import WEIGHT_BITS, load_profile, write_profile
from isthmus.errors import ProfileError

RATES = {2: 5e9, 4: 16e9, 8: 19e9, 32: 25e9}
CALL_S = 5e-6


def timings(op_s: float, noise: float = 0.0) -> list[Timing]:
    made = []
    for index, (bits, rate) in enumerate(RATES.items()):
        for count, size in ((232, 48e6), (86, 48e6)):
            wrong = 1 + noise * (-1) ** index
            made.append(Timing(bits, (count, 1), count, int(size), (CALL_S + count * op_s + size / rate) * wrong))
    return made


@pytest.mark.parametrize("op_s", [0.0, 3e-6, 40e-6])
def test_the_fit_tells_the_cost_of_a_kernel_from_the_rate(op_s: float) -> None:
    found, rates = fit_decode(timings(op_s), CALL_S)
    assert found == pytest.approx(op_s, abs=1e-9)
    assert rates == pytest.approx(RATES, rel=1e-3)


def test_a_little_noise_moves_the_fit_a_little() -> None:
    found, rates = fit_decode(timings(10e-6, noise=0.03), CALL_S)
    assert found == pytest.approx(10e-6, rel=0.3)
    assert rates == pytest.approx(RATES, rel=0.1)


def test_a_kernel_never_costs_less_than_nothing() -> None:
    found, rates = fit_decode(timings(-3e-6), CALL_S)
    assert found == 0
    assert all(rate > 0 for rate in rates.values())


class FakeAttention:
    """Whose time grows with the length at a known rate."""

    position_bytes = 1000

    def seconds(self, queries: int, length: int) -> float:
        return 1e-4 + (self.flops(queries, length) / 20e9 if queries > 2 else length * self.position_bytes / 5e9)

    def flops(self, queries: int, length: int) -> int:
        return 1000 * queries * length


def test_attention_s_rates_leave_the_fixed_cost_out() -> None:
    bytes_s, flops_s = attention_rates(FakeAttention(), 1e-4)  # type: ignore[arg-type]
    assert bytes_s == pytest.approx(5e9)
    assert flops_s == pytest.approx(20e9)


def test_reading_takes_time_however_many_threads() -> None:
    assert 1e6 < read_bandwidth(1, 1e6) < 1e13
    assert 1e6 < read_bandwidth(3, 1e6) < 1e13


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is run, but small and briefly."""
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    for name in ("_WEIGHT_BYTES", "_PREFILL_BYTES", "_CACHE_BYTES", "_READ_BYTES"):
        monkeypatch.setattr(module, name, 1e5)


def test_a_run_gives_a_profile_that_is_written_and_read_back(quick: None, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    shape = ModelShape(d_model=64, d_ff=96, heads=4, kv_heads=2, head_dim=16)
    profile = probe("here", shape=shape, threads=1, progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert seen[-1][1] == seen[-1][2]
    assert profile.name == "here"
    assert (profile.threads, profile.thread_scaling) == (1, (1.0,))
    assert set(profile.decode_gb_s) == set(WEIGHT_BITS)
    assert all(source.startswith("probed: ") for source in profile.sources.values())
    write_profile(profile, tmp_path / "here.toml")
    assert load_profile(tmp_path / "here.toml") == profile


def test_every_thread_count_is_timed_on_the_fastest_processors(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.devices.cores import Processor

    pinned: list[set[int]] = []
    found = [Processor(5, "big", 2.5), Processor(6, "big", 2.5), Processor(1, "small", 1.8)]
    monkeypatch.setattr(module, "processors", lambda: found)
    monkeypatch.setattr(module.os, "sched_setaffinity", lambda pid, numbers: pinned.append(set(numbers)), raising=False)
    shape = ModelShape(d_model=64, d_ff=96, heads=4, kv_heads=2, head_dim=16)
    profile = probe(shape=shape, threads=3)
    assert [(cores.kind, cores.count) for cores in profile.cores] == [("big", 2), ("small", 1)]
    assert len(profile.thread_scaling) == 3
    assert {5} in pinned
    assert {5, 6} in pinned
    assert pinned[-1] == {5, 6, 1}


@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (32, 32), (8, 128)])
def test_a_large_model_s_products_are_made_to_fit(bits: int, block_size: int) -> None:
    budget = 48e6
    first, second = module._fitting((4096, 14336), bits, budget, block_size)
    chain = kernels.product_chain(bits, (first, second), 1, block_size)
    assert 0.8 * budget < chain.weight_bytes <= budget
    assert second / first == pytest.approx(14336 / 4096, rel=0.1)
    assert module._fitting((576, 1536), bits, budget, block_size) == (576, 1536)


def test_where_the_kernel_does_not_tell_half_of_all_memory_counts_as_free(quick: None, monkeypatch) -> None:
    monkeypatch.setattr(module, "machine_memory", lambda: None)
    profile = probe(shape=ModelShape(d_model=64, d_ff=96, heads=4, kv_heads=2, head_dim=16), threads=1)
    assert profile.free_mb == pytest.approx(profile.total_mb / 2, abs=0.1)
    assert profile.source("memory.free_mb").startswith("derived: half")


def test_a_system_that_tells_nothing_of_its_memory_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "machine_memory", lambda: None)
    monkeypatch.delattr(module.os, "sysconf", raising=False)
    with pytest.raises(ProfileError, match="does not tell how much memory"):
        probe()
