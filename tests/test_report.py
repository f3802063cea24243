"""The page of a run: every figure is the run's, whatever is missing; and a browser draws it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from plotly.offline import get_plotlyjs

from data_pipeline.settings import UserError, load_settings
from data_pipeline.shards import ShardedDataset
from pretrain.checkpoint import finished_checkpoints
from pretrain.config import RunConfig
from pretrain.evaluate import own_score
from pretrain.kept_embeddings import KeptEmbeddings, embeddings_path
from pretrain.report.gallery import choose, make_gallery, open_dataset
from pretrain.report.history import MAX_BARS, MAX_POINTS, read_run
from pretrain.report.media import SOUND_RATE_HZ, view_sample
from pretrain.report.page import write_report
from pretrain.report.projection import project
from pretrain.report.scores import Answer, Question, answers, score_samples
from pretrain.retrieval import evaluate_retrieval
from pretrain.run_log import BETWEEN_STEPS, METRICS, STAGES, VALIDATION, append_line, read_lines
from pretrain.stored_tensors import StoredTensors
from pretrain.trainer import write_run_config
from tests.test_resume import finish, write_config
from tests.tiny_dataset import make_sample, noisy_members, write_dataset, write_mixed_dataset

NUM_STEPS = 6
EVIL = "<script>window.evil = 1</script> a \"red\" <b>square</b> & 'tone'"
MAX_PAGE_BYTES = 8_000_000  # beside plotly.js


class Page(HTMLParser):
    """What a report says: its text, its tables, its figures by heading."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.figures: dict[str, dict[str, Any]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._headings: list[str] = []
        self._inside: list[str] = []
        self._parts: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self._parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "rect", "path"):
            self._inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        inside = self._inside[-1] if self._inside else ""
        if inside == "script" and dict(self.tags[-1][1]).get("type") == "application/json":
            self.figures[self._headings[-1]] = json.loads(data)
        elif inside not in ("script", "style"):
            self._parts.append(data)
            if inside in ("h1", "h2", "h3", "h4"):
                self._headings.append(data.strip())
            if any(tag in self._inside for tag in ("td", "th")):
                self.rows[-1][-1] += data

    def trace(self, heading: str, name: str) -> dict[str, Any]:
        """One line of a figure."""
        return next(trace for trace in self.figures[heading]["data"] if trace.get("name") == name)


