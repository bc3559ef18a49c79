import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import iwm_ray
from iwm_ray.errors import RunError, UsageError
from iwm_ray.finetuning import adapter
from iwm_ray.finetuning.model import Asking, weights_hash
from iwm_ray.views.resize import clean_view

NAMES = tuple("abcdefghij")


def images(count=3):
    return torch.randint(
        0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture
def save(tuned_network, trained, model, config, tmp_path):
    """Saves a network whose weights are not those of any start; returns it with its folder."""

    def make(name="adapter", tune="predictor", start="pretrained", tasks=("photos",), head="attentive"):
        changed = config.model_copy(update={"head": head})
        tuned = tuned_network(changed, tune, start, dict.fromkeys(tasks, 10))
        before = weights_hash(tuned.encoder)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        folder = tmp_path / name
        adapter.save(folder, tuned, trained, changed, dict.fromkeys(tasks, NAMES), before)
        return tuned.eval(), folder

    return make


@pytest.mark.parametrize(
    ("tune", "start", "head"),
    [
        ("predictor", "pretrained", "attentive"),
        ("encoder", "none", "linear"),
        ("both", "pretrained", "linear"),
    ],
)
def test_the_round_trip_gives_the_same_probabilities(save, trained, tune, start, head):
    tuned, folder = save(tune=tune, start=start, head=head)
    classifier = iwm_ray.load(folder)
    query = Asking(trained.policy, 16).query(3, 0, 0, torch.device("cpu"))
    with torch.no_grad():
        expected = tuned(images(), "photos", query).softmax(1)
    assert torch.equal(classifier.predict(images()), expected)
    assert classifier.class_names == NAMES


def test_what_is_drawn_is_the_same_for_every_image_whatever_its_neighbours(save, trained):
    _, folder = save()
    classifier = iwm_ray.load(folder)
    classifier = replace(classifier, asking=replace(classifier.asking, is_random=True, fraction=0.5))
    together = classifier.predict(images())
    alone = torch.cat([classifier.predict(image[None]) for image in images()])
    torch.testing.assert_close(together, alone)
    plain = iwm_ray.load(folder).predict(images())
    assert (together - plain).abs().max() > 1e-4  # it is asked for something else


def test_the_frozen_encoder_is_not_stored_again(save, trained):
    tuned, folder = save()
    size = (folder / "adapter.safetensors").stat().st_size
    assert size < 4 * tuned.num_trained + 4 * tuned.predictor.positions.numel() + 20_000


def test_many_adapters_share_one_encoder(save, model):
    encoder = deepcopy(model.target_encoder)
    networks = [adapter.attach(save(name)[1], encoder) for name in ("one", "two")]
    assert all(network.encoder is encoder for network in networks)
    assert weights_hash(networks[0].heads) != weights_hash(networks[1].heads)


def test_an_adapter_that_tuned_the_encoder_leaves_the_shared_one_alone(save, model):
    encoder = deepcopy(model.target_encoder)
    network = adapter.attach(save(tune="both")[1], encoder)
    assert weights_hash(encoder) == weights_hash(model.target_encoder) != weights_hash(network.encoder)


def test_another_encoder_is_refused_with_both_hashes(save, model):
    _, folder = save()
    other = model.encoder  # the context encoder of the same run
    with pytest.raises(UsageError) as raised:
        adapter.attach(folder, other)
    line = str(raised.value)
    assert weights_hash(other) in line and weights_hash(model.target_encoder) in line and "\n" not in line


def test_tasks_have_to_be_named(save):
    _, folder = save(tasks=("photos", "digits"))
    with pytest.raises(
        UsageError, match=r"several tasks \(photos, digits\); give --task photos, in Python task=.photos"
    ):
        iwm_ray.load(folder)
    with pytest.raises(UsageError, match="task 'birds': .* has photos, digits; choose one"):
        iwm_ray.load(folder, task="birds")
    assert iwm_ray.load(folder, task="digits").task == "digits"


def test_what_is_no_image_is_refused(save):
    classifier = iwm_ray.load(save()[1])
    for wrong in (images().float(), images()[0], images()[:, :, :16], images().numpy()):
        with pytest.raises(UsageError, match=r"needs a torch tensor uint8 \[b 3 32 32\]"):
            classifier.predict(wrong)
    for nothing in (7, Image.new("RGB", (32, 32)), np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3))):
        with pytest.raises(UsageError, match=r"needs an image file or a NumPy array uint8 \[h w 3\]"):
            classifier.fit(nothing)
    with pytest.raises(UsageError, match=r"image none.jpg: No such file .*; give the path of an image file"):
        classifier.fit("none.jpg")
    with pytest.raises(UsageError, match="unknown data.*; give another image"):
        classifier.fit(__file__)


def test_any_image_is_made_to_fit(save, tmp_path):
    classifier = iwm_ray.load(save()[1])
    picture = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    fitted = classifier.fit(picture)
    assert fitted.shape == (3, 32, 32) and np.array_equal(fitted.permute(1, 2, 0), clean_view(picture, 32))
    upside_down = Image.Exif()
    upside_down[ExifTags.Base.Orientation] = 3
    file = tmp_path / "a.png"
    Image.fromarray(picture[::-1, ::-1].copy()).save(file, exif=upside_down)
    assert torch.equal(classifier.fit(file), fitted) and torch.equal(classifier.fit(str(file)), fitted)
    Image.fromarray(picture).convert("L").save(tmp_path / "grey.png")
    grey = classifier.fit(tmp_path / "grey.png")
    assert classifier.predict(torch.stack([fitted, grey])).shape == (2, 10)


def test_a_classifier_is_named_in_a_line(save):
    assert len(repr(iwm_ray.load(save()[1]))) < 300


def test_damage_is_named(save, tmp_path):
    with pytest.raises(UsageError, match=r"no adapter\.json"):
        iwm_ray.load(tmp_path)
    _, folder = save()
    facts = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(facts | {"format": 9}))
    with pytest.raises(UsageError, match="format 9"):
        iwm_ray.load(folder)
    for damaged in ("[", "[]", json.dumps(facts | {"head": "big"}), json.dumps({"format": 1})):
        (folder / "adapter.json").write_text(damaged)
        with pytest.raises(RunError, match=r"adapter\.json is damaged .*; finetune again$"):
            iwm_ray.load(folder)
    (folder / "adapter.json").write_text(json.dumps(facts))
    whole = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(whole[:-100])
    with pytest.raises(RunError, match="cannot be read"):
        iwm_ray.load(folder)
