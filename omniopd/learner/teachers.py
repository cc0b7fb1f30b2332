"""Open-weight teachers whose whole distribution the learner computes itself, from hidden states and a head.

Shape letters: B completions, L padded positions, T tokens of a completion, N tokens of several, G hidden width, W
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from omniopd.learner.batch import pad_sequences
from omniopd.learner.policy import LanguageModel, PlainHead
from omniopd.logits.foreign import MatchedVocabulary
from omniopd.logits.scores import Reading
from omniopd.logits.stored_states import StoredStates


class TeacherModel(Protocol):
    """A frozen model that reads completions. Nothing here gets a gradient."""

    @property
    def vocabulary(self) -> int:
        """W, with the rows that only pad the table."""
        ...

    @property
    def head(self) -> PlainHead | None:
        """The output layer where it is a plain product, for the fused kernel; else None."""
        ...

    def states(self, readings: Sequence[Reading]) -> list[Tensor]:
        """Return [T, G] for each completion; row t predicts its token t."""
        ...

    def logprobs(self, states_NG: Tensor) -> Tensor:
        """Return log-softmax [N, W], at least float32."""
        ...


class LiveTeacher:
    """A teacher in this process: its trunk runs on every micro-batch, its logits exist a slice at a time."""

    def __init__(self, model: LanguageModel) -> None:
        self.weights = model
        self.vocabulary: int = model.model.config.get_text_config().vocab_size
        self.head = model.plain_head

    @torch.no_grad()
    def states(self, readings: Sequence[Reading]) -> list[Tensor]:
        input_ids_BL, mask_BL = pad_sequences([r.prompt_ids + r.token_ids for r in readings], pad_id=0)
        device = self.weights.device
        with self.weights.autocast():
            states_BLG = self.weights.hidden(input_ids_BL.to(device), mask_BL.to(device))
        found = []
        for row, reading in enumerate(readings):
            start = len(reading.prompt_ids) - 1
            found.append(states_BLG[row, start : start + len(reading.token_ids)])
        return found

    @torch.no_grad()
    def logprobs(self, states_NG: Tensor) -> Tensor:
        with self.weights.autocast():
            return self.weights.logprobs(states_NG)


class ForeignTeacher(LiveTeacher):
    """A teacher in this process with a vocabulary of its own. `matched`: the tokens that both vocabularies hold."""

    def __init__(self, model: LanguageModel, *, matched: MatchedVocabulary | None = None) -> None:
        super().__init__(model)
        self.matched = matched


class StoredTeacher:
    """A teacher whose hidden states lie on disk. Raises DataError for a completion that does not."""

    def __init__(self, stored: StoredStates) -> None:
        head = stored.head
        self._stored = stored
        self.vocabulary = len(head.weight_VH)
        self.head = PlainHead(head.weight_VH, head.bias_V, head.softcap)

    def states(self, readings: Sequence[Reading]) -> list[Tensor]:
        return self._stored.hidden(readings)

    @torch.no_grad()
    def logprobs(self, states_NG: Tensor) -> Tensor:
        # The student's autocast would round a wider head.
        with torch.autocast(states_NG.device.type, enabled=False):
            return self.head.logprobs(states_NG)
