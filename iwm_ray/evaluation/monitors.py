"""What is watched while a run trains: the same inputs at every reading, so that only the model changes."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

from iwm_ray.batch import Batch
from iwm_ray.evaluation.features import measuring, model_device, target_features
from iwm_ray.evaluation.knn import best_constant, knn_classes
from iwm_ray.evaluation.rank import feature_std, lidar, rankme
from iwm_ray.evaluation.shuffle import derangement
from iwm_ray.model.iwm import IWM


class Monitor:
    """Reads how a model does from inputs that are chosen once.

    A reading costs a pass of the target encoder over query and bank images and over the batch's targets, one
    of the context encoder over its sources, two of the predictor; it waits for the device once, at its end.

    Args:
        batch: views, actions and masks for the loss; quarantined rows (weight 0) are dropped, two must be
            left.
        query_images: `[q 3 s s]` uint8 clean crops, for RankMe, spread and kNN.
        query_labels: `[q]` classes, -1 for none; without labels there is no kNN.
        bank_images: `[m 3 s s]` uint8 clean crops of other images, which the kNN searches.
        bank_labels: `[m]` classes, -1 for none.
        num_neighbors: k of the kNN.
        seed: of the order in which actions are shuffled.
        batch_size: images in one forward pass.
        lidar_views: `[k v 3 s s]` uint8 views of images, for LiDAR; without them there is none.
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
        lidar_views: Tensor | None = None,
    ) -> None:
        self._batch = _rows(batch, batch.weight > 0)
        others = torch.from_numpy(derangement(seed, 0, len(self._batch)))
        self._other_action = self._batch.action[others.to(batch.action.device)]
        self._query_images = query_images
        self._batch_size = batch_size
        self._lidar_views = lidar_views
        self._knn = None
        if query_labels is None or bank_images is None or bank_labels is None:
            return
        if bool((query_labels >= 0).any()) and bool((bank_labels >= 0).any()):
            self._knn = _Knn(query_labels, bank_images, bank_labels, num_neighbors)

    def read(self, model: IWM) -> dict[str, float]:
        """Measures the model as it stands and leaves it so; runs where it is, under the caller's autocast.

        Returns:
            `monitor/loss` of the batch; `monitor/action_gap`, the loss with the actions of other rows minus
            that loss (0: actions are ignored); `monitor/cosine` of prediction and target tokens, -1..1 (neither
            of a model that predicts pixels: it has no action, and its target is no token);
            `monitor/rankme`, 1..width; `monitor/lidar`, 1..min(k - 1, width); `monitor/target_std`, the
            standard deviation over the images of the mean target tokens, averaged over the channels (0: all
            images alike); with labels `monitor/knn_top1` and `monitor/knn_chance`, 0..1 (see KnnResult).
        """
        with measuring(model):
            readings = self._read_predictions(model)
            features = target_features(model, self._query_images, self._batch_size)
            readings |= {"rankme": rankme(features), "target_std": feature_std(features).mean()}
            if self._lidar_views is not None:
                views = target_features(model, self._lidar_views.flatten(0, 1), self._batch_size)
                readings["lidar"] = lidar(views.unflatten(0, self._lidar_views.shape[:2]))
            if self._knn is not None:
                readings |= self._knn.read(model, features, self._batch_size)
            values = torch.stack([value.double() for value in readings.values()]).tolist()
        return {f"monitor/{name}": value for name, value in zip(readings, values, strict=True)}

    def _read_predictions(self, model: IWM) -> dict[str, Tensor]:
        found, has_tokens = [], model.config.target == "encoder"
        for part, other_action in self._parts(model_device(model)):
            target = model.targets(part.target, part.target_idx).float()
            context = model.encoder(part.source, part.context_idx)
            predictions = [
                model.predictor(context, part.context_idx, part.target_idx, action).float()
                for action in ((part.action, other_action) if has_tokens else (part.action,))
            ]
            rows = [_sample_loss(tokens, target, model.config.loss) for tokens in predictions]
            if has_tokens:
                rows.append(F.cosine_similarity(predictions[0], target, dim=2).mean(1))
            found.append(torch.stack(rows))
        loss, *others = torch.cat(found, dim=1).mean(1)
        if not has_tokens:
            return {"loss": loss}
        other_loss, cosine = others
        return {"loss": loss, "action_gap": other_loss - loss, "cosine": cosine}

    def _parts(self, device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
        """The batch in parts of the size of a forward pass, each with the actions of other rows."""
        for first in range(0, len(self._batch), self._batch_size):
            rows = slice(first, first + self._batch_size)
            yield _rows(self._batch, rows).to(device), self._other_action[rows].to(device)


class _Knn:
    """The kNN's half of a monitor: labelled queries, and a bank whose features are new at every reading."""

    def __init__(
        self, query_labels: Tensor, bank_images: Tensor, bank_labels: Tensor, num_neighbors: int
    ) -> None:
        self._rows = query_labels >= 0
        self._query_labels = query_labels[self._rows].long()
        self._bank_images = bank_images[bank_labels >= 0]
        self._bank_labels = bank_labels[bank_labels >= 0].long()
        self._num_neighbors = num_neighbors
        self._num_classes = int(torch.cat([query_labels, bank_labels]).max()) + 1
        self._chance = torch.tensor(best_constant(self._query_labels))

    def read(self, model: IWM, features: Tensor, batch_size: int) -> dict[str, Tensor]:
        """`[q d]` features of all queries -> accuracy and chance, scalars on the features' device."""
        device = features.device
        bank = target_features(model, self._bank_images, batch_size)
        queries, labels = features[self._rows.to(device)], self._bank_labels.to(device)
        found = knn_classes(queries, bank, labels, self._num_classes, self._num_neighbors)
        top1 = (found == self._query_labels.to(device)).double().mean()
        return {"knn_top1": top1, "knn_chance": self._chance.to(device)}


def _sample_loss(prediction: Tensor, target: Tensor, loss: Literal["squared_l2", "smooth_l1"]) -> Tensor:
    """`[b t d]` twice -> `[b]`: the training loss (IWM.forward), with the prediction at hand."""
    distance = F.smooth_l1_loss if loss == "smooth_l1" else F.mse_loss
    return distance(prediction, target, reduction="none").mean(dim=(1, 2))


def _rows(batch: Batch, rows: Tensor | slice) -> Batch:
    return Batch(*(getattr(batch, field.name)[rows] for field in fields(batch)))
