"""What a run leaves in its output folder: checkpoints that are whole or absent, and a log that is cut back to them.

Files and folders are written under a name that ends in `.partial`, flushed to the disk, and renamed; folders are
renamed before they are removed. A run may be killed at any moment: the next one finds the newest whole checkpoint.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError

from mnist_ddpm.training.arguments import require

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOG = "train_log.jsonl"
SAMPLES = "samples.png"
GRIDS = "samples"
PIPELINES = "pipelines"


class DamagedCheckpointError(ValueError):
    """A checkpoint that is not what was written."""


def check_output_dir(output_dir: Path, earlier_run_expected: bool) -> None:
    """Make the output folder, and see that it can be written to.

    Raises:
        OSError: it can't.
        ValueError: it holds an earlier run, unexpectedly.
    """
    with explain_write_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    earlier = _earlier_run(output_dir)
    require(
        earlier_run_expected or not earlier,
        "output_dir must not hold an earlier run",
        str(output_dir),
        f"There is {earlier[-1].name if earlier else ''}: resume with --resume_from_checkpoint latest, replace it "
        "with --overwrite_output_dir, or name another folder.",
    )


def remove_earlier_run(output_dir: Path) -> None:
    """Remove what an earlier run left, but for the trackers' logs.

    The log goes first: without it no checkpoint is the latest of a run. The checkpoints go last: as long as one is
    there, the folder is known to hold an earlier run.
    """
    files = [output_dir / name for name in (LOG, GRIDS, PIPELINES, SAMPLES, "model_index.json")]
    for path in [*files, *reversed(list_checkpoints(output_dir))]:
        remove(path)


def _earlier_run(output_dir: Path) -> list[Path]:
    """The files and folders that tell of an earlier run; an empty log tells of one that did not begin."""
    files = [output_dir / LOG, output_dir / PIPELINES, output_dir / "model_index.json"]
    return [path for path in files if path.exists() and path.stat().st_size] + list_checkpoints(output_dir)


def grid_path(output_dir: Path, step: int) -> Path:
    """Where the images that are sampled after a step are kept."""
    return output_dir / GRIDS / f"step-{step:08}.png"


def kept_pipeline_path(output_dir: Path, step: int) -> Path:
    """Where the pipeline as it was after a step is kept."""
    return output_dir / PIPELINES / f"step-{step:08}"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which then takes the place of `path`."""
    partial = partial_path(path)
    remove(partial)
    yield partial
    move_into_place(partial, path)


