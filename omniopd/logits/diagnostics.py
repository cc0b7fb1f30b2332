"""How well teacher and student match, and whether rollouts go wrong: numbers to log, never to train on.

Shape letters: N tokens, V vocabulary, k size of the top sets. P is the student, Q the teacher, S the top-k of P, U that
of Q. Importing this module loads no torch; the first half works on tensors it is given, the second half on text alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omniopd.errors import ConfigError, DataError
from omniopd.types import FinishReason, Rollout

if TYPE_CHECKING:
    from torch import Tensor

    from omniopd.scoring.similarity import Similarity


@dataclass(frozen=True, slots=True, kw_only=True)
class TopTokens:
    """What is known of P and Q at N positions from two top-k sets; enough for everything but entropies."""

    student_ids_Nk: Tensor
    """S, the likeliest first."""
    teacher_ids_Nk: Tensor
    """U, the likeliest first."""
    student_on_student_Nk: Tensor
    """log P on S."""
    teacher_on_student_Nk: Tensor
    """log Q on S."""
    student_on_teacher_Nk: Tensor
    """log P on U."""
    teacher_on_teacher_Nk: Tensor
    """log Q on U."""

    @classmethod
    def of(cls, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, *, k: int = 16) -> TopTokens:
        """Take both sets from whole distributions over one vocabulary. Ties fall to whatever topk of torch takes."""
        if student_logprobs_NV.shape != teacher_logprobs_NV.shape:
            raise DataError(
                f"distributions of shapes {tuple(student_logprobs_NV.shape)} and {tuple(teacher_logprobs_NV.shape)}; "
                "overlap needs one vocabulary (across tokenizers use text_overlap)"
            )
        if not 0 < k <= student_logprobs_NV.shape[-1]:
            raise ConfigError(f"k is {k}; expected 1 to the {student_logprobs_NV.shape[-1]} tokens of the vocabulary")
        student, teacher = student_logprobs_NV.detach(), teacher_logprobs_NV.detach()
        on_student, on_teacher = student.topk(k, dim=-1), teacher.topk(k, dim=-1)
        return cls(
            student_ids_Nk=on_student.indices,
            teacher_ids_Nk=on_teacher.indices,
            student_on_student_Nk=on_student.values,
            teacher_on_student_Nk=teacher.gather(-1, on_student.indices),
            student_on_teacher_Nk=student.gather(-1, on_teacher.indices),
            teacher_on_teacher_Nk=on_teacher.values,
        )

    @property
    def is_shared_Nk(self) -> Tensor:
        """Which tokens of S are in U."""
        return (self.student_ids_Nk[:, :, None] == self.teacher_ids_Nk[:, None, :]).any(-1)


def overlap_ratio(top: TopTokens) -> Tensor:
    """Return |S n U| / k [N], in [0, 1]; report the mean over response positions. Source: arXiv 2604.13016."""
    return top.is_shared_Nk.to(top.student_on_student_Nk.dtype).mean(-1)


def overlap_advantage(top: TopTokens) -> Tensor:
    """Return the mean of -Q (log Q - log P) over S n U [N], nan where that is empty; verl's form.

    Closer to 0 is better; negative means the student is short of mass where the teacher has it, on balance. Average
    with `mean_of`, which leaves out the empty positions and gives 0 when all are.

    Source: verl (after arXiv 2604.13016). The form of thunlp/OPD is `overlap_reward`.
    """
    gap = top.teacher_on_student_Nk - top.student_on_student_Nk
    return _mean_over_shared(-top.teacher_on_student_Nk.exp() * gap, top.is_shared_Nk)


def student_top_k_rewards(top: TopTokens) -> Tensor:
    """Return rho (log Q - log P) on S [N, k], with rho = P renormalised over S: the training reward of thunlp/OPD.

    Higher = do it more. Source: thunlp/OPD (arXiv 2604.13016), strategy only_stu, weight student_p.
    """
    share = top.student_on_student_Nk.softmax(-1)
    return share * (top.teacher_on_student_Nk - top.student_on_student_Nk)


def overlap_reward(top: TopTokens) -> Tensor:
    """Return the mean of `student_top_k_rewards` over S n U [N], nan where that is empty; thunlp's form.

    It weighs by the student's probability where `overlap_advantage` weighs by the teacher's, and has the opposite sign
    of the log-ratio: negative means the student is over-confident there. Source: thunlp/OPD (arXiv 2604.13016).
    """
    return _mean_over_shared(student_top_k_rewards(top), top.is_shared_Nk)


def top_k_masses(top: TopTokens) -> dict[str, Tensor]:
    """Return the four masses [N] on top-k sets: how much a truncation to k tokens keeps, and whether S and U agree."""
    return {
        "student_mass_on_student_top_k": top.student_on_student_Nk.exp().sum(-1),
        "teacher_mass_on_student_top_k": top.teacher_on_student_Nk.exp().sum(-1),
        "student_mass_on_teacher_top_k": top.student_on_teacher_Nk.exp().sum(-1),
        "teacher_mass_on_teacher_top_k": top.teacher_on_teacher_Nk.exp().sum(-1),
    }


def entropy(logprobs_NV: Tensor) -> Tensor:
    """Return the entropy [N] in nats; tokens of probability 0 add nothing."""
    probs = logprobs_NV.detach().exp()
    return -(probs * logprobs_NV.detach().masked_fill(probs == 0, 0.0)).sum(-1)


def entropy_gaps(student_entropies_N: Tensor, teacher_entropies_N: Tensor) -> dict[str, Tensor]:
    """Return |H(Q) - H(P)| and the signed H(Q) - H(P) [N] in nats; positive = the student is surer than the teacher.

    Source: arXiv 2604.13016, eq. 8 (the absolute one); the signed one is ours.
    """
    signed = teacher_entropies_N - student_entropies_N
    return {"entropy_gap": signed.abs(), "entropy_gap_signed": signed}


def match_diagnostics(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, *, k: int = 16) -> dict[str, Tensor]:
    """Return every per-token diagnostic [N] of two whole distributions, by name; nan = no evidence at this token."""
    top = TopTokens.of(student_logprobs_NV, teacher_logprobs_NV, k=k)
    return {
        "overlap_ratio": overlap_ratio(top),
        "overlap_advantage": overlap_advantage(top),
        "overlap_reward": overlap_reward(top),
        **top_k_masses(top),
        **entropy_gaps(entropy(student_logprobs_NV), entropy(teacher_logprobs_NV)),
    }


def _mean_over_shared(values_Nk: Tensor, is_shared_Nk: Tensor) -> Tensor:
    # where, not a product: Q = 0 outside the shared tokens would turn 0 * inf into nan. No shared token gives 0 / 0.
    return values_Nk.where(is_shared_Nk, values_Nk.new_zeros(())).sum(-1) / is_shared_Nk.sum(-1)


def mean_of(values: Sequence[float]) -> float:
    """Return the mean of the values that are evidence, 0 if there are none. Nan is no evidence."""
    known = [v for v in values if not math.isnan(v)]
    return math.fsum(known) / len(known) if known else 0.0


def by_position(per_rollout: Sequence[Sequence[float]], *, bins: int = 10) -> tuple[float | None, ...]:
    """Return the mean of a per-token diagnostic in each tenth of its rollout, None for a tenth without evidence.

    Token t of T lies in tenth floor(10 t / T): every rollout fills the tenths by its own length.

    Args:
        per_rollout: one sequence of values a rollout, of any length; nan is no evidence.
        bins: how many parts.
    """
    if bins < 1:
        raise ConfigError(f"bins is {bins}; expected 1 or more")
    parts: list[list[float]] = [[] for _ in range(bins)]
    for values in per_rollout:
        for t, value in enumerate(values):
            parts[t * bins // len(values)].append(value)
    return tuple(_mean_or_none(part) for part in parts)


def by_correctness(
    per_rollout: Sequence[Sequence[float]], is_correct: Sequence[bool | None]
) -> dict[str, float | None]:
    """Return a diagnostic's token mean over `correct`, `wrong` and `unverified` rollouts, None without evidence."""
    if len(per_rollout) != len(is_correct):
        raise DataError(f"{len(per_rollout)} rollouts with {len(is_correct)} verdicts")
    names = {True: "correct", False: "wrong", None: "unverified"}
    parts: dict[str, list[float]] = {name: [] for name in names.values()}
    for values, verdict in zip(per_rollout, is_correct, strict=True):
        parts[names[verdict]].extend(values)
    return {name: _mean_or_none(part) for name, part in parts.items()}


