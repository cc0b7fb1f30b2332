"""Training against another vocabulary: gradients against one-piece references, and what each loss sees."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import tiny
from omniopd.errors import ConfigError, DataError
from omniopd.learner.divergences import GeneralizedJSD
from omniopd.learner.foreign import ForeignRollout, accumulate_groups, group_weights, match_vocabularies
from omniopd.learner.foreign_losses import (
    FOREIGN_LOSSES,
    ForeignDivergence,
    HybridMatching,
    UniversalLogitDistillation,
)
from omniopd.learner.loss_inputs import TokenSlice
from omniopd.logits.alignment import Alignment, align, align_ends
from omniopd.logits.foreign import MatchedVocabulary
from omniopd.logits.token_bytes import Segments, TokenBytes
from omniopd.parts import build_part

ULD, HYBRID = UniversalLogitDistillation(), HybridMatching()
V, W, H, G = 5, 7, 3, 4
MATCHED = MatchedVocabulary(student_ids=(0, 1, 4), teacher_ids=(6, 2, 3))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def segments(ends: Sequence[int], *, specials: Sequence[int] = ()) -> Segments:
    """Make the cut of a text of `ends[-1]` bytes; `specials` are the places of special tokens among all tokens."""
    size = len(ends) + len(specials)
    return Segments(
        data=b"x" * ends[-1],
        ends=tuple(ends),
        positions=tuple(i for i in range(size) if i not in specials),
        num_tokens=size,
    )


def uneven() -> list[Alignment]:
    """Make two texts: groups of 2 to 2, 2 to 1 around a special token, 1 to 1, leftovers; then 1 to 3 and 3 to 1."""
    first = [segments((1, 3, 4, 6, 7, 8, 9), specials=(3,)), segments((2, 3, 6, 7, 10), specials=(0,))]
    second = [segments((3, 4, 5, 6)), segments((1, 2, 3, 6))]
    return [
        Alignment(student=s, teacher=t, groups=align_ends(s.ends, t.ends, limit=9 if n == 0 else None))
        for n, (s, t) in enumerate((first, second))
    ]


@dataclass
class Case:
    """Some rollouts with leaves and heads, all in float64."""

    rollouts: list[ForeignRollout]
    leaves: list[Tensor]
    student_head: Tensor
    teacher_head: Tensor

    def student(self, states: Tensor) -> Tensor:
        return (states @ self.student_head.T).log_softmax(-1)

    def teacher(self, states: Tensor) -> Tensor:
        return (states @ self.teacher_head.T).log_softmax(-1)

    def accumulate(
        self, loss: ForeignDivergence, *, slice_tokens: int = 8, matched: MatchedVocabulary | None = MATCHED
    ) -> float:
        return accumulate_groups(
            self.rollouts,
            loss,
            student_logprobs=self.student,
            teacher_logprobs=self.teacher,
            matched=matched,
            slice_tokens=slice_tokens,
        )

    def gradients(self) -> list[Tensor]:
        found = [t.grad for t in (*self.leaves, self.student_head)]
        assert all(g is not None for g in found)
        return [g for g in found if g is not None]


def case(alignments: Sequence[Alignment], *, teacher_size: int = W) -> Case:
    leaves, rollouts = [], []
    for n, alignment in enumerate(alignments):
        size, other = alignment.student.num_tokens, alignment.teacher.num_tokens
        generator = torch.Generator().manual_seed(n)
        leaves.append(numbers(size, H, seed=n).mul(0.5).requires_grad_(True))
        rollouts.append(
            ForeignRollout(
                student_states_TH=leaves[-1],
                student_ids_T=torch.randint(V, (size,), generator=generator),
                teacher_states_UG=numbers(other, G, seed=n + 50),
                teacher_ids_U=torch.randint(teacher_size, (other,), generator=generator),
                alignment=alignment,
                weights=tuple(0.3 + 0.1 * i if g.is_exact else 0.0 for i, g in enumerate(alignment.groups)),
            )
        )
    student_head = numbers(V, H, seed=7).requires_grad_(True)
    return Case(rollouts, leaves, student_head, numbers(teacher_size, G, seed=8))


def one_piece(made: Case, loss: ForeignDivergence) -> Tensor:
    """Return the same sum from whole rollouts, group by group, written out in probabilities."""
    total = torch.zeros((), dtype=torch.float64)
    for r in made.rollouts:
        p_TV = ((r.student_states_TH @ made.student_head.T) / loss.temperature).softmax(-1)
        q_UW = ((r.teacher_states_UG @ made.teacher_head.T) / loss.temperature).softmax(-1)
        for group, weight in zip(r.alignment.groups, r.weights, strict=True):
            ours = [r.alignment.student.positions[i] for i in range(group.student_start, group.student_end)]
            theirs = [r.alignment.teacher.positions[i] for i in range(group.teacher_start, group.teacher_end)]
            if group.is_exact:
                p = product(p_TV, r.student_ids_T, ours, loss.merge)
                q = product(q_UW, r.teacher_ids_U, theirs, loss.merge)
                total = total + weight * written_out(loss, p, q)
    return total


def product(probs: Tensor, ids: Tensor, tokens: list[int], merge: str) -> Tensor:
    base = tokens[0] if merge == "observed" else tokens[-1]
    merged = probs[base]
    for t in tokens:
        if t != base:
            merged = merged * probs[t, ids[t]]
    return merged


def written_out(loss: ForeignDivergence, p: Tensor, q: Tensor) -> Tensor:
    if isinstance(loss, UniversalLogitDistillation):
        return sorted_gap(p, q)
    assert isinstance(loss, HybridMatching)
    a, b = p[list(MATCHED.student_ids)], q[list(MATCHED.teacher_ids)]
    if loss.beta == 1.0:
        same = (a * (a / b).log() - a + b).sum()
    else:
        m = loss.beta * b + (1 - loss.beta) * a
        same = loss.beta * (b * (b / m).log()).sum() + (1 - loss.beta) * (a * (a / m).log()).sum()
    # Three of the teacher's seven tokens are matched.
    on_matched, on_others = loss.matched_weight, loss.unmatched_weight
    if on_matched is None or on_others is None:
        on_matched, on_others = 3 / 7, 4 / 7
    return on_matched * same + on_others * sorted_gap(p[[2, 3]], q[[0, 1, 4, 5]])


def sorted_gap(p: Tensor, q: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    ours, theirs = (sorted(x, key=lambda value: value.item(), reverse=True) for x in (p, q))
    gaps = [(a - b).abs() for a, b in itertools.zip_longest(ours, theirs, fillvalue=zero)]
    return torch.stack(gaps).sum()


LOSSES = [
    ULD,
    UniversalLogitDistillation(merge="bayesian", temperature=1.7),
    HYBRID,
    HybridMatching(beta=0.3, merge="bayesian", temperature=0.6),
    HybridMatching(beta=1.0, matched_weight=2.0, unmatched_weight=0.5),
]


@pytest.mark.parametrize("slice_tokens", [1, 6, 1000])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_value_and_gradients_against_one_piece(loss: ForeignDivergence, slice_tokens: int) -> None:
    ours, reference = case(uneven()), case(uneven())
    value = ours.accumulate(loss, slice_tokens=slice_tokens)
    expected = one_piece(reference, loss)
    expected.backward()  # type: ignore[no-untyped-call]
    assert value == pytest.approx(expected.item(), rel=1e-12)
    for got, wanted in zip(ours.gradients(), reference.gradients(), strict=True):
        assert float(wanted.abs().max()) > 1e-3
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-13)


def test_every_token_of_a_group_gets_a_gradient_and_no_other() -> None:
    made = case(uneven())
    made.accumulate(HYBRID)
    moved = [(g.abs().sum(-1) > 1e-4).tolist() for g in made.gradients()[:2]]
    # Token 3 is special, tokens 6 and 7 are leftovers: the texts agree up to byte 9, but no two ends do after 7.
    assert moved == [[True, True, True, False, True, True, False, False], [True] * 4]


def test_merged_numbers_by_hand() -> None:
    # P(x0) = (.6, .3, .1) and the second token had .9: merged (.54, .27, .09). Against (.5, .3, .2):
    # .04 + .03 + .11 = .18. Its derivative by the .9 is .6 - .3 - .1 = .2 (the signs of the gaps are + - -), and that
    # of the .9 by the second token's own logit .9 * .1 = .09: together .018. By the first token's logits it is
    # .9 p_j (s_j - sum_i s_i p_i) with s = (1, -1, -1) and sum .2: .9 * .6 * .8 = .432, .9 * .3 * -1.2 = -.324.
    student, teacher = segments((1, 3)), segments((3,))
    leaf = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.9, 0.05]], dtype=torch.float64).log().requires_grad_(True)
    made = ForeignRollout(
        student_states_TH=leaf,
        student_ids_T=torch.tensor([0, 1]),
        teacher_states_UG=torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log(),
        teacher_ids_U=torch.tensor([2]),
        alignment=Alignment(student=student, teacher=teacher, groups=align_ends(student.ends, teacher.ends)),
        weights=(1.0,),
    )

    def identity(states: Tensor) -> Tensor:
        return states.log_softmax(-1)

    value = accumulate_groups(
        [made], ULD, student_logprobs=identity, teacher_logprobs=identity, matched=None, slice_tokens=8
    )
    assert value == pytest.approx(0.18)
    assert leaf.grad is not None
    assert leaf.grad[1, 1].item() == pytest.approx(0.018)
    assert leaf.grad[0].tolist() == pytest.approx([0.432, -0.324, -0.108])


def test_log_probs_exist_for_one_slice_at_a_time() -> None:
    made = case(uneven())
    sizes: list[tuple[str, int]] = []
    alive: list[weakref.ref[Tensor]] = []

    def watched(side: str, head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def logprobs(states: Tensor) -> Tensor:
            if side == "student":
                assert all(made() is None for made in alive), "an earlier slice is still in memory"
                assert states.requires_grad
            else:
                assert not torch.is_grad_enabled()
            result = head(states)
            sizes.append((side, len(states)))
            alive.append(weakref.ref(result))
            return result

        return logprobs

    accumulate_groups(
        made.rollouts,
        HYBRID,
        student_logprobs=watched("student", made.student),
        teacher_logprobs=watched("teacher", made.teacher),
        matched=MATCHED,
        slice_tokens=6,
    )
    student = [size for side, size in sizes if side == "student"]
    teacher = [size for side, size in sizes if side == "teacher"]
    # Groups of 2+2, 2+1, 1+1 tokens (the leftovers are not read), then 1+3 and 3+1. A slice of 6 holds
    # 4, then 3 + 2, then 4, then 4.
    assert student == [2, 3, 1, 3]
    assert teacher == [2, 2, 3, 1]


def test_a_group_longer_than_a_slice_is_not_split() -> None:
    made = case(uneven())
    sizes: list[int] = []

    def head(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return made.student(states)

    accumulate_groups(
        made.rollouts, ULD, student_logprobs=head, teacher_logprobs=made.teacher, matched=None, slice_tokens=2
    )
    assert sizes == [2, 2, 1, 1, 3]


def one_to_one(sizes: Sequence[int]) -> list[Alignment]:
    made = [segments(tuple(range(1, size + 1))) for size in sizes]
    return [Alignment(student=s, teacher=s, groups=align_ends(s.ends, s.ends)) for s in made]


@pytest.mark.parametrize("temperature", [1.0, 1.4])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_one_vocabulary_gives_the_jsd_of_tokens(beta: float, temperature: float) -> None:
    made, plain = (case(one_to_one((4, 3)), teacher_size=V) for _ in range(2))
    everything = MatchedVocabulary(student_ids=tuple(range(V)), teacher_ids=tuple(range(V)))
    value = made.accumulate(HybridMatching(beta=beta, temperature=temperature), slice_tokens=5, matched=everything)

    loss = GeneralizedJSD(beta=beta, temperature=temperature, convention="trl")
    expected = torch.zeros((), dtype=torch.float64)
    for r in plain.rollouts:
        assert [g.student_end - g.student_start for g in r.alignment.groups] == [1] * len(r.weights)
        tokens = TokenSlice(
            logprobs_NV=plain.student(r.student_states_TH),
            token_ids_N=r.student_ids_T,
            reference_logprobs_NV=plain.teacher(r.teacher_states_UG),
        )
        expected = expected + (torch.tensor(r.weights, dtype=torch.float64) * loss(tokens)).sum()
    expected.backward()  # type: ignore[no-untyped-call]
    assert value == pytest.approx(expected.item(), abs=1e-12)
    for got, wanted in zip(made.gradients(), plain.gradients(), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12)


def test_uld_does_not_see_a_permuted_teacher_and_hybrid_does() -> None:
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    found = []
    for permute in (False, True):
        made = case(one_to_one((4, 3)))
        if permute:
            made.teacher_head = made.teacher_head[order]
        uld = made.accumulate(ULD)
        gradients = [g.clone() for g in made.gradients()]
        found.append((uld, gradients, made.accumulate(HYBRID)))
    (uld, gradients, hybrid), (permuted_uld, permuted_gradients, permuted_hybrid) = found
    assert permuted_uld == pytest.approx(uld, rel=1e-13)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(gradients, permuted_gradients, strict=True))
    assert abs(permuted_hybrid - hybrid) > 0.01
    # |.9 - .5| + |.1 - .5| = .8 either way
    for q in ((0.9, 0.1), (0.1, 0.9)):
        student, teacher = (torch.tensor([x], dtype=torch.float64).log() for x in ((0.5, 0.5), q))
        assert ULD(student, teacher).item() == pytest.approx(0.8)


def test_what_has_no_weight_is_not_read() -> None:
    made = case(uneven())
    first = made.rollouts[0]
    broken = first.teacher_states_UG.clone()
    broken[3] = math.nan  # The only token of the second group.
    made.rollouts[0] = ForeignRollout(
        student_states_TH=first.student_states_TH,
        student_ids_T=first.student_ids_T,
        teacher_states_UG=broken,
        teacher_ids_U=first.teacher_ids_U,
        alignment=first.alignment,
        weights=(first.weights[0], 0.0, *first.weights[2:]),
    )
    assert first.alignment.groups[1].teacher_start == 2
    assert math.isfinite(made.accumulate(ULD))
    assert all(torch.isfinite(g).all() for g in made.gradients())


def test_nothing_to_compare_gives_zero_and_no_gradient() -> None:
    made = case(uneven())
    made.rollouts = []
    assert made.accumulate(ULD) == 0.0
    assert made.student_head.grad is None


def test_weights_of_groups_add_up_what_their_tokens_have() -> None:
    alignment = uneven()[0]
    # Tokens 0 1 | 2 4 around the special token 3 | 5 | leftovers 6 7.
    assert group_weights(alignment, (1, 0, 0.5, 9, 0.25, 2, 4, 4)) == (1.0, 0.75, 2.0, 0.0)
    assert group_weights(one_to_one((3,))[0], (0.1, 0.2, 0.7)) == (0.1, 0.2, 0.7)
    with pytest.raises(DataError, match="2 weights for 8 tokens"):
        group_weights(alignment, (1.0, 1.0))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"weights": (1.0,)}, "1 weights for 2 groups"),
        ({"weights": (1.0, -0.5)}, "weight of group 1 is -0.5"),
        ({"weights": (math.nan, 0.0)}, "weight of group 0 is nan"),
        ({"student_ids_T": torch.zeros(3, dtype=torch.long)}, "the student has 4 states and 3 ids"),
        ({"teacher_states_UG": torch.zeros(5, G)}, "the teacher has 5 states and 4 ids"),
        ({"student_states_TH": torch.zeros(4, H)}, "do not require grad"),
    ],
)
def test_a_rollout_that_does_not_fit_is_refused(changes: dict[str, Any], complaint: str) -> None:
    good = case(uneven()).rollouts[1]
    fields = {name: getattr(good, name) for name in ForeignRollout.__slots__}
    with pytest.raises(DataError, match=complaint):
        ForeignRollout(**{**fields, **changes})


def test_leftovers_cannot_have_weight() -> None:
    good = case(uneven()).rollouts[0]
    fields = {name: getattr(good, name) for name in ForeignRollout.__slots__}
    with pytest.raises(DataError, match=r"group 3 is not exact and has weight 0\.1"):
        ForeignRollout(**{**fields, "weights": (0.0, 0.0, 0.0, 0.1)})


def test_names_and_settings_of_run_files() -> None:
    built = build_part("kl", {"type": "hybrid", "beta": 0.2, "merge": "bayesian"}, FOREIGN_LOSSES)
    assert built == HybridMatching(beta=0.2, merge="bayesian")
    assert build_part("kl", {"type": "uld", "temperature": 2}, FOREIGN_LOSSES) == UniversalLogitDistillation(
        temperature=2.0
    )
    assert [(loss.stream, loss.needs, loss.needs_matched) for loss in (ULD, HYBRID)] == [
        ("kl", "foreign_teacher", False),
        ("kl", "foreign_teacher", True),
    ]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"type": "uld", "temperature": 0}, "temperature must be positive, got 0"),
        ({"type": "uld", "temperature": math.inf}, "temperature must be positive, got inf"),
        ({"type": "uld", "beta": 0.5}, "no setting of uld 'beta'"),
        ({"type": "uld", "merge": "mean"}, "'observed' or 'bayesian'"),
        ({"type": "hybrid", "beta": 1.5}, "beta must be in"),
        ({"type": "hybrid", "matched_weight": 1.0}, "give both, or neither"),
        ({"type": "hybrid", "matched_weight": -1.0, "unmatched_weight": 1.0}, "expected 0 or more"),
        ({"type": "hybrid", "matched_weight": 0.0, "unmatched_weight": 0.0}, "not both 0"),
        ({"type": "hybrid", "matched_weight": math.nan, "unmatched_weight": 1.0}, "expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build_part("kl", settings, FOREIGN_LOSSES)


def test_settings_are_vetted_in_python_too() -> None:
    with pytest.raises(ConfigError, match="merge is 'mean'"):
        UniversalLogitDistillation(merge="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="slice_tokens must be 1 or more"):
        case(uneven()).accumulate(ULD, slice_tokens=0)
    with pytest.raises(DataError, match="no matched vocabulary"):
        case(uneven()).accumulate(HYBRID, matched=None)


def test_run_files_are_checked_without_torch() -> None:
    code = (
        "import sys, omniopd.learner.foreign_losses as f; f.HybridMatching(beta=0.1); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# Two real tokenizers: the student's has one token a character, the teacher's also one for each pair of digits.

PAIRS = tuple(f"{a}{b}" for a in range(10) for b in range(10))


def characters() -> PreTrainedTokenizerFast:
    """Make the tiny tokenizer with exact bytes: its characters are ASCII, which byte-level decoding leaves alone."""
    made = tiny.tokenizer()
    made.backend_tokenizer.decoder = decoders.ByteLevel()
    return made


def pairs() -> PreTrainedTokenizerFast:
    """Make a tokenizer with other ids and with pairs of digits as tokens."""
    words = (*tiny.SPECIAL, *PAIRS, *reversed(tiny.CHARACTERS))
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9]{2}|[\s\S]"), behavior="isolated")
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


QUESTION = "Q:12+34?"
ANSWERS = ("12+34=46;#46", "34+2=36;10+36=46;#46", "2+4=6;#46")


def completion_states(network: Any, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Tensor:
    """Return [T, H] of one completion; row t predicts token t."""
    states = network.base_model(input_ids=torch.tensor([[*prompt_ids, *token_ids]])).last_hidden_state[0]
    return states[len(prompt_ids) - 1 : -1]  # type: ignore[no-any-return]


class Lesson:
    """A student that learns some texts from a teacher, as the learner would let it."""

    def __init__(self, teacher_tokenizer: PreTrainedTokenizerFast, teacher: Any) -> None:
        own, other = TokenBytes(characters()), TokenBytes(teacher_tokenizer)
        self.student = tiny.model(scale=0.1)
        self.teacher = teacher.requires_grad_(False)
        self.matched = match_vocabularies(
            own,
            other,
            student_size=tiny.VOCABULARY,
            teacher_size=len(teacher_tokenizer),
            kept=[(tiny.EOS, teacher_tokenizer.eos_token_id)],
        )
        self.texts = []
        prompts = tuple(tiny.encode(QUESTION)), other.encode(QUESTION)[0]
        for answer in ANSWERS:
            ours = (*tiny.encode(answer), tiny.EOS)
            theirs = (*other.encode(answer)[0], teacher_tokenizer.eos_token_id)
            alignment = align(own(ours, keep={tiny.EOS}), other(theirs, keep={teacher_tokenizer.eos_token_id}))
            with torch.no_grad():
                states = completion_states(teacher, prompts[1], theirs)
            self.texts.append((prompts[0], torch.tensor(ours), torch.tensor(theirs), states, alignment))
        self.num_groups = sum(len(alignment.groups) for *_, alignment in self.texts)

    def head_of(self, network: Any) -> Callable[[Tensor], Tensor]:
        return lambda states: network.lm_head(states).log_softmax(-1)

    def gradient(self, loss: ForeignDivergence, *, slice_tokens: int = 16) -> float:
        """Add the gradient of the mean over groups to the student's weights; return the mean."""
        hidden = [completion_states(self.student, prompt, ids.tolist()) for prompt, ids, *_ in self.texts]
        leaves = [states.detach().requires_grad_(True) for states in hidden]
        value = accumulate_groups(
            [
                ForeignRollout(
                    student_states_TH=leaf,
                    student_ids_T=ids,
                    teacher_states_UG=states,
                    teacher_ids_U=other,
                    alignment=alignment,
                    weights=tuple(1 / self.num_groups if g.is_exact else 0.0 for g in alignment.groups),
                )
                for leaf, (_, ids, other, states, alignment) in zip(leaves, self.texts, strict=True)
            ],
            loss,
            student_logprobs=self.head_of(self.student),
            teacher_logprobs=self.head_of(self.teacher),
            matched=self.matched if loss.needs_matched else None,
            slice_tokens=slice_tokens,
        )
        torch.autograd.backward(hidden, [leaf.grad for leaf in leaves])
        return value

    def learn(self, loss: ForeignDivergence, *, steps: int = 30) -> list[float]:
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=3e-3)
        values = []
        for _ in range(steps):
            optimizer.zero_grad()
            values.append(self.gradient(loss))
            optimizer.step()
        return values

    @torch.no_grad()
    def single_token_logprob(self) -> float:
        """Return what the student gives the tokens that are a group of their own, mean in nats."""
        values = []
        for prompt, ids, *_, alignment in self.texts:
            logprobs = self.head_of(self.student)(completion_states(self.student, prompt, ids.tolist()))
            alone = [g.student_start for g in alignment.groups if g.student_end - g.student_start == 1]
            values.append(logprobs[alone, ids[alone]])
        return float(torch.cat(values).mean())

    @torch.no_grad()
    def forward_kl(self) -> float:
        """Return KL(teacher || student) of a teacher in the student's own vocabulary, mean over tokens."""
        total = []
        for prompt, ids, _, states, _ in self.texts:
            q = self.head_of(self.teacher)(states)
            p = self.head_of(self.student)(completion_states(self.student, prompt, ids.tolist()))
            total.append((q.exp() * (q - p)).sum(-1))
        return float(torch.cat(total).mean())


