"""Registers the data side with gin; a task's gin file imports it: `import memorizing.data.gin_registry`."""

from memorizing.data.streams.sources import CachedCorpus, Mixture
from memorizing.gin_types import register

register(CachedCorpus)
register(Mixture)
