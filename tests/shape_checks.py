"""A plugin for pytest that checks the shapes and dtypes which the models' signatures state, in every call.

`PYTHONPATH=tests pytest -p shape_checks tests/models/...`: it has to come before the first import of the models.
"""

from __future__ import annotations

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# PEP 484's tower: an int is a float where one is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
install_import_hook("memorizing.models", "shape_checks.check")
