"""Distils a next-word model of Python's manual, 30,522 words, whose logits are never whole; half a minute."""

import re
import zlib
from pydoc_data.topics import topics

import torch

from cudfast import FusedLinearCUDLoss, FusedLinearDUSLoss

VOCABULARY, LENGTH = 30_522, 33
torch.manual_seed(0)
words = re.findall(r"\w+|[^\w\s]", " ".join(topics.values()))
ids = torch.tensor([zlib.crc32(word.encode()) % VOCABULARY for word in words])  # a word is its hash
rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[torch.randperm(len(ids) // LENGTH)]


class Model(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, width)
        self.body = torch.nn.GRU(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.body(self.embedding(tokens))[0]  # type: ignore[no-any-return]  # (B, S, D): the loss has the head


def main() -> dict[str, float]:
    """Held-out perplexity of the teacher and of the student."""
    models, perplexity = {"teacher": Model(64), "student": Model(24)}, {}
    shape, distil, nll = FusedLinearDUSLoss(), FusedLinearCUDLoss(), FusedLinearCUDLoss(kd_weight=0.0, ce_weight=1.0)
    for name, model in models.items():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for batch in rows[100:2500].split(32):
            hidden, weight, labels = model(batch[:, :-1]), model.head.weight, batch[:, 1:]
            if name == "teacher":
                loss = shape(hidden, weight, labels)
            else:
                with torch.no_grad():
                    given = {"teacher_hidden": models["teacher"](batch[:, :-1])}
                loss = distil(hidden, weight, labels, teacher_weight=models["teacher"].head.weight.detach(), **given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            perplexity[name] = nll(model(rows[:100, :-1]), model.head.weight, rows[:100, 1:]).exp().item()
        print(f"{name}: held-out perplexity {perplexity[name]:.0f}")
    return perplexity


if __name__ == "__main__":
    main()
