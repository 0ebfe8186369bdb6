"""Speed over a file of prompts, drafted and undrafted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from ...errors import RequestError
from ..sampling import Sampling
from .model import EdgeModel, Prompt
from .options import DraftMode
from .stream import Generation

Progress = Callable[[str, int, int], None]  # what, prompts done, prompts in all


@dataclass(frozen=True)
class PromptRun:
    """One prompt: what its generation took, and the same without drafts if that was asked for.

    Attributes:
        tokens_per_s: of the tokens after the first.
        exited: tokens that the device took without asking the server.
        identical: whether both gave the same tokens.
    """

    prompt_tokens: int
    new_tokens: int
    tokens_per_s: float
    ttft_ms: float
    round_trips: int
    drafted: int
    accepted: int
    exited: int = 0
    mean_layers: float | None = None
    undrafted_tokens_per_s: float | None = None
    identical: bool | None = None


@dataclass(frozen=True)
class PromptReport:
    """What `bench_prompts` measured.

    Attributes:
        tried: guesses whose turn came, by their place after the last confirmed token.
        right: of them, those that were right.
    """

    runs: tuple[PromptRun, ...]
    tried: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def tokens_per_s(self) -> float:
        """Median over the prompts."""
        return median(run.tokens_per_s for run in self.runs)

    @property
    def undrafted_tokens_per_s(self) -> float | None:
        """Median over the prompts, without drafts."""
        speeds = [run.undrafted_tokens_per_s for run in self.runs if run.undrafted_tokens_per_s is not None]
        return median(speeds) if speeds else None

    @property
    def ratio(self) -> float | None:
        """Drafted speed over undrafted: the median of the prompts' own ratios."""
        ratios = [run.tokens_per_s / run.undrafted_tokens_per_s for run in self.runs if run.undrafted_tokens_per_s]
        return median(ratios) if ratios else None

    @property
    def tokens_per_round_trip(self) -> float | None:
        """Over all prompts; None if there was no link."""
        trips = sum(run.round_trips for run in self.runs)
        return sum(run.new_tokens for run in self.runs) / trips if trips else None

    @property
    def identical(self) -> bool | None:
        """Whether all prompts gave the same tokens drafted and undrafted; None if that was not asked for."""
        compared = [run.identical for run in self.runs if run.identical is not None]
        return all(compared) if compared else None

    def to_dict(self) -> dict[str, Any]:
        """The form that ``isthmus bench --prompts --json`` prints."""
        return {
            "tokens_per_s": self.tokens_per_s,
            "undrafted_tokens_per_s": self.undrafted_tokens_per_s,
            "ratio": self.ratio,
            "tokens_per_round_trip": self.tokens_per_round_trip,
            "drafted": sum(run.drafted for run in self.runs),
            "accepted": sum(run.accepted for run in self.runs),
            "exited": sum(run.exited for run in self.runs),
            "acceptance_by_place": [
                right / tried if tried else None for right, tried in zip(self.right, self.tried, strict=True)
            ],
            "identical": self.identical,
            "prompts": [asdict(run) for run in self.runs],
        }


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file, one a line: plain text, or JSON with ``prompt`` (a text) or ``messages`` (a chat).

    Raises:
        RequestError: the file cannot be read, holds no prompt, or a line that is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{path}: cannot be read as UTF-8 text ({error}); give a file with one prompt a line"
        ) from error
    prompts = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise RequestError(f"{path}: holds no prompt; give at least one line")
    return prompts


def _prompt(path: str | Path, number: int, line: str) -> Prompt:
    if not line.lstrip().startswith("{"):
        return line
    try:
        entry = json.loads(line)
        if "messages" in entry:
            return [{"role": str(each["role"]), "content": str(each["content"])} for each in entry["messages"]]
        return str(entry["prompt"])
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f'{path}, line {number}: no prompt ({error!r}); write plain text, {{"prompt": …}} or {{"messages": […]}}'
        ) from error


def bench_prompts(
    model: EdgeModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    vs_undrafted: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> PromptReport:
    """Generate after each prompt, with the model's own way of drafting.

    Args:
        model: opened; the first prompt runs once more before, to warm up.
        prompts: see `read_prompts`.
        max_new_tokens: after each.
        sampling: greedy by default.
        vs_undrafted: generate without drafts, and exits, as well, in turn before and after, and compare.
        progress: called after each prompt.

    Raises:
        RequestError: a prompt is empty or too long.
        LinkError: the server cannot be reached or the link is lost.
    """

    def generate(prompt: Prompt, drafted: bool) -> Generation:
        draft: DraftMode | None = None if drafted else "off"
        return model.generate(prompt, max_new_tokens=max_new_tokens, sampling=sampling, draft=draft)

    model.generate(prompts[0], max_new_tokens=min(max_new_tokens, 16))
    runs: list[PromptRun] = []
    tried: list[int] = []
    right: list[int] = []
    for number, prompt in enumerate(prompts):
        first_drafted = number % 2 == 0
        order = (first_drafted, not first_drafted) if vs_undrafted else (True,)
        results = {drafted: generate(prompt, drafted) for drafted in order}
        drafted, plain = results[True], results.get(False)
        runs.append(
            PromptRun(
                prompt_tokens=drafted.prompt_tokens,
                new_tokens=drafted.new_tokens,
                tokens_per_s=drafted.decode_tokens_per_s,
                ttft_ms=drafted.ttft_ms,
                round_trips=drafted.round_trips,
                drafted=drafted.drafts.drafted,
                accepted=drafted.drafts.accepted,
                exited=drafted.exited,
                mean_layers=drafted.mean_layers,
                undrafted_tokens_per_s=plain.decode_tokens_per_s if plain is not None else None,
                identical=drafted.token_ids == plain.token_ids if plain is not None else None,
            )
        )
        tried = [sum(pair) for pair in zip_longest(tried, drafted.drafts.tried, fillvalue=0)]
        right = [sum(pair) for pair in zip_longest(right, drafted.drafts.right, fillvalue=0)]
        progress("prompts", number + 1, len(prompts))
    return PromptReport(tuple(runs), tuple(tried), tuple(right))
