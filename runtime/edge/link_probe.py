"""The link to a server, measured by the frames that a generation would send."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from ...errors import RequestError
from ...quant.codec import Raw32
from ..bundle import Bundle
from ..sampling import Sampling
from ..wire.security import ChannelSecurity
from .generate import StepReport
from .link import RemoteBack

_ROUND_TRIPS = 10
_LONG_ENOUGH_S = 0.5  # a transfer; shorter ones are repeated with a larger frame
_LARGEST_FRAME = 2_000_000  # bytes


@dataclass(frozen=True)
class LinkMeasurement:
    """One server's link as this device sees it, the server's own work taken out.

    What comes back is a few bytes whatever is sent, so there is no figure for the way down.

    Attributes:
        server: ``HOST:PORT``.
        round_trip_ms: median of steps with one token.
        up_mbit_s: throughput of the largest frame that was sent.
        frame_bytes: its size.
    """

    server: str
    round_trip_ms: float
    up_mbit_s: float
    frame_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The form that ``isthmus devices probe --json`` prints."""
        return asdict(self)


def measure_link(bundle: Bundle, server: str, security: ChannelSecurity) -> LinkMeasurement:
    """Measure round trip and throughput up in a session of its own, which is closed in the end.

    Frames begin at one token and grow until one takes half a second, so that a slow link is not filled for minutes.

    Args:
        bundle: the device half of the bundle that the server serves.
        server: ``HOST:PORT``.
        security: how to reach it.

    Raises:
        RequestError: no hidden states cross a link, whose frames would be large enough to measure by.
        LinkError: the server cannot be reached, refuses the session, or the link is lost.
    """
    manifest = bundle.manifest
    if manifest.device_only:
        raise RequestError(f"{bundle.folder}: runs wholly on the device; there is no server to measure a link to")
    if manifest.server_only:
        raise RequestError(
            f"{bundle.folder}: sends token ids alone, too few bytes to measure a link by; take a bundle that is split "
            "between its layers"
        )
    link = RemoteBack(
        server,
        manifest_sha256=bundle.manifest_sha256,
        split=manifest.split,
        d_model=manifest.architecture.d_model,
        codec=Raw32(),
        security=security,
    )
    rng = np.random.default_rng(0)
    token_bytes = 4 * manifest.architecture.d_model

    def step(tokens: int) -> StepReport:
        hidden = rng.standard_normal((tokens, manifest.architecture.d_model), np.float32)
        return link.step(hidden, 0, [0] * tokens, sample=True)

    capacity = min(manifest.max_length, max(1, _LARGEST_FRAME // token_bytes))
    with link:
        link.open(capacity, Sampling())
        most = min(capacity, link.chunk_limit())
        step(1)  # the server's first step warms up
        round_trip = median(_on_the_way(step(1)) for _ in range(_ROUND_TRIPS))
        tokens = 1
        while True:
            tokens = min(most, 4 * tokens)
            report = step(tokens)
            transfer = _on_the_way(report) - round_trip
            if transfer >= _LONG_ENOUGH_S or tokens == most:
                break
    # On a fast link the transfer drowns in the jitter of the round trip; half of the whole is a safe bound.
    transfer = max(transfer, _on_the_way(report) / 2)
    return LinkMeasurement(server, 1e3 * round_trip, 8e-6 * report.bytes_up / transfer, report.bytes_up)


def _on_the_way(report: StepReport) -> float:
    return report.wait_s - report.server_decode_s - report.server_queue_s - report.server_compute_s
