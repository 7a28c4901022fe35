"""Files in JSON: written as a whole or not at all, read with a clear error."""

from __future__ import annotations

import json
import os
import uuid
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import LazyEinsumError


def write_whole(path: str | PathLike[str], text: str) -> None:
    """Write a file such that whoever reads it meanwhile, or writes it too, finds either all of it or what was there.

    Raises:
        OSError: it can't be written.
    """
    file = Path(path)
    other = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        other.write_text(text, encoding="utf-8")
        os.replace(other, file)
    finally:
        other.unlink(missing_ok=True)


def read_json(path: str | PathLike[str], kind: type[LazyEinsumError], what: str, remedy: str) -> Any:
    """The data in a file.

    Args:
        path: of the file.
        kind: of the error that is raised.
        what: is to be read.
        remedy: what to do where that fails.

    Raises:
        kind: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise kind(f"no {what} can be read from {os.fspath(path)!r} ({error}); {remedy}") from None
