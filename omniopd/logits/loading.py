"""Loading a frozen teacher that is too large: its layers off the device or on disk, or in 8 or 4 bits.

The output head and the embedding stay on the device as they are: the fused kernels read the head's weight, and the
embedding may be the same tensor.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omniopd.errors import ConfigError, MissingExtraError
from omniopd.models import load_model, pick_device, pick_dtype, resolve_model

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

Offload = Literal["none", "cpu", "disk"]
Quantization = Literal["none", "8bit", "4bit"]


def load_frozen_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    offload: Offload = "none",
    quantization: Quantization = "none",
    offload_folder: str | Path | None = None,
) -> PreTrainedModel:
    """Load a causal language model that is only read: evaluation mode, no gradients.

    Args:
        name: a folder, `mini-math:teacher` or a name on the hub.
        offload: where the layers wait for their turn. `cpu`: in memory, brought to the device one by one at every
            forward pass; `disk`: in the model's own safetensors files, or in `offload_folder` where it has none of
            those or other weights than `dtype`. Same numbers as without.
        quantization: of the layers' linear maps, by bitsandbytes; not the same numbers. 4 bits are NF4 with nested
            scales.
        offload_folder: needed for `disk`.

    Raises:
        ConfigError: settings that exclude each other, or a model that cannot be loaded.
        MissingExtraError: quantization without bitsandbytes.
    """
    picked = pick_device(device)
    _check(offload, quantization, picked, offload_folder)
    if offload == "none" and quantization == "none":
        return load_model(name, device=device, dtype=dtype).requires_grad_(False)
    torch_dtype = pick_dtype(dtype, picked)
    options: dict[str, Any] = {"dtype": torch_dtype}
    skeleton, source = _skeleton(name)
    if offload != "none":
        options["device_map"] = offload_map(skeleton, device=picked, offload=offload)
        if offload == "disk":
            options["offload_folder"] = str(offload_folder)
    else:
        options["device_map"] = {"": str(picked)}
        options["quantization_config"] = _quantization(skeleton, quantization, torch_dtype)
    return _load(name, source, options).eval().requires_grad_(False)


def offload_map(model: nn.Module, *, device: torch.device, offload: Literal["cpu", "disk"]) -> dict[str, str]:
    """Return where every module of a model goes: its repeated layers away, all else on the device.

    Raises ConfigError for an architecture without a list of layers.
    """
    from torch import nn

    stacks = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    trunks = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if not trunks:
        raise ConfigError(f"{type(model).__name__} has no list of layers to offload; use offload: none")
    layers: dict[str, str] = {f"{trunk}.{i}": offload for trunk in trunks for i in range(stacks[trunk])}
    inside = tuple(f"{trunk}." for trunk in trunks)
    resident: dict[str, str] = {}
    for name, module in model.named_modules():
        has_own = any(True for _ in module.parameters(recurse=False)) or any(
            True for _ in module.buffers(recurse=False)
        )
        if name and has_own and not name.startswith(inside):
            resident[name] = str(device)
    return layers | resident


def _check(offload: Offload, quantization: Quantization, device: torch.device, folder: str | Path | None) -> None:
    if offload not in ("none", "cpu", "disk"):
        raise ConfigError(f"offload is {offload!r}; it can be none, cpu or disk")
    if quantization not in ("none", "8bit", "4bit"):
        raise ConfigError(f"quantization is {quantization!r}; it can be none, 8bit or 4bit")
    if offload != "none" and quantization != "none":
        raise ConfigError(
            f"offload {offload} and quantization {quantization} exclude each other: bitsandbytes keeps its weights on "
            "the device; use one of them"
        )
    if offload == "cpu" and device.type == "cpu":
        raise ConfigError("offload is cpu, but the teacher runs on the cpu and its weights are there; use none or disk")
    if offload == "disk" and folder is None:
        raise ConfigError("offload is disk, but there is no offload_folder; name one on a disk with room for the model")
    if offload != "none" and importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError("offload needs accelerate: pip install 'omniopd[train]'")
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"quantization {quantization} needs bitsandbytes: pip install 'omniopd[quantized]'")


def _skeleton(name: str) -> tuple[PreTrainedModel, str]:
    """Build the model without weights, to learn the names of its modules."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config), source
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error


def _quantization(skeleton: PreTrainedModel, quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    head = skeleton.get_output_embeddings()
    heads = [name for name, module in skeleton.named_modules() if module is head]
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # Despite its name this is read for 4 bits too.
        llm_int8_skip_modules=heads,
    )


def _load(name: str, source: str, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> ConfigError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ConfigError(
        f"cannot load the model {name!r}: {reason}; give a folder with config.json and weights, or the name of a model "
        "on the Hugging Face hub"
    )
