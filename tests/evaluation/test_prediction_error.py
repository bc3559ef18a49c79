from dataclasses import replace

import numpy as np
import pytest
import torch

from iwm_ray.config import Config, EncoderConfig, PredictorConfig, ViewsConfig
from iwm_ray.evaluation.prediction_error import error_rows, make_questions, prediction_errors
from iwm_ray.model.iwm import IWM, build_model
from iwm_ray.views.policy import ViewPolicy

SIZE = 16
VIEWS = ViewsConfig(image_size=SIZE)
POLICY = ViewPolicy.from_config(VIEWS)
IMAGES = np.random.default_rng(0).integers(20, 200, (4, SIZE, SIZE, 3), np.uint8)
NUMBERS = np.arange(4)


def _model(conditioning: str = "feature") -> IWM:
    config = Config(
        recipe="test",
        views=VIEWS,
        encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=8, width=16, depth=1, num_heads=2),
        predictor=PredictorConfig(depth=1, width=16, num_heads=2, conditioning=conditioning),
    )
    return build_model(config, POLICY.action_dim)


def test_one_component_at_a_time_over_its_whole_range() -> None:
    questions = make_questions(POLICY, num_strengths=5)
    names = ["brightness"] * 5 + ["contrast"] * 5 + ["saturation"] * 5 + ["hue"] * 5
    assert list(questions.components) == [*names, "grayscale", "blur", "blur", "solarize"]
    assert questions.strengths[:5] == pytest.approx([0.6, 0.8, 1, 1.2, 1.4])
    assert questions.strengths[15:20] == pytest.approx([-0.1, -0.05, 0, 0.05, 0.1])
    assert questions.strengths[20:] == pytest.approx([1, *VIEWS.blur_radius, VIEWS.solarize_threshold])
    actions = POLICY.encode(questions.draws)
    assert actions[:5, 0] == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert (np.count_nonzero(actions, axis=1) <= 1).all()
    assert actions[20:, 4:].sum(0).tolist() == [1, 2, 1]
    still = ViewPolicy.from_config(replace_views(hue=0, blur_probability=0))
    assert not {"hue", "blur"} & set(make_questions(still).components)


def replace_views(**changes: float) -> ViewsConfig:
    return ViewsConfig(**(VIEWS.model_dump() | changes))


@pytest.mark.parametrize("source_base", ["crop", "target"])
def test_errors_agree_with_a_slow_twin(source_base: str) -> None:
    model, policy = _model(), replace(POLICY, source_base=source_base)
    questions = make_questions(policy, num_strengths=3)
    table = prediction_errors(model, policy, IMAGES, NUMBERS, questions, batch_size=4)
    actions = POLICY.encode(questions.draws)
    with torch.no_grad():
        for number, image in enumerate(IMAGES):
            for row, action in enumerate(actions):
                source, target = (
                    torch.tensor(view).permute(2, 0, 1)[None]
                    for view in POLICY.views(image, questions.draws, row)
                )
                tokens, told = model.target_tokens(target), torch.tensor(action)[None]
                expected = {
                    "error": model.predict(source, told),
                    "null_error": model.predict(source, 0 * told),
                    "distance": model.target_tokens(source),
                }
                for name, other in expected.items():
                    error = float((other - tokens).square().mean())
                    assert table[name][number, row] == pytest.approx(error, rel=1e-4, abs=1e-9), name


def test_an_images_row_does_not_depend_on_the_others() -> None:
    model, questions = _model(), make_questions(POLICY, num_strengths=3)
    whole = prediction_errors(model, POLICY, IMAGES, NUMBERS, questions)
    parts = [prediction_errors(model, POLICY, IMAGES[p], NUMBERS[p], questions) for p in ([0], [1, 2, 3])]
    for name in whole:
        assert np.array_equal(whole[name], np.concatenate([part[name] for part in parts])), name


def test_rows_are_means_ratios_and_intervals() -> None:
    questions = make_questions(POLICY, num_strengths=3)
    generator = np.random.default_rng(0)
    shape = (50, len(questions.strengths))
    table = {"number": np.arange(50)}
    table |= {name: generator.uniform(1, 2, shape) for name in ("error", "null_error", "distance")}
    table["distance"][:, 1] = 0  # brightness 1: nothing changes
    rows = error_rows(table, questions, seed=0)
    assert {len(column) for column in rows.values()} == {shape[1]}
    assert rows["component"][4] == "contrast"
    error = table["error"][:, 4].mean()
    assert rows["error"][4] == pytest.approx(error)
    assert rows["relative_to_null"][4] == pytest.approx(error / table["null_error"][:, 4].mean())
    assert np.isnan(rows["relative_to_distance"]).nonzero()[0].tolist() == [1]
    for name in ("error", "relative_to_null"):
        assert (rows[f"{name}_low"] < rows[name]).all()
        assert (rows[name] < rows[f"{name}_high"]).all()


def test_without_conditioning_the_action_does_not_help() -> None:
    questions = make_questions(POLICY, num_strengths=3)
    table = prediction_errors(_model("none"), POLICY, IMAGES, NUMBERS, questions)
    assert (error_rows(table, questions, seed=0)["relative_to_null"] == 1).all()
