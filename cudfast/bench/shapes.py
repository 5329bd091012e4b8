"""N rows of V classes, and typical tasks that have them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """N rows of V classes, and a task that has them.

    Example:
        >>> print(SHAPES["Llama 2"])
        512 x 32,000
    """

    rows: int
    classes: int
    used_by: str = ""

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.classes:,}"

    @property
    def small(self) -> bool:
        """Whether Python overhead dominates the time of a call."""
        return self.rows * self.classes < 1 << 16


SHAPES = {
    "Banking77": Shape(32, 77, "a batch of Banking77, intents of bank customers"),
    "ImageNet": Shape(256, 1_000, "a batch of ImageNet-1k"),
    "Llama 2": Shape(512, 32_000, "tokens of a vocabulary as Llama 2's or Mistral's"),
    "Llama 3": Shape(128, 128_256, "tokens of Llama 3's vocabulary"),
    "Qwen": Shape(112, 151_936, "tokens of Qwen 2.5's vocabulary"),
    "Gemma": Shape(64, 262_144, "tokens of Gemma 3's vocabulary"),
    "Amazon-3M": Shape(6, 2_812_281, "products of Amazon-3M, extreme classification"),
    "10M": Shape(2, 10_000_000, "ten million identities, as in face recognition"),
    "100M": Shape(1, 100_000_000, "a hundred million identities"),
}
"""By name. Llama 2 to 10M have about equally many logits (N V = 16 to 20 million), in rows of different lengths."""
