from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn.parameter import Parameter

from iwm_ray.batch import Batch
from iwm_ray.config import Config, EncoderConfig, PredictorConfig, ViewsConfig
from iwm_ray.model.iwm import build_model

STILL = {f"{name}_probability": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")}


def tiny_config(seed=0, **predictor):
    return Config(
        recipe="test",
        seed=seed,
        views=ViewsConfig(image_size=16, **STILL),
        encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=4, width=32, depth=2, num_heads=2),
        predictor=PredictorConfig(depth=2, width=24, num_heads=2, **predictor),
    )


def tiny_mae(**predictor):
    return tiny_config(target="pixels", conditioning="none", **predictor)


def tiny_batch(num_samples=4):
    generator = torch.Generator().manual_seed(3)
    source, target = torch.randint(
        0, 256, (2, num_samples, 3, 16, 16), dtype=torch.uint8, generator=generator
    )
    order = torch.stack([torch.randperm(16, generator=generator) for _ in range(num_samples)])
    return Batch(
        source=source,
        target=target,
        action=torch.randn(num_samples, 3, generator=generator),
        context_idx=order[:, :9].sort().values,
        target_idx=order[:, 9:].sort().values,
        weight=torch.ones(num_samples),
        counter=torch.arange(num_samples),
    )


def naive_loss(model, batch, distance):
    """Sample by sample and position by position; the target encoder sees every patch."""
    losses = []
    for i in range(len(batch)):
        targets = model.target_encoder(batch.target[i : i + 1])[0]
        context = model.encoder(batch.source[i : i + 1], batch.context_idx[i : i + 1])
        prediction = model.predictor(
            context, batch.context_idx[i : i + 1], batch.target_idx[i : i + 1], batch.action[i : i + 1]
        )[0]
        terms = []
        for j, position in enumerate(batch.target_idx[i]):
            target = targets[position]
            if model.config.normalize_targets:
                target = (target - target.mean()) / (target.var(unbiased=False) + 1e-5).sqrt()
            terms.append(distance(prediction[j] - target))
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def squared(difference):
    return (difference**2).mean()


def huber(difference):
    return torch.where(difference.abs() < 1, 0.5 * difference**2, difference.abs() - 0.5).mean()


@pytest.mark.parametrize("normalize_targets", [True, False])
@pytest.mark.parametrize(("loss", "distance"), [("squared_l2", squared), ("smooth_l1", huber)])
def test_loss_is_the_naive_one(loss, distance, normalize_targets):
    model = build_model(tiny_config(loss=loss, normalize_targets=normalize_targets), action_dim=3)
    batch = tiny_batch()
    output = model(batch)
    expected = naive_loss(model, batch, distance)
    torch.testing.assert_close(output.sample_loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected.mean(), atol=1e-5, rtol=1e-5)


