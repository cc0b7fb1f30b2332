"""Who may import whom. A module imports only what lies below it, or its own package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "omniopd"

# From the bottom to the top; a name stands for a module or a whole package, the longest match counts.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"", "errors"}),
    frozenset({"kernels"}),
    frozenset({"timing", "types", "worlds"}),
    frozenset(
        {
            "bootstrap",
            "chunking",
            "concurrency",
            "config",
            "data",
            "models",
            "parts",
            "presets",
            "progress",
            "prompts",
            "rewards",
            "rollout.detokenize",
            "rollout.engine",
            "run_folder",
            "scoring",
            "teachers.base",
            "verify",
        }
    ),
    frozenset({"generation", "method_settings", "responses", "serving.batcher", "templates"}),
    frozenset({"logits"}),
    frozenset(
        {
            "checkpoint",
            "learner",
            "records",
            "signals",
            "supervision.base",
            "teachers",
            "trackers",
        }
    ),
    frozenset({"logits.vllm_scores"}),
    frozenset({"api", "behavior", "evaluation", "rollout", "serving", "supervision"}),
    frozenset({"diagnosis", "loop", "method", "observers", "score_file"}),
    frozenset({"estimate", "method_checks"}),
    frozenset({"overrides", "report", "spending"}),
    frozenset({"inputs", "logit_teachers"}),
    frozenset({"assembly"}),
    frozenset({"run"}),
    frozenset({"dry_run", "precompute", "preflight"}),
    frozenset({"commands"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)

# The loop and the learner never learn the name of a method; the values know nobody.
BLIND: dict[str, tuple[str, ...]] = {
    "loop": ("learner", "method", "signals", "supervision.chunked", "teachers"),
    "learner": ("method", "signals", "supervision", "teachers"),
    "signals": ("learner", "supervision", "teachers"),
}

HEAVY = frozenset(
    {
        "accelerate",
        "aiohttp",
        "datasets",
        "math_verify",
        "openai",
        "peft",
        "rich",
        "sentence_transformers",
        "starlette",
        "tensorboard",
        "torch",
        "trackio",
        "transformers",
        "uvicorn",
        "vllm",
        "wandb",
    }
)
# Modules that are heavy and therefore loaded late: nobody else may import them while it is being imported itself.
LEAVES = (
    "checkpoint",
    "generation",
    "kernels",
    "learner",
    "logits.foreign",
    "rollout.embedded",
    "serving.app",
    "worlds.mini_math.build",
)


@dataclass(frozen=True)
class Import:
    """One import statement of one module, without `omniopd.`."""

    module: str
    target: str
    is_ours: bool
    is_late: bool
    """Inside a function."""
    line: int


def modules() -> dict[str, Path]:
    """All modules below `omniopd`, by dotted name; the package itself is ''."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, source: str) -> Iterator[Import]:
    """Yield the imports that run; those for the type checker alone do not count."""

    def visit(node: ast.AST, is_late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            for name in _imported(child):
                is_ours = name == "omniopd" or name.startswith("omniopd.")
                target = name.removeprefix("omniopd").removeprefix(".") if is_ours else name.partition(".")[0]
                yield Import(module, target, is_ours, is_late, child.lineno)  # type: ignore[attr-defined]
            yield from visit(child, is_late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from visit(ast.parse(source), False)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative imports hide the layer"
        name = node.module or ""
        # `from omniopd import commands` imports a module, `from omniopd import __version__` a name.
        submodules = [f"{name}.{alias.name}" for alias in node.names if f"{name}.{alias.name}" in _DOTTED]
        return submodules or [name]
    return []


_DOTTED = {f"omniopd.{name}" for name in modules() if name}


def layer_of(module: str) -> int:
    """Return the layer of a module: of the longest listed name that it is or lies in."""
    parts = module.split(".")
    for size in range(len(parts), 0, -1):
        name = ".".join(parts[:size])
        for number, names in enumerate(LAYERS):
            if name in names:
                return number
    raise AssertionError(f"omniopd.{module} is in no layer; add it to LAYERS in tests/test_layers.py")


def lies_in(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def violations(imports: Iterator[Import]) -> list[str]:
    """Return the forbidden edges among some imports, one line each."""
    found = []
    for edge in imports:
        place = f"omniopd.{edge.module}:{edge.line}"
        if not edge.is_ours:
            if edge.target in HEAVY and not edge.is_late and not lies_in(edge.module, LEAVES):
                found.append(f"{place} imports {edge.target} while it is imported itself; move it into the function")
            continue
        same_package = edge.module.partition(".")[0] == edge.target.partition(".")[0]
        if not same_package and layer_of(edge.target) >= layer_of(edge.module):
            found.append(f"{place} imports omniopd.{edge.target}, which does not lie below it")
        for owner, unseen in BLIND.items():
            if lies_in(edge.module, (owner,)) and lies_in(edge.target, unseen):
                found.append(f"{place} imports omniopd.{edge.target}, which omniopd.{owner} must not know")
        if not edge.is_late and lies_in(edge.target, LEAVES) and not lies_in(edge.module, LEAVES):
            found.append(f"{place} imports the heavy omniopd.{edge.target} while it is imported itself")
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_forbidden_import(module: str) -> None:
    layer_of(module)
    found = violations(imports_of(module, modules()[module].read_text()))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("types", "from omniopd.config import RunConfig", "does not lie below it"),
        ("chunking", "from omniopd.scoring import similarity", "does not lie below it"),
        ("types", "def f():\n    import omniopd.run", "does not lie below it"),
        ("learner.learner", "from omniopd.signals import credit", "must not know"),
        ("loop", "from omniopd.method import build_method", "must not know"),
        ("run", "import torch", "move it into the function"),
        ("run", "from omniopd.learner.policy import Policy", "imports the heavy omniopd.learner.policy"),
        ("method", "from omniopd import run", "does not lie below it"),
    ],
)
def test_the_check_sees_what_it_should(module: str, source: str, complaint: str) -> None:
    assert any(complaint in line for line in violations(imports_of(module, source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("run", "def f():\n    import torch\n    from omniopd.learner.policy import Policy"),
        ("types", "if TYPE_CHECKING:\n    from omniopd.config import RunConfig"),
        ("scoring.chunk_score", "from omniopd.scoring.similarity import Edit"),
        ("cli", "from omniopd import __version__, commands"),
    ],
)
def test_the_check_allows_what_it_should(module: str, source: str) -> None:
    assert violations(imports_of(module, source)) == []


def test_layers_hold_no_module_that_is_gone() -> None:
    known = set(modules())
    assert {name for layer in LAYERS for name in layer} <= known
    assert set(LEAVES) | set(BLIND) | {name for unseen in BLIND.values() for name in unseen} <= known
