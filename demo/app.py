"""A page to play with the models of this package: `python demo/app.py`, then http://127.0.0.1:7860.

It needs no network: no analytics, no fonts or scripts from elsewhere.
"""

import base64
import html
import io
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which Gradio reads when it is imported

import gradio as gr
import torch
from PIL import Image
from steps import SCHEDULERS, Frame, between, complete, denoise, draw_noise, last, redraw
from steps import with_scheduler as swap

from mnist_ddpm import PRETRAINED_CONDITIONAL, PRETRAINED_FEW_STEP
from mnist_ddpm.sampling import load_pipeline

HERE = Path(__file__).parent
COMPLETIONS = 8
BUDGETS = (1, 4, 10, 50)
PIPE = load_pipeline(PRETRAINED_CONDITIONAL)
FEW_STEPS = load_pipeline(PRETRAINED_FEW_STEP, "auto")  # knows no classes


def figure(images: torch.Tensor, title: str, note: str = "") -> str:
    """Images, uint8 (B, H, W), as a figure with a title; each has a name for screen readers."""
    pictures = []
    for i, pixels in enumerate(images, start=1):
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
        source = base64.b64encode(buffer.getvalue()).decode()
        name = f"{title}, picture {i} of {len(images)}"
        pictures.append(f'<img src="data:image/png;base64,{source}" alt="{html.escape(name)}">')
    caption = re.sub(r"_(\w)", r"<sub>\1</sub>", f"<b>{html.escape(title)}</b> <span>{html.escape(note)}</span>")
    return f'<figure><figcaption>{caption}</figcaption><div class="digits">{"".join(pictures)}</div></figure>'


def pair(frame: Frame) -> str:
    """x_t and the predicted x_0 of one frame."""
    return (
        '<div class="pair">'
        + figure(frame.x_t, "Sample x_t", f"t = {frame.t}")
        + figure(frame.x0_hat, "Predicted x_0", "what it may become")
        + "</div>"
    )


def hint(text: str) -> str:
    """What stands where pictures will be."""
    return f'<p class="hint">{html.escape(text)}</p>'


def as_digit(choice: str | None) -> int | None:
    """The class of a digit button; None for any."""
    return None if choice in (None, "any") else int(choice)


def as_seed(seed: float | None) -> int:
    """A seed as the page sends it."""
    if seed is None:
        raise gr.Error("The seed is empty: type a number, 0 for instance.", print_exception=False)
    return int(seed)


def as_canvas(value: str | None) -> torch.Tensor:
    """The canvas, (28, 28), as canvas.js sends it: gray levels from 0, and -1 for open pixels."""
    try:
        levels = torch.tensor([int(level) for level in value.split(",")]).view(28, 28) if value else None
    except (ValueError, RuntimeError, OverflowError):
        raise gr.Error("The canvas can't be read: clear it and draw anew.", print_exception=False) from None
    if levels is None or (levels <= 0).all():
        raise gr.Error("The canvas is empty: draw a stroke first, or take a digit.", print_exception=False)
    return levels.clamp(-1, 255)


def draw(
    digit: str, guidance: float, scheduler: str, steps: int, seed: float, count: int
) -> Iterator[tuple[Any, Any, Any]]:
    """Draw from noise, frame by frame."""
    noise, frames = draw_noise(as_seed(seed), int(count)), []
    run = denoise(swap(PIPE, scheduler), noise, int(steps), as_digit(digit), guidance, int(seed))
    for k, frame in enumerate(run):
        frames.append(frame)
        yield pair(frame), gr.Slider(maximum=max(k, 1), value=k, interactive=True), frames


def look_back(frames: list[Frame], k: float) -> str:
    """The frame that the slider points to."""
    return pair(frames[min(int(k), len(frames) - 1)]) if frames else hint("Draw something first.")


def fill_in(canvas: str, how: str, strength: float, digit: str, guidance: float, seed: float) -> Iterator[str]:
    """Eight completions of the canvas, two by two."""
    levels = as_canvas(canvas)
    common = (COMPLETIONS, as_digit(digit), guidance, as_seed(seed))
    if how == "fill" and (levels >= 0).all():
        raise gr.Error("Nothing is open: erase a part of the digit first.", print_exception=False)
    run = complete(PIPE, levels, *common) if how == "fill" else redraw(PIPE, levels, strength, *common)
    done: list[torch.Tensor] = []
    yield hint("Two by two, in a moment.")
    for images in run:
        done.append(images)
        yield figure(torch.cat(done), "Completions", f"{2 * len(done)} of {COMPLETIONS}")


