"""Pipelines on the Hugging Face Hub: publishing, the model card, and what to do about errors.

`python -m mnist_ddpm.hub FOLDER REPO_ID` pushes a saved pipeline, for instance one that a training run could not push.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    EvalResult,
    HfApi,
    ModelCard,
    create_commit,
    create_repo,
    file_exists,
    get_token,
    snapshot_download,
    upload_folder,
)

__all__ = ["add_scores", "check_repository", "publish", "publish_checkpoint", "write_card"]

INDEX_FILE, CARD_FILE, PICTURE_FILE = "model_index.json", "README.md", "samples.png"
CARD_REPO_ID = "namespace/name"  # replaced by the repository's name when a card is published
CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: apache-2.0
tags:
- diffusion
- ddpm
- ddim
---

# namespace/name

A U-Net and a scheduler of [diffusers](https://huggingface.co/docs/diffusers) that generate images: a denoising
diffusion probabilistic model ([DDPM](https://arxiv.org/abs/2006.11239)), which can be sampled in fewer steps as
[DDIM](https://arxiv.org/abs/2010.02502). Made with the package `mnist-ddpm`.

## Use

With `mnist-ddpm` installed. No code of this repository is run:

```python
from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline

pipe = MNISTDDPMPipeline.from_pretrained("namespace/name")
pipe.scheduler = MNISTDDIMScheduler.from_config(pipe.scheduler.config)
images = pipe(batch_size=16, num_inference_steps=50).images
```

Without it. `trust_remote_code=True` runs the source files in this repository:

```python
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("namespace/name", trust_remote_code=True)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
images = pipe(batch_size=16, num_inference_steps=50).images
```

Each part alone:

```python
from mnist_ddpm import MNISTDDPMScheduler, MNISTUNet2DModel

unet = MNISTUNet2DModel.from_pretrained("namespace/name", subfolder="unet")
scheduler = MNISTDDPMScheduler.from_pretrained("namespace/name", subfolder="scheduler")
```
"""
CLASSES = """
## Classes

{names}. A call takes one for all images, or a list with one for each:

```python
images = pipe(batch_size=4, class_labels={name}, guidance_scale=2.0, num_inference_steps=50).images
```
"""
GUIDE = """
## Guide

A weaker U-Net, from which `pipe(guidance_scale=1.5)` leads away ([arXiv 2406.02507](https://arxiv.org/abs/2406.02507)).
"""
EVALUATION = """## Evaluation

FID, KID, precision and recall are measured on features of an MNIST classifier, so they don't compare with those of
papers; where the name says Inception, on features of Inception v3."""
REMEDIES = {  # by the status of the response; None where there is none
    None: "the Hub could not be reached or broke off: check the network and try again",
    401: "the token is missing, wrong or expired: set HF_TOKEN or run `hf auth login`, with one that may write",
    403: "the token may not write there: use a token with write access to that namespace, or another repository name",
    404: "no such repository or namespace: check the name, and that the token may see it",
    409: "the Hub reports a conflict with another change: try again, or use another repository name",
    500: "the Hub is in trouble: try again later",
}


