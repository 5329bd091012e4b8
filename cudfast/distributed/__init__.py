"""The losses over a process group whose ranks hold consecutive classes."""

from .group import Shard

__all__ = ["Shard"]
