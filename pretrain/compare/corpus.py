"""A cell of the comparison on a corpus: the real trainer in a process of its own, one rank, then retrieval."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.settings import UserError, check_settings, read_yaml
from data_pipeline.shards import publish
from pretrain.compare.cells import Cell, Outcome
from pretrain.compare.config import CorpusConfig
from pretrain.config import RunConfig
from pretrain.identity import differences
from pretrain.leash import leashed
from pretrain.preflight import check_run

if TYPE_CHECKING:
    from pretrain.kept_embeddings import KeptEmbeddings

RUNS = "runs"
LAST_LINES = 3  # of a log that failed


def cell_config(cell: Cell | None, experiment: CorpusConfig, out_dir: Path) -> RunConfig:
    """The training config of a cell; without one, that of all.

    Raises:
        UserError: the training config, or the objective in it, is wrong.
    """
    values = read_yaml(experiment.run, experiment.overrides)
    if cell is not None:
        values |= {"seed": cell.seed, "run_dir": str(out_dir / RUNS / cell.name)}
        values["objective"] = [part.model_dump(mode="json") for part in cell.entry.objective]
    return check_settings(RunConfig, values, experiment.run)


def check_cell(cell: Cell, experiment: CorpusConfig, out_dir: Path) -> None:
    """Refuse what cannot be trained: data that is not there, an objective of other modalities.

    Raises:
        UserError: one line.
    """
    from pretrain.objectives import WeightedSum

    config = cell_config(cell, experiment, out_dir)
    check_run(config, ranks=1)
    WeightedSum(config.objective, config.towers.names)


def run_cell(cell: Cell, experiment: CorpusConfig, out_dir: Path) -> Outcome:
    """Train (a run that was interrupted goes on), evaluate, and take R@1 of every direction.

    Raises:
        UserError: a process failed; names its log.
    """
    import yaml

    config = cell_config(cell, experiment, out_dir)
    folder = Path(config.run_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(folder.suffix + ".yaml")
    _refuse_other_settings(folder, path, config)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    publish(partial, path)
    log = folder.with_suffix(folder.suffix + ".log")
    data = experiment.data or config.data.train[0].path
    _command(["pretrain", str(path)], log)
    # The last checkpoint, not the best: every objective has had the same budget.
    _command(["evaluate", str(folder), "--data", data, "--split", experiment.split, "--checkpoint", "last"], log)
    from pretrain.kept_embeddings import KeptEmbeddings, embeddings_path

    kept = KeptEmbeddings.load(embeddings_path(folder, f"evaluation-{experiment.split}"))
    return Outcome(metrics=corpus_measures(kept, config))


def _refuse_other_settings(folder: Path, path: Path, config: RunConfig) -> None:
    """A run goes on under another learning rate or budget; a cell must not. How its folder is spelled is no setting."""
    if not path.is_file():
        return
    before, now = read_yaml(path), config.model_dump(mode="json")
    other = differences("", {**before, "run_dir": ""}, {**now, "run_dir": ""})
    if other:
        raise UserError(f"run {folder} was begun with other settings: {'; '.join(other)}; delete it and {path}")


def _command(arguments: list[str], log: Path) -> None:
    """`parallelotope ARGUMENTS...`, its output at the end of `log`."""
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            leashed([sys.executable, "-m", "pretrain.main", *arguments]), stdout=stream, stderr=stream
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # it saves, and the next start goes on
            process.wait()
            raise
    if code != 0:
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        raise UserError(f"parallelotope {arguments[0]} left with {code}: {' | '.join(said)} (log: {log})")


def corpus_measures(kept: KeptEmbeddings, config: RunConfig) -> dict[str, float]:
    """R@1 of each direction, every modality asking for all others in turn, whatever the objective's anchor; by the
    run's own score, too; and signs. Names are those of `pretrain.compare.measures`."""
    from pretrain.compare.measures import direction_means
    from pretrain.evaluate import joint_scores, own_score
    from pretrain.retrieval import evaluate_retrieval

    found: dict[str, float] = {}
    for anchor in kept.vectors:
        report = evaluate_retrieval(kept.vectors, kept.present, anchor=anchor, joint_scores=joint_scores(config))
        all_others = "+".join(name for name in kept.vectors if name != anchor)
        for row in report.metrics:
            query, candidates = (
                "others" if "+" in side and side == all_others else side for side in (row.query, row.candidates)
            )
            found[f"recall_at_1/{query} -> {candidates}/{row.score}"] = row.recall_at_1
            if row.score == own_score(config) and "others" in (query, candidates):
                found[f"recall_at_1/{query} -> {candidates}/own"] = row.recall_at_1
    cosines = {f"positive_cosine/{pair}": v for pair, v in report.positive_cosine.items() if v is not None}
    return found | direction_means(found) | cosines | {"anti_aligned": float(len(report.anti_aligned))}
