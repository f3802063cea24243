"""What to do when nothing more can be written, in one line."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from data_pipeline.settings import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def full_disk_said(run_dir: str) -> Iterator[None]:
    """Turn the system's refusal to write, whoever met it (TensorBoard's thread, a config, a log), into a line.

    A thread that writes hands its refusal on to the next who gives it something; its own traceback would only tear
    that line apart.

    Raises:
        UserError: in place of such a refusal; other errors pass.
    """
    hook = threading.excepthook

    def say_the_rest(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in NO_ROOM):
            hook(args)

    threading.excepthook = say_the_rest
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"run_dir {run_dir}: cannot be written: {os.strerror(error.errno)}{where}; checkpoints are whole, the same "
            "command goes on from them"
        ) from error
    finally:
        threading.excepthook = hook
