"""The licence of a repository, as an SPDX identifier in small letters, and whether it is an open one.

SPDX: https://spdx.org/licenses. A repository without a licence is not open: all rights are its author's.
"""

from __future__ import annotations

import email
import json
import re
import tomllib
from collections.abc import Callable, Collection, Mapping

# The fifteen that `bigquery-public-data.github_repos.licenses` knows come first. All are approved by the OSI, or put a
# work into the public domain.
OPEN_SOURCE = (
    *("mit", "apache-2.0", "gpl-2.0", "gpl-3.0", "bsd-3-clause", "bsd-2-clause", "unlicense", "lgpl-3.0", "agpl-3.0"),
    *("cc0-1.0", "mpl-2.0", "epl-1.0", "lgpl-2.1", "isc", "artistic-2.0"),
    *("0bsd", "bsl-1.0", "epl-2.0", "eupl-1.2", "lgpl-2.0", "mpl-1.1", "ncsa", "psf-2.0", "python-2.0", "upl-1.0"),
    *("wtfpl", "zlib"),
)
# Allows every repository, also those without a licence.
ANY = "any"

# Words in the text of each licence. Of several licences in a text, the one that comes first counts.
_TEXTS = {
    "apache-2.0": r"apache license,? version 2\.0",
    "agpl-3.0": r"gnu affero general public license,? version 3",
    "lgpl-3.0": r"gnu lesser general public license,? version 3",
    "lgpl-2.1": r"gnu lesser general public license,? version 2\.1",
    "lgpl-2.0": r"gnu library general public license,? version 2",
    "gpl-3.0": r"gnu general public license,? version 3",
    "gpl-2.0": r"gnu general public license,? version 2",
    "mpl-2.0": r"mozilla public license,? (?:version |v\.? ?)2\.0",
    "mpl-1.1": r"mozilla public license,? (?:version |v\.? ?)1\.1",
    "epl-2.0": r"eclipse public license - v ?2\.0",
    "epl-1.0": r"eclipse public license - v ?1\.0",
    "eupl-1.2": r"european union public licence v\. ?1\.2",
    "mit": r"permission is hereby granted, free of charge, to any person obtaining a copy of this software and "
    r"associated",
    "isc": r"permission to use, copy, modify, and(?:/or)? distribute this software for any purpose with or without "
    r"fee is hereby granted, provided",
    "0bsd": r"permission to use, copy, modify, and(?:/or)? distribute this software for any purpose with or without "
    r"fee is hereby granted\.",
    "ncsa": r"university of illinois/ncsa open source license",
    "bsd-3-clause": r"redistribution and use in source and binary forms"
    r"(?=.{0,2000}(?:neither the name|endorse or promote))",
    "bsd-2-clause": r"redistribution and use in source and binary forms"
    r"(?!.{0,2000}(?:neither the name|endorse or promote))",
    "unlicense": r"this is free and unencumbered software released into the public domain",
    "cc0-1.0": r"cc0 1\.0 universal",
    "bsl-1.0": r"boost software license - version 1\.0",
    "artistic-2.0": r"the artistic license 2\.0",
    "psf-2.0": r"python software foundation license version 2",
    "upl-1.0": r"the universal permissive license \(upl\), version 1\.0",
    "wtfpl": r"do what the fuck you want to public license",
    "zlib": r"altered source versions must be plainly marked as such",
}
_TEXT = re.compile("|".join(f"(?P<l{index}>{pattern})" for index, pattern in enumerate(_TEXTS.values())), re.DOTALL)
# Identifiers, and the names that packages of Python and JavaScript use; the first pattern that fits counts.
_NAMES = {
    "agpl-3.0": r"\bagpl|affero",
    "lgpl-3.0": r"\blgpl.*3|lesser general.*3",
    "lgpl-2.0": r"\blgpl.*2\.0|library general",
    "lgpl-2.1": r"\blgpl|lesser general",
    "gpl-3.0": r"\bgpl.*3|gnu general.*3",
    "gpl-2.0": r"\bgpl|gnu general",
    "apache-2.0": r"\bapache",
    "0bsd": r"\b0bsd|zero[- ]clause",
    "bsd-2-clause": r"\bbsd.*2|2[- ]clause|simplified bsd|freebsd",
    "bsd-3-clause": r"\bbsd",
    "mpl-1.1": r"\bmpl.*1\.1|mozilla.*1\.1",
    "mpl-2.0": r"\bmpl|mozilla",
    "epl-1.0": r"\bepl.*1|eclipse.*1",
    "epl-2.0": r"\bepl|eclipse",
    "psf-2.0": r"\bpsf|python software foundation",
    "python-2.0": r"\bpython-2",
    "isc": r"\bisc\b",
    "zlib": r"\bzlib",
    "unlicense": r"\bunlicense\b",
    "cc0-1.0": r"\bcc0",
    "bsl-1.0": r"\bbsl-1|boost",
    "artistic-2.0": r"artistic",
    "upl-1.0": r"\bupl\b",
    "ncsa": r"\bncsa",
    "wtfpl": r"\bwtfpl",
    "eupl-1.2": r"\beupl",
    "mit": r"\bmit\b|\bexpat\b",
}
_MARK = re.compile(r"SPDX-License-Identifier:[ \t]*(?P<expression>[^\r\n*#<>]+)")
_FILE = re.compile(r"(?:licen[cs]es?|copying|unlicense)(?:[.\-_].*)?", re.IGNORECASE)
# Some packages have the text of the licence in the field for its name.
_LONGEST_NAME = 200


