"""Distils a next-word model over 30,522 words without ever holding its logits: `python -m examples.language_model`.

The text is the reference manual that Python carries with it; a word is its hash. About half a minute.
"""

from __future__ import annotations

import re
import time
import zlib
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from cudfast import FusedLinearCUDLoss, FusedLinearDUSLoss

VOCABULARY, LENGTH, BATCH = 30_522, 32, 32
words = re.findall(r"\w+|[^\w\s]", " ".join(topics.values()))
ids = torch.tensor([zlib.crc32(word.encode()) % VOCABULARY for word in words])
rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
held_out, training = rows[:100], rows[100:2500]


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(VOCABULARY, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.embedding(tokens))[0]
        return hidden  # (B, S, D): the loss multiplies by the head


shape, distil, nll = (
    FusedLinearDUSLoss(gamma=2.0),
    FusedLinearCUDLoss(),
    FusedLinearCUDLoss(kd_weight=0.0, ce_weight=1.0),
)


def train(model: Model, teacher: Model | None, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in (b for _ in range(epochs) for b in training[torch.randperm(len(training))].split(BATCH)):
        hidden, labels = model(batch[:, :-1]), batch[:, 1:]
        if teacher is None:
            loss = shape(hidden, model.head.weight, labels)
        else:
            with torch.no_grad():
                given = {"teacher_hidden": teacher(batch[:, :-1]), "teacher_weight": teacher.head.weight.detach()}
            loss = distil(hidden, model.head.weight, labels, **given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(epochs: int = 1) -> dict[str, float]:
    """Held-out perplexity of the teacher and of the student."""
    torch.manual_seed(0)
    models, found = {"teacher": Model(64), "student": Model(24)}, {}
    for name, model in models.items():
        start = time.perf_counter()
        train(model, models["teacher"] if name == "student" else None, epochs)
        with torch.no_grad():
            found[name] = nll(model(held_out[:, :-1]), model.head.weight, held_out[:, 1:]).exp().item()
        print(f"{name}: held-out perplexity {found[name]:.0f} after {time.perf_counter() - start:.0f} s")
    return found


if __name__ == "__main__":
    main()
