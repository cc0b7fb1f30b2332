"""White-box supervision: an open-weight teacher's distribution at every token, or its logprob of what was written.

Rewards and advantages are in nats, higher = do it more. P is the student that drew the rollout, Q the teacher.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np

from omniopd.errors import ConfigError, DataError, TeacherResponseError
from omniopd.logits.alignment import Spread, group_logprobs
from omniopd.logits.reading import Read, Reader
from omniopd.logits.scores import Floats, Ids, Scored, SequenceTeacher, TokenScores
from omniopd.supervision.base import StudentCandidates, StudentMeasure
from omniopd.timing import StepTimer
from omniopd.types import Author, Missing, Rollout, StepContext, TeacherEvidence, TokenSignal


class Objective(Protocol):
    """What the teacher's logprobs are used for. A part of `method.supervision.objective`."""

    @property
    def uses_divergence(self) -> bool:
        """Whether every token also gets the learner's loss of the `kl` stream."""
        ...

    @property
    def uses_samples(self) -> bool:
        """Whether the student's own samples get advantages; then nobody else's text teaches anything."""
        ...

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        """Turn the rewards log Q(y_t) - log P(y_t) [T] of a rollout into advantages [T]."""
        ...


@dataclass(frozen=True)
class Divergence:
    """The learner's `kl` loss at every token, over the whole vocabulary. Source: arXiv 2306.13649."""

    uses_divergence: ClassVar[bool] = True
    uses_samples: ClassVar[bool] = False

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        raise AssertionError("a divergence has no advantages")


@dataclass(frozen=True)
class SampledTokens:
    """advantage_t = sum over s >= t of discount ** (s - t) (log Q(y_s) - log P(y_s)), through the policy gradient.

    Minus the estimator k1 of the reverse KL. At discount 0 its expected gradient is that of the full-vocabulary reverse
    KL at the visited positions, at discount 1 that of the reverse KL of whole sequences, with more variance.
    Source: Thinking Machines, "On-policy distillation" (2025), with discount 0 as there. Differs: one gradient step on
    fresh samples, so no ratio.
    """

    uses_divergence: ClassVar[bool] = False
    uses_samples: ClassVar[bool] = True
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Only k1 = log P - log Q works as an advantage."""
    discount: float = 0.0

    def __post_init__(self) -> None:
        _check_discount(self.discount)
        if self.estimator == "k2":
            raise ConfigError(
                "estimator is k2: as an advantage its square punishes tokens that the teacher likes more as much as "
                "those it likes less, and the gradient is not that of a KL; use estimator: k1, or back-propagate k2 "
                "with objective: divergence and learner.losses.kl={type: sampled_token, estimator: k2}"
            )
        if self.estimator == "k3":
            raise ConfigError(
                "estimator is k3: as an advantage its expected gradient is that of the reverse KL minus that of the "
                "forward KL, which almost cancel near the teacher; use estimator: k1"
            )

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        return discounted_returns(rewards, self.discount)


@dataclass(frozen=True)
class MiniLLM:
    """Reverse KL of whole sequences by policy gradient, its single-step part computed exactly. arXiv 2306.08543.

    advantage_t = sum over s > t of discount ** (s - t - 1) (log Q(y_s) - log P(y_s)): what the token leads to. What the
    token itself costs is the full-vocabulary reverse KL at t, which needs no sampling (`single_step`); without it the
    sum begins at s = t. `length_normalize` divides by the sum of the discounts, at discount 1 the number of tokens that
    are left. Differs: no samples of a teacher-student mixture, no ratio clipping, no language-model loss.
    """

    uses_samples: ClassVar[bool] = True
    discount: float = 1.0
    length_normalize: bool = True
    single_step: bool = True

    def __post_init__(self) -> None:
        _check_discount(self.discount)

    @property
    def uses_divergence(self) -> bool:
        return self.single_step

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        returns = discounted_returns(rewards, self.discount)
        if self.length_normalize:
            weights = discounted_returns([1.0] * len(rewards), self.discount)
            returns = [r / w for r, w in zip(returns, weights, strict=True)]
        return [*returns[1:], 0.0][: len(returns)] if self.single_step else returns


def discounted_returns(rewards: Sequence[float], discount: float) -> list[float]:
    """Return for each place the sum of its own and all later rewards, each later one discounted once more."""
    returns: list[float] = []
    total = 0.0
    for reward in reversed(rewards):
        total = reward + discount * total
        returns.append(total)
    return returns[::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the learner's divergence must be told of the teacher, because it has not got its weights."""

    top_k: int = 0
    """The teacher's likeliest tokens."""
    candidates: int = 0
    """The student's likeliest tokens, whose log-probs are asked for."""


