"""What does not go together in a run file: every refusal, and that the way out it names is one."""

from __future__ import annotations

import re

import pytest

from omniopd.config import RunConfig
from omniopd.errors import ConfigError
from omniopd.method import build_method
from omniopd.method_checks import ACCESSES, Access, access_of, check_inputs, check_losses
from omniopd.overrides import load_config

REVERSE, FORWARD = "{type: reverse_kl}", "{type: forward_kl}"
SAMPLED_LOSS = "{type: sampled_token, estimator: k2}"
VLLM = "vllm:big@http://localhost:8000"


def words(supervision: str = "", *more: str, kl: str | None = None, spec: str = "hf:big") -> list[str]:
    """Return a run file; `supervision` are the settings of `logprob`."""
    settings = "type: logprob" + (f", {supervision}" if supervision else "")
    made = ["student.model=a", "data.train=b", f"method.supervision={{{settings}}}", f"teacher.spec='{spec}'"]
    return made + ([f"learner.losses.kl={kl}"] if kl else []) + list(more)


FIXED = "authors: {dataset: 1}"


def load(written: list[str]) -> RunConfig:
    config = load_config(overrides=written)
    # The same rules for those who use Python alone.
    method = build_method(config.method)
    check_losses(config.learner.losses, method)
    check_inputs(config, method)
    return config