def _mean_or_none(values: Sequence[float]) -> float | None:
    known = [v for v in values if not math.isnan(v)]
    return math.fsum(known) / len(known) if known else None


def text_overlap(
    teacher_spans: Sequence[Sequence[str]], student_spans: Sequence[Sequence[str]], similarity: Similarity
) -> float | None:
    """Return how close the teacher's next words are to the student's, in [0, 1], from text alone.

    At each probe prefix both sides wrote some next spans; each teacher span counts with its best match among the
    student's. The mean over a prefix's teacher spans, then over prefixes. None without a prefix that has spans of both.
    It stands in for the overlap ratio where a teacher gives no log-probs, and is not comparable with it in size.

    Args:
        teacher_spans: for each probe prefix the teacher's usable spans.
        student_spans: for each of the same prefixes the student's.
        similarity: of two texts, in [0, 1].

    Source: ours.
    """
    if len(teacher_spans) != len(student_spans):
        raise DataError(f"{len(teacher_spans)} prefixes with teacher spans, {len(student_spans)} with student spans")
    pairs = [
        (i, j, ours, theirs)
        for i, (teacher, student) in enumerate(zip(teacher_spans, student_spans, strict=True))
        for j, theirs in enumerate(teacher)
        for ours in student
    ]
    scores = similarity.pairs([ours for *_, ours, _ in pairs], [theirs for *_, theirs in pairs])
    best: dict[int, dict[int, float]] = {}
    for (i, j, _, _), score in zip(pairs, scores, strict=True):
        row = best.setdefault(i, {})
        row[j] = max(row.get(j, 0.0), score)
    return _mean_or_none([mean_of(list(row.values())) for row in best.values()])