def is_allowed(expression: str | None, allowed: Collection[str]) -> bool:
    """Whether a licence is allowed.

    Args:
      expression: identifiers as this module's functions give them, joined by "or" or "and"; None where none is known.
      allowed: identifiers, or ANY.
    """
    if ANY in allowed:
        return True
    if expression is None:
        return False
    return any(all(part in allowed for part in choice.split(" and ")) for choice in expression.split(" or "))


def named(name: str) -> str | None:
    """The licence that a name, or an SPDX expression such as "MIT OR Apache-2.0", stands for; None if it is not known.

    An expression with brackets is read as if all of its licences applied.
    """
    choices = [name] if "(" in name else re.split(r"\s+or\s+", name.strip(), flags=re.IGNORECASE)
    found = []
    for choice in choices:
        parts = re.split(r"\s+(?:and|or)\s+", choice, flags=re.IGNORECASE)
        known = [licence for part in parts if (licence := _single(part)) is not None]
        if len(known) == len(parts):
            found.append(" and ".join(known))
    return " or ".join(found) or None


def _single(name: str) -> str | None:
    name = re.sub(r"\s+with\s.*|\+$|-only$|-or-later$", "", name.strip(" ()").lower())
    if name in OPEN_SOURCE:
        return name
    return next((licence for licence, pattern in _NAMES.items() if re.search(pattern, name)), None)


def of_text(text: str) -> str | None:
    """The licence whose text or SPDX identifier a file contains; None if it is not known."""
    if mark := _MARK.search(text):
        return named(mark["expression"])
    # Line ends and marks of comments may stand anywhere in it.
    words = re.sub(r"[\s*#/;]+", " ", text).lower().split()
    match = _TEXT.search(" ".join(words))
    if match is None or match.lastgroup is None:
        return None
    # The name of a group is `l` and the index of its pattern.
    return list(_TEXTS)[int(match.lastgroup[1:])]


def is_licence_file(name: str) -> bool:
    """Whether a file of this name, at the top of a repository, says what its licence is."""
    return _FILE.fullmatch(name) is not None or name in _METADATA


def of_files(texts: Mapping[str, str]) -> str | None:
    """The licence of a repository: that of its licence file, or else the one in the metadata of its package.

    Args:
      texts: of its files for which `is_licence_file` holds, by name.
    """
    for name in sorted(texts, key=lambda name: (name in _METADATA, name)):
        found = _METADATA.get(name, of_text)(texts[name])
        if found is not None:
            return found
    return None


def _of_python_package(text: str) -> str | None:
    fields = email.message_from_string(text)
    for field in ("License-Expression", "License"):
        value = fields.get(field, "")
        found = named(value) if len(value) < _LONGEST_NAME else of_text(value)
        if found is not None:
            return found
    classifiers = (line for line in fields.get_all("Classifier", ()) if line.startswith("License ::"))
    return next(filter(None, (named(line.rpartition("::")[2]) for line in classifiers)), None)


def _of_pyproject(text: str) -> str | None:
    try:
        licence = tomllib.loads(text).get("project", {}).get("license", "")
    except (tomllib.TOMLDecodeError, AttributeError):
        return None
    value = licence.get("text", "") if isinstance(licence, dict) else licence
    return (named(value) if len(value) < _LONGEST_NAME else of_text(value)) if isinstance(value, str) else None


def _of_npm_package(text: str) -> str | None:
    try:
        package = json.loads(text)
    except ValueError:
        return None
    licence = package.get("license") if isinstance(package, dict) else None
    if isinstance(licence, dict):
        licence = licence.get("type")
    return named(licence) if isinstance(licence, str) else None


_METADATA: dict[str, Callable[[str], str | None]] = {
    "PKG-INFO": _of_python_package,
    "package.json": _of_npm_package,
    "pyproject.toml": _of_pyproject,
}
