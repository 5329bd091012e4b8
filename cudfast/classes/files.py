"""Safetensors files that are either complete or absent."""

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
    """Writes tensors to `path`. An existing file is replaced only when the new one is complete."""
    save_file = _safetensors("safetensors.numpy").save_file
    path = Path(path)
    content = {name: tensor.numpy(force=True) for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        partial.touch(exist_ok=False)  # raises an error if the directory is missing or not writable
        mode = partial.stat().st_mode
        save_file(content, partial, dict(metadata))
        partial.chmod(mode)  # safetensors may have created a file that only its owner can read
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], metadata: Mapping[str, str], make: Callable[[Callable[[str], Tensor]], T]) -> T:
    """The result of make(name -> tensor), on the CPU, for a file with that metadata. Errors of `make` name the file."""
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
