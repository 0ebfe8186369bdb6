"""Drafted sampling draws from the same distribution, and with one seed the same tokens."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.runtime.back import BackEngine
from isthmus.runtime.edge.model import EdgeModel
from isthmus.runtime.sampling import Sampler, Sampling
from isthmus.runtime.wire.security import ChannelSecurity

PROMPT = "Ab"

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**64 - 1),
)


@pytest.fixture(scope="module")
def models(repeating: Path, repeating_address: str) -> dict[str, EdgeModel]:
    security = ChannelSecurity(insecure=True)
    options: dict[str, Any] = {"server": repeating_address, "security": security, "threads": 1}
    return {codec: EdgeModel(repeating / "device", codec=codec, **options) for codec in ("raw32", "tabq")}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sampling=samplings, codec=st.sampled_from(["raw32", "tabq"]), draft=st.sampled_from(["ngram", "chain", "auto"]))
def test_one_seed_gives_the_same_tokens_drafted_and_undrafted(models, eager, sampling, codec, draft):
    model = models[codec]
    plain = model.generate(PROMPT, max_new_tokens=24, sampling=sampling, draft="off")
    assert model.generate(PROMPT, max_new_tokens=24, sampling=sampling, draft=draft).token_ids == plain.token_ids


def p_value(table: np.ndarray) -> float:
    """Of the chi-square test of homogeneity, by Wilson and Hilferty's normal approximation."""
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    statistic, degrees = float(((table - expected) ** 2 / expected).sum()), (table.shape[0] - 1) * (table.shape[1] - 1)
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.slow
def test_twenty_thousand_drafted_draws_have_the_undrafted_distribution(repeating: Path, record_property: Any) -> None:
    """The token after a guessed one, and the guessed one's own, verified in one step against sampled one by one."""
    engine = BackEngine.open(repeating / "server", threads=1)
    draws, rng = 20_000, np.random.default_rng(0)
    hidden = rng.standard_normal((2, engine.manifest.architecture.d_model), np.float32)
    draft_logits = rng.standard_normal(engine.manifest.architecture.vocab_size).astype(np.float32)
    counts = {drafted: Counter[int]() for drafted in (True, False)}
    accepted = 0
    for draw in range(draws):
        for drafted in (True, False):
            # Different noise for both, so that there are two samples to compare.
            sampling = Sampling(temperature=2.0, top_p=0.9, top_k=40, seed=2 * draw + drafted)
            session = engine.new_session(8, sampling)
            if drafted:
                session.advance(hidden)
                tokens = session.verify([Sampler(sampling).sample(draft_logits, 1)])
                accepted += len(tokens) == 2
            else:
                session.advance(hidden[:1])
                tokens = [session.sample()]
            counts[drafted][tokens[0]] += 1
    common = [token for token, count in (counts[True] + counts[False]).items() if count >= 20]
    p = p_value(np.array([[counts[drafted][token] for token in common] for drafted in (True, False)], float))
    record_property("p", p)  # 0.473 when it was written, and 9.5 % of the drafts right
    assert len(common) > 10
    assert accepted > 200
    assert p > 0.001