def naive_pixels(images, patch, position):
    """One patch's pixels, channel by channel and row by row, normalised by ImageNet's statistics, then by its own."""
    row, column = divmod(position, images.shape[2] // patch)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    values = []
    for channel in range(3):
        for y in range(patch):
            for x in range(patch):
                pixel = images[channel, row * patch + y, column * patch + x].item()
                values.append((pixel / 255 - mean[channel]) / std[channel])
    middle = sum(values) / len(values)
    variance = sum((value - middle) ** 2 for value in values) / len(values)
    return torch.tensor([(value - middle) / (variance + 1e-5) ** 0.5 for value in values])


@pytest.mark.parametrize(("loss", "distance"), [("squared_l2", squared), ("smooth_l1", huber)])
def test_the_loss_of_pixels_is_the_naive_one(loss, distance):
    model, batch = build_model(tiny_mae(loss=loss), action_dim=7), tiny_batch()
    losses = []
    for i in range(len(batch)):
        context = model.encoder(batch.source[i : i + 1], batch.context_idx[i : i + 1])
        prediction = model.predictor(
            context, batch.context_idx[i : i + 1], batch.target_idx[i : i + 1], batch.action[i : i + 1]
        )[0]
        assert prediction.shape == (7, 3 * 4 * 4)
        terms = [
            distance(prediction[j] - naive_pixels(batch.target[i], 4, int(position)))
            for j, position in enumerate(batch.target_idx[i])
        ]
        losses.append(torch.stack(terms).mean())
    torch.testing.assert_close(model(batch).sample_loss, torch.stack(losses), atol=1e-5, rtol=1e-5)


def test_pixels_are_those_that_the_encoder_embeds():
    """The targets, folded back, are the image: no patch is turned, moved or of another channel order."""
    model, batch = build_model(tiny_mae(normalize_targets=False), action_dim=7), tiny_batch()
    grid = torch.arange(16).expand(4, -1)
    patches = model.targets(batch.target, grid).mT
    images = F.fold(patches, output_size=16, kernel_size=4, stride=4)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    torch.testing.assert_close((images * std + mean) * 255, batch.target.float(), atol=1e-3, rtol=0)


def test_pixels_of_other_patches_do_not_reach_the_loss():
    """Neither what is hidden reaches the prediction, nor what is seen the target."""
    model, batch = build_model(tiny_mae(), action_dim=7), tiny_batch()
    before = model(batch)
    rows, columns = (batch.target_idx // 4)[:, 0], (batch.target_idx % 4)[:, 0]
    hidden, seen = batch.source.clone(), batch.target.clone()
    for i in range(4):
        hidden[i, :, 4 * rows[i] : 4 * rows[i] + 4, 4 * columns[i] : 4 * columns[i] + 4] = 0
        row, column = divmod(int(batch.context_idx[i, 0]), 4)
        seen[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0
    after = model(replace(batch, source=hidden, target=seen))
    assert torch.equal(before.sample_loss, after.sample_loss)


def test_a_decoder_teaches_encoder_and_predictor_and_the_average_follows():
    model, batch = build_model(tiny_mae(), action_dim=7), tiny_batch()
    model(batch).loss.backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == parameter.requires_grad, name
        assert not (name.startswith("target_encoder") and reached)
    torch.nn.init.normal_(model.encoder.vit.norm.weight)
    before = model.target_encoder.vit.norm.weight.clone()
    model.update_target(0.5)
    torch.testing.assert_close(
        model.target_encoder.vit.norm.weight, 0.5 * (before + model.encoder.vit.norm.weight)
    )
    assert model.target_tokens(batch.target).shape == (4, 16, 32)  # what is measured stays the encoder's


def test_quarantined_samples_count_as_zero_and_teach_nothing():
    model, batch = build_model(tiny_config(), action_dim=3), tiny_batch()
    batch.weight[1] = 0
    output = model(batch)
    torch.testing.assert_close(output.loss, output.sample_loss[[0, 2, 3]].sum() / 4)
    batch.source[1] = 0
    batch.target[1] = 0
    torch.testing.assert_close(model(batch).loss, output.loss, atol=0, rtol=0)


def test_only_encoder_and_predictor_learn():
    model = build_model(tiny_config(), action_dim=3)
    model(tiny_batch()).loss.backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("target_encoder") or "pos" in name.split(".")[-1] for name in learned)


def test_target_encoder_moves_in_update_target_only():
    model, batch = build_model(tiny_config(), action_dim=3), tiny_batch()
    before = {name: tensor.clone() for name, tensor in model.target_encoder.state_dict().items()}
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter += parameter.requires_grad * 0.5
    model.train()
    model(batch).loss.backward()
    model.eval()
    model.predict(batch.source, batch.action, encoder="target")
    model.target_tokens(batch.target)
    assert all(
        torch.equal(before[name], tensor) for name, tensor in model.target_encoder.state_dict().items()
    )
    model.update_target(0.75)
    for name, parameter in model.target_encoder.named_parameters():
        online = model.encoder.get_parameter(name)
        torch.testing.assert_close(parameter, 0.75 * before[name] + 0.25 * online)
        assert not parameter.requires_grad


def test_momentum_on_the_device_is_the_same_number():
    models = [build_model(tiny_config(), action_dim=3) for _ in range(2)]
    for model, momentum in zip(models, (0.996, torch.tensor(0.996, dtype=torch.float64)), strict=True):
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter *= 1 + 0.1 * parameter.requires_grad
        model.update_target(momentum)
    for one, other in zip(*(model.target_encoder.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_momentum_one_keeps_every_bit():
    model = build_model(tiny_config(), action_dim=3)
    before = [parameter.clone() for parameter in model.target_encoder.parameters()]
    torch.nn.init.normal_(model.encoder.vit.blocks[0].attn.qkv.weight)
    model.update_target(torch.ones((), dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(before, model.target_encoder.parameters(), strict=True))


def test_target_tokens_are_layer_normed_and_without_gradient():
    model, batch = build_model(tiny_config(), action_dim=3), tiny_batch()
    tokens = model.target_tokens(batch.target)
    assert tokens.shape == (4, 16, 32)
    assert not tokens.requires_grad
    torch.testing.assert_close(tokens, F.layer_norm(model.target_encoder(batch.target), (32,)))


def test_predict_gives_the_full_grid():
    model, batch = build_model(tiny_config(), action_dim=3), tiny_batch()
    grid = torch.arange(16).expand(4, -1)
    full = model.predict(batch.source, batch.action)
    torch.testing.assert_close(full, model.predictor(model.encoder(batch.source), grid, grid, batch.action))
    part = model.predict(batch.source, batch.action, idx=batch.context_idx)
    assert part.shape == full.shape == (4, 16, 32)
    torch.nn.init.zeros_(model.target_encoder.vit.norm.weight)
    assert not torch.equal(model.predict(batch.source, batch.action, encoder="target"), full)


def test_weights_depend_on_the_seed_only_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    first = build_model(tiny_config(), action_dim=3).state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    torch.manual_seed(6)
    second = build_model(tiny_config(), action_dim=3).state_dict()
    other = build_model(tiny_config(seed=1), action_dim=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["predictor.mask_token"], other["predictor.mask_token"])


@pytest.mark.parametrize(
    ("name", "depth", "width", "encoder_millions", "predictor_millions"),
    [("vit_base_patch16_224", 12, 384, 85.8, 21.9), ("vit_base_patch16_224", 18, 384, 85.8, 32.5),
     ("vit_large_patch16_224", 36, 512, 303.3, 114.6)],
)  # fmt: skip
def test_sizes_of_the_paper(name, depth, width, encoder_millions, predictor_millions):
    config = Config(
        recipe="test",
        encoder=EncoderConfig(name=name),
        predictor=PredictorConfig(depth=depth, width=width, conditioning="none"),
    )
    with torch.device("meta"):
        model = build_model(config, action_dim=7)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert millions(model.encoder.parameters()) == pytest.approx(encoder_millions, abs=0.1)
    assert millions(model.predictor.parameters()) == pytest.approx(predictor_millions, abs=0.15)


def millions(parameters: list[Parameter]) -> float:
    return sum(parameter.numel() for parameter in parameters) / 1e6
