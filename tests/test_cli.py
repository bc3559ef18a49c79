import json

import pytest

from iwm_ray.cli import parse_pretrain, run_command
from iwm_ray.config import Config
from iwm_ray.errors import RunError, UsageError
from iwm_ray.recipes import RECIPES


def parse(*arguments):
    return parse_pretrain(arguments)[0]


def test_without_arguments_it_is_the_demonstration():
    assert parse().config == RECIPES["photos_tiny"]()


def test_single_values_override_a_recipe():
    command = parse(
        "cifar10_small", "--predictor.depth", "2", "--views.crop_scale", "0.5", "1", "--runtime.use-gpu=true",
        "--steps", "9", "--seed", "4", "--output", "here", "--dry-run",
    )  # fmt: skip
    config = command.config
    assert (config.predictor.depth, config.views.crop_scale, config.runtime.use_gpu) == (2, (0.5, 1.0), True)
    assert (config.schedule.steps, config.seed, str(command.output), command.dry_run) == (9, 4, "here", True)
    assert config.encoder == RECIPES["cifar10_small"]().encoder


def test_a_recorded_configuration_repeats_the_run(tmp_path):
    config = parse("cifar10_small", "--seed", "3").config
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    assert parse("--config", str(file)).config == config
    assert parse("--config", str(file), "--seed", "5").config.seed == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cifar10_smal"], ["cifar10_smal", "did you mean 'cifar10_small'"]),
        (["--encoder.patch-sizee", "3"], ["--encoder.patch-sizee", "did you mean '--encoder.patch-size'"]),
        (["--encoder.patch-size", "15"], ["encoder.patch_size 15", "does not divide", "8, 16"]),
        (["--optimizer.lr", "abc"], ["optimizer.lr 'abc'", "number"]),
        (["--optimizer.lr", "nan"], ["optimizer.lr", "finite"]),
        (["--views.where", "gpu"], ["views.where 'gpu'", "'host' or 'device'"]),
        (["--views.crop-scale", "0.5"], ["--views.crop-scale", "2 arguments"]),
        (["--config", "missing.json"], ["--config missing.json", "No such file"]),
        (["photos_tiny", "--config", "x.json"], ["photos_tiny", "--config x.json", "drop one"]),
        (["--optimizer.global-batch-size", "6", "--runtime.num-workers", "4"], ["[1, 2, 3, 6]"]),
        (["--views.crop-scale", "0.5", "x"], ["views.crop_scale 'x'"]),
        (["--schedule.momentum-start", "1.5"], ["schedule.momentum_start '1.5'", "less than or equal to 1"]),
        (["--runtime.num-workers", "0"], ["runtime.num_workers '0'", "greater than 0"]),
        (["--steps", "-3"], ["schedule.steps '-3'", "greater than or equal to 0"]),
    ],
)
def test_a_mistake_is_named_in_one_line(arguments, words):
    with pytest.raises(UsageError) as raised:
        parse(*arguments)
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"recipe": "x", "unknown": 1}', "\x00"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(UsageError):
        parse("--config", str(file))


def test_a_mistyped_key_in_a_file_is_suggested(tmp_path):
    tree = json.loads(Config(recipe="x").model_dump_json())
    tree["optimizer"]["lrr"] = 1
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(UsageError, match="optimizer.lrr'; did you mean 'lr'"):
        parse("--config", str(file))


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as raised:
        parse("--help")
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for name in Config(recipe="x").flat():
        if "." in name:
            assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(("error", "code"), [(UsageError("bad"), 2), (RunError("broken"), 1)])
def test_failures_are_one_line_and_an_exit_code(error, code, capsys):
    def fail(arguments):
        raise error

    assert run_command(fail, []) == code
    assert capsys.readouterr().err == f"iwm-ray: error: {error}\n"
