"""Composing what files and the command line say, and building the dataclasses from it.

Every value keeps its origin until it is checked, so that an error names the file it stands in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from rapidfuzz import fuzz, process

from cascadevl.config import fields
from cascadevl.config.dialect import parse_yaml, write_yaml
from cascadevl.errors import CascadeVLError, ConfigError

ConfigT = TypeVar("ConfigT")

BASE = "base"
"""Key at the top of a file that names the file it changes; its path is relative to it."""

COMMAND_LINE = "command line"
SIMILAR_ENOUGH = 60.0
"""Of 100: below, naming a similar key misleads more often than it helps."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Given:
    """A value somebody wrote, and where; ``raw`` if it is text from a shell, not parsed yet."""

    value: Any
    origin: str
    raw: bool = False


_Tree: TypeAlias = dict[str, Any]  # of _Given and _Tree


def load_config(
    cls: type[ConfigT],
    *,
    files: Sequence[Path | str] = (),
    overrides: Sequence[str] = (),
    defaults: ConfigT | None = None,
) -> ConfigT:
    """Build a configuration from files and overrides.

    Args:
        cls: A frozen dataclass. Its fields hold plain values, dataclasses, optional dataclasses,
            or lists, tuples and string-keyed dictionaries of them.
        files: YAML files. A later one changes single keys of an earlier one; a list is replaced.
            A file that names another under ``base`` changes that one in the same way, and so
            does a section of it, whose base is the file of that section alone.
        overrides: ``key.sub=value`` each, or pairs ``--key.sub value`` as a shell passes them. A
            lone ``--key`` means true, which switches an optional section on and changes nothing
            in it. Values are read as YAML unless the field holds text.
        defaults: What nobody mentions is taken from here instead of from the class.

    Raises:
        ConfigError: If a file cannot be read or is its own base, a key is unknown (naming the
            nearest known one) or missing or of another type, or a dataclass refuses its values.
    """
    tree: _Tree = {}
    for file in files:
        _merge(tree, _composed(Path(file)))
    for key, value in _split(overrides):
        _merge(tree, _branch(key, value))
    return _build(cls, tree, "", defaults, origin=str(files[-1]) if files else COMMAND_LINE)


def dump_config(config: object) -> str:
    """Write a configuration as YAML that `load_config` reads back to an equal one."""
    return write_yaml(_plain(config))


def config_keys(cls: type) -> list[str]:
    """All dotted keys of a configuration class, in order: what overrides can name."""
    return list(fields.dotted_keys(cls))


