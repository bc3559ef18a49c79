"""What a sweep costs before it starts: training, measuring and finetuning of every trial that is left."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from iwm_ray.build import Setup, build
from iwm_ray.config import Config
from iwm_ray.evaluation import probes
from iwm_ray.evaluation.settings import PROBES, MeasureConfig
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.model.heads import AttentiveHead
from iwm_ray.model.iwm import IWM, build_model
from iwm_ray.plan_report import gemm_rate, step_flops
from iwm_ray.progress import duration, scanning
from iwm_ray.sweeping.record import SweepDirectory
from iwm_ray.sweeping.space import Sweep, Trial
from iwm_ray.wording import counted

PARTS = {"train": "training", "evaluate": "measuring", "finetune": "finetuning"}
"""part of a trial, as `trial.json` names its seconds -> word"""
Work = dict[str, float]
"""part -> FLOPs"""

_SHARES = (0.8, 0.25)  # of the rate of large matrix products: measured 0.3 at 32 px, 0.8 at 224 px
_GPU = 1e15
_UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("FLOP", 1))
_CONTROLS = 3  # banks, their controls and the way back: predictions of each target
_PAIRS = 8  # views of an image by which the action is read, and of which predictions are judged
_DRAWN = 16  # actions over which `marginal` takes the mean


@dataclass(frozen=True)
class Cost:
    """What is left of a sweep, and how fast it will go."""

    left: Work
    steps: int
    """of one trial's training"""
    done: int
    """trials whose times are known"""
    rates: Mapping[str, float]
    """part -> FLOP/s of the trials that are done"""

    @property
    def work(self) -> str:
        """The arithmetic of everything that is left, in words: the same wherever it is done."""
        total = sum(self.left.values())
        name, unit = next((name, unit) for name, unit in _UNITS if total >= unit or unit == 1)
        parts = ", ".join(f"{work / unit:,.1f} {PARTS[part]}" for part, work in self.left.items() if work)
        return f"{total / unit:,.1f} {name} ({parts}), matrix products alone"

    def line(self, config: Config, at_once: int, elsewhere: bool = False) -> str:
        """The time of everything that is left, in words, and the figures behind them.

        Args:
            config: of a trial.
            at_once: trials beside each other.
            elsewhere: not on this machine; so at a GPU's pace.
        """
        if config.runtime.use_gpu or elsewhere:
            hours = {part: work / _GPU / 3600 for part, work in self.left.items()}
            words = ", ".join(f"{value:,.1f} {PARTS[part]}" for part, value in hours.items() if value)
            return f"{sum(hours.values()):,.1f} GPU-hours at 1000 TFLOP/s ({words}); expect 20 to 50 % of a GPU's peak"
        if all(part in self.rates for part, work in self.left.items() if work):
            seconds = {part: work / self.rates[part] / at_once for part, work in self.left.items() if work}
            words = ", ".join(f"{duration(value)} {PARTS[part]}" for part, value in seconds.items())
            return f"{duration(sum(seconds.values()))} ({words}) at the pace of {counted(self.done, 'finished trial')}"
        rate = gemm_rate()
        low, high = (sum(self.left.values()) / (rate * share * at_once) for share in _SHARES)
        total = sum(self.left.values())
        words = ", ".join(
            f"{100 * work / total:.0f} % {PARTS[part]}" for part, work in self.left.items() if work
        )
        return (
            f"{duration(low)} to {duration(high)} ({words}): matrix products make {rate / 1e9:.0f} GFLOP/s here now, and "
            f"small models reach {100 * _SHARES[1]:.0f} to {100 * _SHARES[0]:.0f} % of that; reading images on top"
        )


