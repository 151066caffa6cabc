"""Which KV blocks are free. Block 0 is the sink for masked and padding rows: nobody owns it."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Ids 1 .. count-1 of one KV group. The caller keeps what it allocated and frees it once."""

    def __init__(self, count: int, block_size: int) -> None:
        if count < 2 or block_size < 1:
            raise ValueError(f"a pool needs two blocks of at least one token, not {count} of {block_size}")
        self.total = count - 1
        self.block_size = block_size
        self._free = list(range(self.total, 0, -1))
        self._used: set[int] = set()

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def used_count(self) -> int:
        return len(self._used)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the most recently freed first. ValueError when there are fewer."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} are free")
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        self._used.update(taken)
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back. ValueError for one that is not in use."""
        for block in blocks:
            if block not in self._used:
                raise ValueError(f"block {block} is not in use")
            self._used.remove(block)
            self._free.append(block)

    def check(self) -> None:
        """RuntimeError unless every block is free or used, exactly once."""
        free = set(self._free)
        whole = set(range(1, self.total + 1))
        if len(free) != len(self._free) or free & self._used or free | self._used != whole:
            raise RuntimeError(
                f"of {self.total} blocks {len(self._free)} are free and {len(self._used)} used"
            )
