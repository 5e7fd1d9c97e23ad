"""The parity report as files: JSON that says what was found, and one page that needs nothing else."""

import io
import json
import math
import re
import sys
from dataclasses import asdict, replace
from functools import cache
from html.parser import HTMLParser

import pytest
from rich.console import Console

from gemma_export.exporter.parity.page import render_html, report_table, write_report
from gemma_export.exporter.parity.page_figures import number
from gemma_export.exporter.parity.page_quantized import cache_line
from gemma_export.exporter.parity.report import (
    Continuation,
    ContinuationText,
    Cost,
    Divergence,
    LayerErrors,
    MeasuredText,
    ParityReport,
    PhaseErrors,
    Quantized,
)
from gemma_export.exporter.screen import MOST_KEPT, parity_table
from gemma_export.runtime.parity import BUDGETS, ParityFigures

HOSTILE = "</p></style><script>alert('x')</script><img src=x onerror=alert(1)>&amp;\u202e\x00\"'"
VOID = {"meta", "link", "img", "br", "hr", "use", "input"}

FIGURES = ParityFigures(
    tokens=5,
    non_finite_reference=0,
    non_finite_bundle=0,
    max_absolute_error=0.01,
    mean_absolute_error=0.001,
    max_relative_error=0.0005,
    mean_kl=2e-6,
    max_kl=1e-5,
    top1_agreement=0.8,
    reference_perplexity=12.345,
    bundle_perplexity=12.346,
    positions=(0, 3, 4, 9),
    kl_by_position=(0.0, 1e-7, 2e-6, 1e-5),
    error_by_position=(0.0, 1e-4, 2e-3, 3e-3),
    agreement_by_position=(1.0, 1.0, 1.0, 0.5),
)
REPORT = ParityReport(
    subject="gemma-2b, fp16 for onnx",
    verdict="pass",
    reasons=(),
    level="quick",
    precision="fp16",
    reference="the checkpoint in fp32, by gemma-export's eager decoder",
    figures=FIGURES,
    budget=BUDGETS["fp16"],
    cache_bound=0.01,
    phases=(
        PhaseErrors("prefill", (0, 3), (0.0, 1e-3), 2),
        PhaseErrors("decode", (4, 9, 9), (2e-3, 1e-2, math.nan), 2),
    ),
    layers=(LayerErrors(0, 1e-4, 1e-5, 2e-4, 2e-5), LayerErrors(1, 3e-4, 1e-5, 2e-3, 2e-5)),
    continuations=(
        Continuation("prose", (2, 7), (8, 9), None, ContinuationText("Once upon", " a time", "", "", "")),
        Continuation(
            "list",
            (2, 7),
            (8, 9, 10),
            Divergence(1, 2, 9, 11, 0.004, 0.01, near_tie=True),
            ContinuationText("Once upon", " a", "\n", " time", " there"),
        ),
        Continuation("no tokenizer", (2, 7), (8, 9), Divergence(0, 1, 8, 12, 0.5, 0.6, near_tie=False), None),
    ),
    texts=(
        MeasuredText("prose", "Once upon a time", 10, 5, (1, 2, 5)),
        MeasuredText("ids", None, 3, 2, (1,)),
    ),
    max_length=8192,
    logits="last",
    cost=Cost(12, 40, 3.5, 44, 6.25),
    versions={"gemma-export": "0.1.0", "torch": "2.13.0"},
)
QUANTIZED = replace(
    REPORT,
    subject="gemma-2b, int8 for cpu",
    precision="int8",
    quantized=Quantized(
        "w8a8-dynamic",
        {"w8a8-token": 70, "w8": 2, "float": 1},
        {"layers.0.mlp.down_proj": "quantized alone as w8 it has a KL of 0.01 <and more>"},
        "int8",
    ),
)


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what matters."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def failing(text: str) -> ParityReport:
    """A report that says `text` wherever it can say anything."""
    return replace(
        REPORT,
        subject=text,
        verdict="fail",
        reasons=(text, "the mean KL divergence is nan, above 0.0001"),
        precision=text,
        reference=text,
        figures=replace(FIGURES, mean_kl=math.nan, max_kl=math.inf, non_finite_bundle=2),
        budget=replace(BUDGETS["fp16"], reason=text),
        layers=(LayerErrors(0, math.nan, 0.0, math.nan, 0.0),),
        continuations=(
            Continuation(
                text,
                (2,),
                (3,),
                Divergence(0, 0, 3, 4, 1.0, 2.0, near_tie=False),
                ContinuationText(text, text, text, text, text),
            ),
        ),
        texts=(MeasuredText(text, text, 3, 2, (1,)),),
        versions={text: text},
        quantized=Quantized(text, {text: 1}, {text: text}, text),
    )


