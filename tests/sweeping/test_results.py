"""What a sweep says, against figures that were worked out by hand and by a library."""

import io
import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from scipy.stats import spearmanr, t

from iwm_ray.cli import parse_pretrain, validate
from iwm_ray.errors import UsageError
from iwm_ray.run_directory import write_json
from iwm_ray.sweeping import words
from iwm_ray.sweeping.record import SweepDirectory
from iwm_ray.sweeping.report import Report
from iwm_ray.sweeping.results import (
    BOTH,
    FEWEST,
    GAIN,
    KNN,
    LINEAR,
    MRR,
    TUNED,
    Configuration,
    Result,
    configurations,
    dial,
    effects,
    measured,
    named_points,
    pretrain_command,
    read_results,
    relation,
    spearman,
)
from iwm_ray.sweeping.space import Axis, Sweep, base

SWEEP = Sweep(
    "test",
    "Does it work?",
    base("laptop"),
    (
        Axis.of("predictor.conditioning", "none", "feature"),
        Axis.of("predictor.depth", 2, 4, 8),
        Axis.of("seed", 0, 1),
    ),
)
# MRR and linear probe by conditioning and depth, mean of two seeds that differ by 0.02.
MEANS = {
    ("none", "2"): (0.02, 0.60),
    ("none", "4"): (0.03, 0.58),
    ("none", "8"): (0.04, 0.59),
    ("feature", "2"): (0.30, 0.50),
    ("feature", "4"): (0.50, 0.45),
    ("feature", "8"): (0.70, 0.40),
}


def _pixel() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3)).save(buffer, "PNG")
    return buffer.getvalue()


PIXEL = _pixel()


def metrics(trial) -> dict[str, float]:
    mrr, linear = MEANS[trial.point["predictor.conditioning"], trial.point["predictor.depth"]]
    mrr += 0.01 if trial.point["seed"] == "1" else -0.01
    found = {"mrr/chance": 0.0239}
    for name, value, half in (
        ("mrr/mrr", mrr, 0.005),
        ("linear/top1", linear, 0.02),
        ("finetune/a/difference", mrr / 10, 0.01),
        ("finetune/b/difference", mrr / 5, 0.01),
    ):
        found |= {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
    return found


@pytest.fixture
def folder(tmp_path):
    """A finished sweep, written as its trials write it."""
    directory = SweepDirectory(tmp_path / "sweep")
    directory.path.mkdir()
    directory.plan(SWEEP, SWEEP.trials())
    for trial in SWEEP.trials():
        run = directory.run(trial.hash)
        run.path.mkdir(parents=True)
        write_json(run.config, trial.config.model_dump(mode="json"))
        run.pictures.mkdir()
        (run.pictures / "retrieval.png").write_bytes(PIXEL)
        summary = {"status": "finished", "health": "ok", "health_line": "ok: all is well"}
        write_json(run.summary, summary | {"metrics": metrics(trial)})
        directory.note_done(SWEEP, trial, {})
    return directory.path


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
@settings(max_examples=50, deadline=None)
def test_spearman_is_the_librarys(pairs):
    x, y = np.array(pairs, float).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)


def test_figures_are_those_worked_out_by_hand(folder):
    groups = configurations(read_results(folder))
    assert [len(group.results) for group in groups] == [2] * 6
    third = groups[3]
    assert third.point == {"predictor.conditioning": "feature", "predictor.depth": "2"}
    assert third.seeds(MRR) == pytest.approx([0.29, 0.31])
    assert third.mean(MRR) == pytest.approx(0.30)
    assert third.interval(MRR) == pytest.approx((0.295, 0.305))
    assert third.mean(GAIN.metric) == pytest.approx(0.15 * 0.30)
    # Ranks of the linear probe by rising MRR are 6 4 5 3 2 1: sum of squared differences 25 + 4 + 4 + 1 + 9 + 25.
    assert relation(groups, LINEAR).value == pytest.approx(1 - 6 * 68 / (6 * 35))
    assert relation(groups, GAIN).value == pytest.approx(1)
    first, second = effects(groups, MRR)
    assert (first.axis, second.axis) == ("predictor.conditioning", "predictor.depth")
    assert first.means == pytest.approx({"none": 0.03, "feature": 0.5})
    assert second.means == pytest.approx({"2": 0.16, "4": 0.265, "8": 0.37})
    ends = named_points(groups)
    assert (ends["invariant"].mean(MRR), ends["equivariant"].mean(MRR)) == pytest.approx((0.02, 0.70))


