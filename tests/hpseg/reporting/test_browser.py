"""The page in a real browser, headless: it opens from a file, its slider works, and it asks for nothing."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import SMALL

import hpseg

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"phone": (390, 844), "desk": (1280, 900)}


@pytest.fixture(scope="module")
def page_file(run, data, tmp_path_factory):
    out = shutil.copytree(run, tmp_path_factory.mktemp("browser") / "run")
    return hpseg.write_report(out, data, compare=None, n=3, device="cpu")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium found")
    playwright = pytest.importorskip("playwright.sync_api")
    # Chromium has no sandbox for root, as in a container; the page is our own.
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """visit(file, size, scheme): the page, in a window of its own; at the end of the test nothing may have gone wrong
    in it and nothing but the file may have been asked for."""
    contexts, wrong = [], []

    def asked(request):
        if not request.url.startswith(("file://", "data:")):
            wrong.append(f"asked for {request.url}")

    def open_page(file, size="desk", scheme="light"):
        width, height = SIZES[size]
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        contexts[-1].set_default_timeout(120_000)  # of a busy machine
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", asked)
        page.on("requestfailed", lambda request: wrong.append(f"could not have {request.url[:100]}"))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def pixels(shot):
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(float)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_shows_in_any_width_and_light(page_file, visit, size, scheme):
    page = visit(page_file, size, scheme)
    shot = pixels(page.screenshot(full_page=True))
    assert shot.std() > 10 and shot.shape[1] == SIZES[size][0]  # not blank, and nothing reaches out to the right
    ground = np.median(shot.reshape(-1, 3), axis=0)
    assert (ground.max() < 60) if scheme == "dark" else (ground.min() > 200)
    for name in ("photographs", "scores", "clusters", "training", "settings"):
        assert pixels(page.locator(f"#{name}").screenshot()).std() > 5, name
    broken = page.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).length")
    assert broken == 0 and page.evaluate("document.images.length") > 20


def test_the_slider_goes_from_picture_over_overlay_to_clusters(page_file, visit):
    page = visit(page_file)
    photograph = page.locator(".photograph").first
    stage, slider = photograph.locator(".stage"), photograph.locator("input[type=range]")
    looks = {"overlay": pixels(stage.screenshot())}
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 2, middle, steps=5)
    looks["picture"] = pixels(stage.screenshot())
    page.mouse.move(box["x"] + box["width"] - 2, middle, steps=5)
    page.mouse.up()
    looks["clusters"] = pixels(stage.screenshot())
    for one, other in (("picture", "overlay"), ("overlay", "clusters"), ("clusters", "picture")):
        assert np.abs(looks[one] - looks[other]).mean() > 3, (one, other)
    assert slider.get_attribute("aria-valuetext") == "clusters"
    assert page.locator(".views input:checked").count() == 0  # they differ now

    stage.click()  # the next of the three
    assert np.abs(pixels(stage.screenshot()) - looks["picture"]).mean() < 1
    slider.focus()
    for _ in range(100):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "100" and np.abs(pixels(stage.screenshot()) - looks["overlay"]).mean() < 1


def test_one_choice_changes_all_photographs(page_file, visit):
    page = visit(page_file, "phone")
    sliders = page.locator("input[type=range]")
    page.locator(".views label", has_text="clusters").click()
    assert [slider.input_value() for slider in sliders.all()] == ["200"] * 3
    page.keyboard.press("ArrowLeft")
    assert [slider.input_value() for slider in sliders.all()] == ["100"] * 3
    before = pixels(page.locator(".stage").last.screenshot())
    page.keyboard.press("ArrowLeft")
    assert np.abs(pixels(page.locator(".stage").last.screenshot()) - before).mean() > 3


def test_the_pointer_tells_the_values_of_a_curve(page_file, visit):
    page = visit(page_file)
    chart = page.locator(".chart svg").first
    pointer = chart.locator(".pointer text")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 0.98 * box["width"], box["y"] + box["height"] / 2)
    step, value = pointer.text_content().split(": ")
    assert step == "19" and value == page.locator(".chart .now").first.text_content()
    page.mouse.move(0, 0)
    assert chart.locator(".pointer").get_attribute("visibility") == "hidden"


def test_what_is_not_the_pages_own_does_not_run(page_file, visit, tmp_path):
    """The policy in the page, were something ever to come through the escaping: no script, no picture from outside."""
    text = page_file.read_text()
    added = tmp_path / "added.html"
    added.write_text(text.replace("</main>", '<script>document.title = "ran"</script></main>'))
    page = visit(page_file)
    assert page.locator(".slider input").first.get_attribute("aria-valuetext") == "overlay"
    assert page.title() == "run, hpseg report"
    context = page.context.browser.new_context()
    other = context.new_page()
    other.goto(added.as_uri())
    assert other.title() == "run, hpseg report"
    context.close()


@pytest.fixture(scope="module")
def compared_file(run, photos, data, vit_file, tmp_path_factory):
    """Two runs of three and of four clusters."""
    root = tmp_path_factory.mktemp("compared")
    one, other = shutil.copytree(run, root / "one"), root / "other"
    hpseg.train(photos, other, weights=vit_file, steps=5, **{**SMALL, "classes": 4, "seed": 1})
    return hpseg.write_report(one, data, compare=other, n=2, device="cpu")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_clusters_and_matrix_are_those_of_the_chosen_run(compared_file, visit, scheme):
    page = visit(compared_file, "desk", scheme)
    clusters, matrices = page.locator("#clusters article"), page.locator("svg.matrix")

    def shown():
        return [part.is_visible() for part in (*matrices.all(), *page.locator("#clusters [data-run]").all())]

    assert shown() == [True, False] * 2 and page.locator("#clusters article:visible").count() <= 3
    first = pixels(page.locator("#scores svg.matrix:visible").screenshot())
    page.locator("#clusters .runs label", has_text="other").click()
    assert shown() == [False, True] * 2 and clusters.count() > page.locator("#clusters article:visible").count() > 0
    assert page.locator(".runs input:checked").evaluate_all("all => all.map(one => one.value)") == ["1", "1"]
    second = page.locator("#scores svg.matrix:visible")
    assert second.get_attribute("class") == "matrix run1"
    colours = [pixels_of.reshape(-1, 3).mean(0) for pixels_of in (first, pixels(second.screenshot()))]
    assert np.abs(colours[0] - colours[1]).max() > 1  # in the colour of the run
    page.keyboard.press("ArrowLeft")
    assert shown() == [True, False] * 2
    page.locator("#photographs .views label", has_text="clusters").click()
    assert shown() == [True, False] * 2  # the other switch is another one
    assert pixels(page.locator("#clusters").screenshot()).std() > 5


def test_on_paper_are_both_runs(compared_file, visit):
    page = visit(compared_file)
    page.emulate_media(media="print")
    assert [part.is_visible() for part in page.locator("[data-run]").all()] == [True] * 4
