"""The page in a real browser: sort, filter, hover, dark, phone; no console error, no request.

It wants Chromium with its driver (Debian: chromium chromium-driver) and is skipped where they are not.
"""

import base64
import json
import shutil

import pytest
from selenium import webdriver

from analysis.report import write_report
from tests.tables import LARGE, MEDIUM, evaluation, lost, row, write

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="no Chromium with its driver (Debian: chromium chromium-driver)"
    ),
    pytest.mark.xdist_group("browser"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def curve(level):
    return [
        {"stage": "energy", "step": 100 * i, "score": level * i, "return_mean": 2 * level * i + 10} for i in range(1, 6)
    ]


def sweep(folder):
    rows = []
    for task, base in ((MEDIUM, 60.0), (LARGE, 80.0)):
        for method, gain in (("aepo", 0.0), ("qgpo", -20.0)):
            for seed in range(3):
                score = base + gain + seed
                own = evaluation(method, score, 2 * score + 10)
                grid = [
                    {"beta": b, "guidance_scale": w, "score": b * w, "return_mean": b, "num_episodes": 2}
                    for b in (1.0, 3.0)
                    for w in (0.0, 2.0)
                ]
                rows.append(
                    row(task, seed, score, run=f"{task}-{method}-{seed}", method=method, evaluations=[own])
                    | {"curve": curve(score / 5), "grid": grid, "mlflow_run_id": "0a1b"}
                )
    failed = lost(MEDIUM, 3, run="failed-run", error="died <img src='http://example.invalid/x.png' onerror='alert(1)'>")
    holes = [lost(task, 3, run=f"{task}{method}", method=method) for task in (MEDIUM, LARGE) for method in ("qgpo",)]
    return write(folder, *rows, failed, *holes, lost(LARGE, 3, run="another"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    home = tmp_path_factory.mktemp("page")
    write_report(
        [sweep(home / "s")],
        home / "out",
        allow_missing=True,
        published=["IQL@corl-last"],
        tracking_uri="http://127.0.0.1:5000",
    )
    return (home / "out" / "report.html").as_uri()


@pytest.fixture
def browser(request, page):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        width, scheme = getattr(request, "param", (1280, "light"))
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get(page)
        wait(driver, "return document.documentElement.dataset.ready === 'true'")
        yield driver
    finally:
        driver.quit()


def wait(driver, script):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 30, poll_frequency=0.05).until(lambda each: each.execute_script(script))


def draw_all(driver):
    driver.execute_script("document.querySelectorAll('.area').forEach(draw)")
    wait(driver, "return [...document.querySelectorAll('.area')].every((area) => area.querySelector('.main-svg'))")


def tasks(driver):
    return driver.execute_script(
        "return [...document.querySelectorAll('#results tbody tr')].map((row) => row.cells[1].textContent)"
    )


def test_nothing_is_asked_for_and_nothing_goes_wrong(browser):
    draw_all(browser)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert browser.execute_script("return document.querySelectorAll('#holes img, #runs img').length") == 0
    assert "<img" in browser.execute_script("return document.getElementById('holes').textContent")


def test_the_table_is_sorted_and_filtered_and_keeps_its_averages(browser):
    assert tasks(browser) == [LARGE, MEDIUM]
    click = "document.querySelectorAll('#results thead th')[2].click()"
    browser.execute_script(click)
    assert tasks(browser) == [MEDIUM, LARGE]  # by AEPO's mean, ascending
    browser.execute_script(click)
    assert tasks(browser) == [LARGE, MEDIUM]
    field = browser.find_element("css selector", "#results input[type=search]")
    field.send_keys("medium")
    wait(browser, "return document.querySelectorAll('#results tbody tr').length === 1")
    assert tasks(browser) == [MEDIUM]
    assert "average of 2" in browser.execute_script("return document.querySelector('#results tfoot').textContent")


def test_the_run_list_is_filtered_and_links_to_mlflow(browser):
    field = browser.find_element("css selector", "#runs input[type=search]")
    field.send_keys("failed")
    rows = "return [...document.querySelectorAll('#runs tbody tr')].map((row) => row.textContent)"
    wait(browser, "return document.querySelectorAll('#runs tbody tr').length === 4")
    assert all("failed" in text for text in browser.execute_script(rows))
    field.clear()
    field.send_keys("qgpo finished")
    wait(browser, "return document.querySelectorAll('#runs tbody tr').length === 6")
    links = browser.execute_script("return [...document.querySelectorAll('#runs tbody a')].map((link) => link.href)")
    assert set(links) == {"http://127.0.0.1:5000/#/runs/0a1b"}


def test_curves_are_filtered_and_tell_their_numbers_under_the_mouse(browser):
    draw_all(browser)
    shown = "return [...document.querySelectorAll('#curves .plot')].filter((plot) => !plot.hidden).length"
    assert browser.execute_script(shown) == 2
    browser.find_element("id", "curve-filter").send_keys("large")
    assert browser.execute_script(shown) == 1
    from selenium.webdriver import ActionChains

    area = browser.find_element("css selector", "#curves .plot:not([hidden]) .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    ActionChains(browser).move_to_element(area).perform()
    wait(browser, "return document.querySelector('#curves .hoverlayer').textContent.includes('AEPO')")
    assert "±" in browser.execute_script("return document.querySelector('#curves .hoverlayer').textContent")


@pytest.mark.parametrize("browser", [(1280, "dark"), (1280, "light")], indirect=True)
def test_colours_follow_the_system_and_can_be_read(browser, request):
    draw_all(browser)
    back, text = browser.execute_script(
        "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
    )
    labels = browser.execute_script("return getComputedStyle(document.querySelector('.area .xtick text')).fill")
    dark = request.node.callspec.params["browser"][1] == "dark"
    assert (luminance(back) < 0.1) is dark
    assert contrast(back, text) > 7
    assert contrast(back, labels) > 4.5


def luminance(color):
    parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("browser", [(360, "light")], indirect=True)
def test_a_phone_scrolls_tables_not_the_page(browser):
    draw_all(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_it_prints_light_and_with_every_plot(browser):
    printed = browser.execute_cdp_cmd("Page.printToPDF", {})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    undrawn = "return [...document.querySelectorAll('.area')].filter((area) => !area.querySelector('.main-svg')).length"
    assert browser.execute_script(undrawn) == 0
