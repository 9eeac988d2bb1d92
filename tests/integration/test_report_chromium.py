"""The report in a real browser: it opens from disk, asks for nothing, shows its figures, and its tables work."""

import json
import shutil
import sys
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the python package playwright is not installed")
sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
import report_data  # noqa: E402

from ds_stability.eval import report  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser on the PATH: none of {', '.join(NAMES)}")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = report_data.write_evaluation(tmp_path_factory.mktemp("evals") / "browser", ("gpt2", "llama"), (0.0, 0.5, 1.0), (0, 1), units=6,
                                          decodings=("greedy", "sample"), steps=40)  # fmt: skip
    samples = folder / "cells" / "gpt2-feedback-0-0" / "samples.jsonl"
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line in lines:
        if line["prompt"] == 0:
            line["text"] = report_data.HOSTILE
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return report.write_report(folder, predictions=Path(report.__file__).with_name("predictions.yaml"))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, path):
    """The opened report; afterwards: no error and no request but for the file itself."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    errors, requests = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(path.as_uri())
    yield page
    assert errors == [] and requests == [path.as_uri()]
    page.close()


def test_every_figure_is_visible(page):
    images = page.locator("img")
    assert images.count() >= 6
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 300 && image.alt)")
    assert page.locator("#headline + figure img").bounding_box()["width"] > 600
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate("[...document.images].every(image => image.getBoundingClientRect().width > 100)")


def test_filter_and_sort(page):
    rows = page.locator("#results-table tbody tr")
    before = rows.count()
    page.fill("#results-filter", "predictive_entropy HELD_OUT llama feedback")
    assert rows.count() == 3 < before
    assert "3 of" in page.inner_text("#results-count")
    value = page.locator("#results-table thead th").nth(5)
    for order in (sorted, lambda values: sorted(values, reverse=True)):
        value.locator("button").click()
        values = [float(text.replace("\u2212", "-")) for text in rows.locator("td:nth-child(6)").all_inner_texts()]
        assert values == order(values) and len(set(values)) == 3
    assert value.get_attribute("aria-sort") == "descending"
    page.fill("#results-filter", "no such measure")
    assert rows.count() == 0
    page.fill("#trends-filter", "mtld greedy")
    assert page.locator("#trends-table tbody tr").count() == 2


def test_samples_side_by_side_and_search(page):
    cards = page.locator("#samples-view .card")
    page.locator("#samples-controls select").nth(4).select_option(index=1)
    titles = page.locator("#samples-view .card header span:first-child").all_inner_texts()
    assert titles == ["human text", "untouched: pretrained", "level 0", "level 0.5", "level 1"]
    assert "marker-1-sample-0.5" in cards.nth(3).inner_text()
    page.locator("#samples-controls select").nth(3).select_option(label="greedy")
    assert "marker-1-greedy-0.5" in cards.nth(3).inner_text()
    page.fill("#samples-filter", "MARKER-3-greedy-1")
    assert cards.count() > 0 and cards.count() == page.locator("#samples-view mark").count()
    assert "samples" in page.inner_text("#samples-count")
    page.fill("#samples-filter", "")
    assert cards.count() == 5


def test_a_hostile_sample_does_nothing(page):
    text = page.locator("#samples-view .card").nth(2).inner_text()
    assert "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>" in text
    assert "\u2400" in text and "\u241b" in text
    page.fill("#samples-filter", "<img src=x")
    assert page.locator("#samples-view .card").count() == 2
    assert page.evaluate("typeof window.hacked") == "undefined" and page.locator("#samples-view img").count() == 0


# Of every visible figure: its smallest text in CSS pixels, as drawn at the size it has in this window.
TEXT_SIZES = """() => [...document.images].map(image => {
  const svg = atob(image.currentSrc.split(",")[1]), scale = image.getBoundingClientRect().width / svg.match(/viewBox="0 0 ([\\d.]+)/)[1];
  return Math.min(...[...svg.matchAll(/font(?:-size)?: ?([\\d.]+)px/g)].map(size => size[1] * scale));
})"""


def look(browser, path, width, dark=False):
    """The page at this width, with everything opened: (page, smallest text of each figure). No error, no overflow of the page."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light")
    errors = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "tables scroll in their own boxes"
    assert page.evaluate("[...document.querySelectorAll('table')].every(table => table.closest('.wide'))")
    tallest = page.evaluate("Math.max(...[...document.querySelectorAll('tbody tr')].map(row => row.getBoundingClientRect().height))")
    assert tallest < 700, "a row fits on a phone's screen, not squeezed into a column of single words"
    assert errors == []
    return page, page.evaluate(TEXT_SIZES)


@pytest.mark.parametrize(("width", "smallest", "dark"), [(390, 10.0, True), (390, 10.0, False), (1400, 9.5, False)])
def test_figures_are_legible_on_a_phone_and_on_a_desk(browser, path, width, smallest, dark):
    page, sizes = look(browser, path, width, dark)
    assert len(sizes) >= 6 and min(sizes) >= smallest
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")
    first = page.locator("#results-table tbody tr td:first-child").first
    assert (first.evaluate("cell => getComputedStyle(cell).position") == "sticky") == (width == 390), "a row says which it is while it scrolls"
    page.close()


