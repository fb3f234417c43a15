"""The trained pipeline that comes with the package: it is small, it loads as any other, and it draws digits."""

import json

import torch

from mnist_ddpm import PRETRAINED, MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTUNet2DModel
from mnist_ddpm.metrics import ClassifierFeatures, class_scores, extract_features


def test_it_takes_at_most_8_megabytes_and_holds_no_code():
    files = [path for path in PRETRAINED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}


def test_its_configs_name_no_folder():
    for path in PRETRAINED.rglob("*.json"):
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
