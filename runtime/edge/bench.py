"""Speed and memory of an opened model, in llama-bench's shape.

``pp<N>`` is the prefill of N tokens, up to the choice of the token after them; ``tg<N>`` is the generation of N
tokens one by one, undrafted, after a prompt of one. Both exclude tokenisation, detokenisation and the opening of the
session, and include the choice of the token (greedy). Over a link, both are what the device sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from time import perf_counter
from typing import Any

import numpy as np

from ...devices.memory import AnonymousPeak, process_memory
from ...errors import RequestError
from .generate import Token
from .model import EdgeModel

PROMPT_SEED = 0  # the prompt's ids are random, but the same in every run

Progress = Callable[[str, int, int], None]  # test, repetitions done, repetitions in all


@dataclass(frozen=True)
class BenchResult:
    """One test: its repetitions' speeds in tokens/s."""

    test: str
    threads: int
    samples: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        """Mean over the repetitions."""
        return fmean(self.samples)

    @property
    def sd(self) -> float:
        """Standard deviation over the repetitions, of a sample; 0 for one repetition."""
        return stdev(self.samples) if len(self.samples) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The form that ``isthmus bench --json`` prints."""
        return {
            "test": self.test,
            "threads": self.threads,
            "tokens_per_s": self.tokens_per_s,
            "sd": self.sd,
            "repetitions": len(self.samples),
        }


@dataclass(frozen=True)
class Breakdown:
    """Where a decoded token's time goes, over a link: medians in ms, each over all measured tokens.

    The parts' medians need not add up to the total's.

    Attributes:
        front_ms: the front's layers, inside onnxruntime.
        device_ms: the rest of the device's own work: embedding row, buffers, loop.
        encode_ms: codec on the device.
        decode_ms: codec on the server.
        queue_ms: waiting for the server's compute thread.
        back_ms: the back's layers and head, inside onnxruntime.
        server_ms: the rest of the server's compute: buffers, choice of the token.
        link_ms: everything else: frames, TLS, gRPC and the network, both ways.
        total_ms: from one token to the next.
        overhead_ms: total without front and back.
    """

    front_ms: float
    device_ms: float
    encode_ms: float
    decode_ms: float
    queue_ms: float
    back_ms: float
    server_ms: float
    link_ms: float
    total_ms: float
    overhead_ms: float

    @classmethod
    def of(cls, tokens: Sequence[Token]) -> Breakdown:
        """Medians over tokens that came through a link."""

        def median_ms(seconds: Callable[[Token], float]) -> float:
            return median(map(seconds, tokens)) * 1e3

        def link_s(token: Token) -> float:
            return token.report.wait_s - token.report.server_s

        return cls(
            front_ms=median_ms(lambda t: t.front_onnxruntime_s),
            device_ms=median_ms(lambda t: t.total_s - t.front_onnxruntime_s - t.report.encode_s - t.report.wait_s),
            encode_ms=median_ms(lambda t: t.report.encode_s),
            decode_ms=median_ms(lambda t: t.report.server_decode_s),
            queue_ms=median_ms(lambda t: t.report.server_queue_s),
            back_ms=median_ms(lambda t: t.report.onnxruntime_s),
            server_ms=median_ms(lambda t: t.report.server_compute_s - t.report.onnxruntime_s),
            link_ms=median_ms(link_s),
            total_ms=median_ms(lambda t: t.total_s),
            overhead_ms=median_ms(lambda t: t.total_s - t.front_onnxruntime_s - t.report.onnxruntime_s),
        )


@dataclass(frozen=True)
class CodecCost:
    """What the codec costs in one test: medians over its tokens, of the prompt as a whole or of each new one.

    Attributes:
        bytes_up_per_token: sent, with everything that the wire adds above TLS.
        encode_percent: of the front's time inside onnxruntime, None if it has no layers.
        decode_percent: of the back's.
    """

    test: str
    bytes_up_per_token: float
    encode_percent: float | None
    decode_percent: float

    @classmethod
    def of(cls, test: str, tokens: Sequence[Token], positions: int) -> CodecCost:
        """Medians over tokens that each took ``positions`` positions through a link."""
        shares = [100 * t.report.encode_s / t.front_onnxruntime_s for t in tokens if t.front_onnxruntime_s]
        return cls(
            test,
            median(token.bytes_up / positions for token in tokens),
            median(shares) if shares else None,
            median(100 * token.report.server_decode_s / token.report.onnxruntime_s for token in tokens),
        )


@dataclass(frozen=True)
class BenchReport:
    """What `bench` measured. Memory is this process's, None where the system does not tell.

    Attributes:
        peak_rss_mb: most resident memory since the process began, mapped weights included.
        peak_anon_mb: most anonymous memory during the tests.
        breakdown: of the decoded tokens, if the model is split.
        codec: of each test, if the model is split.
    """

    results: tuple[BenchResult, ...]
    peak_rss_mb: float | None
    peak_anon_mb: float | None
    breakdown: Breakdown | None = None
    codec: tuple[CodecCost, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The form that ``isthmus bench --json`` prints."""
        report: dict[str, Any] = {
            "results": [result.to_dict() for result in self.results],
            "peak_rss_mb": self.peak_rss_mb,
            "peak_anon_mb": self.peak_anon_mb,
        }
        if self.breakdown is not None:
            report["breakdown"] = asdict(self.breakdown)
        if self.codec:
            report["codec"] = [asdict(cost) for cost in self.codec]
        return report


