"""Several teachers: which prompt goes to whom, what that costs in expectation, and what run files may say."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tiny
from omniopd.assembly import build_route
from omniopd.config import LearnerConfig, MethodConfig
from omniopd.errors import ConfigError
from omniopd.learner.learner import Learner
from omniopd.learner.policy import LanguageModel
from omniopd.learner.teachers import LiveTeacher
from omniopd.logits.reading import SameVocabulary
from omniopd.method import Method, build_method
from omniopd.overrides import load_config
from omniopd.supervision.logprob import LogprobSupervision
from omniopd.supervision.routed import ByColumn, ByWeight, Route, RoutedSupervision
from omniopd.types import Prompt, Rollout, StepContext, TokenSignal

CTX = StepContext(step=0, num_steps=1)


def prompt(name: str = "p0", **fields: Any) -> Prompt:
    return dataclasses.replace(tiny.prompt(name), **fields)


# By a column


def test_a_column_names_the_teacher() -> None:
    by_id = ByColumn(column="teacher_id", names={"big": "big", "small": "small"})
    assert [by_id(prompt(teacher_id=name), CTX) for name in ("small", "big")] == ["small", "big"]
    by_domain = ByColumn(column="domain", names={"algebra": "math", "geometry": "math", "poems": "prose"})
    assert by_domain(prompt(domain="geometry", teacher_id="prose"), CTX) == "math"


def test_a_default_takes_the_others_and_only_them() -> None:
    route = ByColumn(column="domain", names={"poems": "prose"}, default="rest")
    found = [route(prompt(domain=domain), CTX) for domain in ("poems", "code", None)]
    assert found == ["prose", "rest", "rest"]
    route.check([prompt(domain="code"), prompt()])


def test_prompts_without_a_route_are_counted_before_the_run() -> None:
    route = ByColumn(column="domain", names={"math": "a", "code": "b"})
    named = [prompt(f"p{i}", domain=domain) for i, domain in enumerate(["math", "law", "law", None, "code"])]
    with pytest.raises(
        ConfigError,
        match=r"^3 of 5 prompts have no route: .*domain is 'law', none, the routes are for 'math', 'code'; "
        r"add a route, fix the column, or set method\.supervision\.default$",
    ):
        route.check(named)
    route.check([named[0], named[4]])
    # Only the first few values are listed.
    many = [prompt(f"p{i}", domain=f"d{i}") for i in range(1200)]
    with pytest.raises(ConfigError, match=r"^1,200 of 1,200 prompts .*'d0', 'd1', 'd2', the routes"):
        route.check(many)


@pytest.mark.parametrize(("domain", "seen"), [("law", "'law'"), (None, "none")])
def test_a_prompt_without_a_route_stops_the_step(domain: str | None, seen: str) -> None:
    route = ByColumn(column="domain", names={"math": "a"})
    supervision = RoutedSupervision(route=route, supervisions={"a": Noted("a", [])})
    with pytest.raises(ConfigError, match=rf"prompt p7 has no route: .*domain is {seen}"):
        asyncio.run(supervision.signals([tiny.rollout(of=prompt("p7", domain=domain))], CTX))


# By weight


def test_the_draw_is_that_of_seed_step_and_prompt_alone() -> None:
    route = ByWeight(weights={"a": 1.0, "b": 1.0})
    prompts = [prompt(f"p{i}") for i in range(64)]

    def drawn(seed: int, step: int) -> list[str]:
        return [route(p, StepContext(step=step, num_steps=9, seed=seed)) for p in prompts]

    first = drawn(3, 0)
    # Another number of steps, the data's columns and another object change nothing; seed and step do.
    assert (
        first
        == drawn(3, 0)
        == [
            ByWeight(weights={"a": 2.0, "b": 2.0})(
                dataclasses.replace(p, domain="x", text="?"), StepContext(step=0, num_steps=1, seed=3)
            )
            for p in prompts
        ]
    )
    for other in (drawn(4, 0), drawn(3, 1)):
        # 64 fair coins: 32 differ, standard deviation 4.
        assert 16 <= sum(a != b for a, b in zip(first, other, strict=True)) <= 48
    route.check([prompt(domain=None)])


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (0.2, 0.5, 0.1), (1e-6, 1.0, 7.0)])
def test_shares_follow_the_weights(weights: tuple[float, ...]) -> None:
    route = ByWeight(weights={f"t{i}": weight for i, weight in enumerate(weights)})
    number = 4000
    found = Counter(route(prompt(f"p{i}"), CTX) for i in range(number))
    for i, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(found[f"t{i}"] - number * share) <= 3 * math.sqrt(number * share * (1 - share)) + 1e-9


def test_draws_of_different_prompts_are_independent() -> None:
    route = ByWeight(weights={"a": 1.0, "b": 1.0})
    number = 2000
    both = 0
    for step in range(number):
        ctx = StepContext(step=step, num_steps=number)
        both += route(prompt("p0"), ctx) == route(prompt("p1"), ctx)
    assert abs(both - number / 2) <= 3 * math.sqrt(number / 4)


# Several supervisions


class Noted:
    """Marks its signals with its name and remembers what it was asked."""

    def __init__(self, name: str, order: list[str]) -> None:
        self._name = name
        self._order = order
        self.asked: list[list[str]] = []

    async def signals(self, rollouts: Sequence[Rollout], ctx: StepContext) -> list[TokenSignal]:
        self.asked.append([r.id for r in rollouts])
        self._order.append(self._name)
        return [TokenSignal(rollout=r, notes=(self._name, str(ctx.step))) for r in rollouts]


def test_every_part_is_asked_once_about_its_own_and_the_order_is_kept() -> None:
    order: list[str] = []
    parts = {name: Noted(name, order) for name in ("a", "b", "idle")}
    owners = {"p0": "b", "p1": "a", "p2": "b"}
    prompts = {name: prompt(name, teacher_id=owner) for name, owner in owners.items()}
    names = ("p0/0", "p1/0", "p0/1", "p2/0", "p1/1", "p2/1")
    rollouts = [tiny.rollout("12", name=name, of=prompts[name[:2]]) for name in names]
    route = ByColumn(column="teacher_id", names={name: name for name in parts})
    supervision = RoutedSupervision(route=route, supervisions=parts)
    made = asyncio.run(supervision.signals(rollouts, StepContext(step=2, num_steps=3)))
    assert [s.rollout for s in made] == rollouts
    assert [s.notes for s in made] == [(owners[name[:2]], "2") for name in names]
    assert parts["a"].asked == [["p1/0", "p1/1"]]
    assert parts["b"].asked == [["p0/0", "p0/1", "p2/0", "p2/1"]]
    assert parts["idle"].asked == []
    assert order == ["a", "b"]
    assert asyncio.run(supervision.signals([], CTX)) == []


def test_all_rollouts_of_a_prompt_go_to_one_teacher() -> None:
    parts = {name: Noted(name, []) for name in ("a", "b")}
    supervision = RoutedSupervision(route=ByWeight(weights={"a": 1.0, "b": 1.0}), supervisions=parts)
    rollouts = [tiny.rollout("1", name=f"p{i}/{g}", of=prompt(f"p{i}")) for g in range(4) for i in range(12)]
    made = asyncio.run(supervision.signals(rollouts, CTX))
    chosen = {i: {s.notes[0] for s in made if s.rollout.prompt.id == f"p{i}"} for i in range(12)}
    assert all(len(names) == 1 for names in chosen.values())
    assert set.union(*chosen.values()) == {"a", "b"}


WEIGHTS = {"a": 3.0, "b": 1.0}


def step_loss(route: Route, rollouts: Sequence[Rollout], ctx: StepContext = CTX) -> float:
    """Return the loss of a step of the real learner with two teachers in process."""
    networks = {"a": tiny.model(phase=1.0), "b": tiny.model(phase=2.0)}
    teachers = {name: LiveTeacher(LanguageModel(n, compute_dtype=torch.float64)) for name, n in networks.items()}
    learner = Learner(tiny.policy(), LearnerConfig(), num_steps=1, teachers=teachers, keep_reference=False)
    parts = {name: LogprobSupervision(reader=SameVocabulary("student"), name=name) for name in WEIGHTS}
    signals = asyncio.run(RoutedSupervision(route=route, supervisions=parts).signals(rollouts, ctx))
    return learner.update(1, signals).loss


def test_the_expected_step_is_the_weighted_mean_of_the_teachers() -> None:
    texts = {"p0": ("1+2=3", "12"), "p1": ("4", "5+5"), "p2": ("0=0", "7;7")}
    rollouts = [
        tiny.rollout(text, name=f"{name}/{g}", of=prompt(name))
        for name, pair in texts.items()
        for g, text in enumerate(pair)
    ]

    @dataclasses.dataclass(frozen=True)
    class Assigned:
        owners: tuple[str, ...]

        def __call__(self, prompt: Prompt, ctx: StepContext) -> str:
            return self.owners[int(prompt.id[1:])]

    losses = {owners: step_loss(Assigned(owners), rollouts) for owners in itertools.product("ab", repeat=3)}
    total = sum(WEIGHTS.values())
    chance = {owners: math.prod(WEIGHTS[name] / total for name in owners) for owners in losses}
    # (3 x loss with a alone + loss with b alone) / 4
    mean = (3 * losses["a", "a", "a"] + losses["b", "b", "b"]) / 4
    assert abs(losses["a", "a", "a"] - losses["b", "b", "b"]) > 0.05 * mean
    assert sum(chance[owners] * losses[owners] for owners in losses) == pytest.approx(mean, rel=1e-12)
    # And the draws have those chances.
    route, number = ByWeight(weights=WEIGHTS), 3000
    drawn = []
    for step in range(number):
        ctx = StepContext(step=step, num_steps=number, seed=1)
        drawn.append(losses[tuple(route(prompt(name), ctx) for name in texts)])  # type: ignore[index]
    variance = sum(chance[owners] * (losses[owners] - mean) ** 2 for owners in losses)
    assert abs(math.fsum(drawn) / number - mean) <= 3 * math.sqrt(variance / number)
    # What is drawn is what the step computes.
    owners = tuple(route(prompt(name), CTX) for name in texts)
    assert step_loss(route, rollouts) == losses[owners]  # type: ignore[index]


# From a run file


def routed(**settings: Any) -> Method:
    return build_method(MethodConfig(supervision={"type": "routed", **settings}))


def test_a_run_file_becomes_a_route() -> None:
    by_id = routed(routes={"a": {}, "b": {"supervision": {"type": "verifier"}}}, default="b")
    assert build_route(by_id.supervision) == ByColumn(column="teacher_id", names={"a": "a", "b": "b"}, default="b")
    domains = {"a": {"domains": ["x", "y"]}, "b": {"domains": ["z"]}, "rest": {}}
    by_domain = routed(by="domain", routes=domains, default="rest")
    assert build_route(by_domain.supervision) == ByColumn(
        column="domain", names={"x": "a", "y": "a", "z": "b"}, default="rest"
    )
    by_weight = routed(by="weight", routes={"a": {"weight": 0.25}, "b": {}})
    assert build_route(by_weight.supervision) == ByWeight(weights={"a": 0.25, "b": 1.0})
    assert build_route(build_method(MethodConfig()).supervision) is None


def test_the_parts_of_a_routed_method() -> None:
    method = routed(
        routes={
            "logits": {"supervision": {"type": "logprob", "weight": 0.5}},
            "text": {"supervision": {"type": "chunked", "anchor_beta": 0}},
            "none": {"supervision": {"type": "verifier"}},
        }
    )
    assert list(method.routes) == ["logits", "text", "none"]
    assert [p.needs_distributions for p in method.parts] == [True, False, False]
    assert [p.needs_text_teacher for p in method.parts] == [False, True, False]
    assert [p.needs_teacher for p in method.parts] == [True, True, False]
    assert (method.needs_distributions, method.needs_text_teacher, method.needs_reference) == (True, True, False)
    assert (method.uses_divergence, method.authors) == (True, {"student": 1.0})
    alone = routed(routes={"none": {"supervision": {"type": "verifier"}}})
    assert (alone.needs_teacher, alone.uses_divergence, alone.needs_reference) == (False, False, False)
    anchored = routed(routes={"none": {"supervision": {"type": "verifier"}}, "text": {}})
    assert anchored.needs_reference


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"routes": {}}, r"method\.supervision\.routes is empty; expected at least one route"),
        ({}, r"method\.supervision\.routes"),
        ({"routes": {"a": {}}, "by": "color"}, r"method\.supervision\.by: .*'teacher_id', 'domain' or 'weight'"),
        ({"routes": {"a": {"wieght": 2}}}, "wieght"),
        ({"routes": {"a": {"weight": 0}}, "by": "weight"}, r"routes\.a\.weight: .*greater than 0"),
        (
            {"routes": {"big": {}, "small": {}}, "default": "smal"},
            r"method\.supervision\.default: there is no route 'smal'; did you mean 'small'\? Allowed: big, small",
        ),
        (
            {"routes": {"a": {}}, "by": "weight", "default": "a"},
            r"default is 'a', but by: weight draws a route for every prompt; leave it out",
        ),
        (
            {"routes": {"a": {"domains": ["x"]}, "b": {}}, "by": "domain"},
            r"routes\.b has no domains, so by: domain never asks it; list some, or make it the default",
        ),
        (
            {"routes": {"a": {"domains": ["x", "y"]}, "b": {"domains": ["z", "y"]}}, "by": "domain"},
            r"the domain 'y' is listed by the routes a and b; expected one of them",
        ),
        (
            {"routes": {"a": {"supervision": {"type": "imitation"}}}},
            r"routes\.a\.supervision\.type: there is no value 'imitation'.* Allowed: chunked, logprob, verifier",
        ),
        (
            {"routes": {"a": {"supervision": {"type": "routed", "routes": {"b": {}}}}}},
            r"routes\.a\.supervision\.type: there is no value 'routed'",
        ),
        (
            {"routes": {"a": {"supervision": {"type": "logprbo"}}}},
            r"routes\.a\.supervision\.type: .*did you mean 'logprob'\?",
        ),
        (
            {"routes": {"a": {"supervision": {"type": "logprob", "objective": "zzz"}}}},
            r"^method\.supervision\.routes\.a: method\.supervision\.objective",
        ),
        (
            {"routes": {"a": {"supervision": {"type": "logprob", "authors": {"student": 0.5, "dataset": 0.5}}}}},
            r"routes\.a\.supervision\.authors is .*the student writes all rollouts; leave authors out",
        ),
    ],
)
def test_routes_that_cannot_work_are_refused_with_a_way_out(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        routed(**settings)


@pytest.mark.parametrize("name", ["teacher", "", "a/b", "..", "../x", "-a", " a", "a b", "\u00e9"])
def test_a_route_names_a_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a name of letters, digits and \. _ : - other than teacher"):
        routed(routes={name: {}})


@pytest.mark.parametrize("name", ["qwen3-8b", "vllm:big", "v1.5", "A_1", "teacher2"])
def test_names_of_routes(name: str) -> None:
    assert list(routed(routes={name: {}}).routes) == [name]


WORDS = ["student.model=a", "data.train=b"]
TWO = (
    "method.supervision={type: routed, routes: {a: {supervision: {type: logprob}}, b: {supervision: {type: verifier}}}}"
)


def test_each_route_has_the_teacher_of_its_name() -> None:
    config = load_config(overrides=[*WORDS, TWO, "teachers.a.spec=hf:big", "teachers.a.max_attempts=2"])
    method = build_method(config.method)
    a, b = method.roles(config)
    assert (a.name, a.label, a.folder, a.teacher.spec, a.teacher.max_attempts) == ("a", "teachers.a", "a", "hf:big", 2)
    assert a.alone(config).teacher == a.teacher
    # It needs none, and has the settings of the default one.
    assert (b.name, b.method) == ("b", method.routes["b"])
    (only,) = build_method(MethodConfig()).roles(load_config(overrides=WORDS))
    assert (only.name, only.label, only.folder) == ("teacher", "teacher", None)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([TWO], r"routes\.a asks a teacher, but there is no teachers\.a; add it with its spec"),
        ([TWO, "teacher.spec=hf:big"], r"there is no teachers\.a"),
        (
            [
                "method.supervision={type: routed, routes: {weights: {}, wieghts: {}}}",
                "teachers.weights.spec=hf:big",
            ],
            r"method\.supervision\.routes\.wieghts: there is no teacher 'wieghts'; did you mean 'weights'\?",
        ),
        (
            [TWO, "teachers.a.spec=hf:big", "teachers.bb.spec=hf:c"],
            r"teachers\.bb: there is no route 'bb'; did you mean 'b'\? Allowed: a, b",
        ),
        (
            ["teachers.a.spec=hf:big"],
            r"teachers\.a is set, but only method\.supervision\.type: routed uses several teachers; use `teacher`",
        ),
        ([TWO, "teachers.a.spec=openai:x"], r"'openai:x' only gives text; use teachers\.a\.spec=hf:MODEL"),
        ([TWO, "teachers.a.spec=hf:big", "data.verifier=none"], r"data\.verifier is none"),
        (["method.supervision={type: routed, routes: {a: {}}}"], r"routes\.a asks a teacher, but there is no"),
    ],
)
def test_routes_and_teachers_go_together(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(overrides=[*WORDS, *words])
