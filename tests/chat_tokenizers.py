"""Byte-level tokenizers with the chat templates of real families, small enough to make in each test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from omniopd.types import Message, Prompt

CORPUS = "the sum of the numbers and the rest of the sum is the end; 12 + 30 = 42"
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QUESTION = (Message(role="system", content="Be brief."), Message(role="user", content="12 + 30?"))
QWEN_PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n"
LLAMA_PROMPT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n12 + 30?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


def tokenizer(
    special: Sequence[str], template: str | None, *, merges: int = 0, adds: str | None = None, **names: str
) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer; `adds` is what it writes around a text, such as `<s> $A`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + merges,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([CORPUS] * 5, trainer)
    if adds is not None:
        core.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[(token, core.token_to_id(token)) for token in adds.split() if token != "$A"]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    made.chat_template = template
    return made


def qwen(template: str | None = QWEN, *, eos: str = "<|im_end|>", more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    return tokenizer([*QWEN_SPECIAL, *more], template, merges=20, eos_token=eos, pad_token="<|endoftext|>")


def llama(template: str | None = LLAMA, *, eos: str = "<|eot_id|>") -> PreTrainedTokenizerFast:
    return tokenizer(
        LLAMA_SPECIAL,
        template,
        merges=60,
        adds="<|begin_of_text|> $A",
        bos_token="<|begin_of_text|>",
        eos_token=eos,
    )


def asked(reader: Any, messages: Sequence[Message] = QUESTION, *, text: str | None = None) -> Prompt:
    """Make a prompt as the student of this tokenizer reads it."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    written = text or reader.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = reader(written, add_special_tokens=False)["input_ids"]
    return Prompt(id="p", messages=tuple(messages), text=written, token_ids=tuple(ids))