def check_repository(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Create the repository if it doesn't exist, and check that the token may write to it.

    Call it before a long training: a wrong token or name then costs seconds and not hours.

    Args:
        repo_id: `name` (in the token's own namespace) or `namespace/name`.
        token: A Hub token that may write; None means the stored one (`HF_TOKEN` or `hf auth login`).
        private: Whether a repository that is created here is private; None means the default of its namespace.

    Returns:
        The full `namespace/name`.

    Raises:
        RuntimeError: If the repository cannot be created or written to; the message names it and the remedy.
    """
    with _pushing_to(repo_id, token):
        full_id = create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        # asks the Hub where a file would go, which needs write access, and uploads nothing
        HfApi().preupload_lfs_files(full_id, [CommitOperationAdd(CARD_FILE, b"card")], token=token)
    return full_id


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a saved pipeline to the Hub, without any other files of its folder.

    Args:
        folder: A folder that `MNISTDDPMPipeline.save_pretrained` wrote.
        repo_id: `name` or `namespace/name`; it is created if it doesn't exist. A card on the Hub is replaced only by
            one that says more than how to load the pipeline.
        token: A Hub token that may write; None means the stored one.
        private: Whether a repository that is created here is private; None means the default of its namespace.
        commit_message: The title of the commit.
        create_pr: Whether to open a pull request instead of changing the main branch.

    Returns:
        The address of the commit.

    Raises:
        OSError: If `folder` holds no saved pipeline.
        RuntimeError: If the upload fails; the message gives the remedy, and the command that pushes the folder again.
    """
    folder = Path(folder).resolve()
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in _files(folder)]
    command = [sys.executable, "-m", "mnist_ddpm.hub", str(folder), repo_id]
    command += ["--private"] * bool(private) + ["--create-pr"] * create_pr
    token_first = " (set HF_TOKEN first)" if token else ""
    advice = f"The pipeline is safe in {folder}; push it again{token_first} with: {shlex.join(command)}"
    with _pushing_to(repo_id, token, advice):
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        card = _read_card(folder)
        if card != _plain_card(folder) or not file_exists(repo_id, CARD_FILE, token=token):
            operations.append(CommitOperationAdd(CARD_FILE, card.replace(CARD_REPO_ID, repo_id).encode()))
        message = commit_message or "Upload MNISTDDPMPipeline"
        commit = create_commit(repo_id, operations, commit_message=message, token=token, create_pr=create_pr)
    return commit.commit_url


def download(pipeline_class: Any, repo_id: str, **kwargs: Any) -> str:
    """Fetch the configs and weights of a pipeline, or find them in the cache; no code is fetched."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    components = [name for name in pipeline_class._get_signature_keys(pipeline_class)[0] if name not in kwargs]
    allowed = [INDEX_FILE, *(f"{name}/*.{kind}" for name in components for kind in ("json", "safetensors"))]
    try:
        return str(snapshot_download(repo_id, allow_patterns=allowed, **options))
    except Exception as error:  # whatever the network, the server and the client can do
        reason = error if isinstance(error, OSError) else type(error).__name__  # others may quote the token
        remedy = "check the name, the token and the network"
        raise OSError(f"cannot load {repo_id!r} from the Hub: {remedy} ({reason})") from None


def finish_folder(
    folder: str | os.PathLike[str], push_to_hub: bool = False, repo_id: str | None = None, **options: Any
) -> None:
    """Add a card to a pipeline that was just saved, if it has none, and publish it if asked to."""
    if not Path(folder, CARD_FILE).exists():
        _write_card(folder, _plain_card(folder))
    if push_to_hub:
        publish(folder, repo_id or Path(folder).resolve().name, **options)


def push_pipeline(
    pipeline: Any,
    repo_id: str,
    *,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    **options: Any,
) -> str:
    """Save a pipeline in a temporary folder and publish it; the folder is kept if that fails."""
    folder = tempfile.mkdtemp(prefix="pipeline-")
    pipeline.save_pretrained(folder, safe_serialization, variant=variant, max_shard_size=max_shard_size)
    address = publish(folder, repo_id, **options)
    shutil.rmtree(folder)
    return address


def publish_checkpoint(
    checkpoint: str | os.PathLike[str], repo_id: str, name: str | None = None, *, token: str | None = None
) -> None:
    """Upload a checkpoint of a training run beside the pipeline, so that the run can resume from it elsewhere.

    Args:
        checkpoint: The folder of the checkpoint.
        repo_id: The repository `namespace/name`.
        name: The checkpoint's folder in the repository, by default its name here; its content is replaced.
        token: A Hub token that may write; None means the stored one.

    Raises:
        RuntimeError: If the upload fails; the message names the repository and the remedy.
    """
    checkpoint = Path(checkpoint)
    with _pushing_to(repo_id, token, f"The checkpoint is safe in {checkpoint.resolve()}."):
        upload_folder(
            repo_id=repo_id,
            folder_path=checkpoint,
            path_in_repo=name or checkpoint.name,
            delete_patterns="*",
            commit_message=f"Upload {checkpoint.name}",
            token=token,
        )


# The model card


def write_card(
    folder: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    command: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Write the model card of a saved pipeline: how to load it, and how it was trained.

    It shows neither tokens nor folders of this machine: of an absolute path, only the last part.

    Args:
        folder: A folder that `MNISTDDPMPipeline.save_pretrained` wrote; a `samples.png` in it is shown.
        dataset: The Hub id of the data set.
        command: The training command, word by word.
        parameters: The parameters of the training, by name.
    """
    card = ModelCard(_plain_card(folder))
    data: Any = card.data
    sections = []
    if command:
        sections.append(f"## Training\n\n```bash\n{shlex.join(_public_words(command))}\n```")
    if parameters:
        public = {name: _public(value) for name, value in parameters.items() if "token" not in name}
        sections.append(_table("parameter", "value", public))
    if dataset:
        data.datasets = [dataset]
    if (Path(folder) / PICTURE_FILE).is_file():
        card.text = card.text.replace("## Use", f"![Samples]({PICTURE_FILE})\n\n## Use", 1)
    card.text = "\n\n".join([card.text.rstrip(), *sections]) + "\n"
    _write_card(folder, card)


def add_scores(folder: str | os.PathLike[str], scores: Mapping[str, Any], *, command: str = "") -> None:
    """Add the scores of its samples to the card of a saved pipeline, for readers and for the Hub's `model-index`.

    Args:
        folder: A folder that `MNISTDDPMPipeline.save_pretrained` wrote.
        scores: The scores by the name of the metric, as `examples/evaluate.py` writes them. Values that are no
            numbers are left out; earlier scores on the card are replaced.
        command: The command that measured them, a shell line.
    """
    numbers = {name: value for name, value in scores.items() if isinstance(value, int | float)}
    card = ModelCard(_read_card(folder))
    data: Any = card.data
    name = (data.datasets or ["unknown"])[0]
    task = {"task_type": data.pipeline_tag, "dataset_type": name, "dataset_name": name}
    data.model_name = CARD_REPO_ID
    data.eval_results = [EvalResult(**task, metric_type=k, metric_value=v) for k, v in numbers.items()]
    sections = [EVALUATION, _table("metric", "score", {name: f"{value:.4g}" for name, value in numbers.items()})]
    if command:
        sections.append(f"```bash\n{shlex.join(_public_words(shlex.split(command)))}\n```")
    above, *_ = card.text.partition(EVALUATION.splitlines()[0])
    card.text = "\n\n".join([above.rstrip(), *sections]) + "\n"
    _write_card(folder, card)


def _plain_card(folder: str | os.PathLike[str]) -> str:
    """The card that every saved pipeline starts with: how to load it, its classes, its guide."""
    index = json.loads((Path(folder) / INDEX_FILE).read_text(encoding="utf-8"))
    names = [index["id2label"][number] for number in sorted(index.get("id2label", {}), key=int)]
    card = CARD
    if index["scheduler"][1] == "LCMScheduler":  # distilled to few steps: other schedulers don't fit
        card = re.sub(r"^pipe.scheduler = .*\n", "", card, flags=re.MULTILINE).replace("steps=50", "steps=1")
    if names:
        card = card.replace("- ddim\n", "- ddim\n- class-conditional\n")
        card += CLASSES.format(names=", ".join(names), name=json.dumps(names[0], ensure_ascii=False))
    return card + GUIDE if "guide" in index else card


def _write_card(folder: str | os.PathLike[str], card: ModelCard | str) -> None:
    """Write a card; names that are not valid Unicode, as files may have, are escaped."""
    (Path(folder) / CARD_FILE).write_bytes(str(card).encode("utf-8", "backslashreplace"))


def _read_card(folder: str | os.PathLike[str]) -> str:
    """The card of a folder, or the one that every saved pipeline starts with."""
    path = Path(folder) / CARD_FILE
    return path.read_text(encoding="utf-8") if path.exists() else _plain_card(folder)


def _public_words(command: Sequence[str]) -> list[str]:
    """The words of a command without a token, and without folders of this machine."""
    words: list[str] = []
    skip = False
    for word in command:
        flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if not (skip or "token" in flag):
            words.append(flag + equals + _public(value))
        skip = "token" in flag and not equals  # the next word is the token
    return words


def _public(value: Any) -> str:
    """A value for the card: of an absolute path its last part, and nothing that looks like a token of the Hub."""
    text = Path(value).name if isinstance(value, str | Path) and Path(value).is_absolute() else str(value)
    return re.sub(r"hf_[A-Za-z0-9]{30,}", "hf_...", text)


def _table(left: str, right: str, rows: Mapping[str, str]) -> str:
    """A Markdown table of two columns."""
    lines = [f"| {left} | {right} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)


# Pushing


def _files(folder: Path) -> list[Path]:
    """The files of a saved pipeline but for its card: of the folder itself, and of each component."""
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    components = [name for name in index if (folder / name).is_dir()]
    patterns = [INDEX_FILE, "pipeline.py", PICTURE_FILE]
    patterns += [f"{name}/*.{kind}" for name in components for kind in ("json", "py", "safetensors")]
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


@contextmanager
def _pushing_to(repo_id: str, token: str | None, advice: str = "") -> Iterator[None]:
    """Turn any error of a push into one with the repository, the reason and the remedy, and without the token."""
    token = token or get_token()
    try:
        yield
    except Exception as error:  # whatever the network, the server and the client can do
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = REMEDIES.get(status and min(status, 500), "the Hub rejected it: check the name")
        first, *_ = str(error).strip().splitlines() or [""]
        details = f"{type(error).__name__}: {first} {getattr(error, 'server_message', None) or ''}".strip()
        reason = str(error) if isinstance(error, ValueError) else f"{remedy} ({details})"
        reason = reason.replace(token, "hf_...") if token else reason
        # `from None`: the traceback of the HTTP client may show the request's headers
        raise RuntimeError(f"cannot push to the repository {repo_id!r}: {reason}\n{advice}".strip()) from None


def main(argv: list[str] | None = None) -> None:
    """Push a saved pipeline from the command line."""
    parser = argparse.ArgumentParser(prog="python -m mnist_ddpm.hub", description="Push a saved pipeline to the Hub.")
    parser.add_argument("folder", help="a folder that save_pretrained wrote")
    parser.add_argument("repo_id", help="namespace/name")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is created")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing main")
    parser.add_argument("--scores", help="a JSON file of examples/evaluate.py, for the card")
    args = parser.parse_args(argv)
    try:
        if args.scores:
            result = json.loads(Path(args.scores).read_text(encoding="utf-8"))
            add_scores(args.folder, result["scores"], command=result.get("command", ""))
        print(publish(args.folder, args.repo_id, private=args.private or None, create_pr=args.create_pr))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
