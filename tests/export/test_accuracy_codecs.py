"""What codecs send of a text, for the accuracy table."""

from __future__ import annotations

import numpy as np
import pytest

from isthmus.export.accuracy_codecs import FRAME, _coded
from isthmus.quant.codec import Raw16, Raw32


class Sink(Raw32):
    """Sends zeros, ten bytes a frame and a thousand for a text's first token, whose id is 0."""

    def encode(self, hidden, token_ids=()):
        return bytes(10 + 1000 * (0 in token_ids))

    def decode(self, payload, tokens, d_model):
        return np.zeros((tokens, d_model), np.float32)


def test_every_byte_counts_and_a_first_token_is_not_decoded() -> None:
    windows = [list(range(FRAME + 9)), list(range(8))]
    states = [np.ones((len(ids), 4), np.float32) for ids in windows]
    coded = _coded(Sink(), states, windows, "")
    assert [hidden.shape for hidden in coded.received] == [(FRAME + 9, 4), (8, 4)]
    assert not any(hidden.any() for hidden in coded.received)
    assert coded.bits == pytest.approx(8 * (3 * 10 + 2 * 1000) / (4 * (FRAME + 9 + 8)))
    assert coded.decode_bits == pytest.approx(8 * 10 / 4)


def test_a_codec_that_reconstructs_like_another_is_not_run() -> None:
    windows = [list(range(8))]
    states = [np.full((8, 4), 0.5, np.float32)]
    coded = _coded(Raw16(), states, windows, "another")
    assert (coded.received, coded.bits, coded.decode_bits, coded.like) == ([], 16.0, 16.0, "another")