def parallelotope(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "pretrain.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def configure(folder: Path, dataset: Path, run: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"schedule": {"num_steps": NUM_STEPS}, "validation": {"every_steps": 3}, **changes}
    return write_config(folder / "config.yaml", dataset, run, train={"log_every": 1}, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Path:
    """A run of two ranks, trained and evaluated; only read it."""
    folder = tmp_path_factory.mktemp("trained")
    finish(configure(folder, small_dataset, folder / "run"), 2)
    return folder / "run"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, to change."""
    return Path(shutil.copytree(trained, tmp_path / "other folder" / "run", ignore=shutil.ignore_patterns("events*")))


def made_run(folder: Path, dataset: Path, num_samples: int, num_steps: int = 3, split: str = "train") -> Path:
    """A run folder without training: random embeddings of samples of `dataset`, and what was measured on them."""
    run = folder / "made"
    config = load_settings(RunConfig, configure(folder, dataset, run, schedule={"num_steps": num_steps}))
    write_run_config(run, config)
    data = ShardedDataset(dataset, split)
    positions = torch.arange(num_samples) % len(data)
    generator = torch.Generator().manual_seed(0)
    names = config.towers.names
    shared = torch.randn(num_samples, 12, generator=generator)
    vectors = {n: F.normalize(shared + 0.4 * torch.randn(num_samples, 12, generator=generator), dim=1) for n in names}
    present = {name: torch.ones(num_samples, dtype=torch.bool) for name in names}
    kept = KeptEmbeddings.of(data, num_steps, vectors, present, positions)
    kept.save(embeddings_path(run, "validation"))
    result = evaluate_retrieval(vectors, present)
    append_line(run / VALIDATION, {"step": num_steps, "score": 0.5, **result.to_json()})
    lines = [json.dumps({"step": step, "loss": 1 / step, "lr": 1e-3, "time_s/data": 0.5, "time_s/step": 1.5})
             for step in range(1, num_steps + 1)]  # fmt: skip
    (run / METRICS).write_text("\n".join(lines) + "\n")
    return run


def captioned_dataset(folder: Path, captions: list[str]) -> Path:
    samples = [make_sample(i, noisy_members(i, 1.6), 1.6, (text,)) for i, text in enumerate(captions)]
    return write_dataset(folder, samples, samples_per_shard=4)


def page_of(*runs: Path, out: Path) -> Page:
    write_report(runs, out)
    return Page(out)


def test_page_made_while_training_holds_the_runs_figures(trained: Path) -> None:
    page = Page(trained / "report.html")
    lines = read_lines(trained / METRICS)
    steps = [record["step"] for record in lines]
    assert steps == list(range(1, NUM_STEPS + 1))
    shown = {
        "Loss and its terms": {"loss": "loss", "gram": "gram", "gram/orientation": "gram/orientation"},
        "Positive cosine while training": {p: f"positive_cosine/{p}" for p in ("video-audio", "video-text")},
        "Temperatures": {"gram": "temperature/gram"},
        "Gradient norm": {"grad_norm": "grad_norm"},
        "Learning rate": {"lr": "lr"},
        "Throughput": {"samples_per_s": "samples_per_s"},
    }
    for heading, names in shown.items():
        for name, key in names.items():
            trace = page.trace(heading, name)
            assert trace["x"] == steps, heading
            assert trace["y"] == pytest.approx([record[key] for record in lines], rel=1e-5), heading
    newest = read_lines(trained / VALIDATION)
    assert page.trace("Validation R@1", "validation")["x"] == [3, 6]
    assert page.trace("Validation R@1", "validation")["y"] == pytest.approx(
        [100 * r["score"] for r in newest], rel=1e-5
    )
    assert f"finished, {NUM_STEPS} steps" in page.text
    assert f"{NUM_STEPS} of {NUM_STEPS}" in page.text
    assert "2 ranks, CPU" in page.text
    assert yaml.safe_load(html.unescape(re.findall(r"<pre>(.*?)</pre>", page.source, re.DOTALL)[0])) == yaml.safe_load(
        (trained / "config.yaml").read_text()
    )


def test_time_split_counts_the_gather_once(trained: Path) -> None:
    page, lines = Page(trained / "report.html"), read_lines(trained / METRICS)
    traces = {trace["name"].split(" · ")[0]: trace for trace in page.figures["Where the time goes"]["data"]}
    known = {name.removeprefix("time_s/") for record in lines for name in record if name.startswith("time_s/")}
    # The last validation, checkpoint and report come after the last line.
    assert known == {"data", "pass_1", "gather", "objective", "pass_2", "step", "validation", "checkpoint", "report"}
    assert {name.replace(" ", "_") for name in traces} == known
    for name, trace in traces.items():
        values = [record.get(f"time_s/{name.replace(' ', '_')}", 0.0) for record in lines]
        assert trace["y"] == pytest.approx(values, rel=1e-5)
    for record in lines:
        times = [record.get(f"time_s/{name}", 0.0) for name in STAGES if name not in BETWEEN_STEPS]
        assert 6 / sum(times) == pytest.approx(record["samples_per_s"], rel=1e-6)


def test_retrieval_gallery_scores_and_projection_are_those_of_the_validation(trained: Path) -> None:
    page = Page(trained / "report.html")
    newest = read_lines(trained / VALIDATION)[-1]
    cells = [[cell.strip() for cell in row] for row in page.rows]
    for row in newest["metrics"]:
        found = next(
            c for c in cells if c[:2] == [f"{row['query']} → {row['candidates']}", row["score"].replace("_", " ")]
        )
        low, high = 100 * row["recall_at_1_low"], 100 * row["recall_at_1_high"]
        assert found[2:7] == [
            f"{100 * row['recall_at_1']:.1f}", f"{low:.1f}–{high:.1f}", f"{100 * row['recall_at_5']:.1f}",
            f"{100 * row['recall_at_10']:.1f}", f"{row['median_rank']:g}",
        ]  # fmt: skip
        assert found[7] == f"{100 * row['chance_recall_at_1']:.2f}"
        assert found[8] == f"{row['num_queries']} / {row['num_candidates']}"
    chart = page.figures["R@1 by direction"]
    volume = page.trace("R@1 by direction", "volume")
    rows = [row for row in newest["metrics"] if row["score"] == "volume"]
    assert volume["x"] == pytest.approx([100 * row["recall_at_1"] for row in rows], rel=1e-5)
    assert volume["error_x"]["array"] == pytest.approx(
        [100 * (row["recall_at_1_high"] - row["recall_at_1"]) for row in rows], rel=1e-4, abs=1e-9
    )
    assert page.trace("R@1 by direction", "chance")["x"][-1] == pytest.approx(100 * rows[-1]["chance_recall_at_1"])
    assert len(chart["layout"]["yaxis"]["ticktext"]) == 8
    for warning in newest["warnings"]:
        assert warning in page.text
    for pair, value in newest["positive_cosine"].items():
        assert f"{pair.replace('-', ' – ')} {value:+.2f}" in page.text

    kept = KeptEmbeddings.load(embeddings_path(trained, "validation"))
    assert kept.positions.tolist() == list(range(12))
    assert evaluate_retrieval(kept.vectors, kept.present).to_json() == {
        key: value for key, value in newest.items() if key not in ("step", "score")
    }
    for name in ("video", "audio", "text"):
        trace = page.trace("Embeddings on a plane", name)
        assert len(trace["x"]) == newest["num_present"][name]
        assert trace["text"][0].startswith("val0: ")
        assert trace["text"][0].endswith(" (val0-0000)")
    for heading in ("Volume", "Cosine video – audio", "Cosine video – text", "Cosine audio – text"):
        for name in ("matched", "unmatched"):
            assert sum(page.trace(heading, name)["y"]) == pytest.approx(100, rel=1e-4)
    assert sum(tag == "article" for tag, _ in page.tags) == 8
    num_candidates = next(row for row in newest["metrics"] if row["candidates"] == "video+audio")["num_candidates"]
    assert f"{12 - num_candidates} samples lack video or audio and are no candidates" in page.text


def test_page_needs_nothing_but_itself(trained: Path) -> None:
    page = Page(trained / "report.html")
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert links
    assert all(link is not None and link.startswith("data:") for link in links)
    assert page.source.count(get_plotlyjs()) == 1
    assert not re.search(r"@import|url\((?!data:)", re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)[0])


def test_evaluate_adds_its_split(copied: Path, small_dataset: Path) -> None:
    done = parallelotope("evaluate", str(copied), "--data", str(small_dataset), "--split", "train", "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert f"report: {copied / 'report.html'}" in done.stdout
    page = Page(copied / "report.html")
    tabs = [attrs for tag, attrs in page.tags if attrs.get("role") == "tab"]
    assert [tab["aria-selected"] for tab in tabs] == ["false", "true"]
    assert "23 samples after step" in page.text
    assert "12 samples after step" in page.text
    kept = KeptEmbeddings.load(embeddings_path(copied, "evaluation-train"))
    assert (kept.split, kept.digest) == ("train", ShardedDataset(small_dataset, "train").digest)
    assert json.loads((copied / "evaluation-train.json").read_text())["step"] == kept.step


def test_the_validation_split_is_not_shown_twice(tmp_path: Path, small_dataset: Path) -> None:
    run = made_run(tmp_path, small_dataset, 8, split="val")
    newest = read_lines(run / VALIDATION)[-1]
    evaluated = {**newest, "checkpoint": "step-00000003", "data": str(small_dataset), "split": "val"}
    cases = [({}, ["val"]), ({"step": 1}, ["validation", "val"]), ({"data": "other"}, ["validation", "val"])]
    for changes, names in cases:
        (run / "evaluation-val.json").write_text(json.dumps(evaluated | changes))
        assert [one.name for one in read_run(run).sets] == names


def test_two_runs_are_compared(trained: Path, copied: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["optimizer"]["lr"] = 0.5
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{**record, "loss": record["loss"] + 1} for record in read_lines(copied / METRICS)][:4]
    (copied / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = parallelotope("report", str(trained), str(copied), "--out", str(tmp_path / "both.html"))
    assert done.returncode == 0, done.stderr
    page = Page(tmp_path / "both.html")
    one, other = ("/".join(folder.parts[-2:]) for folder in (trained, copied))
    assert page.trace("Loss", other)["y"] == pytest.approx([line["loss"] for line in lines], rel=1e-5)
    assert len(page.trace("Loss", one)["y"]) == NUM_STEPS
    colours = {page.trace(heading, one)["line"]["color"] for heading in ("Loss", "Throughput", "Validation R@1")}
    assert len(colours) == 1
    assert colours.isdisjoint({page.trace("Loss", other)["line"]["color"]})
    assert ["optimizer.lr", "0.001", "0.5"] in page.rows
    assert ["validation", "score", one, other] in page.rows
    assert "stopped, step 4 of 6" in page.text
    assert f"What {one} finds" in page.text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    dataset = captioned_dataset(tmp_path / "data", ["one", "two", "three"])
    runs = [made_run(tmp_path / place / "same", dataset, 3) for place in ("a", "b")]
    page = page_of(*runs, out=tmp_path / "out.html")
    assert {trace["name"] for trace in page.figures["Loss"]["data"]} == {str(run) for run in runs}


def test_captions_are_text(tmp_path: Path) -> None:
    dataset = captioned_dataset(tmp_path / "data", [f"{i} {EVIL}" for i in range(6)])
    page = page_of(made_run(tmp_path, dataset, 6), out=tmp_path / "report.html")
    assert f"0 {EVIL}" in page.text.replace("“", "").replace("”", "")  # shown as it is
    assert "window.evil" not in "".join(re.findall(r"<script[^>]*>(.*?)</script>", page.source, re.DOTALL)[-1:])
    assert "<script>window" not in page.source
    assert not any(tag == "b" and attrs == {"square": None} for tag, attrs in page.tags)
    assert "&lt;b&gt;square" in page.trace("Embeddings on a plane", "text")["text"][0]


def test_a_dataset_that_is_gone_or_another_is_said(tmp_path: Path) -> None:
    dataset = captioned_dataset(tmp_path / "data", ["one", "two", "three", "four"])
    run = made_run(tmp_path, dataset, 4)
    assert "no gallery" not in page_of(run, out=tmp_path / "report.html").text
    shutil.rmtree(dataset)
    page = page_of(run, out=tmp_path / "report.html")
    assert f"no gallery: dataset {dataset}: no such folder" in page.text
    assert page.trace("Embeddings on a plane", "text")["text"][0] == "sample 0"  # the embeddings are still there
    captioned_dataset(dataset, ["one", "two", "three", "five"])
    page = page_of(run, out=tmp_path / "report.html")
    assert f"no gallery: dataset {dataset}: sharded again since then" in page.text
    shutil.rmtree(run / "embeddings")
    assert "no embeddings were kept: run 'parallelotope evaluate'" in page_of(run, out=tmp_path / "report.html").text


def test_run_without_anything_measured_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run_config(run, load_settings(RunConfig, configure(tmp_path, tmp_path, run)))
    page = page_of(run, out=tmp_path / "report.html")
    assert "No step has been logged." in page.text
    assert "stopped, step 0 of 6" in page.text


def test_size_does_not_grow_with_the_run(tmp_path: Path) -> None:
    dataset = captioned_dataset(tmp_path / "data", [f"{i} " + "word " * 30 for i in range(8)])
    run = made_run(tmp_path, dataset, num_samples=3000, num_steps=20_011)
    page = page_of(run, out=tmp_path / "report.html")
    assert len(page.source) - len(get_plotlyjs()) < MAX_PAGE_BYTES
    trace = page.trace("Loss and its terms", "loss")
    stride = -(-20_011 // MAX_POINTS)
    assert f"A point is the mean of up to {stride} steps." in page.text
    assert trace["x"][:2] == [stride, 2 * stride]
    assert trace["x"][-1] == 20_011
    assert trace["y"][1] == pytest.approx(np.mean([1 / s for s in range(stride + 1, 2 * stride + 1)]), rel=1e-5)
    history = read_run(run)
    assert len(history.bar_steps) <= MAX_BARS
    assert history.stage_s == pytest.approx({"data": 0.5 * 20_011, "step": 1.5 * 20_011})


def test_media_of_a_page_are_bounded(tmp_path: Path) -> None:
    dataset = captioned_dataset(tmp_path / "data", [str(i) for i in range(12)])
    run = read_run(made_run(tmp_path, dataset, 12))
    kept = KeptEmbeddings.load(run.sets[0].embeddings)
    found = answers(Question.of(run.config, kept), kept)
    whole = make_gallery(found, kept, open_dataset(kept), run.config, 10**9)
    tiles = [tile for query in whole.queries for tile in query.tiles]
    one = tiles[0].view.num_bytes
    assert one > 1000
    small = make_gallery(found, kept, open_dataset(kept), run.config, 3 * one)
    views = [tile.view for query in small.queries for tile in query.tiles]
    assert 0 < sum(view.num_bytes for view in views) <= 3 * one
    assert any("left out to keep this page small" in note for view in views for note in view.notes)
    assert [view.key for view in views] == [tile.view.key for tile in tiles]


def test_page_touches_no_random_generator(trained: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    write_report([trained], tmp_path / "report.html")  # that of `random` is touched by the checks of types in tests
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[union-attr]


@pytest.mark.slow
def test_failure_while_making_it_does_not_end_the_training(tmp_path: Path, small_dataset: Path, trained: Path) -> None:
    run = tmp_path / "run"
    (run / "report.html").mkdir(parents=True)  # nothing can be renamed to it
    (run / "embeddings").write_text("in the way")
    (run / "logs").mkdir()  # it is a run's folder
    output = finish(configure(tmp_path, small_dataset, run), 2)
    assert output.count("no report: IsADirectoryError") == 2
    assert output.count("embeddings were not kept: ") == 2
    assert not list(run.glob(".report*"))
    found, wanted = (StoredTensors(finished_checkpoints(folder)[-1]) for folder in (run, trained))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_full_disk_leaves_the_old_page(copied: Path) -> None:
    (copied / "report.html").write_text("the old page")
    done = parallelotope("report", str(copied), prefix=("bash", "-c", 'ulimit -f 100; exec "$@"', "-"))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written: File too large" in done.stderr
    assert (copied / "report.html").read_text() == "the old page"
    assert not list(copied.glob(".report*"))


def test_mistakes_are_one_line(tmp_path: Path, trained: Path) -> None:
    for arguments, words in (
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path)], "no config.yaml in it"),
        ([str(trained), "--out", str(tmp_path)], "expected the name of a file"),
    ):
        done = parallelotope("report", *arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert words in done.stderr


def test_kept_embeddings_come_back(tmp_path: Path, small_dataset: Path) -> None:
    dataset = ShardedDataset(small_dataset, "val")
    vectors = {name: torch.randn(5, 4) for name in ("video", "audio", "text")}
    present = {name: torch.tensor([True, False, True, True, False]) for name in vectors}
    kept = KeptEmbeddings.of(dataset, 7, vectors, present, torch.tensor([3, 1, 4, 0, 2]))
    kept.save(tmp_path / "folder" / "one.safetensors")
    found = KeptEmbeddings.load(tmp_path / "folder" / "one.safetensors")
    assert list(found.vectors) == ["video", "audio", "text"]
    assert all(torch.equal(found.vectors[n], vectors[n]) and torch.equal(found.present[n], present[n]) for n in vectors)
    assert found.positions.tolist() == [3, 1, 4, 0, 2]
    assert (found.data, found.split, found.digest, found.step) == (str(small_dataset), "val", dataset.digest, 7)
    (tmp_path / "bad.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="not kept embeddings"):
        KeptEmbeddings.load(tmp_path / "bad.safetensors")


def kept_of(vectors: dict[str, torch.Tensor], present: dict[str, torch.Tensor] | None = None) -> KeptEmbeddings:
    n = len(next(iter(vectors.values())))
    here = {name: torch.ones(n, dtype=torch.bool) for name in vectors}
    return KeptEmbeddings(
        vectors=vectors,
        present=here | (present or {}),
        positions=torch.arange(n),
        data="",
        split=None,
        digest="",
        step=1,
    )


@pytest.mark.parametrize("objective", ["gram", "infonce"])
def test_answers_agree_with_the_retrieval_report(trained: Path, objective: str) -> None:
    config = load_settings(RunConfig, trained / "config.yaml")
    part = {"name": "gram"} if objective == "gram" else {"name": "infonce"}
    config = RunConfig.model_validate({**config.model_dump(), "objective": [part]})
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(40, 12, generator=generator)
    vectors = {n: F.normalize(shared + torch.randn(40, 12, generator=generator), dim=1) for n in config.towers.names}
    vectors["video"][7] = vectors["video"][3]  # a tie of two samples
    vectors["audio"][7] = vectors["audio"][3]
    kept = kept_of(vectors, {"audio": torch.arange(40) % 9 != 4})
    question = Question.of(config, kept)
    found = answers(question, kept)
    row = evaluate_retrieval(kept.vectors, kept.present).find("text", "video+audio", own_score(config))
    assert len(found) == row.num_queries
    assert len(question.candidates) == row.num_candidates
    for k, recall in ((1, row.recall_at_1), (5, row.recall_at_5), (10, row.recall_at_10)):
        assert sum(answer.rank <= k for answer in found) / len(found) == pytest.approx(recall)
    assert 0 < row.recall_at_1 < 1
    for answer in found:
        scores = [score for _, score in answer.best]
        assert scores == sorted(scores, reverse=True)
        assert ([r for r, _ in answer.best].index(answer.query) + 1 if answer.rank <= 5 else answer.rank) == answer.rank
        assert len({r for r, _ in answer.best}) == 5
    matched = score_samples(question, kept)[0]
    assert matched.name == own_score(config)
    assert matched.positive.tolist() == pytest.approx([answer.truth_score for answer in found])
    assert len(matched.negative) == row.num_queries * (row.num_candidates - 1)


def test_gallery_shows_the_best_and_the_worst() -> None:
    found = [Answer(query=q, rank=1 if q < 90 else q, truth_score=0.0, best=[]) for q in range(100)]
    chosen = choose(found[::-1])
    assert [answer.query for answer in chosen] == [0, 14, 28, 42, 57, 71, 85, 99]
    assert [answer.rank for answer in chosen] == [1] * 7 + [99]
    assert choose(found[:3]) == found[:3]


def test_projection_is_the_same_each_time_and_says_what_it_keeps() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.zeros(60, 5)
    flat[:, :2] = torch.randn(60, 2, generator=generator) * torch.tensor([3.0, 1.0])
    found = project(kept_of({"video": flat[:30], "text": flat[30:]}))
    assert found is not None
    assert sum(found.variance_share) == pytest.approx(1)
    centred = (flat - flat.mean(0)).double()
    points = torch.cat(list(found.points.values()))
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(centred, centred), rtol=1e-6, atol=1e-6)
    mirrored = project(kept_of({"video": flat[:30] * -1, "text": flat[30:] * -1}))
    assert mirrored is not None
    torch.testing.assert_close(mirrored.points["text"], -found.points["text"])  # the axes, not their signs, are fixed


def test_samples_go_by_the_names_of_the_manifest(tmp_path: Path) -> None:
    samples = [make_sample(number, noisy_members(number, 0.6), 0.6) for number in range(3)]
    named = [replace(sample, index=sample.index | {"row_id": f"my clip {n} <i>"}) for n, sample in enumerate(samples)]
    named[2] = replace(named[2], index=named[1].index | {"clip_index": 1})
    dataset = write_dataset(tmp_path / "data", named, samples_per_shard=4)
    page = page_of(made_run(tmp_path, dataset, 3), out=tmp_path / "report.html")
    titles = {attrs["title"] for _, attrs in page.tags if "title" in attrs}
    assert titles >= {"clip-0000", "clip-0001", "clip-0002"}
    for name in ("my clip 0 <i>", "my clip 1 <i>", "my clip 1 <i> #2"):
        assert name in page.text
    assert "clip-0000" not in page.text
    assert page.trace("Embeddings on a plane", "text")["text"][0].startswith("my clip 0 ")


def test_a_sample_says_what_it_lacks(tmp_path: Path, trained: Path) -> None:
    dataset = ShardedDataset(write_mixed_dataset(tmp_path / "mixed"))
    config = load_settings(RunConfig, trained / "config.yaml")
    views = [view_sample(dataset, position, config) for position in range(8)]
    assert views[0].notes == ("no sound",)
    assert views[1].notes == ("no pictures",)
    assert (views[2].caption, views[2].notes) == (None, ())
    assert len(views[3].frames) == 1  # a still
    assert [note.split(":")[0] for note in views[6].notes] == ["pictures cannot be read", "sound cannot be read"]
    assert (len(views[7].frames), views[7].notes) == (3, ())
    frame = Image.open(io.BytesIO(base64.b64decode(views[7].frames[0].partition(",")[2])))
    assert (frame.format, frame.size) == ("JPEG", (112, 112))
    with av.open(io.BytesIO(base64.b64decode(views[7].sound.partition(",")[2]))) as container:  # type: ignore[union-attr]
        frames = list(container.decode(audio=0))
    assert frames[0].sample_rate == SOUND_RATE_HZ
    assert sum(f.samples for f in frames) / SOUND_RATE_HZ == pytest.approx(config.data.window_s, abs=0.2)
    assert max(views[7].bars) == 100


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page is not looked at in a browser")
def test_a_browser_draws_the_page(trained: Path, tmp_path: Path) -> None:
    page = Page(trained / "report.html")
    target = tmp_path / "page.html"
    probe = "<script>document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth</script></body>"
    target.write_text(page.source.replace("</body>", probe), encoding="utf-8")

    def browse(*options: str) -> tuple[str, str]:
        command = [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=8000",
            *options, target.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    dom, console = browse("--dump-dom", "--window-size=520,900")
    assert console == ""
    num_plots = page.source.count('class="plot"')
    assert num_plots == page.source.count('type="application/json"') >= 14
    assert dom.count('class="plot js-plotly-plot"') == num_plots
    assert dom.count('<svg class="main-svg"') >= 2 * num_plots
    assert dom.count('class="legend"><button') > 5
    assert 'data-wide="false"' in dom
    picture = tmp_path / "page.png"
    _, console = browse(f"--screenshot={picture}", "--window-size=1400,2400")
    assert console == ""
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (2400, 1400, 3)
    for start in range(0, 2400, 600):  # every stretch of it shows something
        assert len(np.unique(pixels[start : start + 600].reshape(-1, 3), axis=0)) > 50
