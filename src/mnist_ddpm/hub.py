"""Publish a saved pipeline on the Hugging Face Hub: only what belongs there, with errors that say what to do.

`python -m mnist_ddpm.hub FOLDER REPO_ID` pushes a saved pipeline, for instance one that a training run could not push.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, create_repo, get_token
from huggingface_hub.errors import HFValidationError

from mnist_ddpm.pipeline import CARD, CARD_FILE, CARD_REPO_ID, PICTURE_FILE, upload_pipeline

REMEDIES = {
    401: "the token is missing, wrong or expired: create one that may write at https://huggingface.co/settings/tokens",
    403: "the token may not write there: use a token with write access to that namespace, or another repository name",
    404: "no such repository or namespace: check the name, and that the token may see it",
    409: "the Hub reports a conflict with another change: try again, or use another repository name",
}


def check_repository(repo_id: str, *, token: str | None = None, private: bool = False) -> str:
    """Create the repository where it is missing, and find out whether the token may write to it.

    To be called before a long training, so that a wrong token or name costs seconds and not hours.

    Args:
        repo_id: `name` (in the token's own namespace) or `namespace/name`.
        token: A Hub token that may write; None means the stored one (`HF_TOKEN` or `hf auth login`).
        private: Whether a repository that is created here is private.

    Returns:
        The full `namespace/name`.

    Raises:
        ValueError: If there is no usable token.
        RuntimeError: If the repository cannot be created or written to; the message names it and the remedy.
    """
    _check_token(token)
    try:
        full_id = create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        # Asks the Hub where a file would go, which needs write access, and uploads nothing.
        HfApi().preupload_lfs_files(full_id, [CommitOperationAdd("README.md", b"card")], token=token)
    except Exception as error:  # whatever the network, the server and the client can do
        # `from None`: the traceback of the HTTP client may show the request's headers, the token among them.
        raise RuntimeError(f"cannot push to the repository {repo_id!r}: {_reason(error)}") from None
    return full_id


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a saved pipeline as `upload_pipeline` does, with errors that say what to do.

    Args:
        folder: A folder that `MNISTDDPMPipeline.save_pretrained` wrote; what else it holds is not uploaded.
        repo_id: The repository, `name` or `namespace/name`.
        token: A Hub token that may write; None means the stored one.
        private: Whether the repository is private, if it is created.
        commit_message: The title of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If `folder` holds no saved pipeline, or there is no usable token.
        RuntimeError: If the upload fails; the message gives the command that pushes what is in the folder again.
    """
    folder = Path(folder).resolve()
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"`folder` must hold what `save_pretrained` writes, but {folder} has no model_index.json")
    _check_token(token)
    try:
        return upload_pipeline(folder, repo_id, token=token, private=private, commit_message=commit_message)
    except Exception as error:  # as above
        command = f"python -m mnist_ddpm.hub {shlex.quote(str(folder))} {shlex.quote(repo_id)}"
        command += " --private" if private else ""
        raise RuntimeError(
            f"cannot push to the repository {repo_id!r}: {_reason(error)}\n"
            f"The pipeline is safe in {folder}; push it again with: {command}"
        ) from None


def write_card(
    folder: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    command: Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Write the model card of a saved pipeline: how to load it, and how it was trained and scored.

    Neither tokens nor folders of this machine get into it: of a path, only its last part is told.

    Args:
        folder: A folder that `MNISTDDPMPipeline.save_pretrained` wrote; a `samples.png` in it is shown.
        dataset: The Hub id of the data set.
        command: The training command, word by word.
        parameters: The parameters of the training, by name.
        scores: The scores of its samples, by the name of the metric.
    """
    card = ModelCard(CARD)
    data: Any = card.data
    sections = []
    if command:
        sections.append(f"## Training\n\n```bash\n{shlex.join(_public_words(command))}\n```")
    if parameters:
        public = {name: _public_value(value) for name, value in parameters.items() if "token" not in name}
        sections.append(_table("parameter", "value", public))
    if scores:
        sections.append("## Evaluation\n\n" + _table("metric", "score", {k: f"{v:.4g}" for k, v in scores.items()}))
        data.model_name = CARD_REPO_ID
        name = dataset or "unknown"
        task = {"task_type": data.pipeline_tag, "dataset_type": name, "dataset_name": name}
        data.eval_results = [EvalResult(**task, metric_type=k, metric_value=v) for k, v in scores.items()]
    if dataset:
        data.datasets = [dataset]
    if (Path(folder) / PICTURE_FILE).is_file():
        card.text = card.text.replace("## Use", f"![Samples]({PICTURE_FILE})\n\n## Use", 1)
    card.text = "\n\n".join([card.text.rstrip(), *sections]) + "\n"
    (Path(folder) / CARD_FILE).write_text(str(card))


def _public_words(command: Sequence[str]) -> list[str]:
    """The words of a command without a token, and without folders of this machine."""
    words: list[str] = []
    skip = False
    for word in command:
        is_token = word.startswith("-") and "token" in word
        if not (skip or is_token):
            words.append(_public_value(word))
        skip = is_token and "=" not in word  # the next word is the token
    return words


def _public_value(value: Any) -> str:
    """A value for the card; of an absolute path, its last part."""
    return Path(value).name if isinstance(value, str | Path) and Path(value).is_absolute() else str(value)


def _table(left: str, right: str, rows: Mapping[str, str]) -> str:
    """A Markdown table of two columns."""
    lines = [f"| {left} | {right} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)


def _check_token(token: str | None) -> None:
    """Refuse a token that is missing or that an HTTP header cannot carry (the client's own error would print it)."""
    if token is None:
        token = get_token()
    if token is None:
        raise ValueError("no Hub token: pass `token`, set HF_TOKEN, or log in with `hf auth login`")
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("`token` must be printable ASCII without spaces or line breaks: copy it again")


def _reason(error: Exception) -> str:
    """What went wrong in one line, with the remedy."""
    response = getattr(error, "response", None)
    first, *_ = str(error).strip().splitlines() or [""]
    details = f"{type(error).__name__}: {first} {getattr(error, 'server_message', None) or ''}".strip()
    if isinstance(error, HFValidationError):
        return details
    if response is None:
        return f"the Hub could not be reached or broke off: check the network and try again ({details})"
    if response.status_code >= 500:
        return f"the Hub is in trouble: try again later ({details})"
    return f"{REMEDIES.get(response.status_code, 'the Hub refused: check the name')} ({details})"


def main(argv: list[str] | None = None) -> None:
    """Push a saved pipeline from the command line."""
    parser = argparse.ArgumentParser(prog="python -m mnist_ddpm.hub", description="Push a saved pipeline to the Hub.")
    parser.add_argument("folder", help="a folder that save_pretrained wrote")
    parser.add_argument("repo_id", help="namespace/name")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is created")
    args = parser.parse_args(argv)
    try:
        print(publish(args.folder, args.repo_id, private=args.private))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
