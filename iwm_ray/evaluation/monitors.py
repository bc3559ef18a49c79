"""What is watched while a run trains: the same inputs at every reading, so that only the model changes."""

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

from iwm_ray import randomness
from iwm_ray.batch import Batch
from iwm_ray.evaluation.features import measuring, model_device, target_features
from iwm_ray.evaluation.knn import knn_classes
from iwm_ray.evaluation.rank import feature_std, rankme
from iwm_ray.model.encoder import take
from iwm_ray.model.iwm import IWM


class Monitor:
    """Reads how a model does from inputs that are chosen once.

    A reading costs a pass of the target encoder over query and bank images and over the batch's targets, one of the
    context encoder over its sources, two of the predictor; it waits for the device once, at its end.

    Args:
        batch: views, actions and masks for the loss; quarantined rows (weight 0) are dropped, two must be left.
        query_images: `[q 3 s s]` uint8 clean crops, for RankMe, spread and kNN.
        query_labels: `[q]` classes, -1 for none; without labels there is no kNN.
        bank_images: `[m 3 s s]` uint8 clean crops of other images, which the kNN searches.
        bank_labels: `[m]` classes, -1 for none.
        num_neighbors: k of the kNN.
        seed: of the order in which actions are shuffled.
        batch_size: images in one forward pass.
    """

    def __init__(
        self,
        batch: Batch,
        query_images: Tensor,
        query_labels: Tensor | None = None,
        bank_images: Tensor | None = None,
        bank_labels: Tensor | None = None,
        num_neighbors: int = 20,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        self._batch = _rows(batch, batch.weight > 0)
        self._shuffled = self._batch.action[_derangement(seed, len(self._batch)).to(batch.action.device)]
        self._query_images = query_images
        self._knn = None
        if query_labels is not None and bank_images is not None and bank_labels is not None:
            if bool((query_labels >= 0).any()) and bool((bank_labels >= 0).any()):
                self._knn = _Knn(query_labels.long(), bank_images, bank_labels.long(), num_neighbors)
        self._batch_size = batch_size

    def read(self, model: IWM) -> dict[str, float]:
        """Measures the model as it stands and leaves it so; runs where it is, under the caller's autocast.

        Returns:
            `monitor/loss` of the batch; `monitor/action_gap`, the loss with the actions of other rows minus that
            loss (0: actions are ignored); `monitor/cosine` of prediction and target tokens, -1..1;
            `monitor/rankme`, 1..width; `monitor/target_std`, the standard deviation over the images of the mean
            target tokens, averaged over the channels (0: all images alike); with labels `monitor/knn_top1` and
            `monitor/knn_chance`, 0..1 (see KnnResult).
        """
        with measuring(model):
            readings = self._read_predictions(model)
            features = target_features(model, self._query_images, self._batch_size)
            readings |= {"rankme": rankme(features), "target_std": feature_std(features).mean()}
            if self._knn is not None:
                readings |= self._knn.read(model, features, self._batch_size)
            values = torch.stack([value.double() for value in readings.values()]).tolist()
        return {f"monitor/{name}": value for name, value in zip(readings, values, strict=True)}

    def _read_predictions(self, model: IWM) -> dict[str, Tensor]:
        losses, shuffled_losses, cosines = [], [], []
        for part, shuffled in self._parts(model_device(model)):
            target = take(model.target_tokens(part.target), part.target_idx).float()
            context = model.encoder(part.source, part.context_idx)
            for action, sink in ((part.action, losses), (shuffled, shuffled_losses)):
                prediction = model.predictor(context, part.context_idx, part.target_idx, action).float()
                sink.append(_sample_loss(prediction, target, model))
                if action is part.action:
                    cosines.append(F.cosine_similarity(prediction, target, dim=2).mean(1))
        loss = torch.cat(losses).mean()
        gap = torch.cat(shuffled_losses).mean() - loss
        return {"loss": loss, "action_gap": gap, "cosine": torch.cat(cosines).mean()}