def _composed(file: Path, above: tuple[Path, ...] = ()) -> _Tree:
    """What a file says, over what its base says; ``above`` are the files that led to it."""
    chain = (*above, file)
    if file.resolve() in [other.resolve() for other in above]:
        raise ConfigError(f"{' -> '.join(map(str, chain))}: a configuration is its own base")
    try:
        content = _read(file)
    except ConfigError as error:
        raise error if not above else ConfigError(f"{above[-1]}: base: {error}") from error
    base = content.pop(BASE, None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{file}: base is {_shown(base)}, but must be the name of one file")
    tree: _Tree = {} if base is None else _composed(file.parent / base, chain)
    for key, below in _bases_of_sections(content):
        _merge(tree, _branch(key, _composed(file.parent / below, chain)))
    _merge(tree, _planted(content, str(file)))
    return tree


def _bases_of_sections(content: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and base of every section that names one; the names are taken out."""
    for key, section in content.items():
        if not isinstance(section, dict):
            continue
        if isinstance(section.get(BASE), str):
            yield f"{above}{key}", section.pop(BASE)
        yield from _bases_of_sections(section, f"{above}{key}.")


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text: {error}") from error
    content = parse_yaml(text, str(file))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: a configuration is a mapping of keys, not {_shown(content)}")
    return content


def _split(overrides: Sequence[str]) -> Iterator[tuple[str, _Given]]:
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not key or not (word.startswith("--") or equals):
            raise ConfigError(
                f"{COMMAND_LINE}: {word!r} changes no key; write key=value or --key value"
            )
        if equals:
            yield key, _Given(text, COMMAND_LINE, raw=True)
        elif rest and not rest[0].startswith("--"):
            yield key, _Given(rest.pop(0), COMMAND_LINE, raw=True)
        else:
            yield key, _Given(True, COMMAND_LINE)


def _switches_on(given: _Given | _Tree) -> bool:
    """Whether this is a lone ``true``, which a section can be switched on with."""
    return isinstance(given, _Given) and (given.value is True or given.value == "true")


def _planted(mapping: Mapping[Any, Any], origin: str) -> _Tree:
    return {
        str(key): _planted(value, origin) if isinstance(value, dict) else _Given(value, origin)
        for key, value in mapping.items()
    }


def _branch(key: str, value: _Given | _Tree) -> _Tree:
    head, dot, tail = key.partition(".")
    return {head: _branch(tail, value) if dot else value}


def _merge(base: _Tree, change: _Tree) -> None:
    for key, value in change.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            _merge(below, value)
        elif isinstance(below, dict) and _switches_on(value):
            continue
        else:
            base[key] = value


def _build(
    cls: type[ConfigT], tree: _Tree, path: str, base: object | None, *, origin: str
) -> ConfigT:
    """Fill one section: from the tree, else from ``base``, else from the class's defaults."""
    hints = fields.hints_of(cls)
    for key, value in tree.items():
        if key not in hints:
            raise ConfigError(_unknown_key(cls, path, key, _origin(value, origin)))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if not field.init:
            continue
        default = getattr(base, field.name) if base is not None else _default(field)
        if field.name in tree:
            key, value = _below(path, field.name), tree[field.name]
            values[field.name] = _convert(hints[field.name], value, key, default, origin)
        elif default is not dataclasses.MISSING:
            values[field.name] = default
        elif dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = _build(
                hints[field.name], {}, _below(path, field.name), None, origin=origin
            )
        else:
            raise ConfigError(
                f"{origin}: missing key {_below(path, field.name)!r}: it has no default and must "
                f"be {fields.described(hints[field.name])}"
            )
    try:
        return cls(**values)
    except CascadeVLError as error:
        where = "" if str(error).startswith(path) else f"{path}: "
        raise ConfigError(f"{_origin(tree, origin)}: {where}{error}") from error


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _convert(hint: Any, given: _Given | _Tree, path: str, default: Any, origin: str) -> Any:
    """Turn what was written at one key into a value of its type."""
    if isinstance(given, _Given) and given.raw:
        given = _parsed(hint, given, path)
    section, items = fields.section_of(hint), fields.section_list_of(hint)
    values_hint = fields.values_of(hint)
    if _switches_on(given) and section is not None and fields.allows(hint, type(None)):
        base = default if isinstance(default, section) else None
        return _build(section, {}, path, base, origin=origin)
    if isinstance(given, dict) and section is not None:
        base = default if isinstance(default, section) else None
        return _build(section, given, path, base, origin=_origin(given, origin))
    if isinstance(given, dict) and values_hint is not None:
        return {
            key: _convert(values_hint, value, f"{path}.{key}", None, origin)
            for key, value in given.items()
        }
    if isinstance(given, dict):
        raise ConfigError(_wrong_type(path, _uprooted(given), hint, _origin(given, origin)))
    if items is not None and isinstance(given.value, list):
        container, item_hint = items
        return container(
            _convert(item_hint, _grown(item, given.origin), f"{path}.{index}", None, origin)
            for index, item in enumerate(given.value)
        )
    if given.value is not None and (section is not None or items is not None):
        raise ConfigError(_wrong_type(path, given.value, hint, given.origin))
    return _leaf(hint, given, path)


def _parsed(hint: Any, given: _Given, path: str) -> _Given | _Tree:
    """What text from the command line stands for, given the type that is wanted."""
    if hint is str:
        return _Given(given.value, given.origin)
    value = parse_yaml(given.value, f"{given.origin}: {path}")
    if value is not None and fields.holds_text(hint):
        value = given.value  # a name or a path may look like a number
    return _grown(value, given.origin)


def _leaf(hint: Any, given: _Given, path: str) -> Any:
    """A value without sections in it."""
    if given.value is None and fields.allows(hint, type(None)):
        return None
    if isinstance(given.value, str):
        for kind in (str, Path):
            if fields.allows(hint, kind):
                return kind(given.value)  # as it stands: jsonargparse takes "null" for None
    try:
        if given.value is None:
            raise ValueError("jsonargparse takes None for a value that is not there")
        return fields.converted(hint, given.value)
    except ValueError as error:
        raise ConfigError(_wrong_type(path, given.value, hint, given.origin)) from error


def _grown(value: Any, origin: str) -> _Given | _Tree:
    return _planted(value, origin) if isinstance(value, dict) else _Given(value, origin)


def _uprooted(tree: _Given | _Tree) -> Any:
    if isinstance(tree, _Given):
        return tree.value
    return {key: _uprooted(value) for key, value in tree.items()}


def _origin(tree: _Given | _Tree, default: str) -> str:
    """Where a value came from; of a section changed in several places, the last of them."""
    if isinstance(tree, _Given):
        return tree.origin
    origins = [_origin(value, default) for value in tree.values()]
    return COMMAND_LINE if COMMAND_LINE in origins else (origins[-1] if origins else default)


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _wrong_type(path: str, value: Any, hint: Any, origin: str) -> str:
    return f"{origin}: key {path!r} is {_shown(value)}, but must be {fields.described(hint)}"


def _unknown_key(cls: type, path: str, key: str, origin: str) -> str:
    here = list(fields.hints_of(cls))
    near = process.extractOne(key, here, scorer=fuzz.ratio, score_cutoff=SIMILAR_ENOUGH)
    deeper = [name for name in fields.dotted_keys(cls) if name.rpartition(".")[2] == key]
    if deeper:
        hint = f"did you mean {_below(path, deeper[0])!r}?"
    elif near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = f"known keys here: {', '.join(here)}"
    return f"{origin}: unknown key {_below(path, key)!r}; {hint}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in fields.hints_of(type(value))}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value