def test_an_unfinished_grid_compares_like_with_like(folder):
    """Where depth 4 and 8 lack their runs without the action, depth is judged with it, conditioning at depth 2."""
    groups = [
        group for number, group in enumerate(configurations(read_results(folder))) if number in (0, 3, 4, 5)
    ]
    depth, conditioning = effects(groups, MRR)
    assert depth.means == pytest.approx({"2": 0.30, "4": 0.50, "8": 0.70})
    assert conditioning.means == pytest.approx({"none": 0.02, "feature": 0.30})
    assert depth.is_fair and conditioning.is_fair
    mixed = effects([groups[0], groups[2]], MRR)
    assert [each.reach for each in mixed] == pytest.approx([0.48, 0.48])
    assert not any(each.is_fair for each in mixed)


def test_an_unfinished_grid_compares_the_seeds_that_both_have(folder):
    none, feature = (configurations(read_results(folder))[number] for number in (0, 3))
    first, second = feature.results
    lucky = replace(second, metrics={**second.metrics, MRR: 0.9})
    found = effects([replace(none, results=none.results[:1]), replace(feature, results=(first, lucky))], MRR)
    assert found[0].means == pytest.approx({"none": 0.01, "feature": 0.29})


def test_three_seeds_make_an_interval_over_seeds(folder):
    """As the library has it; and never narrower than that over images."""
    group = configurations(read_results(folder))[3]
    first = group.results[0]

    def with_mrr(*values: float) -> Configuration:
        ends = [{MRR: x, f"{MRR}_low": x - 0.005, f"{MRR}_high": x + 0.005} for x in values]
        return replace(group, results=tuple(replace(first, metrics=found) for found in ends))

    wide = with_mrr(0.2, 0.3, 0.34)
    expected = t.interval(0.95, 2, loc=0.28, scale=np.std([0.2, 0.3, 0.34], ddof=1) / 3**0.5)
    assert wide.interval(MRR) == pytest.approx(expected, abs=1e-4)
    assert with_mrr(0.3, 0.3, 0.3).interval(MRR) == pytest.approx((0.295, 0.305))
    assert with_mrr(0.2, 0.4).interval(MRR) == pytest.approx((0.295, 0.305))


def test_a_bootstrap_interval_holds_the_value_and_widens_with_noise(folder):
    groups = configurations(read_results(folder))
    found = relation(groups, LINEAR)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    assert found.is_clear == (found.high < 0)


def test_the_dial_names_the_nearest(folder):
    groups = configurations(read_results(folder))
    assert dial(groups, 0.42)[0].point["predictor.depth"] == "4"
    assert dial(groups, "best-linear")[0].point == {"predictor.conditioning": "none", "predictor.depth": "2"}
    with pytest.raises(
        UsageError, match=r"attentive was not measured; .* --measure.tasks linear attentive adds it"
    ):
        dial(groups, "best-attentive")
    with pytest.raises(UsageError, match="no predictor was finetuned; .* --finetune.tune predictor"):
        dial(groups, "best-finetuned")
    lines = Report.open(folder).wanted(0.42)
    assert "0.500 (0.495 to 0.505)" in lines[1]
    assert "--predictor.depth" not in lines[2]  # the recipe's own
    assert lines[2].startswith("  python -m iwm_ray.pretrain photos_tiny")


def test_few_configurations_make_no_claim(folder):
    results = [each for each in read_results(folder) if each.point["predictor.conditioning"] == "none"]
    text = " ".join(words.reading(results, configurations(results)))
    assert "needs 6 configurations; the linear probe has 3, the gain of a finetuned" in text
    assert "rises" not in text and "falls" not in text


def test_words_follow_the_figures(folder):
    report = Report.open(folder)
    text = " ".join(report.text)
    assert "12 of 12 trials are finished" in text
    assert "MRR goes from 0.020" in text and "to 0.700" in text
    assert (
        "MRR is moved most by conditioning: from 0.030 on average with none to 0.500 with feature, by 0.470 ("
        in text
    )
    assert "Whether depth (0.210, −0." in text
    assert "MRR goes from 0.020 (none, depth 2) to 0.700 (feature, depth 8)" in text
    assert "5 of 6 configurations lie above chance" in text
    assert "the gain of a finetuned predictor over a random one rises: rank correlation +1.00" in text
    assert "differ by up to 0.020" in text


