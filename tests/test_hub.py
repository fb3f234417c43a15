import contextlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from accelerate.state import AcceleratorState
from diffusers import AutoModel, DiffusionPipeline, DPMSolverMultistepScheduler
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.utils import _http
from loopback_hub import READER, USER, WRITER
from PIL import Image
from tiny_training import command_line, write_workplace

import mnist_ddpm
from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.hub import add_scores, check_repository, main, publish, publish_checkpoint, write_card
from mnist_ddpm.images import image_grid

REPO = f"{USER}/mnist-ddpm"
SOURCES = {"pipeline.py", "scheduler/schedulers.py", "unet/unet.py"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LAYOUT = SOURCES | {"README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS}


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    unet = MNISTUNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=8)
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return MNISTDDPMPipeline(unet=unet, scheduler=MNISTDDPMScheduler())


@pytest.fixture
def no_waits(monkeypatch):
    """Lets huggingface_hub try again at once; it still tries as often as it does."""
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe(latents=latents, num_inference_steps=2, noise_scale=0.0, output_type="pt").images


def same_images(first, second):
    # memory-mapped weights are not aligned, which changes the order of sums
    torch.testing.assert_close(images(first), images(second), atol=1e-4, rtol=0)


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# What is published


def test_saved_pipeline_is_self_contained(tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    assert files(tmp_path) == LAYOUT
    index = read_json(tmp_path / "model_index.json")
    assert index["_class_name"] == ["pipeline", "MNISTDDPMPipeline"]
    assert index["scheduler"] == ["schedulers", "MNISTDDPMScheduler"]
    assert index["unet"] == ["unet", "MNISTUNet2DModel"]
    package = Path(mnist_ddpm.__file__).parent
    for source in SOURCES:
        assert (tmp_path / source).read_bytes() == (package / Path(source).name).read_bytes()


def test_classes_of_others_are_saved_as_diffusers_does(tmp_path, pipe):
    class OwnUNet(MNISTUNet2DModel):
        pass

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "scheduler")
    assert files(tmp_path / "scheduler") == LAYOUT - {"scheduler/schedulers.py"}
    assert isinstance(MNISTDDPMPipeline.from_pretrained(tmp_path / "scheduler").scheduler, DPMSolverMultistepScheduler)
    pipe.unet = OwnUNet.from_config(pipe.unet.config)
    pipe.save_pretrained(tmp_path / "unet")
    assert files(tmp_path / "unet") == LAYOUT - {"scheduler/schedulers.py", "unet/unet.py"}
    index = read_json(tmp_path / "unet" / "model_index.json")
    assert index["unet"] == [__name__, "OwnUNet"]
    assert "auto_map" not in index | read_json(tmp_path / "unet" / "unet" / "config.json")


def test_every_way_of_publishing_writes_the_same(hub, tmp_path, monkeypatch, pipe):
    folder = tmp_path / "trained"
    for extra in ("checkpoint-5/optimizer.bin", "checkpoint-5/model.safetensors", "logs/events", "train_log.jsonl"):
        (folder / extra).parent.mkdir(parents=True, exist_ok=True)
        (folder / extra).write_text("not to be published")
    pipe.save_pretrained(folder)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    pipe.save_pretrained(folder, push_to_hub=True, repo_id="by-path")
    pipe.save_pretrained(str(folder), push_to_hub=True, repo_id="by-text")
    pipe.save_pretrained(tmp_path / "by-name", push_to_hub=True)
    pipe.push_to_hub("by-push")  # from a temporary folder
    publish(folder, f"{USER}/by-publish")
    main([str(folder), "by-command"])
    for repo in ("by-path", "by-text", "by-name", "by-push", "by-publish", "by-command"):
        published = hub.files(f"{USER}/{repo}")
        assert set(published) - {".gitattributes"} == LAYOUT
        assert not [name for name in published if str(tmp_path).encode() in published[name]]
        for name in LAYOUT - {"README.md"}:
            assert published[name] == (folder / name).read_bytes()
        card = (folder / "README.md").read_text().replace("namespace/name", f"{USER}/{repo}")
        assert published["README.md"].decode() == card


def test_card_tells_of_the_training_and_neither_of_tokens_nor_of_folders(hub, tmp_path, pipe):
    secret = "hf_" + "x" * 34
    MNISTDDPMPipeline(**pipe.components, id2label={0: "zero", 1: "one"}).save_pretrained(tmp_path)
    (tmp_path / "samples.png").write_bytes(b"picture")
    command = ["accelerate", "launch", "/home/me/train.py", "--hub_token", WRITER, "--seed", "0", f"--token={WRITER}"]
    command += [secret, "--output_dir=/home/me/trained", "--cache_dir", "/home/me/cache"]
    parameters = {"learning_rate": 1e-3, "output_dir": "/home/me/trained", "hub_token": WRITER, "note": f"({secret})"}
    write_card(tmp_path, dataset="ylecun/mnist", command=command, parameters=parameters)
    publish(tmp_path, REPO, token=WRITER)
    assert set(hub.files(REPO)) == LAYOUT | {"samples.png", ".gitattributes"}
    text = hub.files(REPO)["README.md"].decode()
    assert not [word for word in (WRITER, secret, "/home/me") if word in text]
    for line in (
        "accelerate launch train.py --seed 0 hf_... --output_dir=trained --cache_dir cache\n",
        *("| learning_rate | 0.001 |", "| output_dir | trained |", "![Samples](samples.png)", 'class_labels="zero"'),
    ):
        assert line in text
    data = ModelCard(text).data
    assert (data.datasets, data.tags) == (["ylecun/mnist"], ["diffusion", "ddpm", "ddim", "class-conditional"])


def test_scores_get_into_the_card_and_into_the_model_index(hub, tmp_path, monkeypatch, pipe):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    folder, scores = tmp_path / "trained", tmp_path / "scores.json"
    pipe.save_pretrained(folder)
    write_card(folder, dataset="ylecun/mnist")
    add_scores(folder, {"fid": 9.0, "outdated": 1})
    result = {"scores": {"fid": 1.25, "precision": 0.875, "class_shares": [0.1] * 10}, "command": "python /x/score.py"}
    scores.write_text(json.dumps(result))
    main([str(folder), REPO, "--scores", str(scores)])
    text = hub.files(REPO)["README.md"].decode()
    assert "| fid | 1.25 |\n| precision | 0.875 |\n\n```bash\npython score.py\n```" in text
    assert (text.count("## Evaluation"), text.count("outdated")) == (1, 0)
    data = ModelCard(text).data
    measured = [(r.dataset_type, r.metric_type, r.metric_value) for r in data.eval_results]
    assert (data.model_name, measured) == (
        *(REPO, [("ylecun/mnist", "fid", 1.25), ("ylecun/mnist", "precision", 0.875)]),
    )
    for words in ([str(folder), REPO, "--scores", "missing.json"], [str(tmp_path), REPO]):
        with pytest.raises(SystemExit, match=r"error: .*No such file"):
            main(words)


def test_a_card_on_the_hub_stays_unless_the_folder_has_one_of_its_own(hub, tmp_path, pipe):
    pipe.push_to_hub(REPO, token=WRITER)
    hub.repos["models", REPO].commit(hub.files(REPO) | {"README.md": b"---\n---\nwritten on the Hub"})
    pipe.push_to_hub(REPO, token=WRITER)
    assert hub.files(REPO)["README.md"].endswith(b"written on the Hub")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nwritten here, namespace/name")
    pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id=REPO, token=WRITER)
    assert hub.files(REPO)["README.md"].decode().endswith(f"written here, {REPO}")


