"""How often everything is timed."""

from __future__ import annotations

import os

QUICK = os.environ.get("QUICK", "0") not in ("", "0")
LARGE = os.environ.get("LARGE", "0") not in ("", "0")
"""Also what takes minutes by itself."""
ROUNDS, SLOW_ROUNDS = (6, 2) if QUICK else (30, 3)
SMALL_ROUNDS, SMALL_WARM = (100 if QUICK else 300), 5
BUDGET = 3 if QUICK else 12
"""Seconds of one race, unless three rounds take longer."""
EVERY = ROUNDS // SLOW_ROUNDS
"""Peers far slower than the rest take part in every so many rounds."""
COMPILE = not QUICK
NOT_COMPILED = {} if COMPILE else {"torch.compile": "left out of a short run: compiling takes longer than racing"}
