"""What a server tells Prometheus, over HTTP on an address of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from ...errors import LinkError
from ..wire import isthmus_pb2 as pb
from ..wire.transport import split_address

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Counts what passes through the streams of one server; `serve` makes the counts readable.

    Args:
        gauges: read at each scrape: a name without the prefix, and what it is now.
    """

    def __init__(self, gauges: Mapping[str, Callable[[], float]]) -> None:
        self.registry = CollectorRegistry()
        self._gauges = gauges
        self.registry.register(self)

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"isthmus_{name}", help_, labels, registry=self.registry)

        self._opened = counter("sessions_opened", "Sessions that were begun.")
        self._attached = counter("sessions_attached", "Streams that took a session over.")
        self._tokens = counter("tokens", "Tokens that were chosen.")
        self._bytes = counter("payload_bytes", "Hidden states received, as they were encoded.", "codec")
        self._steps = counter("steps", "Steps that were done.")
        self._faults = counter("faults", "Messages that were refused, by the wire's code.", "code")
        self._strangers = counter("peers_refused", "Streams whose peer was not let in.")
        self._failed = counter("connections_failed", "Connections that failed in their TLS handshake, or made no call.")
        self._seconds = Histogram(
            "isthmus_step_seconds",
            "Time of a step: decoding, waiting for its turn, computing.",
            ("part",),
            buckets=_SECONDS,
            registry=self.registry,
        )

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges, for the registry."""
        for name, value in self._gauges.items():
            yield GaugeMetricFamily(f"isthmus_{name}", name.replace("_", " "), value=value())

    def received(self, codec: str, step: pb.Step) -> None:
        """A step came in."""
        self._bytes.labels(codec).inc(len(step.frame.payload))

    def sent(self, message: pb.ServerMessage) -> None:
        """An answer went out."""
        match message.WhichOneof("body"):
            case "result":
                result = message.result
                self._steps.inc()
                self._tokens.inc(len(result.tokens) or result.HasField("token"))
                for part, microseconds in (
                    ("decode", result.decode_us),
                    ("queue", result.queue_us),
                    ("compute", result.compute_us),
                ):
                    self._seconds.labels(part).observe(microseconds / 1e6)
            case "fault":
                self._faults.labels(pb.Fault.Code.Name(message.fault.code)).inc()
            case "opened":
                self._opened.inc()
            case "attached":
                self._attached.inc()

    def refused(self) -> None:
        """A peer was not let in."""
        self._strangers.inc()

    def connections_failed(self, number: int) -> None:
        """Connections failed before any call."""
        self._failed.inc(number)

    def serve(self, listen: str) -> MetricsServer:
        """Make the counts readable under ``http://HOST:PORT/metrics``.

        Raises:
            LinkError: the address cannot be bound.
        """
        host, port = split_address(listen)
        try:
            return MetricsServer(*start_http_server(port, host, self.registry))
        except OSError as error:
            raise LinkError(
                f"cannot listen on {listen} for metrics: {error.strerror or error}; choose another"
            ) from error


class MetricsServer:
    """The HTTP server of some `Metrics`; ends when it is closed."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread
        self.address = f"{server.server_name}:{server.server_port}"
        self.port = server.server_port

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of a scrape, by their name without the prefix, labels behind it: ``faults_total{code=BAD_CRC}``."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("isthmus_") and not sample.name.endswith(("_bucket", "_created")):
                labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                found[sample.name.removeprefix("isthmus_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found
