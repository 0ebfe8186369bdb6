"""What a bundle half takes of a machine's memory, before anything of it is loaded."""

from __future__ import annotations

import math

from ..devices.budget import STEP_BYTES, MemoryEstimate, MemoryNeeds, StoredWeight, estimate_memory
from ..devices.memory import machine_memory, process_memory
from ..quant.ids import Ids
from .bundle import Bundle, TensorRecord
from .draft_bundle import Draft

CODEC_TABLES = ("klt-tables.npz", "tabq-rans.npz")
UNPACKED_TABLES = 3  # a codec's tables in memory, by the bytes of their file
_BYTES_PER_VALUE = {"raw32": 4, "raw16": 2}  # that a codec sends; the others less than one

LIBRARY_MB = 20.0  # of onnxruntime's and gRPC's code that is read only when they run


def kept_bytes(codec: str, d_model: int) -> int:
    """What the journal of sent steps (`isthmus.runtime.edge.journal`) takes for one position at most."""
    return STEP_BYTES + (4 if codec == Ids.name else _BYTES_PER_VALUE.get(codec, 1) * d_model)


def half_memory(
    bundle: Bundle,
    positions: int,
    *,
    chunk: int,
    process_mb: float | None = None,
    draft: Draft | None = None,
    kept_bytes: int = 0,
) -> MemoryEstimate:
    """Estimate the peak of a process with a bundle half and one session.

    Args:
        bundle: the half.
        positions: of the session: prompt and new tokens.
        chunk: most tokens of one step.
        draft: that is opened with it.
        kept_bytes: of each position, that are kept to make the session again, see `kept_bytes`.
        process_mb: resident before anything is loaded, libraries included; by default what this process has.
    """
    if process_mb is None:
        process_mb = (process_memory().resident_mb or 0.0) + LIBRARY_MB
    arch = bundle.manifest.architecture
    halves = bundle.with_own_back()  # the copy is opened when the server is lost
    if draft is not None:
        halves = (*halves, draft.bundle)
    graphs = [segment for half in halves for segment in half.segments() if segment.graph_file]
    sizes = {file.name: file.bytes for file in bundle.manifest.files[bundle.half]}
    needs = MemoryNeeds(
        graphs=tuple(tuple(map(_stored, segment.tensors.values())) for segment in graphs),
        kv_bytes=sum(
            half.kv.cache_bytes(half.manifest.half_layers(half.half), positions)
            for half in halves
            if half.segments("block")
        )
        # Hidden states at the split: for a hand-over, or until the draft has run over them, or for a server again.
        + (4 * arch.d_model * positions if len(halves) > 1 else 0),
        positions=positions,
        chunk=chunk,
        d_model=arch.d_model,
        d_ff=arch.d_ff,
        qkv_width=(arch.heads + 2 * arch.kv_heads) * arch.head_dim,
        vocab_size=arch.vocab_size if any(segment.kind == "head" for segment in graphs) else 0,
        tokenizer_size=arch.vocab_size if bundle.half == "device" else 0,
        tables_bytes=UNPACKED_TABLES * sum(sizes.get(name, 0) for name in CODEC_TABLES),
        journal_bytes=kept_bytes * positions,
        installed=bundle.installed,
    )
    return estimate_memory(needs, process_mb=process_mb)


def process_limit_mb(limit_mb: float | None) -> float:
    """Most resident memory that this process may come to: what is given, or what the machine or its container has."""
    if limit_mb is not None:
        return limit_mb
    available = machine_memory()
    return math.inf if available is None else available.free_mb + (process_memory().resident_mb or 0.0)


def check_session(
    bundle: Bundle, positions: int, *, chunk: int, limit_mb: float, draft: Draft | None = None, kept_bytes: int = 0
) -> None:
    """Refuse a bundle half that would not fit into this process with a session of so many positions, see `half_memory`.

    Raises:
        MemoryLimitError: with the parts, and the longest session that would fit.
    """
    estimate = half_memory(bundle, positions, chunk=chunk, draft=draft, kept_bytes=kept_bytes)
    if estimate.total_mb <= limit_mb:
        return
    fitting = longest_context(bundle, chunk=chunk, limit_mb=limit_mb, draft=draft, kept_bytes=kept_bytes)
    if fitting:
        remedy = f"a context of {fitting} positions would fit"
    elif bundle.installed:
        remedy = "not even an empty context fits: choose a smaller split, fewer bits or a larger limit"
    else:
        remedy = "choose a smaller split or fewer bits; `isthmus install` makes packed weights evictable"
    estimate.check(limit_mb, remedy)


def kv_budget(bundle: Bundle, *, chunk: int, limit_mb: float) -> float:
    """Bytes that all sessions' KV caches together may take of a server's memory.

    Raises:
        MemoryLimitError: not even one session of full length fits.
    """
    longest = bundle.manifest.max_length
    check_session(bundle, longest, chunk=chunk, limit_mb=limit_mb)
    needs = half_memory(bundle, longest, chunk=chunk)
    one = bundle.kv.cache_bytes(bundle.manifest.half_layers(bundle.half), longest)
    return one + (limit_mb - needs.total_mb) * 1e6


def longest_context(
    bundle: Bundle,
    *,
    chunk: int,
    limit_mb: float,
    process_mb: float | None = None,
    draft: Draft | None = None,
    kept_bytes: int = 0,
) -> int:
    """Most positions, up to the bundle's, with which a half fits under a limit, see `half_memory`; 0 if none do."""

    def needed_mb(positions: int) -> float:
        estimate = half_memory(
            bundle, positions, chunk=chunk, process_mb=process_mb, draft=draft, kept_bytes=kept_bytes
        )
        return estimate.total_mb

    fits, too_many = 0, bundle.manifest.max_length + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if needed_mb(middle) <= limit_mb:
            fits = middle
        else:
            too_many = middle
    return fits


def _stored(record: TensorRecord) -> StoredWeight:
    return StoredWeight(record.bits, record.block_size, record.bytes, record.symmetric)
