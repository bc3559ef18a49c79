"""The command line: one option for every value of the configuration, and errors of one line.

argparse knows the names, pydantic the values; so the options, their help and their checks all come from config.py.
"""

import argparse
import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from iwm_ray.config import Config
from iwm_ray.errors import RunError, UsageError
from iwm_ray.recipes import RECIPES

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)
RUN = "run directory, or one of its checkpoints"
ADAPTER = "RUN/finetune/NAME/adapters/ARM, or RUN or RUN/finetune/NAME where there is only one"
_PRETRAIN = "Pretrain an Image World Model. The same command on an existing run directory resumes the run."


@dataclass(frozen=True)
class Command:
    """What the user asked for: the resolved configuration and the options that are no part of it."""

    config: Config
    output: Path | None
    dry_run: bool


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UsageError`s of one line, with a suggestion for a mistyped name."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses; underscores and hyphens in option names mean the same."""
        known, unknown = self.parse_known_args([_hyphenate(argument) for argument in arguments])
        if unknown:
            name = unknown[0].partition("=")[0]
            options = [option for action in self._actions for option in action.option_strings]
            raise UsageError(f"unknown argument {unknown[0]!r}{suggest(name, options)}; see --help")
        return known


def suggest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def parse_pretrain(
    arguments: Sequence[str], command: str = "pretrain", description: str = _PRETRAIN
) -> tuple[Command, bool]:
    """Reads the command line of `iwm_ray.pretrain`; returns the command and whether tracebacks are wanted.

    Args:
        arguments: the words behind the command.
        command: name of the command's module, for --help.
        description: what it does, for --help.
    """
    parser = _pretrain_parser(command, description)
    options = parser.parse(arguments)
    if options.recipe and options.config:
        raise UsageError(
            f"a recipe ({options.recipe}) and --config {options.config} exclude each other; drop one"
        )
    base = _read_config(options.config) if options.config else _recipe(options.recipe or "photos_tiny")
    tree = base.model_dump()
    override(tree, options)
    if options.steps is not None:
        tree["schedule"]["steps"] = options.steps
    if options.seed is not None:
        tree["seed"] = options.seed
    return Command(validate(tree), options.output, options.dry_run), options.debug


def override(tree: dict[str, Any], options: argparse.Namespace) -> None:
    """Puts the settings of the command line (see `add_settings`) into the tree of a configuration."""
    for name, value in vars(options).items():
        if value is None:
            continue
        section, dot, field = name.partition(".")
        if dot:
            tree.setdefault(section, {})[field] = value


def validate(tree: dict[str, Any]) -> Config:
    """The configuration of a tree of values.

    Raises:
        UsageError: one line that names the first wrong setting, its value and what is allowed.
    """
    return validate_as(Config, tree)


def validate_as(kind: type[AnyConfig], tree: dict[str, Any], section: str = "") -> AnyConfig:
    """`validate` for another command's configuration, or for what the options of one section hold."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_one_line(error, kind, section)) from None


def run_command(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Runs a command; turns foreseeable failures and Ctrl-C into one line on stderr and the exit code."""
    try:
        main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output (head, a pager) has seen enough
        # Python writes what is left once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, RunError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"iwm-ray: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("iwm-ray: interrupted", file=sys.stderr)
        return 130
    return 0


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command that uses an adapter; see `iwm_ray.load`."""
    parser.add_argument("--task", default="", help="of an adapter with several")
    parser.add_argument(
        "--run",
        type=_place,
        metavar="RUN",
        help="run directory of the adapter's encoder, where that has moved",
    )


def _place(text: str) -> Path:
    """A path that means the same to the workers of a cluster."""
    return Path(text).expanduser().absolute()


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that every command has."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _pretrain_parser(command: str, description: str) -> Parser:
    parser = Parser(
        prog=f"python -m iwm_ray.{command}",
        description=description,
        epilog="recipes: " + ", ".join(RECIPES),
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=None,
    )
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="named configuration; default photos_tiny"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a RUN/config.json: repeats that run")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="run directory; default runs/<recipe>-<config hash>"
    )
    parser.add_argument("--steps", metavar="N", help="the same as --schedule.steps")
    parser.add_argument("--seed", metavar="N", help="key of every random draw")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, create nothing"
    )
    add_common_options(parser)
    add_settings(parser, Config)
    return parser


def tuning_parser(command: str, description: str, kind: type[BaseModel], folder: str) -> Parser:
    """The options of a command that tunes a trained model: RUN, its checkpoint, and every value of `kind`.

    Args:
        command: name of the command's module.
        description: what it does, for --help.
        kind: its configuration; values at its top have options without a section.
        folder: name of the results' folder in RUN/finetune, for --help.
    """
    parser = Parser(
        prog=f"python -m iwm_ray.{command}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN)
    parser.add_argument(
        "--checkpoint", default="newest", metavar="WHICH", help="newest, best, or the step of a kept one"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder of the results; default RUN/finetune/{folder}",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, create nothing"
    )
    add_common_options(parser)
    group = parser.add_argument_group(command, kind.__doc__)
    for name, field in kind.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            add_option(group, name, field)
    add_settings(parser, kind)
    return parser


def tuning_config(options: argparse.Namespace, kind: type[AnyConfig]) -> AnyConfig:
    """The configuration of `tuning_parser`'s options.

    Raises:
        UsageError: a value is wrong.
    """
    tree = {name: value for name, value in vars(options).items() if name in kind.model_fields}
    override(tree, options)
    return validate_as(kind, tree)


def add_settings(parser: argparse.ArgumentParser, kind: type[BaseModel]) -> None:
    """One option `--section.name` for every value in the parts of a configuration."""
    for section, part in kind.model_fields.items():
        if isinstance(part.annotation, type) and issubclass(part.annotation, BaseModel):
            group = parser.add_argument_group(section, part.annotation.__doc__)
            for name, field in part.annotation.model_fields.items():
                add_option(group, f"{section}.{name}", field)


def add_option(group: Any, name: str, field: FieldInfo) -> None:
    """The option of one value; a tuple takes as many words as its default has, `tuple[X, ...]` one or more."""
    is_tuple, arguments = get_origin(field.annotation) is tuple, get_args(field.annotation)
    is_open = is_tuple and arguments[-1] is Ellipsis
    default = repr(field.default)
    if is_tuple:
        default = " ".join(v if isinstance(v, str) else f"{v:g}" for v in field.default) or "none"
    values = get_args(arguments[0]) if is_open else arguments
    choices = [value for value in values if isinstance(value, str)]
    group.add_argument(
        f"--{name.replace('_', '-')}",
        dest=name,
        nargs="+" if is_open else len(field.default) if is_tuple else None,
        metavar="|".join(choices) if choices else ("V" if is_tuple else "VALUE"),
        default=argparse.SUPPRESS,
        help=f"{' '.join((field.description or '').split())} (default: {default})".replace("%", "%%"),
    )


def _hyphenate(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _recipe(name: str) -> Config:
    if name not in RECIPES:
        raise UsageError(
            f"unknown recipe {name!r}{suggest(name, list(RECIPES))}; recipes: {', '.join(RECIPES)}"
        )
    return RECIPES[name]()


def _read_config(path: Path) -> Config:
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}; give the path of a run's config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--config {path}: not JSON ({error}); give the path of a run's config.json"
        ) from None
    if not isinstance(tree, dict):
        raise UsageError(f"--config {path}: not a JSON object; give the path of a run's config.json")
    return validate(tree)


def _one_line(error: ValidationError, kind: type[BaseModel], section: str = "") -> str:
    first = error.errors()[0]
    path = [part for part in first["loc"] if isinstance(part, str)]  # places in a tuple are no options
    name = ".".join([section, *path] if section else path)
    if first["type"] == "extra_forbidden":
        return f"unknown setting {name!r}{suggest(path[-1], _siblings(path, kind))}"
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return f"{name}.{reason}" if name else reason
    if first["type"] == "missing":
        return f"{name}: missing"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{name} {first['input']!r}: {message}"


def _siblings(path: list[str], kind: type[BaseModel]) -> list[str]:
    if len(path) == 1:
        return list(kind.model_fields)
    section = kind.model_fields.get(path[0])
    annotation = section.annotation if section else None
    return (
        list(annotation.model_fields)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel)
        else []
    )
