"""Retrieval metrics against hand-computed cases and whole matrices of scores."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from pretrain.retrieval import evaluate_retrieval, rank_of_truth
from pretrain.retrieval_report import Z_95, RetrievalReport, retrieval_metrics, wilson_interval
from pretrain.scoring import scores

NAN = float("nan")
JOINT = ("volume", "summed_cosine", "singular_value", "centroid")


def unit_rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random unit rows."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def ranks(scores: list[list[float]], truth: list[int], tolerance: float = 0.0) -> list[int]:
    """`rank_of_truth` on plain lists."""
    return rank_of_truth(torch.tensor(scores, dtype=torch.float64), torch.tensor(truth), tolerance).tolist()


# Ranks


def test_ranks_by_hand() -> None:
    scores = [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]
    assert ranks(scores, [0, 1, 2]) == [0, 1, 2]
    assert ranks([[0.1, 0.9, 0.5, 0.7]], [3]) == [1]


def test_ties_count_against_the_truth() -> None:
    assert ranks([[1.0, 1.0, 0.0]], [0]) == [1]
    assert ranks([[1.0, 1.0, 0.0]], [1]) == [1]
    assert ranks([[0.5, 0.5, 0.5, 0.5]], [2]) == [3]


def test_scores_within_the_tolerance_are_ties() -> None:
    assert ranks([[1.0, 1.0 - 1e-9, 0.5]], [0]) == [0]
    assert ranks([[1.0, 1.0 - 1e-9, 0.5]], [0], tolerance=1e-7) == [1]


def test_nan_counts_against_the_truth() -> None:
    assert ranks([[1.0, NAN, 0.0]], [0]) == [1]
    assert ranks([[NAN, 1.0, 0.0]], [0]) == [2]
    assert ranks([[NAN, NAN]], [1]) == [1]


def test_infinite_scores() -> None:
    assert ranks([[math.inf, 1.0, -math.inf]], [0]) == [0]
    assert ranks([[-math.inf, 1.0, -math.inf]], [0]) == [2]


# Intervals


def test_interval_covers_the_true_share() -> None:
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(200):
        share = (torch.rand(256, generator=generator) < 0.4).double().mean().item()
        low, high = wilson_interval(share, 256)
        assert low <= share <= high
        covered += low <= 0.4 <= high
    assert 180 <= covered <= 199  # 95 % of 200 is 190; the binomial's own spread is 3


def test_interval_is_where_the_score_test_does_not_reject() -> None:
    for share, num_queries in ((0.3, 100), (0.5, 2), (0.02, 50)):
        for end in wilson_interval(share, num_queries):
            assert abs(share - end) == pytest.approx(Z_95 * math.sqrt(end * (1 - end) / num_queries), rel=1e-9)


def test_interval_never_collapses() -> None:
    assert wilson_interval(1.0, 2) == (pytest.approx(1 / (1 + Z_95**2 / 2)), 1.0)  # 34 % to 100 %
    assert wilson_interval(0.0, 2) == (0.0, pytest.approx(1 - 1 / (1 + Z_95**2 / 2)))
    assert wilson_interval(1.0, 50) == (pytest.approx(0.9287, abs=1e-4), 1.0)
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_metrics_of_known_ranks() -> None:
    row = retrieval_metrics(torch.tensor([0, 0, 3, 4, 7, 20]), 25, "text", "video", "cosine")
    assert (row.recall_at_1, row.recall_at_5, row.recall_at_10) == pytest.approx((2 / 6, 4 / 6, 5 / 6))
    assert row.median_rank == 4.5  # between 1-based ranks 4 and 5
    assert row.chance_recall_at_1 == 1 / 25
    assert (row.num_queries, row.num_candidates) == (6, 25)


# The whole evaluation


def aligned(n: int = 40, noise: float = 0.05) -> dict[str, Tensor]:
    """Three modalities that agree up to `noise`."""
    text = unit_rows(n, 16)
    return {
        "text": text,
        "video": F.normalize(text + noise * unit_rows(n, 16, seed=1), dim=1),
        "audio": F.normalize(text + noise * unit_rows(n, 16, seed=2), dim=1),
    }


def test_perfect_embeddings_find_everything() -> None:
    report = evaluate_retrieval(aligned(), None, joint_scores=JOINT)
    assert len(report.metrics) == 6 + 2 * len(JOINT)
    for row in report.metrics:
        assert row.recall_at_1 == 1.0, row
        assert row.median_rank == 1
    assert not report.warnings
    assert report.positive_cosine.keys() == {"text-video", "text-audio", "video-audio"}


@pytest.mark.parametrize("n", [2, 33, 257])
def test_collapsed_model_scores_zero(n: int) -> None:
    point = unit_rows(1, 24)
    same = {name: point.repeat(n, 1) for name in ("text", "video", "audio")}
    apart = {name: unit_rows(1, 24, seed=s).repeat(n, 1) for s, name in enumerate(same)}
    for vectors in (same, apart):
        for row in evaluate_retrieval(vectors, None, joint_scores=JOINT).metrics:
            assert row.recall_at_1 == 0.0, row
            assert row.median_rank == n


def test_picture_and_sound_are_both_needed() -> None:
    """A 4 x 4 grid: text is the sum of what is seen and heard, so one alone ties with three others."""
    seen, heard = torch.eye(8)[:4].repeat_interleave(4, dim=0), torch.eye(8)[4:].repeat(4, 1)
    report = evaluate_retrieval({"text": F.normalize(seen + heard, dim=1), "video": seen, "audio": heard}, None)
    assert report.find("text", ["video", "audio"], "summed_cosine").recall_at_1 == 1.0
    assert report.find("text", "audio+video", "volume").recall_at_1 == 1.0
    single = report.find("text", "video", "cosine")
    assert (single.recall_at_1, single.recall_at_5, single.median_rank) == (0.0, 1.0, 4)


def test_anti_aligned_modality_is_named() -> None:
    vectors = aligned()
    vectors["audio"] = -vectors["audio"]
    report = evaluate_retrieval(vectors, None, joint_scores=("volume", "singular_value"))
    assert report.find("text", "audio", "cosine").recall_at_1 == 0.0
    for score in ("volume", "singular_value"):  # which do not see the sign
        assert report.find("text", "video+audio", score).recall_at_1 == 1.0
    cosine = report.positive_cosine["text-audio"]
    assert cosine is not None
    assert cosine < -0.9
    assert [w.split(":")[0] for w in report.warnings] == [
        "text and audio are anti-aligned", "video and audio are anti-aligned",
    ]  # fmt: skip


def test_two_sides_of_one_text_are_no_alarm() -> None:
    """Text lies between picture and sound, which point away from each other."""
    seen, heard = torch.tensor([1.0, -0.7, 0.0]), torch.tensor([-0.7, 1.0, 0.0])
    text = torch.tensor([1.0, 1.0, 0.0])
    rows = {"text": text, "video": seen, "audio": heard}
    report = evaluate_retrieval({name: F.normalize(row, dim=0).repeat(8, 1) for name, row in rows.items()}, None)
    (warning,) = report.warnings
    assert "video and audio are anti-aligned" in warning
    assert "text agrees with both (+0.17 and +0.17)" in warning


def test_a_negative_mean_of_chance_is_no_alarm() -> None:
    """Two samples, or many whose cosines scatter around zero, say nothing about a sign."""
    few = {"text": unit_rows(2, 16), "video": -unit_rows(2, 16)}
    assert evaluate_retrieval(few, None).anti_aligned == ()
    text, video = unit_rows(64, 16), unit_rows(64, 16, seed=1)
    cosines = (text * video).sum(dim=1)
    video = torch.where((cosines.mean() > 0), -video, video)
    scattered = evaluate_retrieval({"text": text, "video": video}, None)
    mean = scattered.positive_cosine["text-video"]
    assert mean is not None
    assert -0.06 < mean < 0
    assert (scattered.anti_aligned, scattered.warnings) == ((), ())
    tilted = evaluate_retrieval({"text": text, "video": F.normalize(video - 0.5 * text, dim=1)}, None)
    assert tilted.anti_aligned == ("text-video",)
    (warning,) = tilted.warnings
    assert "over 64 samples" in warning
    assert "`" not in warning
    assert tilted.to_json()["anti_aligned"] == ["text-video"]


def test_missing_modalities_leave_queries_and_candidates() -> None:
    vectors = aligned(6)
    present = {
        "text": torch.tensor([1, 1, 1, 1, 1, 0]).bool(),
        "video": torch.tensor([1, 1, 1, 1, 0, 1]).bool(),
        "audio": torch.tensor([1, 1, 0, 0, 1, 1]).bool(),
    }
    clean = evaluate_retrieval(vectors, present)
    single, both = clean.find("text", "video", "cosine"), clean.find("text", "video+audio", "volume")
    assert (single.num_queries, single.num_candidates) == (4, 5)  # sample 5 has no text: a distractor
    assert (both.num_queries, both.num_candidates) == (2, 3)
    back = clean.find("video+audio", "text", "volume")
    assert (back.num_queries, back.num_candidates) == (2, 5)
    assert clean.num_present == {"text": 5, "video": 5, "audio": 4}
    garbage = {name: torch.where(present[name][:, None], rows, NAN) for name, rows in vectors.items()}
    assert evaluate_retrieval(garbage, present) == clean


def test_distractor_without_the_query_modality_counts() -> None:
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    video = torch.tensor([[0.8, 0.6], [1.0, 0.0]])
    present = {"text": torch.tensor([True, False]), "video": torch.tensor([True, True])}
    row = evaluate_retrieval({"text": text, "video": video}, present).find("text", "video", "cosine")
    assert (row.num_queries, row.recall_at_1, row.median_rank) == (1, 0.0, 2)


def test_rows_of_zeros_are_missing_not_perfect() -> None:
    vectors = aligned(5)
    vectors["video"][2] = 0
    report = evaluate_retrieval(vectors, None)
    assert report.num_present["video"] == 4
    assert report.find("text", "video+audio", "volume").recall_at_1 == 1.0


def test_nan_embeddings_are_not_found_and_named() -> None:
    vectors = aligned(10)
    vectors["video"][3] = NAN
    report = evaluate_retrieval(vectors, None)
    assert report.find("text", "video", "cosine").recall_at_1 == 0.0  # the NaN candidate may be better than any
    assert report.find("video", "text", "cosine").recall_at_1 == pytest.approx(0.9)
    assert report.positive_cosine["text-video"] is None
    assert any("NaN" in warning for warning in report.warnings)
    json.dumps(report.to_json(), allow_nan=False)


def test_modality_that_is_absent_everywhere() -> None:
    present = {name: torch.full((8,), name != "audio") for name in ("text", "video", "audio")}
    report = evaluate_retrieval(aligned(8), present, joint_scores=JOINT)
    row = report.find("text", "audio", "cosine")
    assert (row.num_queries, row.recall_at_1, row.median_rank) == (0, 0.0, None)
    assert report.find("text", "video", "cosine").recall_at_1 == 1.0
    assert {report.find("text", "video+audio", score).num_queries for score in JOINT} == {0}
    assert len(report.warnings) == 2


def test_two_modalities_have_volume_and_cosine() -> None:
    vectors = aligned(12)
    del vectors["audio"]
    report = evaluate_retrieval(vectors, None)
    assert {row.score for row in report.metrics} == {"cosine", "volume", "summed_cosine"}
    assert report.find("text", ["video"], "volume").recall_at_1 == 1.0


def test_every_set_of_the_others_is_measured() -> None:
    vectors = {name: unit_rows(5, 16, seed=s) for s, name in enumerate(("text", "video", "audio", "depth"))}
    report = evaluate_retrieval(vectors, None, anchor="video")
    sides = {row.candidates for row in report.metrics if row.score == "volume" and row.query == "video"}
    assert sides == {"text+audio", "text+depth", "audio+depth", "text+audio+depth"}


@pytest.mark.parametrize("tile", [1, 7, 30])
def test_tiles_do_not_change_the_report(tile: int) -> None:
    vectors = aligned(30, noise=1.5)
    present = {name: torch.rand(30, generator=torch.Generator().manual_seed(s)) < 0.8 for s, name in enumerate(vectors)}
    whole = evaluate_retrieval(vectors, present, joint_scores=JOINT)
    assert 0 < whole.find("text", "video+audio", "volume").recall_at_1 < 1
    assert evaluate_retrieval(vectors, present, joint_scores=JOINT, tile=tile) == whole


@pytest.mark.parametrize("score", JOINT)
def test_scores_and_report_agree(score: str) -> None:
    vectors = aligned(25, noise=1.5)
    matrix = scores({"text": vectors["text"]}, {name: vectors[name] for name in ("video", "audio")}, score)
    report = evaluate_retrieval(vectors, None, joint_scores=JOINT, tile=10)
    for query, found in (("text", matrix), ("video+audio", matrix.T)):
        places = rank_of_truth(found, torch.arange(25))
        row = report.find(query, "video+audio" if query == "text" else "text", score)
        assert 0 < row.recall_at_1 < 1
        assert row.recall_at_1 == pytest.approx((places == 0).double().mean().item())
        assert row.median_rank == places.median().item() + 1


def test_report_is_json_and_a_table() -> None:
    report = evaluate_retrieval(aligned(12), None)
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert value["metrics"][0]["query"] == "text"
    assert len(value["metrics"]) == len(report.metrics)
    console = Console(width=80, file=io.StringIO())
    console.print(report.table("run on test"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "run on test" in text
    assert "text -> video+audio" in text
    assert "75.8-100" in text  # 12 of 12
    assert "text-video +1.00" in " ".join(text.split())
    assert "sum: summed cosine. Mean" in " ".join(text.split())
    assert "…" not in text


def test_unknown_names() -> None:
    report: RetrievalReport = evaluate_retrieval(aligned(4), None)
    with pytest.raises(KeyError, match="text -> video by cosine"):
        report.find("text", "smell", "cosine")
    with pytest.raises(ValueError, match="did you mean 'text'"):
        evaluate_retrieval(aligned(4), None, anchor="txt")