@dataclass(kw_only=True)
class LogprobSupervision:
    """Ask the learner for a divergence to the teacher at every token, or reinforce by the teacher's logprobs, or both.

    Which divergence is the learner's loss of the `kl` stream; full-vocabulary reverse KL by default. Advantages go to
    the student's own rollouts only: for text of others there is no P that drew it. A rollout that the teacher could not
    read or score carries no signal, and says why.
    """

    objective: Objective = Divergence()
    weight: float = 1.0
    """Factor of the divergence and of the advantages."""
    reader: Reader
    """How the teacher reads a rollout."""
    teacher: SequenceTeacher | None = None
    """Needed by objectives that use samples, and with `wanted`."""
    student: StudentMeasure | None = None
    """Needed by objectives that use samples."""
    candidates: StudentCandidates | None = None
    """Needed where the student's likeliest tokens are wanted."""
    wanted: Wanted | None = None
    """None: the learner has the teacher's weights, or needs none."""
    name: str | None = None
    """Which of the run's teachers this is."""
    spread: Spread = "share"
    """See `logits.alignment.group_logprobs`."""
    masked_ids: frozenset[int] = frozenset()
    """Tokens of the student that get no signal."""
    max_missing_fraction: float = 0.5
    timer: StepTimer = field(default_factory=StepTimer)

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        """Return one signal for each rollout.

        Raises:
            DataError: a measure returns another number of tokens than a rollout has.
            TeacherResponseError: more than `max_missing_fraction` of the rollouts could not be scored.
            TeacherAuthError, TeacherConnectionError: from the teacher.
        """
        reads = [self.reader.read(r) for r in rollouts]
        scored = await self._score(rollouts, reads)
        self._check_missing(scored, ctx)
        with self.timer("score"):
            advantages = self._advantages(rollouts, reads, scored) if self.objective.uses_samples else {}
        return [
            self._signal(r, read, of, advantages.get(place))
            for place, (r, read, of) in enumerate(zip(rollouts, reads, scored, strict=True))
        ]

    async def _score(self, rollouts: Sequence[Rollout], reads: Sequence[Read]) -> list[Scored | None]:
        """Ask the teacher about the rollouts that it can read; None where nobody needs to know."""
        results: list[Scored | None] = [
            None if read.missing is None else Scored(missing=read.missing, detail=read.detail) for read in reads
        ]
        # A divergence that the learner computes itself asks nothing; advantages are for the student's own text.
        needed = [
            place
            for place, (r, read) in enumerate(zip(rollouts, reads, strict=True))
            if read.reading is not None and (self.wanted is not None or self._reinforces(r))
        ]
        if not needed:
            return results
        assert self.teacher is not None
        readings = [reading for place in needed if (reading := reads[place].reading) is not None]
        wanted = self.wanted or Wanted()
        own = self._candidates([rollouts[place] for place in needed], wanted.candidates)
        if own is not None:
            readings = [
                dataclasses.replace(r, requested_TK=ids_Tk) for r, (ids_Tk, _) in zip(readings, own, strict=True)
            ]
        with self.timer("teacher"):
            answers = await self.teacher.score(readings, top_k=wanted.top_k)
        for i, (place, answer) in enumerate(zip(needed, answers, strict=True)):
            if own is not None and answer.scores is not None:
                ids_Tk, logprobs_Tk = own[i]
                record = dataclasses.replace(answer.scores, student_ids_Tk=ids_Tk, student_logprobs_Tk=logprobs_Tk)
                answer = dataclasses.replace(answer, scores=record)
            results[place] = _finite(answer) if self._reinforces(rollouts[place]) else answer
        return results

    def _candidates(self, rollouts: Sequence[Rollout], k: int) -> list[tuple[Ids, Floats]] | None:
        """Return the student's likeliest tokens, if they are wanted."""
        if k == 0:
            return None
        assert self.candidates is not None
        with self.timer("measure"):
            return self.candidates(rollouts, k)

    def _reinforces(self, rollout: Rollout) -> bool:
        return self.objective.uses_samples and rollout.author is Author.STUDENT and rollout.num_tokens > 0

    def _advantages(
        self, rollouts: Sequence[Rollout], reads: Sequence[Read], scored: Sequence[Scored | None]
    ) -> dict[int, tuple[list[float], list[float]]]:
        """Return the advantages [T] of the rollouts that have some, and the weights [T] that say where."""
        known = {
            place: answer.scores
            for place, (r, answer) in enumerate(zip(rollouts, scored, strict=True))
            if self._reinforces(r) and answer is not None and answer.scores is not None
        }
        if not known:
            return {}
        assert self.student is not None
        own = self.student([rollouts[place] for place in known])
        found = {}
        for (place, scores), (logprobs, _) in zip(known.items(), own, strict=True):
            record = dataclasses.replace(scores, student_logprobs_T=np.array(logprobs))
            rewards, evidence = self._rewards(rollouts[place], reads[place], record)
            advantages = [self.weight * a for a in self.objective.advantages(rewards)]
            found[place] = (advantages, evidence)
        return found

    def _rewards(self, rollout: Rollout, read: Read, record: TokenScores) -> tuple[list[float], list[float]]:
        """Return log Q - log P [T] and where it is known [T], in the student's tokens."""
        assert record.student_logprobs_T is not None
        teacher, student = record.logprobs_T.tolist(), record.student_logprobs_T.tolist()
        if read.alignment is not None:
            grouped = group_logprobs(read.alignment, student, teacher, spread=self.spread)
            rewards, evidence = list(grouped.advantages), list(grouped.weights)
        else:
            if not len(student) == len(teacher) == rollout.num_tokens:
                raise DataError(
                    f"rollout {rollout.id} has {rollout.num_tokens} tokens, but {len(student)} logprobs of the student "
                    f"and {len(teacher)} of the teacher"
                )
            rewards, evidence = [q - p for p, q in zip(student, teacher, strict=True)], [1.0] * rollout.num_tokens
        for t, token_id in enumerate(rollout.token_ids):
            if token_id in self.masked_ids:
                rewards[t] = evidence[t] = 0.0
        return rewards, evidence

    def _signal(
        self, rollout: Rollout, read: Read, scored: Scored | None, own: tuple[list[float], list[float]] | None
    ) -> TokenSignal:
        zeros = (0.0,) * rollout.num_tokens
        advantages, pg_weights = (tuple(own[0]), tuple(own[1])) if own is not None else (zeros, zeros)
        missing = scored.missing if scored is not None else None
        kl_weights, evidence = None, None
        if self.objective.uses_divergence:
            kl_weights = zeros if missing is not None else self._kl_weights(rollout, read)
            if missing is None:
                evidence = self._evidence(rollout, read, scored)
        return TokenSignal(
            rollout=rollout,
            advantages=advantages if self.objective.uses_samples else None,
            pg_weights=pg_weights if self.objective.uses_samples else None,
            kl_weights=kl_weights,
            kl_teacher=self.name,
            kl_evidence=evidence,
            unscored=missing,
            notes=(f"not scored: {scored.detail}",) if scored is not None and missing is not None else (),
        )

    def _kl_weights(self, rollout: Rollout, read: Read) -> tuple[float, ...]:
        weights = [self.weight] * rollout.num_tokens
        if read.alignment is not None:
            weights = [0.0] * rollout.num_tokens
            for group in read.alignment.groups:
                size = (group.student_end - group.student_start) if self.spread == "share" else 1
                for t in read.alignment.student.positions[group.student_start : group.student_end]:
                    weights[t] = self.weight / size if group.is_exact else 0.0
        return tuple(
            0.0 if token_id in self.masked_ids else weight
            for token_id, weight in zip(rollout.token_ids, weights, strict=True)
        )

    def _evidence(self, rollout: Rollout, read: Read, scored: Scored | None) -> TeacherEvidence | None:
        if self.wanted is not None:
            return scored.scores if scored is not None else None
        if read.alignment is not None:
            return read
        # The learner reads the rollout's own ids unless it is told otherwise.
        is_own = read.reading is not None and read.reading.prompt_ids == rollout.prompt.token_ids
        return None if is_own else read.reading

    def _check_missing(self, scored: Sequence[Scored | None], ctx: StepContext) -> None:
        missing = [answer for answer in scored if answer is not None and answer.missing is not None]
        if len(missing) <= self.max_missing_fraction * len(scored):
            return
        reasons = Counter(str(answer.missing) for answer in missing)
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        whose = "the teacher" if self.teacher is None else self.teacher.id
        raise TeacherResponseError(
            f"step {ctx.step + 1}: {len(missing)} of {len(scored)} rollouts could not be scored by {whose} ({told}), "
            f"more than teacher.max_missing_fraction {self.max_missing_fraction:g}; the first says: {missing[0].detail}"
        )


def _finite(answer: Scored) -> Scored:
    """Take a token that the teacher rules out for no evidence: minus infinity is no advantage."""
    if answer.scores is None or bool(np.isfinite(answer.scores.logprobs_T).all()):
        return answer
    at = int(np.flatnonzero(~np.isfinite(answer.scores.logprobs_T))[0])
    value = answer.scores.logprobs_T[at]
    return Scored(
        missing=Missing.GARBAGE, detail=f"the teacher's log-prob of token {at} is {value}, which is no number"
    )


def _check_discount(discount: float) -> None:
    if not 0.0 <= discount <= 1.0:
        raise ConfigError(f"discount must be in [0, 1], got {discount}")
