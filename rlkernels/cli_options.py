"""Options of a training command, from the command line and from the YAML file that `--config` names."""

import argparse
import difflib
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from rlkernels.cli_commands import COMMANDS
from rlkernels.cli_errors import BadValue, show
from rlkernels.trainers.base.field_values import check_fields

# The most characters of an option that is a mapping, as JSON.
LONGEST_MAPPING = 1_000_000
# What messages call the YAML nodes other than a mapping.
NODES = {"sequence": "list", "scalar": "single value"}
# The tags that YAML gives to single values.
SCALARS = {"str", "bool", "int", "float", "null", "timestamp", "merge", "value"}


class Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadValue(message)


def parse_run(name: str, config_class: type, arguments: list[str]) -> tuple[Any, Any]:
    """The arguments (a RunArguments) and the config of a training command. Raises BadValue."""
    command = COMMANDS[name]
    parts = (command.arguments, config_class)
    known = {entry.name for part in parts for entry in fields(part) if entry.init}
    description = f"{command.method}Trainer: {command.help}. A row of the dataset has the columns {command.rows}."
    parser = Parser(parts, prog=f"rlkernels {name}", description=description, allow_abbrev=False)
    arguments = options_in_file(arguments, known) + arguments
    try:
        run, config, rest = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        check_fields(run)
    except BadValue:
        raise
    except Exception as error:  # transformers raises exceptions of any type, and everything it reads came from the user
        told = isinstance(error, ValueError | TypeError | ImportError)
        raise BadValue(str(error) if told else show(error)) from error
    if rest:
        option = rest[0].partition("=")[0]
        near = difflib.get_close_matches(option, [f"--{each}" for each in known], 1)
        raise BadValue(f"unknown option {option}" + (f"; did you mean {near[0]}?" if near else ""))
    return run, config


def yaml_loader() -> Any:
    """A loader that reads 1e-5 as a number, as JSON does. YAML 1.1 reads it as text, since it has no point."""

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def options_in_file(arguments: list[str], known: set[str]) -> list[str]:
    """The options in the file that `--config` names, as command line arguments."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        file = finder.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise BadValue(str(error)) from error
    if file is None:
        return []
    try:
        given = yaml.compose(Path(file).read_bytes(), Loader=yaml_loader())
        if given is None:
            return []
        if not isinstance(given, yaml.MappingNode):
            raise BadValue(f"--config {file}: want `option: value` lines; got a {NODES[given.id]}")
        options = [(name.value, value) for name, value in given.value]
        if len(names := [name for name, _ in options]) > len(set(map(str, names))):
            raise BadValue(f"--config {file}: option '{max(names, key=names.count)}' stands twice")
        return [part for name, value in options for part in option_in_file(name, value, known)]
    except OSError as error:
        raise BadValue(f"--config {file}: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, OverflowError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise BadValue(f"--config {file}: {reason}") from error


def option_in_file(name: Any, value: Any, known: set[str]) -> list[str]:
    """An option as command line arguments. Single values keep the file's text, which YAML would have converted."""
    if not isinstance(name, str) or name not in known - {"config"}:
        raise ValueError(f"unknown option '{name}'")
    if isinstance(value, yaml.ScalarNode):
        return [] if value.tag == "tag:yaml.org,2002:null" else [f"--{name}={text_of(value)}"]
    if isinstance(value, yaml.SequenceNode):
        if value.tag != "tag:yaml.org,2002:seq":
            raise ValueError(f"unknown tag {value.tag}")
        if not all(isinstance(each, yaml.ScalarNode) for each in value.value):
            raise ValueError(f"{name}: want one value, or a list of values")
        return [f"--{name}", *map(text_of, value.value)]
    loader = yaml.SafeLoader("")
    try:
        mapping = loader.construct_document(value)
    finally:
        loader.dispose()
    text = ""
    for part in json.JSONEncoder().iterencode(mapping):  # in pieces, since nested aliases can expand without bound
        text += part
        if len(text) > LONGEST_MAPPING:
            raise ValueError(f"{name}: want at most {LONGEST_MAPPING} characters as JSON; got more")
    return [f"--{name}={text}"]


def text_of(scalar: Any) -> str:
    """The text of a single value, with YAML's spellings of booleans and numbers changed to the command line's."""
    kind = scalar.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in SCALARS:
        raise ValueError(f"unknown tag {scalar.tag}")
    own = {"on": "true", "off": "false", ".inf": "inf", "-.inf": "-inf", "+.inf": "inf", ".nan": "nan"}
    return own.get(scalar.value.lower(), scalar.value) if kind in ("bool", "float") else scalar.value
