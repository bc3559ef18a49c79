import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from skimage import data
from torch import nn

from iwm_ray.config import ViewsConfig
from iwm_ray.evaluation.banks import bank_views
from iwm_ray.pictures.slider import NUM_DISTRACTORS, NUM_STEPS, agreement, measure_slides, slider_sheet
from iwm_ray.pictures.style import GREEN, ORANGE, RED
from iwm_ray.views.policy import ViewPolicy

SIZE = 32
POLICY = ViewPolicy.from_config(
    ViewsConfig(image_size=SIZE, brightness=0.8, contrast=0.8, saturation=0.4, hue=0.2, jitter_order="fixed")
)
IMAGES = np.stack([photo()[100 : 100 + SIZE, 100 : 100 + SIZE] for photo in (data.chelsea, data.coffee)])
NUM_SHOWN = 9


class Knowing(nn.Module):
    """A world model whose tokens are pixels and which does what the action says."""

    def __init__(self) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(1))

    def encoder(self, images):
        return images.float().flatten(2).transpose(1, 2)

    target_tokens = encoder

    def predictor(self, context, context_idx, target_idx, action):
        image = context[0].T.reshape(3, SIZE, SIZE).permute(1, 2, 0).numpy().astype(np.uint8)
        draws = POLICY.identity(len(action))
        draws["target_jitter"][:] = True
        for place, field in enumerate(POLICY.target_jitter.fields):
            draws[f"target_{field.name}"] = (field.identity + field.scale * action[:, place].numpy()).astype(
                "f4"
            )
        return self.encoder(torch.from_numpy(bank_views(POLICY, image, draws)).permute(0, 3, 1, 2))


class Ignoring(Knowing):
    """It imagines the clean image whatever the action."""

    def predictor(self, context, context_idx, target_idx, action):
        return context


@pytest.fixture(scope="module")
def known():
    return measure_slides(Knowing(), IMAGES, POLICY, seed=0, batch_size=50)


@pytest.fixture(scope="module")
def ignored():
    return measure_slides(Ignoring(), IMAGES, POLICY, seed=0, batch_size=50)


def test_a_model_that_knows_the_action_follows_it(known):
    assert [slide.field.name for slide in known] == ["brightness", "contrast", "saturation", "hue"]
    for slide in known:
        assert slide.asked[0] == pytest.approx(-slide.field.scale) and slide.asked[-1] == pytest.approx(
            slide.field.scale
        )
        assert slide.agreements.min() > 0.99
        assert slide.errors.max() < 1e-4
        assert slide.null_errors[:, [0, -1]].min() > slide.errors.max()


def test_a_model_that_ignores_the_action_gives_a_flat_curve(ignored):
    for slide in ignored:
        assert (slide.nearest == slide.nearest[:, :1]).all()
        assert (slide.agreements == 0).all()
        assert np.array_equal(slide.errors, slide.null_errors)


def test_the_bank_is_the_sweep_and_distractors(known):
    for slide in known:
        assert len(slide.draws["target_hue"]) == NUM_STEPS + NUM_DISTRACTORS
        others = [field for field in POLICY.target_jitter.fields if field.name != slide.field.name]
        for field in others:
            values = slide.draws[f"target_{field.name}"]
            assert (values[:NUM_STEPS] == np.float32(field.identity)).all()
            assert len(np.unique(values[NUM_STEPS:])) == NUM_DISTRACTORS
        assert slide.asked[NUM_STEPS // 2] == 0  # the clean image is among the positions


def test_what_is_found_is_the_value_of_the_nearest_view(ignored):
    for slide in ignored:
        values = slide.draws[f"target_{slide.field.name}"].astype(float) - slide.field.identity
        assert np.array_equal(slide.found, values[slide.nearest])


def test_a_row_for_each_component_and_nothing_overlaps(known, legible):
    figure = slider_sheet(known, IMAGES, POLICY, shown=1)
    assert len(figure.axes) == len(known) * (2 * NUM_SHOWN + 1)
    texts = legible(figure)
    assert {"brightness", "contrast", "saturation", "hue"} <= set(texts)
    assert texts.count("true views") == texts.count("imagined") == 4
    assert sum(text.startswith("agreement 1.00") for text in texts) == 4
    assert "−0.80" in texts and "+0.20" in texts and "asked (turns)" in texts


def test_the_views_shown_are_the_true_and_the_retrieved_ones(known):
    axes = slider_sheet(known[:1], IMAGES, POLICY).axes
    shown = [np.asarray(column.images[0].get_array()) for column in axes if column.images]
    bank = bank_views(POLICY, IMAGES[0], known[0].draws)
    expected = np.stack([(bank[place], bank[known[0].nearest[0, place]]) for place in range(0, NUM_STEPS, 4)])
    assert np.array_equal(np.stack(shown), expected.reshape(-1, SIZE, SIZE, 3))


def test_the_sheet_of_a_model_that_ignores_the_action_shows_it(known, ignored):
    def frames(slides):
        axes = [column for column in slider_sheet(slides, IMAGES, POLICY).axes if column.images]
        return [to_hex(column.spines["top"].get_edgecolor()) for column in axes[1::2]]

    assert set(frames(known)) == {GREEN.lower()}
    found = frames(ignored)
    assert set(found) <= {color.lower() for color in (GREEN, ORANGE, RED)}
    assert found.count(RED.lower()) >= len(found) / 2


def test_components_without_strength_are_left_out():
    policy = ViewPolicy.from_config(ViewsConfig(image_size=SIZE, saturation=0, hue=0, contrast=0))
    slides = measure_slides(Ignoring(), IMAGES[:1], policy, seed=0)
    assert [slide.field.name for slide in slides] == ["brightness"]
    assert len(slider_sheet(slides, IMAGES[:1], policy).axes) == 2 * NUM_SHOWN + 1


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=3, max_size=20, unique=True),
    st.floats(0.1, 0.9),
    st.floats(-0.5, 0.5),
)
def test_agreement_falls_with_a_wrong_slope_or_a_shift(values, slope, shift):
    asked = np.array(values)
    assert agreement(asked, asked) == pytest.approx(1)
    assert agreement(asked, -asked + 2 * asked.mean()) == pytest.approx(-1)
    assert agreement(asked, np.full_like(asked, shift)) == pytest.approx(0, abs=1e-9)
    assert 0 < agreement(asked, asked.mean() + slope * (asked - asked.mean())) < 1
    assert agreement(asked, asked + 0.5 + shift / 2) < 1
