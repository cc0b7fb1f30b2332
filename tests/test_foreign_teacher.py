"""A student and a teacher with different byte-level vocabularies and chat templates, on text with answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from omniopd.cli import main
from omniopd.records import read_metrics, read_signals
from omniopd.run_folder import RunFolder
from omniopd.teachers.ledger import Ledger

TEXT = [
    "Tom has 3 apples and buys 14 more. How many apples does he have? 3 + 14 = 17. The answer is 17.",
    "A r\u00e9sum\u00e9 costs \u20ac5, two cost \u20ac10. \u7b54\u6848\u662f 10. \U0001f600",
    "She sold 48 clips in April and half as many in May: 48 / 2 = 24, so 48 + 24 = 72.",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
)


def save_model(folder: Path, *, vocabulary: int, hidden: int, seed: int) -> Path:
    """Save a random model with a byte-level vocabulary of its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            intermediate_size=64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("transport", ["completions", "chat"])
def test_text_alone_connects_two_vocabularies(tmp_path: Path, transport: str) -> None:
    student = save_model(tmp_path / "student", vocabulary=320, hidden=64, seed=1)
    teacher = save_model(tmp_path / "teacher", vocabulary=290, hidden=96, seed=2)
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "answer": "17"}) + "\n" for text in TEXT), encoding="utf-8")
    words = ["train", "--student", str(student), "--teacher", "local:teacher", "--data", str(data)]
    words += [f"teacher.serve={teacher}", f"teacher.continuation={transport}", f"output={tmp_path}", "trackers=[]"]
    words += ["steps=2", "rollout.max_tokens=40", "rollout.prompts_per_step=3", "rollout.group_size=2"]
    words += ["method.supervision.chunker={type: entropy, chunk_tokens: 8, max_chunks: 2}"]
    words += ["teacher.max_missing_fraction=1.0"]
    assert main(words) == 0

    folder = RunFolder(tmp_path / "run")
    assert [row["tokens/soft"] > 0 for row in read_metrics(folder.metrics)] == [True, True]
    for signal in read_signals(folder.rollouts_of(2)):
        rollout = signal.rollout
        assert "".join(rollout.text_between(t, t + 1) for t in range(rollout.num_tokens)) == rollout.text
        for audit in signal.audits:
            exact = {c.is_exact for c in audit.continuations.continuations if c.text is not None}
            assert exact <= {transport == "completions" or not audit.chunk.prefix.strip()}
    spent = Ledger(folder.ledger).spent()
    assert spent.requests > 0 and spent.cost_usd == 0.0
