"""The page of `xbai serve` in a headless Chromium: ask, watch, read, and look at a result file.

FIGURES=1 also draws figures/page*.png.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from clocks import wait_until
from scripted_engine import ScriptedEngine

from xbai.aggregation import aggregate
from xbai.benchmarks.make10 import Numbers, Teacher, question_text, sample_problems
from xbai.engine import Completion
from xbai.engine.sample import FinishReason, Sample
from xbai.results.lines import ResultLine
from xbai.results.lines import Sample as StoredSample
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.options import OpenAIOptions
from xbai.serve.policy import create_policy_app

pytestmark = pytest.mark.slow

FIGURES = Path(__file__).parents[2] / "figures" if os.environ.get("FIGURES") else None
DESKTOP, PHONE = (1280, 900), (390, 844)
NUMBERS, SEED = (9, 1, 3, 4, 7), 13632
"""With this seed several answers, and steps of many scores."""
TEACHER = Teacher(attempt_weights=(2, 3, 5, 6, 6, 6), false_yes_rate=0.5)
"""Of more attempts than usual, for longer curves."""
HOSTILE = (
    '<script>window.owned = 1</script> <img src=x onerror="window.owned = 1"> [go](javascript:window.owned=1) '
    '<a href="data:text/html,x">x</a> <style>body{display:none}</style> ![spy](http://127.0.0.1:1/spy.png) '
    "<math><mtext></form><form><mglyph><style></math><img src onerror=window.owned=1> "
    "$\\frac{1$ $\\href{javascript:window.owned=1}{x}$ \\(\\begin{nothing}\\) $\\def\\a{\\a\\a}\\a$ $" + "{" * 200 + "$"
)


def score_of(step: str, rng: random.Random) -> float:
    """Of a step of Make 10: mostly low where it claims what is not so."""
    result, _, verdict = step.rstrip(".").rpartition(" ")
    is_claim_wrong = (verdict == "yes") != result.endswith("=10") or verdict == "close"
    is_seen = rng.random() < 0.9
    if is_claim_wrong and is_seen:
        return round(rng.uniform(0.08, 0.35), 4)
    return round(rng.uniform(0.45, 0.99) if verdict == "no" else rng.uniform(0.8, 0.99), 4)


@cache
def written(numbers: Numbers, seed: int) -> tuple[str, list[float]]:
    """A response, and the scores of its steps."""
    rng = random.Random(seed)
    text = TEACHER.solve(numbers, rng)
    steps = text.partition("<think>\n")[2].partition("\n\n</think>")[0].split("\n\n")
    return text, [score_of(step, rng) for step in steps]


class Make10Engine(ScriptedEngine):
    """Solves one problem, or says `says`; candidates stop at `pause_at` tokens while that is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, self._script)
        self.max_model_len = 2**15
        self.pause_at: int | None = None
        self.says: str | None = None

    def _script(self, prompt: str, index: int) -> tuple[str, float]:
        if prompt.endswith("</think>"):
            answer = prompt.rpartition("So ")[2].partition(".")[0]
            return f"\n\nThe answer is \\boxed{{{answer}}}.", 0.0
        return self.says or written(NUMBERS, SEED + index)[0], 0.5

    def _advance(self) -> list[tuple[Sample, Completion]]:
        if self.pause_at is not None and any(len(self.token_ids(one)) >= self.pause_at for one in self.running):
            time.sleep(0.01)
            return []
        return super()._advance()

    def _completion(self, sample: Sample, reason: FinishReason) -> Completion:
        completion = super()._completion(sample, reason)
        if completion.step_scores and self.says is None:
            completion.step_scores = written(NUMBERS, SEED + sample.index)[1][: len(completion.step_scores)]
        return completion


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, driven by Selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("the page is not tested: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage"),
        *(
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            "force-prefers-reduced-motion",
            f"user-data-dir={profile}",
        ),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Page:
    """What a person does with it and sees of it."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        self.resize(DESKTOP)
        browser.get(url)
        self.run("sessionStorage.clear()")
        browser.refresh()

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        """The first that is there, waited for."""
        wait_until(lambda: self.all(selector), f"there is a {selector}")
        return self.all(selector)[0]

    def texts(self, selector: str, within: str = "html") -> list[list[str]]:
        """Of each element `within`, the texts of those that the selector finds in it."""
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map("
            "  one => [...one.querySelectorAll(arguments[1])].map(found => found.innerText))",
            within,
            selector,
        )

    def text(self, selector: str) -> str:
        return "\n".join(self.texts(selector)[0])

    def wait_for(self, text: str, selector: str = "#app") -> None:
        wait_until(lambda: text in self.text(selector), f"{selector} says {text!r}")

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def ask(self, question: str, effort: str = "high") -> None:
        self.choose("Effort", effort)
        field = self.one("#prompt")
        field.clear()
        field.send_keys(question + "\n")

    def choose(self, label: str, value: str) -> None:
        from selenium.webdriver.support.select import Select

        (field,) = [one for one in self.all("label") if one.is_displayed() and one.text.startswith(label)]
        Select(field.find_element("css selector", "select")).select_by_visible_text(
            next(one.text for one in field.find_elements("css selector", "option") if one.text.startswith(value))
        )

    def open_file(self, path: Path) -> None:
        next(tab for tab in self.all(".tab") if tab.text == "Results").click()
        self.one("input[type=file]").send_keys(str(path))

    def points(self, selector: str) -> list[int]:
        """How many scores each sparkline draws."""
        curves = self.run(
            "return [...document.querySelectorAll(arguments[0])].map(curve => curve.getAttribute('d'))",
            f"{selector} .sparkline .line",
        )
        return [curve.count("L") + 1 for curve in curves]

    def resize(self, size: tuple[int, int]) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def assert_fits(self) -> None:
        """Nothing is wider than the screen."""
        assert self.run("return document.documentElement.scrollWidth <= innerWidth")

    def assert_quiet(self) -> None:
        """No error, and nothing that the policy had to stop."""
        assert self.browser.get_log("browser") == []
        assert self.run("return window.owned") is None

    def draw(self, name: str) -> None:
        if FIGURES is not None:
            self.run("document.activeElement.blur()")
            self.browser.save_screenshot(str(FIGURES / f"{name}.png"))


@pytest.fixture
def start(
    browser: Any, serve_app: Callable[..., str], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Page, Make10Engine]]:
    monkeypatch.setattr("xbai.serve.progress.INTERVAL_S", 0.2)

    def start(limits: Limits | None = None) -> tuple[Page, Make10Engine]:
        engine = Make10Engine(tiny_model_dir)
        app = create_policy_app(EngineThread(lambda: engine), "models/make10", limits or Limits(), OpenAIOptions())
        browser.get_log("browser")
        return Page(browser, serve_app(app)), engine

    return start


Start = Callable[..., tuple[Page, Make10Engine]]


def test_ask_watch_and_read(start: Start) -> None:
    page, engine = start()
    page.wait_for("make10", ".model")
    page.wait_for("Ask a question")
    engine.pause_at = 60
    page.ask(question_text(NUMBERS))
    page.wait_for("60 tokens", ".watch")
    early = page.points(".watch")
    assert len(early) == 32
    engine.pause_at = 110
    page.wait_for("110 tokens", ".watch")
    late = page.points(".watch")
    assert all(after >= before for before, after in zip(early, late)) and sum(late) > sum(early)
    assert len(page.all(".watch .leader")) == 1
    page.draw("page_watch")
    engine.pause_at = None
    page.wait_for("best of 32", ".facts")
    scores = [written(NUMBERS, SEED + index)[1] for index in range(32)]
    best = max(map(aggregate, scores))
    page.wait_for(f"score {best:.2f}", ".facts")
    assert page.all(".answer math") and "boxed" not in page.one(".answer .content").text
    # By score, also from group to group, and equal answers together.
    groups = [[float(score) for score in group] for group in page.texts(".score", within=".group")]
    assert groups == sorted(groups, key=max, reverse=True) and groups[0][0] == pytest.approx(best, abs=0.005)
    assert sum(map(len, groups)) == 32 and all(group == sorted(group, reverse=True) for group in groups)
    assert page.all(".group:first-child li:first-child .tag.chosen")
    # By the keyboard: to the second row, and to the lowest step in it.
    page.run("document.activeElement.blur()")
    page.press("j", "j", "l")
    page.one(".step:focus")
    (shown,) = page.texts(".step-score", within=".group:first-child .candidate:nth-child(2)")
    assert page.text(".step:focus .step-score") == min(shown)
    tints = page.run("return [...document.querySelectorAll('.step')].map(e => getComputedStyle(e).backgroundColor)")
    assert len(tints) == len(shown) and len(set(tints)) >= len(set(shown)) > 1
    page.assert_fits()
    page.run("scrollTo(0, 0)")
    page.draw("page")
    page.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
    page.draw("page_dark")
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    page.resize(PHONE)
    page.assert_fits()
    page.draw("page_phone")
    page.browser.refresh()
    page.wait_for("best of 32", ".facts")
    page.assert_quiet()


def test_stop_and_errors(start: Start) -> None:
    page, engine = start()
    engine.pause_at = 20
    page.ask("Stop me")
    page.one(".watch li")
    page.press("\ue00c")
    page.wait_for("Stopped.", ".answer")
    wait_until(lambda: not engine.running, "the engine is free")
    engine.pause_at = None
    temperature = next(one for one in page.all("label") if one.text == "Temperature")
    page.run("arguments[0].removeAttribute('max')", temperature.find_element("css selector", "input"))
    temperature.find_element("css selector", "input").send_keys("3")
    page.ask("Refuse me", "low")
    page.wait_for("temperature", ".notice.error")
    page.run("sessionStorage.clear()")
    page.browser.get_log("browser")


def test_the_key_is_asked_for_and_kept_for_the_tab(start: Start) -> None:
    page, _ = start(Limits(api_key="secret"))
    page.one("#key").send_keys("wrong\n")
    page.wait_for("That is not the service's API key.")
    page.one("#key").send_keys("secret\n")
    page.wait_for("make10", ".model")
    page.browser.refresh()
    page.wait_for("make10", ".model")
    page.ask(question_text(NUMBERS), "low")
    page.wait_for("best of 2", ".facts")
    assert page.run("return localStorage.length") == 0 and "secret" not in page.run("return document.cookie")
    page.browser.get_log("browser")


def test_what_a_model_says_is_never_obeyed(start: Start) -> None:
    page, engine = start()
    engine.says = f"<think>\n{HOSTILE}.\n\n</think>\n\n{HOSTILE}"
    page.ask("Attack", "none")
    page.wait_for("tokens", ".facts")
    wait_until(lambda: page.all(".candidate-head"), "it has ended")
    page.one(".candidate-head").click()
    for place in (".answer .content", ".candidate-text"):
        assert "<script>window.owned = 1</script>" in page.text(place)
        assert not page.run(
            "return document.querySelector(arguments[0]).querySelector('script, img, style, form, [onerror]')", place
        )
    assert page.all(".formula.broken")
    links = [link.get_attribute("href") for link in page.all(".answer a")]
    assert all(link is None for link in links)
    page.assert_fits()
    page.resize(PHONE)
    page.assert_fits()
    page.assert_quiet()


def result_line(index: int, numbers: Numbers, samples: int = 32) -> ResultLine:
    prompt = f"<|im_start|>user\n{question_text(numbers)}<|im_end|>\n<|im_start|>assistant\n"
    made = [written(numbers, 1000 * index + sample) for sample in range(samples)]
    stored = [
        StoredSample(index, i, text, "stop", len(text), score=aggregate(scores), step_scores=scores)
        for i, (text, scores) in enumerate(made)
    ]
    best = max(stored, key=lambda one: one.score or 0.0)
    answer = " ".join(map(str, numbers))
    return ResultLine(index, prompt, answer, {}, stored, best.response, 1.0, {"task": "make10"})


def test_a_result_file_of_200_questions_x_32(start: Start, tmp_path: Path) -> None:
    page, _ = start()
    rng = random.Random(0)
    problems = list(sample_problems(200, rng, 5))
    lines = [result_line(index, numbers) for index, numbers in enumerate(problems)]
    path = tmp_path / "results.jsonl"
    long = "x" * 200_000
    nested = ">" * 20_000 + "[" * 5_000 + f"${'{' * 3_000}$"
    response = f"<think>\n{HOSTILE} {long}.\n\n</think>\n\n{HOSTILE} {nested}"
    attack = [StoredSample(200, 0, response, "stop", score=0.5)]
    hostile = ResultLine(200, f"Attack {HOSTILE}", "1 2 3", {}, attack, "", 1.0, {"task": "make10"})
    texts = [line.to_json() for line in [*lines, hostile]]
    path.write_text("\n".join([*texts[:17], '{"prompt": "cut', *texts[17:]]) + "\n", encoding="utf-8")
    page.open_file(path)
    page.wait_for("201 questions × 32 samples", ".results .facts")
    page.wait_for("Line 18 is not a result line", ".notice.error")
    assert len(page.all(".question")) == 201
    page.choose("Show", "missed")
    page.choose("Sort", "smallest")
    gaps = [float(gap.replace("−", "-")) for gap in page.texts(".question .gap")[0]]
    assert gaps == sorted(gaps) and 0 < len(gaps) < 201 and gaps[0] < 0
    page.one(".question").click()
    page.wait_for("expected", ".detail")
    page.press("\ue014")
    assert page.run("return document.activeElement.matches('.detail .candidate-head')")
    assert set(page.texts(".detail .verdict")[0]) == {"✓ right", "✗ wrong"}
    page.one(".detail .group li:last-child .to-lowest").click()
    page.one(".detail .step:focus")
    page.run("scrollTo(0, 0)")
    page.draw("page_results")
    page.resize(PHONE)
    page.assert_fits()
    page.one(".back").click()
    page.assert_fits()
    page.resize(DESKTOP)
    page.choose("Show", "all")
    page.one("input[type=search]").send_keys("attack")
    wait_until(lambda: len(page.all(".question")) == 1, "one is found")
    page.one(".question").click()
    page.one(".detail .candidate-head").click()
    assert "<script>" in page.text(".detail .candidate-text") and long[:1000] in page.text(".detail .candidate-text")
    page.assert_fits()
    page.assert_quiet()


def test_the_samples_of_a_training_step(start: Start, tmp_path: Path) -> None:
    page, _ = start()
    # The same answer may be right and wrong: what is, the file says.
    verdicts = [(0, 1.0, True), (1, 0.0, True), (2, 0.0, False), (0, 0.0, True)]
    path = tmp_path / "7.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for question in ("first", "second"):
            prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            for seed, correct, graded in verdicts:
                response, scores = written(NUMBERS, SEED + seed)
                line = {"step": 7, "prompt": prompt, "response": response, "correct": correct, "graded": graded}
                line |= {"tokens": 9, "score": aggregate(scores), "step_scores": scores}
                stream.write(json.dumps(line) + "\n")
    page.open_file(path)
    page.wait_for("2 questions × 4 samples", ".results .facts")
    assert "graded in training" in page.text(".results .facts")
    assert page.texts(".question .share")[0] == ["1/4", "1/4"]
    page.one(".question").click()
    page.wait_for("first", ".detail .asked")
    assert set(page.texts(".detail .group .verdict")[0]) == {"✓ right", "✗ wrong"}
    page.one(".detail .candidate.chosen .candidate-head").click()
    page.one(".detail .step")
    best = max((written(NUMBERS, SEED + seed)[1] for seed in range(3)), key=aggregate)
    assert page.texts(".detail .step-score")[0] == [f"{score:.2f}" for score in best]
    page.assert_quiet()


def test_a_file_without_lines_and_one_that_is_none(start: Start, tmp_path: Path) -> None:
    page, _ = start()
    for content, said in (("", "The file has no result lines."), (json.dumps({"a": 1}), "Line 1 is not a result line")):
        path = tmp_path / "results.jsonl"
        path.write_text(content, encoding="utf-8")
        page.open_file(path)
        page.wait_for(said, ".results")
    page.assert_quiet()
