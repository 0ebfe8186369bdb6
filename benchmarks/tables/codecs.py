"""The codecs' rates and distortions over one bundle, beside simpler ways to send hidden states.

    python benchmarks/tables/codecs.py --bundle OUT --text FILE [--tokens 8192] [--plot FILE]

Every codec and level that the bundle lists, and the baselines below, through both halves of the bundle in one process:
KL, top-1 and perplexity against the same bundle with its hidden states sent exactly (`raw32`). Every byte of a payload
counts. What is done is kept in a journal until the table is complete: a killed run goes on where it was.

The baselines answer what they encoded themselves and check nothing that they are sent: they are no codecs for a wire.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from isthmus.cli.plot import check_plot, plot_text
from isthmus.cli.progress import progress_bar
from isthmus.errors import IsthmusError, RequestError
from isthmus.export.catalog import cache_root
from isthmus.quant.bitpack import pack, unpack
from isthmus.quant.codec import CODECS, Codec
from isthmus.quant.trellis import FREQUENCIES, LIMIT, TrellisTables
from isthmus.runtime.chain import Chain, CodecChoice
from isthmus.runtime.evaluate import BundleReference, evaluate_text, open_whole, read_text, text_subject, text_windows
from isthmus.runtime.journal import Journal, subject_key

Floats = NDArray[np.float32]

UNIFORM_BITS = (8, 6, 4)
ENTROPY_CODED_BITS = (8, 7, 6, 5, 4)
SHARES = (1 / 2, 1 / 4, 1 / 8)
PLOTTED_RATIO = 2.0  # rows above this perplexity ratio would flatten all others


@dataclass(frozen=True)
class Uniform:
    """Per token, codes of ``bits`` bits between its least and its largest value; both in float32."""

    bits: int
    name: ClassVar[str] = "uniform"

    def encode(self, hidden: Floats, token_ids: Sequence[int] = ()) -> bytes:
        """Ranges of all tokens, then all codes."""
        low, high = hidden.min(1, keepdims=True), hidden.max(1, keepdims=True)
        step = self._step(low, high)
        codes = np.rint((hidden - low) / step).clip(0, 2**self.bits - 1).astype(np.uint8)
        return np.concatenate([low, high], 1).astype("<f4").tobytes() + pack(codes.ravel(), self.bits)

    def decode(self, payload: bytes, tokens: int, d_model: int) -> Floats:
        """Undo `encode`."""
        low, high = np.frombuffer(payload, "<f4", 2 * tokens).reshape(tokens, 2, 1).swapaxes(0, 1)
        codes = unpack(payload[8 * tokens :], tokens * d_model, self.bits, np.uint8)
        return (low + self._step(low, high) * codes.reshape(tokens, d_model)).astype(np.float32)

    def _step(self, low: Floats, high: Floats) -> Floats:
        return np.maximum((high - low) / np.float32(2**self.bits - 1), np.float32(1e-30))


@dataclass(frozen=True)
class EntropyCoded:
    """Asymmetric integer quantization of ``bits`` bits per token, then rANS over the codes.

    After arXiv 2511.11664, whose sparse layout is left out: what is zero costs next to nothing here. Codes count
    from the zero point, ``round(x / s)`` with ``s = (max - min) / (2**bits - 1)``. A byte per token picks one of
    `SPREADS` Laplacian tables, which both ends know, so that no histogram is sent; the scale is a float32. The coder
    is that of `isthmus.quant.trellis`, with the same table in both of its quantizers.
    """

    bits: int
    name: ClassVar[str] = "rans"

    SPREADS: ClassVar[Floats] = 2.0 ** (np.arange(40, dtype=np.float32) / 4 - 4)

    def encode(self, hidden: Floats, token_ids: Sequence[int] = ()) -> bytes:
        """Scales, spreads and the coder's bytes of all tokens."""
        span = np.maximum(hidden.max(1), 0) - np.minimum(hidden.min(1), 0)
        scales = np.maximum(span / np.float32(2**self.bits - 1), np.float32(1e-30)).astype("<f4")
        indices = np.rint(hidden / scales[:, None]).astype(np.int32)
        magnitude = np.maximum(np.abs(indices).mean(1), 1e-9)
        spreads = np.abs(np.log(magnitude[:, None] / self.SPREADS)).argmin(1).astype(np.uint8)
        coded = self._tables(spreads, hidden.shape[1]).encode(indices.reshape(1, -1), _NO_GAIN, 0)
        return scales.tobytes() + spreads.tobytes() + coded

    def decode(self, payload: bytes, tokens: int, d_model: int) -> Floats:
        """Undo `encode`."""
        scales = np.frombuffer(payload, "<f4", tokens)
        spreads = np.frombuffer(payload, np.uint8, tokens, 4 * tokens)
        points, _ = self._tables(spreads, d_model).decode(payload[5 * tokens :], _NO_GAIN)
        # Points are twice the index, or one nearer to zero: see the two quantizers in quant/_native.c.
        indices = np.sign(points) * np.ceil(np.abs(points) / 2)
        return indices.reshape(tokens, d_model) * scales[:, None]

    def _tables(self, spreads: NDArray[np.uint8], d_model: int) -> TrellisTables:
        cumulative = laplacian_tables(tuple(self.SPREADS.tolist()))
        offsets = np.zeros((len(cumulative), 2, 2 * LIMIT + 1), np.float32)
        return TrellisTables(spreads.repeat(d_model), cumulative, offsets)


