"""Scores against closed forms, and real images before blurred ones before noise."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import transformers

from mnist_ddpm import metrics
from mnist_ddpm.data import decode_images, load_split

DATA = str(Path(__file__).parent.parent / "data" / "mnist")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def with_moments(mean: torch.Tensor, root: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """Features whose sample mean is `mean` and whose sample covariance is `root.T @ root`, exactly."""
    x = normal(size, len(mean), seed=seed)
    x = x - x.mean(dim=0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T @ root + mean


@pytest.fixture(scope="module")
def classifier() -> metrics.ClassifierFeatures:
    return metrics.ClassifierFeatures.from_pretrained()


def test_frechet_distance_is_the_closed_form_for_two_gaussians():
    means, roots = normal(2, 6, seed=1), normal(2, 6, 6, seed=2)
    features, reference = (
        with_moments(m, r, 50 + 30 * i, i) for i, (m, r) in enumerate(zip(means, roots, strict=True))
    )
    first, second = (r.T @ r for r in roots)
    root_of_product = scipy.linalg.sqrtm((first @ second).numpy()).real
    expected = (means[0] - means[1]).square().sum() + first.trace() + second.trace() - 2 * np.trace(root_of_product)
    assert metrics.frechet_distance(features, reference) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_of_a_shift_is_its_square_in_float32_too():
    features = normal(400, 8).float()
    assert metrics.frechet_distance(features + 3, features) == pytest.approx(8 * 3**2, rel=1e-5)
    assert metrics.frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_the_unbiased_squared_mmd():
    features, reference = normal(20, 4), normal(20, 4, seed=1) + 0.5

    def kernel(i: np.ndarray, j: np.ndarray) -> float:
        return (i @ j / 4 + 1) ** 3

    x, y = features.numpy(), reference.numpy()
    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / len(pairs)
    between = sum(kernel(i, j) for i in x for j in y) / 20**2
    mean, std = metrics.kernel_distance(features, reference, subsets=2, subset_size=20)  # each subset is all there is
    assert mean == pytest.approx(within - 2 * between, rel=1e-9)
    assert std == pytest.approx(0, abs=1e-9)


def test_subsets_depend_on_the_seed_alone_and_leave_the_global_generator():
    features, reference, values = normal(60, 4), normal(80, 4, seed=1), torch.arange(100)
    state = torch.get_rng_state()
    distances = [metrics.kernel_distance(features, reference, seed=seed, subset_size=30) for seed in (1, 1, 2)]
    subsets = [metrics.random_subset(values, 40, seed=seed).tolist() for seed in (1, 1, 2)]
    drawn = list(zip(distances, subsets, strict=True))
    assert drawn[0] == drawn[1]
    assert all(first != other for first, other in zip(drawn[0], drawn[2], strict=True))
    assert len(set(drawn[0][1])) == 40
    assert torch.equal(metrics.random_subset(values, 100), values)
    assert torch.equal(torch.get_rng_state(), state)


def test_precision_and_recall_of_identical_and_disjoint_sets_and_of_modes_that_are_missed_or_invented():
    features = normal(50, 3)
    assert metrics.precision_recall(features, features) == (1, 1)
    assert metrics.precision_recall(features, features + 100) == (0, 0)
    near, far = torch.arange(4.0)[:, None], 100 + torch.arange(4.0)[:, None]
    both = torch.cat([near, far])
    assert metrics.precision_recall(near + 0.5, both) == (1, 0.5)
    assert metrics.precision_recall(both, near + 0.5) == (0.5, 1)


def test_precision_counts_balls_that_reach_to_the_kth_neighbor():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # farthest reach of the balls to the right: 7 + 4, 7 + 6, 7 + 7
    points = torch.tensor([[10.5], [12.5], [13.5], [14.5]])
    shares = [metrics.precision_recall(points, line, k=k)[0] for k in (1, 2, 3)]
    assert shares == [0.25, 0.5, 0.75]


def test_class_scores_count_the_likeliest_class_and_its_probability():
    probabilities = torch.tensor([[0.95, 0.03, 0.02], [0.2, 0.3, 0.5], [0.9, 0.1, 0.0], [0.0, 0.4, 0.6]])
    scores = metrics.class_scores(probabilities.log().clamp(min=-100), threshold=0.899)
    assert scores["class_shares"] == [0.5, 0, 0.5]
    assert scores["confidence"] == pytest.approx((0.95 + 0.5 + 0.9 + 0.6) / 4)
    assert scores["confident_share"] == 0.5


def test_nearest_distances_are_those_of_all_pairs_and_a_copy_is_at_zero():
    images, reference = random_images(30, 1, 6, 6), random_images(40, 1, 6, 6, seed=1)
    images[7] = reference[11]
    distances = metrics.nearest_distances(images, reference, chunk=8)
    differences = images.double()[:, None] / 255 - reference.double()[None] / 255
    expected = differences.square().sum(dim=(2, 3, 4)).sqrt().min(dim=1).values
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)
    assert distances[7] == 0


def test_copies_show_in_the_low_quantile():
    images, reference = random_images(200, 1, 6, 6), random_images(40, 1, 6, 6, seed=1)
    assert metrics.copy_scores(images, reference)["nearest_distance_p01"] > 1
    images[:3] = reference[:3]
    scores = metrics.copy_scores(images, reference)
    assert scores["nearest_distance_p01"] == 0
    assert scores["nearest_distance"] > 1


def test_images_on_another_scale_are_rejected(classifier):
    images = random_images(8, 1, 28, 28)
    for bad in (images / 255, images[:, 0]):
        for function in (classifier, lambda x: metrics.nearest_distances(x, images)):
            with pytest.raises(ValueError, match="images"):
                function(bad)


def test_features_of_a_resnet_are_its_pooled_output_and_its_head_gives_the_logits():
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [6], "depths": [1], "num_labels": 5}
    config = transformers.ResNetConfig(**sizes, layer_type="basic")
    model = transformers.ResNetForImageClassification(config).eval()
    images = random_images(3, 1, 28, 28)
    with torch.inference_mode():
        pixel_values = images / 127.5 - 1
        pooled, logits = model.resnet(pixel_values).pooler_output.flatten(1), model(pixel_values).logits
    extractor = metrics.ClassifierFeatures(model, size=(28, 28), mean=[0.5], std=[0.5])
    features = metrics.extract_features(extractor, images, batch_size=2)
    torch.testing.assert_close(features, pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(extractor.logits(features), logits, rtol=0, atol=1e-5)


def test_any_transformers_classifier_serves_at_its_own_size_channels_and_normalization():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4)
    model = transformers.ViTForImageClassification(config).eval()
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    images = random_images(2, 1, 28, 28)
    with torch.inference_mode():
        resized = F.interpolate(images / 255, (32, 32), mode="bilinear", antialias=True)
        channels = [(resized - m) / s for m, s in zip(mean, std, strict=True)]
        logits = model(torch.cat(channels, dim=1)).logits
    extractor = metrics.ClassifierFeatures(model, (32, 32), mean, std)
    torch.testing.assert_close(extractor.logits(extractor(images)), logits, rtol=0, atol=1e-5)


def test_a_classifier_that_is_missing_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        metrics.ClassifierFeatures.from_pretrained(tmp_path)


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_says_what_it_needs():
    with pytest.raises(ModuleNotFoundError, match="torch-fidelity"):
        metrics.InceptionFeatures()


def test_the_shipped_classifier_is_accurate_and_loads_by_transformers_alone(classifier):
    dataset = load_split(DATA, split="test[:2000]")
    images, labels = decode_images(dataset), torch.tensor(dataset["label"])
    features = metrics.extract_features(classifier, images)
    logits = classifier.logits(features)
    assert float((logits.argmax(dim=1) == labels).double().mean()) >= 0.99
    model = transformers.AutoModelForImageClassification.from_pretrained(metrics.CLASSIFIER)
    with torch.inference_mode():
        torch.testing.assert_close(model(images[:10] / 127.5 - 1).logits, logits[:10], rtol=0, atol=1e-4)
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}


def test_real_images_score_better_than_blurred_ones_and_those_better_than_noise(classifier):
    reference = decode_images(load_split(DATA, split="train[:500]"))
    real = decode_images(load_split(DATA, split="test[:500]"))
    blurred = F.avg_pool2d(real.float(), 5, stride=1, padding=2).round().byte()
    noise = random_images(*real.shape)
    scorer = metrics.Scorer(reference, classifier)
    scores = [scorer(images) for images in (real, blurred, noise)]
    for name in ("fid", "kid"):
        assert scores[0][name] < scores[1][name] < scores[2][name], name
    assert scores[0]["precision"] > scores[1]["precision"] > scores[2]["precision"]
    assert scores[0]["confidence"] > scores[1]["confidence"]  # of noise, classifiers can be as sure as they like
