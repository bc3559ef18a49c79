import copy

import numpy as np
import pytest
import torch

from iwm_ray.finetuning.model import Asking, assemble, draw_paths, parameter_groups, weights_hash

CPU = torch.device("cpu")


def asking(trained, **changes):
    return Asking(trained.policy, 16, **changes)


def images(count=4):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def test_the_control_differs_in_the_predictor_alone(tuned_network, config):
    ours, control = (tuned_network(config, start=start) for start in ("pretrained", "random"))
    assert weights_hash(ours.encoder) == weights_hash(control.encoder)
    assert weights_hash(ours.heads) == weights_hash(control.heads)
    assert weights_hash(ours.predictor) != weights_hash(control.predictor)
    assert ours.num_trained == control.num_trained


@pytest.fixture
def decoder(trained, model):
    """The trained model, as if its predictor had been a decoder of pixels."""
    pixels = copy.deepcopy(model)
    pixels.predictor.target = "pixels"
    pixels.predictor.unembed = torch.nn.Linear(64, 3 * 8 * 8)
    return pixels


@pytest.mark.parametrize("seed", [0, 1])
def test_a_decoder_of_pixels_gets_the_projection_of_its_control(trained, decoder, config, seed):
    ours, control = (
        assemble(trained, decoder, config, "predictor", start, {"photos": 10}, seed)
        for start in ("pretrained", "random")
    )
    assert weights_hash(ours.predictor.unembed) == weights_hash(control.predictor.unembed)
    assert weights_hash(ours.predictor.blocks) == weights_hash(decoder.predictor.blocks)
    assert weights_hash(ours.predictor.blocks) != weights_hash(control.predictor.blocks)
    assert ours.num_trained == control.num_trained
    assert ours(images(), "photos", asking(trained).query(4, 0, 0, CPU)).shape == (4, 10)
    assert decoder.predictor.unembed.out_features == 3 * 8 * 8  # the run's own is left alone


def test_what_replaces_the_projection_to_pixels_learns_at_the_full_rate(trained, decoder, config):
    tuned = assemble(trained, decoder, config, "predictor", "pretrained", {"photos": 10}, 0)
    names = {id(parameter): name for name, parameter in tuned.named_parameters()}
    scale = {
        names[id(parameter)]: group["scale"]
        for group in parameter_groups(tuned, config, "pretrained")
        for parameter in group["params"]
    }
    assert scale["predictor.unembed.weight"] == scale["predictor.unembed.bias"] == 1
    assert scale["predictor.embed.weight"] == scale["predictor.norm.weight"] == 0.1


def test_another_seed_is_another_head_and_another_control(tuned_network, config):
    one, two = (tuned_network(config, start="random", seed=seed) for seed in (0, 1))
    assert weights_hash(one.heads) != weights_hash(two.heads)
    assert weights_hash(one.predictor) != weights_hash(two.predictor)


def test_logits_are_the_head_on_the_predictions_of_the_null_action(tuned_network, config, trained, model):
    tuned = tuned_network(config).eval()
    with torch.no_grad():
        logits = tuned(images(), "photos", asking(trained).query(4, 0, 0, CPU))
        predictions = model.predict(images(), torch.zeros(4, trained.policy.action_dim), "target")
        torch.testing.assert_close(logits, tuned.head("photos")(predictions))
        torch.testing.assert_close(
            logits, tuned(tuned.encode(images()), "photos", asking(trained).query(4, 0, 0, CPU))
        )


def test_without_a_predictor_the_head_reads_the_encoder(tuned_network, config, trained, model):
    tuned = tuned_network(config, "encoder", "none").eval()
    with torch.no_grad():
        tokens = tuned.represent(images(), "photos", asking(trained).query(4, 0, 0, CPU))
        assert torch.equal(tokens, model.target_encoder(images()))


def test_the_context_encoder_can_be_chosen(tuned_network, config, model):
    student = tuned_network(config.model_copy(update={"encoder": "context"}))
    assert weights_hash(student.encoder) == weights_hash(model.encoder) != weights_hash(model.target_encoder)


@pytest.mark.parametrize(
    ("tune", "start", "parts"),
    [
        ("predictor", "pretrained", {"predictor", "heads"}),
        ("encoder", "none", {"encoder", "heads"}),
        ("both", "random", {"encoder", "predictor", "heads"}),
    ],
)
def test_what_is_trained(tuned_network, config, trained, tune, start, parts):
    tuned = tuned_network(config, tune, start)
    tuned(images(), "photos", asking(trained).query(4, 0, 0, CPU)).sum().backward()
    assert {name.split(".")[0] for name, p in tuned.named_parameters() if p.grad is not None} == parts
    in_groups = [p for group in parameter_groups(tuned, config, start) for p in group["params"]]
    assert len(in_groups) == len({id(p) for p in in_groups})
    assert sum(p.numel() for p in in_groups) == tuned.num_trained
    tuned.train()
    assert tuned.encoder.training == ("encoder" in parts)


