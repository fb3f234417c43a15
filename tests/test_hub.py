import ast
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel
from huggingface_hub import ModelCard
from huggingface_hub.utils import _http
from loopback_hub import READER, USER, WRITER
from PIL import Image

import mnist_ddpm
from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler, MNISTUNet2DModel
from mnist_ddpm.hub import check_repository, main, publish, write_card
from mnist_ddpm.images import image_grid

REPO = f"{USER}/mnist-ddpm"
SOURCES = {"pipeline.py", "scheduler/schedulers.py", "unet/unet.py"}
EXAMPLES = Path(__file__).parent.parent / "examples"
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


def python(code, *arguments, **environment):
    """Run code in a new process; returns what it prints."""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# What is published


def test_saved_pipeline_is_self_contained(tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    assert files(tmp_path) == LAYOUT
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "MNISTDDPMPipeline"]
    assert index["scheduler"] == ["schedulers", "MNISTDDPMScheduler"]
    assert index["unet"] == ["unet", "MNISTUNet2DModel"]
    package = Path(mnist_ddpm.__file__).parent
    for source in SOURCES:
        assert (tmp_path / source).read_text() == (package / Path(source).name).read_text()


@pytest.mark.parametrize("source", ["pipeline.py", "schedulers.py", "unet.py"])
def test_source_files_stand_alone(source):
    tree = ast.parse((Path(mnist_ddpm.__file__).parent / source).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(getattr(node, "level", 0) for node in imports)
    modules = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert not any(module.split(".")[0] == "mnist_ddpm" for module in modules)


def test_no_local_path_is_saved(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "first")
    loaded = MNISTDDPMPipeline.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    for name in LAYOUT - {WEIGHTS}:
        assert str(tmp_path) not in (tmp_path / "second" / name).read_text()


def test_schedulers_of_diffusers_need_no_copy(tmp_path, pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    assert files(tmp_path) == LAYOUT - {"scheduler/schedulers.py"}
    assert isinstance(MNISTDDPMPipeline.from_pretrained(tmp_path).scheduler, DPMSolverMultistepScheduler)


def test_own_unets_are_saved_as_diffusers_does(tmp_path, pipe):
    class OwnUNet(MNISTUNet2DModel):
        pass

    pipe.unet = OwnUNet.from_config(pipe.unet.config)
    pipe.save_pretrained(tmp_path)
    assert files(tmp_path) == LAYOUT - {"unet/unet.py"}
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == [__name__, "OwnUNet"]


def test_every_way_of_pushing_uploads_the_same(hub, tmp_path, pipe):
    folder = tmp_path / "trained"
    for extra in ("checkpoint-5/optimizer.bin", "checkpoint-5/unet/model.safetensors", "logs/events", "loss.jsonl"):
        (folder / extra).parent.mkdir(parents=True, exist_ok=True)
        (folder / extra).write_text("not to be published")
    pipe.save_pretrained(folder, push_to_hub=True, repo_id="by-save", token=WRITER)
    pipe.save_pretrained(str(tmp_path / "by-name"), push_to_hub=True, token=WRITER)
    pipe.push_to_hub(f"{USER}/by-push", token=WRITER)
    publish(folder, "by-publish", token=WRITER)
    for repo in ("by-save", "by-name", "by-push", "by-publish"):
        published = hub.files(f"{USER}/{repo}")
        assert set(published) - {".gitattributes"} == LAYOUT
        for name in LAYOUT - {"README.md"}:
            assert published[name] == (folder / name).read_bytes()


def test_card_has_valid_metadata_and_the_repository_in_its_code(hub, pipe):
    pipe.push_to_hub(REPO, token=WRITER)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.license == "apache-2.0"
    assert card.text.count(f'"{REPO}"') == 4
    assert "namespace/name" not in card.text


def test_card_tells_of_training_and_scores_and_neither_tokens_nor_folders(hub, tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "samples.png").write_bytes(b"picture")
    write_card(
        tmp_path,
        dataset="ylecun/mnist",
        command=[
            "accelerate",
            "launch",
            "/home/me/train.py",
            "--hub_token",
            WRITER,
            "--seed",
            "0",
            f"--token={WRITER}",
        ],
        parameters={"learning_rate": 1e-3, "output_dir": "/home/me/trained", "hub_token": WRITER},
        scores={"fid": 1.25, "precision": 0.875},
    )
    publish(tmp_path, REPO, token=WRITER)
    assert set(hub.files(REPO)) == LAYOUT | {"samples.png", ".gitattributes"}
    text = hub.files(REPO)["README.md"].decode()
    assert WRITER not in text
    assert "/home/me" not in text
    assert "accelerate launch train.py --seed 0\n" in text
    assert "| learning_rate | 0.001 |" in text
    assert "| output_dir | trained |" in text
    assert "![Samples](samples.png)" in text
    assert "| fid | 1.25 |" in text
    data = ModelCard(text).data
    assert data.datasets == ["ylecun/mnist"]
    assert data.model_name == REPO
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "fid": 1.25,
        "precision": 0.875,
    }


def test_a_card_on_the_hub_stays_unless_the_folder_has_one_of_its_own(hub, tmp_path, pipe):
    pipe.push_to_hub(REPO, token=WRITER)
    hub.repos["models", REPO].commit(hub.files(REPO) | {"README.md": b"---\n---\nwritten on the Hub"})
    pipe.push_to_hub(REPO, token=WRITER)
    assert hub.files(REPO)["README.md"].endswith(b"written on the Hub")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nwritten here, namespace/name")
    pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id=REPO, token=WRITER)
    assert hub.files(REPO)["README.md"].decode().endswith(f"written here, {REPO}")