def digit_for_canvas(digit: str) -> str:
    """A digit of the model, all of whose pixels are known."""
    seed = random.randrange(2**32)
    image = last(denoise(PIPE, draw_noise(seed, 1), 15, as_digit(digit)))
    return ",".join(str(level) for level in image.flatten().tolist())


def interpolate(
    digit_a: str, seed_a: float, digit_b: str, seed_b: float, count: int, steps: int
) -> Iterator[tuple[Any, Any, Any]]:
    """Two digits of the model, then the pictures between them."""
    ends = [
        last(denoise(PIPE, draw_noise(as_seed(seed), 1), int(steps), as_digit(digit)))
        for digit, seed in ((digit_a, seed_a), (digit_b, seed_b))
    ]
    yield figure(torch.cat(ends), "Both ends", "and their noise, in a moment"), gr.skip(), []
    for frame in between(PIPE, torch.cat(ends), int(count), int(steps)):
        yield figure(frame.x0_hat, "From one to the other", f"t = {frame.t}"), gr.skip(), []
    row = frame.x_t
    yield figure(row, "From one to the other"), gr.Slider(maximum=len(row) - 1, value=0, interactive=True), row


def look_between(row: torch.Tensor, k: float) -> str:
    """One picture of the row, large."""
    if len(row) == 0:
        return hint("Interpolate first.")
    k = min(int(k), len(row) - 1)
    return figure(row[k : k + 1], f"Picture {k + 1} of {len(row)}")


def compare(digit: str, seed: float) -> Iterator[str]:
    """The same noise in few steps and in many, with times."""
    noise, rows = draw_noise(as_seed(seed), 6), []
    for name, pipe, budgets, label in (
        ("Few-step model, ", FEW_STEPS, BUDGETS[:2], None),
        ("", PIPE, BUDGETS, as_digit(digit)),
    ):
        for steps in budgets:
            start = time.perf_counter()
            images = last(denoise(pipe, noise, steps, label))
            seconds = time.perf_counter() - start
            title = f"{name}{steps} step{'s' if steps > 1 else ''}"
            rows.append(figure(images, title[0].upper() + title[1:], f"{seconds:.2f} s"))
            yield "".join(rows)


def digit_buttons(label: str) -> gr.Radio:
    """One button for each digit."""
    return gr.Radio(["any", *map(str, range(10))], value="any", label=label, elem_classes="buttons")


def seed_box(value: int = 0, label: str = "Seed") -> gr.Number:
    """A seed: the same one gives the same pictures."""
    return gr.Number(value, label=label, precision=0, minimum=0, maximum=2**32 - 1, min_width=120)


def guidance_slider() -> gr.Slider:
    """How far the digit leads."""
    return slider(1, 5, 1, "Guidance (1: none)", step=0.1)


def slider(least: float, most: float, value: float, label: str, step: float = 1, **options: Any) -> gr.Slider:
    """A slider with its number beside it."""
    return gr.Slider(least, most, value, step=step, label=label, buttons=[], **options)


def draw_tab() -> None:
    """Draw from noise."""
    frames = gr.State([])
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            digit = digit_buttons("Digit")
            guidance = guidance_slider()
            steps = slider(1, 100, 50, "Steps")
            count = slider(1, 16, 8, "Number of pictures")
            scheduler = gr.Radio(list(SCHEDULERS), value="DDIM", label="Scheduler", elem_classes="buttons")
            seed = seed_box()
            with gr.Row():
                start = gr.Button("Draw", variant="primary", min_width=100)
                stop = gr.Button("Stop", min_width=100)
        with gr.Column(scale=2, min_width=280):
            pictures = gr.HTML(FIRST)
            back = slider(0, 1, 0, "Go back through the steps", interactive=False)
    inputs = [digit, guidance, scheduler, steps, seed, count]
    run = start.click(draw, inputs, [pictures, back, frames], show_progress="hidden")
    stop.click(None, cancels=run)
    back.input(look_back, [frames, back], pictures, show_progress="hidden", trigger_mode="always_last")


