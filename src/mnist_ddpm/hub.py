"""What surrounds a pipeline on the Hugging Face Hub: its card with training and scores, checkpoints, a first check.

`python -m mnist_ddpm.hub FOLDER REPO_ID` pushes a saved pipeline, for instance one that a training run could not push.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, create_repo, upload_folder

from mnist_ddpm.pipeline import CARD, CARD_FILE, CARD_REPO_ID, PICTURE_FILE, publish, pushing_to

__all__ = ["add_scores", "check_repository", "publish", "publish_checkpoint", "write_card"]

EVALUATION = """## Evaluation

FID, KID, precision and recall are measured on the features of an MNIST classifier, or of Inception v3 where the name
says so; the former do not compare with those of other papers."""


def check_repository(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Create the repository where it is missing, and find out whether the token may write to it.

    To be called before a long training, so that a wrong token or name costs seconds and not hours.

    Args:
        repo_id: `name` (in the token's own namespace) or `namespace/name`.
        token: A Hub token that may write; None means the stored one (`HF_TOKEN` or `hf auth login`).
        private: Whether a repository that is created here is private; None means as its namespace has it.

    Returns:
        The full `namespace/name`.

    Raises:
        RuntimeError: If the repository cannot be created or written to; the message names it and the remedy.
    """
    with pushing_to(repo_id, token):
        full_id = create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        # Asks the Hub where a file would go, which needs write access, and uploads nothing.
        HfApi().preupload_lfs_files(full_id, [CommitOperationAdd("README.md", b"card")], token=token)
    return full_id


def publish_checkpoint(
    checkpoint: str | os.PathLike[str], repo_id: str, name: str | None = None, *, token: str | None = None
) -> None:
    """Upload a checkpoint of a training run beside the pipeline, so that the run can go on from it elsewhere.

    Args:
        checkpoint: The folder of the checkpoint.
        repo_id: The repository `namespace/name`.
        name: The checkpoint's folder in the repository, by default its name here; what is there is replaced.
        token: A Hub token that may write; None means the stored one.

    Raises:
        RuntimeError: If the upload fails; the message names the repository and the remedy.
    """
    checkpoint = Path(checkpoint)
    with pushing_to(repo_id, token, f"The checkpoint is safe in {checkpoint.resolve()}."):
        upload_folder(
            repo_id=repo_id,
            folder_path=checkpoint,
            path_in_repo=name or checkpoint.name,
            delete_patterns="*",
            commit_message=f"Upload {checkpoint.name}",
            token=token,
        )


def write_card(
    folder: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    command: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
) -> None:
    """Write the model card of a saved pipeline: how to load it, and how it was trained.

    Neither tokens nor folders of this machine get into it: of a path, only its last part is told.

    Args:
        folder: A folder that `MNISTDDPMPipeline.save_pretrained` wrote; a `samples.png` in it is shown.
        dataset: The Hub id of the data set.
        command: The training command, word by word.
        parameters: The parameters of the training, by name.
    """
    card = ModelCard(CARD)
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
    (Path(folder) / CARD_FILE).write_text(str(card))


def add_scores(folder: str | os.PathLike[str], scores: Mapping[str, Any], *, command: str = "") -> None:
    """Add the scores of its samples to the card of a saved pipeline, for readers and for the Hub's `model-index`.

    Args:
        folder: A folder that `MNISTDDPMPipeline.save_pretrained` wrote.
        scores: The scores by the name of the metric, as `examples/evaluate.py` writes them; what is no number is
            left out, and scores that the card has are replaced.
        command: The command that measured them, a shell line.
    """
    numbers = {name: value for name, value in scores.items() if isinstance(value, int | float)}
    path = Path(folder) / CARD_FILE
    card = ModelCard(path.read_text() if path.exists() else CARD)
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
    path.write_text(str(card))


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
            result = json.loads(Path(args.scores).read_text())
            if "scores" not in result:
                raise ValueError(f"--scores: {args.scores} has no `scores`: is it what examples/evaluate.py wrote?")
            add_scores(args.folder, result["scores"], command=result.get("command", ""))
        print(publish(args.folder, args.repo_id, private=args.private or None, create_pr=args.create_pr))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
