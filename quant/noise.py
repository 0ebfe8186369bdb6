"""Sampling noise that is a pure function of (seed, position, token).

Device and server each compute it where they need it, so that no random state crosses the link, and a
generation can be repeated, resumed or edited under the same noise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def gumbel(seed: int, position: int, token_ids: NDArray[np.integer]) -> NDArray[np.float64]:
    """Standard Gumbel noise of each token at one position of one generation.

    ``argmax(logits + gumbel(...))`` is an exact sample of ``softmax(logits)`` (the Gumbel-max trick). A
    token's value does not depend on which other tokens are asked for.

    The generator is counter-based: SplitMix64 (Steele, Lea and Flood, 2014) read at an index. The seed
    selects a stream, its output at ``position`` another one, whose output at the token's id is the random
    word. The word's upper 53 bits, the last of them set, make a uniform number strictly between 0 and 1.
    Up to there all arithmetic is exact and equal on every machine; the two logarithms may differ between
    machines in the last place.

    Args:
        seed: of the generation, in ``[0, 2**64)``.
        position: of the token to be chosen, in ``[0, 2**64)``.
        token_ids: ``[n]`` non-negative ids.

    Returns:
        ``[n]`` float64, within ``(-3.7, 36.8)``.

    Raises:
        OverflowError: the seed or the position is out of range.
    """
    stream = np.zeros(1, np.uint64)
    for index in (seed, position):
        stream = _splitmix64(stream, np.array([index], np.uint64))
    words = _splitmix64(stream, token_ids.astype(np.uint64))
    words >>= np.uint64(11)
    words |= np.uint64(1)
    noise = words.astype(np.float64)
    noise *= 2.0**-53
    for _ in range(2):
        np.log(noise, out=noise)
        np.negative(noise, out=noise)
    return noise


def _splitmix64(seed: NDArray[np.uint64], index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Output number ``index`` of the SplitMix64 generator with this seed, modulo 2**64 throughout."""
    word = index + np.uint64(1)
    word *= np.uint64(0x9E3779B97F4A7C15)
    word += seed
    word ^= word >> np.uint64(30)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    word ^= word >> np.uint64(27)
    word *= np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return word
