"""The Gradio app in a real browser: each tab, messages for bad input, two users, keyboard, labels, a phone's width."""

import base64
import io
import re

import numpy as np
import pytest
from browser import overflow, unlabeled_controls
from PIL import Image

pytestmark = pytest.mark.browser
TABS = ("Draw from noise", "Complete", "Between two digits", "Few steps")


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[demo]'")
    import app

    return app


@pytest.fixture(scope="module")
def address(app):
    blocks = app.build()
    yield blocks.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)[1]
    blocks.close()


def open_tab(page, address, title):
    page.goto(address)
    page.get_by_role("tab", name=title).click()
    return page


def click(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def choose(page, name):
    page.get_by_role("radio", name=name).filter(visible=True).check()


def fill(page, **numbers):
    for label, number in numbers.items():
        box = page.get_by_role("spinbutton", name=re.compile(label.replace("_", " "))).filter(visible=True)
        box.fill(str(number))
        box.press("Tab")


def pictures(page, title):
    """The pictures of the figure with a title, uint8 (B, H, W)."""
    named = page.get_by_role("img", name=re.compile(f"^{title}, picture"))
    sources = named.evaluate_all("all => all.map(image => image.src)")
    decoded = [base64.b64decode(source.partition(",")[2]) for source in sources]
    return np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in decoded])


def draw_stroke(page):
    box = page.locator("canvas").bounding_box()
    x, y, size = box["x"], box["y"], box["width"]
    page.mouse.move(x + 0.35 * size, y + 0.3 * size)
    page.mouse.down()
    page.mouse.move(x + 0.65 * size, y + 0.3 * size, steps=4)
    page.mouse.move(x + 0.45 * size, y + 0.7 * size, steps=4)
    page.mouse.up()


def test_draws_and_goes_back_through_the_steps(app, address, page):
    open_tab(page, address, "Draw from noise")
    fill(page, Steps=4, Number_of_pictures=2, Seed=3)
    click(page, "Draw")
    page.get_by_text("t = 0", exact=True).wait_for()
    frames = [*app.denoise(app.PIPE, app.draw_noise(3, 2), 4)]
    np.testing.assert_array_equal(pictures(page, "Sample x_t"), frames[-1].x_t)
    slider = page.get_by_role("slider", name="Go back through the steps")
    slider.focus()
    for k in (3, 2):
        slider.press("ArrowLeft")
        page.get_by_text(f"t = {frames[k].t}", exact=True).wait_for()
        np.testing.assert_array_equal(pictures(page, "Sample x_t"), frames[k].x_t)
        np.testing.assert_array_equal(pictures(page, "Predicted x_0"), frames[k].x0_hat)


def test_run_stops_and_can_be_looked_at_and_another_begins(address, page):
    open_tab(page, address, "Draw from noise")
    fill(page, Steps=100, Number_of_pictures=16)
    click(page, "Draw")
    slider = page.get_by_role("slider", name="Go back through the steps")
    page.wait_for_function("slider => slider.value >= 3", arg=slider.element_handle())
    # a click would wait until the page is still
    page.get_by_role("button", name="Stop", exact=True).dispatch_event("click")
    page.wait_for_timeout(1000)
    done = int(slider.input_value())
    page.wait_for_timeout(1000)
    assert 3 <= done == int(slider.input_value()) < 100
    slider.press("Home")
    page.get_by_text("t = 999", exact=True).wait_for()
    fill(page, Steps=2, Number_of_pictures=1)
    click(page, "Draw")
    page.get_by_text("t = 0", exact=True).wait_for()


def test_completes_a_stroke_and_keeps_it(address, page):
    open_tab(page, address, "Complete")
    draw_stroke(page)
    click(page, "Complete")
    page.get_by_text("8 of 8").wait_for()
    completions = pictures(page, "Completions")
    assert completions.shape == (8, 28, 28)
    assert (completions.min(axis=0)[8:20, 8:20] == 255).sum() > 20  # the stroke
    assert len({image.tobytes() for image in completions}) == 8


def test_redraws_a_digit(address, page):
    open_tab(page, address, "Complete")
    click(page, "Take a digit")
    page.wait_for_function("document.querySelector('canvas').getContext('2d').getImageData(0, 0, 1, 1).data[2] < 60")
    click(page, "Complete")
    page.get_by_text("Nothing is open").wait_for()
    choose(page, "Redraw it all")
    fill(page, Strength=0.2)
    click(page, "Complete")
    page.get_by_text("8 of 8").wait_for()
    completions = pictures(page, "Completions").astype(float)
    assert np.abs(completions - completions.mean(axis=0)).mean() < 20  # they resemble one digit


