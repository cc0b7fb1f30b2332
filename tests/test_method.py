"""The method section of a run file: names become parts, mistakes become messages."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from omniopd.chunking import EntropyChunker, UniformChunker
from omniopd.config import MethodConfig
from omniopd.errors import ConfigError
from omniopd.learner.losses import LOSSES
from omniopd.method import (
    CHUNKERS,
    CREDITS,
    OBJECTIVES,
    TRANSFORMS,
    Method,
    build_method,
    describe_part,
)
from omniopd.method_checks import check_losses
from omniopd.method_settings import (
    ChunkedSettings,
    ImitationSettings,
    LogprobSettings,
    VerifierReward,
    VerifierSettings,
)
from omniopd.overrides import load_config
from omniopd.parts import build_part
from omniopd.signals.credit import CenteredTarget, RawAgreement, SmoothedTarget, TeacherText
from omniopd.signals.filters import DropTruncated, DropUnaudited
from omniopd.signals.weights import WeightByEntropy, WeightByPosition
from omniopd.supervision.logprob import Divergence, MiniLLM, SampledTokens

DEFAULT_CHUNKER = EntropyChunker(chunk_tokens=50, max_chunks=4)


def build(*transforms: dict[str, Any], **supervision: Any) -> Method:
    return build_method(MethodConfig(supervision=supervision, transforms=list(transforms)))


def test_the_default_method() -> None:
    method = build_method(MethodConfig())
    assert method.supervision == ChunkedSettings()
    assert (method.chunker, method.credit, method.transforms) == (DEFAULT_CHUNKER, TeacherText(), ())
    assert (method.needs_text_teacher, method.needs_distributions, method.authors) == (True, False, {"student": 1.0})
    assert build() == method


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ({"type": "entropy", "chunk_tokens": 8, "max_chunks": 3}, EntropyChunker(chunk_tokens=8, max_chunks=3)),
        ({"type": "uniform", "chunk_tokens": 8, "seed": 2}, UniformChunker(chunk_tokens=8, seed=2)),
    ],
)
def test_every_chunker(spec: dict[str, Any], part: object) -> None:
    assert build(chunker=spec).chunker == part


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ({"type": "teacher_text", "prior": 0.5}, TeacherText(prior=0.5)),
        ({"type": "smoothed", "alpha": 2}, SmoothedTarget(alpha=2.0)),
        ({"type": "centered", "alpha": 0.1}, CenteredTarget(alpha=0.1)),
        ({"type": "raw"}, RawAgreement()),
    ],
)
def test_every_credit(spec: dict[str, Any], part: object) -> None:
    assert build(credit=spec).credit == part


def test_transforms_keep_their_order() -> None:
    method = build(
        {"type": "weight_by_position", "half_life": 50},
        {"type": "drop_truncated"},
        {"type": "drop_unaudited"},
        {"type": "weight_by_entropy", "power": 0.5},
    )
    assert method.transforms == (
        WeightByPosition(half_life=50.0),
        DropTruncated(),
        DropUnaudited(),
        WeightByEntropy(power=0.5),
    )


def test_no_part_is_left_out_of_these_tests() -> None:
    assert set(CHUNKERS) == {"entropy", "uniform"}
    assert set(CREDITS) == {"teacher_text", "smoothed", "centered", "raw"}
    assert set(TRANSFORMS) == {"drop_truncated", "drop_unaudited", "weight_by_entropy", "weight_by_position"}


def test_other_supervisions() -> None:
    logprob = build(type="logprob", weight=0.5)
    assert logprob.supervision == LogprobSettings(type="logprob", weight=0.5)
    assert (logprob.needs_text_teacher, logprob.needs_distributions, logprob.chunker) == (False, True, None)
    verifier = build(type="verifier", normalize_std=False)
    assert verifier.supervision == VerifierSettings(type="verifier", normalize_std=False)
    assert (verifier.needs_text_teacher, verifier.needs_distributions, verifier.credit) == (False, False, None)
    imitation = build(type="imitation")
    assert imitation.supervision == ImitationSettings(type="imitation")
    assert (imitation.needs_text_teacher, imitation.authors) == (True, {"teacher": 1.0})


def test_chunked_settings_are_taken_over() -> None:
    given = {
        "num_continuations": 7,
        "min_continuations": 2,
        "continuation_tokens": 20,
        "similarity": "rouge1",
        "align": False,
        "entropy": "learner",
        "anchor_beta": 0.25,
    }
    settings = build(**given).supervision
    assert {name: getattr(settings, name) for name in given} == given
    assert all(getattr(ChunkedSettings(), name) != value for name, value in given.items())


@pytest.mark.parametrize(
    ("supervision", "told"),
    [
        (
            {"type": "chunkd"},
            r"method\.supervision\.type: there is no value 'chunkd'; did you mean 'chunked'\? Allowed: ",
        ),
        ({"type": "zzz"}, r"there is no value 'zzz'\. Allowed: chunked, logprob, verifier, imitation"),
        ({"anchor_betta": 1}, r"method\.supervision\.anchor_betta: .*did you mean 'anchor_beta'\?"),
        ({"anchor_beta": -1}, r"method\.supervision\.anchor_beta: .*greater than or equal to 0, got -1"),
        ({"num_continuations": 0}, r"method\.supervision\.num_continuations: .*got 0"),
        ({"num_continuations": 4, "min_continuations": 5}, "min_continuations is 5, but only num_continuations = 4"),
        ({"similarity": "edti"}, "edit"),
        ({"type": "logprob", "wieght": 1}, r"did you mean 'weight'\?"),
        ({"type": "logprob", "weight": 0}, r"method\.supervision\.weight: .*greater than 0"),
        ({"type": "verifier", "anchor_beta": 1}, r"method\.supervision\.anchor_beta: there is no setting"),
        ({"type": "imitation", "weight": 1}, r"method\.supervision\.weight: there is no setting"),
        ({"chunker": {"type": "entropic"}}, r"method\.supervision\.chunker\.type: .*did you mean 'entropy'\?"),
        ({"chunker": {}}, r"chunker\.type: there is no value None"),
        ({"chunker": {"type": "entropy", "chunk_token": 8}}, r"chunker\.chunk_token: .*did you mean 'chunk_tokens'\?"),
        ({"chunker": {"type": "entropy", "chunk_tokens": 0}}, r"method\.supervision\.chunker.*chunk_tokens is 0"),
        ({"chunker": {"type": "entropy", "chunk_tokens": "many"}}, r"chunker\.chunk_tokens: .*got 'many'"),
        ({"credit": {"type": "smooth"}}, r"credit\.type: .*did you mean 'smoothed'\?"),
        (
            {"credit": {"type": "smoothed", "alhpa": 1}},
            r"credit\.alhpa: there is no setting of smoothed 'alhpa'; did you",
        ),
        ({"credit": {"type": "smoothed", "alpha": -1}}, "alpha must be positive, got -1"),
        ({"credit": {"type": "raw", "alpha": 1}}, r"credit\.alpha: there is no setting of raw 'alpha'\."),
    ],
)
def test_mistakes_name_the_key_and_the_nearest_one(supervision: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build(**supervision)


def test_every_objective_of_a_teachers_logprobs() -> None:
    assert build(type="logprob").objective == Divergence()
    assert build(type="logprob", objective="sampled").objective == SampledTokens()
    half = build(type="logprob", objective={"type": "sampled", "discount": 0.5})
    assert half.objective == SampledTokens(discount=0.5) and not half.uses_divergence
    settings = {"discount": 0.9, "length_normalize": False, "single_step": False}
    assert build(type="logprob", objective={"type": "minillm", **settings}).objective == MiniLLM(**settings)  # type: ignore[arg-type]
    assert build(type="logprob", objective="minillm").uses_divergence
    assert set(OBJECTIVES) == {"divergence", "sampled", "minillm"}
    reward = build(type="logprob", verifier={"weight": 0.5, "normalize_std": False}).supervision
    assert isinstance(reward, LogprobSettings)
    assert reward.verifier == VerifierReward(weight=0.5, normalize_std=False)


def test_who_writes() -> None:
    mixed = build(type="logprob", authors={"student": 0.5, "teacher": 0.25, "dataset": 0.25})
    assert mixed.authors == {"student": 0.5, "teacher": 0.25, "dataset": 0.25}
    assert (mixed.needs_text_teacher, mixed.needs_distributions) == (True, True)
    assert "50% by the student, 25% by the teacher, 25% by the dataset" in mixed.in_words()
    given = build(type="logprob", authors={"student": 0.5, "dataset": 0.5, "teacher": 0})
    assert (given.authors, given.needs_text_teacher) == ({"student": 0.5, "dataset": 0.5}, False)
    assert build(type="logprob").authors == build(type="verifier").authors == build().authors == {"student": 1.0}


@pytest.mark.parametrize(
    ("supervision", "told"),
    [
        ({"objective": "sampeld"}, r"method\.supervision\.objective\.type: .*did you mean 'sampled'\?"),
        ({"objective": {"type": "sampled", "single_step": True}}, "there is no setting of sampled 'single_step'"),
        ({"objective": {"type": "minillm", "discount": 1.1}}, r"objective: discount must be in \[0, 1\], got 1\.1"),
        ({"objective": {"type": "sampled", "discount": -0.1}}, "discount must be in"),
        ({"objective": {"type": "sampled", "estimator": "k2"}}, r"its square punishes tokens.*use estimator: k1, or b"),
        ({"objective": {"type": "sampled", "estimator": "k3"}}, r"reverse KL minus that of the forward KL.*use estima"),
        (
            {"authors": {"student": 0.5}},
            r"method\.supervision\.authors is \{'student': 0\.5\}; expected shares.*add up",
        ),
        ({"authors": {"student": 1.5, "teacher": -0.5}}, "expected shares of 0 or more"),
        ({"authors": {"studnt": 1}}, r"method\.supervision\.authors\.studnt"),
        (
            {"authors": {"student": 0.5, "teacher": 0.5}, "objective": "sampled"},
            r"share of teacher, but objective: samp",
        ),
        (
            {"authors": {"dataset": 1}, "objective": "minillm"},
            r"share of dataset, but objective: minillm learns from tok",
        ),
        ({"authors": {"teacher": 1}, "verifier": {}}, r"verifier is set, but .* has no share of `student`"),
        ({"verifier": {"weight": 0}}, r"method\.supervision\.verifier\.weight: .*greater than 0"),
    ],
)
def test_white_box_mistakes_are_told_with_a_way_out(supervision: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build(type="logprob", **supervision)


@pytest.mark.parametrize(
    ("supervision", "loss", "told"),
    [
        ({"type": "verifier"}, {"type": "jsd"}, "jsd would never be used, because method.supervision feeds no diverg"),
        ({}, {"type": "reverse_kl"}, r"use method\.supervision=\{type: logprob\}"),
        ({"type": "logprob", "objective": "sampled"}, {"type": "reverse_kl"}, "would never be used"),
        ({"type": "logprob", "objective": "minillm"}, {"type": "forward_kl"}, "cannot be MiniLLM's single step"),
        ({"type": "logprob", "objective": "minillm"}, {"type": "reverse_kl", "temperature": 2}, "at temperature 1"),
        (
            {"type": "logprob", "authors": {"student": 0.5, "teacher": 0.5}},
            {"type": "sampled_token"},
            "from tokens that the student drew itself",
        ),
    ],
)
def test_losses_that_do_not_fit_the_method_are_refused(
    supervision: dict[str, Any], loss: dict[str, Any], told: str
) -> None:
    check_losses({"kl": loss})
    with pytest.raises(ConfigError, match=r"^learner\.losses\.kl: .*" + told):
        check_losses({"kl": loss}, build(**supervision))
    check_losses({"kl": loss}, build(type="logprob"))
    check_losses({"pg": {"type": "policy_gradient"}}, build(**supervision))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["opd-sampled-token", "rollout.temperature=0.7"],
            r"^rollout\.temperature is 0\.7: .*is biased; use temperature 1",
        ),
        (["minillm", "rollout.top_p=0.9"], r"^rollout\.top_p is 0\.9: .*objective: divergence"),
        (
            ["opd-reverse-kl", "rollout.top_p=0.9", "learner.losses={kl: {type: sampled_token}}"],
            "is biased; use top_p 1",
        ),
        (["opd-verifier", "data.verifier=none"], r"^data\.verifier is none, but method\.supervision rewards"),
        (["grpo-verifier", "data.verifier=none"], r"use data\.verifier: auto"),
    ],
)
def test_inputs_that_the_objective_cannot_use_are_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(words[:1], words[1:])
    # A divergence over the vocabulary holds whatever was drawn.
    load_config(["opd-reverse-kl"], ["rollout.temperature=0.7", "data.verifier=none"])


@pytest.mark.parametrize(
    ("transform", "told"),
    [
        ({"type": "drop_truncate"}, r"method\.transforms\[1\]\.type: .*did you mean 'drop_truncated'\?"),
        ({"type": "weight_by_position"}, r"method\.transforms\[1\] \(weight_by_position\) needs half_life"),
        ({"type": "weight_by_entropy", "pwer": 1}, r"method\.transforms\[1\]\.pwer: .*did you mean 'power'\?"),
        ({"type": "weight_by_position", "half_life": 0}, "half_life must be positive, got 0"),
    ],
)
def test_mistakes_in_transforms_name_their_place(transform: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build({"type": "drop_unaudited"}, transform)


@pytest.mark.parametrize("credit", ["smoothed", "raw"])
def test_the_published_method_without_an_anchor_must_be_confirmed(credit: str) -> None:
    with pytest.raises(ConfigError, match=r"anchor_beta is 0: .*8\.28 instead of 69\.08.*allow_zero_anchor=true"):
        build(credit={"type": credit}, anchor_beta=0)
    build(credit={"type": credit}, anchor_beta=0, allow_zero_anchor=True)
    build(credit={"type": credit}, anchor_beta=1e-3)


@pytest.mark.parametrize("credit", ["teacher_text", "centered"])
def test_signed_signals_may_go_without_an_anchor(credit: str) -> None:
    assert "with no anchor" in build(credit={"type": credit}, anchor_beta=0).in_words()


def test_objectives_in_words() -> None:
    assert build(anchor_beta=0.25).in_words() == (
        "move the student towards what the teacher's continuations say next, token by token; hold all other tokens "
        "with 0.25 x KL(initial student || student)."
    )
    said = build({"type": "weight_by_entropy"}, credit={"type": "smoothed"}, similarity="rouge1").in_words()
    assert said.startswith("reinforce each audited chunk by its agreement (rouge1) with the teacher's text; hold")
    assert said.endswith(", then WeightByEntropy(power=1.0).")
    words = {
        build(credit={"type": "centered"}).in_words(),
        build(credit={"type": "raw"}).in_words(),
        build(type="logprob").in_words(),
        build(type="logprob", objective="sampled").in_words(),
        build(type="logprob", objective={"type": "sampled", "discount": 0.5}).in_words(),
        build(type="logprob", objective="minillm").in_words(),
        build(type="logprob", objective={"type": "minillm", "single_step": False}).in_words(),
        build(type="logprob", verifier={"weight": 0.5}).in_words(),
        build(type="verifier").in_words(),
        build(type="imitation").in_words(),
    }
    assert len(words) == 10 and all(w.endswith(".") for w in words)


def test_parts_with_factories_need_nothing() -> None:
    @dataclasses.dataclass(frozen=True)
    class Part:
        names: list[str] = dataclasses.field(default_factory=list)
        hidden: int = dataclasses.field(default=3, init=False)

    part = build_part("x", {"type": "part", "names": ["a"]}, {"part": Part})
    assert part == Part(names=["a"])
    assert describe_part(part) == "Part(names=['a'])"
    with pytest.raises(ConfigError, match=r"x\.hidden: there is no setting of part 'hidden'"):
        build_part("x", {"type": "part", "hidden": 4}, {"part": Part})


def test_losses_of_the_run_file_are_those_of_the_learner() -> None:
    for stream, table in LOSSES.items():
        for name in table:
            check_losses({stream: {"type": name}})
    check_losses({"kl": {"type": "forward_kl"}})
    for losses, told in (
        ({"kll": {"type": "reverse_kl"}}, "did you mean 'kl'"),
        ({"kl": {"typ": "reverse_kl"}}, "did you mean 'type'"),
        ({"kl": {"type": "revers_kl"}}, "did you mean 'reverse_kl'"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_losses(losses)
