"""`python -m memorizing.data.prepare`."""

import signal
import sys

from memorizing.data.prepare.command import main

if __name__ == "__main__":
    # An exception, so that the processes that were started end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
