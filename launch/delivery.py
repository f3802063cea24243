"""A config travels inside the job that needs it: no second object, no file that changes while the job is queued."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.settings import UserError

VARIABLE = "PARALLELOTOPE_CONFIG"
MAX_BYTES = 100_000  # Linux takes 128 KiB a variable
SCRIPT = """\
command -v "$1" > /dev/null || { echo "error: no '$1' on the PATH of $(hostname); expected it installed there" >&2; exit 127; }
config=$(mktemp) && printf %s "$PARALLELOTOPE_CONFIG" > "$config" && exec "$@" "$config"
"""  # noqa: E501


def with_config(command: Sequence[str]) -> tuple[str, ...]:
    """`command CONFIG` as the arguments of a process that finds the config's text in `VARIABLE`.

    Nothing is pasted into the script: the command's words are its arguments.
    """
    return ("/bin/sh", "-c", SCRIPT, "sh", *command)


def check_size(text: str) -> str:
    """`text`, when a variable can hold it.

    Raises:
        UserError: it is too large.
    """
    num_bytes = len(text.encode())
    if num_bytes > MAX_BYTES:
        raise UserError(f"config: {num_bytes} bytes when resolved; expected at most {MAX_BYTES} to travel with a job")
    return text
