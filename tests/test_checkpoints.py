"""What a run leaves in its folder: whole or absent, and rejected by name where it is damaged."""

import json
import os
import shutil

import pytest

from mnist_ddpm.training.checkpoints import (
    DamagedCheckpointError,
    TrainLog,
    atomic_write,
    check_output_dir,
    check_settings,
    cut_back,
    find_checkpoint,
    grid_path,
    kept_pipeline_path,
    list_checkpoints,
    move_into_place,
    prune_checkpoints,
    read_manifest,
    remove_earlier_run,
    replace_files,
    write_manifest,
)


def make_checkpoint(output_dir, step):
    TrainLog(output_dir / "train_log.jsonl").write([{"step": done + 1} for done in range(step)])
    checkpoint = output_dir / f"checkpoint-{step}"
    (checkpoint / "unet").mkdir(parents=True)
    (checkpoint / "unet" / "weights").write_bytes(bytes(100))
    (checkpoint / "optimizer").write_bytes(b"state" * step)
    write_manifest(checkpoint, step, {"seed": 0}, {"max_train_steps": 100})
    return checkpoint


def names(paths):
    return [path.name for path in paths]


def test_manifest_of_a_whole_checkpoint(tmp_path):
    manifest = read_manifest(make_checkpoint(tmp_path, 3))
    assert (manifest["step"], manifest["settings"]) == (3, {"seed": 0})
    assert manifest["schedule"] == {"max_train_steps": 100}


@pytest.mark.parametrize("name", ["optimizer", "unet/weights", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "empty"])
def test_damage_of_each_kind_is_found(tmp_path, name, damage):
    checkpoint = make_checkpoint(tmp_path, 3)
    file = checkpoint / name
    content = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "changed":
            file.write_bytes(b"!" + content[1:])
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match="checkpoint-3"):
        read_manifest(checkpoint)


def test_latest_is_the_newest_whole_one(tmp_path, caplog):
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-200.partial").mkdir()
    (tmp_path / "checkpoint-100" / "optimizer").write_bytes(b"state")
    assert names(list_checkpoints(tmp_path)) == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    checkpoint, manifest = find_checkpoint("latest", tmp_path)
    assert checkpoint == tmp_path / "checkpoint-10"
    assert manifest["step"] == 10
    assert "checkpoint-100: optimizer. Skipping it." in caplog.text
    assert (tmp_path / "checkpoint-100").exists()


def test_latest_without_any_is_none_and_with_damaged_ones_only_an_error(tmp_path):
    assert find_checkpoint("latest", tmp_path) is None
    (make_checkpoint(tmp_path, 5) / "optimizer").unlink()
    with pytest.raises(DamagedCheckpointError, match="resume_from_checkpoint"):
        find_checkpoint("latest", tmp_path)


def test_a_named_checkpoint_must_be_there_and_whole(tmp_path):
    with pytest.raises(DamagedCheckpointError, match="resume_from_checkpoint"):
        find_checkpoint(str(tmp_path / "checkpoint-1"), tmp_path)
    other = make_checkpoint(tmp_path, 1)
    assert find_checkpoint(str(other), tmp_path) == (other, read_manifest(other))
    damaged = make_checkpoint(tmp_path, 2)
    (damaged / "optimizer").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint-2: .*optimizer"):
        find_checkpoint(str(damaged), tmp_path)


def test_other_settings_are_refused_with_both_values(tmp_path):
    check_settings({"seed": 0}, {"seed": 0}, tmp_path)
    with pytest.raises(ValueError, match=r"^seed must be 0 .*, got 1"):
        check_settings({"seed": 0}, {"seed": 1}, tmp_path)


def test_pruning_keeps_the_newest(tmp_path):
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    prune_checkpoints(tmp_path, None)
    assert len(list_checkpoints(tmp_path)) == 3
    prune_checkpoints(tmp_path, 2)
    assert names(list_checkpoints(tmp_path)) == ["checkpoint-10", "checkpoint-100"]


def test_going_on_from_a_step_removes_what_came_after_it(tmp_path):
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
        grid_path(tmp_path, step).parent.mkdir(exist_ok=True)
        grid_path(tmp_path, step).touch()
        kept_pipeline_path(tmp_path, step).mkdir(parents=True)
    (tmp_path / "pipelines" / "step-00000010.partial").mkdir()
    (tmp_path / "checkpoint-200.partial").mkdir()
    (tmp_path / "samples" / "step-00000012.png.partial").touch()
    cut_back(tmp_path, 10)
    assert sorted(names(tmp_path.iterdir())) == [
        "checkpoint-10",
        "checkpoint-9",
        "pipelines",
        "samples",
        "train_log.jsonl",
    ]
    assert sorted(names((tmp_path / "samples").iterdir())) == ["step-00000009.png", "step-00000010.png"]
    assert sorted(names((tmp_path / "pipelines").iterdir())) == ["step-00000009", "step-00000010"]


def test_latest_must_be_in_the_log(tmp_path, caplog):
    """What is left where the removal of an earlier run was cut off, which begins with the log, is not a run."""
    for step in (3, 6):
        make_checkpoint(tmp_path, step)
    TrainLog(tmp_path / "train_log.jsonl", 5)
    assert find_checkpoint("latest", tmp_path)[0] == tmp_path / "checkpoint-3"
    assert "checkpoint-6: the log ends before it, at step 5" in caplog.text
    (tmp_path / "train_log.jsonl").unlink()
    with pytest.raises(DamagedCheckpointError, match="resume_from_checkpoint"):
        find_checkpoint("latest", tmp_path)
    assert find_checkpoint(str(tmp_path / "checkpoint-6"), tmp_path)[0] == tmp_path / "checkpoint-6"


