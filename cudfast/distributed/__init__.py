"""The losses with classes sharded over a process group; each rank holds consecutive classes."""

from ..rows.shard import Shard
from .reshard import reshard

__all__ = ["Shard", "reshard"]