_NO_GAIN = np.zeros(1, np.uint8)  # the spreads do its work


@cache
def laplacian_tables(spreads: tuple[float, ...]) -> NDArray[np.uint16]:
    """Running sums of frequencies ``[spreads, 2, symbols + 1]`` of rounded Laplacian numbers, the escape last.

    Args:
        spreads: mean magnitudes of the numbers, in steps.
    """
    index = np.abs(np.arange(-LIMIT, LIMIT + 1))
    tables = []
    for spread in spreads:
        inside = np.exp(-np.maximum(index - 0.5, 0) / spread) - np.exp(-(index + 0.5) / spread)
        inside[index > 0] /= 2
        shares = np.append(inside, np.exp(-(LIMIT + 0.5) / spread))
        counts = np.maximum(np.rint(shares * FREQUENCIES).astype(np.int64), 1)
        counts[counts.argmax()] += FREQUENCIES - counts.sum()
        tables.append([np.append(0, counts.cumsum())] * 2)
    return np.array(tables, np.uint16)


@dataclass(frozen=True)
class LowPass:
    """The low-frequency block of a Fourier transform, in float16 with one float32 scale a frame.

    After FourierCompress (arXiv 2510.16418). ``frame``: of the whole frame, over tokens and channels, cut to the same
    share on both axes, so that a token's reconstruction depends on its frame mates, which Isthmus allows no codec;
    otherwise of each token alone, over its channels.

    Attributes:
        share: of the coefficients that are kept.
    """

    share: float
    frame: bool

    @property
    def name(self) -> str:
        """Tells the two apart."""
        return "fft frame" if self.frame else "fft token"

    def encode(self, hidden: Floats, token_ids: Sequence[int] = ()) -> bytes:
        """The scale and the block's real and imaginary parts."""
        wide = hidden.astype(np.float64)
        block = np.fft.rfft2(wide, norm="ortho") if self.frame else np.fft.rfft(wide, norm="ortho")
        rows, columns = self._block(*hidden.shape)
        kept = np.ascontiguousarray(block[rows, :columns]).view(np.float64)
        scale = max(float(np.abs(kept).max()) / 65504, 1e-30)
        return struct.pack("<f", scale) + (kept / np.float32(scale)).clip(-65504, 65504).astype("<f2").tobytes()

    def decode(self, payload: bytes, tokens: int, d_model: int) -> Floats:
        """Undo `encode`, with zeros in place of the frequencies that were left out."""
        rows, columns = self._block(tokens, d_model)
        (scale,) = struct.unpack_from("<f", payload)
        kept = np.frombuffer(payload, "<f2", offset=4).astype(np.float64).view(np.complex128) * scale
        block = np.zeros((tokens, d_model // 2 + 1), np.complex128)
        block[rows, :columns] = kept.reshape(len(rows), columns)
        if self.frame:
            return np.fft.irfft2(block, (tokens, d_model), norm="ortho").astype(np.float32)
        return np.fft.irfft(block, d_model, norm="ortho").astype(np.float32)

    def _block(self, tokens: int, d_model: int) -> tuple[NDArray[np.int64], int]:
        """Rows of the transform that are kept, and how many columns from the first."""
        frequencies = d_model // 2 + 1
        rows = np.arange(tokens)
        if self.frame:
            reach = int(tokens * math.sqrt(self.share) / 2)
            rows = np.array(sorted({at % tokens for at in range(-reach, reach + 1)}))
        return rows, min(frequencies, max(1, round(self.share * tokens * frequencies / len(rows))))


def baselines() -> list[CodecChoice]:
    """The baselines, each with its levels from the finest."""
    kinds: list[list[Codec]] = [
        [Uniform(bits) for bits in UNIFORM_BITS],
        [EntropyCoded(bits) for bits in ENTROPY_CODED_BITS],
        [LowPass(share, frame=True) for share in SHARES],
        [LowPass(share, frame=False) for share in SHARES],
    ]
    return [CodecChoice(codec.name, level, codec) for kind in kinds for level, codec in enumerate(kind)]


def parameter(choice: CodecChoice) -> str:
    """What a row's codec is set to."""
    match choice.codec:
        case Uniform(bits) | EntropyCoded(bits):
            return f"{bits} bit codes"
        case LowPass(share):
            return f"1/{round(1 / share)} kept"
    return "" if choice.level is None else f"level {choice.level}"


def table(choices: Sequence[CodecChoice], rows: Sequence[dict[str, Any]]) -> str:
    """What is printed without ``--json``."""

    def number(row: dict[str, Any], name: str, digits: int) -> str:
        error = row[f"{name}_se"]
        return f"{row[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    lines = [
        [
            choice.name,
            parameter(choice),
            f"{row['bits_per_element']:.2f}",
            f"{row['ratio_to_16_bit']:.1f}x",
            f"{row['decode_bits_per_element']:.2f}",
            number(row, "kl", 4),
            number(row, "top1", 3),
            number(row, "perplexity_ratio", 3),
        ]
        for choice, row in zip(choices, rows, strict=True)
    ]
    headers = ["codec", "setting", "bits", "vs 16 bit", "bits, decode", "KL", "top-1", "perplexity ratio"]
    first = rows[0]
    return (
        f"{tabulate(lines, headers, disable_numparse=True)}\n\n"
        f"bits per element in frames of a prefill, and of one token as generation sends them; {first['tokens']} tokens "
        f"in {first['windows']} windows of {first['window']}, split {first['split']}, against the same bundle with "
        f"raw32 (perplexity {first['reference_perplexity']:.3f}); ± is a standard error over windows"
    )


def run(args: argparse.Namespace) -> str:
    """Measure what is not in the journal, and give the table or its JSON."""
    if args.plot:
        check_plot(args.plot, device_only=False)
    chain = Chain.open(args.bundle / "device", args.bundle / "server", threads=args.threads)
    own = [name for name in chain.manifest.codecs if name in CODECS and name != "raw32"]
    choices = chain.codecs(own, None)
    choices[1:1] = baselines()  # behind raw16
    text, converted = read_text(args.text)
    if converted:
        print(f"{args.text}: {converted} CRLF line ends read as LF", file=sys.stderr)
    windows = text_windows(chain.tokenizer, text, window=args.window, tokens=args.tokens)
    reference = BundleReference(open_whole(args.bundle, chain.manifest, threads=args.threads), windows)
    subject = text_subject(chain, windows, choices, reference)
    subject |= {"baselines": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    journal = Journal(args.journal or cache_root() / "evaluations" / f"{subject_key(subject)}.jsonl", subject)
    try:
        with progress_bar() as progress:
            results = evaluate_text(chain, windows, choices, reference, journal=journal, progress=progress)
    finally:
        journal.close()
    if not args.journal:
        journal.remove()
    rows = [
        result.to_dict() | {"ratio_to_16_bit": 16 / result.bits_per_element, "setting": parameter(choice)}
        for choice, result in zip(choices, results, strict=True)
        if result.bits_per_element is not None
    ]
    if args.plot:
        plotted = [row for row in rows if row["perplexity_ratio"] <= PLOTTED_RATIO]
        if not plotted:
            raise RequestError(f"--plot {args.plot}: every perplexity ratio is above {PLOTTED_RATIO}; nothing to draw")
        plot_text(plotted, args.plot)
    return json.dumps(rows) if args.json else table(choices, rows)


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, metavar="OUT", help="with device and server in it")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="of the text (default 8192)")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens in a window (default 512)")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help=f".png or .svg; rows of a perplexity ratio above {PLOTTED_RATIO:g} are left out",
    )
    parser.add_argument("--journal", type=Path, metavar="FILE", help="keep what is done (default: in the cache folder)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the processors at hand, at most 4")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    args = parser.parse_args()
    try:
        print(run(args))
    except IsthmusError as error:
        print(f"codecs: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
