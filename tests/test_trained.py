import shutil

import pytest
import torch

from iwm_ray.errors import UsageError
from iwm_ray.trained import Trained


def test_the_newest_checkpoint_is_the_last_step(clean_run):
    trained = Trained.open(clean_run)
    assert trained.step == trained.config.schedule.steps
    assert Trained.open(trained.path) == trained
    assert Trained.open(clean_run, str(trained.step)) == trained


def test_trained_weights_differ_from_untrained_ones(clean_run):
    trained = Trained.open(clean_run)
    pairs = zip(trained.load().parameters(), trained.untrained().parameters(), strict=True)
    assert not all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_the_best_checkpoint_is_one_of_the_kept(clean_run):
    assert Trained.open(clean_run, "best").path.parent == clean_run / "checkpoints"


@pytest.mark.parametrize(
    ("which", "said"), [("7", "kept are the steps"), ("last", "newest, best, or the step")]
)
def test_a_checkpoint_that_is_not_there(clean_run, which, said):
    with pytest.raises(UsageError, match=said):
        Trained.open(clean_run, which)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        Trained.open(tmp_path)


def test_a_run_without_checkpoints(clean_run, tmp_path):
    shutil.copy(clean_run / "config.json", tmp_path)
    with pytest.raises(UsageError, match="no checkpoint there yet"):
        Trained.open(tmp_path)