CASES = [
    # A loss that nothing feeds.
    (
        words("objective: sampled", kl=REVERSE),
        "learner.losses.kl: reverse_kl would never be used, because method.supervision feeds no divergence to a "
        "teacher; leave it out, or use method.supervision={type: logprob}",
        [words("objective: sampled"), words(kl=REVERSE)],
    ),
    (
        words("objective: {type: minillm, single_step: false}", kl=FORWARD),
        "learner.losses.kl: forward_kl would never be used",
        [words("objective: {type: minillm, single_step: false}")],
    ),
    # MiniLLM's single step.
    (
        words("objective: minillm", kl=FORWARD),
        "learner.losses.kl: forward_kl cannot be MiniLLM's single step, which is the reverse KL at temperature 1; "
        "leave it out, or set method.supervision.objective={type: minillm, single_step: false}",
        [words("objective: minillm"), words("objective: {type: minillm, single_step: false}")],
    ),
    (
        words("objective: minillm", kl="{type: reverse_kl, temperature: 2.0}"),
        "reverse_kl cannot be MiniLLM's single step, which is the reverse KL at temperature 1",
        [words("objective: minillm", kl="{type: reverse_kl, temperature: 1.0}")],
    ),
    # Estimates from samples, of text that somebody else wrote.
    (
        words("authors: {student: 0.5, dataset: 0.5}", kl=SAMPLED_LOSS),
        "authors is {'student': 0.5, 'dataset': 0.5}; use a full divergence such as reverse_kl, or "
        "authors={student: 1}",
        [
            words("authors: {student: 0.5, dataset: 0.5}", kl=REVERSE),
            words("authors: {student: 1}", kl=SAMPLED_LOSS),
            words("authors: {student: 1, dataset: 0}", kl=SAMPLED_LOSS),
        ],
    ),
    # Nobody meters log-probs.
    (
        words("", "teacher.budget_calls=1", spec=VLLM),
        "teacher.budget_calls is 1, but budgets are for teachers that are asked for text",
        [
            words("", "teacher.budget_calls=null", spec=VLLM),
            ["student.model=a", "data.train=b", "teacher.budget_calls=1"],
        ],
    ),
    # Vocabularies.
    (
        words("alignment: groups", kl="{type: reverse_kl, temperature: 2.0}"),
        "learner.losses.kl is {type: reverse_kl, temperature: 2.0}, which compares token by token",
        [words("alignment: groups", kl="{type: uld}")],
    ),
    (
        words("alignment: groups"),
        "which compares token by token; use learner.losses.kl={type: hybrid} or {type: uld}, or "
        "method.supervision.objective: sampled",
        [
            words("alignment: groups", kl="{type: hybrid}"),
            words("alignment: groups", kl="{type: uld}"),
            words("alignment: groups, objective: sampled"),
        ],
    ),
    (
        words("alignment: groups", kl="{type: jsd}"),
        "method.supervision.alignment is groups, but learner.losses.kl is {type: jsd}, which compares",
        [words("alignment: groups", kl="{type: uld}")],
    ),
    # A single step compares token by token, so it has a way out of its own.
    (
        words("alignment: groups, objective: minillm", kl="{type: hybrid}"),
        "method.supervision.objective is minillm, whose single step compares token by token, but "
        "method.supervision.alignment is groups; set method.supervision.objective={type: minillm, single_step: false}, "
        "or objective: divergence with learner.losses.kl={type: hybrid}",
        [
            words("alignment: groups, objective: {type: minillm, single_step: false}"),
            words("alignment: groups, objective: divergence", kl="{type: hybrid}"),
        ],
    ),
    (
        words("alignment: groups, objective: minillm"),
        "set method.supervision.objective={type: minillm, single_step: false}, or objective: divergence",
        [words("alignment: groups, objective: {type: minillm, single_step: false}")],
    ),
    (
        words(kl="{type: uld}"),
        "which compares groups of tokens, but method.supervision.alignment is none; set "
        "method.supervision.alignment: groups, or use a loss for one vocabulary such as reverse_kl",
        [words("alignment: groups", kl="{type: uld}"), words(kl=REVERSE)],
    ),
    (
        words("alignment: groups", kl="{type: uld}", spec=VLLM),
        f"which need the teacher's weights, but teacher.spec is '{VLLM}'; use hf:MODEL, or "
        "method.supervision.objective: sampled",
        [
            words("alignment: groups", kl="{type: uld}", spec="hf:big"),
            words("alignment: groups, objective: sampled", spec=VLLM),
        ],
    ),
    # Samples that are not the student's own distribution.
    (
        words("objective: sampled", "rollout.temperature=0.7"),
        "rollout.temperature is 0.7: the objective estimates from sampled tokens, which then are not drawn from the "
        "student's own distribution, and is biased; use temperature 1, or a divergence over the vocabulary "
        "(method.supervision.objective: divergence), which holds whatever was drawn",
        [
            words("objective: sampled", "rollout.temperature=1.0"),
            words("objective: divergence", "rollout.temperature=0.7"),
        ],
    ),
    (
        words("objective: minillm", "rollout.top_p=0.9"),
        "rollout.top_p is 0.9: the objective estimates from sampled tokens",
        [words("objective: minillm", "rollout.top_p=1.0"), words("objective: divergence", "rollout.top_p=0.9")],
    ),
    (
        words("", "rollout.top_p=0.95", kl=SAMPLED_LOSS),
        "use top_p 1, or a divergence over the vocabulary",
        [words("", kl=SAMPLED_LOSS), words("", "rollout.top_p=0.95", kl=REVERSE)],
    ),
    # Verdicts.
    (
        words("verifier: {weight: 0.5}", "data.verifier=none"),
        "data.verifier is none, but method.supervision rewards right answers; use data.verifier: auto, or leave the "
        "verifier out of method.supervision",
        [words("verifier: {weight: 0.5}", "data.verifier=auto"), words("", "data.verifier=none")],
    ),
    # Which teacher can do what.
    (
        words(spec="openai:gpt-4o"),
        "method.supervision.type logprob needs the teacher's distributions, and 'openai:gpt-4o' only gives text; use "
        "teacher.spec=hf:MODEL, vllm:MODEL@URL, scores:FOLDER or states:FOLDER, or method.supervision.type=chunked",
        [
            *(words(spec=spec) for spec in ("hf:big", VLLM)),
            *(words(FIXED, spec=spec) for spec in ("scores:there", "states:there")),
            ["student.model=a", "data.train=b", "teacher.spec=openai:gpt-4o", "method.supervision.type=chunked"],
        ],
    ),
    # What lies on disk was said of fixed text, and fresh rollouts are not there.
    *(
        (
            words(supervision, spec=spec),
            f"teacher.spec is {spec!r}, what a teacher said of fixed answers, but method.supervision.authors is "
            f"{authors}; use authors={{dataset: 1}} with a divergence, or teacher.spec=hf:MODEL",
            [words(FIXED, spec=spec), words(supervision)],
        )
        for spec, supervision, authors in (
            ("scores:there", "", {"student": 1.0}),
            ("states:there", "objective: sampled", {"student": 1.0}),
            ("states:there", "authors: {student: 0.5, dataset: 0.5}", {"student": 0.5, "dataset": 0.5}),
            ("scores:there", "authors: {teacher: 1}", {"teacher": 1.0}),
        )
    ),
    # Several teachers.
    (
        words("", "teachers.big.spec=hf:big"),
        "teachers.big is set, but only method.supervision.type: routed uses several teachers; use `teacher` for one",
        [words()],
    ),
]


@pytest.mark.parametrize(("written", "complaint", "ways_out"), CASES, ids=[case[1][:60] for case in CASES])
def test_a_refusal_names_a_way_out_that_is_one(written: list[str], complaint: str, ways_out: list[list[str]]) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        load(written)
    for other in ways_out:
        load(other)


ROUTED = "method.supervision={type: routed, routes: %s}"
TWO = "{a: {supervision: {type: logprob%s}}, b: {supervision: {type: logprob%s}}}"


def routes(first: str, second: str, *more: str, specs: tuple[str, str] = ("hf:a", "hf:b")) -> list[str]:
    return [
        "student.model=a",
        "data.train=b",
        ROUTED % (TWO % (first and f", {first}", second and f", {second}")),
        f"teachers.a.spec='{specs[0]}'",
        f"teachers.b.spec='{specs[1]}'",
        *more,
    ]


