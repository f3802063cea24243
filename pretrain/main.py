"""The `parallelotope` command: a table of sub-commands, each imported only when it is called.

`--help` and mistakes in a config therefore answer without torch. To add a command, add a line to the table.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperGroup

from data_pipeline.settings import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a sub-command's function lives ("module:function") and its line in `--help`."""

    target: str
    help: str


COMMANDS = {
    "demo": Entry(target="launch.demo:demo", help="Corpus, shards, training (killed once and resumed), evaluation."),
    "demo-corpus": Entry(target="data_pipeline.demo_corpus.command:demo_corpus", help="Write procedural video clips."),
    "shard": Entry(target="data_pipeline.command:shard", help="Turn a manifest into WebDataset shards with Ray."),
    "verify": Entry(target="data_pipeline.command:verify", help="Re-read every byte of a sharded dataset."),
    "keys": Entry(target="launch.keys:keys", help="Every key of a shard or pretrain config."),
    "inspect": Entry(target="pretrain.inspection.command:inspect", help="What a dataset holds and the model will see."),
    "pretrain": Entry(target="pretrain.command:pretrain", help="Train the towers of a config on this rank."),
    "replay": Entry(target="pretrain.replay_command:replay", help="Make one recorded step again and look into it."),
    "evaluate": Entry(target="pretrain.command:evaluate", help="Retrieval metrics of a run on a dataset's split."),
    "report": Entry(target="pretrain.report.command:report", help="report.html of a run, or of several compared."),
    "export": Entry(target="pretrain.export_command:export", help="The towers of a run, to use them elsewhere."),
    "compare-objectives": Entry(
        target="pretrain.compare.command:compare_objectives", help="Objectives on equal terms: tables with intervals."
    ),
    "embed": Entry(target="pretrain.export_command:embed", help="Embeddings of a dataset by an exported model."),
}
LAUNCH_COMMANDS = {
    "local": Entry(target="launch.command:local", help="Train on several ranks of this machine."),
    "slurm": Entry(target="launch.slurm_command:slurm", help="Train as a Slurm job that requeues itself and resumes."),
    "kubernetes": Entry(target="launch.kubernetes_command:kubernetes", help="Train in pods, as a JobSet."),
    "ray": Entry(target="launch.ray_command:ray", help="Shard a corpus as a job of a Ray cluster."),
    "node": Entry(target="launch.command:node", help="One machine's ranks of a job; batch scripts call it."),
}
CHECKPOINT_COMMANDS = {
    "list": Entry(target="pretrain.checkpoint_command:list_checkpoints", help="The checkpoints of a run."),
    "inspect": Entry(target="pretrain.checkpoint_command:inspect_checkpoint", help="What a checkpoint holds."),
    "prune": Entry(target="pretrain.checkpoint_command:prune_checkpoints", help="Delete checkpoints of a run."),
}
GROUPS = {
    "launch": (LAUNCH_COMMANDS, "Start a run somewhere."),
    "checkpoint": (CHECKPOINT_COMMANDS, "Look at the checkpoints of a run."),
}
EXTRA_PACKAGES = ("deepspeed", "ray", "webdataset", "tensorboard", "plotly", "jinja2")  # of the extra `train`


def _lazy_group(entries: dict[str, Entry]) -> type[TyperGroup]:
    class LazyGroup(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return [*entries, *super().list_commands(ctx)]

        def get_command(self, ctx: Any, name: str) -> Any:
            entry = entries.get(name)
            return super().get_command(ctx, name) if entry is None else _command(name, lambda: None, entry.help)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            valid = self.list_commands(ctx)
            if args[0] not in valid:
                raise UserError(f"command '{args[0]}': unknown; {nearest(args[0], valid)}")
            name, command, rest = super().resolve_command(ctx, args)
            if name in entries:
                module, function = entries[name].target.split(":")
                command = _command(name, getattr(importlib.import_module(module), function), None)
            return name, command, rest

    return LazyGroup


def _command(name: str, function: Callable[..., Any], help_line: str | None) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name=name, help=help_line)(function)
    command = typer.main.get_command(app)
    command.name = name
    return command


def build_app() -> typer.Typer:
    """The command-line application, with every sub-command of the tables."""
    app = typer.Typer(
        cls=_lazy_group(COMMANDS), add_completion=False, no_args_is_help=True, rich_markup_mode=None,
        pretty_exceptions_enable=False, help="Pretrain video-audio-text encoders on a global batch, exactly.",
    )  # fmt: skip
    app.callback()(lambda: None)
    for name, (entries, purpose) in GROUPS.items():
        group = typer.Typer(cls=_lazy_group(entries), no_args_is_help=True, rich_markup_mode=None, help=purpose)
        group.callback()(lambda: None)
        app.add_typer(group, name=name)
    return app


def check_siblings() -> None:
    """Refuse to run when another distribution has overwritten one of our three import packages.

    Raises:
        UserError: a sibling package is not the one beside this file.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for package in ("data_pipeline", "launch"):
        spec = importlib.util.find_spec(package)
        where = os.path.dirname(spec.origin) if spec is not None and spec.origin else None
        if where != os.path.join(home, package):
            raise UserError(
                f"import package '{package}' is found at {where}, expected {os.path.join(home, package)}: another "
                "distribution provides the same name; remove it and reinstall parallelotope"
            )


def main() -> None:
    """Run the command line; a `UserError` is printed in one line and exits with 2.

    So does a package of the `train` extra that is not there: using a model takes less than making one.
    """
    try:
        check_siblings()
        build_app()()
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRA_PACKAGES:
            raise
        command = " ".join(["parallelotope", *sys.argv[1:2]])
        hint = "which is not installed: pip install 'parallelotope[train]'"
        print(f"error: {command} needs {package}, {hint}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
