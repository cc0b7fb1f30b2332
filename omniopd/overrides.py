"""Put a run's settings together: YAML files, `key.path=value` words and flags become one `RunConfig`.

Every value remembers where it was written, so an error can say so. Nothing heavier than pydantic and PyYAML is loaded.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from omniopd.config import RunConfig
from omniopd.errors import ConfigError
from omniopd.method import build_method
from omniopd.method_checks import check_inputs, check_losses
from omniopd.presets import PRESETS, check_preset
from omniopd.prompts import check_sampler

_PACKAGE = Path(__file__).resolve().parent
_PART_KEY = re.compile(r"(?:method|learner|data|rollout|teachers?)(\.\w+|\[\d+\])+")
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=", re.ASCII)

Tree = dict[str, Any]
KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Settings from one place."""

    place: str
    """A file name, an override as typed, a flag, or a preset."""
    tree: Tree
    is_file: bool = False

    def holds(self, path: KeyPath) -> bool:
        node: Any = self.tree
        for key in path:
            if isinstance(node, list) and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            elif isinstance(node, dict) and key in node:
                node = node[key]
            else:
                return False
        return True

    def describe(self, path: KeyPath) -> str:
        return f"{self.place}: {'.'.join(path)}" if self.is_file else self.place


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2 scalars and no duplicate keys.

    PyYAML follows YAML 1.1, where `1e-6` is text, `on` is a boolean, `1:30` is 90 and `2026-01-02` is a date.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice in one mapping", key_node.start_mark
                    )
                seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


_FLOAT = r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9]\d*)", "-+0123456789"),
    ("float", rf"(?:{_FLOAT})", "-+.0123456789"),
    ("null", r"(?:~|null|Null|NULL|)", "~nN\0"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), list(_first))
# PyYAML files an empty scalar under the empty string.
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


def is_override(word: str) -> bool:
    """Tell whether a command-line word is `key.path=value` rather than a file.

    Example:
        >>> is_override("learner.learning_rate=1e-5"), is_override("./a=b.yaml")
        (True, False)
    """
    return _OVERRIDE.match(word) is not None


