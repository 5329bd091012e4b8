"""Tensors in safetensors files that are complete or not there."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def save(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """What was at `path` stays until the new file is complete."""
    save_file = _safetensors("safetensors.numpy").save_file
    path = Path(path)
    content = {name: tensor.numpy(force=True) for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        partial.touch(exist_ok=False)  # raises what a directory that is not there or not ours raises
        mode = partial.stat().st_mode
        save_file(content, partial, dict(metadata))
        partial.chmod(mode)  # safetensors may have replaced the file by one that only its owner reads
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], metadata: Mapping[str, str], make: Callable[[Callable[[str], Tensor]], T]) -> T:
    """make(name -> tensor), on the CPU, from a file with that metadata; what `make` refuses is the file's fault."""
    safetensors = _safetensors("safetensors")
    path = os.fspath(path)
    try:
        with open(path, "rb"), safetensors.safe_open(path, framework="pt") as file:
            found = {key: (file.metadata() or {}).get(key) for key in metadata}
            if found != metadata:
                raise ValueError(f"expected the metadata {metadata}, got {found}")
            return make(file.get_tensor)
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file that {metadata['format']}.save wrote: {error}") from error


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "saving and loading need safetensors: pip install cudfast[safetensors]", name="safetensors"
        ) from error