def change(folder, trial, **found):
    """Gives a trial other figures."""
    summary = SweepDirectory(folder).run(trial.hash).summary
    before = json.loads(summary.read_text())
    write_json(summary, before | {"metrics": before["metrics"] | found})


def test_one_configuration_above_chance_is_enough(folder):
    """Even where another one has a higher mean, of which nobody is sure."""
    for trial in SWEEP.trials():
        mrr, half = (0.2, 0.19) if trial.point["predictor.depth"] == "8" else (0.1, 0.01)
        change(folder, trial, **{MRR: mrr, f"{MRR}_low": mrr - half, f"{MRR}_high": mrr + half})
    text = " ".join(Report.open(folder).text)
    assert "4 of 6 configurations lie above chance. The highest is not among them" in text
    assert "no spectrum" not in text


def test_no_axis_is_said_to_move_mrr_where_seeds_do(folder):
    for number, trial in enumerate(SWEEP.trials()):
        change(folder, trial, **{MRR: 0.3 + 0.1 * math.sin(7 * number)})
    found = effects(configurations(read_results(folder)), MRR)
    assert all(each.is_known and not each.is_clear for each in found)
    assert "No axis moves MRR by more than seeds differ: " in " ".join(Report.open(folder).text)


def test_the_interval_of_an_effect_is_paired_over_the_rest_and_for_all_pairs_at_once(folder):
    """Of feature against none: six pairs of one depth and one seed; two axes have 1 + 3 pairs of values."""
    effect = effects(configurations(read_results(folder)), MRR)[0]
    differences = [
        feature - none for none, feature in ((0.02, 0.3), (0.03, 0.5), (0.04, 0.7)) for _ in (0, 1)
    ]
    level, error = 1 - 0.05 / 4, np.std(differences, ddof=1) / 6**0.5
    expected = t.interval(level, 5, loc=np.mean(differences), scale=error)
    assert (effect.low, effect.high) == pytest.approx(expected)
    few = [group for group in configurations(read_results(folder)) if group.point["predictor.depth"] == "2"]
    assert not effects(few, MRR)[0].is_known  # two pairs