@cache
def html(kind: str) -> str:
    """The page of the plain or of the hostile report; drawing takes most of these tests' time."""
    return render_html(REPORT if kind == "plain" else failing(HOSTILE))


def test_the_page_is_well_formed_and_says_it_all():
    page = Page(html("plain"))
    assert page.tags.count("svg") == 3
    for words in (
        "gemma-2b, fp16 for onnx",
        "Pass.",
        "Largest error of a logit / largest logit",
        "≤ 0.005",
        "12.35",
        "Once upon",
        "parts at token 2 of 3",
        "a near tie, margin 0.004",
        "not a tie",
        "↵",
        "What this does not see",
        "Of the cache's 8,192 slots the first 10 were used.",
        "the logits of a step's last token",
        "--reference transformers",
        "torch 2.13.0",
    ):
        assert words in page.text, words


def test_the_page_says_which_layers_keep_16_bits_and_why():
    page = Page(render_html(QUANTIZED))
    for words in (
        "The scheme is w8a8-dynamic.",
        "8 bits, a scale per row; activations in 8 bits, a scale per token w8a8-token 70",
        "16 bits float 1",
        "Kept in 16 bits",
        "layers.0.mlp.down_proj quantized alone as w8 it has a KL of 0.01 <and more>",
        "KV cache int8, a scale for the keys and one for the values of each head and layer: keys off by at "
        "most 0.0003 of the largest (layer 1; in the mean 1 · 10⁻⁵), values off by at most 0.002 of the "
        "largest (layer 1; in the mean 2 · 10⁻⁵).",
    ):
        assert words in page.text, words
    assert "What is quantized" not in Page(html("plain")).text


def test_the_page_says_that_no_layer_keeps_16_bits():
    assert QUANTIZED.quantized is not None
    page = Page(render_html(replace(QUANTIZED, quantized=replace(QUANTIZED.quantized, kept={}))))
    assert "Every linear layer, the embedding table and the head are quantized." in page.text
    assert "Kept in 16 bits" not in page.text


def test_a_cache_that_is_no_number_is_the_worst():
    layers = (LayerErrors(0, 0.5, 0.1, 0.2, 0.1), LayerErrors(1, math.nan, 0.1, 0.1, 0.1))
    line = cache_line(replace(QUANTIZED, layers=layers))
    assert "keys off by at most not a number of the largest (layer 1" in line
    assert "values off by at most 0.2 of the largest (layer 0" in line
    assert cache_line(replace(REPORT, layers=())) == ""


@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_the_page_runs_nothing_and_fetches_nothing(kind):
    text = html(kind)
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name != "src"
        if name == "href":
            assert value.startswith("#")
        assert not re.search(r"url\((?!#)", value)
    assert "default-src 'none'" in text


def test_hostile_text_is_shown_as_text():
    page = Page(html("hostile"))
    visible = HOSTILE.replace("\x00", "\ufffd")
    assert page.text.replace("\x00", "\ufffd").count("<script>alert('x')</script>") >= 12
    assert visible[:20] in page.text
    assert "Fail." in page.text
    assert "not a number" in page.text
    assert "infinite" in page.text


def test_ids_are_unique_and_every_reference_has_one():
    page = Page(html("plain"))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = {value[1:] for name, value in page.attributes if name == "href"}
    for _, value in page.attributes:
        referred |= set(re.findall(r"url\(#([^)]+)\)", value))
    assert referred
    assert referred <= set(ids)