def test_rejects_an_empty_canvas(address, page):
    open_tab(page, address, "Complete")
    click(page, "Complete")
    page.get_by_text("The canvas is empty").wait_for()
    draw_stroke(page)
    click(page, "Clear")
    page.get_by_role("button", name="Close", exact=True).click()
    click(page, "Complete")
    page.get_by_text("The canvas is empty").wait_for()
    assert "Traceback" not in page.content()


def test_rejects_numbers_that_do_not_fit(address, page):
    open_tab(page, address, "Draw from noise")
    fill(page, Seed="")
    click(page, "Draw")
    page.get_by_text("The seed is empty").wait_for()
    assert "Traceback" not in page.content()


def test_interpolates_between_two_digits(address, page):
    open_tab(page, address, "Between two digits")
    fill(page, Steps=10, Number_of_pictures=3)
    click(page, "Interpolate")
    page.get_by_text("Picture 1 of 3").wait_for()
    row = pictures(page, "From one to the other")
    assert row.shape == (3, 28, 28)
    page.get_by_role("slider", name="Go along the way").press("End")
    page.get_by_text("Picture 3 of 3").wait_for()
    np.testing.assert_array_equal(pictures(page, "Picture 3 of 3")[0], row[2])


def test_compares_few_steps_with_many(app, address, page):
    open_tab(page, address, "Few steps")
    click(page, "Compare")
    page.get_by_text("50 steps", exact=True).wait_for()
    assert len(page.get_by_text(re.compile(r"^\d+\.\d\d s$")).all()) == 6
    noise = app.draw_noise(0, 6)
    np.testing.assert_array_equal(pictures(page, "4 steps"), app.last(app.denoise(app.PIPE, noise, 4)))


def test_two_users_at_once_do_not_disturb_each_other(app, address, browser):
    pages = [browser.new_context().new_page() for _ in range(2)]
    schedulers = ("DDPM", "DPM-Solver++")
    for seed, (page, scheduler) in enumerate(zip(pages, schedulers, strict=True)):
        open_tab(page, address, "Draw from noise")
        choose(page, scheduler)
        fill(page, Steps=12, Number_of_pictures=2, Seed=seed)
    for page in pages:
        click(page, "Draw")
    for seed, (page, scheduler) in enumerate(zip(pages, schedulers, strict=True)):
        page.get_by_text("t = 0", exact=True).wait_for()
        run = app.denoise(app.swap(app.PIPE, scheduler), app.draw_noise(seed, 2), 12, seed=seed)
        np.testing.assert_array_equal(pictures(page, "Sample x_t"), app.last(run))
        page.context.close()


def focus_by_tab(page, label):
    """Press Tab until what has the focus is named so."""
    for _ in range(60):
        page.keyboard.press("Tab")
        name = "document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"
        if (page.evaluate(name) or "").strip().startswith(label):
            return
    raise AssertionError(f"Tab does not lead to {label}")


def test_keyboard_is_enough(address, page):
    page.goto(address)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    focus_by_tab(page, "Complete")
    page.keyboard.press("Enter")
    focus_by_tab(page, "Canvas")
    for key in ["Space", *["ArrowDown"] * 8, *["ArrowRight"] * 3]:
        page.keyboard.press(key)
    page.get_by_text("Column 18, row 23, pen down.").wait_for()
    focus_by_tab(page, "Complete")
    page.keyboard.press("Enter")
    page.get_by_text("2 of 8").wait_for()
    assert (pictures(page, "Completions").min(axis=0)[15:22, 14] == 255).all()
    focus_by_tab(page, "Stop")
    page.keyboard.press("Enter")


def test_each_control_has_a_label_and_the_page_fits_a_phone(address, page):
    page.goto(address)
    for title in TABS:
        page.set_viewport_size({"width": 1200, "height": 900})
        page.get_by_role("tab", name=title).click()
        page.get_by_role("button", name="Stop").filter(visible=True).wait_for()
        assert unlabeled_controls(page) == [], title
        assert overflow(page) == 0, title
        assert unlabeled_controls(page) == [], title


def test_digit_buttons_ask_for_a_digit(app, address, page):
    page.goto(address)
    choose(page, "7")
    fill(page, Steps=3, Number_of_pictures=2, Guidance=2)
    click(page, "Draw")
    page.get_by_text("t = 0", exact=True).wait_for()
    expected = app.last(app.denoise(app.PIPE, app.draw_noise(0, 2), 3, digit=7, guidance_scale=2.0))
    np.testing.assert_array_equal(pictures(page, "Sample x_t"), expected)