def test_five_configurations_are_too_few_for_a_relation():
    """Without any relation, the bootstrap over five leaves out 0 one time in ten."""
    figures = [(0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (0.6, 0.7)]
    assert not relation(made(figures[:5]), LINEAR).is_known
    assert relation(made(figures), LINEAR).is_clear


def made(figures) -> list[Configuration]:
    """Configurations with these figures of MRR and of the linear probe."""
    config = base("laptop")
    return [
        Configuration(
            {"number": str(number)},
            (Result(Path(str(number)), config, {}, "finished", "ok", "", {MRR: x, LINEAR.metric: y}),),
        )
        for number, (x, y) in enumerate(figures)
    ]


def test_a_finetuning_of_one_trial_on_other_data_moves_nothing(folder):
    before = Report.open(folder)
    change(folder, SWEEP.trials()[0], **{"finetune/mine/difference": 0.9, "finetune/mine/top1": 0.9})
    after = Report.open(folder)
    assert after.markdown() == before.markdown() and after.figures() == before.figures()


def test_the_knn_of_the_monitor_is_no_outcome(folder):
    for trial in SWEEP.trials():
        change(folder, trial, **{"knn/top1": 0.3})
    assert KNN not in [each.outcome for each in words.relations(Report.open(folder).groups)]
    for trial in SWEEP.trials():
        change(folder, trial, **{"knn/top1_low": 0.2, "knn/top1_high": 0.4})
    assert KNN in [each.outcome for each in words.relations(Report.open(folder).groups)]


@pytest.mark.parametrize("name", ["sweep.json", "summary.json"])
def test_a_file_that_is_cut_is_named(folder, name):
    file = next(folder.rglob(name))
    file.write_text(file.read_text()[:40])
    with pytest.raises(UsageError, match=f"{name}: cannot be read") as error:
        Report.open(folder)
    assert "\n" not in str(error.value)


def test_the_dials_command_is_the_configuration_and_says_where_it_ends(folder):
    lines = Report.open(folder).wanted(0.9)
    assert lines[0] == (
        "nearest to MRR 0.9, of 6 known configurations: feature, depth 8; the known range is 0.020 to 0.700"
    )
    assert Report.open(folder).wanted("invariant")[0] == "invariant, of 6 known configurations: none, depth 2"
    assert "range" not in Report.open(folder).wanted(0.42)[0]
    tree = base("laptop").model_dump()
    tree["data"] |= {"path": "my photos/of a 'cat'", "test_path": ""}
    command = pretrain_command(validate(tree))
    assert parse_pretrain(shlex.split(command)[3:])[0].config.hash() == validate(tree).hash()


def test_every_finetuning_is_on_the_map_and_among_the_effects(folder):
    for trial in SWEEP.trials():
        change(folder, trial, **{"finetune/a/top1": 0.3, "finetune/a/both/top1": 0.4})
    report = Report.open(folder)
    shown = [each.title for each in measured(report.groups, FEWEST)]
    assert shown == [LINEAR.title, GAIN.title, TUNED.title, BOTH.title]
    figures = report._figures()
    assert [axes.get_title(loc="left") for axes in figures["map"].axes] == shown
    rows = [axes.get_ylabel() for axes in figures["effects"].axes if axes.get_ylabel()]
    assert rows == [
        "MRR",
        "Linear probe, %",
        "Tuned − random, points",
        "Predictor finetuned, %",
        "End to end, %",
    ]


def test_the_names_of_both_ends_are_written_on_nothing(folder):
    """Neither on a mark nor on each other, inside the panel, where the marks stand close."""
    heights = (0, 0.013, 0.04, 0.07, 0.11, 0.15)
    for trial in SWEEP.trials():
        place = list(MEANS).index((trial.point["predictor.conditioning"], trial.point["predictor.depth"]))
        change(folder, trial, **{MRR: 0.1 + 0.02 * place, "linear/top1": 0.5 + heights[place]})
    figure = Report.open(folder)._figures()["map"]
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        names = [text for text in axes.texts if text.get_text() in ("invariant", "equivariant")]
        assert len(names) == 2
        boxes = [Text.get_window_extent(text) for text in names]
        marks = [
            axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_marker() in "os"
        ]
        assert not boxes[0].overlaps(boxes[1])
        for box in boxes:
            assert axes.get_window_extent().containsx(box.x0) and axes.get_window_extent().containsx(box.x1)
            assert not any(box.contains(*place) for mark in marks for place in mark)


def test_outcomes_of_few_configurations_are_not_drawn(folder):
    shown = measured(Report.open(folder).groups, FEWEST)
    for trial in SWEEP.trials()[:5]:
        change(folder, trial, **{"attentive/top1": 0.5})
    assert measured(Report.open(folder).groups, FEWEST) == shown == [LINEAR, GAIN]


def test_a_model_at_chance_is_no_spectrum(folder):
    for run in (folder / "trials").iterdir():
        found = json.loads((run / "summary.json").read_text())
        found["metrics"] |= {"mrr/mrr": 0.0239, "mrr/mrr_low": 0.02, "mrr/mrr_high": 0.03}
        write_json(run / "summary.json", found)
    report = Report.open(folder)
    text = " ".join(report.text)
    assert "No configuration is above chance" in text
    assert "cannot be told: all have the same figure" in text
    page = report.write().read_text()
    assert "equivariant" not in page and "Retrieval" not in page
    names = [text.get_text() for axes in report._figures()["map"].axes for text in axes.texts]
    assert "invariant" not in names and "equivariant" not in names
    for end in ("invariant", "equivariant"):
        with pytest.raises(UsageError, match=f"--want {end}: the highest MRR is not above chance"):
            dial(report.groups, end)
    assert report.figures()["spectrum/highest_mrr"] == pytest.approx(0.0239)
    assert "known range is 0.024 to 0.024" in report.wanted(0.5)[0]


def test_a_lowest_mrr_above_chance_is_not_called_invariant(folder):
    for run in (folder / "trials").iterdir():
        found = json.loads((run / "summary.json").read_text())
        raised = {name: found["metrics"][name] + 0.1 for name in ("mrr/mrr", "mrr/mrr_low", "mrr/mrr_high")}
        found["metrics"] |= raised
        write_json(run / "summary.json", found)
    groups = Report.open(folder).groups
    assert list(named_points(groups)) == ["equivariant"]
    with pytest.raises(UsageError, match="--want invariant: the lowest MRR is above chance"):
        dial(groups, "invariant")


def test_a_trial_that_is_only_trained_has_no_mrr(folder):
    """It ends with one of few images in smaller banks, which the evaluation then replaces."""
    trained, *measured_trials = SWEEP.trials()
    for trial in measured_trials:
        change(folder, trial, **{"mrr/num_views": 256.0})
    lone = {name: value for name, value in metrics(trained).items() if name.startswith("mrr/")}
    before = Report.open(folder)
    summary = SweepDirectory(folder).run(trained.hash).summary
    write_json(summary, json.loads(summary.read_text()) | {"metrics": lone | {MRR: 0.99, "mrr/chance": 0.34}})
    (summary.parent / "trial.json").unlink()
    after = Report.open(folder)
    assert before.groups[0].seeds(MRR) == after.groups[0].seeds(MRR) == pytest.approx([0.03])
    assert after.groups[0].mean("mrr/chance") == pytest.approx(0.0239)
    assert after.groups[0].first.config.seed == 1
    assert "0.990" not in after.write().read_text()
    # A folder of runs that know nothing of a sweep.
    (folder / "sweep.json").unlink()
    assert math.isnan(next(each for each in read_results(folder) if each.path == summary.parent).figure(MRR))


def test_the_first_trial_that_is_trained_has_no_mrr_yet(folder):
    first, *others = SWEEP.trials()
    for trial in others:
        shutil.rmtree(SweepDirectory(folder).run(trial.hash).path)
    done = SweepDirectory(folder).run(first.hash).path / "trial.json"
    assert read_results(folder)[0].figure(MRR) == pytest.approx(0.01)  # all that its sweep asks is done
    done.unlink()
    report = Report.open(folder)
    assert math.isnan(report.results[0].figure(MRR))
    assert report.text[0] == "1 configuration with 1 seed; 0 of 12 trials are finished."
    with pytest.raises(
        UsageError, match="--want best-attentive: no trial is finished; finish the sweep first"
    ):
        report.wanted("best-attentive")
    report.write()


def test_one_is_not_several(folder):
    trials = SWEEP.trials()
    for trial in trials[1:]:
        (SweepDirectory(folder).run(trial.hash).path / "trial.json").unlink()
    assert "; 1 of 12 trials is finished." in Report.open(folder).text[0]


def gains(folder, half: float):
    """Finetuned: the action adds 0.10. Gain over the control: it adds 0.02, which changes by `half` from pair to pair."""
    for number, trial in enumerate(SWEEP.trials()):
        told = trial.point["predictor.conditioning"] == "feature"
        gain = 0.02 * told + (half if number % 4 < 2 else -half) * told
        change(folder, trial, **{"finetune/a/top1": 0.3 + 0.1 * told + 0.001 * (number % 2)})
        change(folder, trial, **{"finetune/a/difference": gain, "finetune/b/difference": gain})
    return Report.open(folder)


def test_clear_effects_on_what_features_are_good_for_are_said(folder):
    text = " ".join(gains(folder, 0.001).text)
    assert "The finetuned predictor is higher with conditioning feature than none, by 10.0 points (" in text
    assert "random one is higher with conditioning feature than none, by 2.0 points (" in text
    assert "also moves the gain" not in text
    assert "The linear probe is higher with conditioning none than feature, by 14.0 points (" in text


def test_an_effect_that_the_control_shares_is_said_so(folder):
    report = gains(folder, 0.08)
    text = " ".join(report.text)
    assert "random one is higher" not in text
    assert (
        "Whether conditioning (2.0, −" in text
        and " points) also moves the gain over a random predictor is not" in text
    )
    assert "No other effect of an axis on what the features are good for is clear." in text
    sentences = [each.strip() for each in text.split(". ")]
    assert all(each[0].isupper() or each[0].isdigit() for each in sentences)


def test_an_interval_that_leaves_out_0_is_not_written_with_a_0():
    assert words.figure(0.021, (0.0004, 0.042), percent=True) == "2.10 (0.04 to 4.20)"
    assert words.figure(0.021, (-0.0004, 0.042), percent=True) == "2.10 (−0.04 to 4.20)"
    assert words.figure(0.021, (0.0, 0.042), percent=True) == "2.1 (0.0 to 4.2)"
    assert words.figure(0.021, (1e-17, 0.042), percent=True) == "2.1 (0.0 to 4.2)"
    assert words.figure(0.5, (0.4, 0.6)) == "0.500 (0.400 to 0.600)"


def test_a_difference_is_in_points(folder):
    head = Report.open(folder).markdown()[0]
    assert "Linear probe, % (95 %)" in head and "Finetuned − random predictor, points (95 %)" in head


def test_the_pictures_of_both_ends_say_whose_they_are(folder):
    page = Report.open(folder).write().read_text()
    for end, title, mrr in (("invariant", "none, depth 2", 0.01), ("equivariant", "feature, depth 8", 0.69)):
        figures = f"{mrr:.3f} ({mrr - 0.005:.3f} to {mrr + 0.005:.3f})"
        said = f"The {end} end: seed 0 of {title}; MRR of this model {figures}."
        assert page.count(said) == 2  # beneath the heading, and for those who cannot see it


def test_collapsed_and_unfinished_trials_are_named_but_not_on_the_map(folder):
    trials = SWEEP.trials()
    directory = SweepDirectory(folder)
    summary = directory.run(trials[-1].hash).summary
    found = json.loads(summary.read_text()) | {"health": "collapsed", "health_line": "collapsed: RankMe 1.0"}
    write_json(summary, found)
    directory.run(trials[0].hash).summary.unlink()
    directory.note_failure(trials[0], "RunError: no space left")
    report = Report.open(folder)
    assert "11 of 12 trials are finished. One has collapsed, and its configuration stands" in report.text[0]
    assert named_points(report.groups)["equivariant"].mean(MRR) == pytest.approx(0.5)
    page = report.write().read_text()
    assert "collapsed: RankMe 1.0" in page
    assert "RunError: no space left" in page and trials[0].title in page


def test_every_planned_trial_is_counted_and_named(folder):
    """One that nobody has begun, one that failed before it had a folder, one that is trained and not measured yet."""
    waiting, broken, trained, failed = SWEEP.trials()[:4]
    directory = SweepDirectory(folder)
    for trial in (waiting, broken):
        shutil.rmtree(directory.run(trial.hash).path)
    directory.note_failure(broken, "UsageError: the folder cannot be made")
    (directory.run(trained.hash).path / "trial.json").unlink()
    directory.note_failure(failed, "RunError: no space left")
    report = Report.open(folder)
    assert "8 of 12 trials are finished" in report.text[0]
    assert report.figures()["sweep/finished"] == 8
    rows = {row[1]: row for row in report._health_table()[1:]}
    assert len(rows) == 12
    assert rows[waiting.hash] == ("none, depth 2, seed 0", waiting.hash, "not begun", "")
    assert rows[broken.hash][2:] == ("failed", "UsageError: the folder cannot be made")
    assert rows[failed.hash][2:] == ("failed", "RunError: no space left")
    assert rows[trained.hash][2:] == ("trained", "ok: all is well")
    report.write()


def test_a_search_that_chooses_on_its_way_waits_for_nothing(folder):
    directory = SweepDirectory(folder)
    shutil.rmtree(directory.run(SWEEP.trials()[0].hash).path)
    directory.plan(SWEEP, SWEEP.trials(), "optuna")
    assert "11 of 11 trials are finished" in Report.open(folder).text[0]


def test_the_report_is_complete_and_offline(folder):
    page = Report.open(folder).write()
    text = page.read_text()
    assert "http://" not in text and "https://" not in text and "<script" not in text
    for name in ("map", "effects", "heat", "correlations"):
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("data:image/png;base64,") == 6  # the figures, and what both ends retrieve
    assert "Retrieval at the ends" in text
    rows = pyarrow.parquet.read_table(page.parent / "trials.parquet")
    assert rows.num_rows == 12
    assert pyarrow.csv.read_csv(page.parent / "trials.csv").column_names == rows.column_names
    assert rows["mrr/mrr"].to_pylist() == pytest.approx(
        [metrics(trial)["mrr/mrr"] for trial in SWEEP.trials()]
    )


def test_any_folder_of_runs_is_a_sweep(folder):
    (folder / "sweep.json").unlink()
    results = read_results(folder / "trials")
    assert {axis for result in results for axis in result.point} == {
        "predictor.conditioning",
        "predictor.depth",
        "seed",
    }
    assert len(configurations(results)) == 6
    with pytest.raises(UsageError, match="no trials there"):
        read_results(folder / "nothing")