def repeated_share(token_ids: Sequence[int], *, n: int = 4) -> float:
    """Return the share of n-grams that occurred before in the same completion, in [0, 1]; 0 for fewer than n tokens."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def loop_length(token_ids: Sequence[int], *, max_period: int = 64) -> int:
    """Return how many tokens at the end repeat one block, the block included; 0 where none comes three times.

    Args:
        token_ids: a completion without its end token.
        max_period: longest block that is looked for.
    """
    longest, size = 0, len(token_ids)
    for period in range(1, min(max_period, size // 3) + 1):
        run = 0
        while run + period < size and token_ids[size - 1 - run] == token_ids[size - 1 - run - period]:
            run += 1
        if run >= 2 * period:
            longest = max(longest, run + period)
    return longest


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmLimits:
    """When rollouts count as gone wrong. The defaults are ours: meant to stay silent on healthy runs."""

    max_repeated_share: float = 0.5
    """A rollout above it repeats itself."""
    min_loop_tokens: int = 32
    """A rollout whose last tokens loop for so long is stuck."""
    max_affected: float = 0.1
    """Share of a step's rollouts that may repeat themselves or be stuck."""
    max_truncated: float = 0.5
    """Share that may hit the length limit."""
    max_length_ratio: float = 2.0
    """How far the mean length may move from the run's first step, up or down."""


def rollout_health(rollouts: Sequence[Rollout], limits: AlarmLimits | None = None) -> dict[str, float]:
    """Return the repetition and length numbers of one step's rollouts, for the metrics."""
    if not rollouts:
        raise DataError("no rollouts to judge; expected at least one")
    limits = limits or AlarmLimits()
    repeated = [repeated_share(r.token_ids) for r in rollouts]
    is_affected = [
        share > limits.max_repeated_share or _loops(r) >= limits.min_loop_tokens
        for r, share in zip(rollouts, repeated, strict=True)
    ]
    return {
        "rollout/repeated_share": mean_of(repeated),
        "rollout/repetitive": sum(is_affected) / len(rollouts),
        "rollout/truncated": sum(r.finish_reason == FinishReason.LENGTH for r in rollouts) / len(rollouts),
        "rollout/mean_tokens": sum(r.num_tokens for r in rollouts) / len(rollouts),
    }


def _loops(rollout: Rollout) -> int:
    # An end token after the loop does not undo it.
    return max(loop_length(rollout.token_ids), loop_length(rollout.token_ids[:-1]))


def rollout_alarms(
    health: Mapping[str, float], first: Mapping[str, float], limits: AlarmLimits | None = None
) -> tuple[str, ...]:
    """Return one sentence for each limit that a step's `rollout_health` breaks; `first` is that of the run's step 1."""
    limits = limits or AlarmLimits()
    alarms = []
    if health["rollout/repetitive"] > limits.max_affected:
        alarms.append(
            f"{health['rollout/repetitive']:.0%} of the rollouts repeat themselves (limit {limits.max_affected:.0%}); "
            "lower the learning rate, strengthen the anchor or shorten the completions"
        )
    if health["rollout/truncated"] > max(limits.max_truncated, first["rollout/truncated"]):
        alarms.append(
            f"{health['rollout/truncated']:.0%} of the rollouts hit the length limit "
            f"(limit {limits.max_truncated:.0%}, first step {first['rollout/truncated']:.0%}); "
            "their ends teach nothing about stopping: raise rollout.max_tokens or drop truncated rollouts"
        )
    now, then = health["rollout/mean_tokens"], first["rollout/mean_tokens"]
    if now > then * limits.max_length_ratio or now * limits.max_length_ratio < then:
        alarms.append(
            f"rollouts now have {now:.0f} tokens on average, {then:.0f} in the first step "
            f"(limit a factor of {limits.max_length_ratio:g}); look at the samples before training on"
        )
    return tuple(alarms)
