"""Arms as trainings: which there are, and that an attempt which died loses nothing."""

import numpy as np
import pytest
import torch

from iwm_ray.errors import UsageError
from iwm_ray.finetuning.experiment import Experiment
from iwm_ray.finetuning.tuning import ArmTraining, work
from iwm_ray.loader import to_tensors
from iwm_ray.run_directory import RunDirectory
from iwm_ray.training import checkpoint, metrics_log
from iwm_ray.workers import Worker, resume_step, train_here

WORKER = Worker(0, 1, torch.device("cpu"))
TIMED = {"images_per_second"}


class Killed(BaseException):
    pass


@pytest.fixture
def open_arm(trained, config, tmp_path):
    """`open_arm(folder, **changes)`: the first arm of an experiment of seven steps, a checkpoint every second."""

    def make(name, num_workers=1, **changes):
        runtime = {"checkpoint_every_steps": 2, "num_workers": num_workers, "threads_per_worker": 1}
        runtime = config.runtime.model_copy(update=runtime | changes.pop("runtime", {}))
        data = changes.pop("data", {})
        changes = {"steps": 7, "seeds": (0,), "runtime": runtime} | changes
        changes["data"] = config.data.model_copy(update=data)
        experiment = Experiment.open(trained, config.model_copy(update=changes), tmp_path / name)
        experiment.folder.mkdir(exist_ok=True)
        finals = [arm for arm in experiment.planned() if not arm.is_choice]
        training = ArmTraining(experiment, finals[0])
        training.run.path.mkdir(parents=True, exist_ok=True)
        return training

    return make


def spoiled(training, spoil):
    """The columns of a training on images, with something done before some step."""

    def open_columns(start):
        size = training.batch_size
        for step in range(start, training.total_steps):
            spoil(step)
            yield to_tensors(training.feed.rows(np.arange(step * size, step * size + size)))

    return open_columns


def result(training):
    found = training.tuning.finished(training.arm)
    return {name: value for name, value in vars(found).items() if name not in TIMED}


def adapter(training):
    return (training.tuning.adapter(training.arm) / "adapter.safetensors").read_bytes()


def losses(training):
    return [(row["step"], row["train/loss"]) for row in metrics_log.read(training.run.metrics)]


STRONG = {
    "tune": ("both",),
    "drop_path": 0.5,
    "label_smoothing": 0.1,
}


@pytest.mark.parametrize("step", [0, 1, 4, 6])
def test_a_worker_that_dies_at_any_step_loses_nothing(open_arm, config, step):
    """Bit for bit, with all that is drawn at random."""
    strong = STRONG | {"augment": config.augment.model_copy(update={"crop_area": 0.5, "mixup": 0.8})}
    clean, hurt = open_arm("clean", **strong), open_arm("hurt", **strong)
    assert train_here(clean, work).status == "finished"

    def die(at):
        if at == step:
            raise Killed

    with pytest.raises(Killed):
        work(hurt, WORKER, spoiled(hurt, die))
    assert resume_step(hurt.run.checkpoints) == step // 2 * 2
    torch.manual_seed(99)
    assert train_here(hurt, work).status == "finished"
    assert adapter(hurt) == adapter(clean)
    assert result(hurt) == result(clean) and losses(hurt) == losses(clean)
    assert not hurt.run.checkpoints.exists()


def test_a_request_saves_and_stops(open_arm):
    clean, stopped = open_arm("clean"), open_arm("stopped")
    train_here(clean, work)
    RunDirectory(stopped.tuning.folder).stop_request.touch()
    outcome = train_here(stopped, work)
    assert (outcome.status, outcome.step) == ("stopped", 1)
    RunDirectory(stopped.tuning.folder).stop_request.unlink()
    assert train_here(stopped, work).status == "finished"
    assert adapter(stopped) == adapter(clean) and result(stopped) == result(clean)


def test_a_frozen_encoder_is_in_no_checkpoint(open_arm, trained):
    training = open_arm("out")
    RunDirectory(training.tuning.folder).stop_request.touch()
    train_here(training, work)
    found = checkpoint.newest_valid(training.run.checkpoints)
    state = training.tuning.assemble(training.arm).own_state()
    assert not any(name.startswith("encoder.") for name in state)
    size = (found.path / "model.safetensors").stat().st_size
    assert size < 4 * sum(tensor.numel() for tensor in state.values()) + 20_000


def test_a_checkpoint_of_another_arm_is_refused(open_arm):
    training = open_arm("out")
    RunDirectory(training.tuning.folder).stop_request.touch()
    train_here(training, work)
    other = ArmTraining(training.tuning, training.tuning.finals()[1])
    training.run.path.rename(other.run.path)
    outcome = train_here(other, work)
    assert outcome.status == "failed" and "another configuration: arm" in outcome.message


def test_a_predictor_is_never_tuned_without_its_control_and_each_arm_has_its_own_file(open_arm):
    tuning = open_arm("out", tune=("predictor", "both"), lr_grid=(1e-3, 1e-2), seeds=(3, 4)).tuning
    candidates, planned = tuning.candidates(), tuning.planned()
    assert len(candidates) == 4 * 2 and {arm.seed for arm in candidates} == {0}
    assert len(planned) == len({arm.name for arm in planned}) == 4 * 2 + 4 * 2
    assert tuning.batch_size == 16 and open_arm("b", batch_size=64, lr_grid=(1e-3, 1e-2)).batch_size == 36


def test_a_grid_of_one_is_no_choice(open_arm):
    tuning = open_arm("out", lr_grid=(0.5,)).tuning
    assert tuning.candidates() == [] and {arm.lr for arm in tuning.finals()} == {0.5}
    assert {arm.lr for arm in open_arm("other", lr=0.25).tuning.finals()} == {0.25}


def test_workers_share_the_batch(open_arm):
    assert open_arm("out", num_workers=4).batch_size == 16
    with pytest.raises(UsageError, match="--batch-size 16: is not divisible by runtime.num_workers 3"):
        open_arm("out", num_workers=3)


def test_moments_that_wait_for_their_task_change_nothing(tuned_network, config):
    """A head whose turn comes later has the moments of a step that has not been."""
    from torch.optim import AdamW

    from iwm_ray.finetuning.fit import ArmRecord, TuneState
    from iwm_ray.finetuning.model import parameter_groups, weights_hash

    hashes = []
    for eager in (True, False):
        tuned = tuned_network(config, tasks={"a": 3, "b": 4})
        optimizer = AdamW(parameter_groups(tuned, config, "pretrained"), betas=(0.9, 0.999), fused=True)
        if eager:
            record = ArmRecord(tuning="", arm="")
            optimizer = TuneState.start(tuned, config, "pretrained", 1.0, record, 1).optimizer
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for name, parameter in tuned.named_parameters():
                turn = "of_a" in name or "of_b" not in name
                if parameter.requires_grad and (turn or step == 2):
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        hashes.append(weights_hash(tuned))
    assert hashes[0] == hashes[1]