@pytest.fixture(scope="module", params=[1, 3], ids=["one model", "three models"])
def models_path(request, tmp_path_factory):
    """Models that no run of ours made; the last has prompts of its own."""
    folder = tmp_path_factory.mktemp("evals") / "models"
    for place, name in enumerate(("one", "two", "a-third-model-of-a-long-name-0123abcd")[: request.param]):
        report_data.write_cell(folder, name, None, None, 0.3 * place, None, 6, None, ("sample",), 0)
    if request.param > 1:
        prompts = folder / "cells" / name / "prompts.jsonl"
        prompts.write_text(prompts.read_text().replace("It was", "A different prompt"))
    return report.write_report(folder), request.param


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1400, True)])
def test_models_without_levels(browser, models_path, width, dark):
    path, count = models_path
    page, sizes = look(browser, path, width, dark)
    assert len(sizes) == 1 and min(sizes) >= (10.0 if width == 390 else 9.5)
    assert page.locator("#headline + .wide thead th").count() == count + 3
    assert page.locator("#models-table tbody tr").count() == (0 if count == 1 else 3 * 7)
    if count > 1:
        page.fill("#models-filter", "bits_per_byte two")
        assert page.locator("#models-table tbody tr").count() == 2
    titles = page.locator("#samples-view .card header span:first-child").all_inner_texts()
    assert titles == (["human text", "one"] if count == 1 else ["human text", "human text", "a-third-model-of-a-long-name", "one", "two"])
    own = page.locator("#samples-view .own-prompt").all_inner_texts()
    assert own == ([] if count == 1 else [f"Prompt 0: {text}" for text in ("A different prompt", "It was", "A different prompt", "It was", "It was")])
    assert page.locator("#samples-view .prompt").count() == (count == 1)
    page.close()


def write_hostile(folder):
    """An evaluation in which every name and text comes from a stranger."""
    evil = report_data.HOSTILE + "<svg onload='window.hacked = 3'>\u2028');window.hacked=4;('${window.hacked=5}{{7*7}}" + "javascript:window.hacked=6"
    report_data.write_evaluation(folder, ("gpt2",), (0.0, 0.5), (0, 1), units=4, decodings=("sample",))
    for cell in sorted((folder / "cells").iterdir()):
        meta, scores = (json.loads((cell / name).read_text()) for name in ("cell.json", "scores.json"))
        if meta["run"] is not None:
            meta["run"]["architecture"], meta["run"]["arm"] = f"arch {evil}", f"{meta['run']['arm']} {evil}"
        meta["suite"] = {evil: evil}
        scores["rows"] += [{**scores["rows"][0], "metric": evil, "note": evil, "unit": evil}]
        (cell / "cell.json").write_text(json.dumps(meta))
        (cell / "scores.json").write_text(json.dumps(scores))
        lines = [json.loads(line) for line in (cell / "samples.jsonl").read_text().splitlines()]
        long = "A" * 5_000_000
        (cell / "samples.jsonl").write_text("".join(json.dumps(line | {"text": evil + long * (line["prompt"] == 1), "finish": evil}) + "\n" for line in lines))
        (cell / "prompts.jsonl").write_text("".join(json.dumps({"index": i, "text": evil, "reference_text": evil}, ensure_ascii=False) + "\n" for i in range(4)))
    broken = folder / "cells" / "<img src=x onerror='window.hacked = 7'>"
    broken.mkdir()
    return evil


def test_every_name_from_a_stranger_does_nothing(browser, tmp_path):
    folder = tmp_path / "<b onmouseover=window.hacked=8>"
    write_hostile(folder)
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps([{"id": report_data.HOSTILE, "statement": report_data.HOSTILE, "metric": report_data.HOSTILE, "minimum": 1}]))
    path = report.write_report(folder, predictions=predictions)
    assert path.stat().st_size < 20_000_000, "a sample of 5 MB is cut"
    page = browser.new_page()
    errors, requests = [], []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.fill("#results-filter", "onerror")
    page.fill("#samples-filter", "</script>")
    assert page.locator("mark").count() > 0
    page.fill("#samples-filter", "")
    assert page.evaluate("window.hacked === undefined && document.title.length > 0")
    assert page.evaluate("document.querySelectorAll('svg, b, img:not([src^=\"data:image/svg+xml;base64,\"]), a:not([href^=\"#\"])').length") == 0
    assert page.evaluate("[...document.querySelectorAll('*')].every(node => [...node.attributes].every(a => !a.name.startsWith('on')))")
    assert page.evaluate("![...document.body.innerText].some(c => (c < ' ' && c !== '\\n' && c !== '\\t') || '\\u202e\\u2028\\x9b'.includes(c))")
    assert errors == [] and requests == [path.as_uri()]
    page.close()
