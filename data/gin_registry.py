"""Registers the data side with gin; a task's gin file imports it: `import memorizing.data.gin_registry`."""

from memorizing.config.types import register
from memorizing.data.streams.sources import CachedCorpus, Mixture

register(CachedCorpus)
register(Mixture)