def run_python(code, *arguments, **environment):
    """Run some code in a new process."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_text_is_utf_8_whatever_the_locale(tmp_path):
    """As on Windows: the card of a data set with a column in Chinese, and a pipeline saved and loaded."""
    code = """
import locale, sys, torch
from mnist_ddpm import MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.hub import add_scores, write_card
assert locale.getencoding() != "UTF-8"
unet = MNISTUNet2DModel(sample_size=8, block_out_channels=(8, 16), attention_head_dim=8)
MNISTDDPMPipeline(unet=unet, scheduler=MNISTDDPMScheduler()).save_pretrained(sys.argv[1])
write_card(sys.argv[1], parameters={"image_column": chr(0x56fe)}, command=["train.py", chr(0xdce9)])  # no Unicode
add_scores(sys.argv[1], {"fid": 1.5})
MNISTDDPMPipeline.from_pretrained(sys.argv[1])
"""
    run_python(code, tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| image_column | \u56fe |" in text
    assert "train.py '\\udce9'" in text


# Who can load it


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["plugin", "remote code"])
def test_dtype_variant_shards_and_revision(hub, pipe, trust):
    load = (DiffusionPipeline if trust else MNISTDDPMPipeline).from_pretrained
    pipe.push_to_hub(REPO, token=WRITER, max_shard_size="50KB")
    assert len([name for name in hub.files(REPO) if name.endswith(".safetensors")]) > 1
    revision = hub.repos["models", REPO].commits[-1][0]
    loaded = load(REPO, revision=revision, **trust)
    same_images(loaded, pipe)
    if not trust:
        assert [type(part) for part in (loaded, loaded.unet, loaded.scheduler)] == [
            *(MNISTDDPMPipeline, MNISTUNet2DModel, MNISTDDPMScheduler)
        ]
    assert load(REPO, dtype=torch.bfloat16, **trust).unet.dtype is torch.bfloat16
    pipe.unet.half()
    pipe.push_to_hub(REPO, token=WRITER, variant="fp16")
    loaded = load(REPO, variant="fp16", dtype=torch.float16, device_map="cpu", **trust)
    assert loaded.unet.dtype is torch.float16
    assert loaded.hf_device_map == "cpu"
    unet = MNISTUNet2DModel.from_pretrained(REPO, subfolder="unet", variant="fp16", dtype=torch.float16)
    assert unet.dtype is torch.float16
    assert MNISTDDIMScheduler.from_pretrained(REPO, subfolder="scheduler").betas.equal(pipe.scheduler.betas)


def python_blocks(card):
    """The Python code of a card, with fewer steps."""
    blocks = re.findall(r"```python\n(.*?)```", card.decode(), flags=re.DOTALL)
    return [block.replace("num_inference_steps=50", "num_inference_steps=2") for block in blocks]


@pytest.mark.parametrize("learned", [False, True], ids=["fixed variance", "learned variance"])
def test_code_of_the_card_runs(hub, learned, pipe):
    if learned:
        unet = MNISTUNet2DModel.from_config(pipe.unet.config, out_channels=2)
        pipe = MNISTDDPMPipeline(unet=unet, scheduler=MNISTDDPMScheduler(variance_type="learned_range"))
    pipe.push_to_hub(REPO, token=WRITER)
    blocks = python_blocks(hub.files(REPO)["README.md"])
    assert len(blocks) == 3
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("diffusers", "apache-2.0")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    for block in blocks:
        results = {}
        exec(block, results)
        assert len(results["images"]) == 16 if "images" in results else results["unet"].num_parameters() > 0


def test_auto_model_finds_the_unet(hub, tmp_path, pipe):
    pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id=REPO, token=WRITER)
    for place, subfolder in ((str(tmp_path), "unet"), (REPO, "unet"), (str(tmp_path / "unet"), None)):
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModel.from_pretrained(place, subfolder=subfolder)
        unet = AutoModel.from_pretrained(place, subfolder=subfolder, trust_remote_code=True)
        assert type(unet).__name__ == "MNISTUNet2DModel"
        torch.testing.assert_close(dict(unet.state_dict()), dict(pipe.unet.state_dict()), atol=0, rtol=0)


def test_loads_from_the_cache_without_a_network(hub, no_waits, pipe):
    pipe.push_to_hub(REPO, token=WRITER)
    MNISTDDPMPipeline.from_pretrained(REPO, force_download=True)
    folder = snapshot_download(REPO, force_download=True)
    with hub.refusing_connections():
        same_images(MNISTDDPMPipeline.from_pretrained(REPO), pipe)
        same_images(MNISTDDPMPipeline.from_pretrained(REPO, local_files_only=True), pipe)
        same_images(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True), pipe)


def test_private_repositories_need_a_token(hub, pipe):
    secret = f"{USER}/secret"
    pipe.push_to_hub(secret, token=WRITER, private=True)
    for token in (None, "hf_wrongToken"):
        with pytest.raises(OSError, match=f"cannot load '{secret}' from the Hub: check the name, the token") as error:
            MNISTDDPMPipeline.from_pretrained(secret, token=token)
        assert "hf_wrongToken" not in str(error.value)
    same_images(MNISTDDPMPipeline.from_pretrained(secret, token=READER), pipe)


def test_repository_saved_by_an_earlier_version_gives_the_images_that_it_gave(hub):
    folder = Path(__file__).parent / "saved-by-0.1.0"
    hub.add(REPO, files={name: (folder / name).read_bytes() for name in files(folder)})
    expected = np.asarray(Image.open(folder / "samples.png"), dtype=int)
    assert expected.std() > 10
    for pipe in (MNISTDDPMPipeline.from_pretrained(folder), MNISTDDPMPipeline.from_pretrained(REPO)):
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        grid = image_grid(pipe(batch_size=4, generator=generators, num_inference_steps=5).images)
        assert np.abs(np.asarray(grid, dtype=int) - expected).max() <= 1  # of 255, for another order of sums


# Safe


def test_remote_code_runs_only_where_it_is_trusted(hub, tmp_path, pipe):
    local, trace = tmp_path / "local", tmp_path / "trace"
    pipe.save_pretrained(local)
    for name in SOURCES:
        (local / name).write_text(f"open({str(trace)!r}, 'w')")
    hub.add(REPO, files={name: (local / name).read_bytes() for name in files(local)})
    for place in (REPO, local):
        MNISTDDPMPipeline.from_pretrained(place)
        MNISTUNet2DModel.from_pretrained(place, subfolder="unet")
        MNISTDDPMScheduler.from_pretrained(place, subfolder="scheduler")
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(place)
    assert not trace.exists()
    with contextlib.suppress(AttributeError):  # the code defines no pipeline
        DiffusionPipeline.from_pretrained(local, trust_remote_code=True)
    assert trace.exists()


class Trap:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}, {"variant": "fp16"}], ids=str)
def test_pickled_weights_are_rejected_on_every_way_in(hub, tmp_path, pipe, options):
    folder, trace = tmp_path / "pickled", tmp_path / "trace"
    pipe.save_pretrained(folder)
    (folder / WEIGHTS).unlink()
    pipe.unet.save_pretrained(folder / "unet", safe_serialization=False, **options)
    pickles = list((folder / "unet").glob("*.bin"))
    for path in pickles:
        torch.save(Trap(trace), path)
    hub.add(REPO, files={name: (folder / name).read_bytes() for name in files(folder)})
    variant = {name: value for name, value in options.items() if name == "variant"}
    ways = [
        (MNISTDDPMPipeline.from_pretrained, {}),
        (MNISTUNet2DModel.from_pretrained, {"subfolder": "unet"}),
        (DiffusionPipeline.from_pretrained, {"trust_remote_code": True}),
    ]
    for place, (load, more) in itertools.product((REPO, folder), ways):
        for safe in ({}, {"use_safetensors": False}):
            with pytest.raises((OSError, ValueError), match=r"safetensors|no such modeling files"):
                load(place, **variant, **more, **safe)
    pickles[0].rename(folder / "unet" / "diffusion_pytorch_model.bin")
    pipe.unet.save_pretrained(folder / "unet")  # beside safetensors pickles are left alone
    for load in (MNISTDDPMPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        same_images(load(folder, trust_remote_code=True), pipe)
    assert not trace.exists()
    torch.load(folder / "unet" / "diffusion_pytorch_model.bin", weights_only=False)
    assert trace.exists()
    with pytest.raises(ValueError, match="safe_serialization"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)


# Faults


def command_of(error, folder):
    """The arguments of the command that an error of a push advises to run."""
    message = str(error.value)
    assert message.startswith(f"cannot push to the repository '{REPO}': ")
    assert WRITER not in message
    advice = f"The pipeline is safe in {folder}; push it again (set HF_TOKEN first) with: "
    python, module, name, *arguments = shlex.split(message.splitlines()[-1].removeprefix(advice))
    assert (python, module, name, *arguments) == (sys.executable, "-m", "mnist_ddpm.hub", str(folder), REPO)
    return arguments


def test_check_repository_creates_it_and_returns_its_full_name(hub):
    assert check_repository("mnist-ddpm", token=WRITER, private=True) == REPO
    assert hub.repos["models", REPO].private
    assert check_repository(REPO, token=WRITER) == REPO
    assert set(hub.files(REPO)) == {".gitattributes"}


@pytest.mark.parametrize(
    ("repo_id", "token", "remedy"),
    [
        (REPO, None, "token is missing, wrong or expired"),
        (REPO, "hf_wrongToken", "token is missing, wrong or expired"),
        (REPO, READER, "token may not write there"),
        ("somebody/theirs", WRITER, "token may not write there"),
        ("a/b/c", WRITER, "Repo id must be in the form"),
    ],
)
def test_wrong_token_or_name_is_found_before_the_training(hub, repo_id, token, remedy):
    hub.add("somebody/theirs")
    with pytest.raises(RuntimeError, match=rf"cannot push to the repository '{repo_id}': .*{remedy}") as error:
        check_repository(repo_id, token=token)
    assert str(token) not in str(error.value)
    assert error.value.__suppress_context__


@pytest.mark.parametrize(
    ("endpoint", "kind"),
    [
        *(("create", 401), ("resolve", 500), ("validate_yaml", "drop"), ("preupload", "cut"), ("lfs_batch", 401)),
        *(("lfs_put", kind) for kind in (500, "drop")),
        *(("commit", kind) for kind in (401, 500, "drop", "cut")),
    ],
)
def test_a_push_that_fails_says_what_to_do_and_leaves_the_pipeline(
    hub, no_waits, tmp_path, monkeypatch, pipe, endpoint, kind
):
    pipe.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in LAYOUT - {"README.md"}}
    with hub.fault(endpoint, kind), pytest.raises(RuntimeError) as error:
        publish(tmp_path, REPO, token=WRITER)
    assert hub.requests[endpoint]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    monkeypatch.setenv("HF_TOKEN", WRITER)
    main(command_of(error, tmp_path))
    assert set(hub.files(REPO)) == LAYOUT | {".gitattributes"}
    same_images(MNISTDDPMPipeline.from_pretrained(REPO, force_download=True), pipe)


def test_refused_connections(hub, no_waits, tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    with hub.refusing_connections():
        for call in (lambda: check_repository(REPO, token=WRITER), lambda: publish(tmp_path, REPO, token=WRITER)):
            with pytest.raises(RuntimeError, match="could not be reached or broke off: check the network") as error:
                call()
        command_of(error, tmp_path)
        with pytest.raises(OSError, match=r"cannot load 'user/never-seen' from the Hub: .*the network"):
            MNISTDDPMPipeline.from_pretrained(f"{USER}/never-seen")


@pytest.mark.parametrize(("endpoint", "kind"), [("info", 401), ("tree", 500), ("resolve", "drop"), ("resolve", "cut")])
def test_a_download_that_fails_names_the_repository(hub, no_waits, pipe, endpoint, kind):
    repo = f"{USER}/{endpoint}-{kind}"  # not in the cache
    pipe.push_to_hub(repo, token=WRITER)
    message = f"cannot load '{repo}' from the Hub: check the name"
    with hub.fault(endpoint, kind), pytest.raises(OSError, match=message) as error:
        MNISTDDPMPipeline.from_pretrained(repo, token=READER)
    assert READER not in str(error.value)
    same_images(MNISTDDPMPipeline.from_pretrained(repo), pipe)


# Training


@pytest.fixture
def trained(tmp_path):
    """Train on a few images, for two steps unless flags say otherwise, and publish; returns the output folder."""
    write_workplace(tmp_path)

    def run(*flags, output_dir=tmp_path / "trained"):
        AcceleratorState._reset_state(reset_partial_state=True)
        push = ["--push_to_hub", "--hub_model_id", REPO, f"--hub_token={WRITER}"]
        options = {"max_train_steps": 2, "lr_scheduler": "constant", "output_dir": output_dir}
        train.main(train.parse_args(command_line(tmp_path, *push, *flags, **options)))
        return output_dir

    return run


def test_card_of_a_training_run_and_neither_token_nor_folder(hub, trained, tmp_path, caplog, capfd):
    folder = trained("--seed", 3, "--logger", "tensorboard", "--hub_strategy", "all_checkpoints")
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(WRITER.encode() in content for content in [*hub.files(REPO).values(), *written])
    assert not any(str(tmp_path).encode() in content for content in hub.files(REPO).values())
    assert WRITER not in caplog.text + "".join(capfd.readouterr())
    assert hub.files(REPO)["samples.png"] == (folder / "samples.png").read_bytes()
    text = hub.files(REPO)["README.md"].decode()
    (command,) = re.findall(r"```bash\n(.*)\n```", text)
    words = shlex.split(command)
    assert words[:3] == ["accelerate", "launch", "examples/train.py"]
    args = train.parse_args(words[3:])
    assert (args.seed, args.dataset_name, args.max_train_steps) == (3, "images", 2)
    for name in ("seed", "learning_rate", "ddpm_beta_schedule"):
        assert f"| {name} | {getattr(args, name)} |" in text


@pytest.mark.parametrize(
    ("strategy", "expected"), [("end", set()), ("all_checkpoints", {"checkpoint-1", "checkpoint-2"})]
)
def test_checkpoints_are_published_where_asked(hub, trained, strategy, expected):
    folder = trained("--hub_strategy", strategy, "--checkpointing_steps", 1)
    published = hub.files(REPO)
    own = LAYOUT | {"samples.png", ".gitattributes"}
    assert {name.partition("/")[0] for name in set(published) - own} == expected
    for name in expected:
        for path in files(folder / name):
            assert published[f"{name}/{path}"] == (folder / name / path).read_bytes()
    requests = hub.requests["resolve"]
    MNISTDDPMPipeline.from_pretrained(REPO)
    assert hub.requests["resolve"] - requests <= 2 * len(LAYOUT), "checkpoints are not downloaded with the pipeline"


def test_a_checkpoint_on_the_hub_is_replaced_whole(hub, tmp_path):
    hub.add(REPO, files={"last-checkpoint/outdated.pkl": b"", "kept.txt": b""})
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    message = f"token may not write there.*\nThe checkpoint is safe in {checkpoint}"
    with hub.fault("commit", 403), pytest.raises(RuntimeError, match=message):
        publish_checkpoint(checkpoint, REPO, "last-checkpoint", token=WRITER)
    publish_checkpoint(checkpoint, REPO, "last-checkpoint", token=WRITER)
    assert set(hub.files(REPO)) == {".gitattributes", "kept.txt", "last-checkpoint/model.safetensors"}


def test_a_run_goes_on_from_the_checkpoint_on_the_hub(hub, trained, tmp_path):
    trained("--hub_strategy", "checkpoint")
    elsewhere = tmp_path / "elsewhere"
    snapshot_download(REPO, allow_patterns="last-checkpoint/*", local_dir=elsewhere)
    more = ("--max_train_steps", 4)
    resumed = trained(*more, "--resume_from_checkpoint", elsewhere / "last-checkpoint", output_dir=elsewhere)
    undisturbed = trained(*more, output_dir=tmp_path / "undisturbed")
    assert (resumed / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()


def test_training_outlives_a_hub_in_trouble(hub, no_waits, trained, tmp_path, caplog, monkeypatch):
    with hub.fault("commit", 500), pytest.raises(RuntimeError) as error:
        trained("--hub_strategy", "checkpoint", "--checkpointing_steps", 1)
    arguments = command_of(error, tmp_path / "trained")
    warning = f"Training continues, but cannot push to the repository '{REPO}': the Hub is in trouble"
    assert caplog.text.count(warning) == 2
    assert WRITER not in caplog.text
    monkeypatch.setenv("HF_TOKEN", WRITER)
    main(arguments)
    assert hub.files(REPO)[WEIGHTS] == (tmp_path / "trained" / WEIGHTS).read_bytes()
    assert "--max_train_steps 2" in hub.files(REPO)["README.md"].decode()


WITHOUT_THE_PLUGIN = """
import os, sys
sys.modules["mnist_ddpm"] = None  # an import of it fails
import torch
from diffusers import DiffusionPipeline
repo, folder, again, result, code = sys.argv[1:]
exec(code)
def images(place):
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    assert type(pipe).__name__ == "MNISTDDPMPipeline", type(pipe)
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe(latents=latents, num_inference_steps=2, noise_scale=0.0, output_type="pt").images
loaded = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
loaded.save_pretrained(folder)
loaded.push_to_hub(again)
torch.save([images(repo), images(folder), images(again)], result)
"""


@pytest.mark.slow
def test_what_training_publishes_loads_in_a_new_process_without_the_plugin(hub, trained, tmp_path):
    folder = trained()
    published = hub.files(REPO)
    assert set(published) == LAYOUT | {"samples.png", ".gitattributes"}
    assert published[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    (code,) = [block for block in python_blocks(published["README.md"]) if "trust_remote_code" in block]
    saved, again, result = tmp_path / "saved", f"{USER}/again", tmp_path / "result"
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
    run_python(WITHOUT_THE_PLUGIN, REPO, saved, again, result, code, **environment)
    assert files(saved) == LAYOUT - {"README.md"}
    assert set(hub.files(again)) == LAYOUT | {".gitattributes"}
    expected = images(MNISTDDPMPipeline.from_pretrained(folder))
    loaded = [images(MNISTDDPMPipeline.from_pretrained(place)) for place in (saved, again)]
    for sampled in [*loaded, *torch.load(result)]:
        torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=0)
