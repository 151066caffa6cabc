"""A directory of results that is there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UNUSABLE, ToolFailed


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends well and vanishes when it does not.

    Raises ToolFailed where something is there already or nothing can be written.
    """
    if target.exists() or target.is_symlink():
        raise ToolFailed(UNUSABLE, f"{target} is there already; name a new directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ToolFailed(UNUSABLE, f"{target} cannot be written: {error.strerror}") from error
    try:
        yield draft
        draft.chmod(0o755)
        draft.rename(target)
    except OSError as error:
        raise ToolFailed(UNUSABLE, f"{target} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