# Who can load it


def test_loads_with_the_plugin_and_no_trust(hub, pipe):
    pipe.push_to_hub(REPO, token=WRITER)
    loaded = MNISTDDPMPipeline.from_pretrained(REPO)
    assert type(loaded) is MNISTDDPMPipeline
    assert type(loaded.unet) is MNISTUNet2DModel
    assert type(loaded.scheduler) is MNISTDDPMScheduler
    same_images(loaded, pipe)


def test_components_can_be_replaced_on_loading(hub, pipe):
    pipe.push_to_hub(REPO, token=WRITER)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    loaded = MNISTDDPMPipeline.from_pretrained(REPO, unet=unet, scheduler=DDIMScheduler())
    assert loaded.unet is unet
    assert isinstance(loaded.scheduler, DDIMScheduler)
    assert loaded(num_inference_steps=2).images[0].size == (8, 8)


def test_dtype_variant_and_device_map(hub, pipe):
    pipe.push_to_hub(REPO, token=WRITER)
    pipe.unet.half()
    pipe.push_to_hub(REPO, token=WRITER, variant="fp16")
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert {WEIGHTS, half} < set(hub.files(REPO))
    assert MNISTDDPMPipeline.from_pretrained(REPO).unet.dtype is torch.float32
    assert MNISTDDPMPipeline.from_pretrained(REPO, dtype=torch.bfloat16).unet.dtype is torch.bfloat16
    loaded = MNISTDDPMPipeline.from_pretrained(REPO, variant="fp16", dtype=torch.float16, device_map="cpu")
    assert loaded.unet.dtype is torch.float16
    assert loaded.hf_device_map == "cpu"


def test_components_load_by_themselves(hub, pipe):
    pipe.push_to_hub(REPO, token=WRITER)
    unet = MNISTUNet2DModel.from_pretrained(REPO, subfolder="unet")
    torch.testing.assert_close(dict(unet.state_dict()), dict(pipe.unet.state_dict()), atol=0, rtol=0)
    for scheduler in (MNISTDDPMScheduler, MNISTDDIMScheduler):
        loaded = scheduler.from_pretrained(REPO, subfolder="scheduler")
        torch.testing.assert_close(loaded.betas, pipe.scheduler.betas, atol=0, rtol=0)


def test_code_of_the_card_runs(hub, pipe):
    pipe.push_to_hub(REPO, token=WRITER)
    blocks = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        results = {}
        exec(block.replace("num_inference_steps=50", "num_inference_steps=2"), results)
        assert len(results["images"]) == 16 if "images" in results else results["unet"].num_parameters() > 0