def complete_tab() -> None:
    """Complete what is on the canvas."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            canvas = gr.HTML(
                html_template=(HERE / "canvas.html").read_text(encoding="utf-8"),
                js_on_load=(HERE / "canvas.js").read_text(encoding="utf-8"),
                elem_classes="pad",
            )
            gr.Markdown("Draw a stroke: the blue is filled in. Or take a digit, and erase a part of it.")
            take = gr.Button("Take a digit")
            digit = digit_buttons("Digit")
            guidance = guidance_slider()
            how = gr.Radio(
                [("Fill in the blue (inpainting)", "fill"), ("Redraw it all (image to image)", "redraw")],
                value="fill",
                label="How",
                elem_classes="buttons",
            )
            strength = slider(0.1, 1, 0.6, "Strength", step=0.05, visible=False)
            seed = seed_box()
            with gr.Row():
                start = gr.Button("Complete", variant="primary", min_width=100)
                stop = gr.Button("Stop", min_width=100)
        with gr.Column(scale=2, min_width=280):
            pictures = gr.HTML(hint("Eight completions will be here."), elem_classes="completions")
    run = start.click(fill_in, [canvas, how, strength, digit, guidance, seed], pictures, show_progress="hidden")
    how.change(lambda how: gr.Slider(visible=how == "redraw"), how, strength, show_progress="hidden")
    taken = take.click(digit_for_canvas, digit, canvas, show_progress="hidden")
    stop.click(None, cancels=[run, taken])


def between_tab() -> None:
    """Between two digits."""
    row = gr.State([])
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            digit_a = digit_buttons("First digit")
            seed_a = seed_box(12, "Seed of the first")
            digit_b = digit_buttons("Second digit")
            seed_b = seed_box(6, "Seed of the second")
            steps = slider(10, 50, 20, "Steps")
            count = slider(3, 12, 8, "Number of pictures")
            with gr.Row():
                start = gr.Button("Interpolate", variant="primary", min_width=100)
                stop = gr.Button("Stop", min_width=100)
        with gr.Column(scale=2, min_width=280):
            pictures = gr.HTML(hint("The way from one digit to another will be here."))
            along = slider(0, 1, 0, "Go along the way", interactive=False)
            large = gr.HTML(elem_classes="large")
    inputs = [digit_a, seed_a, digit_b, seed_b, count, steps]
    run = start.click(interpolate, inputs, [pictures, along, row], show_progress="hidden")
    run.success(look_between, [row, along], large, show_progress="hidden")
    stop.click(None, cancels=run)
    along.input(look_between, [row, along], large, show_progress="hidden", trigger_mode="always_last")


def few_steps_tab() -> None:
    """The same noise in few steps."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            digit = digit_buttons("Digit")
            seed = seed_box()
            with gr.Row():
                start = gr.Button("Compare", variant="primary", min_width=100)
                stop = gr.Button("Stop", min_width=100)
        with gr.Column(scale=2, min_width=280):
            pictures = gr.HTML(hint("The same noise in 1, 4, 10 and 50 steps will be here."), elem_classes="few")
    run = start.click(compare, [digit, seed], pictures, show_progress="hidden")
    stop.click(None, cancels=run)


def build() -> gr.Blocks:
    """The page: one tab for each thing to play with."""
    with gr.Blocks(title="MNIST from noise", analytics_enabled=False) as page:
        gr.Markdown(f"# MNIST from noise\n{INTRODUCTION}")
        for title, tab in (
            ("Draw from noise", draw_tab),
            ("Complete", complete_tab),
            ("Between two digits", between_tab),
            ("Few steps", few_steps_tab),
        ):
            with gr.Tab(title):
                tab()
    return page.queue(default_concurrency_limit=4)


INTRODUCTION = "A diffusion model draws digits. It starts from noise, and removes a little of it at each step."
FONT = ["system-ui", "sans-serif"]
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Soft(primary_hue="sky", neutral_hue="slate", font=FONT, font_mono=["monospace"]).set(
        block_title_background_fill="transparent",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_weight="500",
        body_text_color_subdued="*neutral_600",
        block_shadow="none",
        checkbox_label_shadow="none",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        checkbox_label_background_fill_selected="*primary_700",
    ),
    "css_paths": HERE / "app.css",
    "footer_links": [],
}
FIRST = pair([*denoise(PIPE, draw_noise(0, 8), 20)][12])

if __name__ == "__main__":
    build().launch(**LAUNCH)
