"""A teacher's hidden states on disk, with its output layer once: an exact divergence, and no logits anywhere.

Letters: T tokens of a completion, N of several one after the other, B completions of a batch, L positions, H hidden
width, V vocabulary. Row t of the states predicts token t. A token takes H numbers instead of V: 4 KiB at H 2048 in
bfloat16, where float32 logits over 151,936 tokens take 594 KiB, 148 times as much.

What a model computes in bfloat16 or float16 is stored in it without loss. Rounding the states of a float32 model moves
each number by up to one part in 256 (bfloat16) or 2048 (float16); float32 keeps them bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from omniopd.errors import ConfigError, DataError
from omniopd.logits.score_folder import (
    FolderReader,
    FolderWriter,
    Manifest,
    WriteCounts,
    completion_key,
    unwritten,
)
from omniopd.logits.scores import Reading
from omniopd.logits.shards import WRITE_COMMAND, open_shard, write_safetensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEAD = "head.safetensors"
Stored = Literal["float32", "float16", "bfloat16"]


class Trunk(Protocol):
    """The part of a causal language model that makes hidden states, such as `learner.policy.LanguageModel`."""

    @property
    def device(self) -> torch.device: ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def hidden(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Return the last hidden states [B, L, H]."""
        ...


class HeadTensors(Protocol):
    """An output layer: logits = states @ weight.T + bias, then softcap * tanh(logits / softcap)."""

    @property
    def weight_VH(self) -> Tensor: ...

    @property
    def bias_V(self) -> Tensor | None: ...

    @property
    def softcap(self) -> float | None: ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StoredHead:
    """The teacher's output layer, read back."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None


class StoredStates:
    """Hidden states of fixed completions, and the head that makes logits of them. Maps the files.

    States and head come in one dtype, the wider of the two they are stored in, so that nothing is rounded again.
    A writer may add to the folder meanwhile.

    Args:
        device: where the tensors go.
        identity: what the folder must be of, see `Manifest.identity`; None: whatever it is of.

    Raises:
        ConfigError: no such folder, or one of something else.
        DataError: its manifest or index cannot be read.
    """

    def __init__(self, folder: Path | str, *, device: str | torch.device = "cpu", identity: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.manifest.expect("states", identity, self.folder)
        self._device = device
        self._reader = FolderReader(self.folder, "pt")

    def __repr__(self) -> str:
        return f"StoredStates({str(self.folder)!r})"

    def __contains__(self, reading: Reading) -> bool:
        return not reading.token_ids or self._reader.find(completion_key(reading)) is not None

    @property
    def id(self) -> str:
        """That of the teacher that was written down."""
        return self.manifest.teacher

    @cached_property
    def head(self) -> StoredHead:
        """The output layer; read when first asked for, and kept."""
        import torch

        with open_shard(self.folder / HEAD, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        dtype = torch.promote_types(tensors["weight"].dtype, getattr(torch, self.manifest.dtype))
        moved = {name: tensor.to(self._device, dtype, copy=True) for name, tensor in tensors.items()}
        return StoredHead(weight_VH=moved["weight"], bias_V=moved.get("bias"), softcap=self.manifest.softcap)

    def states(self, reading: Reading) -> Tensor:
        """Return the states [T, H] that predict the completion's tokens. Raises DataError when they are not there."""
        return self.hidden([reading])[0]

    def hidden(self, readings: Sequence[Reading]) -> list[Tensor]:
        """Return the states of several completions, in order.

        Raises DataError when some are not there (ask `in` first), or a file is damaged.
        """
        weight_VH = self.head.weight_VH
        keys = [completion_key(reading) for reading in readings]
        stored = [key for key, reading in zip(keys, readings, strict=True) if reading.token_ids]
        found = self._reader.read(stored, {"states": None})
        if absent := [key for key in stored if key not in found]:
            raise DataError(
                f"{len(absent)} of {len(readings)} completions are not in the folder {self.folder}; write them with "
                f"`{WRITE_COMMAND}`"
            )
        return [
            found[key]["states"].to(weight_VH, copy=True)
            if reading.token_ids
            else weight_VH.new_empty((0, weight_VH.shape[1]))
            for key, reading in zip(keys, readings, strict=True)
        ]


