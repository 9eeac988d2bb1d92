"""Training data: text, JSON Lines, Parquet, hub data sets and built-in corpora become packed token blocks.

Importing this package is cheap: torch, datasets and transformers are imported when data is loaded.
"""

from typing import Any

from .spec import BUILTIN_CORPORA, DataSpec, Document

__all__ = ["BUILTIN_CORPORA", "DataSpec", "Document", "load_blocks"]


def load_blocks(
    spec: DataSpec, tokenizer: Any, block_size: int, world_size: int = 1, cache_dir: str | None = None,
    positions: bool = True,
) -> tuple[Any, Any, dict[str, Any]]:
    """(training blocks, evaluation blocks or None, facts for the manifest); see `loading.load_blocks`."""
    from .loading import load_blocks as load

    return load(spec, tokenizer, block_size, world_size, cache_dir, positions)
