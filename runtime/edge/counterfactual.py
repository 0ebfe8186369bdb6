"""What the text would have been if one token had been another, under the same noise.

Source: counterfactual token generation (arXiv 2409.17027), which fixes the Gumbel noise of a generation and edits its
tokens. Here the noise is a function of seed and position, so that a text goes on from an edited beginning with the
noise that it had.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import RequestError
from ..sampling import Sampling
from .model import EdgeModel
from .stream import Generation


@dataclass(frozen=True)
class RecordedRun:
    """A generation as ``isthmus generate --json`` printed it."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampling: Sampling
    manifest_sha256: str


def read_run(path: str | Path) -> RecordedRun:
    """Read a recorded generation.

    Raises:
        RequestError: the file cannot be read, is none, or the full model did not write it.
    """
    try:
        data = json.loads(Path(path).read_bytes())
        run = RecordedRun(
            tuple(map(int, data["prompt_ids"])),
            tuple(map(int, data["token_ids"])),
            Sampling(**data["sampling"]),
            str(data["manifest_sha256"]),
        )
        partial = [key for key in ("skip_schedule", "ffn_skip", "exited") if data.get(key)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{path}: no recorded run ({error!r}); give what `isthmus generate --json` printed"
        ) from error
    if partial:
        raise RequestError(
            f"{path}: the full model repeats a run, and did not write all of this one ({', '.join(partial)}); record "
            "one with neither skipping nor exits"
        )
    return run


def regenerate(
    model: EdgeModel, run: RecordedRun, replace: Mapping[int, int], *, max_new_tokens: int = 256
) -> Generation:
    """Generate a recorded text again, with its noise, but other tokens at some positions.

    Args:
        model: the one that wrote it: another machine or codec may do, another export may not.
        run: the recorded generation.
        replace: position in the generated text, from 0, to the token that stands there.
        max_new_tokens: of the whole text.

    Returns:
        The whole text with its ids; the tokens' costs are those after the last replaced one.

    Raises:
        RequestError: the run is of another export, or a position or token does not exist.
        LinkError: see `EdgeModel.generate`.
    """
    if run.manifest_sha256 != model.manifest_sha256:
        raise RequestError(
            f"the run is of export {run.manifest_sha256[:12]}, this bundle is {model.manifest_sha256[:12]}: the same "
            "noise means nothing to another model; use the bundle that wrote the run"
        )
    written: list[int] = list(run.token_ids[: min(replace, default=0)])
    for position, token in sorted(replace.items()):
        if not 0 <= position < max_new_tokens - 1 or min(replace) > len(run.token_ids):
            raise RequestError(
                f"position {position}: must lie in the run's {len(run.token_ids)} tokens, and before the last of "
                f"{max_new_tokens} new ones"
            )
        missing = position - len(written)
        if missing:
            between = model.generate([*run.prompt_ids, *written], max_new_tokens=missing, sampling=run.sampling)
            written += between.token_ids
        if len(written) < position or (written and written[-1] in model.manifest.end_tokens):
            raise RequestError(
                f"position {position}: the text ends after {len(written)} tokens; replace an earlier one"
            )
        written.append(token)
    rest = model.generate(
        [*run.prompt_ids, *written], max_new_tokens=max_new_tokens - len(written), sampling=run.sampling
    )
    ids = [*written, *rest.token_ids]
    return dataclasses.replace(
        rest,
        token_ids=ids,
        text=model.tokenizer.decode([token for token in ids if token not in model.manifest.end_tokens]),
        prompt_ids=list(run.prompt_ids),
        prompt_tokens=len(run.prompt_ids),
    )
