"""report.html: escaped, self-contained, well-formed, and telling the report's own numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest

from peftcli.report.html import render_html
from peftcli.report.schema import Report

Records = list[dict[str, Any]]
VOID = {"meta", "br", "hr", "img", "input", "link", "rect", "line", "path", "circle"}
LOADING = {
    "script",
    "link",
    "img",
    "iframe",
    "object",
    "embed",
    "video",
    "audio",
    "source",
    "base",
    "form",
    "use",
    "image",
    "foreignobject",
}
EVIL = '<script>alert(1)</script><img src=x onerror=alert(2)>" onmouseover="alert(3)\' </style></details>&lt;'


class Page(HTMLParser):
    """Fails on unbalanced tags; collects tags, attributes, text and ``<data>`` values."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.values: list[float] = []
        self.feed(source)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        self.tags.append((tag, dict(attrs)))
        if tag == "data":
            self.values.append(float(dict(attrs)["value"] or "nan"))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] != "style":
            self.shown.append(data)

    @property
    def text(self) -> str:
        return "".join(self.shown).replace("\xa0", " ")


def render(report: Report, metrics: Records, recipe: str = "train: {epochs: 1}\n") -> Page:
    source = render_html(report, metrics, recipe, title="my run")
    css = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in css
    assert "@import" not in css
    page = Page(source)
    assert not LOADING & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "href", "srcset", "action", "style", "xlink:href"), f"<{tag} {name}={value!r}>"
            assert not name.startswith("on"), f"<{tag} {name}={value!r}>"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return page


def test_full_page(report: Report, metrics: Records, recipe_text: str) -> None:
    page = render(report, metrics, recipe_text)
    assert "Exact match 0 % → 92.2 % on 64 held-out rows" in page.text
    for heading in ("Before and after", "Training", "Examples", "Data", "Checks", "Details", "Recipe", "Environment"):
        assert heading in page.text
    for chart in ("Loss", "Learning rate", "Gradient norm before clipping", "Speed", "Peak memory"):
        assert any(tag == "svg" and (found.get("aria-label") or "").startswith(f"{chart}.") for tag, found in page.tags)
    assert recipe_text.strip() in page.text
    for digest in report.files.values():
        assert digest in page.text
    assert report.environment.fingerprint in page.text


def test_every_drawing_can_be_read_out(report: Report, metrics: Records) -> None:
    drawings = [found for tag, found in render(report, metrics).tags if tag == "svg"]
    assert len(drawings) == 9
    assert all(found.get("role") == "img" and found.get("aria-label") for found in drawings)


def test_numbers_are_the_reports(report: Report, metrics: Records) -> None:
    values = set(render(report, metrics).values)
    assert report.eval is not None
    assert report.eval_before is not None
    for info in (report.eval, report.eval_before):
        assert {info.loss, *info.metrics.values()} <= values
    train = report.train
    assert {train.loss_first, train.loss_last, train.seconds, train.tokens_per_second, train.supervised_tokens_per_second} <= values
    assert {float(count) for count in (train.steps, train.tokens, train.supervised_tokens, train.peak_memory_bytes)} <= values
    assert {float(report.model.parameters), float(report.model.trainable_parameters)} <= values
    for split in (report.data.train, report.data.eval):
        assert split is not None
        assert {float(count) for count in split.model_dump().values()} <= values


def test_user_text_is_escaped_everywhere(values: dict[str, Any], metrics: Records) -> None:
    values["model"]["name"] = values["environment"]["device_name"] = values["train"]["batch_order"] = EVIL
    values["examples"][0].update(prompt=EVIL, reference=EVIL, before=EVIL, after=EVIL)
    values["method"]["options"] = {EVIL: EVIL, "list": [EVIL]}
    values["checks"]["label_audit"] = {EVIL: EVIL, "example": [[EVIL, True], [EVIL, False]]}
    values["checks"]["live_adapter"].update(passed=False, missing=[EVIL], note=EVIL)
    values["notes"] = [EVIL]
    values["files"] = {EVIL.replace("/", "|"): "0" * 64}
    source = render_html(Report.model_validate(values), metrics, f"# {EVIL}\nname: '{EVIL}'\n", title=EVIL)
    plain = render_html(Report.model_validate({**values, "examples": []}), metrics, "", title="x")
    for page in (Page(source), Page(plain)):
        assert not LOADING & {tag for tag, _ in page.tags}
        assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert Page(source).text.count(EVIL) >= 12


