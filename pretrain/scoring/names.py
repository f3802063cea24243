"""The scores by name. Of all of them, higher is better; vectors are compared as unit vectors.

cosine           of one vector with one vector
summed_cosine    sum of the cosines of every vector of the query with every vector of the candidate
centroid         cosine of the mean of the query's vectors with the mean of the candidate's (CentroBind)
volume           minus the volume that the vectors of both sides span together (GRAM)
singular_value   the largest singular value of the matrix of the vectors of both sides (PMRL), 1 to sqrt(k)

What a tuple lacks: a missing vector counts as orthogonal to all others in `volume` (factor 1) and in `singular_value`
(a singular value of 1), and so never improves them; it adds 0 to `summed_cosine`; `centroid` is the mean of the vectors
that are there (0 with everything where they cancel). A query or a candidate that has no vector at all scores -inf with
everything. `volume` and `singular_value` do not see a sign: an opposite vector is as near as an equal one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

ScoreName = Literal["cosine", "summed_cosine", "centroid", "volume", "singular_value"]
SCORE_LABELS: dict[str, str] = {
    "cosine": "cosine",
    "summed_cosine": "summed cosine",
    "centroid": "centroid cosine",
    "volume": "volume",
    "singular_value": "singular value",
}
SIGN_BLIND: frozenset[str] = frozenset({"volume", "singular_value"})
OWN_SCORES: dict[str, ScoreName] = {
    "gram": "volume",
    "triangle": "volume",
    "pmrl": "singular_value",
    "centrobind": "centroid",
}


def own_score(objectives: Iterable[str]) -> ScoreName:
    """How those who train under these objectives score a tuple: as the first of them does that has a score of tuples,
    else by summed cosine."""
    return next((OWN_SCORES[name] for name in objectives if name in OWN_SCORES), "summed_cosine")
