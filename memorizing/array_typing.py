"""The letters of this code base, and a name for each kind of array.

The letters stand in type aliases, einsums (`'BTNH,BSNH->BNTS'`) and shape comments, always with the same meaning:

  B rows              T query positions   S key positions   U segments of a row in one step
  N query heads       K key/value heads   H head width      L layers
  D model width       F MLP width         V vocabulary      W window of cached keys
  M memory slots      k neighbours        C compressed slots
  R memory tokens

Where every query head has a key and a value head of its own, K = N, and their arrays say N.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Bool, Float, Int, UInt32

Tokens = Int[Array, "B T"]
RealPositions = Bool[Array, "B T"]
RowFlags = Bool[Array, "B"]

Activations = Float[Array, "B T D"]
Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]
Values = Float[Array, "B S K H"]
HeadScale = Float[Array, "N"]
Logits = Float[Array, "B T V"]
PerToken = Float[Array, "B T"]

# The external memory keeps heads before slots: a head's slots are then one contiguous matrix for the search.
MemoryKeys = Float[Array, "B N M H"]
MemoryValues = Float[Array, "B N M H"]
MemoryTokens = Int[Array, "B M"]
MemoryValidity = Bool[Array, "B M"]
NeighbourScores = Float[Array, "B N T k"]
NeighbourIndices = Int[Array, "B N T k"]

Scalar = Float[Array, ""]
Clock = Int[Array, ""]
Checksum = UInt32[Array, ""]

# A tree of arrays; a tree of the same shape whose leaves are tuples of logical axis names.
Tree = Any
AxesTree = Any
