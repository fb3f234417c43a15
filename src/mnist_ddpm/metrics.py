"""Scores of images against reference images: FID and KID, precision and recall, digits, confidence, copies.

Everything is measured on features that are extracted once: by a transformers image classifier (`ClassifierFeatures`,
by default the MNIST classifier in `CLASSIFIER`) or by Inception (`InceptionFeatures`). A score means little without
its real-data baseline: the same score of real test images against the training set.

References: FID = arXiv 1706.08500, KID = arXiv 1801.01401, improved precision and recall = arXiv 1904.06991.
"""

import warnings
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLASSIFIER = Path(__file__).parent / "classifier"
"""The folder of the MNIST classifier that comes with the package."""


class ClassifierFeatures(torch.nn.Module):
    """A transformers image classifier up to its last linear layer, which is kept as `head`.

    Args:
        model: An image classifier of transformers whose logits come from a `torch.nn.Linear`, which is replaced by
            an identity.
        size: The `(height, width)` that images are resized to.
        mean: Mean of the pixel values in [0, 1] that normalization subtracts, one entry or one per channel.
        std: Standard deviation that it divides by, likewise.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: "PreTrainedModel", size: tuple[int, int], mean: list[float], std: list[float]) -> None:
        super().__init__()
        config = model.config
        heads = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module.out_features == config.num_labels
        ]
        self.head = model.get_submodule(heads[-1])
        model.set_submodule(heads[-1], torch.nn.Identity())
        self.model = model.eval()
        self.size, self.num_channels = size, getattr(config, "num_channels", 3)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str] = CLASSIFIER) -> Self:
        """Load a classifier and what its image processor says about size, mean and standard deviation.

        Args:
            path: A folder or Hub id that `AutoModelForImageClassification` and `AutoImageProcessor` load, with weights
                in safetensors.
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        model = AutoModelForImageClassification.from_pretrained(path, use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(path)
        edge = processor.size.get("shortest_edge")
        size = (edge, edge) if edge else (processor.size["height"], processor.size["width"])
        return cls(model, size, processor.image_mean, processor.image_std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features (B, D) of uint8 images (B, C, H, W): what the last linear layer sees."""
        x = _with_channels(images, self.num_channels).to(self.mean) / 255
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        features: torch.Tensor = self.model((x - self.mean) / self.std).logits  # the head is an identity here
        return features

    @torch.inference_mode()
    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, K) on the CPU that the last layer makes of features (N, D)."""
        logits: torch.Tensor = self.head(features.to(self.mean.device)).cpu()
        return logits


class InceptionFeatures(torch.nn.Module):
    """The 2048 pooled features of Inception v3 on which FID is commonly reported.

    They need `pip install torch-fidelity` and, the first time, a download from GitHub.
    """

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        self.model = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features (B, 2048) of uint8 images (B, C, H, W)."""
        features: torch.Tensor = self.model(_with_channels(images, 3))
        return features


def _with_channels(images: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Repeat a single channel where the network takes more."""
    _check_uint8(images)
    return images.expand(-1, num_channels, -1, -1)


def _check_uint8(images: torch.Tensor) -> None:
    """Reject images on another scale, which would score wrongly."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (B, C, H, W), got {images.dtype} of shape {tuple(images.shape)}.")


@torch.inference_mode()
def extract_features(extractor: torch.nn.Module, images: torch.Tensor, batch_size: int = 500) -> torch.Tensor:
    """Run a feature extractor over all images, on the device where the extractor is.

    Args:
        extractor: A module that maps uint8 images to features, such as `ClassifierFeatures`.
        images: uint8 (N, C, H, W).
        batch_size: Images at a time.

    Returns:
        Features (N, D) on the CPU.
    """
    device = next(extractor.parameters()).device
    return torch.cat([extractor(batch.to(device)).cpu() for batch in torch.split(images, batch_size)])


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Frechet distance between Gaussians that are fitted to two sets of features (FID, arXiv 1706.08500).

    `|m - m_r|^2 + Tr(C + C_r - 2 (C C_r)^(1/2))`, by torchmetrics in float64. Few images bias it upwards.

    Args:
        features: (N, D), N >= 2.
        reference: (M, D), M >= 2.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Features(features.shape[1]))
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def kernel_distance(
    features: torch.Tensor, reference: torch.Tensor, seed: int = 0, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Kernel distance between two sets of features (KID, arXiv 1801.01401): the unbiased squared MMD.

    The kernel is `(f . g / D + 1)^3`, by torchmetrics in float64, over random subsets drawn by the seed.

    Args:
        features: (N, D), N >= 2.
        reference: (M, D), M >= 2.
        seed: Seed of the subsets.
        subsets: How many subsets.
        subset_size: Images in each, at most; fewer where a set has fewer.

    Returns:
        Mean and standard deviation over the subsets.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    subset_size = min(subset_size, len(features), len(reference))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it keeps the features, as it must
        metric = KernelInceptionDistance(_Features(features.shape[1]), subsets=subsets, subset_size=subset_size)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws the subsets from the global generator
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


def precision_recall(features: torch.Tensor, reference: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991).

    A set's manifold is the union of the balls around its points that reach to their k-th nearest neighbor.
    Precision is the share of `features` in the manifold of `reference`, recall the share of `reference` in the
    manifold of `features`.

    Args:
        features: (N, D), N > k.
        reference: (M, D), M > k; as many as features, if figures are to be compared.
        k: Which neighbor.
    """
    features, reference = features.double(), reference.double()
    return _share_in_manifold(features, reference, k), _share_in_manifold(reference, features, k)


def _share_in_manifold(points: torch.Tensor, centers: torch.Tensor, k: int, chunk: int = 500) -> float:
    """Share of points within the k-th neighbor's distance of at least one center."""
    # each center is its own nearest neighbor, at distance 0
    radii = torch.cat([torch.cdist(c, centers).kthvalue(k + 1, dim=1).values for c in torch.split(centers, chunk)])
    inside = torch.cat([(torch.cdist(p, centers) <= radii).any(dim=1) for p in torch.split(points, chunk)])
    return float(inside.double().mean())


class _Features(torch.nn.Identity):
    """Stands in for the network where torchmetrics is given features in place of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def feature_scores(features: torch.Tensor, reference: torch.Tensor, seed: int = 0) -> dict[str, float]:
    """FID, KID, precision and recall of features against those of the reference images.

    Precision and recall depend on the sizes of the sets, so the larger set is cut to a random subset as large as
    the other.

    Args:
        features: (N, D).
        reference: (M, D).
        seed: Seed of the subsets.

    Returns:
        `fid`, `kid`, `kid_std`, `precision`, `recall`.
    """
    fid = frechet_distance(features, reference)
    kid, kid_std = kernel_distance(features, reference, seed)
    size = min(len(features), len(reference))
    precision, recall = precision_recall(random_subset(features, size, seed), random_subset(reference, size, seed))
    return {"fid": fid, "kid": kid, "kid_std": kid_std, "precision": precision, "recall": recall}


def random_subset(values: torch.Tensor, size: int, seed: int = 0) -> torch.Tensor:
    """Return `size` rows of (N, ...) without replacement, or all of them in their order where there are no more."""
    if size >= len(values):
        return values
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))[:size]]


def class_scores(logits: torch.Tensor, threshold: float = 0.9) -> dict[str, float | list[float]]:
    """Which classes a classifier sees in the images, and how sure of them it is.

    Args:
        logits: (N, K), N >= 1.
        threshold: The confidence from which an image counts as confident.

    Returns:
        `class_shares`, a list of the share of images of each class; `confidence`, the mean of the highest
        probability; `confident_share`, the share of images where it reaches the threshold.
    """
    confidence, classes = logits.double().softmax(dim=1).max(dim=1)
    shares = torch.bincount(classes, minlength=logits.shape[1]).double() / len(classes)
    return {
        "class_shares": shares.tolist(),
        "confidence": float(confidence.mean()),
        "confident_share": float((confidence >= threshold).double().mean()),
    }


def nearest_distances(images: torch.Tensor, reference: torch.Tensor, chunk: int = 500) -> torch.Tensor:
    """Distance of each image to the nearest reference image: the L2 norm over pixel values in [0, 1].

    Args:
        images: uint8 (N, C, H, W).
        reference: uint8 (M, C, H, W).
        chunk: Images at a time, each against all of the reference.

    Returns:
        Distances (N,); 0 is a copy.

    Raises:
        ValueError: If the images are not uint8.
    """
    _check_uint8(images)
    _check_uint8(reference)
    x, r = images.flatten(1).float(), reference.flatten(1).float()
    half_squares = r.square().sum(dim=1) / 2
    # the nearest minimizes |r|^2 / 2 - x.r; its distance is then taken directly, so that rounding leaves a copy at 0
    nearest = torch.cat([(half_squares - part @ r.T).argmin(dim=1) for part in torch.split(x, chunk)])
    return (x - r[nearest]).square().sum(dim=1).sqrt() / 255


def copy_scores(images: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """How close the images are to the reference images: copies would show in the low quantile.

    Args:
        images: uint8 (N, C, H, W).
        reference: uint8 (M, C, H, W).

    Returns:
        `nearest_distance`, the mean of `nearest_distances`, and `nearest_distance_p01`, their 1 % quantile.
    """
    distances = nearest_distances(images, reference).double()
    return {
        "nearest_distance": float(distances.mean()),
        "nearest_distance_p01": float(distances.quantile(0.01)),
    }


class Scorer:
    """Scores any number of sets of images against one set of reference images, whose features are extracted once.

    Args:
        reference: uint8 (M, C, H, W), usually the training set.
        classifier: Whose features, classes and confidence count.
        inception: Where given, its features are scored as well, under names that begin with `inception_`.
        batch_size: Images at a time.
    """

    def __init__(
        self,
        reference: torch.Tensor,
        classifier: ClassifierFeatures,
        inception: InceptionFeatures | None = None,
        batch_size: int = 500,
    ) -> None:
        self.reference, self.classifier, self.inception, self.batch_size = reference, classifier, inception, batch_size
        self.reference_features = extract_features(classifier, reference, batch_size)
        if inception is not None:
            self.reference_inception_features = extract_features(inception, reference, batch_size)

    def __call__(self, images: torch.Tensor, seed: int = 0) -> dict[str, float | list[float]]:
        """Score images uint8 (N, C, H, W); returns what the functions that end in `_scores` return, together."""
        features = extract_features(self.classifier, images, self.batch_size)
        scores: dict[str, float | list[float]] = {
            **feature_scores(features, self.reference_features, seed),
            **class_scores(self.classifier.logits(features)),
            **copy_scores(images, self.reference),
        }
        if self.inception is not None:
            features = extract_features(self.inception, images, self.batch_size)
            named = feature_scores(features, self.reference_inception_features, seed)
            scores |= {f"inception_{name}": value for name, value in named.items()}
        return scores
