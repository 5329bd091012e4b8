"""The layout of the classes over the ranks of a process group, and the messages between ranks.

Before any states are merged, every rank sends a description of its arguments, HEADER bytes. If the descriptions are
incompatible, all ranks raise the same error, which names a rank that differs. If a rank's arguments are invalid, it
sends its error instead, so that the other ranks raise, too, and do not wait for it.
"""

from __future__ import annotations

import functools
import json
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..rows.shard import Shard, resolved

HEADER = 1024  # bytes of a header: the options as text, and a description of the arguments
_PATIENCE = 5.0  # seconds, the longest wait for the detection of a broken connection


class telling:  # noqa: N801 (used as a statement)
    """Context for the checks of arguments: their error is also sent to the other ranks, which wait for a header."""

    def __init__(self, shard: Shard | None) -> None:
        self._shard = shard

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if self._shard is None or torch.compiler.is_compiling() or not isinstance(error, Exception):
            return
        if not getattr(error, "every_rank_has_it", False):
            _Headers(self._shard, {"error": f"{type(error).__name__}: {error}"}).tell()


class Layout(NamedTuple):
    """The classes of each rank."""

    first: int  # of this rank
    total: int
    sizes: list[int]  # of every rank


def _name(group: Any, rank: int) -> str:
    everywhere = dist.get_global_rank(group, rank)
    return f"rank {rank}" if everywhere == rank else f"rank {rank} of the group (rank {everywhere} of all)"


def _is_gloo(group: Any, device: torch.device) -> bool:
    return f"{device.type}:gloo" in dist.get_backend_config(group)


def lost(group: Any, device: torch.device, error: Exception) -> RuntimeError:
    """The error of a collective that failed, with the ranks whose connections are closed."""
    gone = []
    if _is_gloo(group, device):
        pending: dict[int, Any] = {}
        place = torch.empty(1, device=device)
        for rank in range(dist.get_world_size(group)):
            if rank == dist.get_rank(group):
                continue
            try:
                pending[rank] = dist.irecv(
                    place, dist.get_global_rank(group, rank), group=group, tag=dist.get_rank(group)
                )
            except RuntimeError:
                gone.append(rank)
        end = time.monotonic() + _PATIENCE
        while not gone and time.monotonic() < end:
            time.sleep(0.05)
            gone = [rank for rank, work in pending.items() if work.is_completed()]
    names = ", ".join(_name(group, rank) for rank in gone)
    who = (
        f"{names} cannot be reached any more" if gone else "the group's timeout has passed, or a rank cannot be reached"
    )
    return RuntimeError(
        f"an exchange of {dist.get_world_size(group)} ranks failed in {_name(group, dist.get_rank(group))}: {who}. A "
        f"rank that died, ended with an error or did not call the loss is the cause; see its log. ({error})"
    )


def gather(group: Any, message: Tensor) -> Tensor:
    """(R, ...) the messages of all ranks, with the same shape and dtype on every rank.

    Raises:
        RuntimeError: a rank cannot be reached; the error names it.
    """
    return Gathering(group, message).wait()


def as_bytes(columns: Tensor, index: Tensor | None = None) -> Tensor:
    """(..., bytes) one message of columns (..., C) and an int64 index (...)."""
    message = columns.view(torch.uint8)
    return message if index is None else torch.cat([message, index.unsqueeze(-1).view(torch.uint8)], -1)


