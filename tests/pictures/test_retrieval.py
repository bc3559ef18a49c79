from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from skimage import data

from iwm_ray.config import Config, EncoderConfig, PredictorConfig, ViewsConfig
from iwm_ray.evaluation.banks import bank_views
from iwm_ray.evaluation.mrr import MrrResult, measure_mrr
from iwm_ray.model.iwm import build_model
from iwm_ray.pictures.retrieval import retrieval_gallery
from iwm_ray.pictures.style import GREEN
from iwm_ray.views.policy import ViewPolicy

SIZE, NUM_VIEWS = 32, 12
VIEWS = ViewsConfig(image_size=SIZE, brightness=0.8, contrast=0.8, saturation=0.4, hue=0.2)
POLICY = ViewPolicy.from_config(VIEWS)
IMAGES = np.stack(
    [photo()[100 : 100 + SIZE, 100 : 100 + SIZE] for photo in (data.astronaut, data.chelsea, data.coffee)]
)


@pytest.fixture(scope="module")
def result() -> MrrResult:
    config = Config(
        recipe="test",
        views=VIEWS,
        encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=8, width=16, depth=1, num_heads=2),
        predictor=PredictorConfig(depth=1, width=16, num_heads=2),
    )
    return measure_mrr(build_model(config, POLICY.action_dim), IMAGES, POLICY, seed=0, num_views=NUM_VIEWS)


def test_rows_for_some_images_and_for_the_worst(result: MrrResult, legible) -> None:
    figure = retrieval_gallery(result, IMAGES, POLICY, "feature")
    assert len(figure.axes) == 6 * (3 + 2)  # three images only, of four rows asked for
    texts = legible(figure)
    assert texts.count("among the worst") == 2
    assert f"rank {result.table['rank'].max():g}" in texts
    title = next(text for text in texts if "MRR" in text and "chance" in text)
    assert f"{result.metrics['mrr/mrr']:.3f}" in title
    assert any("conditioning: feature" in text for text in texts)
    assert sum("hue" in text for text in texts) == 5


@pytest.mark.parametrize(("num_rows", "num_worst"), [(1, 0), (2, 1)])
def test_the_number_of_rows_can_be_chosen(num_rows: int, num_worst: int, result: MrrResult, legible) -> None:
    figure = retrieval_gallery(result, IMAGES, POLICY, "sequence", num_rows, num_worst)
    assert len(figure.axes) == 6 * (num_rows + num_worst)
    legible(figure)


def test_a_sheet_of_worst_cases_holds_nothing_else(result: MrrResult, legible) -> None:
    texts = legible(retrieval_gallery(result, IMAGES, POLICY, "feature", num_rows=0, num_worst=2))
    assert texts.count("among the worst") == 2
    assert any(text.startswith("Where the world model fails") for text in texts)
    worst = np.sort(result.table["rank"].max(1))[::-1][:2]
    assert {f"rank {rank:g}" for rank in worst} <= set(texts)


def test_long_numbers_still_fit(result: MrrResult, legible) -> None:
    """Half ranks, large banks and the longest name of a conditioning."""
    larger = {name: result.table[name] + 1000.5 for name in ("rank", "zero_action_rank")}
    large = replace(result, table=result.table | larger)
    legible(retrieval_gallery(large, IMAGES, POLICY, "sequence"))


def test_the_pictures_are_the_banks_views(result: MrrResult) -> None:
    axes = retrieval_gallery(result, IMAGES, POLICY, "feature", num_rows=1, num_worst=0).axes
    bank = bank_views(POLICY, IMAGES[0], {name: column[:NUM_VIEWS] for name, column in result.draws.items()})
    shown = [np.asarray(column.images[0].get_array()) for column in axes if column.images]
    nearest, other = result.table["nearest"][0], result.table["shuffled"][0, 0]
    found = (nearest[0], result.table["zero_nearest"][0], nearest[other])
    expected = (IMAGES[0], bank[0], *(bank[view] for view in found))
    assert all(np.array_equal(a, b) for a, b in zip(shown, expected, strict=True))


def test_only_a_first_rank_is_framed_green(result: MrrResult) -> None:
    found = replace(result, table=result.table | {"rank": np.ones_like(result.table["rank"])})
    axes = retrieval_gallery(found, IMAGES, POLICY, "feature", num_rows=2, num_worst=0).axes
    frames = [to_hex(column.spines["top"].get_edgecolor()) for column in axes]
    assert frames[3::6] == [GREEN.lower()] * 2
    ranks = np.concatenate([found.table[f"{name}_action_rank"][[0, 2], 0] for name in ("zero", "shuffled")])
    assert [frame == GREEN.lower() for frame in frames[4::6] + frames[5::6]] == (ranks <= 1).tolist()
