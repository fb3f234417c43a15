"""The program that trains the classifier, at a small size."""

import json

import pytest
import torch
import train_classifier

from mnist_ddpm.data import MNIST, load_split
from mnist_ddpm.metrics import ClassifierFeatures, class_scores


def test_a_short_training_learns_and_saves_what_scoring_loads(tmp_path):
    for split, size in {"train": 1400, "test": 200}.items():
        rows = load_split(MNIST, split=f"{split}[:{size}]")
        rows.to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    argv = ["--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / "classifier"), "--num_epochs", "2"]
    argv += ["--num_validation_images", "200", "--train_batch_size", "50", "--results", str(tmp_path / "results.json")]
    result = train_classifier.main(train_classifier.parse_args(argv))

    assert result["test_accuracy"] > 0.6
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == result
    card = (tmp_path / "classifier" / "README.md").read_text(encoding="utf-8")
    assert f"{result['test_accuracy']:.2%}" in card
    assert result["command"] in card

    pixel_values, labels = train_classifier.load_images(str(tmp_path), "test")
    images = ((pixel_values + 1) * 127.5).round().byte()
    classifier = ClassifierFeatures.from_pretrained(tmp_path / "classifier")
    logits = classifier.logits(classifier(images))
    assert float((logits.argmax(dim=1) == labels).double().mean()) == pytest.approx(result["test_accuracy"], abs=0.01)
    assert len(class_scores(logits)["class_shares"]) == 10


def test_augmentation_moves_each_image_by_its_own_amount_and_keeps_the_background():
    images = torch.full((6, 1, 28, 28), -1.0)
    images[:, :, 12:16, 12:16] = 1
    moved = train_classifier.augment(images, torch.Generator().manual_seed(0))
    assert moved.min() >= -1
    assert moved.max() <= 1 + 1e-6
    assert (moved[:, :, [0, -1]] == -1).all()
    mass = (moved + 1).sum(dim=(1, 2, 3)) / (images + 1).sum(dim=(1, 2, 3))
    assert ((mass > 0.9**2 - 0.05) & (mass < 1.1**2 + 0.05)).all()  # at most a tenth larger or smaller each way
    assert len({tuple(image.flatten().tolist()) for image in moved}) == 6
