"""The README is a document that can be wrong: its commands, files and recipes exist."""

import re
import shlex
from pathlib import Path

import pytest

from iwm_ray import evaluate, finetune
from iwm_ray.cli import parse_pretrain
from iwm_ray.recipes import RECIPES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    match.replace("\\\n", " ").partition("#")[0]
    for match in re.findall(r"python -m iwm_ray\.pretrain((?:\\\n|[^\n`])*)", TEXT)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_accepted(command):
    arguments = shlex.split(command)
    if "--help" not in arguments:
        parse_pretrain(arguments)


@pytest.mark.parametrize("module", [evaluate, finetune])
def test_the_other_commands_are_accepted(module):
    name = module.__name__.rpartition(".")[2]
    commands = [line.partition("#")[0] for line in re.findall(rf"python -m iwm_ray\.{name}([^\n`]*)", TEXT)]
    assert commands
    for command in commands:
        assert module._parser().parse(shlex.split(command)).run == Path("runs/RUN")


def test_every_recipe_is_named():
    assert [name for name in RECIPES if f"`{name}`" not in TEXT] == []


def test_the_files_of_the_tree_exist():
    tree = TEXT.split("## The tree")[1]
    names = re.findall(r"^([\w./]+)\s", tree.split("```text")[1].split("```")[0], re.MULTILINE)
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_no_placeholder_is_left():
    assert not re.search(r"\b[A-Z]+_(OUTPUT|BLOCK)\b", TEXT)
