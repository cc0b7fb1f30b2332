"""Tiny models, rollouts and teachers: small enough to check every number, real enough to be the real classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from omniopd.config import LearnerConfig
from omniopd.learner.learner import FUSED_VOCABULARY, Learner
from omniopd.learner.policy import LanguageModel, Policy
from omniopd.learner.teachers import LiveTeacher
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.types import Continuation, FinishReason, Message, Prompt, Rollout, TokenSignal, Usage

SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789+-=;#Q:?ab"
VOCABULARY = len(SPECIAL) + len(CHARACTERS)
"""23: one token a character, and three special ones."""
PAD, EOS = 0, 1


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a character tokenizer."""
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate((*SPECIAL, *CHARACTERS))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


class ExactNorm(nn.Module):
    """RMSNorm in the precision of its input; the one of transformers computes in float32 whatever comes in."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.epsilon)


def model(
    *,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float64,
    tied: bool = False,
    phase: float = 0.0,
    scale: float = 0.25,
    layers: int = 2,
    context: int = 1024,
) -> Qwen3ForCausalLM:
    """Make a Qwen3 model whose weights are sines: the same everywhere, without a random generator.

    `phase` makes another model; float64 models are exact throughout.
    """
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=48,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    made = Qwen3ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(made.named_parameters())):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            values = scale * torch.sin(1.7 * steps + 0.3 * index + phase + 0.11 * steps.sqrt())
            values = 1.0 + 0.1 * values if "norm" in name else values * (4.0 if "embed" in name else 1.0)
            parameter.copy_(values.view_as(parameter))
    if dtype == torch.float64:
        for module in list(made.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Qwen3RMSNorm):
                    setattr(module, name, ExactNorm(child.weight, child.variance_epsilon))
    return made


def policy(**settings: Any) -> Policy:
    """Make a policy of a tiny model that computes in the model's own precision."""
    made = model(**settings)
    return Policy(made, tokenizer(), compute_dtype=next(made.parameters()).dtype, lora=False)


def learner(
    *,
    student: Policy | None = None,
    teacher: LanguageModel | None = None,
    save_offenders: Callable[[Sequence[TokenSignal]], Path] | None = None,
    max_steps_off_policy: int = 100,
    num_steps: int = 10,
    fused_from: int = FUSED_VOCABULARY,
    **settings: Any,
) -> Learner:
    """Make a learner; `settings` are those of `LearnerConfig`."""
    config = LearnerConfig(**{"learning_rate": 1e-3, "max_grad_norm": 1e9, **settings})
    return Learner(
        student or policy(),
        config,
        num_steps=num_steps,
        max_steps_off_policy=max_steps_off_policy,
        teachers={} if teacher is None else {"teacher": LiveTeacher(teacher)},
        save_offenders=save_offenders,
        fused_from=fused_from,
    )


def save(folder: Path, **settings: Any) -> Path:
    """Write a tiny float32 model with its tokenizer, as a user's folder would be."""
    model(**{"dtype": torch.float32, **settings}).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prompt(name: str = "p0", text: str = "Q:1+2?", *, answer: str | None = "3") -> Prompt:
    """Make a prompt in the characters of the tiny tokenizer."""
    return Prompt(
        id=name,
        messages=(Message(role="user", content=text),),
        text=text,
        token_ids=tuple(encode(text)),
        answer=answer,
    )


def rollout(
    text: str = "1+2=3;#3",
    *,
    name: str = "p0/0",
    of: Prompt | None = None,
    ended: bool = True,
    entropies: Sequence[float] | None = None,
    **fields: Any,
) -> Rollout:
    """Make a rollout with one token a character, and an end token when it `ended`."""
    ids = [*encode(text), *([EOS] if ended else [])]
    return Rollout(
        **{
            "id": name,
            "prompt": of or prompt(),
            "group_index": int(name.rpartition("/")[2]),
            "token_ids": tuple(ids),
            "text": text,
            "char_starts": tuple(range(len(ids))),
            "finish_reason": FinishReason.STOP if ended else FinishReason.LENGTH,
            "policy_version": 0,
            "entropies": None if entropies is None else tuple(entropies),
            **fields,
        }
    )


def rollout_of(token_ids: Sequence[int], *, prompt_ids: Sequence[int] = (5, 6, 7), name: str = "p/0") -> Rollout:
    """Make a rollout of bare ids, for tests that care for numbers only."""
    question = Prompt(id=name.partition("/")[0], messages=(), text="", token_ids=tuple(prompt_ids))
    return Rollout(
        id=name,
        prompt=question,
        group_index=0,
        token_ids=tuple(token_ids),
        text="",
        char_starts=(0,) * len(token_ids),
        finish_reason=FinishReason.LENGTH,
        policy_version=0,
    )


def encode(text: str) -> list[int]:
    """Return the ids of a text in the tiny vocabulary."""
    return [len(SPECIAL) + CHARACTERS.index(character) for character in text]


class Vocabulary:
    """The tiny vocabulary, as credit sees a student's."""

    end_id = EOS
    end_ids = frozenset({EOS})

    def encode(self, text: str) -> list[int]:
        return encode(text)


class ScriptedTeacher:
    """Answers each prefix from a script and remembers what it was asked. A None in the script is a timeout."""

    id = "scripted:tiny"

    def __init__(self, write: Callable[[ContinuationRequest], Sequence[Continuation]]) -> None:
        self._write = write
        self.asked: list[ContinuationRequest] = []
        self.is_closed = False

    async def continuations(self, requests: Sequence[ContinuationRequest]) -> list[TeacherAnswer]:
        self.asked.extend(requests)
        return [
            TeacherAnswer(
                continuations=tuple(self._write(request)),
                usage=Usage(requests=1, input_tokens=10, output_tokens=4, cost_usd=0.5),
            )
            for request in requests
        ]

    async def aclose(self) -> None:
        self.is_closed = True


def naive_logprobs(network: Any, of: Rollout) -> Tensor:
    """Return log-softmax [T, V] of one rollout, unpadded, straight from the model's own logits."""
    ids = torch.tensor([of.prompt.token_ids + of.token_ids])
    logits = network(input_ids=ids).logits[0]
    start = len(of.prompt.token_ids) - 1
    return torch.log_softmax(logits[start : start + of.num_tokens], dim=-1)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the gradient of every weight that has one."""
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def largest_gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of gradients, relative to the largest gradient."""
    assert set(ours) == set(theirs)
    size = max(float(g.abs().max()) for g in theirs.values())
    assert size > 1e-6 and math.isfinite(size)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours) / size
