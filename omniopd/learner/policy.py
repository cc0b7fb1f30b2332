"""The student as the learner sees it: trunk, head, frozen reference. Logits exist a slice at a time only."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omniopd.errors import ConfigError, LearnerError, MissingExtraError
from omniopd.logits.loading import Offload, Quantization, load_frozen_model
from omniopd.models import load_model, load_tokenizer, pick_device, pick_dtype, read_chat_template, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from omniopd.config import LoraConfig, StudentConfig


@dataclass(frozen=True, slots=True)
class PlainHead:
    """An output layer that is one product: logits = states @ weight.T + bias, then softcap * tanh(logits / softcap)."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None

    def rows(self, size: int) -> PlainHead:
        """Return the head of the first tokens of the vocabulary, without those that only pad the table."""
        if size == len(self.weight_VH):
            return self
        return PlainHead(self.weight_VH[:size], None if self.bias_V is None else self.bias_V[:size], self.softcap)

    def logprobs(self, states_NH: Tensor) -> Tensor:
        """Return log-softmax [N, V], at least float32."""
        return _logprobs(nn.functional.linear(states_NH, self.weight_VH, self.bias_V), self.softcap)


class LanguageModel:
    """A causal language model split into trunk (tokens to hidden states) and head (hidden states to logits).

    Raises LearnerError when the two together do not give the model's own logits.
    """

    def __init__(self, model: PreTrainedModel, *, compute_dtype: torch.dtype) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.head: nn.Module = model.get_output_embeddings()
        config = model.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._check_split()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def plain_head(self) -> PlainHead | None:
        """The output layer where nothing but a product and a cap is done, else None (adapters, hooks, quantization)."""
        head = self.head
        if type(head) is not nn.Linear or not head.weight.is_floating_point() or head.weight.is_meta:
            return None
        # Beside layers that wait elsewhere, accelerate's hook only brings the states to a head that is there.
        hook = getattr(head, "_hf_hook", None)
        if head._forward_hooks or head._forward_pre_hooks or getattr(hook, "offload", hook is not None):
            return None
        return PlainHead(head.weight, head.bias, self._softcap)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in `compute_dtype`; the weights may be kept in a wider one."""
        reduced = self.compute_dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=reduced)

    def hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Return the last hidden states [B, L, H]."""
        trunk = self.model.base_model
        states = trunk(input_ids=input_ids_BL, attention_mask=attention_mask_BL, use_cache=False).last_hidden_state
        return states  # type: ignore[no-any-return]

    def logprobs(self, hidden_NH: Tensor) -> Tensor:
        """Return log-softmax [N, V], at least float32."""
        return _logprobs(self.head(hidden_NH), self._softcap)

    def _check_split(self) -> None:
        # Some architectures scale or cap logits in ways that a plain head does not know; finding out here costs one
        # tiny forward pass, finding out later costs a run.
        ids = torch.arange(1, 5, device=self.device)[None, :]
        with torch.no_grad(), self.autocast():
            own = torch.log_softmax(self.model(input_ids=ids).logits.float(), dim=-1)
            ours = self.logprobs(self.hidden(ids, torch.ones_like(ids))[0]).float()
        gap = (own[0] - ours).abs().max().item()
        if not gap < 1e-2:
            raise LearnerError(
                f"{type(self.model).__name__} does not compute its logits from the last hidden state alone: the head "
                f"gives logprobs that differ by {gap:.3g}; this architecture is not supported yet"
            )


def _logprobs(logits: Tensor, softcap: float | None) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, dim=-1)


class Policy(LanguageModel):
    """The student in training, with its frozen initial self as the reference."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, compute_dtype: torch.dtype, lora: bool
    ) -> None:
        self._peft: Any = model if lora else None
        super().__init__(model.get_base_model() if lora else model, compute_dtype=compute_dtype)
        self.tokenizer = tokenizer
        self._reference: LanguageModel | None = None

    @classmethod
    def load(cls, config: StudentConfig) -> Policy:
        """Load the student. Full training keeps float32 weights and computes in `dtype`; LoRA stores the base in it.

        A bfloat16 weight cannot take an update of 1e-6 of its size, hence the float32 copy.
        """
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        stored = dtype if config.lora is not None or dtype == torch.float64 else torch.float32
        tokenizer = load_tokenizer(config.model)
        if config.chat_template is not None:
            tokenizer.chat_template = read_chat_template(config.chat_template)
        model = load_model(config.model, device=config.device, dtype=str(stored).removeprefix("torch."))
        _switch_off_dropout(model)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora is not None:
            model = _with_adapters(model, config.lora, gradient_checkpointing=config.gradient_checkpointing)
        policy = cls(model, tokenizer, compute_dtype=dtype, lora=config.lora is not None)
        if not policy.trainable:
            raise LearnerError(f"no weight of {config.model!r} is trainable; check student.lora.target_modules")
        return policy

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def freeze_reference(self) -> None:
        """Keep a frozen copy of the weights as they are now. With LoRA the base model is the copy."""
        if self._peft is None and self._reference is None:
            frozen = copy.deepcopy(self.model).requires_grad_(False).eval()
            frozen.gradient_checkpointing_disable()
            if self.compute_dtype == torch.bfloat16:
                # Weights only: buffers such as rotary frequencies lose their positions in bfloat16.
                for parameter in frozen.parameters():
                    parameter.data = parameter.data.to(torch.bfloat16)
            self._reference = LanguageModel(frozen, compute_dtype=self.compute_dtype)

    @contextlib.contextmanager
    def reference(self) -> Iterator[LanguageModel]:
        """Give the frozen initial student for the length of the block."""
        if self._peft is not None:
            with self._peft.disable_adapter():
                yield self
        else:
            if self._reference is None:
                raise LearnerError("the initial student was not kept, so nothing can be anchored to it")
            yield self._reference

    def save(self, folder: Path) -> None:
        """Write weights and tokenizer that plain `from_pretrained` loads; adapters are merged in."""
        model = self.model
        if self._peft is not None:
            model = copy.deepcopy(self._peft).merge_and_unload()
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the trainable tensors by name: all that a checkpoint needs beside the base model."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Put a checkpoint's tensors back. Raises LearnerError when the names do not match."""
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if set(own) != set(state):
            odd = sorted(set(own) ^ set(state))
            raise LearnerError(
                f"the checkpoint holds other weights than this student, e.g. {odd[0]!r}; use its own config"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


def _with_adapters(model: PreTrainedModel, lora: LoraConfig, *, gradient_checkpointing: bool) -> Any:
    try:
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model
    except ImportError as error:
        raise MissingExtraError("student.lora needs peft: pip install 'omniopd[train]'") from error
    if gradient_checkpointing:
        model.enable_input_require_grads()
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ConfigError(
            f"student.lora cannot be applied (target_modules {lora.target_modules!r}): {error}"
        ) from error


def _switch_off_dropout(model: PreTrainedModel) -> None:
    """Make training deterministic: the policy that is updated is the one that was sampled from."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "activation_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def load_frozen(
    name: str,
    *,
    device: str,
    dtype: str,
    offload: Offload = "none",
    quantization: Quantization = "none",
    offload_folder: Path | None = None,
) -> LanguageModel:
    """Load an open-weight teacher for the logit path; see `load_frozen_model` for the settings and what it raises."""
    model = load_frozen_model(
        resolve_model(name),
        device=device,
        dtype=dtype,
        offload=offload,
        quantization=quantization,
        offload_folder=offload_folder,
    )
    return LanguageModel(model, compute_dtype=pick_dtype(dtype, pick_device(device)))
