"""Options of commands from a TOML file: one table for each command, a key for each option.

::

    [serve]
    input = "tcp://camera:5555"
    max_batch = 4

What is given on the command line wins over the environment (EMSTREAM_SERVE_MAX_BATCH), that
over the file, and that over the defaults.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from emstream.errors import ConfigError

PREFIX = "EMSTREAM"
"""Of environment variables."""
_BEGIN, _END = r"(?<![\w/.-])", r"(?![\w/-]|\.\w)"  # of a word, number or path


def read(path: Path, commands: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The file's tables, for click's ``default_map``; every key an option of its command, every value of its type.

    What is wrong is left out and comes as a sentence that names the file, the table and the key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [f"cannot read {path}: {error.strerror}"]
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        return {}, [f"{path} is not TOML: {error}"]
    checked: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    commands = {name: command for name, command in commands.items() if not hasattr(command, "commands")}
    for name, values in tables.items():
        command = commands.get(name)
        if not isinstance(values, dict):
            problems.append(
                f"{path}: {name} = {values!r} is in no table; options go below the [command] they belong to"
            )
        elif command is None:
            problems.append(f"{path}: [{name}] is no command with options{_near(name, commands)}")
        else:
            checked[name] = {}
            for key, value in values.items():
                try:
                    option = _option(path, name, command, key)
                    if option.name in checked[name]:
                        raise ConfigError(f"{path}: [{name}] has {option.name} twice, with - and with _")
                    checked[name][option.name] = _value(path, name, command, option, value)
                except ConfigError as error:
                    problems.append(str(error))
    return checked, problems


def misspelt(environment: Mapping[str, str], root: Any) -> list[str]:
    """What is wrong with the EMSTREAM_... variables: a sentence for each that no option of any command takes."""
    known = dict.fromkeys(_variables(root, PREFIX))
    return [
        f"{name} belongs to no option{_near(name, known, cutoff=0.85)}"
        for name in sorted(environment)
        if name.startswith(f"{PREFIX}_") and name not in known
    ]


def _variables(command: Any, prefix: str) -> Iterator[str]:
    for option in command.params:
        if option.param_type_name == "option":
            yield option.envvar or f"{prefix}_{option.name.upper()}"
    for name, each in getattr(command, "commands", {}).items():
        yield from _variables(each, f"{prefix}_{name.upper().replace('-', '_')}")


def _option(path: Path, name: str, command: Any, key: str) -> Any:
    options = {str(option.name): option for option in command.params if option.param_type_name == "option"}
    option = options.get(key.replace("-", "_"))
    if option is None:
        raise ConfigError(f"{path}: [{name}] has no option {key!r}{_near(key, options)}")
    return option


def _value(path: Path, name: str, command: Any, option: Any, value: Any) -> Any:
    """`value` if it suits the option; numbers that are texts and the like are no harm, other types are."""
    where = f"{path}: [{name}] {option.name} = {value!r}"
    if option.multiple:
        value = value if isinstance(value, list) else [value]
    elif isinstance(value, list):
        raise ConfigError(f"{where}: one value is needed")
    if isinstance(value, dict) or (isinstance(value, bool) and not option.is_flag):
        raise ConfigError(f"{where}: one value is needed")
    if option.is_flag and not isinstance(value, bool):
        raise ConfigError(f"{where}: true or false is needed")
    try:
        option.process_value(typer.Context(command), value)
    except typer.BadParameter as error:
        raise ConfigError(f"{where}: {str(error.message).removeprefix('Value error, ')}") from None
    return value


def _near(name: str, known: Mapping[str, Any], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=cutoff)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(sorted(known))}" if len(known) < 100 else ""


@dataclass(frozen=True)
class InForce:
    """An option's value and where it comes from."""

    option: str
    value: Any
    source: str
    stands_for: str
    """What a value of None means, as the option's help says it."""


def in_force(context: Any, path: Path | None) -> list[InForce]:
    """Every option of a command whose context (click's) was made, as it would run now."""
    found = []
    for option in context.command.params:
        where = {
            "COMMANDLINE": "command line",
            "DEFAULT_MAP": str(path),
            "ENVIRONMENT": f"environment: {_variable(context, option)}",
        }.get(_source(context, option), "default")
        means = re.search(r"\[default: (.*)\]", getattr(option, "help", None) or "")
        value = context.params.get(option.name)
        if value and option.name.endswith("token"):
            value = "(not shown)"
        found.append(InForce(option.name, value, where, means[1] if means else "-"))
    return found


def origins(context: Any, text: str) -> str:
    """Where those values were given that an error's `text` speaks of; nothing for defaults.

    A text speaks of an option by its flag, by its name and then its value, or by a value that is a path or an
    address; where it does so of none, by what it says it ``got``.
    """
    given = []
    while context is not None:
        given += [(context, option) for option in context.command.params if origin(context, option)]
        context = context.parent
    for speaks_of in (_names, _got):
        if found := [origin(*each) for each in given if speaks_of(text, *each)]:
            return "; ".join(found)
    return ""


def origin(context: Any, option: Any) -> str:
    """Where the value of an option (click's) was given; nothing for a default."""
    where = {
        "COMMANDLINE": "the command line",
        "DEFAULT_MAP": f"{context.find_root().params.get('config')}, [{context.info_name}]",
        "ENVIRONMENT": _variable(context, option),
    }.get(_source(context, option))
    return f"{_flag(option)} is from {where}" if where else ""


def refused(error: typer.BadParameter) -> str:
    """What is wrong with a value that is not of its option's type: the value, too, and where it was given."""
    text = error.message.removeprefix("Value error, ").removesuffix(".")
    cause: Any = error.__cause__
    if hasattr(cause, "errors"):  # pydantic's, whose texts leave the value out
        value = repr(cause.errors()[0]["input"])
        text += "" if value in text else f", got {value}"
    where = origin(error.ctx, error.param) if error.ctx and error.param else ""
    return f"{text} ({where})" if where else error.message


def _source(context: Any, option: Any) -> str:
    source = context.get_parameter_source(option.name)
    return source.name if source else ""


def _variable(context: Any, option: Any) -> str:
    return option.envvar or f"{context.auto_envvar_prefix}_{option.name.upper()}"


def _flag(option: Any) -> str:
    if option.param_type_name == "argument":
        return str(option.metavar or option.name.upper())
    return str(max(option.opts, key=len))


def _names(text: str, context: Any, option: Any) -> bool:
    name = re.escape(option.name).replace("_", "[-_ ]")
    return (option.param_type_name == "option" and _holds(text, re.escape(_flag(option)))) or any(
        # A value before a name, as in 1 frames, is no option's.
        _holds(text, re.escape(value))
        if "/" in value
        else _holds(text, f"{name}{_END}.*{_BEGIN}{re.escape(value)}")
        for value in _texts(context, option)
    )


def _got(text: str, context: Any, option: Any) -> bool:
    return any(_holds(text, f"got '?{re.escape(value)}'?") for value in _texts(context, option))


def _holds(text: str, pattern: str) -> bool:
    """Whether `pattern` is in `text`, and not only as a part of a longer word, number or path."""
    return re.search(_BEGIN + pattern + _END, text, re.DOTALL) is not None


def _texts(context: Any, option: Any) -> set[str]:
    """What errors may call the values of an option."""
    value = context.params.get(option.name)
    values = value if isinstance(value, list | tuple) else [value]
    whole = {f"{each:g}" for each in values if isinstance(each, float)}
    return whole | {str(each) for each in values if each not in (None, "") and not isinstance(each, bool)}
