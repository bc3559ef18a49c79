import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from iwm_ray.config import EncoderConfig
from iwm_ray.errors import UsageError
from iwm_ray.model.encoder import Encoder, fuse_attention, sincos_positions, take

TINY = EncoderConfig(name="vit_tiny_patch16_224", patch_size=4, width=32, depth=2, num_heads=2)


def tiny_encoder(**changes):
    torch.manual_seed(0)
    return Encoder(TINY.model_copy(update=changes), image_size=16)


def photos(num_images=3, size=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num_images, 3, size, size), dtype=torch.uint8, generator=generator)


def normalized(images):
    mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images / 255 - mean) / std


def test_gathering_patches_before_the_embedding_is_the_convolution():
    encoder, images = tiny_encoder(), photos()
    idx = torch.tensor([[0, 5, 15], [1, 2, 3], [4, 8, 12]])
    convolved = F.conv2d(
        normalized(images), encoder.vit.patch_embed.proj.weight, encoder.vit.patch_embed.proj.bias, 4
    )
    expected = take(convolved.flatten(2).transpose(1, 2) + encoder.vit.pos_embed, idx)
    encoder.vit.blocks, encoder.vit.norm = torch.nn.Identity(), torch.nn.Identity()
    torch.testing.assert_close(encoder(images, idx), expected, atol=1e-5, rtol=1e-5)


def test_all_patches_are_timm_forward_features_and_the_weights_load_there():
    encoder, images = tiny_encoder(), photos()
    model = timm.create_model(
        TINY.name, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2,
        class_token=False, global_pool="avg", fc_norm=False, num_classes=0,
    )  # fmt: skip
    model.load_state_dict(encoder.vit.state_dict())
    torch.testing.assert_close(
        encoder(images), model.forward_features(normalized(images)), atol=1e-5, rtol=1e-5
    )


def test_every_position_in_order_is_the_same_as_none():
    encoder, images = tiny_encoder(), photos()
    torch.testing.assert_close(encoder(images, torch.arange(16).expand(3, -1)), encoder(images))


def test_dropped_patches_do_not_enter():
    encoder, images = tiny_encoder(), photos()
    idx = torch.tensor([[0, 1, 4, 5]] * 3)  # the upper left 8 x 8 pixels
    changed = images.clone()
    changed[:, :, 8:] = 0
    changed[:, :, :, 8:] = 0
    assert torch.equal(encoder(images, idx), encoder(changed, idx))


def test_floats_from_0_to_1_mean_the_same_as_bytes():
    encoder, images = tiny_encoder(), photos()
    torch.testing.assert_close(encoder(images / 255), encoder(images), atol=1e-5, rtol=1e-5)


def test_positions_are_fixed_and_told_apart():
    encoder = tiny_encoder()
    assert not encoder.vit.pos_embed.requires_grad
    positions = sincos_positions((5, 7), 32)
    assert positions.shape == (35, 32)
    assert torch.pdist(positions).min() > 0.1
    # Neighbours in a row share the row's half, neighbours in a column the column's.
    assert torch.equal(positions[0, :16], positions[1, :16])
    assert torch.equal(positions[0, 16:], positions[7, 16:])
    angle = torch.tensor(2.0) * 10_000 ** -(3 / 8)
    torch.testing.assert_close(positions[2, 16 + 3], angle.sin())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.data())
def test_take_is_a_loop_over_samples(num_samples, num_tokens, width, data):
    rows = st.lists(st.integers(0, num_tokens - 1), min_size=2, max_size=2)
    idx = torch.tensor(data.draw(st.lists(rows, min_size=num_samples, max_size=num_samples)))
    tokens = torch.randn(num_samples, num_tokens, width)
    assert torch.equal(
        take(tokens, idx), torch.stack([sample[i] for sample, i in zip(tokens, idx, strict=True)])
    )


def test_both_ways_of_attention_agree():
    encoder, images = tiny_encoder(), photos()
    fuse_attention(encoder, True)
    fused = encoder(images)
    fuse_attention(encoder, False)
    assert not encoder.vit.blocks[0].attn.fused_attn
    torch.testing.assert_close(encoder(images), fused, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_clip_224", "vit_little_patch16_reg4_gap_256", "deit3_small_patch16_224"]
)
def test_other_vision_transformers_of_timm(name):
    encoder = Encoder(EncoderConfig(name=name, patch_size=4, width=32, depth=1, num_heads=2), 16)
    images = photos()
    torch.testing.assert_close(
        encoder(images), encoder.vit.forward_features(normalized(images)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "vit_tiny_patch16_242"}, "did you mean vit_tiny_patch16_2"),
        ({"name": "resnet50"}, "no such Vision Transformer"),
        ({"name": "vit_tiny_r_s16_p8_224"}, "no such Vision Transformer"),
        ({"name": "deit_tiny_distilled_patch16_224"}, "deit_tiny_distilled_patch16_224 .*timm refuses it"),
        ({"width": 30}, "multiple of 4"),
        ({"num_heads": 3}, "encoder.num_heads 3 does not divide"),
        ({"width": 0, "num_heads": 5}, "encoder"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(changes, words):
    with pytest.raises(UsageError, match=words) as raised:
        tiny_encoder(**changes)
    assert "\n" not in str(raised.value)
