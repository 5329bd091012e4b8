"""Imports of optional frameworks."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """The module, or an ImportError that names the extra to install.

    Example:
        >>> require("json", "transformers").dumps([])
        '[]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(
            f"cudfast.integrations.{extra} needs {name}, which does not load ({error}): "
            f"install it with pip install 'cudfast[{extra}]'"
        ) from error