def test_plots_follow_the_colours_of_the_page():
    svg = re.findall(r"<svg.*?</svg>", html("plain"), re.DOTALL)
    for plot in svg:
        assert "var(--ink)" in plot
        assert "#0" not in plot
        assert "<metadata" not in plot


def test_nothing_to_draw_is_no_error():
    exact = replace(
        REPORT,
        figures=replace(FIGURES, max_absolute_error=0.0, max_relative_error=0.0, kl_by_position=(0.0,) * 4),
        phases=(PhaseErrors("prefill", (0, 3), (0.0, 0.0), 2), PhaseErrors("decode", (4,), (math.nan,), 0)),
        layers=(LayerErrors(0, 0.0, 0.0, 0.0, 0.0),),
        continuations=(),
    )
    assert Page(render_html(exact)).tags.count("svg") == 3


def test_without_matplotlib_there_are_tables_and_a_hint(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(render_html(REPORT))
    assert "svg" not in page.tags
    assert 'pip install "gemma-export[parity]"' in page.text
    assert "Largest error of a logit / largest logit" in page.text


def test_programs_read_which_layers_keep_16_bits(tmp_path):
    json_path, _ = write_report(QUANTIZED, tmp_path)
    read = json.loads(json_path.read_text(encoding="utf-8"))
    assert read["quantized"] == asdict(QUANTIZED.quantized)
    write_report(REPORT, tmp_path)
    assert json.loads(json_path.read_text(encoding="utf-8"))["quantized"] is None


@pytest.mark.parametrize("report", [REPORT, failing(HOSTILE + "\udcff")], ids=["plain", "hostile"])
def test_writes_both_files(report, tmp_path):
    json_path, html_path = write_report(report, tmp_path)
    assert (json_path, html_path) == (tmp_path / "parity.json", tmp_path / "parity.html")
    read = json.loads(json_path.read_text(encoding="utf-8"))
    assert read["verdict"] == report.verdict
    assert read["subject"] == report.subject
    assert read["phases"][1]["errors"] == [0.002, 0.01, None]
    assert html_path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("report", [REPORT, failing("[bold]x[/nothing]")], ids=["plain", "hostile"])
def test_a_terminal_gets_the_same_figures(report):
    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(report_table(report))
    shown = console.file.getvalue()
    assert f"{report.subject}: {report.verdict}" in shown
    assert "Largest error of a logit / largest logit" in shown
    assert "≤ 0.005" in shown
    for reason in report.reasons:
        assert reason in shown


def screen(report: ParityReport) -> str:
    console = Console(width=200, file=io.StringIO(), color_system=None)
    console.print(parity_table(report))
    return console.file.getvalue()


def test_the_screen_says_which_layers_keep_16_bits_and_why():
    assert "16 bits" not in screen(REPORT)
    text = screen(QUANTIZED)
    assert (
        "16 bits            layers.0.mlp.down_proj: quantized alone as w8 it has a KL of 0.01 <and more>"
        in text
    )
    assert (
        "KV cache           int8, a scale for the keys and one for the values of each head and layer: keys"
        in text
    )
    many = {f"layers.{i}.mlp.down_proj": "it costs [red] much" for i in range(MOST_KEPT + 3)}
    text = screen(replace(QUANTIZED, quantized=replace(QUANTIZED.quantized, kept=many)))
    assert f"layers.{MOST_KEPT - 1}.mlp.down_proj: it costs [red] much" in text
    assert f"layers.{MOST_KEPT}.mlp.down_proj" not in text
    assert "and 3 more: parity.json names them" in text
    text = screen(replace(QUANTIZED, quantized=replace(QUANTIZED.quantized, kept={})))
    assert "16 bits            no layer: all are quantized" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5, "1.23 · 10³"),
        (0.00012345, "0.000123"),
        (1.5e-9, "1.5 · 10⁻⁹"),
        (math.nan, "not a number"),
        (math.inf, "infinite"),
    ],
)
def test_numbers_are_written_as_people_write_them(value, text):
    assert number(value) == text
