import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iwm_ray.batch import Batch
from iwm_ray.errors import RunError
from iwm_ray.training.loop import MAX_SKIPPED_IN_A_ROW, autocast, fit, train_step

GOLDEN = {  # losses of the first steps: a change of the method moves them, a refactoring must not
    "none": [0.9701586, 0.9548771, 0.9442857, 0.9324117, 0.9048765, 0.8959453],
    "sequence": [0.9701442, 0.9548934, 0.9443366, 0.9325129, 0.9050251, 0.8961838],
    "feature": [0.984589, 0.9615567, 0.9428385, 0.9231058, 0.8921194, 0.8721473],
    "adaln": [1.0131618, 1.0044538, 0.989453, 0.9759586, 0.9525136, 0.9376075],
}


@pytest.mark.parametrize("conditioning", GOLDEN)
def test_losses_are_the_golden_ones(toy, conditioning):
    losses = toy.train(toy.state(toy.config(conditioning)), until=6)
    assert losses == pytest.approx(GOLDEN[conditioning], rel=1e-5)


def test_the_same_seed_gives_the_same_bits(toy, same):
    one, other = toy.state(), toy.state()
    toy.train(one, until=5)
    torch.manual_seed(99)  # the step draws nothing
    toy.train(other, until=5)
    assert same(one, other)
    toy.train(other, until=6)
    assert not same(one, other)


