"""`ldmfast report`: one page from the benchmarks' files, and a sentence for one that is damaged or foreign."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from ldmfast.commands import bench_report, charts, cli

MACHINE = {"processor": "a <processor>", "threads": 2, "gpu": "none"}
SHAPE = {"work": "unet", "dtype": "float32", "size": 64, "batch": 1}


def told(seconds, memory=1024.0):
    return {"median_s": seconds, "memory_mib": memory, "times_s": [seconds]}


PEERS = {
    "what": "peers",
    "machine": MACHINE,
    "environment": {"OMP_NUM_THREADS": "2"},
    "rows": [
        {**SHAPE, "engines": {"ldmfast": told(2.0), "stock": told(3.0), "openvino-1": {"left_out": "is not <there>"}}},
        {**SHAPE, "engines": {"ldmfast": told(2.1), "openvino-1": told(2.5)}},  # of the next group
        {**SHAPE, "size": 32, "engines": {"ldmfast": told(0.5), "stock": told(0.9)}},
    ],
}
PARTS = {
    "what": "parts",
    "machine": MACHINE,
    **SHAPE,
    "parts": [
        {"part": "linear", "calls": 3, "seconds": 0.75, "gflops": 100.0, "percent_of_peak": 80.0},
        {"part": "rest", "calls": 1, "seconds": 0.25},
    ],
}
LAYERS = {
    "machine": MACHINE,
    "peak_gflops": {"float32": 100.0},
    "rows": [{"layer": "unet 3x3", "dtype": "float32", "ours_ms": 12.0, "percent_of_peak": 140.0}],
}
STEP = {
    "what": "SD1.5 step at 512x512",
    "device": "x86",
    "dtype": "bfloat16",
    "rows": [{"name": "ldmfast", "median_ms": 4000.0}, {"name": "other", "error": "OSError: <no>"}],
}


class Balanced(HTMLParser):
    """Holds that every element is closed, and notes what a page would fetch."""

    EMPTY = {"meta", "line", "circle", "polyline"}

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def made(tmp_path, **contents):
    paths = [tmp_path / f"{name}.json" for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return [str(path) for path in paths]


def drawn(tmp_path, **contents):
    out = tmp_path / "report.html"
    assert cli.main(["report", *made(tmp_path, **contents), "-o", str(out)]) == 0
    return out.read_text()


def test_a_page_has_every_file_and_fetches_nothing(tmp_path):
    text = drawn(tmp_path, peers=PEERS, parts=PARTS, layers=LAYERS, step=STEP)
    page = Balanced()
    page.feed(text)
    assert page.open == [] and page.fetched == [] and "url(" not in text and "http" not in text
    for seen in ("2.00 s, 1.0 GiB", "3.00 s, 1.50x", "2.50 s, 1.25x", "75.0 %", "140 %, 12 ms", "4.00 s", "<svg"):
        assert seen in text, seen
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "a &lt;processor&gt;" in text and "OSError: &lt;no&gt;" in text and "<no>" not in text
    assert "left out" not in text  # it was measured in the second group


@pytest.mark.parametrize("kind, content", [("peers", PEERS), ("parts", PARTS), ("layers", LAYERS), ("step", STEP)])
def test_what_the_files_lack_is_said(tmp_path, kind, content):
    text = drawn(tmp_path, one=content)
    assert {name: sentence in text for name, sentence in bench_report.MISSING.items()} == {
        name: name != kind for name in bench_report.MISSING
    }


def test_one_size_is_no_plot(tmp_path):
    text = drawn(tmp_path, one={**PEERS, "rows": PEERS["rows"][:1]})
    assert "<svg" not in text and "have one size and one batch" in text and "is not &lt;there&gt;" in text


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "bad.json is not JSON"),
        ("[]", "bad.json holds a list"),
        ({"what": "else"}, "bad.json is not a file of bench/peers"),
        ({**PEERS, "rows": [{**SHAPE, "engines": {"stock": {}}}]}, "bad.json is damaged: a row lacks 'median_s'"),
        (
            {**PEERS, "rows": [{**SHAPE, "engines": {"stock": told("2")}}]},
            "bad.json is damaged: median_s of stock is '2'",
        ),
        ({**PEERS, "rows": [{**SHAPE, "engines": 3}]}, "bad.json is damaged"),
        ({**PEERS, "rows": 3}, "bad.json is damaged"),
        ({**PEERS, "machine": 3}, "bad.json is damaged"),
        ({**PEERS, "rows": [{"engines": {}}]}, "bad.json is damaged: a row lacks 'size'"),
        (
            json.dumps({**PARTS, "parts": [{"part": "a", "seconds": float("nan")}]}),
            "bad.json is damaged: seconds is nan",
        ),
        ({**PARTS, "parts": []}, "bad.json is damaged: it has no part"),
        ({**LAYERS, "rows": [{}]}, "bad.json is damaged: a row lacks 'layer'"),
        ({**STEP, "rows": [{"name": "x"}]}, "bad.json is damaged: a row lacks 'median_ms'"),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path, capsys, content, message):
    files = made(tmp_path, good=PEERS, bad=content)
    assert cli.main(["report", *files, "-o", str(tmp_path / "out.html")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1 and not (tmp_path / "out.html").exists()


def test_a_file_that_is_missing_or_would_be_overwritten_is_said(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none.json"), "-o", str(tmp_path / "out.html")]) == 2
    assert "none.json" in capsys.readouterr().err
    (file,) = made(tmp_path, one=PEERS)
    assert cli.main(["report", file, "-o", file]) == 2
    assert "is one of the files to read" in capsys.readouterr().err and json.loads((tmp_path / "one.json").read_text())


@pytest.mark.parametrize("value, top", [(0.9, 1), (1.0, 1), (11, 12), (17, 20), (27, 40), (99, 100), (0.003, 0.004)])
def test_an_axis_ends_at_a_round_number(value, top):
    assert charts._round(value) == pytest.approx(top)
