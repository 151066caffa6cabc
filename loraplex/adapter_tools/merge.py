"""`loraplex adapters merge`: several adapters into a new one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..shard.adapters.files import WEIGHTS, FileLimits
from ..shard.adapters.merging.merge import MergeInput, merge_adapters
from ..shard.adapters.merging.recipe import MergeRecipe
from .errors import reported
from .output import new_directory
from .parts import parse_part
from .progress import download_bar
from .sources import bring
from .text import printable, size


def merge(target: Path, texts: Sequence[str], recipe: MergeRecipe) -> None:
    """Write the merge of the adapters that `texts` name to the new directory `target`.

    Raises ToolFailed where they cannot be had or merged.
    """
    inputs = [
        MergeInput(bring(part.source).directory, part.weight, part.source) for part in map(parse_part, texts)
    ]
    written = 0
    with new_directory(target) as draft, reported(str(target)), download_bar(target.name) as report:

        def on_written(count: int, total: int) -> None:
            nonlocal written
            written += count
            report(written, total)

        merge_adapters(inputs, recipe, draft, FileLimits(), on_written)
    print(printable(f"{target / WEIGHTS}: {recipe.method} of {len(inputs)}, {size(written)}"))
