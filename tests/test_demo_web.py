"""demo/web: the page draws the package's digits in a real browser, as Python does from the same noise."""

import base64
import functools
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import export_onnx
import numpy as np
import pytest
import torch
from browser import overflow, unlabeled_controls
from PIL import Image
from test_export_onnx import random_unet

from mnist_ddpm import MNISTDDIMScheduler, MNISTDDPMPipeline, MNISTDDPMScheduler
from mnist_ddpm.metrics import ClassifierFeatures
from mnist_ddpm.sampling import load_pipeline

sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
WEB = Path(__file__).parents[1] / "demo" / "web"
if not (WEB / "node_modules" / "onnxruntime-web").exists():
    pytest.skip("needs npm ci --prefix demo/web", allow_module_level=True)

spec = importlib.util.spec_from_file_location("build_web", WEB / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

pytestmark = pytest.mark.browser
DONE = re.compile(r"images? in \d+ steps?, .* s\.$")
TIMEOUT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page as its one command builds it."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, WEB / "build.py", "--output_dir", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def pipe():
    """The pipeline of the page, with DDIM."""
    return load_pipeline(build.parse_args([]).model, device="cpu")


@pytest.fixture(scope="module")
def serve():
    """A plain static host: `serve(folder)` gives its address."""
    servers = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    def start(folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def drawn(page, site, serve):
    """The page with its first digits."""
    page.goto(serve(site))
    expect_done(page)
    return page


def expect_done(page):
    sync_api.expect(page.locator("#status")).to_have_text(DONE, timeout=TIMEOUT)


def select(page, name, option):
    page.get_by_role("combobox", name=name).select_option(label=option)


def pixels(page, canvas):
    """The gray levels of a canvas, uint8 (H, W)."""
    url = page.locator(canvas).evaluate("canvas => canvas.toDataURL()")
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("L"))


def tiles(image, size=28):
    """The images of a square grid, uint8 (N, 1, size, size)."""
    rows, columns = (n // size for n in image.shape)
    grid = torch.from_numpy(image).view(rows, size, columns, size)
    return grid.transpose(1, 2).reshape(rows * columns, 1, size, size)


def trajectory_in_browser(page, model, steps, x_T, labels=None, scale=1):
    """What ddim.js gives for noise from Python: x_t and x0_hat, (steps + 1, *x_T.shape) each."""
    script = """async ([name, steps, x_T, labels, scale]) => {
      const { ddim, guided } = await import("./ddim.js");
      const { predict, readModels } = await import("./model.js");
      const model = (await readModels()).find((model) => model.file === name);
      const network = (x_t, t, labels) => predict(model, x_t, t, labels);
      const noLabel = model.classes.length;
      const run = ddim(model, model.timesteps[steps], Float32Array.from(x_T), (x_t, t) =>
        guided(network, x_t, t, labels ?? undefined, noLabel, scale));
      const seen = [];
      for await (const { x_t, x0_hat } of run) seen.push([Array.from(x_t), Array.from(x0_hat)]);
      return seen;
    }"""
    seen = page.evaluate(script, [model, steps, x_T.flatten().tolist(), labels, scale])
    return torch.tensor(seen).transpose(0, 1).unflatten(-1, x_T.shape)


def trajectory_in_python(pipe, steps, x_T, **options):
    """The same by the pipeline."""
    x_t, x0_hat = [x_T], []

    def keep(run, i, t, tensors):
        x_t.append(tensors["latents"])
        x0_hat.append(tensors["pred_original_sample"])
        return {}

    pipe.set_progress_bar_config(disable=True)
    names = ("latents", "pred_original_sample")
    options |= {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": names}
    pipe(len(x_T), latents=x_T, num_inference_steps=steps, **options)
    return torch.stack([torch.stack(x_t), torch.stack([*x0_hat, x_t[-1]])])


def test_equals_python_from_the_same_noise(drawn, pipe):
    classes = pipe.unet.config.get("num_class_embeds")
    x_T = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels, options = None, {}
    if classes:
        pipe.guide = None
        labels, options = [3, 7], {"class_labels": [3, 7], "guidance_scale": 2.0}
    ours = trajectory_in_browser(drawn, "unet.onnx", 10, x_T, labels, 2 if classes else 1)
    torch.testing.assert_close(ours, trajectory_in_python(pipe, 10, x_T, **options), atol=1e-3, rtol=0)


def test_draws_digits_that_the_classifier_reads(drawn, pipe):
    requested = []
    drawn.context.on("request", lambda request: requested.append(request.url))
    classes = pipe.unet.config.get("num_class_embeds")
    if classes:
        drawn.get_by_role("radio", name="7").check(force=True)  # drawn by the label around it
    select(drawn, "Images", "9")
    select(drawn, "Steps", "20")
    sync_api.expect(drawn.locator("#status")).to_contain_text("9 images in 20 steps", timeout=TIMEOUT)
    classifier = ClassifierFeatures.from_pretrained()
    digits = tiles(pixels(drawn, "#x_t"))
    confidence, read = classifier.logits(classifier(digits)).softmax(dim=-1).max(dim=-1)
    assert (confidence > 0.9).sum() >= 8, confidence
    if classes:
        assert (read == 7).sum() >= 8, read
    assert np.array_equal(pixels(drawn, "#x_t"), pixels(drawn, "#x0_hat"))
    assert [url for url in requested if not url.endswith(".onnx")] == []  # the page fetches its models at the start


def test_keyboard_alone(drawn):
    select(drawn, "Steps", "5")
    sync_api.expect(drawn.locator("#status")).to_contain_text("in 5 steps", timeout=TIMEOUT)
    drawn.locator("#status").click()
    drawn.keyboard.press("Shift+Tab")
    sync_api.expect(drawn.get_by_label("Back through the steps")).to_be_focused()
    end = pixels(drawn, "#x_t")
    drawn.keyboard.press("Home")  # the slider is at the noise now
    sync_api.expect(drawn.locator("#where")).to_contain_text("t = 999")
    noise = pixels(drawn, "#x_t")
    assert ((noise > 0) & (noise < 255)).mean() > 0.5  # a digit's pixels are black or white for the most part
    assert drawn.locator("#x_t").get_attribute("aria-label") == "Sample, step 1 of 5, t = 999"
    drawn.keyboard.press("End")
    assert np.array_equal(pixels(drawn, "#x_t"), end)

    seed = drawn.get_by_label("Seed", exact=True)
    for _ in range(20):
        drawn.keyboard.press("Tab")
        if seed.evaluate("element => element === document.activeElement"):
            break
    drawn.keyboard.type("12")
    drawn.keyboard.press("Enter")
    sync_api.expect(drawn.locator("#status")).not_to_have_text(DONE)
    expect_done(drawn)
    assert not np.array_equal(pixels(drawn, "#x_t"), end)
    drawn.keyboard.press("Tab")
    sync_api.expect(drawn.get_by_role("button", name="Draw")).to_be_focused()


def test_a_run_can_be_stopped(drawn):
    select(drawn, "Images", "36")
    select(drawn, "Steps", "50")
    sync_api.expect(drawn.locator("#where")).to_have_text(re.compile("step [2-9] of 50"), timeout=TIMEOUT)
    drawn.get_by_role("button", name="Stop").click()
    sync_api.expect(drawn.locator("#status")).to_contain_text("Stopped")
    drawn.get_by_label("Back through the steps").press("End")  # there are no more steps than were drawn
    sync_api.expect(drawn.locator("#where")).to_contain_text("of 50, t = ")
    select(drawn, "Images", "1")
    select(drawn, "Steps", "2")
    sync_api.expect(drawn.locator("#status")).to_contain_text("1 image in 2 steps", timeout=TIMEOUT)


def test_labels_phone_width_and_preferences(drawn):
    assert unlabeled_controls(drawn) == []
    assert overflow(drawn) == 0
    for scheme in ("light", "dark"):
        drawn.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        gray = drawn.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        assert (int(gray) < 60) == (scheme == "dark")
    drawn.get_by_role("button", name="New seed").click()
    sync_api.expect(drawn.locator("#status")).not_to_have_text(DONE)
    expect_done(drawn)


def test_says_what_is_missing(page, site, serve):
    page.route("**/*.onnx", lambda route: route.fulfill(status=404))
    page.goto(serve(site))
    sync_api.expect(page.locator("#status")).to_contain_text("did not work", timeout=TIMEOUT)


def test_a_model_with_classes(page, site, serve, tmp_path):
    """The controls for digits are there; guidance equals the pipeline's."""
    folder = shutil.copytree(site, tmp_path / "site")
    unet = random_unet(num_class_embeds=3)
    scheduler = MNISTDDIMScheduler(beta_schedule="cosine", prediction_type="v_prediction", clip_sample_range=1.5)
    pipe = MNISTDDPMPipeline(unet, scheduler, id2label={0: "shoe", 1: "bag", 2: "coat"})
    content, _ = export_onnx.export(unet)
    (folder / "unet.onnx").write_bytes(content)
    models = [build.describe(pipe, (5, 10), file="unet.onnx")]
    (folder / "models.json").write_text(json.dumps(models), encoding="utf-8")
    page.goto(serve(folder))
    expect_done(page)

    sync_api.expect(page.get_by_role("slider", name="Guidance")).to_be_disabled()
    page.get_by_role("radio", name="any").focus()
    page.keyboard.press("ArrowRight")
    sync_api.expect(page.get_by_role("radio", name="shoe")).to_be_checked()
    expect_done(page)
    page.get_by_role("slider", name="Guidance").press("ArrowRight")
    sync_api.expect(page.locator("#scale")).to_have_text("2.1")
    expect_done(page)
    assert unlabeled_controls(page) == []
    assert overflow(page) == 0

    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for scale in (1, 3):
        ours = trajectory_in_browser(page, "unet.onnx", 10, x_T, [2, 0], scale)
        expected = trajectory_in_python(pipe, 10, x_T, class_labels=[2, 0], guidance_scale=scale)
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_formulas(page, site, serve, prediction_type, clip_sample):
    """Each step of ddim.js is that of the scheduler, whatever the model predicts."""
    options = {"prediction_type": prediction_type, "clip_sample": clip_sample, "timestep_spacing": "leading"}
    pipe = MNISTDDPMPipeline(random_unet(), MNISTDDIMScheduler(set_alpha_to_one=False, **options))
    model = build.describe(pipe, (7,))
    x_T = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    script = """async ([model, x_T]) => {
      const { ddim } = await import("./ddim.js");
      const predict = async (x_t, t) => x_t.map((x) => Math.sin(x + t));
      const run = ddim(model, model.timesteps[7], Float32Array.from(x_T), predict);
      const seen = [];
      for await (const { x_t } of run) seen.push(Array.from(x_t));
      return seen;
    }"""
    page.goto(serve(site) + "ddim.js")
    ours = torch.tensor(page.evaluate(script, [model, x_T.flatten().tolist()]))
    x_t, expected = x_T, [x_T]
    for t in pipe.scheduler.timesteps:
        x_t = pipe.scheduler.step(torch.sin(x_t.double() + t).float(), t, x_t).prev_sample
        expected.append(x_t)
    torch.testing.assert_close(ours, torch.stack(expected).flatten(1), atol=1e-4, rtol=1e-4)


def test_noise(page, site, serve):
    page.goto(serve(site) + "noise.js")
    script = """async ([seed, count]) => {
      const { gaussianNoise } = await import("./noise.js");
      return Array.from(gaussianNoise(seed, count, 784));
    }"""
    a, b, first = (np.array(page.evaluate(script, arguments)) for arguments in ([0, 100], [1, 100], [0, 1]))
    assert np.array_equal(a[:784], first)  # an image does not depend on how many there are
    images = np.concatenate([a, b]).reshape(200, 784)
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01
    assert abs((images**4).mean() - 3) < 0.1
    assert np.abs(np.corrcoef(images) - np.eye(200)).max() < 0.2  # 1 / sqrt(784) is 0.036


def test_rejects_what_the_page_cannot_draw():
    pipe = MNISTDDPMPipeline(random_unet(in_channels=3, out_channels=3), MNISTDDPMScheduler())
    with pytest.raises(ValueError, match="model"):
        build.describe(pipe, (5,))
