"""Registers the data side with gin; a task's gin file imports it: `import memorizing.data.gin_registry`."""

from memorizing.config.types import register
from memorizing.data.streams.sources import CachedCorpus, Mixture
from memorizing.data.tokens.vocabulary import ByteVocabulary

register(CachedCorpus)
register(Mixture)
# Of texts that are made, such as the prompts of recall suites.
register(ByteVocabulary)
