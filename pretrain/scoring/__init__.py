"""How tuples of vectors are compared for inference: scores, the best candidates, the hardest negatives.

`names` says what each score means, and what a missing vector does to it.
"""

from pretrain.scoring.comparison import scores
from pretrain.scoring.names import SCORE_LABELS, ScoreName
from pretrain.scoring.negatives import hardest_negatives
from pretrain.scoring.search import Matches, search
from pretrain.scoring.side import embeddings_of

__all__ = ["SCORE_LABELS", "Matches", "ScoreName", "embeddings_of", "hardest_negatives", "scores", "search"]
