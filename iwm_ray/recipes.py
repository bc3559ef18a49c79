"""Named runs. Each recipe is a function that returns a complete configuration; its docstring says where the figures come
from, the command, the cost and what to expect."""

from collections.abc import Callable
from typing import Any

from iwm_ray.config import (
    Config,
    DataConfig,
    EncoderConfig,
    MonitorConfig,
    OptimizerConfig,
    PredictorConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrackingConfig,
    ViewsConfig,
)


def photos_tiny() -> Config:
    """Smoke-level demonstration on ten real photographs; no download.

    Source: METHOD's small-scale prototype. Data: patches of 64 px, train left of each photograph, test right of it.
    Command: python -m iwm_ray.pretrain
    Cost: two to three minutes on 2 CPU cores.
    Expected: MRR 0.14 (chance 0.024), kNN 0.60 (untrained 0.57); see docs/log.md.
    """
    return Config(
        recipe="photos_tiny",
        data=DataConfig(path="photos_tiny", test_path="photos_tiny:test"),
        views=ViewsConfig(image_size=32, **_DOUBLED_JITTER),
        encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=8, width=128, depth=4, num_heads=4),
        predictor=PredictorConfig(depth=4, width=128, num_heads=4),
        optimizer=OptimizerConfig(global_batch_size=128, lr=1e-3, weight_decay_end=0.04),
        schedule=ScheduleConfig(steps=500, warmup_fraction=0.1, momentum_start=0.99),
        monitor=MonitorConfig(every_steps=100, num_images=256, num_bank_images=512, mrr_images=32),
    )


def cifar10_small() -> Config:
    """CIFAR-10 with a small encoder: the effect of conditioning in half an hour on a CPU.

    Source: METHOD section 7. Data: CIFAR-10 as Parquet, WebDataset or class folders.
    Command: python -m iwm_ray.pretrain cifar10_small --data.path train.parquet --data.test-path test.parquet
    Cost: 20 to 40 minutes on 2 CPU cores, minutes on a GPU (estimate).
    Expected: after 3000 steps MRR 0.38 with feature conditioning, 0.024 (chance) with none; see docs/log.md.
    """
    return Config(
        recipe="cifar10_small",
        views=ViewsConfig(image_size=32, **_DOUBLED_JITTER),
        encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=8, width=128, depth=4, num_heads=4),
        predictor=PredictorConfig(depth=4, width=128, num_heads=4),
        optimizer=OptimizerConfig(global_batch_size=128, lr=1e-3, weight_decay_end=0.04),
        schedule=ScheduleConfig(steps=4000, warmup_fraction=0.05, momentum_start=0.99),
    )


def imagenette_small() -> Config:
    """Imagenette at 96 px with ViT-Ti: from a long CPU run to a short one on a GPU.

    Source: own choice between cifar10_small and vits16_in1k.
    Command: python -m iwm_ray.pretrain imagenette_small --data.path train.parquet --data.test-path val.parquet
    Cost: about a day on 2 CPU cores (estimate), under half an hour on one GPU (estimate).
    Expected: not measured yet.
    """
    return Config(
        recipe="imagenette_small",
        views=ViewsConfig(image_size=96, **_DOUBLED_JITTER),
        encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=8),
        predictor=PredictorConfig(depth=8, width=192),
        optimizer=OptimizerConfig(global_batch_size=256, lr=1e-3, weight_decay_end=0.1),
        schedule=ScheduleConfig(epochs=200, warmup_fraction=0.05, momentum_start=0.99),
    )


def vits16_in1k() -> Config:
    """ViT-S/16 on ImageNet-1k: the smallest full-size run.

    Source: METHOD section 3 with ViT-S; predictor 12 x 384.
    Command: python -m iwm_ray.pretrain vits16_in1k --data.path s3://... --runtime.num-workers 4 --runtime.use-gpu true
    Cost: 44 GFLOP an image, 100 epochs: 1.6e18 FLOP a million images; about 2 H100-days at 35 % of peak (estimate).
    Expected: not measured yet.
    """
    return _imagenet("vits16_in1k", "vit_small_patch16_224", PredictorConfig(depth=12, width=384), epochs=100)


