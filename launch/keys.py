"""The command `parallelotope keys`: every key of a config, from its models and the comments in their source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import typer
from pydantic import BaseModel

from data_pipeline.config import ShardConfig
from data_pipeline.settings import UserError, models_in, nearest
from pretrain.config import RunConfig

KINDS: dict[str, type[BaseModel]] = {"shard": ShardConfig, "pretrain": RunConfig}


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a config. default: as Python writes it; None: it must be given."""

    path: str
    kind: str
    default: str | None
    comment: str


def keys(kind: Annotated[str, typer.Argument(help="shard or pretrain.")]) -> None:
    """Every key of a config of that kind: its type, its default and what it means."""
    if kind not in KINDS:
        raise UserError(f"keys {kind}: {nearest(kind, KINDS)}")
    for key in keys_of(KINDS[kind]):
        default = "must be given" if key.default is None else f"default {key.default}"
        typer.echo(f"{key.path}: {key.kind}, {default}")
        if key.comment:
            typer.echo(textwrap.indent(textwrap.fill(key.comment, 100), "    "))


def keys_of(model: type[BaseModel], place: str = "") -> Iterator[Key]:
    """The keys of a model and of the models in it, in the order of the source; N stands for a place in a list."""
    own = {key.path: key for base in reversed(model.__mro__) if base is not BaseModel for key in _written_in(base)}
    for name, field in model.model_fields.items():
        key = own[name]
        path = f"{place}{name}"
        yield Key(path=path, kind=key.kind, default=key.default, comment=key.comment)
        inner = sorted(models_in(field.annotation), key=lambda part: part.__name__)
        for part in inner:
            named = part.model_fields.get("name")
            chosen = f" ({named.default})" if named is not None and len(inner) > 1 else ""
            yield from keys_of(part, f"{path}{'.N' if key.kind.startswith('list') else ''}{chosen}.")


def _written_in(model: type) -> Iterator[Key]:
    """The fields that the source of one class itself declares."""
    if not issubclass(model, BaseModel):
        return
    text = textwrap.dedent(inspect.getsource(model))
    lines = text.splitlines()
    (definition,) = ast.parse(text).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default, limits = _default(node.value)
            kind = ast.unparse(node.annotation) + limits
            yield Key(path=node.target.id, kind=kind, default=default, comment=_comment(lines, node))


def _default(value: ast.expr | None) -> tuple[str | None, str]:
    """The default, and the limits that a `Field(...)` puts on the value."""
    if not isinstance(value, ast.Call) or ast.unparse(value.func) != "Field":
        made = isinstance(value, ast.Call) and not value.args and not value.keywords
        return (None if value is None else "that of its keys" if made else ast.unparse(value)), ""
    limits = {word.arg: ast.unparse(word.value) for word in value.keywords}
    factory, default = limits.pop("default_factory", None), limits.pop("default", None)
    found = ast.unparse(value.args[0]) if value.args else default or (f"{factory}()" if factory else None)
    limits.pop("discriminator", None)
    return found, "".join(f", {name} {limit}" for name, limit in limits.items())


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    """The comment lines above a field, and the comment behind it."""
    assert node.end_lineno is not None
    above: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().lstrip("# "))
    behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().partition("#")[2].strip()
    return " ".join([*above, behind]).strip()
