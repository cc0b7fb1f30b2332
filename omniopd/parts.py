"""Parts by name: `{type: NAME, ...}` from a run file becomes a frozen dataclass whose fields are its settings."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from omniopd.errors import ConfigError


def build_part(path: str, spec: Mapping[str, Any], table: Mapping[str, type[Any]]) -> Any:
    """Make a part from `{type: NAME, ...}`. Raises ConfigError for an unknown name or setting, with the nearest."""
    settings = dict(spec)
    if "type" not in settings and (slips := difflib.get_close_matches("type", settings, n=1)):
        raise ConfigError(unknown(f"{path}.{slips[0]}", slips[0], ["type"], what="setting"))
    name = settings.pop("type", None)
    if name not in table:
        raise ConfigError(unknown(f"{path}.type", name, table))
    part = table[name]
    known = [f.name for f in dataclasses.fields(part) if f.init]
    for key in settings:
        if key not in known:
            raise ConfigError(unknown(f"{path}.{key}", key, known, what=f"setting of {name}"))
    required = [
        f.name
        for f in dataclasses.fields(part)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    absent = [key for key in required if key not in settings]
    if absent:
        raise ConfigError(f"{path} ({name}) needs {', '.join(absent)}")
    try:
        return TypeAdapter(part).validate_python(settings)
    except ValidationError as error:
        raise ConfigError(first_problem(path, error, known)) from error


def unknown(path: str, value: Any, allowed: Iterable[Any], *, what: str = "value") -> str:
    """Say that there is no such thing at `path`, what is nearest, and what there is."""
    names = [str(a) for a in allowed]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{path}: there is no {what} {value!r}{hint} Allowed: {', '.join(names)}"


def first_problem(path: str, error: ValidationError, known: Iterable[str], *, tags: Collection[str] = ()) -> str:
    """Put the first problem that pydantic found into a line; a leading name among `tags` is that of a union's member.

    What a part says about its own settings is passed on as it is.
    """
    problem = error.errors()[0]
    loc = problem["loc"]
    place = ".".join(str(p) for p in (loc[1:] if loc and loc[0] in tags else loc))
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown(f"{path}.{place}", place, known, what="setting")
    where = f"{path}.{place}" if place else path
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    return f"{where}: {problem['msg']}, got {problem['input']!r}"
