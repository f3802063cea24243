"""The command `parallelotope inspect`: what a dataset holds, and what the model will see of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.settings import UserError, load_settings
from data_pipeline.shards import ShardedDataset, is_url, join_location, sample_name, write_json
from pretrain.config import AudioTowerConfig, AugmentConfig, RunConfig, TextTowerConfig, TowersConfig, VideoTowerConfig
from pretrain.inspection.statistics import DatasetStatistics, SplitStatistics, Spread, describe_dataset

DEFAULT_WINDOW_S = 4.0
MAX_CAPTIONED = 2000  # samples whose captions are tokenized


def inspect(
    dataset: Annotated[str, typer.Argument(metavar="DIR", help="What 'parallelotope shard' wrote: a folder or URL.")],
    config: Annotated[Path | None, typer.Option(help="A pretrain YAML: see samples as its model will.")] = None,
    split: Annotated[str | None, typer.Option(help="Of the pictures; default: the first.")] = None,
    sheet: Annotated[int, typer.Option(min=1, max=200, help="Samples on the contact sheet.")] = 24,
    samples: Annotated[int, typer.Option(min=0, max=50, help="Samples drawn with all the model sees.")] = 3,
    augment: Annotated[bool, typer.Option(help="Draw them as in the first epoch of training.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; default: DIR/inspection; of a URL, ./inspection.")
    ] = None,
) -> None:
    """Counts, durations, coverage, captions and rejects; a contact sheet; samples as the model sees them."""
    statistics = describe_dataset(dataset)
    if not statistics.splits:
        print_statistics(statistics, dataset)
        raise UserError(f"dataset {dataset}: no sample in any split; see the rejects above for the reasons")
    chosen = ShardedDataset(dataset, split or statistics.splits[0].split)
    settings = load_settings(RunConfig, config, []) if config is not None else None
    folder = out or Path("." if is_url(dataset) else dataset, "inspection")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made: {error.strerror}") from error
    print_statistics(statistics, dataset)
    write_json(folder / "statistics.json", statistics.to_json())
    draw_pictures(chosen, settings, folder, sheet, samples, augment)


def draw_pictures(
    dataset: ShardedDataset, settings: RunConfig | None, folder: Path, num_tiles: int, num_samples: int, augment: bool
) -> None:
    """Contact sheet and sample views into `folder`, told line by line."""
    from pretrain.data.reader import BatchReader
    from pretrain.inspection.contact_sheet import draw_contact_sheet, save_png, spread_evenly
    from pretrain.inspection.sample_view import captions_cut, draw_sample, token_table

    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    picture, problems = draw_contact_sheet(dataset, spread_evenly(len(dataset), num_tiles))
    save_png(picture, folder / "contact-sheet.png")
    say(f"contact sheet of split {dataset.split}: {folder / 'contact-sheet.png'}")
    towers = settings.towers if settings is not None else default_towers()
    window_s = settings.data.window_s if settings is not None else DEFAULT_WINDOW_S
    changes = (settings.data.augment if settings is not None else AugmentConfig()) if augment else None
    reader = BatchReader(dataset, towers, window_s, changes, settings.seed if settings is not None else 0)
    for number, position in enumerate(spread_evenly(len(dataset), num_samples), 1):
        row = dataset.row(position)
        batch = reader.read([position], [0], 0, 1)
        problems += [
            f"{sample_name(row)}: {event.modality} cannot be read: {event.reason} (key {event.key})"
            for event in batch.events
        ]
        path = folder / f"sample-{number}.png"
        save_png(draw_sample(row, batch, towers, window_s), path)
        there = ", ".join(name for name in towers.names if bool(batch.present[name][0])) or "nothing"
        say(f"{sample_name(row)}: {there}: {path} (key {row['key']})")
        if tokens := token_table(row, batch, towers):
            say(f"  tokens: {' '.join(f'{piece.strip()}·{number}' for number, piece in tokens)}")
    if towers.text is not None:
        texts = some_captions(dataset)
        cut = captions_cut(texts, towers)
        say(f"captions that fill all {towers.text.max_tokens} tokens, the rest cut: {cut} of {len(texts)} looked at")
    for problem in dict.fromkeys(problems):
        say(f"problem: {problem}")
    if settings is None:
        say(f"samples as the default towers see them, window {window_s:g} s; --config FILE: as a run of yours would")


def some_captions(dataset: ShardedDataset) -> list[str]:
    """The captions of up to `MAX_CAPTIONED` samples, evenly spread."""
    step = max(1, len(dataset) // MAX_CAPTIONED)
    lists = [dataset.row(position)["captions"] for position in range(0, len(dataset), step)]
    return [caption["text"] for captions in lists for caption in captions if (caption["text"] or "").strip()]


def default_towers() -> TowersConfig:
    """The three towers with their default settings."""
    return TowersConfig(video=VideoTowerConfig(), audio=AudioTowerConfig(), text=TextTowerConfig())


def print_statistics(statistics: DatasetStatistics, dataset: str) -> None:
    """Tables on the terminal."""
    console = Console()
    if statistics.splits:
        console.print(_split_table(statistics.splits, f"{dataset}: samples by split"))
        console.print()
        console.print(_caption_table(statistics.splits))
        console.print("a | b | c | d: least, median, 95th percentile, most", style="dim", highlight=False)
        console.print()
    if not statistics.rejects:
        console.print("rejects: none\n", highlight=False)
        return
    table = _table(
        f"rejects ({join_location(dataset, 'rejects.parquet')})", ["reason", "rows or clips", "splits", "for example"]
    )
    for reject in statistics.rejects:
        splits = ", ".join(f"{name} {count}" for name, count in reject.by_split.items())
        table.add_row(reject.reason, str(reject.num_rejects), splits, reject.examples[0])
    console.print(table)
    console.print()


def _split_table(splits: tuple[SplitStatistics, ...], title: str) -> Table:
    table = _table(title, ["", *(split.split for split in splits)])
    rows = {
        "samples": lambda s: f"{s.num_samples:,}",
        "hours": lambda s: f"{s.total_s / 3600:,.2f}",
        "duration (s)": lambda s: _spread(s.duration_s, ".1f"),
        "with video": lambda s: _share(s.with_video, s),
        "with a still": lambda s: _share(s.with_image, s),
        "with audio": lambda s: _share(s.with_audio, s),
        "with text": lambda s: _share(s.with_text, s),
        "with subtitles": lambda s: _share(s.with_subtitles, s),
        "all three": lambda s: _share(s.complete, s),
        "height (px)": lambda s: _spread(s.height_px, ".0f"),
        "frames a second": lambda s: _spread(s.fps, ".3g"),
        "sample rate (Hz)": lambda s: _spread(s.sample_rate_hz, ".0f"),
        "media (MB)": lambda s: f"{s.num_bytes / 1e6:,.1f}",
    }
    for name, show in rows.items():
        cells = [show(split) for split in splits]
        if any(cell not in ("-", "0 (0 %)") for cell in cells):
            table.add_row(name, *cells)
    return table


def _caption_table(splits: tuple[SplitStatistics, ...]) -> Table:
    table = _table("captions", ["", *(split.split for split in splits)])
    table.add_row("captions", *(f"{split.num_captions:,}" for split in splits))
    table.add_row("distinct", *(f"{split.num_distinct_captions:,}" for split in splits))
    table.add_row("words", *(_spread(split.caption_words, ".0f") for split in splits))
    table.add_row("sources", *(", ".join(f"{k} {v}" for k, v in s.caption_sources.items()) or "-" for s in splits))
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right" if len(columns[0]) == 0 else "left")
    return table


def _spread(spread: Spread | None, form: str) -> str:
    """ "2.0 | 4.0 | 9.5 | 10.0": least, median, 95th percentile, most; one number where all are equal."""
    if spread is None:
        return "-"
    parts = [format(value, form) for value in (spread.least, spread.median, spread.p95, spread.most)]
    return parts[0] if len(set(parts)) == 1 else " | ".join(parts)


def _share(count: int, split: SplitStatistics) -> str:
    return f"{count:,} ({100 * count / max(1, split.num_samples):.0f} %)"
