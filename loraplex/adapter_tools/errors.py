"""How a command says that it did not do what was asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

REFUSED = 1
"""Exit code: the adapter, or the server that was asked, said no."""
UNUSABLE = 2
"""Exit code: the command line, the base model or the source cannot be used."""


class ToolFailed(Exception):
    """A command ends without its result. `code` is its exit code, the message one line for the user."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def reported(subject: str) -> Iterator[None]:
    """Turn what a shard's code refuses inside the block into ToolFailed naming `subject`."""
    from ..shard.errors import AdapterRejected, ShardError
    from .text import printable

    try:
        yield
    except AdapterRejected as error:
        raise ToolFailed(REFUSED, printable(f"adapter {subject} is refused: {error}")) from error
    except ShardError as error:
        raise ToolFailed(UNUSABLE, printable(f"{subject}: {error}")) from error
