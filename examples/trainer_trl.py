"""A small language model distilled by TRL's GKDTrainer with CUDLoss, on texts and on its own completions; seconds."""

import string
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer

from cudfast import CUDLoss
from cudfast.integrations.trl import cud_trainer

WORDS = ["<pad>", "<eos>", *string.ascii_lowercase]


def model(width: int) -> Qwen2ForCausalLM:
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    size: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, **heads}
    config = Qwen2Config(vocab_size=len(WORDS), initializer_range=0.3, **size)
    return Qwen2ForCausalLM(config)


def main(steps: int = 20) -> float:
    """The loss of the last step."""
    torch.manual_seed(0)
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    alphabet = " ".join(string.ascii_lowercase)
    pairs = [{"user": alphabet[: 2 * i], "assistant": alphabet[2 * i :]} for i in range(1, 25)]
    data = Dataset.from_list([{"messages": [{"role": r, "content": t} for r, t in pair.items()]} for pair in pairs])
    lengths: dict[str, Any] = {"max_steps": steps, "max_length": 32, "max_new_tokens": 8}
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(
            folder, learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True, bf16=False, **lengths
        )
        trainer = cud_trainer(GKDTrainer, CUDLoss(temperature=1.0), labels="teacher")(
            model=model(16), teacher_model=model(32).eval(), args=args, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
    return float([log["loss"] for log in trainer.state.log_history if "loss" in log][-1])


if __name__ == "__main__":
    print(main())