def list_configs() -> dict[str, Path]:
    """Return the run files that come with omniopd, by name."""
    # A wheel carries them inside the package; a checkout keeps them beside it.
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find_config(name: str | Path) -> Path:
    """Return the run file meant by `name`: an existing path, or the name of one that comes with omniopd.

    Raises ConfigError.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = list_configs()
    if str(name) in packaged:
        return packaged[str(name)]
    nearest = difflib.get_close_matches(path.stem, packaged, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ConfigError(
        f"no run file {str(name)!r}: expected a path to a YAML file, or one of {', '.join(packaged) or 'none'}{hint} "
        "(`omniopd configs list` describes them; settings are written key.path=value)"
    )


def load_config(
    files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    *,
    flags: Mapping[str, Mapping[str, Any]] | None = None,
) -> RunConfig:
    """Merge files from left to right, then `key.path=value` words, then flags, and validate the result.

    Args:
        files: Paths, or names that `find_config` knows.
        overrides: Values are read as YAML; a later word wins.
        flags: Settings as nested mappings, by the flag that is named in errors.

    Raises ConfigError with the nearest valid key, the value seen, what was expected and where it was written.
    """
    layers = [_read_file(find_config(name)) for name in files]
    words = [_read_override(word) for word in overrides]
    flag_layers = [Layer(place=place, tree=dict(tree)) for place, tree in (flags or {}).items()]
    # All words form one layer: `x.type=b x.size=3` and `x.size=3 x.type=b` mean the same.
    upper = _merge_all([layer.tree for layer in words], replace_types=False)
    trees = [layer.tree for layer in layers] + [upper] + [layer.tree for layer in flag_layers]
    preset = _merge_all(trees).get("preset")
    beneath: list[Layer] = []
    if isinstance(preset, str) and preset in PRESETS:
        beneath = [Layer(place=f"preset {preset}", tree=typing.cast(Tree, PRESETS[preset]))]
    merged = _merge_all([default_parts(RunConfig), *(layer.tree for layer in beneath), *trees])
    every = [*beneath, *layers, *words, *flag_layers]
    config = _validate(merged, every)
    check_preset(config)
    _check_parts(config, every)
    return config


def default_parts(section: type[BaseModel]) -> Tree:
    """Return the defaults that must lie beneath the files: those of parts, so that a file may set one field of a part.

    Also paths, as text: strict JSON rules do not take a `Path` object as a default.
    """
    tree: Tree = {}
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        default = field.get_default(call_default_factory=True)
        if inner is not None and default is not None and (parts := default_parts(inner)):
            tree[name] = parts
        elif isinstance(default, dict) and default:
            tree[name] = default
        elif isinstance(default, Path):
            tree[name] = str(default)
    return tree


def _read_file(path: Path) -> Layer:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_problem(error)}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {_seen(tree)}, expected `key: value` lines")
    _require_text_keys(tree, str(path))
    return Layer(place=str(path), tree=tree, is_file=True)


def _read_override(word: str) -> Layer:
    place = f"override {word!r}"
    if not is_override(word):
        raise ConfigError(f"{place} is not a setting; expected key.path=value")
    key, _, text = word.partition("=")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of {place} is not valid YAML: {_yaml_problem(error)}; put text with special characters in "
            "quotes"
        ) from error
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    _require_text_keys(tree, place)
    return Layer(place=place, tree=tree)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        return f"{error.problem or error.context}{where}"
    return str(error)


def _require_text_keys(node: Any, place: str, path: KeyPath = ()) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str):
                raise ConfigError(
                    f"{place}: the key {key!r} in {'.'.join(path) or 'the file'} is not text; put it in quotes"
                )
            _require_text_keys(value, place, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _require_text_keys(value, place, (*path, str(index)))


def _merge_all(trees: Iterable[Mapping[str, Any]], *, replace_types: bool = True) -> Tree:
    merged: Tree = {}
    for tree in trees:
        merged = _merge(merged, tree, replace_types)
    return merged


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any], replace_types: bool) -> Tree:
    """Merge mappings key by key; a part of another `type` replaces the whole part, lists are replaced."""
    old, new = lower.get("type"), upper.get("type")
    if replace_types and old is not None and new is not None and old != new:
        return dict(upper)
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(below, value, replace_types) if both else value  # type: ignore[arg-type]
    return merged


def _validate(merged: Tree, layers: Sequence[Layer]) -> RunConfig:
    try:
        text = json.dumps(merged)
    except TypeError as error:
        raise ConfigError(f"a setting is neither text, number, true/false, list nor mapping: {error}") from error
    try:
        # Strict JSON rules: "50", true and 50.0 are not the whole number 50, yet a path may be written as text.
        return RunConfig.model_validate_json(text, strict=True)
    except ValidationError as error:
        lines = _explain_all(error.errors(include_url=False), layers)
    if len(lines) == 1:
        raise ConfigError(lines[0])
    raise ConfigError("\n".join([f"{len(lines)} settings cannot be used:", *(f"  - {line}" for line in lines)]))


def _check_parts(config: RunConfig, layers: Sequence[Layer]) -> None:
    """Validate the parts, which are free-form mappings to pydantic, and add where they were written."""
    try:
        method = build_method(config.method)
        check_losses(config.learner.losses, method)
        check_inputs(config, method)
        check_sampler(config.data.sampler)
    except ConfigError as error:
        named = _PART_KEY.match(str(error))
        path = tuple(re.findall(r"\w+", named.group())) if named else ()
        place = origin_of(path, layers) if path else ""
        raise ConfigError(f"{error} ({place})" if place else str(error)) from error


def origin_of(path: KeyPath, layers: Sequence[Layer]) -> str:
    """Say where the value at `path` was written; the last writer wins. Empty when it is a default."""
    for layer in reversed(layers):
        if layer.holds(path):
            return layer.describe(path)
    return ""


def _explain_all(problems: Sequence[ErrorDetails], layers: Sequence[Layer]) -> list[str]:
    lines: list[str] = []
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for problem in problems:
        by_path.setdefault(_written_path(problem, layers), []).append(problem)
    for path, same in by_path.items():
        place = origin_of(path, layers)
        lines.append(_explain(path, same, f" ({place})" if place else ""))
    return lines


def _explain(path: KeyPath, problems: Sequence[ErrorDetails], written: str) -> str:
    """Write one line; several problems at one path are the branches of `A | B`."""
    name = ".".join(path)
    first = problems[0]
    if first["type"] == "extra_forbidden":
        return f"{name}: unknown key{written}. {_nearest(path)}"
    if first["type"] == "missing" and path[-1].isdigit():
        return f"{'.'.join(path[:-1])}: the list is too short; entry {path[-1]} is missing"
    if first["type"] == "missing":
        return f"{name}: required and not set. {_REQUIRED.get(name, f'Write {name}=...')}"
    wanted = " or ".join(dict.fromkeys(_expected(problem) for problem in problems))
    return f"{name}: got {_seen(first['input'])}, expected {wanted}{written}"


_REQUIRED = {
    "student": "Name the model that learns: --student NAME_OR_FOLDER, or student.model in a run file",
    "student.model": "Name the model that learns: --student NAME_OR_FOLDER, or student.model in a run file",
    "data": "Name the prompts: --data FILE, or data.train in a run file",
    "data.train": "Name the prompts: --data FILE, or data.train in a run file",
}


def _written_path(problem: ErrorDetails, layers: Sequence[Layer]) -> KeyPath:
    """Return the key path without the branch names that pydantic adds for `A | B`."""
    path = tuple(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "missing"):
        return path
    while len(path) > 1 and not origin_of(path, layers):
        path = path[:-1]
    return path


def _seen(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"{str(value).lower()} (true/false)"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"a mapping with {', '.join(map(str, value)) or 'no keys'}" if isinstance(value, dict) else repr(value)


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text (put it in quotes if it looks like a number)",
    "dict": "a mapping of `key: value`",
    "list": "a list",
    "tuple": "a list",
    "model": "a section of `key: value`",
    "path": "a path",
}
_BOUNDS = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of {ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of {le} or less",
    "literal_error": "{expected}",
    "too_short": "{min_length} entries",
    "too_long": "at most {max_length} entries",
}


def _expected(problem: ErrorDetails) -> str:
    if problem["type"] in _BOUNDS:
        return _BOUNDS[problem["type"]].format(**problem.get("ctx", {}))
    return _KINDS.get(problem["type"].partition("_")[0], problem["msg"][:1].lower() + problem["msg"][1:])


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds; sections by name, as in `teachers`, are not one."""
    if typing.get_origin(annotation) is dict:
        return None
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _all_paths(section: type[BaseModel], prefix: KeyPath = (), *, near: KeyPath = ()) -> list[KeyPath]:
    """Return every key path below a section. Of sections by name those of the name in `near`, which is anybody's."""
    paths: list[KeyPath] = []
    for name, field in section.model_fields.items():
        home = (*prefix, name)
        paths.append(home)
        inner = _section_of(field.annotation)
        if typing.get_origin(field.annotation) is dict and near[: len(home)] == home and len(near) > len(home) + 1:
            home = near[: len(home) + 1]
            inner = _section_of(typing.get_args(field.annotation)[1])
        if inner is not None:
            paths.extend(_all_paths(inner, home, near=near))
    return paths


def _nearest(path: KeyPath) -> str:
    every = _all_paths(RunConfig, near=path)
    siblings = [known[-1] for known in every if known[:-1] == path[:-1]]
    elsewhere = sorted({known[-1] for known in every})
    name = path[-1]
    if name not in elsewhere and (found := nearest_name(name, siblings)):
        return f"Did you mean {'.'.join((*path[:-1], found))}?"
    found = name if name in elsewhere else nearest_name(name, elsewhere)
    if found:
        homes = [".".join(known) for known in every if known[-1] == found]
        return f"Did you mean {' or '.join(homes)}?"
    owner = ".".join(path[:-1]) or "A run file"
    return f"{owner} has {', '.join(siblings)}"


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant: nearly the same letters, or the initials.

    Example:
        >>> nearest_name("learing_rate", ["learning_rate", "steps"]), nearest_name("lr", ["learning_rate", "steps"])
        ('learning_rate', 'learning_rate')
    """
    known = list(known)
    plain = name.replace("-", "_").lower()
    by_initials = [other for other in known if "_" in other and "".join(word[0] for word in other.split("_")) == plain]
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.6)
    return next(iter([*by_initials, *close]), None)
