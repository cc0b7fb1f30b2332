"""What may be loaded before it is needed, and how long that may take."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import omniopd

MODELS = ("torch", "transformers", "vllm", "sentence_transformers", "datasets")
CLIENTS = ("openai", "httpx", "aiohttp")
EVERYTHING = (*MODELS, *CLIENTS, "pydantic", "yaml", "numpy", "rich")


def loaded_by(code: str, names: tuple[str, ...]) -> set[str]:
    """Return which of the modules are loaded after running `code` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint('LOADED', *(n for n in {names!r} if n in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.rpartition("LOADED")[2].split())


HELP = "import contextlib\nfrom omniopd.cli import main\nwith contextlib.suppress(SystemExit):\n    main(['--help'])"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import omniopd", EVERYTHING),
        ("import omniopd; omniopd.ConfigError", EVERYTHING),
        (HELP, EVERYTHING),
        (HELP.replace("['--help']", "['train', '--help']"), EVERYTHING),
        ("import omniopd; omniopd.select_chunks", (*MODELS, *CLIENTS)),
        ("import omniopd; omniopd.ChunkRewarder(teacher='openai:gpt-4o')", MODELS),
        ("import omniopd; omniopd.RunConfig", (*MODELS, *CLIENTS)),
        ("import omniopd.overrides, omniopd.method", (*MODELS, *CLIENTS)),
        ("import omniopd; omniopd.train", MODELS),
        ("from omniopd.cli import main; main(['configs', 'list'])", (*MODELS, *CLIENTS)),
        ("from omniopd.cli import main; main(['teachers', 'list'])", (*MODELS, *CLIENTS)),
        # A wrong setting is told before anything heavy is loaded.
        ("from omniopd.cli import main; main(['train', 'quickstart', 'learner.lr=1'])", (*MODELS, *CLIENTS)),
        ("from omniopd.cli import main; main(['train', 'quickstart', 'method.supervision.x=1'])", (*MODELS, *CLIENTS)),
    ],
)
def test_heavy_packages_wait_until_they_are_needed(code: str, names: tuple[str, ...]) -> None:
    assert loaded_by(code, names) == set()


def test_the_check_sees_a_loaded_package() -> None:
    assert loaded_by("import yaml", EVERYTHING) == {"yaml"}


@pytest.mark.parametrize("words", [["-c", "import omniopd"], ["-m", "omniopd", "--help"]])
def test_start_up_is_quick(words: list[str]) -> None:
    fastest = 10.0
    # The best of a few: others may be using the machine.
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        fastest = min(fastest, time.perf_counter() - started)
        if fastest < 0.5:
            break
    assert fastest < 0.5


def test_public_names_are_sorted_and_there() -> None:
    assert omniopd.__all__ == sorted(omniopd.__all__)
    for name in omniopd.__all__:
        assert getattr(omniopd, name) is not None
    assert set(omniopd.__all__) <= set(dir(omniopd))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        omniopd.nonsense  # noqa: B018
