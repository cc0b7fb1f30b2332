"""Finding and loading models and tokenizers, with errors that say what to do."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def resolve_model(name: str) -> str:
    """Turn `mini-math:student` into its folder; return any other name or path as it is.

    Raises ConfigError for an unknown mini-math model, and for something that looks like a path but does not exist.
    """
    if name.startswith("mini-math:"):
        from omniopd.worlds.mini_math import model_path

        try:
            return str(model_path(name.partition(":")[2]))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_like_path and not path.is_dir():
        raise ConfigError(f"there is no model folder {name!r}; give a folder with config.json or a Hugging Face name")
    return str(path) if looks_like_path else name


def read_chat_template(path: str | Path) -> str:
    """Read a Jinja chat template. Raises ConfigError when there is none at `path`."""
    file = Path(path).expanduser()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {str(path)!r} (looked for {file.absolute()})") from error


def context_length(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model can hold at once, None when its config does not say."""
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context


def room_for_prompts(
    config: PretrainedConfig, max_tokens: int, max_prompt_tokens: int, *, key: str = "max_tokens"
) -> int:
    """Return how long a prompt may be: `max_prompt_tokens`, or what the context leaves beside `max_tokens` new ones.

    Raises ConfigError when it leaves nothing, naming the setting, `key`.
    """
    context = context_length(config)
    if context is None:
        return max_prompt_tokens
    if max_tokens >= context:
        raise ConfigError(f"{key} is {max_tokens}, but the model's whole context has {context} tokens; lower it")
    return min(max_prompt_tokens, context - max_tokens)


def pick_device(device: str) -> torch.device:
    """Resolve `auto` to CUDA when there is one. Raises ConfigError when the device asked for is not there."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is no device; use auto, cpu or cuda:N") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r} but torch {torch.__version__} sees no CUDA; use device: cpu or auto")
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Resolve `auto`: bfloat16 on a CUDA device that has it, else float32."""
    import torch

    if dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    picked: torch.dtype = getattr(torch, dtype)
    return picked


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises ConfigError when the folder has none or it cannot be read."""
    from transformers import AutoTokenizer

    source = resolve_model(name)
    if Path(source).is_dir() and not any(
        (Path(source) / f).exists()
        for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        raise ConfigError(
            f"the model folder {source} has no tokenizer (no tokenizer.json); copy the tokenizer files of the base "
            "model into it, or save them with tokenizer.save_pretrained"
        )
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer of {name!r}: {_first_line(error)}") from error


TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""What chat templates that print the date are told, the day that Llama's fall back to: a prompt that changes overnight
would make another question of every question, and another run of a resumed one."""


def render_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Write a conversation with a tokenizer's chat template, the same on every day. Raises what the template raises."""
    fixed = {"date_string": TEMPLATE_DATE.strftime("%d %b %Y"), "strftime_now": TEMPLATE_DATE.strftime}
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, **fixed, **options))


def foreign_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens of one vocabulary that have another id, or none, in the other."""
    other = theirs.get_vocab()
    return [token for token, i in ours.get_vocab().items() if other.get(token) != i]


def reads_alike(student: str, teacher: str) -> bool:
    """Say whether a student's token ids mean the same to a teacher: one vocabulary, and one chat template.

    A student whose tokenizer is not on this machine, or cannot be loaded, reads like nobody else.
    """
    try:
        ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    except ConfigError:
        return False
    return ours.chat_template == theirs.chat_template and not foreign_tokens(ours, theirs)


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """Load a causal language model in evaluation mode. Raises ConfigError when it cannot be loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    picked = pick_device(device)
    source = resolve_model(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=pick_dtype(dtype, picked))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot load the model {name!r}: {_first_line(error)}; give a folder with config.json and weights, or the "
            "name of a model on the Hugging Face hub"
        ) from error
    return model.to(picked).eval()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
