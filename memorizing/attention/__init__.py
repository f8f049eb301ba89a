"""One mechanism a file: a frozen dataclass that configures it, its state, its layer."""

from memorizing.attention.compressive import CompressiveAttention
from memorizing.attention.full import FullAttention
from memorizing.attention.knn import KNNAttention
from memorizing.attention.transformer_xl import TransformerXLAttention
from memorizing.attention.xl import XLAttention

# Every mechanism that gin files can name; a new one is registered by its line here.
MECHANISMS = (FullAttention, XLAttention, KNNAttention, TransformerXLAttention, CompressiveAttention)
