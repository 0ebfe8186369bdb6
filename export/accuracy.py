"""What bits cost in quality: a table measured once per model, from which any configuration's KL is a sum.

The table holds, for each part of a model that can be made smaller (a layer's weights, a layer's KV cache, the
embedding, the head, the hidden states that cross), the Kullback-Leibler divergence in nats per token that this part
alone adds to the float model's predictions. The parts' errors are small and nearly independent, and the divergence is
of second order in them: its expected value is then the sum of theirs, to first order. `AccuracyTable.drop` adds them
up. That the sum is not exact is part of the error that it states, see `ADDITIVITY`.

`isthmus.export.accuracy_measurement` measures a table.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import AccuracyError
from ..quant.kv import KV_BITS
from ..quant.opsc import WEIGHT_BITS
from .catalog import cache_root

SCHEMA = 1
TABLE_BITS = 8, 16, 32  # of embedding and head; an export gives them fewer only if told to
ADDITIVITY = 0.25  # relative standard error of a sum of parts, beside what each part's measurement is uncertain by

logger = logging.getLogger(__name__)


def drop_percent(kl: float) -> float:
    """The expected rise of the perplexity, in percent, on text as the model itself writes it.

    There the float model's perplexity is that of its own distribution, and a divergence of so many nats per token
    multiplies it by ``exp(kl)``.
    """
    return 100 * math.expm1(kl)


@dataclass(frozen=True)
class CodecPoint:
    """One codec at one level, measured at one split.

    Attributes:
        split: layers in front of the hidden states.
        codec: its name, see `isthmus.quant.codec.CODECS`.
        level: from 0, the finest; None if it has none.
        bits: per element of a hidden state in frames of 128 tokens, every byte counted.
        decode_bits: in frames of one token.
        kl: that it adds, nats per token.
        kl_se: standard error of ``kl``.
    """

    split: int
    codec: str
    level: int | None
    bits: float
    decode_bits: float
    kl: float
    kl_se: float


@dataclass(frozen=True)
class AccuracyTable:
    """What the parts of one model cost; KL is in nats per token.

    Attributes:
        model: its name, for people.
        hashes: SHA-256 of the checkpoint's files by name; the digests are the table's identity.
        layers: of the model.
        tokens: that it was measured on.
        text: which text, for people.
        activations: KL of the whole model with 8-bit weights, nearly all of it from the int8 activations that every
            packed weight is multiplied with; half of the layers have half of it.
        weights: by bits, the KL that each layer's weights add to that.
        weights_se: by bits, the relative standard error of their sum.
        embed: by bits from 8 on, the embedding's KL.
        head: by bits from 8 on, the head's.
        kv: by bits, the KL of each layer's KV cache.
        codecs: levels from fine to coarse at some splits, the same at each.

    Raises:
        AccuracyError: numbers that no measurement gives.
    """

    model: str
    hashes: dict[str, str]
    layers: int
    tokens: int
    text: str
    activations: float
    weights: dict[int, tuple[float, ...]]
    weights_se: dict[int, float]
    embed: dict[int, float]
    head: dict[int, float]
    kv: dict[int, tuple[float, ...]]
    codecs: tuple[CodecPoint, ...]

    def __post_init__(self) -> None:
        if self.layers < 1 or self.tokens < 1 or not self.hashes:
            raise AccuracyError(
                f"accuracy table of {self.layers} layers, {self.tokens} tokens and {len(self.hashes)} files: all must "
                "be at least 1; measure it again"
            )
        for name, wanted in (("weights", WEIGHT_BITS), ("embed", TABLE_BITS), ("head", TABLE_BITS), ("kv", KV_BITS)):
            found = getattr(self, name)
            if set(found) != set(wanted):
                raise AccuracyError(
                    f"accuracy table: {name} for {sorted(found)} bits, must be for {sorted(wanted)}; measure it again"
                )
            if name in ("weights", "kv") and any(len(row) != self.layers for row in found.values()):
                raise AccuracyError(f"accuracy table: {name} must have {self.layers} layers each; measure it again")
        if set(self.weights_se) != set(self.weights):
            raise AccuracyError("accuracy table: weights_se must have the bits of weights; measure it again")
        numbers = [self.activations, *self.weights_se.values(), *self.embed.values(), *self.head.values()]
        numbers += [kl for rows in (self.weights, self.kv) for row in rows.values() for kl in row]
        numbers += [x for point in self.codecs for x in (point.bits, point.decode_bits, point.kl, point.kl_se)]
        for number in numbers:
            if not 0 <= number < math.inf:
                raise AccuracyError(f"accuracy table: {number} where only finite numbers from 0 can be; measure again")
        if any(not 0 < point.split < self.layers for point in self.codecs):
            raise AccuracyError(f"accuracy table: a codec's split must lie between 1 and {self.layers - 1}")
        levels = self.codec_levels()
        for split in {point.split for point in self.codecs}:
            here = [(point.codec, point.level) for point in self.codecs if point.split == split]
            if sorted(here, key=str) != sorted(levels, key=str):
                raise AccuracyError(f"accuracy table: split {split} lacks codecs of other splits; measure it again")

    def drop(
        self,
        *,
        split: int,
        front_bits: int,
        back_bits: int,
        front_kv_bits: int = 32,
        back_kv_bits: int = 32,
        codec: str | None = None,
        level: int | None = None,
    ) -> tuple[float, float]:
        """KL of a configuration, nats per token, and its standard error; `drop_percent` words it for people.

        Embedding and head have the bits that export gives them: 8, or more if their side has more.

        Args:
            split: layers in front, from 0 to all.
            front_bits: of the weights of layers ``[0, split)``.
            back_bits: of the others'.
            front_kv_bits: of the KV cache of layers ``[0, split)``.
            back_kv_bits: of the others'.
            codec: what the hidden states cross in; None if none do: all layers are on one side.
            level: of the codec; None if it has none.

        Raises:
            AccuracyError: a split, bits, a codec or a level that the table does not have.
        """
        if not 0 <= split <= self.layers:
            raise AccuracyError(f"split {split}: must lie between 0 and {self.layers}, the model's layers")
        if codec is not None and not 0 < split < self.layers:
            raise AccuracyError(f"split {split} of {self.layers} layers with codec {codec}: nothing crosses there")
        sides = (range(split), front_bits, front_kv_bits), (range(split, self.layers), back_bits, back_kv_bits)
        total, squares = 0.0, 0.0
        for span, bits, kv_bits in sides:
            row, cache = _at(self.weights, bits, "weight bits"), _at(self.kv, kv_bits, "KV bits")
            weights = sum(row[span.start : span.stop])
            total += weights + sum(cache[span.start : span.stop])
            total += self.activations * (len(span) / self.layers if bits <= 8 else 0)
            squares += (self.weights_se[bits] * weights) ** 2
        total += self.embed[max(8, front_bits if split else back_bits)]
        total += self.head[max(8, back_bits if split < self.layers else front_bits)]
        if codec is not None:
            kl, error = (self._between(split, codec, level, name) for name in ("kl", "kl_se"))
            total += kl
            squares += error**2
        return total, math.sqrt(squares + (ADDITIVITY * total) ** 2)

    def codec_levels(self) -> list[tuple[str, int | None]]:
        """Codecs and levels that the table knows, in its order."""
        return list(dict.fromkeys((point.codec, point.level) for point in self.codecs))

    def codec_bits(self, split: int, codec: str, level: int | None, *, decode: bool) -> float:
        """Bits per element at a split: between measured ones on the line through them, beyond them as at the last.

        Args:
            split: layers in front.
            codec: its name.
            level: None if it has none.
            decode: in frames of one token, as generation sends them; else of 128.

        Raises:
            AccuracyError: a codec or a level that the table does not have.
        """
        return self._between(split, codec, level, "decode_bits" if decode else "bits")

    def _between(self, split: int, codec: str, level: int | None, name: str) -> float:
        points = sorted(
            (point.split, float(getattr(point, name)))
            for point in self.codecs
            if (point.codec, point.level) == (codec, level)
        )
        if not points:
            known = ", ".join(codec if level is None else f"{codec} {level}" for codec, level in self.codec_levels())
            raise AccuracyError(f"codec {codec}, level {level}: not in the accuracy table, which has {known}")
        for (low, at_low), (high, at_high) in pairwise(points):
            if low <= split <= high:
                return at_low + (at_high - at_low) * (split - low) / (high - low)
        return points[0][1] if split < points[0][0] else points[-1][1]

    def to_json(self) -> str:
        """The form of the file."""
        return json.dumps({"isthmus accuracy": SCHEMA} | asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "accuracy table") -> AccuracyTable:
        """Read what `to_json` wrote.

        Args:
            text: the file's.
            where: its name, for errors.

        Raises:
            AccuracyError: not a table, of another schema, or with missing or impossible values.
        """
        remedy = "measure it again with `isthmus eval MODEL --for-plan`"
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise AccuracyError(f"{where}: not JSON ({error}); {remedy}") from error
        if not isinstance(fields, dict) or "isthmus accuracy" not in fields:
            raise AccuracyError(f"{where}: not an accuracy table; {remedy}")
        if (schema := fields.pop("isthmus accuracy")) != SCHEMA:
            raise AccuracyError(f"{where}: schema {schema!r}, this version reads {SCHEMA}; {remedy}")
        try:
            for name in ("weights", "kv"):
                fields[name] = {int(bits): tuple(map(float, row)) for bits, row in fields[name].items()}
            for name in ("weights_se", "embed", "head"):
                fields[name] = {int(bits): float(value) for bits, value in fields[name].items()}
            for name in ("layers", "tokens"):
                fields[name] = int(fields[name])
            fields["activations"] = float(fields["activations"])
            fields["hashes"] = dict(fields["hashes"])
            for word in (fields["model"], fields["text"], *fields["hashes"].values()):
                if not isinstance(word, str):
                    raise TypeError(f"{word!r} is no text")
            fields["codecs"] = tuple(_point(point) for point in fields["codecs"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AccuracyError(f"{where}: a value is missing or of the wrong kind ({error}); {remedy}") from error
        except AccuracyError as error:
            raise AccuracyError(f"{where}: {error}") from error

    def save(self, path: Path) -> None:
        """Write the table in one step; its folder is made.

        Raises:
            AccuracyError: it cannot be written.
        """
        write_whole(path, self.to_json())


def load_accuracy(path: str | Path) -> AccuracyTable:
    """Read a table's file.

    Raises:
        AccuracyError: it cannot be read, or see `AccuracyTable.from_json`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AccuracyError(f"accuracy table {path}: cannot be read ({error}); give a file that eval wrote") from error
    return AccuracyTable.from_json(text, str(path))