def test_a_step_is_the_naive_one(toy):
    """Forward, backward, AdamW and the moving average, each written out."""
    state, batch = toy.state(), toy.batch(0)
    twin = toy.state().model
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    loss = twin(batch).loss
    loss.backward()
    decayed = [p.ndim > 1 for p in trained]  # `feature` has no bias of two dimensions
    groups = [{"params": [p for p, d in zip(trained, decayed, strict=True) if d == wanted], "weight_decay": decay}
              for wanted, decay in ((True, 0.04), (False, 0.0))]  # fmt: skip
    torch.optim.AdamW(groups, lr=0.2 * 2e-3, foreach=False).step()
    for target, source in zip(twin.target_encoder.parameters(), twin.encoder.parameters(), strict=True):
        target.data = 0.9 * target + 0.1 * source
    stats = train_step(state, batch, state.model)
    assert stats.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for (name, a), b in zip(state.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("conditioning", GOLDEN)
def test_it_learns_what_the_action_does(toy, conditioning):
    state = toy.state(toy.config(conditioning, batch_size=32))
    losses = toy.train(state, until=toy.total_steps, num_samples=32)
    batch = toy.batch(1000, 64)
    swapped = Batch(**{**vars(batch), "action": -batch.action})
    with torch.no_grad():
        right, wrong = state.model(batch).loss.item(), state.model(swapped).loss.item()
    assert right < 0.6 * losses[0]
    assert wrong == right if conditioning == "none" else wrong > 1.1 * right


def test_accumulation_gives_the_same_step(toy):
    whole, parts = toy.state(), toy.state(toy.config(runtime={"accumulation_steps": 4}))
    assert toy.train(whole, until=3) == pytest.approx(toy.train(parts, until=3), rel=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("poison", ["image", "action", "overflow"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(toy, same, poison):
    state, clean = toy.state(), toy.state()
    toy.train(state, until=2)
    toy.train(clean, until=2)
    batch = toy.batch(2)
    if poison == "image":
        batch = Batch(
            **{**vars(batch), "target": torch.full_like(batch.target, torch.nan, dtype=torch.float32)}
        )
    elif poison == "action":
        batch.action[3] = torch.inf
    else:  # the loss overflows although its gradient does not
        batch.weight[0] = 3e38
    stats = train_step(state, batch, state.model)
    assert stats.skipped.tolist() == [1, 1]
    assert stats.read()["skipped_steps"] == 1
    assert state.step == 3
    clean.step, clean.skipped = 3, state.skipped
    assert same(state, clean)
    train_step(state, toy.batch(3), state.model)
    assert state.skipped.tolist() == [1, 0]


def test_too_many_steps_in_a_row_end_the_run(toy):
    state = toy.state()
    with torch.no_grad():
        state.model.predictor.mask_token.fill_(torch.nan)
    with pytest.raises(
        RunError, match=f"last {MAX_SKIPPED_IN_A_ROW} steps up to step {MAX_SKIPPED_IN_A_ROW}"
    ):
        toy.train(state, until=50)
    assert state.step == MAX_SKIPPED_IN_A_ROW


def test_quarantined_samples_leave_no_trace(toy, same):
    one, other = toy.state(), toy.state()
    batch = toy.batch(0)
    batch.weight[2] = 0
    train_step(one, batch, one.model)
    batch.source[2], batch.target[2], batch.action[2] = 7, 200, -1.0
    train_step(other, batch, other.model)
    assert same(one, other)


def test_report_sees_every_step_and_can_stop(toy):
    state, seen = toy.state(), []

    def report(state, stats):
        seen.append((stats.step, state.step, stats.data_wait >= 0))
        return state.step == 3

    fit(state, toy.batches(), until=10, report=report)
    assert seen == [(1, 1, True), (2, 2, True), (3, 3, True)]
    with pytest.raises(RunError, match="data ended at step 4 of 10"):
        fit(state, iter([toy.batch(3)]), until=10, report=lambda *_: None)


def test_nothing_is_read_from_the_device_within_a_step(toy, monkeypatch):
    state = toy.state()

    def refuse(*_):
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    train_step(state, toy.batch(0), state.model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_the_same_losses_and_is_never_waited_for(toy, precision):
    state = toy.state(toy.config(runtime={"precision": precision}), device="cuda")
    losses = toy.train(state, until=3)
    assert losses == pytest.approx(toy.train(toy.state(), until=3), rel=1e-3 if precision == "fp32" else 2e-2)
    batch = toy.batch(3).to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(state, batch, state.model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bfloat16_is_close(toy):
    state = toy.state(toy.config(runtime={"precision": "bf16"}))
    assert not state.model.encoder.vit.blocks[0].attn.fused_attn  # slower on CPUs in bfloat16
    losses = toy.train(state, until=4)
    assert losses == pytest.approx(toy.train(toy.state(), until=4), rel=2e-2)
    assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())


@pytest.mark.parametrize(
    ("precision", "device", "enabled"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("fp32", "cuda", False), ("bf16", "cpu", True)],
)
def test_precision(toy, precision, device, enabled):
    runtime = toy.config(runtime={"precision": precision}).runtime
    if device == "cpu" or torch.cuda.is_available():
        assert autocast(runtime, torch.device(device))._enabled == enabled


def test_the_forward_pass_compiles_as_one_graph_and_gives_the_same_losses(toy):
    assert toy.state(toy.config(runtime={"compile": True})).model._compiled_call_impl is not None
    compiled = toy.state()
    compiled.model.compile(
        dynamic=False, fullgraph=True, backend="aot_eager"
    )  # the compiler proper takes a minute
    assert toy.train(compiled, until=3) == pytest.approx(toy.train(toy.state(), until=3), rel=1e-5)
    assert not any("_orig_mod" in name for name in compiled.model.state_dict())


def test_two_workers_are_one_with_the_joined_batch(toy, tmp_path):
    script = Path(__file__).with_name("two_workers.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    workers = [
        subprocess.Popen([sys.executable, script, tmp_path, str(rank)], env=environment) for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    alone = toy.state()
    losses = toy.train(alone, until=4)
    for num_parts in (1, 2):
        one, other = (torch.load(tmp_path / f"{rank}-{num_parts}.pt", weights_only=True) for rank in range(2))
        means = [(a + b) / 2 for a, b in zip(one["losses"], other["losses"], strict=True)]
        assert means == pytest.approx(losses, rel=1e-5)
        for name, tensor in alone.model.state_dict().items():
            assert torch.equal(one["weights"][name], other["weights"][name])
            torch.testing.assert_close(one["weights"][name], tensor, atol=2e-5, rtol=1e-4)
        # A loss that overflows on one worker only is left out by both.
        assert one["unchanged"] is other["unchanged"] is True
        assert one["skipped"] == other["skipped"] == [1, 1, 1, 0]
