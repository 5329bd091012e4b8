"""How often everything is timed."""

from __future__ import annotations

import os

QUICK = os.environ.get("QUICK", "0") not in ("", "0")
LARGE = os.environ.get("LARGE", "0") not in ("", "0")
"""Also what takes minutes by itself."""
ROUNDS = 6 if QUICK else 30
SMALL_ROUNDS, SMALL_WARM = (100 if QUICK else 300), 5
COMPILE = not QUICK
NOT_COMPILED = {} if COMPILE else {"torch.compile": "left out of a short run: compiling takes longer than racing"}
