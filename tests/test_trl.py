"""The losses in TRL's trainers: steps against steps by hand, labels, accumulation, and errors."""

from __future__ import annotations

import copy
import os
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from cudfast import CUDLoss, FusedLinearCUDLoss
from cudfast.integrations.trl import Labels, cud_trainer

from .trainers import ONE_STEP, close, moved, qwen

LABELS = pytest.mark.parametrize("labels", ["sampled", "teacher", None])
KINDS = {GKDTrainer: GKDConfig, GOLDTrainer: GOLDConfig, DistillationTrainer: DistillationConfig}


def tokenizer() -> Any:
    """A letter is a token; of byte level, which is what GOLD reads."""
    letters = {letter: 3 + i for i, letter in enumerate(string.ascii_letters + "Ġ")}
    made = Tokenizer(models.BPE({"<pad>": 0, "<eos>": 1, "<unk>": 2, **letters}, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )


def chats(rows: int = 16) -> Dataset:
    """A question and an answer each, of lengths that differ."""

    def word(length: int) -> str:
        return "".join(string.ascii_letters[i] for i in torch.randint(52, (length,)).tolist())

    pairs = [(word(2 + row % 3), word(3 + row % 4)) for row in range(rows)]
    roles = ("user", "assistant")
    return Dataset.from_list(
        [{"messages": [{"role": role, "content": text} for role, text in zip(roles, pair)]} for pair in pairs]
    )


def made(
    trainer: Any, loss: Any, labels: Labels, student: Any, teacher: Any, data: Dataset, folder: Path, **changes: Any
) -> Any:
    args = {
        "output_dir": str(folder),
        **ONE_STEP,
        "bf16": False,
        "gradient_checkpointing": False,
        **({} if trainer is DistillationTrainer else {"lmbda": 0.0, "max_length": 32}),
        **({} if trainer is GKDTrainer else {"max_completion_length": 5}),
        **changes,
    }
    return cud_trainer(trainer, loss, labels=labels)(
        model=student,
        teacher_model=teacher,
        args=KINDS[trainer](**args),
        train_dataset=data,
        processing_class=tokenizer(),
    )


def by_hand(student: Any, teacher: Any, labels: Labels, ids: Tensor, mask: Tensor, sampled: Tensor) -> Any:
    """A copy of the student after one step on labels (B, S) that are -100 where nothing counts."""
    student = copy.deepcopy(student)
    logits = student(input_ids=ids, attention_mask=mask).logits[:, :-1]
    with torch.no_grad():
        target = teacher(input_ids=ids, attention_mask=mask).logits[:, :-1]
    chosen = {"sampled": sampled, "teacher": target.argmax(-1), None: torch.full_like(sampled, -1)}[labels]
    counts = sampled != -100
    CUDLoss()(logits[counts], target[counts], chosen[counts], num_items=counts.sum()).backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= 0.1 * p.grad
    return student


@LABELS
@pytest.mark.parametrize("trainer", [GKDTrainer, GOLDTrainer])
def test_a_step_of_logits_is_the_step_by_hand(trainer: Any, labels: Labels, tmp_path: Path) -> None:
    student, teacher, data = qwen(0), qwen(1, hidden=32).eval(), chats()
    before = copy.deepcopy(student)
    found = made(trainer, CUDLoss(), labels, student, teacher, data, tmp_path)
    batch = found.data_collator(list(data))
    wanted = by_hand(before, teacher, labels, batch["input_ids"], batch["attention_mask"], batch["labels"][:, 1:])
    found.train()
    close(student, wanted)
    assert moved(student, before)


@LABELS
@pytest.mark.parametrize("kind", ["Qwen2", "Gemma2"])  # plain; a soft cap
def test_a_step_of_hidden_states_is_the_step_by_hand(labels: Labels, kind: str, tmp_path: Path) -> None:
    config = {"final_logit_softcapping": 3.0} if kind == "Gemma2" else {}
    student, teacher = qwen(0, kind=kind, **config), qwen(1, hidden=32, kind=kind, **config).eval()
    data = chats().map(lambda row: {"prompt": row["messages"][:1]}, remove_columns="messages")
    before, batches = copy.deepcopy(student), []
    found = made(DistillationTrainer, FusedLinearCUDLoss(), labels, student, teacher, data, tmp_path)
    inner = found._compute_loss

    def watched(model: Any, inputs: dict[str, Any], items: Any) -> Any:
        batches.append(inputs)
        return inner(model, inputs, items)

    found._compute_loss = watched
    found.train()
    (batch,) = batches
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    counts = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
    wanted = by_hand(before, teacher, labels, ids, mask, ids.where(counts > 0, -100)[:, 1:])
    close(student, wanted, 2e-6)
    assert moved(student, before)
    logits = before(input_ids=ids, attention_mask=mask).logits[:, :-1][counts[:, 1:] > 0]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert next(log["entropy"] for log in found.state.log_history if "entropy" in log) == pytest.approx(
        entropy, rel=1e-5
    )


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    students, data = [], chats()
    for size, steps in ((16, 1), (4, 4)):
        student, teacher = qwen(0), qwen(1).eval()
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        made(GKDTrainer, CUDLoss(), "sampled", student, teacher, data, tmp_path, **changes).train()
        students.append(student)
    close(*students)


def test_on_policy(tmp_path: Path) -> None:
    """The labels are the student's own tokens."""
    student, teacher, data = qwen(0), qwen(1).eval(), chats()
    before = copy.deepcopy(student)
    made(GKDTrainer, CUDLoss(), "sampled", student, teacher, data, tmp_path, lmbda=1.0, max_new_tokens=3).train()
    assert moved(student, before)


def test_nothing_counts() -> None:
    kept = cud_trainer(GKDTrainer, CUDLoss(), labels="sampled")
    logits = torch.randn(2, 3, 5, requires_grad=True)
    value = kept.generalized_jsd_loss(
        student_logits=logits, teacher_logits=logits.detach(), labels=torch.full((2, 3), -100)
    )
    value.backward()
    assert value == 0
    assert not logits.grad.any()  # type: ignore[union-attr]


def test_refuses(tmp_path: Path) -> None:
    cases: list[tuple[type[Exception], str, Any, Any, Any]] = [
        (TypeError, "expected CUDLoss, got FusedLinearCUDLoss", GKDTrainer, FusedLinearCUDLoss(), None),
        (TypeError, "expected FusedLinearCUDLoss, got CUDLoss", DistillationTrainer, CUDLoss(), None),
        (
            TypeError,
            "expected GKDTrainer, GOLDTrainer or DistillationTrainer, got SFTTrainer",
            SFTTrainer,
            CUDLoss(),
            None,
        ),
        (ValueError, "labels='gold': expected 'sampled', 'teacher' or None", GKDTrainer, CUDLoss(), "gold"),
        (ValueError, "reduction='sum'", GKDTrainer, CUDLoss(reduction="sum"), None),
        (ValueError, "labels=None with unlabeled_index=None", GKDTrainer, CUDLoss(unlabeled_index=None), None),
    ]
    for error, match, trainer, loss, labels in cases:
        with pytest.raises(error, match=match):
            cud_trainer(trainer, loss, labels=labels)
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    other = {"use_uld_loss": True, "teacher_tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    with pytest.raises(ValueError, match="use_uld_loss=True compares sorted probabilities"):
        made(GOLDTrainer, CUDLoss(), None, qwen(0), qwen(1).eval(), chats(), tmp_path, **other)


@pytest.mark.parametrize(("trainer", "loss"), [(GKDTrainer, CUDLoss()), (DistillationTrainer, FusedLinearCUDLoss())])
def test_label_smoothing_is_refused(trainer: Any, loss: Any, tmp_path: Path) -> None:
    data = chats().map(lambda row: {"prompt": row["messages"][:1]})
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1\): expected 0"):
        made(trainer, loss, "sampled", qwen(0), qwen(1).eval(), data, tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_last_layer_that_was_not_gathered(name: str, tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-3 leaves an empty parameter."""
    student, teacher = qwen(0), qwen(1).eval()
    data = chats().map(lambda row: {"prompt": row["messages"][:1]}, remove_columns="messages")
    found = made(DistillationTrainer, FusedLinearCUDLoss(), "teacher", student, teacher, data, tmp_path)
    inner = found._compute_loss

    def partitioned(*args: Any) -> Any:
        (student if name == "student" else teacher).lm_head.weight = torch.nn.Parameter(torch.empty(0))
        return inner(*args)

    found._compute_loss = partitioned
    with pytest.raises(ValueError, match=rf"{name}: the weight of its last layer has shape \(0,\): DeepSpeed ZeRO-3"):
        found.train()


def test_example() -> None:
    example = pytest.importorskip("examples.trainer_trl", reason="needs the source tree")
    assert 0 < example.main(steps=2) < 10
