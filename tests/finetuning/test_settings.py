import pytest
from pydantic import ValidationError

from iwm_ray.errors import UsageError
from iwm_ray.finetuning.settings import AugmentConfig, FinetuneConfig
from iwm_ray.segmentation.settings import SegmentConfig


def test_the_hash_knows_what_decides_an_arm_and_nothing_else():
    base = FinetuneConfig()
    same = [{"seeds": [7]}, {"tune": ["both"]}, {"runtime": {"use_gpu": True}}, {"data": {"path": ["x"]}}]
    same += [{"tracking": {"uri": "none"}}, {"data": {"max_bad_fraction": 0.5}}]
    other = [{"head": "linear"}, {"epochs": 3}, {"data": {"num_train": 5}}, {"augment": {"mixup": 0.8}}]
    assert {FinetuneConfig.model_validate(tree).hash("w") for tree in same} == {base.hash("w")}
    hashes = [FinetuneConfig.model_validate(tree).hash("w") for tree in other]
    assert len({*hashes, base.hash("w"), base.hash("other weights")}) == len(other) + 2


@pytest.mark.parametrize(
    ("augment", "keeps"),
    [({}, True), ({"flip_probability": 0.5}, True), ({"randaugment": 9}, False), ({"cutmix": 1.0}, False)],
)
def test_which_augmentation_lets_tokens_be_cached(augment, keeps):
    assert AugmentConfig(**augment).keeps_tokens == keeps


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds 1 1"),
        ({"tune": ["head"]}, "predictor"),
        ({"data": {"path": ["a", "b"], "weights": [1]}}, "data.weights: 1 given for 2"),
        ({"data": {"path": ["a=s3://user:word@bucket/x"]}}, "path: holds credentials"),
        ({"target_fraction": 0}, "greater than 0"),
        ({"lr_grid": [0]}, "greater than 0"),
    ],
)
def test_bad_settings(tree, said):
    with pytest.raises(ValidationError, match=said):
        FinetuneConfig.model_validate(tree)


@pytest.mark.parametrize(
    ("kind", "tree", "said"),
    [
        (FinetuneConfig, {"tune": ["encoder"], "action": "random"}, "--action random: changes nothing with --tune encoder"),
        (FinetuneConfig, {"tune": ["encoder"], "target_fraction": 0.5}, "--target-fraction 0.5: .* tune predictor or both"),
        (FinetuneConfig, {"drop_path": 0.1}, "--drop-path 0.1: changes nothing with --tune predictor"),
        (FinetuneConfig, {"layer_decay": 0.5}, "--layer-decay 0.5: .* tune encoder or both"),
        (SegmentConfig, {"layer_decay": 0.5}, "--layer-decay 0.5: .* tune encoder or both"),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_refused(kind, tree, said):
    config = kind.model_validate(tree)  # that can still be read
    with pytest.raises(UsageError, match=said):
        config.refuse_unused()
    for tune in (["both"], ["predictor", "encoder"]):
        config.model_copy(update={"tune": tuple(tune)}).refuse_unused()
    kind().refuse_unused()
