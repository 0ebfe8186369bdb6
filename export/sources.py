"""From what a user calls a model to files on this machine."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import cast

from ..errors import ModelError
from .catalog import CATALOG, cached_path, pull
from .progress import Progress, silent

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja")
# The same weights once more, in other layouts.
_HUB_EXTRAS = ("original/*", "consolidated*", "onnx/*")


def resolve_model(model: str, *, cache: Path | None = None, offline: bool = False, progress: Progress = silent) -> Path:
    """Find a model, and fetch it where that is needed.

    Args:
        model: a checkpoint directory, a ``.gguf`` file, a name of the catalog, or a hub id ``owner/name``.
        cache: cache folder for downloads; by default `cache_root`'s, and the hub's own for a hub id.
        offline: use what is on this machine only.
        progress: called while a catalog model is downloaded.

    Returns:
        What `open_checkpoint` takes.

    Raises:
        ModelError: no such model, or it cannot be fetched.
    """
    path = Path(model).expanduser()
    # The empty string would be the current folder.
    if model and path.exists():
        return path
    if model in CATALOG:
        if not offline:
            return pull(model, cache=cache, progress=progress)
        if found := cached_path(model, cache=cache):
            return found
        raise ModelError(f"{model}: not in the cache; run `isthmus pull {model}` once with a network")
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(model):
        return _from_hub(model, cache, offline)
    close = difflib.get_close_matches(model.lower(), CATALOG, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the catalog holds {', '.join(sorted(CATALOG))}"
    raise ModelError(f"{model!r}: no such directory or .gguf file, not in the catalog, no hub id (owner/name); {hint}")


def _from_hub(model: str, cache: Path | None, offline: bool) -> Path:
    """Fetch a repository of the hub: its safetensors, or else its only GGUF file."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = cache / "hub" if cache else None
    # Which HTTP library can fail depends on the hub's version; the base of its own error tells.
    http_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        snapshot = Path(
            snapshot_download(
                model,
                cache_dir=folder,
                local_files_only=offline,
                allow_patterns=list(_HUB_FILES),
                ignore_patterns=list(_HUB_EXTRAS),
            )
        )
        if any(snapshot.glob("*.safetensors")):
            return snapshot
        listing = [p.name for p in snapshot.iterdir()] if offline else HfApi().list_repo_files(model)
        files = [name for name in listing if name.endswith(".gguf")]
        if len(files) == 1:
            return Path(hf_hub_download(model, files[0], cache_dir=folder, local_files_only=offline))
    except (OSError, HFValidationError, http_error) as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ModelError(
            f"{model}: no such directory, not in the catalog, and not {'cached' if offline else 'delivered'} "
            f"from the hub ({reason}); check the name, the network and your access"
        ) from error
    raise ModelError(
        f"{model}: no safetensors and {len(files)} GGUF files in this hub repository "
        f"({', '.join(files[:8])}); download one of them and give its path"
    )
