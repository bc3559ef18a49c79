import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from iwm_ray.errors import UsageError
from iwm_ray.evaluation.encoders import LAST, RunEncoder, TimmEncoder
from iwm_ray.evaluation.features import measuring, target_features
from iwm_ray.trained import Trained


@pytest.fixture(scope="module")
def trained(clean_run):
    return Trained.open(clean_run)


def pictures(size, count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def tokens_of(encoder, layers=(LAST,), images=None):
    model = encoder.load()
    with measuring(model):
        return model.tokens(pictures(encoder.image_size) if images is None else images, layers)


# A run's encoders


def test_the_target_encoder_is_read_as_the_monitors_read_it(trained):
    [tokens] = tokens_of(RunEncoder(trained))
    model = trained.load()
    with measuring(model):
        expected = target_features(model, pictures(32), batch_size=3)
    torch.testing.assert_close(tokens.mean(1), expected, rtol=0, atol=0)


def test_the_predictor_reads_tokens_without_the_layer_norm(trained):
    [raw] = tokens_of(RunEncoder(trained, for_predictor=True))
    with torch.no_grad():
        torch.testing.assert_close(raw, trained.load().target_encoder(pictures(32)))
    assert RunEncoder(trained, for_predictor=True).hash != RunEncoder(trained).hash


def test_mirrored_tokens_are_those_of_mirrored_images(trained):
    [mirrored] = tokens_of(RunEncoder(trained, for_predictor=True, mirrored=True))
    with torch.no_grad():
        torch.testing.assert_close(mirrored, trained.load().target_encoder(pictures(32).flip(3)))
    assert RunEncoder(trained, mirrored=True).hash != RunEncoder(trained).hash


def test_the_three_encoders_of_a_run_have_their_own_weights(trained):
    target, context, untrained = (
        tokens_of(RunEncoder(trained, which))[0] for which in ("target", "context", "untrained")
    )
    loaded, start = trained.load(), trained.untrained()
    with measuring(loaded), measuring(start):
        width = (64,)
        torch.testing.assert_close(context, F.layer_norm(loaded.encoder(pictures(32)), width), rtol=0, atol=0)
        torch.testing.assert_close(untrained, start.target_tokens(pictures(32)), rtol=0, atol=0)
    assert not torch.allclose(target, context, atol=1e-3)
    assert not torch.allclose(target, untrained, atol=1e-3)


def test_earlier_blocks_are_their_outputs_normalised_as_targets_are(trained):
    first, last, second = tokens_of(RunEncoder(trained), (0, LAST, 1))
    vit = trained.load().target_encoder.vit
    with torch.no_grad():
        pixels = (pictures(32) / 255 - torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN)[:, None, None]) / (
            torch.tensor(timm.data.IMAGENET_DEFAULT_STD)[:, None, None]
        )
        embedded = vit.patch_embed(pixels) + vit.pos_embed
        block = vit.blocks[0](embedded)
        torch.testing.assert_close(first, F.layer_norm(block, (64,)), rtol=1e-4, atol=1e-4)
        block = vit.blocks[1](block)
        torch.testing.assert_close(second, F.layer_norm(block, (64,)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, F.layer_norm(vit.norm(block), (64,)), rtol=1e-4, atol=1e-4)


def test_hashes_and_names_tell_the_encoders_apart_and_survive_a_journey(trained, clean_run):
    encoders = [RunEncoder(trained, which) for which in ("target", "context", "untrained")]
    assert len({encoder.hash for encoder in encoders}) == 3
    assert len({encoder.name for encoder in encoders}) == 3
    assert pickle.loads(pickle.dumps(encoders)) == encoders
    step = min(int(path.name.removeprefix("step_")) for path in (clean_run / "checkpoints").glob("step_*"))
    earlier = Trained.open(clean_run, str(step))
    assert RunEncoder(earlier).hash != encoders[0].hash
    assert RunEncoder(earlier, "untrained").hash == encoders[2].hash  # it has no step


@pytest.mark.parametrize("layer", [2, -2])
def test_a_layer_that_is_not_there(trained, layer):
    with pytest.raises(UsageError, match=f"layers {layer}: the encoder has 0 to 1"):
        tokens_of(RunEncoder(trained), (layer,))


# Models of timm


@pytest.mark.parametrize(
    ("name", "size", "count", "width"),
    [
        ("vit_tiny_patch16_224", 64, 16, 192),  # with a class token, which is left out
        ("resnet10t", 64, 4, 512),
        ("swin_tiny_patch4_window7_224", 224, 49, 768),  # channels last
    ],
)
def test_any_kind_of_model_gives_tokens(name, size, count, width):
    encoder = TimmEncoder.open(name, image_size=size)
    [tokens] = tokens_of(encoder)
    assert tokens.shape == (3, count, width)
    assert torch.equal(tokens, tokens_of(encoder)[0])  # random weights are always the same ones


def test_the_tokens_of_a_convolutional_network_are_the_places_of_its_map():
    encoder = TimmEncoder.open("resnet10t", image_size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    last, first = tokens_of(encoder, (LAST, 0))
    model = encoder.load().model.eval()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    pixels = (pictures(64).permute(0, 2, 3, 1) / 255 - mean) / std
    with torch.no_grad():
        features = model.forward_features(pixels.permute(0, 3, 1, 2))
    for row in range(2):
        for column in range(2):
            torch.testing.assert_close(last[:, 2 * row + column], features[:, :, row, column])
    assert first.shape[1] == 32 * 32


def test_weights_from_a_file_are_the_ones_that_are_loaded(tmp_path):
    torch.manual_seed(5)
    model = timm.create_model("resnet10t").eval()  # with its classifier, which is passed over
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    encoder = TimmEncoder.open("resnet10t", tmp_path / "weights.safetensors", image_size=64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
    with torch.no_grad():
        expected = model.forward_features((pictures(64) / 255 - mean) / std)
    torch.testing.assert_close(tokens_of(encoder)[0], expected.flatten(2).transpose(1, 2))


def test_the_hash_is_that_of_weights_and_preprocessing(tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for seed, path in enumerate((first, second)):
        torch.manual_seed(seed)
        save_file(timm.create_model("resnet10t").state_dict(), path)
    plain = TimmEncoder.open("resnet10t", first)
    others = [
        TimmEncoder.open("resnet10t"),
        TimmEncoder.open("resnet10t", second),
        TimmEncoder.open("resnet10t", first, image_size=64),
        TimmEncoder.open("resnet10t", first, mean=(0.5, 0.5, 0.5)),
    ]
    assert len({encoder.hash for encoder in (plain, *others)}) == 5
    first.rename(tmp_path / "moved.safetensors")
    assert TimmEncoder.open("resnet10t", tmp_path / "moved.safetensors").hash == plain.hash


def test_what_is_not_there_or_does_not_fit_is_said_in_one_line(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, other)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"PK\x03\x04 a pickle")
    attempts = {
        "did you mean resnet10t": lambda: TimmEncoder.open("resnet10tt"),
        "can't read images of 8 pixels": lambda: TimmEncoder.open("vit_tiny_patch16_224", image_size=8),
        "nowhere.safetensors": lambda: TimmEncoder.open("resnet10t", tmp_path / "nowhere.safetensors"),
        "broken.safetensors": lambda: TimmEncoder.open("resnet10t", broken).load(),
        "names and shapes of timm's parameters": lambda: TimmEncoder.open("resnet10t", other).load(),
    }
    for words, attempt in attempts.items():
        with pytest.raises(UsageError) as raised:
            attempt()
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)
