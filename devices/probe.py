"""Measure this machine: the profile that other devices have from data sheets.

What a call of a graph takes is fitted to ``call_us + kernels * op_us + bytes / rate`` over chains of products of two
shapes for each weight precision, so that a kernel's fixed cost and the rate of its reads are told apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import onnxruntime as ort

from ..errors import ProfileError, RequestError
from .backend import default_threads
from .cores import Processor, cores_by_kind, processors
from .kernels import DECODE_QUERIES, Attention, ModelShape, product_chain, time_products
from .memory import MachineMemory, machine_memory
from .profile import WEIGHT_BITS, DeviceProfile
from .row_rule import row_rule

Progress = Callable[[str, int, int], None]  # what is measured now, measurements done, in all

PREFILL_ROWS = 128
CONTEXT = 2048  # positions of the attention caches
UNCERTAINTY = 0.15  # of times predicted from a probed profile

_WEIGHT_BYTES = 48e6  # of one chain: more than most caches, about the front of a small model
_PREFILL_BYTES = 6e6  # caches do not matter there, and a product of 128 rows takes long
_READ_BYTES = 256e6
_CACHE_BYTES = 32e6  # of keys and values of all layers
_COPIES = 10  # of a chain's weights, while its graph is built and opened; the probe must fit as well
_READS = 5
_MOST_FIXED = 0.95  # of a call's time may be fixed cost: noise must not leave nothing for the rest


def probe(
    name: str = "this-machine",
    *,
    shape: ModelShape | None = None,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> DeviceProfile:
    """Measure this machine with the runtime's own kernels; takes less than a minute on anything but the smallest.

    Args:
        name: of the profile.
        shape: of the model whose products and attention are timed; SmolLM2-135M's by default.
        threads: that the throughput figures are for; the runtime's default by default.
        progress: called before each measurement.

    Raises:
        RequestError: ``threads`` are fewer than one or more than there are processors.
        ProfileError: the system does not tell how much memory it has, or what was measured contradicts itself, as on a
            machine that was suspended meanwhile.
    """
    shape = shape or ModelShape()
    found = processors()
    threads = min(default_threads(), len(found)) if threads is None else threads
    if not 1 <= threads <= len(found):
        raise RequestError(f"threads={threads}: must lie between 1 and {len(found)}, the processors that are for us")
    memory, memory_sources = _memory()
    budget = min(_WEIGHT_BYTES, memory.free_mb * 1e6 / _COPIES)
    steps = _Steps(progress, 1 + 3 * len(WEIGHT_BITS) + 1 + (threads - 1) + 1 + 1)

    with steps("read bandwidth"):
        bandwidth = read_bandwidth(len(found), min(_READ_BYTES, memory.free_mb * 1e6 / 4))

    timings: list[Timing] = []
    prefill: dict[int, float] = {}
    for bits in WEIGHT_BITS:
        large = _fitting((shape.d_model, shape.d_ff), bits, budget, shape.block_size)
        for widths in (_fitting((shape.d_model, shape.d_model), bits, budget, shape.block_size), large):
            with steps(f"decode, {bits} bits"):
                timings.append(_decode(bits, widths, budget, shape.block_size, threads, found))
        with steps(f"prefill, {bits} bits"):
            chain = product_chain(bits, large, min(_PREFILL_BYTES, budget), shape.block_size)
            with _fastest(found, threads):
                prefill[bits] = PREFILL_ROWS * chain.flops / time_products(chain, PREFILL_ROWS, threads)
    with steps("call of a graph"):
        tiny = (shape.block_size, shape.block_size)  # too small to be worth counting, and to be shared among threads
        call_s = _decode(4, tiny, 1, shape.block_size, threads, found).seconds
    op_s, decode = fit_decode(timings, call_s)

    speeds = [0.0] * threads
    four_bit = [timing for timing in timings if timing.bits == 4][-1]
    speeds[-1] = four_bit.bytes / four_bit.seconds
    for count in range(1, threads):
        with steps(f"decode, {count} of {threads} threads"):
            timing = _decode(4, four_bit.widths, budget, shape.block_size, count, found)
            speeds[count - 1] = timing.bytes / timing.seconds

    with steps("attention"), _fastest(found, threads):
        layers = max(1, round(min(_CACHE_BYTES, budget) / (CONTEXT * 2 * shape.kv_heads * shape.head_dim * 4)))
        attention = Attention(shape, layers, CONTEXT, threads)
        fixed = call_s + layers * op_s
        attention_bytes_s, attention_flops_s = attention_rates(attention, fixed)
    with steps("read bandwidth again"):  # what disturbed the first reads may be over
        bandwidth = max(bandwidth, read_bandwidth(len(found), min(_READ_BYTES, memory.free_mb * 1e6 / 4)))
    steps.finish()

    return DeviceProfile(
        name=name,
        title=_title(found),
        total_mb=round(memory.total_mb, 1),
        free_mb=round(memory.free_mb, 1),
        bandwidth_gb_s=_figures(bandwidth / 1e9),
        cores=cores_by_kind(found),
        threads=threads,
        decode_gb_s={bits: _figures(rate / 1e9) for bits, rate in decode.items()},
        prefill_gflops={bits: _figures(rate / 1e9) for bits, rate in prefill.items()},
        attention_gb_s=_figures(attention_bytes_s / 1e9),
        attention_gflops=_figures(attention_flops_s / 1e9),
        op_us=_figures(op_s * 1e6),
        call_us=_figures(call_s * 1e6),
        thread_scaling=tuple(round(speed / speeds[0], 2) for speed in speeds),
        uncertainty=UNCERTAINTY,
        link=None,
        idle_w=None,
        busy_w=None,
        sources=memory_sources | _sources(shape, threads, bandwidth, decode, timings),
    )


def _memory() -> tuple[MachineMemory, dict[str, str]]:
    """The machine's memory, and where the figures come from."""
    memory = machine_memory()
    if memory is not None:
        return memory, {
            "memory.total_mb": "probed: of the machine, or the limit of its container",
            "memory.free_mb": "probed: available to programs at that moment, limits of containers respected",
        }
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (AttributeError, ValueError, OSError):
        raise ProfileError(
            "this system does not tell how much memory it has: copy a similar device's profile and change its figures"
        ) from None
    return MachineMemory(total, total / 2), {
        "memory.total_mb": "probed: of the machine",
        "memory.free_mb": "derived: half of all; this system does not tell what is available",
    }


