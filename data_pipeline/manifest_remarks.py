"""What a manifest says that its author may not have meant: read as it stands, and remarked in a line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from data_pipeline.manifest_row import ManifestRow


def remarks_on(rows: Sequence[ManifestRow]) -> Iterator[str]:
    """A line for captions that look like broken lists, and one for splits that differ in case or spaces alone."""
    broken = [row for row in rows if any(is_broken_list(caption.text) for caption in row.captions)]
    if broken:
        text = next(caption.text for caption in broken[0].captions if is_broken_list(caption.text))
        count = "1 row" if len(broken) == 1 else f"{len(broken)} rows"
        yield (
            f"{count} with a caption that begins like a list and is none, taken as text as it stands; the first: row "
            f"'{broken[0].id}': {text[:40]!r}"
        )
    counts = Counter(row.split for row in rows)
    alike: dict[str, list[str]] = {}
    for split in counts:
        alike.setdefault(split.strip().casefold(), []).append(split)
    for splits in alike.values():
        if len(splits) > 1:
            said = " and ".join(f"'{split}' ({counts[split]})" for split in splits)
            yield f"splits {said} differ in case or spaces alone, and are different splits"


def is_broken_list(text: str) -> bool:
    """Whether a text begins as a JSON list of strings does, and is none."""
    if not text.startswith(('["', "['")):
        return False
    try:
        json.loads(text)
    except ValueError:
        return True
    return False
