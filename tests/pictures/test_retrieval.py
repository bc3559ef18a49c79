from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from skimage import data
from skimage.color import rgb2lab

from iwm_ray.config import Config, EncoderConfig, PredictorConfig, ViewsConfig
from iwm_ray.evaluation.banks import bank_views
from iwm_ray.evaluation.mrr import MrrResult, measure_mrr
from iwm_ray.model.iwm import build_model
from iwm_ray.pictures.retrieval import FRAMES, retrieval_gallery
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
    assert not any("MRR" in text for text in texts)  # of these few images alone
    shares = (result.metrics["mrr/h1"], result.metrics["mrr/h10"])
    assert any(all(f"{share:.1%}" in text for share in shares) for text in texts)
    assert any("conditioning: feature" in text for text in texts)
    assert sum("hue" in text for text in texts) == 5


@pytest.mark.parametrize(("num_rows", "num_worst"), [(1, 0), (2, 1)])
def test_the_number_of_rows_can_be_chosen(num_rows: int, num_worst: int, result: MrrResult, legible) -> None:
    figure = retrieval_gallery(result, IMAGES, POLICY, "sequence", num_rows, num_worst)
    assert len(figure.axes) == 6 * (num_rows + num_worst)
    legible(figure)


def test_no_case_is_shown_twice(result: MrrResult, legible) -> None:
    """Where the worst view of an image stands above already, the next one is taken."""
    ranks = np.tile(np.arange(result.table["rank"].shape[1], 0.0, -1.0), (3, 1))
    found = replace(result, table=result.table | {"rank": ranks})
    figure = retrieval_gallery(found, IMAGES, POLICY, "feature", num_rows=3, num_worst=3)
    rows = [figure.axes[row : row + 6] for row in range(0, len(figure.axes), 6)]
    cases = [(row[0].get_xlabel(), row[2].get_xlabel()) for row in rows]
    assert len(set(cases)) == len(cases) == 6
    assert [view for _, view in cases[3:]] == [f"view 2 of {NUM_VIEWS}"] * 3
    legible(figure)


# Machado, Oliveira and Fernandes (2009), full severity, of linear RGB.
VISIONS = {
    "usual": np.eye(3),
    "no red cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "no blue cones": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}


@pytest.mark.parametrize("vision", VISIONS)
def test_the_frames_are_told_apart(vision: str) -> None:
    def seen(color: str) -> np.ndarray:
        rgb = np.array(to_rgb(color))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        mixed = np.clip(np.array(VISIONS[vision]) @ linear, 0, 1)
        return rgb2lab(np.where(mixed <= 0.0031308, 12.92 * mixed, 1.055 * mixed ** (1 / 2.4) - 0.055))

    distances = [np.linalg.norm(seen(a) - seen(b)) for a, b in combinations(FRAMES, 2)]
    assert min(distances) > 40  # the palette's red and orange: 18 to 33


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