def test_loads_from_the_cache_without_a_network(hub, pipe):
    pipe.push_to_hub(REPO, token=WRITER)
    MNISTDDPMPipeline.from_pretrained(REPO)
    with hub.refusing_connections():
        same_images(MNISTDDPMPipeline.from_pretrained(REPO), pipe)
        same_images(MNISTDDPMPipeline.from_pretrained(REPO, local_files_only=True), pipe)


def test_loads_from_a_revision(hub, pipe):
    pipe.push_to_hub(REPO, token=WRITER)
    revision = hub.repos["models", REPO].commits[-1][0]
    expected = images(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    pipe.push_to_hub(REPO, token=WRITER)
    same_images(MNISTDDPMPipeline.from_pretrained(REPO), pipe)
    torch.testing.assert_close(
        images(MNISTDDPMPipeline.from_pretrained(REPO, revision=revision)), expected, atol=1e-4, rtol=0
    )
    with pytest.raises(OSError, match="no such revision"):
        MNISTDDPMPipeline.from_pretrained(REPO, revision="missing")


def test_private_repositories_need_a_token(hub, pipe):
    pipe.push_to_hub(REPO, token=WRITER, private=True)
    same_images(MNISTDDPMPipeline.from_pretrained(REPO, token=READER, force_download=True), pipe)
    other = f"{USER}/secret"
    pipe.push_to_hub(other, token=WRITER, private=True)
    with pytest.raises(OSError, match=other):
        MNISTDDPMPipeline.from_pretrained(other)


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
    pipe.push_to_hub(REPO, token=WRITER)
    trace = tmp_path / "trace"
    evil = {name: f"open({str(trace)!r}, 'w')".encode() for name in SOURCES}
    hub.repos["models", REPO].commit(hub.files(REPO) | evil)
    MNISTDDPMPipeline.from_pretrained(REPO)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(REPO)
    local = tmp_path / "local"
    pipe.save_pretrained(local)
    for name, code in evil.items():
        (local / name).write_bytes(code)
    MNISTDDPMPipeline.from_pretrained(local)
    assert not trace.exists()


def test_pickled_weights_are_refused(hub, tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(pipe.unet.state_dict(), tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MNISTDDPMPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`use_safetensors` must be True"):
        MNISTDDPMPipeline.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match="`safe_serialization` must be True"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)

    pipe.push_to_hub(REPO, token=WRITER)
    published = {name: content for name, content in hub.files(REPO).items() if name != WEIGHTS}
    pickle = {"unet/diffusion_pytorch_model.bin": (tmp_path / "unet" / "diffusion_pytorch_model.bin").read_bytes()}
    hub.repos["models", REPO].commit(published | pickle)
    with pytest.raises(OSError, match="safetensors"):
        MNISTDDPMPipeline.from_pretrained(REPO)


@pytest.mark.parametrize(
    ("name", "entry"), [("unet", None), ("unet", ["unet"]), ("scheduler", [1, 2]), ("_class_name", 7), (None, None)]
)
def test_damaged_index_is_refused(tmp_path, pipe, name, entry):
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: entry} if name else []))
    with pytest.raises(
        ValueError, match=f"model_index.json: `{name or '_class_name'}` must name a module and a class"
    ):
        MNISTDDPMPipeline.from_pretrained(tmp_path)


# Faults


def push(folder):
    return publish(folder, REPO, token=WRITER)


def assert_clear(error, folder=None):
    message = str(error.value)
    assert message.startswith(f"cannot push to the repository '{REPO}': ")
    assert WRITER not in message
    if folder:
        assert (
            f"The pipeline is safe in {folder}; push it again with: python -m mnist_ddpm.hub {folder} {REPO}"
            in message
        )


def test_check_repository_creates_it_and_returns_its_full_name(hub):
    assert check_repository("mnist-ddpm", token=WRITER, private=True) == REPO
    assert hub.repos["models", REPO].private
    assert check_repository(REPO, token=WRITER) == REPO
    assert set(hub.files(REPO)) == {".gitattributes"}


