"""The losses over a process group whose ranks hold consecutive classes."""

from ..rows.shard import Shard
from .reshard import reshard

__all__ = ["Shard", "reshard"]
