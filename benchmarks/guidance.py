"""FID, precision and recall of one model over the guidance scale: by labels, or by weaker U-Nets as guides.

Without --guides, a conditional model is led by its labels, 0 to 9 in turn (arXiv 2207.12598), and the classifier says
how often it reads the digit that was asked for. With --guides, candidates for a pipeline's guide are compared (arXiv
2406.02507), each with the time of its forward pass. Rows that the output file has already, of the same weights and
settings, are kept: a run that was stopped resumes, and another candidate is added to those that are there.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quality import earlier_figures, in_bf16, write_json
from torch.utils.benchmark import Timer

from mnist_ddpm import PRETRAINED, PRETRAINED_CONDITIONAL, MNISTUNet2DModel
from mnist_ddpm.cli import check_writable, provenance
from mnist_ddpm.data import MNIST, decode_images, load_labels, load_split
from mnist_ddpm.metrics import ClassifierFeatures, class_scores, extract_features, feature_scores, random_subset
from mnist_ddpm.sampling import load_pipeline, sample_tensor, weights_digest

RESULTS = Path(__file__).resolve().parent / "results"
EVERYWHERE = (0.0, 1.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a saved pipeline; by default the package's conditional one, with --guides the other"
    )
    parser.add_argument(
        "--guides",
        nargs="+",
        type=lambda guide: guide.rpartition("=")[::2],
        metavar="NAME=FOLDER",
        help="weaker U-Nets, or pipelines whose U-Nets they are, and the names that the table gives them",
    )
    parser.add_argument(
        "--scales", nargs="+", type=float, help="by default 1 1.5 2 3 5, with --guides 1 1.2 1.4 1.6 2"
    )
    parser.add_argument(
        "--guidance_interval",
        nargs=2,
        type=float,
        action="append",
        metavar=("LOW", "HIGH"),
        help="t / T at which guidance acts; given several times, each is measured; by default 0 1",
    )
    parser.add_argument("--num_images", type=int, default=10_000, help="for each row")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--scheduler", default="ddim", help="a name that sample.py takes")
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--bf16", action="store_true", help="let the networks compute in bfloat16, which is quicker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help="by default results/guidance.json, with --guides results/guides.json"
    )
    args = parser.parse_args(argv)
    args.model = args.model or str(PRETRAINED if args.guides else PRETRAINED_CONDITIONAL)
    args.scales = args.scales or ([1, 1.2, 1.4, 1.6, 2] if args.guides else [1, 1.5, 2, 3, 5])
    args.guidance_interval = [tuple(interval) for interval in args.guidance_interval or [EVERYWHERE]]
    args.output = args.output or RESULTS / ("guides.json" if args.guides else "guidance.json")
    args.command = ["python", "benchmarks/guidance.py", *argv]
    return args


def real_images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of a split, uint8 (N, 1, 28, 28), and their digits (N,)."""
    dataset = load_split(MNIST, split=split)
    return decode_images(dataset, channels=1), load_labels(dataset)[0]


class Scores:
    """Scores on the features of the packaged classifier, as in `examples/evaluate.py`.

    Attributes:
        floor: The scores of `num_images` real test images.
    """

    def __init__(self, num_images: int, seed: int, device: str) -> None:
        self.classifier, self.seed = ClassifierFeatures.from_pretrained().to(device), seed
        self.reference = extract_features(self.classifier, real_images("train")[0])
        self.floor = self(*(random_subset(values, num_images, seed) for values in real_images("test")))

    def __call__(self, images: torch.Tensor, digits: torch.Tensor | None) -> dict[str, float]:
        """Score images; with the digits that they should show, also the share that is read as that."""
        features = extract_features(self.classifier, images)
        logits = self.classifier.logits(features)
        scores = feature_scores(features, self.reference, self.seed)
        scores["confident_share"] = class_scores(logits)["confident_share"]
        if digits is not None:
            scores["read_as_asked"] = float((logits.argmax(dim=1) == digits).double().mean())
        return scores


def load_unet(folder: str) -> Any:
    """A U-Net that was saved by itself or in a pipeline."""
    path = Path(folder)
    return MNISTUNet2DModel.from_pretrained(path / "unet" if (path / "unet").exists() else path)


@torch.no_grad()
def relative_cost(guide: torch.nn.Module, unet: Any, batch_size: int, bf16: bool) -> float:
    """The time of the guide's forward pass by that of the U-Net: the quickest of five each, in turn."""
    x = torch.randn(batch_size, unet.config.in_channels, *[unet.config.sample_size] * 2, device=unet.device)
    seconds: dict[Any, list[float]] = {guide: [], unet: []}
    with in_bf16(unet.device.type, bf16):
        for _ in range(5):
            for network, times in seconds.items():
                timer = Timer(
                    "network(x, 500)", globals={"network": network, "x": x}, num_threads=torch.get_num_threads()
                )
                times.append(timer.timeit(1).mean)
    return min(seconds[guide]) / min(seconds[unet])


def rows_of(args: argparse.Namespace, guides: dict[str, Any]) -> Iterator[tuple[str, tuple[float, float], float]]:
    """Guide, interval and scale of each row. Scale 1 is the same for all guides and intervals."""
    if 1 in args.scales:
        yield "", EVERYWHERE, 1.0
    for name in guides:
        for interval in args.guidance_interval:
            yield from ((name, interval, scale) for scale in args.scales if scale != 1)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Fill the table, row by row.

    Raises:
        ValueError: If there is nothing to guide by, or the output file is of another model or other settings.
    """
    check_writable(args.output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(args.model, args.scheduler, device)
    classes = pipe.unet.config.num_class_embeds or 0
    if not classes and not args.guides:
        raise ValueError(f"model must be a conditional one, got {args.model}. Name --guides for one without classes.")
    guides = {name or folder: load_unet(folder).to(device) for name, folder in args.guides or []} or {"": None}
    about: dict[str, Any] = {"": {}} | {
        name: {
            "weights": weights_digest(guide),
            "parameters": sum(weight.numel() for weight in guide.parameters()),
            "relative_cost": relative_cost(guide, pipe.unet, args.batch_size, args.bf16),
        }
        for name, guide in guides.items()
        if guide is not None
    }
    names = ("num_images", "num_inference_steps", "scheduler", "bf16", "seed")
    settings = {"weights": weights_digest(pipe.unet), **{name: getattr(args, name) for name in names}}
    key = "guides" if args.guides else "guidance"
    rows = earlier_figures(args.output, key, settings) or []
    known = {(row["weights"], tuple(row["guidance_interval"]), row["guidance_scale"]) for row in rows}

    scores = Scores(args.num_images, args.seed, device)
    result = {key: rows, "settings": settings, "floor": scores.floor, **provenance(args)}
    for name, interval, scale in rows_of(args, guides):
        if (about[name].get("weights"), interval, scale) in known:
            continue
        pipe.guide = guides.get(name)
        options = {"class_labels": list(range(classes)), "guidance_scale": scale, "guidance_interval": interval}
        options["num_inference_steps"] = args.num_inference_steps
        with in_bf16(device, args.bf16):
            images = sample_tensor(pipe, args.num_images, args.seed, args.batch_size, **options)
        scored = scores(images, torch.arange(args.num_images) % classes if classes else None)
        row = {"guide": name, "weights": None, **about[name], "guidance_interval": interval, "guidance_scale": scale}
        rows.append(row | scored)
        print(f"{name:24} {interval} {scale:g}  " + "  ".join(f"{k} {v:.3f}" for k, v in scored.items()), flush=True)
        write_json(result, args.output)
    return result


if __name__ == "__main__":
    main(parse_args())