def vitb16_in1k_invariant() -> Config:
    """IWM-Inv of the paper: ViT-B/16, predictor 12 x 384 (IWM, tables of section 4).

    Command: python -m iwm_ray.pretrain vitb16_in1k_invariant --data.path s3://... --runtime.num-workers 16
        --runtime.use-gpu true
    Cost: 101.5 GFLOP an image, 3.9e19 FLOP for 300 epochs; about 32 H100-days at 14 % of peak, 13 at 35 % (estimate).
    Expected (paper): MRR 0.09, linear 74.5, attentive 77.0, predictor finetuning 81.3.
    """
    return _imagenet("vitb16_in1k_invariant", "vit_base_patch16_224", PredictorConfig(depth=12, width=384))


def vitb16_in1k_equivariant() -> Config:
    """IWM-Equi of the paper: ViT-B/16, predictor 18 x 384 (IWM, tables of section 4).

    Command: python -m iwm_ray.pretrain vitb16_in1k_equivariant --data.path s3://... --runtime.num-workers 16
        --runtime.use-gpu true
    Cost: 113 GFLOP an image, 4.3e19 FLOP for 300 epochs; about 15 H100-days at 35 % of peak (estimate).
    Expected (paper): MRR 0.79, linear 67.5, attentive 75.1, predictor finetuning 83.3.
    """
    return _imagenet("vitb16_in1k_equivariant", "vit_base_patch16_224", PredictorConfig(depth=18, width=384))


def vitl16_in1k_equivariant() -> Config:
    """IWM-Equi with ViT-L/16, predictor 36 x 512 (IWM, scaling section).

    Command: python -m iwm_ray.pretrain vitl16_in1k_equivariant --data.path s3://... --runtime.num-workers 32
        --runtime.use-gpu true
    Cost: about 430 GFLOP an image, 1.7e20 FLOP for 300 epochs; about 55 H100-days at 35 % of peak (estimate).
    Expected (paper): predictor finetuning 85.0, end-to-end 85.4.
    """
    return _imagenet("vitl16_in1k_equivariant", "vit_large_patch16_224", PredictorConfig(depth=36, width=512))


def ijepa_vitb16_in1k() -> Config:
    """I-JEPA as a recipe of the same code: no photometric action, no conditioning, smooth L1 (I-JEPA's code).

    Differs: one predictor pass over the union of the blocks, where I-JEPA predicts each block alone.
    Command: python -m iwm_ray.pretrain ijepa_vitb16_in1k --data.path s3://... --runtime.num-workers 16
        --runtime.use-gpu true
    Cost: as vitb16_in1k_invariant.
    Expected (paper's baseline): MRR 0.00, predictor finetuning 80.0.
    """
    predictor = PredictorConfig(depth=12, width=384, conditioning="none", loss="smooth_l1")
    views = ViewsConfig(
        where="device",
        jitter_probability=0,
        grayscale_probability=0,
        blur_probability=0,
        solarize_probability=0,
    )
    return _imagenet("ijepa_vitb16_in1k", "vit_base_patch16_224", predictor, views=views)


def _imagenet(
    recipe: str,
    encoder: str,
    predictor: PredictorConfig,
    *,
    epochs: int = 300,
    views: ViewsConfig | None = None,
) -> Config:
    return Config(
        recipe=recipe,
        views=views or ViewsConfig(where="device"),
        encoder=EncoderConfig(name=encoder),
        predictor=predictor,
        optimizer=OptimizerConfig(global_batch_size=2048),
        schedule=ScheduleConfig(epochs=epochs),
        tracking=TrackingConfig(action_log_fraction=0.01),  # whole, the log would be millions of files
        runtime=RuntimeConfig(num_workers=8, use_gpu=True, cpus_per_worker=2, data_cpus=16, compile=True),
    )


# Twice the paper's strengths: on 32-pixel images weaker jitter moves the features too little to be told apart.
_DOUBLED_JITTER: dict[str, Any] = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.4, "hue": 0.2}

RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        photos_tiny,
        cifar10_small,
        imagenette_small,
        vits16_in1k,
        vitb16_in1k_invariant,
        vitb16_in1k_equivariant,
        vitl16_in1k_equivariant,
        ijepa_vitb16_in1k,
    )
}