@pytest.mark.parametrize(
    ("repo_id", "token", "remedy"),
    [
        (REPO, "hf_wrongToken", "token is missing, wrong or expired"),
        (REPO, READER, "token may not write there"),
        ("somebody/mnist-ddpm", WRITER, "token may not write there"),
        ("a/b/c", WRITER, "HFValidationError: Repo id must be in the form"),
    ],
)
def test_wrong_token_or_name_is_found_before_the_training(hub, repo_id, token, remedy):
    with pytest.raises(RuntimeError, match=rf"cannot push to the repository '{repo_id}': .*{remedy}") as error:
        check_repository(repo_id, token=token)
    assert token not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


def test_repository_of_somebody_else_is_found_before_the_training(hub):
    hub.add("somebody/mnist-ddpm")
    with pytest.raises(RuntimeError, match="token may not write there"):
        check_repository("somebody/mnist-ddpm", token=WRITER)


def test_missing_or_broken_token(hub, tmp_path, pipe):
    with pytest.raises(ValueError, match="no Hub token: pass `token`, set HF_TOKEN"):
        check_repository(REPO)
    with pytest.raises(ValueError, match="`token` must be printable ASCII") as error:
        check_repository(REPO, token=f"{WRITER}\nx")
    assert WRITER not in str(error.value)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no Hub token"):
        publish(tmp_path, REPO)