def write_states(
    folder: Path | str,
    model: Trunk,
    head: HeadTensors,
    readings: Sequence[Reading],
    *,
    teacher: str,
    dtype: Stored | None = None,
    identity: str = "",
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> WriteCounts:
    """Compute the states that the folder does not have yet, and write them down. Run it again to go on after a kill.

    Completions of about one length share a forward pass, the longest first.

    Args:
        head: that of the same model, such as `LanguageModel.plain_head`.
        teacher: its id, for records.
        dtype: None: that of the head, which loses nothing where the model computes in it.
        identity: see `Manifest.identity`. The head is told from others without it, the trunk is not.
        batch: completions of one forward pass and one shard: what a kill loses at most.
        progress: called with completions done and all of them.

    Raises:
        ConfigError: the folder is of another teacher, head or dtype.
        DataError: an id outside the vocabulary, or a state that is not a finite number.
        RunError: another process is writing the folder, or the disk refuses.
    """
    if batch < 1:
        raise ConfigError(f"batch is {batch}; expected 1 or more")
    vocabulary, width = head.weight_VH.shape
    manifest = Manifest(
        kind="states",
        teacher=teacher,
        identity=identity,
        vocabulary=vocabulary,
        dtype=_stored_dtype(dtype, head),
        width=width,
        softcap=head.softcap,
        head=_head_digest(head),
    )
    with FolderWriter(Path(folder), manifest) as writer:
        new = unwritten(writer, readings)
        done = len(readings) - len(new)
        _write_head(writer.folder / HEAD, head)
        longest_first = sorted(new.items(), key=lambda item: -len(item[1].prompt_ids) - len(item[1].token_ids))
        for start in range(0, len(longest_first), batch):
            asked = dict(longest_first[start : start + batch])
            states_NH = _states(model, list(asked.values()), manifest)
            writer.add([(key, len(reading.token_ids)) for key, reading in asked.items()], {"states": states_NH})
            done += len(asked)
            if progress is not None:
                progress(done, len(readings))
    return WriteCounts(written=len(new), already_there=len(readings) - len(new))


def _states(model: Trunk, readings: Sequence[Reading], manifest: Manifest) -> Tensor:
    """Return the states that predict the tokens of some completions, one after the other."""
    import torch

    for reading in readings:
        ids = (*reading.prompt_ids, *reading.token_ids)
        if min(ids) < 0 or max(ids) >= (manifest.vocabulary or 0):
            raise DataError(
                f"a completion has ids {min(ids)} to {max(ids)}, but {manifest.teacher} has {manifest.vocabulary} "
                "tokens; expected ids of its own vocabulary"
            )
    # The last token predicts nothing here.
    rows = [torch.tensor(reading.prompt_ids + reading.token_ids[:-1]) for reading in readings]
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    mask_BL = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
    with torch.no_grad(), model.autocast():
        hidden_BLH = model.hidden(ids_BL, mask_BL)
    parts = [
        hidden_TH[len(r.prompt_ids) - 1 : len(row)]
        for hidden_TH, r, row in zip(hidden_BLH, readings, rows, strict=True)
    ]
    states_NH = torch.cat(parts).to("cpu", getattr(torch, manifest.dtype)).contiguous()
    if not states_NH.isfinite().all():
        raise DataError(
            f"a hidden state of {manifest.teacher} is no finite number in {manifest.dtype}; store bfloat16 or float32, "
            "which reach further than float16, or check the model"
        )
    return states_NH


def _stored_dtype(dtype: Stored | None, head: HeadTensors) -> str:
    wanted = dtype or str(head.weight_VH.dtype).removeprefix("torch.")
    known = ("float32", "float16", "bfloat16")
    if wanted not in known:
        raise ConfigError(f"hidden states cannot be stored in {wanted}; dtype can be {', '.join(known)}")
    return wanted


def _head_tensors(head: HeadTensors) -> dict[str, Tensor]:
    tensors = {"weight": head.weight_VH.detach().cpu().contiguous()}
    if head.bias_V is not None:
        tensors["bias"] = head.bias_V.detach().cpu().contiguous()
    return tensors


def _head_digest(head: HeadTensors) -> str:
    """Return 16 bytes in hex that stand for weight and bias, dtype included."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in _head_tensors(head).items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        for rows in torch.split(tensor, 4096):
            digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write_head(path: Path, head: HeadTensors) -> None:
    # The manifest holds its digest, so one that is there is this one.
    if not path.exists():
        write_safetensors(path, _head_tensors(head), "pt", {})