def cost(sweep: Sweep, left: Sequence[Trial], done: Sequence[Trial], directory: SweepDirectory) -> Cost:
    """Counts the arithmetic of trials on the meta device; reads the times of those that are done.

    Args:
        sweep: what is measured of each.
        left: trials to run.
        done: trials of the sweep that are finished.
        directory: where they are.
    """
    known: dict[str, tuple[Work, int]] = {}

    def work(trial: Trial) -> tuple[Work, int]:
        shape = trial.config.model_copy(update={"seed": 0}).hash()
        if shape not in known:
            setup = build(trial.config, directory.run(trial.hash), scanning(trial.config.data.path))
            known[shape] = trial_work(setup, sweep), setup.total_steps
        return known[shape]

    timed = [(trial, found) for trial in done if (found := directory.seconds(trial.hash))]
    rates = {}
    for part in PARTS:
        spent = sum(found.get(part, 0.0) for _, found in timed)
        if spent:
            rates[part] = sum(work(trial)[0][part] for trial, _ in timed) / spent
    steps = work((list(left) or list(done))[0])[1]
    trained = {trial.hash for trial in left if directory.training(trial.hash) == "finished"}
    total = {
        part: sum(work(trial)[0][part] for trial in left if part != "train" or trial.hash not in trained)
        for part in PARTS
    }
    return Cost(total, steps, len(timed), rates)


def trial_work(setup: Setup, sweep: Sweep) -> Work:
    """The arithmetic of one trial: matrix products of models and heads, forward and backward.

    Linear probes, nearest neighbours, ranks and what reads images are left out: they are small beside it.
    """
    config = setup.config
    with torch.device("meta"):
        model = build_model(config, setup.policy.action_dim)
    forward = _Forward.of(model, config, setup.policy.action_dim)
    return {
        "train": float(step_flops(setup, model) * setup.total_steps),
        "evaluate": _measuring(sweep.measure, forward, len(setup.feed.index), len(setup.test_index or ())),
        "finetune": _finetuning(sweep.finetune, forward, len(setup.feed.index), len(setup.test_index or ()))
        if sweep.finetune
        else 0.0,
    }


@dataclass(frozen=True)
class _Forward:
    """FLOPs of one image's forward pass over the whole grid."""

    encoder: int
    predictor: int
    head: int
    """attentive"""

    @classmethod
    def of(cls, model: IWM, config: Config, action_dim: int) -> "_Forward":
        side, width = config.views.image_size, model.encoder.width
        with torch.device("meta"):
            image = torch.empty(1, 3, side, side)
            tokens = torch.empty(1, config.grid[0] * config.grid[1], width)
            grid = torch.empty(1, tokens.shape[1], dtype=torch.int64)
            action, head = torch.empty(1, action_dim), AttentiveHead(width, 10, 1)
        return cls(
            _count(lambda: model.encoder(image)),
            _count(lambda: model.predictor(tokens, grid, grid, action)),
            _count(lambda: head(tokens)),
        )


def _count(call: Callable[[], Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _measuring(asked: MeasureConfig, forward: _Forward, num_train: int, num_test: int) -> float:
    """Of every task that is asked for; encoders beside the run's own cost about as much again each."""
    banks = 1 + 4 * asked.components
    bank = asked.views * forward.encoder + asked.targets * forward.predictor * (1 + _CONTROLS * asked.inverse)
    work = 0.0
    if "mrr" in asked.tasks:
        work += asked.images * banks * bank
    for task in ("action_r2", "error"):
        if task in asked.tasks:
            work += asked.images * _PAIRS * (forward.encoder + forward.predictor)
    train, test = asked.train_images or num_train, asked.test_images or num_test
    if set(asked.tasks) & {*PROBES, "rank"}:
        work += (train + test) * forward.encoder
    if "marginal" in asked.tasks:
        work += (train + test) * _DRAWN * forward.predictor
    if "attentive" in asked.tasks:
        grid = probes.ATTENTIVE
        work += 3 * grid.num_steps(train) * grid.batch_size * (len(grid.settings) + 1) * forward.head
    return work * (1 + asked.untrained + len(asked.encoders))


def _finetuning(asked: FinetuneConfig, forward: _Forward, num_train: int, num_test: int) -> float:
    """Of every arm: the pretrained predictor and its control, or the encoder."""
    train, test = asked.data.num_train or num_train, asked.data.num_test or num_test
    images = asked.steps * asked.batch_size or asked.epochs * train
    work = 0.0
    for tune in asked.tune:
        arms = (1 if tune == "encoder" else 2) * len(asked.seeds)
        predictor = 0 if tune == "encoder" else forward.predictor
        trained = predictor + forward.head + (0 if tune == "predictor" else forward.encoder)
        work += arms * (3 * images * trained + test * (forward.encoder + predictor + forward.head))
        work += train * forward.encoder  # a frozen encoder's tokens are kept
    return work