FAULTS = [401, 403, 409, 500, "drop", "cut"]
ENDPOINTS = ["create", "resolve", "validate_yaml", "preupload", "lfs_batch", "lfs_put", "commit"]


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_push_that_fails_says_what_to_do_and_leaves_the_pipeline(hub, no_waits, tmp_path, pipe, endpoint, kind):
    pipe.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in LAYOUT - {"README.md"}}
    with hub.fault(endpoint, kind), pytest.raises(RuntimeError) as error:
        push(tmp_path)
    assert hub.requests[endpoint]
    assert_clear(error, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    push(tmp_path)
    assert set(hub.files(REPO)) == LAYOUT | {".gitattributes"}
    same_images(MNISTDDPMPipeline.from_pretrained(REPO, force_download=True), pipe)


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("endpoint", ["create", "preupload"])
def test_a_hub_in_trouble_is_found_before_the_training(hub, no_waits, endpoint, kind):
    with hub.fault(endpoint, kind), pytest.raises(RuntimeError) as error:
        check_repository(REPO, token=WRITER)
    assert_clear(error)


def test_refused_connections(hub, no_waits, tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    with hub.refusing_connections():
        with pytest.raises(RuntimeError, match=r"could not be reached or broke off: check the network") as error:
            check_repository(REPO, token=WRITER)
        assert_clear(error)
        with pytest.raises(RuntimeError, match=r"could not be reached or broke off: check the network") as error:
            push(tmp_path)
        assert_clear(error, tmp_path)
        with pytest.raises(OSError, match=r"cannot load 'user/never-seen' from the Hub: .*the network"):
            MNISTDDPMPipeline.from_pretrained(f"{USER}/never-seen")


@pytest.mark.parametrize("endpoint", ["create", "preupload", "lfs_put", "commit", "resolve", "info", "tree"])
def test_a_slow_hub_is_waited_for(hub, pipe, endpoint):
    with hub.fault(endpoint, "slow"):
        pipe.push_to_hub(REPO, token=WRITER)
        same_images(MNISTDDPMPipeline.from_pretrained(REPO, force_download=True), pipe)


@pytest.mark.parametrize("kind", [500, "drop"])
@pytest.mark.parametrize("endpoint", ["info", "tree", "resolve"])
def test_a_download_that_fails_names_the_repository(hub, no_waits, pipe, endpoint, kind):
    repo = f"{USER}/{endpoint}-{kind}"  # not in the cache
    pipe.push_to_hub(repo, token=WRITER)
    with hub.fault(endpoint, kind), pytest.raises(OSError, match=f"cannot load '{repo}' from the Hub: check the name"):
        MNISTDDPMPipeline.from_pretrained(repo)
    same_images(MNISTDDPMPipeline.from_pretrained(repo), pipe)


def test_the_command_that_a_failed_push_names_pushes(hub, tmp_path, pipe):
    folder = tmp_path / "a folder"
    pipe.save_pretrained(folder)
    with hub.fault("commit", 500), pytest.raises(RuntimeError) as error:
        publish(folder, REPO, token=WRITER)
    command = str(error.value).partition("push it again with: ")[2]
    program, *arguments = shlex.split(command)
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True, env={**os.environ, "HF_TOKEN": WRITER})
    assert set(hub.files(REPO)) == LAYOUT | {".gitattributes"}


def test_command_line_says_what_is_wrong_in_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with pytest.raises(SystemExit, match=r"error: `folder` must hold what `save_pretrained` writes, but .* has no"):
        main([str(tmp_path), REPO])


# Training


@pytest.fixture
def mnist(hub):
    """A few images in the layout of MNIST, as a data set on the Hub."""
    table = datasets.Dataset.from_dict(
        {"image": [Image.new("L", (8, 8), color=i) for i in range(16)], "label": [0] * 16},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    parquet = io.BytesIO()
    table.to_parquet(parquet)
    files = {f"mnist/{split}-00000-of-00001.parquet": parquet.getvalue() for split in ("train", "test")}
    card = "---\nconfigs:\n- config_name: mnist\n  data_files:\n"
    card += "".join(f"  - split: {split}\n    path: mnist/{split}-*\n" for split in ("train", "test")) + "---\n"
    hub.add(f"{USER}/mnist", kind="datasets", files=files | {"README.md": card.encode()})
    return f"{USER}/mnist"


WITHOUT_THE_PLUGIN = """
import sys
sys.modules["mnist_ddpm"] = None  # an import of it fails
import torch
from diffusers import DiffusionPipeline
repo, again, result = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
assert type(pipe).__name__ == "MNISTDDPMPipeline", type(pipe)
pipe.save_pretrained(again)
pipe = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
torch.save(pipe(latents=latents, num_inference_steps=2, noise_scale=0.0, output_type="pt").images, result)
"""

WITH_THE_PLUGIN = """
import sys
from mnist_ddpm import MNISTDDPMPipeline, MNISTUNet2DModel
pipe = MNISTDDPMPipeline.from_pretrained(sys.argv[1])
assert type(pipe) is MNISTDDPMPipeline and type(pipe.unet) is MNISTUNet2DModel
assert pipe(num_inference_steps=2).images[0].size == (8, 8)
"""

TRAIN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import train
train.main(train.parse_args())
"""


@pytest.mark.slow
def test_training_reads_from_the_hub_and_pushes_what_loads_with_the_plugin_and_without(hub, mnist, tmp_path, pipe):
    pipe.unet.save_config(tmp_path / "unet")
    flags = ["--dataset_name", mnist, "--model_config_name_or_path", tmp_path / "unet", "--max_train_steps", 2]
    flags += ["--train_batch_size", 4, "--eval_batch_size", 2, "--ddpm_num_inference_steps", 2, "--logger", "none"]
    flags += ["--mixed_precision", "no", "--output_dir", tmp_path / "trained", "--cache_dir", tmp_path / "cache"]
    flags += ["--push_to_hub", "--hub_model_id", REPO, "--hub_token", WRITER]
    output = python(TRAIN, str(EXAMPLES), *map(str, flags))
    assert WRITER not in output
    published = hub.files(REPO)
    assert LAYOUT <= set(published) <= LAYOUT | {"samples.png", ".gitattributes"}
    assert published[WEIGHTS] == (tmp_path / "trained" / WEIGHTS).read_bytes()
    for name in set(published) - {WEIGHTS, "samples.png"}:
        assert WRITER not in published[name].decode()
        assert str(tmp_path) not in published[name].decode()

    python(WITH_THE_PLUGIN, REPO, HF_HOME=str(tmp_path / "home"))
    again, result = str(tmp_path / "again"), str(tmp_path / "result")
    python(WITHOUT_THE_PLUGIN, REPO, again, result, HF_HOME=str(tmp_path / "another home"))
    assert files(again) == LAYOUT
    expected = images(MNISTDDPMPipeline.from_pretrained(tmp_path / "trained"))
    torch.testing.assert_close(torch.load(result), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(images(MNISTDDPMPipeline.from_pretrained(again)), expected, atol=1e-4, rtol=0)