@pytest.mark.parametrize(
    "content", [b"\0" * 80, b"\xff\xfe", b"[]", b"3", b"{}", b'{"files": 3}', b'{"files": {"a": 0}}']
)
def test_manifest_that_is_something_else_is_damage(tmp_path, content):
    (make_checkpoint(tmp_path, 3) / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="checkpoint-3"):
        read_manifest(tmp_path / "checkpoint-3")


def test_what_is_written_atomically_takes_its_place_only_when_whole(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(target) as partial:  # noqa: PT012
        partial.write_text("ne")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    with atomic_write(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path.iterdir()) == ["file"]


def test_a_folder_does_not_take_the_place_of_another(tmp_path):
    """It would take two moves, and between them there would be neither."""
    for name, content in (("new", "new"), ("checkpoint-1", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).touch()
    with pytest.raises(OSError, match="checkpoint-1"):
        move_into_place(tmp_path / "new", tmp_path / "checkpoint-1")
    assert sorted(names(tmp_path.rglob("*"))) == ["checkpoint-1", "new", "new", "old"]
    move_into_place(tmp_path / "new", tmp_path / "checkpoint-2")
    assert names((tmp_path / "checkpoint-2").iterdir()) == ["new"]


def test_all_is_flushed_before_it_is_renamed_and_its_new_folder_afterwards(tmp_path, monkeypatch):
    partial = make_checkpoint(tmp_path, 3).rename(tmp_path / "checkpoint-3.partial")
    everything = {str(path) for path in (partial, *partial.rglob("*"))}
    events = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda file: (events.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr("os.replace", lambda *paths: (events.append(None), rename(*paths)))
    move_into_place(partial, tmp_path / "checkpoint-3")
    moved = events.index(None)
    assert set(events[:moved]) == everything
    assert events[moved + 1 :] == [str(tmp_path)]


def test_files_are_replaced_among_others_that_stay(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, text in ((source, "new"), (target, "old")):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "weights").write_text(text)
        (folder / "index").write_text(text)
    (target / "log").write_text("kept")
    replace_files(source, target, last="index")
    assert {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()} == {
        "unet/weights": "new",
        "index": "new",
        "log": "kept",
    }
    assert not source.exists()


def test_log_is_cut_back_and_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainLog(path, 0)
    log.write([{"step": step} for step in range(1, 6)])
    log.flush()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short
    TrainLog(path, 9)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    TrainLog(path, 3).write([{"step": 4, "loss": 0.5}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3},
        {"step": 4, "loss": 0.5},
    ]


def test_log_that_begins_later_is_cut_back_by_its_steps(tmp_path):
    """As that of a run that went on in a folder of its own."""
    path = tmp_path / "log.jsonl"
    TrainLog(path).write([{"step": step} for step in (11, 12, 13)])
    TrainLog(path, 12).write([{"step": 13, "loss": 0.5}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 11},
        {"step": 12},
        {"step": 13, "loss": 0.5},
    ]


def test_output_folder_is_made_and_must_be_writable(tmp_path):
    check_output_dir(tmp_path / "a" / "b", earlier_run_expected=False)
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="output_dir must be writable"):
        check_output_dir(tmp_path / "file" / "run", earlier_run_expected=False)


@pytest.mark.parametrize("name", ["train_log.jsonl", "model_index.json", "pipelines", "checkpoint-7"])
def test_earlier_run_is_refused_and_kept_unless_expected(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match=f"output_dir .*{name}"):
        check_output_dir(tmp_path, earlier_run_expected=False)
    check_output_dir(tmp_path, earlier_run_expected=True)
    assert (tmp_path / name).exists()
    remove_earlier_run(tmp_path)
    assert names(tmp_path.iterdir()) == ["photo.jpg"]


def test_empty_log_is_no_earlier_run(tmp_path):
    (tmp_path / "train_log.jsonl").touch()
    check_output_dir(tmp_path, earlier_run_expected=False)


def test_removal_of_an_earlier_run_may_be_cut_off_anywhere(tmp_path, monkeypatch):
    """What is left of the earlier run is never taken for the latest checkpoint of the one that replaces it."""

    class Cut(BaseException):
        pass

    def cut_off_after(operations, patch):
        left = iter(range(operations))

        def counted(do):
            def operation(*args, **kwargs):
                if next(left, None) is None:
                    raise Cut
                return do(*args, **kwargs)

            return operation

        for name, do in {"os.replace": os.replace, "os.unlink": os.unlink, "shutil.rmtree": shutil.rmtree}.items():
            patch.setattr(name, counted(do))

    for count in range(11):
        run = tmp_path / str(count)
        run.mkdir()
        for step in (3, 6):
            make_checkpoint(run, step)
        (run / "samples").mkdir()
        (run / "pipelines").mkdir()
        (run / "samples.png").touch()
        (run / "model_index.json").touch()
        with monkeypatch.context() as patch:
            cut_off_after(count, patch)
            with pytest.raises(Cut):
                remove_earlier_run(run)
        with pytest.raises(ValueError, match="output_dir"):
            check_output_dir(run, earlier_run_expected=False)
        if count == 0:
            assert find_checkpoint("latest", run)[0].name == "checkpoint-6"
        else:
            with pytest.raises(DamagedCheckpointError, match="resume_from_checkpoint"):
                find_checkpoint("latest", run)