def _fitting(widths: tuple[int, int], bits: int, budget: float, block_size: int) -> tuple[int, int]:
    """Widths of a pair of products that fits the budget: a large model's are made smaller, in proportion."""
    pair = 2 * widths[0] * widths[1] * (bits / 8 + (4 / block_size if bits < 32 else 0))
    scale = min(1.0, (budget / pair) ** 0.5)
    if scale == 1.0:
        return widths
    first, second = (max(block_size, int(width * scale) // block_size * block_size) for width in widths)
    return first, second


class _Steps:
    """Tells of each measurement as it begins."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self._progress(what, self._done, self._total)
        yield
        self._done += 1

    def finish(self) -> None:
        self._progress("done", self._done, self._total)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a chain of ``count`` products of these widths, ``bytes`` of weights in all."""

    bits: int
    widths: tuple[int, int]
    count: int
    bytes: int
    seconds: float


def _decode(
    bits: int, widths: tuple[int, int], size: float, block_size: int, threads: int, found: list[Processor]
) -> Timing:
    chain = product_chain(bits, widths, size, block_size)
    with _fastest(found, threads):
        seconds = time_products(chain, row_rule([(bits, block_size)]).fill(1), threads)
    return Timing(bits, widths, chain.count, chain.weight_bytes, seconds)


@contextmanager
def _fastest(found: list[Processor], threads: int) -> Iterator[None]:
    """Keep threads that begin inside to the fastest processors, where there are slower ones."""
    if len(cores_by_kind(found)) == 1:
        yield
        return
    os.sched_setaffinity(0, {processor.number for processor in found[:threads]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, {processor.number for processor in found})


def fit_decode(timings: list[Timing], call_s: float) -> tuple[float, dict[int, float]]:
    """Least squares of relative errors over ``seconds = call_s + count * op + bytes / rate[bits]``.

    A kernel's fixed cost is held between zero and `_MOST_FIXED` of any timing, which noise can make it leave.

    Returns:
        Seconds of a kernel, and bytes a second for each precision.
    """
    seconds = np.array([timing.seconds - min(call_s, _MOST_FIXED * timing.seconds) for timing in timings])
    counts = np.array([float(timing.count) for timing in timings])
    columns = [np.array([timing.bytes if timing.bits == bits else 0.0 for timing in timings]) for bits in WEIGHT_BITS]
    scaled = np.stack([counts, *columns], axis=1) / seconds[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    solved = np.linalg.lstsq(scaled / norms, np.ones(len(timings)), rcond=None)[0] / norms
    op_s = float(np.clip(solved[0], 0.0, _MOST_FIXED * np.min(seconds / counts)))
    rest = 1 - counts * op_s / seconds
    rates = {}
    for bits, column in zip(WEIGHT_BITS, scaled.T[1:], strict=True):
        # The inverse rate r of least squares of (bytes * r / seconds - rest).
        rates[bits] = float(np.square(column).sum() / (column * rest).sum())
    return op_s, rates


def attention_rates(attention: Attention, fixed: float) -> tuple[float, float]:
    """Bytes a second of decode, and operations a second of a prefill's chunk in the middle of the context.

    The kernel gets slower in bytes a second as the context grows; the figure is the one of least relative error over
    an eighth to the whole of `CONTEXT`.

    Args:
        attention: of all layers.
        fixed: seconds of the call that are not attention's own.
    """
    lengths = np.array([CONTEXT // 8, CONTEXT // 4, CONTEXT // 2, CONTEXT])
    seconds = np.array([attention.seconds(DECODE_QUERIES, int(length)) for length in lengths])
    relative = lengths / (seconds - np.minimum(fixed, _MOST_FIXED * seconds))
    flops = attention.flops(PREFILL_ROWS, CONTEXT // 2)
    spent = attention.seconds(PREFILL_ROWS, CONTEXT // 2)
    # The inverse rate r of least squares of (length * r / seconds - 1).
    inverse = float(relative.sum() / np.square(relative).sum())
    return attention.position_bytes / inverse, flops / (spent - min(fixed, _MOST_FIXED * spent))


def read_bandwidth(threads: int, size: float) -> float:
    """Bytes a second of sequential reads from memory, by so many threads together: the best of a few passes."""
    parts = np.array_split(np.ones(int(size) // 8, np.int64), threads)
    fastest = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_READS):
            started = perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            fastest = min(fastest, perf_counter() - started)
    return sum(part.nbytes for part in parts) / fastest


def busy_processors() -> float:
    """How many processors other programs kept busy over the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _title(found: list[Processor]) -> str:
    return ", ".join(f"{cores.count} × {cores.kind}" for cores in cores_by_kind(found))


def _figures(number: float) -> float:
    """Rounded to four significant digits: more would say nothing."""
    return float(f"{number:.4g}")


def _sources(
    shape: ModelShape, threads: int, bandwidth: float, decode: dict[int, float], timings: list[Timing]
) -> dict[str, str]:
    what = f"onnxruntime {ort.__version__}, {threads} threads"
    heads = f"{shape.heads} query and {shape.kv_heads} key heads of {shape.head_dim}"

    def chains(bits: int) -> str:
        small, large = (timing for timing in timings if timing.bits == bits)
        products = " and ".join(f"{timing.widths[0]} × {timing.widths[1]}" for timing in (small, large))
        return f"{what}, chains of {products} products, {large.bytes / 1e6:.0f} MB of weights, one row"

    return {
        "memory.bandwidth_gb_s": "probed: sequential reads by one thread for each processor",
        "cores": "probed: as the system describes them",
        **{
            f"compute.decode_gb_s.{bits}": f"probed: {chains(bits)}"
            + (", partly from the cache if no other program disturbed the reads" if rate > bandwidth else "")
            for bits, rate in decode.items()
        },
        "compute.prefill_gflops": f"probed: {what}, the larger products with {PREFILL_ROWS} rows",
        "compute.attention_gb_s": f"probed: {what}, {heads}, fit over {CONTEXT // 8} to {CONTEXT} positions",
        "compute.attention_gflops": f"probed: {what}, {heads}, {PREFILL_ROWS} queries that end at {CONTEXT // 2}",
        "compute.op_us": "probed: fit over all chains of one row",
        "compute.call_us": f"probed: {what}, a call of a graph whose products are too small to count",
        "compute.thread_scaling": f"probed: {what}, 4-bit products, on the fastest cores first",
    }
