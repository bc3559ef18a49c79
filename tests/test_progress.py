import io
import json

import pytest

from iwm_ray.progress import Progress, duration, progress_line, scanning
from iwm_ray.run_directory import RunDirectory

ROW = {"step": 120, "train/loss": 0.41234, "train/samples_per_second": 310.0}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(14.2, "14 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (3599.9, "1 h 0 min"), (273600, "3 days 4 h")],
)
def test_durations_are_said_as_people_say_them(seconds, words):
    assert duration(seconds) == words


def test_the_line_holds_steps_rate_and_time_left():
    line = progress_line(
        ROW, {"monitor/rankme": 31.4, "monitor/knn_top1": 0.48}, total_steps=600, batch_size=128
    )
    assert line == "step 120/600 · loss 0.4123 · 310 images/s · 3 min 18 s left · RankMe 31 · kNN 0.480"
    assert "not finite" in progress_line(ROW | {"train/loss": None}, {}, 600, 128)


def test_new_reports_and_warnings_are_shown_once(tmp_path):
    run, out = RunDirectory(tmp_path), io.StringIO()
    run.warn("from an earlier start")
    progress = Progress(run, 600, 128, out)
    progress.show()
    assert out.getvalue() == ""
    line = json.dumps(ROW | {"time": 1.0}) + "\n"
    run.metrics.write_text(line[:20])  # still being written
    progress.show()
    run.metrics.write_text(line)
    run.warn("the disk is full")
    progress.show()
    progress.show()
    assert out.getvalue().count("step 120/600") == 1
    assert out.getvalue().count("warning") == out.getvalue().count("warning: the disk is full\n") == 1


def test_the_last_report_is_always_shown(tmp_path):
    run, out = RunDirectory(tmp_path), io.StringIO()
    progress = Progress(run, 600, 128, out)
    run.metrics.write_text(json.dumps(ROW) + "\n")
    progress.show()
    with run.metrics.open("a") as file:
        file.write(json.dumps(ROW | {"step": 600}) + "\n")
    progress.show()  # too soon after the first line
    assert "step 600" not in out.getvalue()
    progress.close()
    assert out.getvalue().splitlines()[-1].startswith("step 600/600")


def test_only_large_scans_are_spoken_of(capsys):
    say = scanning("flowers")
    for count in range(0, 250_001, 1000):
        say(count)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"scanning flowers: {count} samples" for count in ("20,000", "120,000", "220,000")]