def test_browser_is_told_to_load_nothing(report: Report) -> None:
    policies = [found["content"] for tag, found in render(report, []).tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


@pytest.mark.parametrize("steps", [0, 1, 2, 8, 3000])
def test_any_number_of_steps(values: dict[str, Any], make_curve: Callable[[int], Records], steps: int) -> None:
    values["train"]["steps"] = steps
    if steps == 0:
        values["train"].update(loss_first=None, loss_last=None, tokens=0, seconds=0.0, tokens_per_second=0.0)
    page = render(Report.model_validate(values), make_curve(steps))
    assert "nan" not in page.text.lower().split()


def test_without_held_out_rows(values: dict[str, Any], metrics: Records) -> None:
    values["eval"] = values["eval_before"] = values["data"]["eval"] = None
    values["examples"] = []
    page = render(Report.model_validate(values), [record for record in metrics if "loss" in record])
    assert "no held-out rows" in page.text
    assert "Examples" not in page.text


def test_without_a_baseline_nothing_is_compared(values: dict[str, Any], metrics: Records) -> None:
    values["eval_before"] = None
    for example in values["examples"]:
        example.update(before=None, correct_before=None)
    page = render(Report.model_validate(values), metrics)
    assert "Exact match 92.2 % on 64 held-out rows" in page.text
    assert "Base model" not in page.text.split("Examples")[1].split("Data")[0]


def test_failed_run_shows_its_error(values: dict[str, Any]) -> None:
    values.update(status="failed", error="loss is NaN at step 12\nlearning_rate 5 is very high", eval=None)
    values["checks"]["live_adapter"] = None
    page = render(Report.model_validate(values), [{"step": 12, "loss": None, "note": "loss is nan"}])
    assert "Failed after 128 steps" in page.text
    assert "loss is NaN at step 12" in page.text
    assert "Nothing was saved" in page.text


def test_failed_live_adapter_check_is_not_overlooked(values: dict[str, Any]) -> None:
    values["checks"]["live_adapter"].update(passed=False, unmoved=["model.layers.0.lora_A.weight"])
    page = render(Report.model_validate(values), [])
    assert "do not use the saved weights" in page.text
    assert "model.layers.0.lora_A.weight" in page.text


def test_very_long_texts_are_cut_and_counted(values: dict[str, Any]) -> None:
    values["examples"][0]["before"] = "word " * 100_000
    values["checks"]["label_audit"]["example"] = [["token " * 50_000, True]]
    source = render_html(Report.model_validate(values), [], "", title="x")
    assert len(source) < 150_000
    assert "480,000 more characters" in source


def test_other_scripts_keep_their_direction(report: Report) -> None:
    page = render(report, [])
    assert "把客厅的灯调暗到百分之三十" in page.text
    users = [found for _, found in page.tags if found.get("class") == "user"]
    assert users
    assert all(found.get("dir") == "auto" for found in users)


def test_control_characters_become_visible(values: dict[str, Any]) -> None:
    values["examples"][0]["before"] = "a\x00b\x1b[31mc"
    source = render_html(Report.model_validate(values), [], "", title="x")
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", source)
    assert "a\u2400b\u241b[31mc" in source


def test_supervised_tokens_are_marked(report: Report) -> None:
    source = render_html(report, [], "", title="x")
    marked = re.findall(r"<mark>(.*?)</mark>", source.split("carry loss")[1])
    assert [unescape(piece) for piece in marked] == ['{"action": "set_alarm", "day": "thursday", "time": "06:20"}<|im_end|>']
