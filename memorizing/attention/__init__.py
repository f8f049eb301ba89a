"""The mechanisms of attention, one a file: configuration, state, layer, cost.

To add one: its file, and one line in `MECHANISMS`; see docs/adding-a-mechanism.md.
"""

from memorizing.attention.base import Attention
from memorizing.attention.compressive import CompressiveAttention
from memorizing.attention.full import FullAttention
from memorizing.attention.knn import KNNAttention
from memorizing.attention.transformer_xl import TransformerXLAttention
from memorizing.attention.xl import XLAttention

# In the order in which tables of costs show them.
MECHANISMS: tuple[type[Attention], ...] = (
    FullAttention,
    XLAttention,
    TransformerXLAttention,
    CompressiveAttention,
    KNNAttention,
)

# Carries nothing: what a model has unless it is told otherwise.
DEFAULT: Attention = FullAttention()