@contextmanager
def explain_write_errors(output_dir: Path) -> Iterator[None]:
    """Say in one error where something can't be written, why, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"output_dir must be writable, got {output_dir} ({error}). Make room, and resume from the last checkpoint "
            "with --resume_from_checkpoint latest, or name another folder."
        ) from error


def partial_path(path: Path) -> Path:
    """Where a file or a folder is while it is being written."""
    return path.with_name(path.name + ".partial")


def move_into_place(partial: Path, path: Path) -> None:
    """Flush a file or a folder to the disk, and rename it to `path`, where no folder may be."""
    flush(partial)
    os.replace(partial, path)
    flush(path.parent, recursive=False)


def replace_files(source: Path, target: Path, last: str) -> None:
    """Move all files of the folder `source` into the folder `target`, each in one move; the one named `last`, last."""
    flush(source)
    for path in sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.name == last):
        destination = target / path.relative_to(source)
        if not destination.parent.exists():
            destination.parent.mkdir(parents=True)
            flush(destination.parent.parent, recursive=False)
        os.replace(path, destination)
        flush(destination.parent, recursive=False)
    remove(source)


def flush(path: Path, recursive: bool = True) -> None:
    """Have a file, or a folder and all that it holds, written to the disk."""
    if os.name == "nt":  # Windows can't do so with folders, nor with files that are open for reading
        return
    paths = [path, *path.rglob("*")] if recursive and path.is_dir() else [path]
    for item in paths:
        descriptor = os.open(item, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; a folder is never seen with some of its files gone."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
    elif path.suffix == ".partial":
        shutil.rmtree(path)
    else:
        partial = partial_path(path)
        remove(partial)
        os.replace(path, partial)
        shutil.rmtree(partial)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def write_manifest(checkpoint: Path, step: int, settings: dict[str, Any], schedule: dict[str, Any]) -> None:
    """Record what a checkpoint holds: settings that a resumed run must share, a schedule that it may change, files."""
    files = {str(p.relative_to(checkpoint)): _digest(p) for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    manifest = {"step": step, "settings": settings, "schedule": schedule, "files": files}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole.

    Raises:
        DamagedCheckpointError: a file is missing, cut short or changed.
    """
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes())
        reason = ", ".join(name for name, digest in manifest["files"].items() if _digest(checkpoint / name) != digest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise DamagedCheckpointError(f"resume_from_checkpoint must be as it was written, got {checkpoint}: {reason}.")
    return manifest


def checkpoint_path(requested: str, output_dir: Path) -> Path:
    """The folder of a checkpoint: a path, or its name in the output folder, as in the scripts of diffusers."""
    path = Path(requested)
    return path if path.exists() or path.name != requested else output_dir / requested


def find_checkpoint(requested: str, output_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from, and its manifest.

    Args:
        requested: path of a checkpoint, or `"latest"` for the newest whole one whose steps are all in the log.
        output_dir: where to look for the latest; None is returned if there is no checkpoint at all.

    Raises:
        DamagedCheckpointError: it is missing or damaged; for `"latest"`, all are.
    """
    if requested != "latest":
        checkpoint = checkpoint_path(requested, output_dir)
        return checkpoint, read_manifest(checkpoint)

    last_logged = max(_logged_lines(output_dir / LOG), default=0)
    checkpoints = list_checkpoints(output_dir)
    for checkpoint in reversed(checkpoints):
        try:
            manifest = read_manifest(checkpoint)
        except DamagedCheckpointError as error:
            logger.warning("%s Skipping it.", error)
            continue
        if manifest["step"] <= last_logged:  # the log is flushed before a checkpoint is written
            return checkpoint, manifest
        logger.warning("Skipping %s: the log ends before it, at step %d.", checkpoint, last_logged)
    if checkpoints:
        raise DamagedCheckpointError(
            f"resume_from_checkpoint must find a whole checkpoint, got {output_dir}, where all "
            f"{len(checkpoints)} are damaged. Start anew with --overwrite_output_dir or another --output_dir."
        )
    return None


def check_settings(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """See that a run resumes with the settings that it began with."""
    for name, value in current.items():
        require(
            saved.get(name) == value,
            f"{name} must be {saved.get(name)!r} as in {checkpoint}",
            value,
            "Give the same, or start anew with another --output_dir.",
        )


def cut_back(output_dir: Path, step: int) -> None:
    """Remove what lies beyond the step that a run resumes from, and what was left half written."""
    for path in list_checkpoints(output_dir):
        if int(path.name.split("-")[1]) > step:
            logger.warning("Removing %s: the run resumes from step %s.", path, step)
            remove(path)
    for pattern in ("*.partial", f"{GRIDS}/*.partial", f"{PIPELINES}/*.partial"):
        for path in output_dir.glob(pattern):
            remove(path)
    for path in output_dir.glob(f"{PIPELINES}/step-*"):
        if path > kept_pipeline_path(output_dir, step):
            logger.warning("Removing %s: the run resumes from step %s.", path, step)
            remove(path)
    for path in output_dir.glob(f"{GRIDS}/step-*.png"):
        if path > grid_path(output_dir, step):
            remove(path)


def prune_checkpoints(output_dir: Path, total_limit: int | None) -> None:
    """Remove the oldest checkpoints beyond the limit."""
    if total_limit is not None:
        for checkpoint in list_checkpoints(output_dir)[:-total_limit]:
            remove(checkpoint)


def save_image(image: Image.Image, path: Path) -> None:
    """Save an image as PNG, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as partial:
        image.save(partial, format="PNG")


class TrainLog:
    """A JSON object a line for each step, in a file that is cut back to `step` when a run resumes there."""

    def __init__(self, path: Path, step: int = 0):
        lines = _logged_lines(path)
        with atomic_write(path) as partial:
            partial.write_bytes(b"".join(lines[logged] for logged in sorted(lines) if logged <= step))
        self.file = path.open("a", encoding="utf-8")

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append records."""
        self.file.writelines(json.dumps(record) + "\n" for record in records)
        self.file.flush()

    def flush(self) -> None:
        """Have all records written to the disk."""
        os.fsync(self.file.fileno())


def _logged_lines(path: Path) -> dict[int, bytes]:
    """The lines of a log by their steps, up to one that was cut short."""
    lines = {}
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            step = json.loads(line)["step"]
        except ValueError:
            break
        if line.endswith(b"\n"):
            lines[step] = line
    return lines


def _digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
