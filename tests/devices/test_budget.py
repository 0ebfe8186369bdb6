import pytest

from isthmus.devices.budget import MemoryNeeds, StoredWeight, estimate_memory, parse_megabytes
from isthmus.errors import MemoryLimitError, RequestError

WEIGHT = StoredWeight(bits=8, block_size=32, bytes=36_000_000)
NEEDS = {"kv_bytes": 5_000_000, "positions": 512, "chunk": 128, "d_model": 576, "d_ff": 1536, "qkv_width": 960}


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (StoredWeight(4, 32, 20), 24),  # 16 bytes of codes, a scale, a sum
        (StoredWeight(8, 32, 36), 40),
        (StoredWeight(2, 64, 20), 24),
        (StoredWeight(32, 0, 400), 400),
        (StoredWeight(16, 0, 200), 400),  # computed in float32
    ],
)
def test_a_weight_is_packed_with_a_scale_and_a_sum_a_block(weight, expected):
    assert weight.prepacked_bytes == expected


def test_every_part_counts_and_the_sum_is_theirs():
    estimate = estimate_memory(MemoryNeeds(graphs=((WEIGHT,),), **NEEDS))
    assert estimate.total_mb == sum(estimate.parts.values())
    assert estimate.parts["weights, packed"] == pytest.approx(40.0)
    assert estimate.parts["KV cache, 512 positions"] == pytest.approx(5.0)
    assert estimate.evictable_mb == 0


def test_installed_weights_are_evictable():
    estimate = estimate_memory(MemoryNeeds(graphs=((WEIGHT,),), installed=True, **NEEDS))
    assert estimate.evictable_mb == pytest.approx(40.0)


def test_a_weight_larger_than_what_runs_later_sets_the_peak_while_it_is_packed():
    huge = StoredWeight(32, 0, 500_000_000)
    assert "largest weight while loading" in estimate_memory(MemoryNeeds(graphs=((huge,),), **NEEDS)).parts
    small = StoredWeight(32, 0, 500_000)
    assert "largest weight while loading" not in estimate_memory(MemoryNeeds(graphs=((small,),), **NEEDS)).parts


def test_what_does_not_fit_is_refused_with_the_parts():
    estimate = estimate_memory(MemoryNeeds(graphs=((WEIGHT,),), **NEEDS))
    estimate.check(estimate.total_mb + 1, "")
    with pytest.raises(MemoryLimitError, match=r"memory limit 100 MB: this needs \d+ MB; buy more\n") as caught:
        estimate.check(100, "buy more")
    assert "weights, packed" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "megabytes"), [("300MB", 300), ("1.5 GB", 1500), ("512MiB", 536.870912), ("900kB", 0.9)]
)
def test_sizes_carry_their_unit(text, megabytes):
    assert parse_megabytes(text) == pytest.approx(megabytes)


@pytest.mark.parametrize("text", ["300", "MB", "-3MB", "0MB", "3 parsecs", "nanMB", ""])
def test_a_size_without_number_or_unit_is_refused(text):
    with pytest.raises(RequestError, match="300MB"):
        parse_megabytes(text)