def test_rates_follow_the_protocol(tuned_network, config):
    """Pretrained parts learn at a tenth, lower blocks at less, what is random at the full rate."""
    tuned = tuned_network(config, "both", "pretrained")
    names = {id(parameter): name for name, parameter in tuned.named_parameters()}
    scale = {
        names[id(parameter)]: group["scale"]
        for group in parameter_groups(tuned, config, "pretrained")
        for parameter in group["params"]
    }
    assert scale["heads.of_photos.query"] == 1
    assert scale["predictor.embed.weight"] == 0.1
    assert scale["encoder.vit.norm.weight"] == scale["encoder.vit.blocks.1.attn.qkv.weight"] == 0.1
    assert scale["encoder.vit.blocks.0.attn.qkv.weight"] == pytest.approx(0.1 * 0.75)
    assert scale["encoder.vit.patch_embed.proj.weight"] == pytest.approx(0.1 * 0.75**2)
    groups = parameter_groups(tuned_network(config, start="random"), config, "random")
    assert {group["scale"] for group in groups} == {1.0}
    assert {group["weight_decay"] for group in groups} == {0.0, config.weight_decay}


def test_task_tokens_tell_tasks_apart(tuned_network, config, trained):
    tuned = tuned_network(config, tasks={"a": 10, "b": 10}).eval()
    query = asking(trained).query(4, 0, 0, CPU)
    with torch.no_grad():
        one, two = (tuned.represent(images(), task, query) for task in ("a", "b"))
        assert not torch.allclose(one, two)
        tuned.task_tokens["of_b"].copy_(tuned.task_tokens["of_a"])
        assert torch.equal(one, tuned.represent(images(), "b", query))
    alone = tuned_network(config, tasks={"a": 10})
    assert not alone.task_tokens
    assert weights_hash(alone.head("a")) == weights_hash(tuned.head("a"))


@pytest.mark.parametrize("name", ["train", "keys", "type", "a-b_c"])
def test_a_task_may_have_any_name(tuned_network, config, trained, name):
    tuned = tuned_network(config, tasks={name: 3, "other": 2})
    assert tuned(images(), name, asking(trained).query(4, 0, 0, CPU)).shape == (4, 3)


def test_queries_are_null_and_whole_unless_asked_otherwise(trained):
    query = asking(trained).query(3, 0, 0, CPU)
    assert not query.action.any() and query.target_idx is None
    query = asking(trained, is_random=True, fraction=0.25).query(3, 0, 0, CPU)
    assert query.action.shape == (3, trained.policy.action_dim) and query.action.any()
    assert query.target_idx.shape == (3, 4)
    assert (query.target_idx.diff(dim=1) > 0).all()
    same, other = (asking(trained, is_random=True).query(3, 0, step, CPU).action for step in (0, 1))
    assert torch.equal(same, query.action) and not torch.equal(other, query.action)


def test_a_subset_of_positions_gives_as_many_tokens(tuned_network, config, trained):
    query = asking(trained, fraction=0.5).query(4, 0, 0, CPU)
    assert tuned_network(config).represent(images(), "photos", query).shape[1] == 8


def test_drop_path_is_random_in_training_only(tuned_network, config, trained):
    tuned = tuned_network(config.model_copy(update={"drop_path": 0.5}), "encoder", "none")
    query, many, places = asking(trained).query(16, 0, 0, CPU), images(16), np.arange(16)

    def run(step):
        draw_paths(tuned, 0, step, places, CPU)
        with torch.no_grad():
            return tuned(many, "photos", query)

    tuned.train()
    one, two = run(0), run(1)
    assert not torch.equal(one, two) and torch.equal(run(0), one)
    tuned.eval()
    assert torch.equal(run(0), run(1))


def test_draws_belong_to_places(tuned_network, config, trained):
    """Half a batch is asked and dropped as it is within the whole."""
    tuned = tuned_network(config.model_copy(update={"drop_path": 0.5}), "encoder", "none")
    asked, places = asking(trained, is_random=True, fraction=0.25), np.arange(8)
    whole, half = (asked.query(part, 3, 5, CPU) for part in (8, places[4:]))
    assert torch.equal(whole.action[4:], half.action) and torch.equal(whole.target_idx[4:], half.target_idx)
    last = tuned.encoder.vit.blocks[-1].drop_path2
    draw_paths(tuned, 0, 0, places, CPU)
    kept = last.kept
    draw_paths(tuned, 0, 0, places[4:], CPU)
    assert torch.equal(last.kept, kept[4:]) and set(kept.tolist()) <= {0.0, 2.0}
    draw_paths(tuned, 0, 0, np.arange(2000), CPU)
    assert float(last.kept.mean()) == pytest.approx(1, abs=0.1)


def test_a_hash_knows_names_shapes_and_values():
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    before = weights_hash(layer)
    same = torch.nn.Linear(4, 4)
    same.load_state_dict(layer.state_dict())
    assert weights_hash(same) == before
    with torch.no_grad():
        layer.weight[0, 0] = np.nextafter(layer.weight[0, 0].item(), 9, dtype=np.float32).item()
    assert weights_hash(layer) != before