def accuracy_path(hashes: Mapping[str, str], cache: Path | None = None) -> Path:
    """Where the table of a checkpoint with these files is kept, see `isthmus.export.catalog.cache_root`."""
    key = hashlib.sha256("\n".join(sorted(hashes.values())).encode()).hexdigest()
    return cache_root(cache) / "accuracy" / f"{key[:32]}.json"


def find_accuracy(hashes: Mapping[str, str], cache: Path | None = None) -> AccuracyTable | None:
    """The table of a checkpoint with these files: measured on this machine, or one that comes with the package.

    Args:
        hashes: of the checkpoint's files, as `isthmus.export.checkpoint.Checkpoint.file_hashes` gives them; what the
            files are called does not matter.
        cache: the cache folder.

    Returns:
        None if there is none. One in the cache that cannot be read is passed over with a warning.
    """
    for path in _candidates(hashes, cache):
        try:
            table = load_accuracy(path)
        except AccuracyError as error:
            logger.warning("%s", error)
            continue
        if sorted(table.hashes.values()) == sorted(hashes.values()):
            return table
    return None


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step; its folder is made.

    Raises:
        AccuracyError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise AccuracyError(f"{path}: cannot be written ({error}); make room or give another --cache") from error


def _candidates(hashes: Mapping[str, str], cache: Path | None) -> Iterator[Path]:
    measured = accuracy_path(hashes, cache)
    if measured.exists():
        yield measured
    yield from sorted((Path(__file__).parent / "accuracy-tables").glob("*.json"))


def _at(rows: Mapping[int, tuple[float, ...]], bits: int, what: str) -> tuple[float, ...]:
    if bits not in rows:
        raise AccuracyError(f"{what} {bits}: must be one of {', '.join(map(str, sorted(rows)))}")
    return rows[bits]


def _point(fields: Mapping[str, Any]) -> CodecPoint:
    level = fields["level"]
    return CodecPoint(
        split=int(fields["split"]),
        codec=str(fields["codec"]),
        level=None if level is None else int(level),
        **{name: float(fields[name]) for name in ("bits", "decode_bits", "kl", "kl_se")},
    )