@pytest.mark.parametrize(
    ("written", "complaint", "way_out"),
    [
        # One of two is enough.
        (
            routes("", "objective: sampled", "rollout.temperature=0.5"),
            "rollout.temperature is 0.5: the objective estimates from sampled tokens",
            routes("", "", "rollout.temperature=0.5"),
        ),
        (
            routes("", "verifier: {}", "data.verifier=none"),
            "data.verifier is none",
            routes("", "verifier: {}"),
        ),
        (
            routes("", "objective: minillm", "learner.losses.kl={type: jsd}"),
            "jsd cannot be MiniLLM's single step",
            routes("", "objective: minillm"),
        ),
        (
            routes("", "alignment: groups", "learner.losses.kl={type: uld}"),
            "which compares groups of tokens, but method.supervision.alignment is none",
            routes("objective: sampled", "alignment: groups", "learner.losses.kl={type: uld}"),
        ),
        (
            routes("", "objective: sampled", specs=("hf:x", "states:y")),
            "teachers.b.spec is 'states:y', what a teacher said of fixed answers",
            routes("", "objective: sampled", specs=("hf:x", "hf:y")),
        ),
        (
            routes("", "", specs=("hf:a", "openai:x")),
            "'openai:x' only gives text; use teachers.b.spec=hf:MODEL",
            routes("", "", specs=("hf:a", VLLM)),
        ),
        # One that nothing feeds in any of them.
        (
            routes("objective: sampled", "objective: sampled", "learner.losses.kl={type: jsd}"),
            "jsd would never be used",
            routes("", "objective: sampled", "learner.losses.kl={type: jsd}"),
        ),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_every_route_is_checked(written: list[str], complaint: str, way_out: list[str]) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        load(written)
    load(way_out)


def test_a_route_that_asks_nobody_needs_no_teacher() -> None:
    made = ROUTED % "{a: {supervision: {type: logprob}}, b: {supervision: {type: verifier}}}"
    base = ["student.model=a", "data.train=b", made]
    assert load([*base, "teachers.a.spec=hf:a"]).teachers["a"].spec == "hf:a"
    # The default teacher is nobody's here.
    load([*base, "teachers.a.spec=hf:a", "teacher.spec=openai:x"])
    with pytest.raises(ConfigError, match=r"routes\.a asks a teacher, but there is no teachers\.a; add it with its sp"):
        load([*base, "teachers.b.spec=hf:b"])


@pytest.mark.parametrize(
    "written",
    [
        ["student.model=a", "data.train=b"],
        ["student.model=a", "data.train=b", "rollout.temperature=0.6", "rollout.top_p=0.9"],
        ["student.model=a", "data.train=b", "method.supervision={type: verifier}"],
        ["student.model=a", "data.train=b", "method.supervision={type: imitation}", "data.verifier=none"],
        words(kl="{type: teacher_topk_reverse_kl, k: 20}", spec=VLLM),
        words(FIXED, kl=FORWARD, spec="scores:there"),
        words("objective: minillm, verifier: {}", spec=VLLM),
        words("objective: sampled, alignment: groups, spread: whole", spec=VLLM),
        words("alignment: groups, authors: {dataset: 1.0}", kl="{type: hybrid, beta: 0.5}"),
        words("authors: {teacher: 1.0}", "rollout.temperature=0.7", kl=FORWARD, spec=VLLM),
        routes("objective: sampled", "", specs=("hf:x", VLLM)),
    ],
    ids=lambda written: " ".join(written[2:])[:80],
)
def test_what_goes_together_passes(written: list[str]) -> None:
    load(written)


def test_losses_can_be_checked_before_the_method_is_known() -> None:
    check_losses({"kl": {"type": "uld"}})
    check_losses({"kl": {"type": "sampled_token", "estimator": "k2"}})
    with pytest.raises(ConfigError, match=r"learner\.losses\.kl\.type: .*did you mean 'hybrid'"):
        check_losses({"kl": {"type": "hybird"}})


@pytest.mark.parametrize(
    ("spec", "access"),
    [
        ("hf:Qwen/Qwen3-8B", "hf"),
        (VLLM, "vllm"),
        ("scores:a/b", "scores"),
        ("states:c", "states"),
        ("openai:hf:x", None),
        ("hfx:a", None),
        ("HF:a", None),
        ("local:states:", None),
        ("", None),
    ],
)
def test_how_distributions_come(spec: str, access: Access | None) -> None:
    assert access_of(spec) == access
    assert access is None or access in ACCESSES


def test_weights_of_unlike_routes_need_one_denominator() -> None:
    made = "method.supervision={type: routed, by: weight, routes: {a: {supervision: {type: logprob}}, b: {}}}"
    base = ["student.model=a", "data.train=b", made, "teachers.a.spec=hf:a", "teachers.b.spec=openai:x"]
    load(base)
    with pytest.raises(ConfigError, match="aggregation is token_mean, which divides each stream by its own tokens"):
        load([*base, "learner.aggregation=token_mean"])
