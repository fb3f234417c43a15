"""The trained pipelines that come with the package: they are small, load as any other, and draw digits."""

import json

import pytest
import torch

from mnist_ddpm import PRETRAINED, PRETRAINED_CONDITIONAL, MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTUNet2DModel
from mnist_ddpm.metrics import ClassifierFeatures, class_scores, extract_features
from mnist_ddpm.sampling import load_pipeline, sample_tensor


@pytest.mark.parametrize(("folder", "megabytes"), [(PRETRAINED, 8), (PRETRAINED_CONDITIONAL, 4.2)])
def test_they_are_small_and_hold_no_code_and_no_path(folder, megabytes):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= megabytes * 1e6
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    for path in folder.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8"))


def test_it_draws_digits_of_many_kinds():
    pipe = MNISTDDPMPipeline.from_pretrained(PRETRAINED)
    assert isinstance(pipe.unet, MNISTUNet2DModel)
    assert pipe.unet.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = MNISTDDIMScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in range(50)]
    images = pipe(batch_size=50, generator=generators, num_inference_steps=20, output_type="pt").images
    classifier = ClassifierFeatures.from_pretrained()
    logits = classifier.logits(extract_features(classifier, (images * 255).round().to(torch.uint8)))
    scores = class_scores(logits)
    # far below what it reaches, far above what anything but digits would: noise is all of one class
    assert scores["confident_share"] > 0.6
    assert sum(share > 0 for share in scores["class_shares"]) >= 7


def test_the_conditional_one_draws_the_digits_that_are_asked_for():
    pipe = load_pipeline(PRETRAINED_CONDITIONAL, "ddim", "cpu")
    images = sample_tensor(pipe, 50, num_inference_steps=20, class_labels=list(range(10)), guidance_scale=1.5)
    classifier = ClassifierFeatures.from_pretrained()
    logits = classifier.logits(extract_features(classifier, images))
    assert (logits.argmax(dim=1) == torch.arange(50) % 10).sum() >= 45