def bench(
    model: EdgeModel,
    *,
    prompt_tokens: Sequence[int] = (128,),
    new_tokens: Sequence[int] = (128,),
    repetitions: int = 5,
    progress: Progress = lambda test, done, total: None,
) -> BenchReport:
    """Measure an opened model; each test runs once more before, to warm up.

    Args:
        model: device-only, or with its server.
        prompt_tokens: lengths of the prefill tests.
        new_tokens: lengths of the generation tests.
        repetitions: of each test.
        progress: called after each repetition.

    Raises:
        RequestError: no test is asked for, or a length or the number of repetitions is out of range.
        LinkError: the server cannot be reached or the link is lost.
    """
    limit = model.manifest.max_length - 1
    if not prompt_tokens and not new_tokens:
        raise RequestError("no test: give at least one prompt length or one number of new tokens")
    for tokens in (*prompt_tokens, *new_tokens):
        if not 1 <= tokens <= limit:
            raise RequestError(f"a test of {tokens} tokens: must lie between 1 and {limit}, this bundle's context")
    if repetitions < 1:
        raise RequestError(f"repetitions={repetitions}: must be at least 1")
    tests = [("pp", count) for count in prompt_tokens] + [("tg", count) for count in new_tokens]
    results: list[BenchResult] = []
    costs: list[CodecCost] = []
    decoded: list[Token] = []
    split = model.server is not None
    with AnonymousPeak() as anonymous:
        for kind, count in tests:
            samples: list[float] = []
            measured: list[Token] = []
            for repetition in range(-1, repetitions):
                prompt, new = (count, 1) if kind == "pp" else (1, count)
                seconds, tokens_made = generate_exactly(model, prompt, new, fresh=kind == "pp")
                if repetition >= 0:
                    samples.append(count / seconds)
                    measured += tokens_made
                progress(f"{kind}{count}", repetition + 1, repetitions)
            results.append(BenchResult(f"{kind}{count}", model.threads, tuple(samples)))
            decoded += measured if kind == "tg" else []
            if split:
                costs.append(CodecCost.of(f"{kind}{count}", measured, count if kind == "pp" else 1))
    return BenchReport(
        results=tuple(results),
        peak_rss_mb=process_memory().peak_resident_mb,
        peak_anon_mb=anonymous.peak_mb,
        breakdown=Breakdown.of(decoded) if decoded and split else None,
        codec=tuple(costs),
    )


def generate_exactly(
    model: EdgeModel, prompt_tokens: int, new_tokens: int, *, fresh: bool = False
) -> tuple[float, list[Token]]:
    """Run one session over a prompt of fixed random ids and exactly so many new tokens, end tokens or not.

    Args:
        model: opened.
        prompt_tokens: of the prompt.
        new_tokens: after it.
        fresh: whether the first id is another one each time: no server has the prompt's keys and values then.

    Returns:
        Seconds from prompt to last token, and the tokens. The session is opened before.
    """
    vocabulary = model.manifest.architecture.vocab_size
    ids = np.random.default_rng(PROMPT_SEED).integers(vocabulary, size=prompt_tokens).tolist()
    if fresh:
        ids[0] = int(np.random.default_rng().integers(vocabulary))
    stream = model.tokens(ids, max_new_tokens=new_tokens, end_tokens=(), draft="off")
    try:
        started = perf_counter()
        tokens = list(stream)
        return perf_counter() - started, tokens
    finally:
        stream.close()
