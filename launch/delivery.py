"""A config travels inside the job that needs it: no second object, no file that changes while the job is queued."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from data_pipeline.settings import Settings, UserError

MAX_BYTES = 100_000  # Linux takes 128 KiB an argument
# $1: the config's text, the rest: a command that takes the config's path as its last argument.
SCRIPT = """\
command -v "$2" > /dev/null || { echo "error: no '$2' on the PATH of $(hostname); expected parallelotope installed there" >&2; exit 127; }
config=$(mktemp) && printf %s "$1" > "$config" && shift && exec "$@" "$config"
"""  # noqa: E501


def with_config(command: Sequence[str], settings: Settings) -> tuple[str, ...]:
    """`command CONFIG` as the arguments of a process that brings the resolved config along.

    Nothing is pasted into the script: the config and the command are arguments of it.

    Raises:
        UserError: the config is too large for that.
    """
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    num_bytes = len(text.encode())
    if num_bytes > MAX_BYTES:
        raise UserError(f"config: {num_bytes} bytes when resolved; expected at most {MAX_BYTES} to travel with a job")
    return ("/bin/sh", "-c", SCRIPT, "parallelotope", text, *command)
