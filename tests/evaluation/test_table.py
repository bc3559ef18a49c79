from iwm_ray.evaluation.table import table_lines

TRAINED = {
    "mrr/mrr": 0.379,
    "mrr/mrr_low": 0.347,
    "mrr/mrr_high": 0.41,
    "mrr/chance": 0.0239,
    "mrr/hue": 0.5,
    "mrr/h5": 0.6,
    "mrr/num_views": 256.0,
    "linear/top1": 0.4,
    "linear/chance": 0.1,
    "linear/top1_layer2": 0.35,
    "lowshot1/top1": 0.2,
    "lowshot1/top1_std": 0.01,
    "rank/rankme": 21.8,
}


def row(lines, start):
    (found,) = [line for line in lines if line.startswith(start)]
    return found.removeprefix(start).split()


def test_a_figure_stands_beside_its_interval_other_subjects_and_chance():
    lines = table_lines({"trained": TRAINED, "untrained": {"mrr/mrr": 0.024}})
    assert lines[0].split() == ["trained", "untrained", "chance"]
    assert row(lines, "MRR ") == ["0.379", "[0.347,", "0.410]", "0.024", "0.024"]
    assert row(lines, "linear probe ") == ["0.400", "0.100"]
    assert row(lines, "linear probe, 1 %")[2:] == ["labels", "0.200", "±", "0.010"]
    assert row(lines, "RankMe") == ["21.8"]


def test_components_and_layers_have_rows_and_ends_of_intervals_have_none():
    names = [line.split()[0] for line in table_lines({"trained": TRAINED})[1:]]
    assert {"mrr/hue", "linear/top1_layer2"} <= set(names)
    assert not any(name.endswith(("_low", "_high", "_std", "chance", "num_views")) for name in names)
    lines = table_lines({"trained": TRAINED})
    assert row(lines, "true view among the first five")[-2:] == ["0.600", "0.020"]
    assert row(lines, "mrr/hue")[-2:] == ["0.500", "0.024"]


def test_columns_stand_under_each_other():
    lines = table_lines({"trained": TRAINED, "untrained": {"mrr/mrr": 0.024, "linear/top1": 0.3}})
    at = lines[0].index("untrained")
    assert all(line[at - 1] == " " for line in lines if len(line) > at)