def from_bytes(message: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Inverse of `as_bytes` for `count` columns of that dtype."""
    width = count * dtype.itemsize

    def cut(part: Tensor, as_dtype: torch.dtype) -> Tensor:
        return part.clone(memory_format=torch.contiguous_format).view(as_dtype)  # of no rows, contiguous() is a view

    columns = cut(message[..., :width], dtype)
    return columns, cut(message[..., width:], torch.int64).squeeze(-1) if message.shape[-1] > width else None


def reduce(group: Any, x: Tensor) -> Tensor:
    """Sums x over the ranks, in place; the result is bitwise equal on all of them."""
    try:
        dist.all_reduce(x, group=group)
    except RuntimeError as error:
        raise lost(group, x.device, error) from error
    return x


def scattered(group: Any, parts: list[Tensor]) -> Tensor:
    """The sum over the ranks of their parts for this rank; all parts have one shape."""
    mine = torch.empty_like(parts[0])
    try:
        dist.reduce_scatter(mine, parts, group=group)
    except RuntimeError as error:
        raise lost(group, mine.device, error) from error
    return mine


class Gathering:
    """A `gather` in progress."""

    def __init__(self, group: Any, message: Tensor) -> None:
        self._group, self._message = group, message.contiguous()
        self._all = message.new_empty((dist.get_world_size(group), *message.shape))
        try:
            self._work = dist.all_gather(list(self._all.unbind(0)), self._message, group=group, async_op=True)
        except RuntimeError as error:
            raise lost(group, message.device, error) from error

    def wait(self) -> Tensor:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise lost(self._group, self._message.device, error) from error
        return self._all


class _Headers:
    """This rank's header, and its exchange with the other ranks: on the CPU if the group has a CPU backend, since the
    host reads the headers."""

    def __init__(self, shard: Shard, given: dict[str, Any]) -> None:
        self._group = shard.process_group
        text = json.dumps(given).encode()
        if "error" in given:
            text = json.dumps({"error": given["error"].encode("ascii", "replace").decode()[: HEADER - 200]}).encode()
        elif len(text) > HEADER:
            raise ValueError(
                f"the header of this call takes {len(text)} bytes, more than {HEADER}: flatten leading axes"
            )
        self._text = torch.frombuffer(bytearray(text.ljust(HEADER)), dtype=torch.uint8)

    def _sent(self, device: torch.device) -> Gathering:
        by_host = "cpu:" in dist.get_backend_config(self._group)
        return Gathering(self._group, self._text if by_host else self._text.to(device))

    def tell(self) -> None:
        config = dist.get_backend_config(self._group)
        self._sent(torch.device("cpu" if "cpu:" in config else config.partition(":")[0])).wait()

    def ask(self, device: torch.device) -> Agreement:
        return Agreement(self._group, self._sent(device))


class Agreement(NamedTuple):
    """An exchange of headers in progress."""

    group: Any
    gathering: Gathering

    def wait(self) -> Layout:
        """The layout of the classes.

        Raises:
            ValueError: the ranks' arguments are incompatible. RuntimeError: the arguments of a rank are invalid, or it
                cannot be reached.
        """
        try:
            headers = self.gathering.wait().cpu().numpy().tobytes()
            return _layout(headers, dist.get_rank(self.group), self.group.group_name)
        except (ValueError, RuntimeError) as error:
            error.every_rank_has_it = True  # type: ignore[union-attr]
            raise


def ask(shard: Shard, device: torch.device, given: dict[str, Any], *, empty: bool = False) -> Agreement:
    """Sends this rank's header. given: "classes" (of this rank) and all values that must be the same on every rank.

    empty: the total number of classes may be 0.
    """
    mine = {"classes": given["classes"], "offset": shard.class_offset, "empty": empty}
    alike = {"classes in all": shard.classes, **{key: value for key, value in given.items() if key != "classes"}}
    return _Headers(shard, {"mine": mine, "alike": alike}).ask(device)


@functools.lru_cache(maxsize=64)
def _layout(headers: bytes, rank: int, group_name: str) -> Layout:
    group = resolved(group_name)
    said = [json.loads(headers[i : i + HEADER]) for i in range(0, len(headers), HEADER)]
    for other, header in enumerate(said):
        if "error" in header:
            raise RuntimeError(f"{_name(group, other)} refused its arguments, so every rank stops: {header['error']}")
    for other, header in enumerate(said):
        for key, value in header["alike"].items():
            if value != (expected := said[0]["alike"].get(key)):
                raise ValueError(
                    f"{_name(group, other)} was given {key} = {value}, and {_name(group, 0)} {expected}: expected the "
                    "same on every rank of process_group"
                )
    first = _firsts(group, [header["mine"] for header in said])
    total = sum(header["mine"]["classes"] for header in said)
    if total == 0 and not said[0]["mine"]["empty"]:
        raise ValueError("no rank of process_group has a class: expected logits (..., V_r) with at least one in all")
    expected = said[0]["alike"].get("classes in all")
    if expected is not None and expected != total:
        raise ValueError(
            f"the ranks of process_group hold {total} classes in all, and alpha or sets are for {expected}"
        )
    return Layout(first[rank], total, [header["mine"]["classes"] for header in said])


def _firsts(group: Any, said: list[dict[str, Any]]) -> list[int]:
    """The first class of every rank."""
    widths, offsets = [s["classes"] for s in said], [s["offset"] for s in said]
    if all(offset is None for offset in offsets):
        return [sum(widths[:rank]) for rank in range(len(widths))]
    for rank, offset in enumerate(offsets):
        if offset is None:
            with_one = next(r for r, o in enumerate(offsets) if o is not None)
            raise ValueError(
                f"{_name(group, with_one)} gave class_offset={offsets[with_one]}, and {_name(group, rank)} none: "
                "expected it on every rank, or on none"
            )
    end, before = 0, "0 is the first"
    for offset, rank in sorted((o, r) for r, o in enumerate(offsets) if widths[r]):
        if offset != end:
            raise ValueError(
                f"{_name(group, rank)} gave class_offset={offset}, but {before}: expected class_offset={end}, so that "
                "the ranks hold every class once"
            )
        end = offset + widths[rank]
        before = f"{_name(group, rank)} holds the classes [{offset}, {end})"
    return offsets