@functools.cache
def taught(wide: bool) -> Any:
    """Return a teacher that has read the texts for a while, in a vocabulary with or without pairs of digits."""
    tokenizer = pairs() if wide else characters()
    network = tiny.model(vocabulary=len(tokenizer), phase=1.0, scale=0.1)
    tokens = TokenBytes(tokenizer)
    prompt = tokens.encode(QUESTION)[0]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        for answer in ANSWERS:
            ids = (*tokens.encode(answer)[0], tokenizer.eos_token_id)
            logits = network.lm_head(completion_states(network, prompt, ids))
            nn.functional.cross_entropy(logits, torch.tensor(ids)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.requires_grad_(False)


def test_the_texts_hold_groups_of_two_kinds() -> None:
    lesson = Lesson(pairs(), taught(True))
    sizes = {
        (g.student_end - g.student_start, g.teacher_end - g.teacher_start)
        for *_, alignment in lesson.texts
        for g in alignment.groups
    }
    assert sizes == {(1, 1), (2, 1)}
    # All characters and the end of the turn; the pairs of digits are the teacher's alone.
    assert len(lesson.matched.student_ids) == len(tiny.CHARACTERS) + 1
    ours = characters().convert_ids_to_tokens(list(lesson.matched.student_ids))
    assert ours == pairs().convert_ids_to_tokens(list(lesson.matched.teacher_ids))


@pytest.mark.parametrize("loss", [ULD, HybridMatching(merge="bayesian")], ids=repr)
def test_the_gradient_reaches_the_trunk(loss: ForeignDivergence) -> None:
    sliced, whole = Lesson(pairs(), taught(True)), Lesson(pairs(), taught(True))
    value = sliced.gradient(loss, slice_tokens=7)
    total = torch.zeros((), dtype=torch.float64)
    for prompt, ids, other, states, alignment in whole.texts:
        p_TV = whole.head_of(whole.student)(completion_states(whole.student, prompt, ids.tolist()))
        p_GV = loss.distributions(p_TV, ids, [(g.student_start, g.student_end) for g in alignment.groups])
        q_UW = whole.head_of(whole.teacher)(states)
        q_GW = loss.distributions(q_UW, other, [(g.teacher_start, g.teacher_end) for g in alignment.groups])
        total = total + loss(p_GV, q_GW, whole.matched).sum() / whole.num_groups
    total.backward()  # type: ignore[no-untyped-call]
    assert value == pytest.approx(total.item(), rel=1e-12)
    assert tiny.largest_gap(tiny.gradients(sliced.student), tiny.gradients(whole.student)) < 1e-12


@pytest.mark.parametrize(
    ("loss", "share"),
    [(ULD, 0.6), (HYBRID, 0.9), (HybridMatching(beta=0.0), 0.6), (HybridMatching(beta=1.0, merge="bayesian"), 0.6)],
    ids=repr,
)
def test_thirty_steps_lower_the_loss(loss: ForeignDivergence, share: float) -> None:
    lesson = Lesson(pairs(), taught(True))
    before = lesson.single_token_logprob()
    values = lesson.learn(loss)
    assert values[-1] < share * values[0]
    if isinstance(loss, HybridMatching):
        # What both vocabularies spell alike it learns by name.
        assert lesson.single_token_logprob() > before + 0.7


def test_uld_learns_the_shape_and_hybrid_the_tokens() -> None:
    after = {}
    for loss in (ULD, HYBRID):
        lesson = Lesson(characters(), taught(False))
        before = lesson.forward_kl()
        values = lesson.learn(loss)
        assert values[-1] < 0.4 * values[0]
        after[loss] = lesson.forward_kl() / before
    # One token is as good as another to it: the loss falls while the student moves away from the teacher.
    assert after[ULD] > 1.0
    assert after[HYBRID] < 0.3


def test_uld_learns_the_same_from_a_teacher_with_its_tokens_shuffled() -> None:
    shuffled = copy.deepcopy(taught(False))
    order = torch.randperm(tiny.VOCABULARY, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shuffled.lm_head.weight.copy_(shuffled.lm_head.weight[order])
    uld = [Lesson(characters(), teacher).learn(ULD, steps=8) for teacher in (taught(False), shuffled)]
    assert uld[0] == pytest.approx(uld[1], rel=1e-9)
    hybrid = [Lesson(characters(), teacher).learn(HYBRID, steps=1)[0] for teacher in (taught(False), shuffled)]
    assert abs(hybrid[0] - hybrid[1]) > 0.01


def test_hybrid_pushes_away_from_a_longer_token_of_the_teacher() -> None:
    # The student writes a, b with P = (.8, .2), then .5; the teacher writes `ab` at .98. Merged (.4, .1) stands against
    # (.01, .01) for a and b: the JSD falls when the group loses mass, although the teacher is sure of the text.
    # uld, |.4 - .98| + |.1 - .01| + .01, changes by -.8 + .2 = -.6 with the .5, and that by .25 with its logit.
    student, teacher = segments((1, 2)), segments((2,))
    gradients = {}
    for loss in (ULD, HYBRID):
        leaf = torch.tensor([[0.8, 0.2], [0.5, 0.5]], dtype=torch.float64).log().requires_grad_(True)
        made = ForeignRollout(
            student_states_TH=leaf,
            student_ids_T=torch.tensor([0, 1]),
            teacher_states_UG=torch.tensor([[0.01, 0.01, 0.98]], dtype=torch.float64).log(),
            teacher_ids_U=torch.tensor([2]),
            alignment=Alignment(student=student, teacher=teacher, groups=align_ends(student.ends, teacher.ends)),
            weights=(1.0,),
        )
        accumulate_groups(
            [made],
            loss,
            student_logprobs=lambda states: states.log_softmax(-1),
            teacher_logprobs=lambda states: states,
            matched=MatchedVocabulary(student_ids=(0, 1), teacher_ids=(0, 1)),
            slice_tokens=8,
        )
        assert leaf.grad is not None
        gradients[loss] = leaf.grad[1, 1].item()
    assert gradients[ULD] == pytest.approx(-0.15)
    assert gradients[HYBRID] > 0.01
