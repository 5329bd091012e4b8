"""The classes of this process if the classes are sharded over several processes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist


def resolved(name: str) -> Any:
    """The process group with this name."""
    return importlib.import_module("torch.distributed.distributed_c10d")._resolve_process_group(name)


@dataclass(frozen=True)
class Shard:
    """The shard of the classes that this process has.

    Args:
        group: name of a process group: `process_group.group_name`.
        class_offset: the first class of this rank, or None: the shards are in the order of the ranks.
        classes: total number of classes, if an argument of the call gives it.

    Example:
        >>> Shard("default", class_offset=1000)
        Shard(group='default', class_offset=1000, classes=None)
    """

    group: str
    class_offset: int | None = None
    classes: int | None = None

    @staticmethod
    def of(process_group: Any, class_offset: int | None = None) -> Shard | None:
        """The shard from a loss's arguments; None without a group.

        Raises:
            TypeError, ValueError: not a process group, or one that this process is not in, or an invalid offset.
        """
        if process_group is None:
            if class_offset is not None:
                raise ValueError(f"class_offset={class_offset} without process_group: expected both, or neither")
            return None
        if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"process_group: expected a torch.distributed.ProcessGroup that this process is in (dist.group.WORLD, "
                f"dist.new_group(...), mesh.get_group(...)), got {type(process_group).__name__}"
            )
        if class_offset is not None:
            if isinstance(class_offset, bool) or not isinstance(class_offset, int):
                raise TypeError(f"class_offset: expected an int, got {type(class_offset).__name__}")
            if class_offset < 0:
                raise ValueError(f"class_offset={class_offset}: expected the first class of this rank, >= 0")
        return Shard(process_group.group_name, class_offset)

    @property
    def process_group(self) -> Any:
        """The group itself."""
        return resolved(self.group)

    @property
    def text(self) -> str:
        """The form in which a torch.library op takes it."""
        return f"{self.group} {self.class_offset} {self.classes}"

    @staticmethod
    def parsed(text: str) -> Shard | None:
        """Inverse of `text`; None for ""."""
        if not text:
            return None
        group, *numbers = text.rsplit(" ", 2)
        return Shard(group, *(None if number == "None" else int(number) for number in numbers))

    def of_all(self, classes: int) -> Shard:
        """The same shard with the total number of classes, from an argument of the call."""
        return replace(self, classes=classes)
