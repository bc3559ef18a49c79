"""Named runs. Each recipe is a function that returns a complete configuration; its docstring says where the figures come
from, the command, the cost and what to expect."""

from collections.abc import Callable
from typing import Any

from iwm_ray.config import (
    Config,
    DataConfig,
    EncoderConfig,
    MasksConfig,
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
    Cost: 49 GFLOP an image, 6.3e18 FLOP for 100 epochs; about 0.2 H100-days at 35 % of peak (estimate).
    Expected: not measured yet.
    """
    predictor, schedule = PredictorConfig(depth=12, width=384), ScheduleConfig(epochs=100)
    return _imagenet("vits16_in1k", "vit_small_patch16_224", predictor, schedule=schedule)


def vitb16_in1k_invariant() -> Config:
    """IWM-Inv of the paper: ViT-B/16, predictor 12 x 384 (IWM, tables of section 4).

    Command: python -m iwm_ray.pretrain vitb16_in1k_invariant --data.path s3://... --runtime.num-workers 16
        --runtime.use-gpu true
    Cost: 115 GFLOP an image, 4.4e19 FLOP for 300 epochs; about 3.7 H100-days at 14 % of peak, 1.5 at 35 % (estimate).
    Expected (paper): MRR 0.09, linear 74.5, attentive 77.0, predictor finetuning 81.3.
    """
    return _imagenet("vitb16_in1k_invariant", "vit_base_patch16_224", PredictorConfig(depth=12, width=384))


def vitb16_in1k_equivariant() -> Config:
    """IWM-Equi of the paper: ViT-B/16, predictor 18 x 384 (IWM, tables of section 4).

    Command: python -m iwm_ray.pretrain vitb16_in1k_equivariant --data.path s3://... --runtime.num-workers 16
        --runtime.use-gpu true
    Cost: 129 GFLOP an image, 4.9e19 FLOP for 300 epochs; about 1.7 H100-days at 35 % of peak (estimate).
    Expected (paper): MRR 0.79, linear 67.5, attentive 75.1, predictor finetuning 83.3.
    """
    return _imagenet("vitb16_in1k_equivariant", "vit_base_patch16_224", PredictorConfig(depth=18, width=384))


def vitl16_in1k_equivariant() -> Config:
    """IWM-Equi with ViT-L/16, predictor 36 x 512 (IWM, scaling section).

    Command: python -m iwm_ray.pretrain vitl16_in1k_equivariant --data.path s3://... --runtime.num-workers 32
        --runtime.use-gpu true
    Cost: 452 GFLOP an image, 1.7e20 FLOP for 300 epochs; about 6 H100-days at 35 % of peak (estimate).
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
    views = ViewsConfig(where="device", **_NO_ACTION)
    return _imagenet("ijepa_vitb16_in1k", "vit_base_patch16_224", predictor, views=views)


def ijepa_cifar10_small() -> Config:
    """I-JEPA with the sizes of cifar10_small: the baseline beside it.

    Source: ijepa_vitb16_in1k's method, cifar10_small's sizes and lengths.
    Command: python -m iwm_ray.pretrain ijepa_cifar10_small --data.path train.parquet --data.test-path test.parquet
    Cost: as cifar10_small.
    Expected: MRR at chance (0.024); benchmarks/baselines.py, figures in docs/log.md.
    """
    predictor = {"conditioning": "none", "loss": "smooth_l1"}
    return _cifar10_baseline("ijepa_cifar10_small", predictor, MasksConfig(), ViewsConfig())


def mae_vitb16_in1k() -> Config:
    """MAE as a recipe of the same code (He et al. 2021, arXiv 2111.06377, section 3 and table 8): pixels of three
    quarters of the patches, chosen at random; decoder 8 x 512.

    Differs: no class token, positions of the encoder as in I-JEPA, initialisation of the predictor as in I-JEPA; the
    moving average of the encoder, which MAE does not have, is what is measured and finetuned.
    Command: python -m iwm_ray.pretrain mae_vitb16_in1k --data.path s3://... --runtime.num-workers 16
        --runtime.use-gpu true
    Cost: 56 GFLOP an image, 5.8e19 FLOP for 800 epochs; about 2 H100-days at 35 % of peak (estimate).
    Expected (He et al., 1600 epochs): encoder finetuning 83.6, linear 68.0; predictor finetuning 0.1 to 0.3 above a
        random decoder's (IWM).
    """
    return _imagenet(
        "mae_vitb16_in1k",
        "vit_base_patch16_224",
        PredictorConfig(depth=8, width=512, num_heads=16, conditioning="none", target="pixels"),
        views=ViewsConfig(where="device", crop_scale=(0.2, 1.0), **_NO_ACTION),
        masks=MasksConfig(style="random"),
        optimizer=OptimizerConfig(
            global_batch_size=4096, lr=2.4e-3, betas=(0.9, 0.95), weight_decay=0.05, weight_decay_end=0.05
        ),
        schedule=ScheduleConfig(epochs=800, warmup_fraction=40 / 800, lr_start_factor=0, lr_end=0, stretch=1),
    )


def mae_cifar10_small() -> Config:
    """MAE with the sizes of cifar10_small: the baseline beside it.

    Source: mae_vitb16_in1k's method, cifar10_small's sizes and lengths; 12 of 16 patches are predicted.
    Command: python -m iwm_ray.pretrain mae_cifar10_small --data.path train.parquet --data.test-path test.parquet
    Cost: less than cifar10_small: no target encoder runs, and the encoder sees 4 patches.
    Expected: no MRR (it has no action); benchmarks/baselines.py, figures in docs/log.md.
    """
    predictor = {"conditioning": "none", "target": "pixels"}
    views = ViewsConfig(crop_scale=(0.2, 1.0))
    return _cifar10_baseline("mae_cifar10_small", predictor, MasksConfig(style="random"), views)


def _cifar10_baseline(
    recipe: str, predictor: dict[str, Any], masks: MasksConfig, views: ViewsConfig
) -> Config:
    """cifar10_small without a photometric action."""
    base = cifar10_small()
    return base.model_copy(
        update={
            "recipe": recipe,
            "views": views.model_copy(update={"image_size": base.views.image_size, **_NO_ACTION}),
            "masks": masks,
            "predictor": base.predictor.model_copy(update=predictor),
        }
    )


def _imagenet(
    recipe: str,
    encoder: str,
    predictor: PredictorConfig,
    *,
    views: ViewsConfig | None = None,
    masks: MasksConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    schedule: ScheduleConfig | None = None,
) -> Config:
    return Config(
        recipe=recipe,
        views=views or ViewsConfig(where="device"),
        masks=masks or MasksConfig(),
        encoder=EncoderConfig(name=encoder),
        predictor=predictor,
        optimizer=optimizer or OptimizerConfig(global_batch_size=2048),
        schedule=schedule or ScheduleConfig(epochs=300),
        tracking=TrackingConfig(action_log_fraction=0.01),  # whole, the log would be millions of files
        runtime=RuntimeConfig(num_workers=8, use_gpu=True, cpus_per_worker=2, data_cpus=16, compile=True),
    )


# Twice the paper's strengths: on 32-pixel images weaker jitter moves the features too little to be told apart.
_DOUBLED_JITTER: dict[str, Any] = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.4, "hue": 0.2}

_NO_ACTION: dict[str, Any] = {
    f"{name}_probability": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")
}

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
        ijepa_cifar10_small,
        mae_vitb16_in1k,
        mae_cifar10_small,
    )
}
