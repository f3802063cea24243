"""A configuration file becomes a typed model, or one line a mistake.

YAML and `a.b=value` overrides are read by OmegaConf, checked by pydantic. Every mistake names the file, the place, what
was found, what was expected and the nearest valid name.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class UserError(Exception):
    """A mistake of the person at the keyboard: printed as it is, in one line, without a traceback; exit code 2."""


class Settings(BaseModel):
    """Base of every configuration model: frozen; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )


SettingsT = TypeVar("SettingsT", bound=Settings)

QUOTE = "'"  # pydantic quotes names


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause that names the closest valid name, and all: "did you mean 'lr'? (valid: lr, seed)"; "there is none"."""
    names = sorted(valid)
    if not names:
        return "there is none"
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    guess = f"did you mean '{close[0]}'? " if close else ""
    return f"{guess}(valid: {', '.join(names)})"


def load_settings(model: type[SettingsT], path: Path | str, overrides: Sequence[str] = ()) -> SettingsT:
    """Read `path`, apply `overrides` ("a.b=value"), and check the result against `model`.

    Raises:
        UserError: the file is missing, is not YAML, or does not fit the model; one line a mistake.
    """
    return check_settings(model, read_yaml(path, overrides), str(path))


def read_yaml(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain mapping in `path` with `overrides` merged over it, interpolations resolved.

    Raises:
        UserError: the file is missing, is not a YAML mapping, or an override has no "=".
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(path.name, beside) if beside else "no .yaml file there"
        raise UserError(f"config {path}: no such file; {hint}")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override '{override}': expected key=value, as in seed=1 or ray.num_cpus=4")
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise UserError(f"config {path}: expected a mapping of keys, found {type(loaded).__name__}")
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: {' '.join(str(error).split())}") from error
    for override in overrides:
        _apply(loaded, override)
    try:
        plain = OmegaConf.to_container(loaded, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config {path}: {' '.join(str(error).split())}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _apply(config: Any, override: str) -> None:
    """Set one key: "train.chunk=8", "objective.0.weight=2"; values are read as YAML."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, _, text = override.partition("=")
    try:
        value = OmegaConf.create({"value": OmegaConf.from_dotlist([f"value={text}"])["value"]})["value"]
        OmegaConf.update(config, key, value, merge=True, force_add=True)
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
        raise UserError(f"override '{override}': {' '.join(str(error).split())}") from error


def check_settings(model: type[SettingsT], values: dict[str, Any], place: str) -> SettingsT:
    """`values` as a `model`; `place` (a file name) begins every line of the error.

    Raises:
        UserError: one line a mistake.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        mistakes = error.errors()
        unknown = [str(m["loc"][0]) for m in mistakes if m["type"] == "extra_forbidden" and len(m["loc"]) == 1]
        missing = [str(m["loc"][0]) for m in mistakes if m["type"] == "missing" and len(m["loc"]) == 1]
        if len(unknown) > 2 and missing:
            raise UserError(
                f"config {place}: of another kind: {', '.join(unknown)} are no keys of a {model.__name__}, which needs "
                f"{', '.join(missing)}"
            ) from error
        lines = [f"config {place}: {_explain(model, mistake)}" for mistake in mistakes]
        raise UserError("\n".join(dict.fromkeys(lines))) from error


def _explain(model: type[BaseModel], mistake: Any) -> str:
    location = tuple(mistake["loc"])
    where = ".".join(str(part) for part in location) or "(top level)"
    found = mistake["input"]
    if mistake["type"] == "extra_forbidden":
        valid, deeper = _keys_at(model, location[:-1]), _paths_to(model, location)
        hint = f"did you mean {deeper}? (valid here: {', '.join(sorted(valid))})" if deeper else ""
        return f"{where}: unknown key; {hint or nearest(str(location[-1]), valid)}"
    if mistake["type"] == "missing":
        return f"{where}: missing; expected a value"
    if mistake["type"] == "union_tag_invalid":
        key, tag, valid = (mistake["ctx"][name] for name in ("discriminator", "tag", "expected_tags"))
        return f"{where}: {key.strip(QUOTE)} '{tag}'; {nearest(tag, [name.strip(QUOTE) for name in valid.split(', ')])}"
    message = str(mistake["msg"]).removeprefix("Value error, ")
    if isinstance(found, dict | list | BaseModel) or mistake["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message}; found {found!r}"


def _keys_at(model: type[BaseModel], location: tuple[Any, ...]) -> set[str]:
    """Field names valid at `location`: through nested models, lists, dicts and unions (their union)."""
    models: set[type[BaseModel]] = {model}
    for part in location:
        found: set[type[BaseModel]] = set()
        for candidate in models:
            field = candidate.model_fields.get(str(part))
            found |= models_in(field.annotation) if field is not None else set()
        tagged = {m for m in models if "name" in m.model_fields and m.model_fields["name"].default == part}
        models = found or tagged or models  # a union's tag chooses one of its models; a list index changes nothing
    return {name for candidate in models for name in candidate.model_fields}


def _paths_to(model: type[BaseModel], location: tuple[Any, ...]) -> str:
    """Where a key of that very name stands one level deeper: "'data.train.path' or 'data.validation.path'"."""
    *parents, name = (str(part) for part in location)
    beside = sorted(_keys_at(model, location[:-1]))
    found = [key for key in beside if name in _keys_at(model, (*location[:-1], key)) - set(beside)]
    return " or ".join(f"'{'.'.join([*parents, key, name])}'" for key in found)


def models_in(annotation: Any) -> set[type[BaseModel]]:
    """The models that a field of this type may hold: itself, of a list, of a union."""
    plain_class = isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)
    if plain_class and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in typing.get_args(annotation) for model in models_in(part)}
