"""The work on the parts of a corpus as an Apache Beam pipeline, for corpora that one machine is too small for.

The same functions run on the same parts, so that the caches are the same byte for byte. Workers on other machines need
this package with TensorFlow, and the source and the output in an object store. `prepare --help` shows the flags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from memorizing.data.errors import DataError
from memorizing.data.prepare.workers import Work

_COUNTER = "documents"
_REPORTED = re.compile(rf"{DataError.__name__}: (.+?)(?: \[while running|\n|$)")


class Beam:
    """A Beam runner; see `workers.Workers`."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        """
        Args:
          options: of Beam, such as "--runner=DataflowRunner" and "--project=...".

        Raises:
          DataError: Apache Beam is not installed, or does not know an option.
        """
        try:
            from apache_beam.options import pipeline_options
        except ImportError:
            raise DataError("Apache Beam is not installed: pip install 'memorizing[prep]'") from None
        self._options = pipeline_options.PipelineOptions(list(options))

    def run(self, work: Work, parts: Sequence[Any], advance: Callable[[int], None]) -> None:
        """Does the work on every part, in any order; see `workers.Workers`."""
        import apache_beam

        pipeline = apache_beam.Pipeline(options=self._options)
        # Without the shuffle one worker would take all parts.
        _ = pipeline | apache_beam.Create(list(parts)) | apache_beam.Reshuffle() | apache_beam.Map(_Counted(work))
        try:
            pipeline.run().wait_until_finish()
        except Exception as error:
            # Runners report an error of a worker as a text, which also says where it happened.
            reported = _REPORTED.search(f"{type(error).__name__}: {error}")
            if reported is None:
                raise
            raise DataError(reported[1]) from None
        del advance  # Beam shows its own progress.


class _Counted:
    """The work on a part, which counts its documents in a counter that Beam shows."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self, part: Any) -> None:
        from apache_beam.metrics import Metrics

        self._work(part, Metrics.counter("memorizing", _COUNTER).inc)
