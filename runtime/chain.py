"""A whole bundle in one process: front, codec, back and head, as device and server compute them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..devices.backend import default_threads
from ..errors import BundleError
from ..quant.codec import Codec
from .bundle import Bundle, open_bundle
from .codecs import checked_level, open_levels
from .edge.generate import PREFILL_CHUNK
from .segments import Embedding, Head, LayerStack, StackSession
from .skipping import Bypass
from .text import Tokenizer

HEAD_ROWS = 64  # logits of that many tokens are in memory at a time

Hidden = NDArray[np.float32]


class Chain:
    """Both halves of a bundle in this process, holding one text; without a back if the bundle is device-only.

    A token's hidden states have the same bits as over the wire, however the text is cut into calls.
    """

    def __init__(self, device: Bundle, server: Bundle | None = None, *, threads: int | None = None) -> None:
        """Open the segments.

        Args:
            device: the device half.
            server: the server half; needed exactly if the bundle is split and the device does not hold all layers.
            threads: of onnxruntime; by default the processors at hand, at most four.

        Raises:
            BundleError: a half is missing, not needed, or of another export.
        """
        self.manifest = manifest = device.manifest
        self.manifest_sha256 = device.manifest_sha256
        if server is None and manifest.whole_on_device and not manifest.device_only:
            server = device.own_back()
        self._bundle = server or device  # the half that decodes
        if server is None and not manifest.device_only:
            raise BundleError(
                f"{device.folder}: layers {manifest.split}–{manifest.architecture.layers - 1} lie in the server half; "
                "give that as well (--back OUT/server)"
            )
        if server and manifest.device_only:
            raise BundleError(f"{device.folder}: the whole model is on the device; leave {server.folder} out")
        if server and server.manifest_sha256 != self.manifest_sha256:
            raise BundleError(f"{device.folder} and {server.folder} are of different exports; give two halves of one")
        threads = default_threads() if threads is None else threads
        self.tokenizer = Tokenizer.from_file(
            device.path("tokenizer.json"), manifest.chat_template, manifest.special_tokens, manifest.end_tokens
        )
        self._embedding = Embedding(server if server and manifest.server_only else device)
        self._front = LayerStack(device, threads).session(manifest.max_length)
        self._back = LayerStack(server, threads).session(manifest.max_length) if server else None
        self._head = Head(server or device, threads)

    @classmethod
    def open(cls, device: str | Path, back: str | Path | None = None, *, threads: int | None = None) -> Chain:
        """Open ``OUT/device`` and, if the bundle is split, ``OUT/server``.

        Raises:
            BundleError: no intact half there, or see the class.
        """
        return cls(open_bundle(device, "device"), open_bundle(back, "server") if back else None, threads=threads)

    def front(self, ids: Sequence[int]) -> Hidden:
        """Hidden states ``[tokens, d_model]`` at the split of the text's next tokens.

        Raises:
            RequestError: an id is outside the vocabulary, or the context is full.
        """
        ids = list(ids)
        return np.concatenate(
            [self._front.forward(self._embedding.rows(ids[rows])).copy() for rows in chunks(len(ids), PREFILL_CHUNK)]
        )

    def back(self, hidden: Hidden) -> Hidden:
        """Hidden states after the last layer, of the next hidden states at the split."""
        if self._back is None:
            return hidden
        return np.concatenate([self._back.forward(hidden[rows]).copy() for rows in chunks(len(hidden), PREFILL_CHUNK)])

    def logits(self, hidden: Hidden) -> Hidden:
        """Logits ``[tokens, vocab_size]`` of hidden states after the last layer; give `HEAD_ROWS` at most."""
        return self._head.logits_many(hidden)

    def truncate(self, length: int) -> None:
        """Forget the text from position ``length`` on."""
        for session in self._sessions():
            session.cache.truncate(length)

    def leave_out(self, bypass: Bypass) -> None:
        """Have further positions leave something out, see `isthmus.runtime.skipping`; those in the caches stay."""
        for session in self._sessions():
            session.cache.bypass = bypass

    def truncate_back(self) -> None:
        """Forget the text behind the split only, to run it there again."""
        if self._back is not None:
            self._back.cache.truncate(0)

    def codecs(self, names: Sequence[str], levels: Sequence[int | None] | None = (None,)) -> list[CodecChoice]:
        """The bundle's codecs of those names at those levels; none for a device-only bundle, which sends nothing.

        Args:
            names: see `isthmus.runtime.codecs.open_codec`.
            levels: None in the list is a codec's default; None in place of it takes all that a codec has. Where
                several codecs or levels are asked for, a codec without levels comes once.

        Raises:
            CodecError: an unknown name, or a level that the codec does not have.
        """
        if self._back is None:
            return []
        sweep = levels is None or len(names) * len(levels) > 1
        chosen = []
        for name in names:
            available = open_levels(self._bundle, name)
            leveled = len(available) > 1
            wanted: Sequence[int | None] = range(len(available)) if levels is None else levels
            if not leveled and sweep:
                wanted = (None,)
            for level in wanted or (None,):
                place = checked_level(available, level)
                chosen.append(CodecChoice(name, place if leveled else None, available[place]))
        return chosen

    def _sessions(self) -> list[StackSession]:
        return [session for session in (self._front, self._back) if session is not None]


@dataclass(frozen=True)
class CodecChoice:
    """A codec at a level, None if it has none."""

    name: str
    level: int | None
    codec: Codec

    def __str__(self) -> str:
        return self.name if self.level is None else f"{self.name} {self.level}"

    def send(self, hidden: Hidden, ids: Sequence[int]) -> tuple[Hidden, int]:
        """Put the hidden states ``[tokens, d_model]`` of these tokens through the codec, in a prefill's frames.

        Returns:
            What the back gets, and the bytes of all payloads.

        Raises:
            CodecError: they hold NaN or infinity.
        """
        ids, received, sent = list(ids), [], 0
        for rows in chunks(len(ids), PREFILL_CHUNK):
            payload = self.codec.encode(hidden[rows], ids[rows])
            sent += len(payload)
            received.append(self.codec.decode(payload, *hidden[rows].shape))
        return np.concatenate(received), sent

    def single_bytes(self, hidden: Hidden, ids: Sequence[int]) -> int:
        """Bytes of the payloads if every token has a frame of its own, as in generation."""
        return sum(len(self.codec.encode(hidden[at : at + 1], [token])) for at, token in enumerate(ids))


def chunks(tokens: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover so many tokens."""
    return (slice(first, min(first + size, tokens)) for first in range(0, tokens, size))
