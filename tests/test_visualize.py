import re
import shutil
import subprocess
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from iwm_ray import visualize
from iwm_ray.config import Config
from iwm_ray.measurement import VERSION, TaskResult, results_folder
from iwm_ray.run_directory import write_json
from iwm_ray.trained import Trained
from iwm_ray.views.policy import ViewPolicy
from iwm_ray.visualize import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PICTURES = [
    "retrieval.png",
    "retrieval-worst.png",
    "slider-1.png",
    "slider-2.png",
    "components.png",
    "errors.png",
    "maps.png",
    "views.png",
    "curves.png",
]


def draw(run, *options):
    with pytest.raises(SystemExit) as ended:
        main([str(run), *map(str, options)])
    return ended.value.code


@pytest.fixture(scope="module")
def copy(clean_run, tmp_path_factory):
    """A finished run whose name would be trouble if it were not escaped."""
    folder = tmp_path_factory.mktemp("visualize") / "<script>alert(1)<script>"
    shutil.copytree(clean_run, folder)
    shutil.rmtree(folder / "pictures")
    return folder


@pytest.fixture(scope="module")
def drawn(copy):
    assert draw(copy, "--images", 4, "--views", 8) == 0
    return copy / "pictures"


@pytest.fixture(scope="module")
def page(drawn):
    return (drawn / "index.html").read_text()


def test_every_picture_is_written_and_in_the_page(drawn, page):
    assert sorted(path.name for path in drawn.iterdir()) == sorted([*PICTURES, "index.html"])
    for name in PICTURES:
        assert min(Image.open(drawn / name).size) > 400
    alts = re.findall(r'<img [^>]*alt="([^"]+)"', page)
    assert len(alts) == len(PICTURES) == page.count("<img ")


def test_the_page_needs_nothing_else_and_runs_nothing(page):
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;script&gt;" in page


def test_the_headline_and_the_facts_are_the_measured_ones(page, copy):
    trained = Trained.open(copy)
    setup = visualize._open(trained, options(images=4, views=8))
    metrics = setup.mrr.metrics
    assert f"MRR {metrics['mrr/mrr']:.3f}" in page
    assert f"chance {metrics['mrr/chance']:.3f}" in page
    assert trained.hash[:12] in page
    assert "4 of photos_tiny:test (test images)" in page
    assert "&#34;recipe&#34;: &#34;photos_tiny&#34;" in page


def options(**changes):
    names = ("data.path", "data.test_path", "runtime.cache", "tracking.uri", "views", "images")
    return Namespace(**(dict.fromkeys(names) | {"images": 2} | changes))


def test_an_earlier_checkpoint_other_images_and_another_folder(clean_run, tmp_path, capsys):
    data = tmp_path / "data" / "noise"
    data.mkdir(parents=True)
    for number in range(3):  # fewer than a batch of training
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{number}.png")
    step = min(int(path.name.removeprefix("step_")) for path in (clean_run / "checkpoints").glob("step_*"))
    place = tmp_path / "new" / "folder"
    arguments = (
        "--checkpoint",
        step,
        "--data.path",
        data.parent,
        "--output",
        place,
        "--images",
        2,
        "--views",
        4,
    )
    assert draw(clean_run, *arguments) == 0
    page = (place / "index.html").read_text()
    assert f"<dd>{step}</dd>" in page
    assert f"2 of {data.parent} (training images)" in page
    said = capsys.readouterr().out
    assert re.search(r"^retrieval +\d+\.\d s", said, re.MULTILINE)
    assert f"{place / 'index.html'}" in said


def test_a_run_without_jitter_has_no_actions_to_imagine(clean_run):
    trained = Trained.open(clean_run)
    tree = trained.config.model_dump()
    tree["views"] |= {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    config = Config.model_validate(tree)
    still = replace(trained, config=config, policy=ViewPolicy.from_config(config.views))
    subject = visualize._open(still, options())
    assert [part.name for part in visualize._parts(subject)] == ["maps", "views", "curves"]
    assert "no colour jitter" in subject.headline
    assert "bank" not in visualize._facts(subject)


def test_the_figures_of_an_evaluation_are_drawn(clean_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(clean_run, run)
    trained = Trained.open(run)
    figures = {
        "trained": {"action_r2/mean": 0.5, "action_r2/hue": 0.25},
        "untrained": {"action_r2/mean": 0.1},
    }
    folder = results_folder(trained)
    folder.mkdir(parents=True)
    write_json(folder / "action_r2.json", vars(TaskResult("action_r2", "", 1.0, {}, "", figures, VERSION)))
    subject = visualize._open(trained, options())
    r2, curves = visualize._record_parts(subject)
    assert (r2.name, curves.name) == ("action-r2", "curves")
    assert "mean 0.50, hue 0.25" in r2.figures[0][1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "7"], "kept are the steps"),
        (["--checkpoint", "last"], "newest, best, or the step"),
        (["--images", "1"], "--images 1: needs 2 or more"),
        (["--views", "0"], "--views 0: needs 2 or more"),
        (["--imgaes", "3"], "did you mean '--images'"),
        (["--data.path", "/no/such/place"], "/no/such/place"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(arguments, said, clean_run, capsys):
    assert draw(clean_run, *arguments) == 2
    assert_one_line(capsys, said)


def assert_one_line(capsys, said):
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_no_checkpoint_yet(clean_run, tmp_path, capsys):
    shutil.copy(clean_run / "config.json", tmp_path)
    assert draw(tmp_path) == 2
    assert_one_line(capsys, "no checkpoint there yet")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]  # nothing was made


def test_images_that_cannot_be_decoded(clean_run, tmp_path, capsys):
    data = tmp_path / "data" / "broken"
    data.mkdir(parents=True)
    for number in range(3):
        (data / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    assert draw(clean_run, "--data.path", data.parent, "--output", tmp_path / "out") == 2
    assert_one_line(capsys, "could be read, two are needed")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(clean_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert draw(clean_run, "--output", tmp_path / "file" / "folder") == 2
    assert_one_line(capsys, "choose another --output")


def console(html, folder, size):
    """What a browser without a network says of a page: its screenshot, and the lines of its console."""
    shot = folder / "shot.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=3000", f"--screenshot={shot}"]
    done = subprocess.run(
        [*command, html.as_uri()], capture_output=True, text=True, timeout=120, check=True, errors="replace"
    )
    return shot, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("size", [(1280, 900), (500, 900)], ids=["laptop", "phone"])
def test_the_page_opens_in_a_browser(drawn, tmp_path, size):
    shot, lines = console(drawn / "index.html", tmp_path, size)
    assert lines == []
    assert len(np.unique(np.asarray(Image.open(shot).convert("L")))) > 50  # something is drawn


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_page_that_loads_something_is_noticed(page, tmp_path):
    """The check of the other test can fail."""
    (tmp_path / "bad.html").write_text(
        page.replace("</main>", '<img src="https://example.com/x.png" alt="x"></main>')
    )
    assert console(tmp_path / "bad.html", tmp_path, (500, 500))[1]
