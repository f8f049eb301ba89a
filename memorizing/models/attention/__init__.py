"""The mechanisms of attention, one a file: configuration, state, layer, cost.

To add one: its file, and one line in `MECHANISMS`; see docs/adding-a-mechanism.md.
"""

from memorizing.models.attention.adaptive_span import AdaptiveSpanAttention
from memorizing.models.attention.base import Attention
from memorizing.models.attention.compressive import CompressiveAttention
from memorizing.models.attention.full import FullAttention
from memorizing.models.attention.joint_memory import JointMemoryAttention
from memorizing.models.attention.knn import KNNAttention
from memorizing.models.attention.sparse.factorized import SparseAttention
from memorizing.models.attention.sparse.reformer import ReformerAttention
from memorizing.models.attention.sparse.routing import RoutingAttention
from memorizing.models.attention.sparse.sinkhorn import SinkhornAttention
from memorizing.models.attention.transformer_xl import TransformerXLAttention
from memorizing.models.attention.xl import XLAttention

# In the order in which tables of costs show them.
MECHANISMS: tuple[type[Attention], ...] = (
    FullAttention,
    XLAttention,
    TransformerXLAttention,
    CompressiveAttention,
    KNNAttention,
    JointMemoryAttention,
    SparseAttention,
    ReformerAttention,
    RoutingAttention,
    SinkhornAttention,
    AdaptiveSpanAttention,
)

# Carries nothing: what a model has unless it is told otherwise.
DEFAULT: Attention = FullAttention()
