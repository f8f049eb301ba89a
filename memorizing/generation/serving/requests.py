"""What clients ask for, checked before anything is done: a field that is given has a meaning here, or is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from memorizing.errors import Range, UserError, is_number
from memorizing.generation.sampling import TEMPERATURE, TOP_K, TOP_P, Sampling

SEED = Range(0, 2**32 - 1)
# Of one request.
MOST_STOPS = 4

# Fields of OpenAI's completions that change nothing here at these values, and cannot be had at others.
_ONLY = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "stream_options": (None,),
    "suffix": (None, ""),
}
# And one that says nothing about the text.
_IGNORED = ("user",)


class BadRequest(UserError):
    """A request that cannot be understood.

    Attributes:
      field: the field that is wrong; None for the whole.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Completion:
    """A text to be written.

    Attributes:
      prompt: to be read first; None to go on where the session is.
      session: that is gone on with; None to begin with nothing.
      remember: whether the session keeps what was read and written.
      max_tokens: to be written, at most.
      sampling: how they are drawn.
      seed: of the random numbers.
      stop: texts before which the text ends.
      stream: whether it is sent as it comes.
    """

    prompt: str | None
    session: str | None
    remember: bool
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    stream: bool


def completion(body: bytes, model: str, most_tokens: int) -> Completion:
    """The request for a text.

    Args:
      body: JSON.
      model: the name of the one that there is.
      most_tokens: that a request may ask for.

    Raises:
      BadRequest: something in it cannot be had.
    """
    fields = Fields(body)
    for name, values in _ONLY.items():
        value = fields.take(name)
        if value not in values:
            raise BadRequest(f"{name} = {shown(value)} cannot be had here: leave it out", name)
    for name in _IGNORED:
        fields.take(name)
    named = fields.text("model")
    if named not in (None, model):
        raise BadRequest(f"there is no model {named!r}: this is {model!r}", "model")
    defaults = Sampling()
    asked = Completion(
        prompt=fields.text("prompt") or None,
        session=fields.text("session"),
        remember=fields.flag("remember"),
        max_tokens=int(fields.number("max_tokens", 16, Range(1, most_tokens), whole=True)),
        sampling=Sampling(
            temperature=fields.number("temperature", defaults.temperature, TEMPERATURE),
            top_k=int(fields.number("top_k", defaults.top_k, TOP_K, whole=True)),
            top_p=fields.number("top_p", defaults.top_p, TOP_P),
        ),
        seed=int(fields.number("seed", 0, SEED, whole=True)),
        stop=fields.texts("stop", MOST_STOPS),
        stream=fields.flag("stream"),
    )
    fields.end()
    if asked.prompt is None and asked.session is None:
        raise BadRequest("prompt is missing: give at least one character, or a session to go on with", "prompt")
    if asked.remember and asked.session is None:
        raise BadRequest("remember = true: name the session that is to remember", "remember")
    return asked


class Fields:
    """The fields of a JSON object, each to be taken once. All methods raise BadRequest."""

    def __init__(self, body: bytes) -> None:
        try:
            fields = json.loads(body or b"{}")
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is no JSON ({error})"[:200]) from None
        if not isinstance(fields, dict):
            raise BadRequest("the body is no JSON object")
        self._fields: dict[str, Any] = fields

    def take(self, name: str) -> Any:
        """A field as it is; None if it is not given."""
        return self._fields.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise BadRequest(f"{name} = {shown(value)}: expected a text", name)
        return None if value is None else _utf8(value, name)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """One or several texts, none of them empty."""
        value = self.take(name)
        values = [value] if isinstance(value, str) else [] if value is None else value
        are_texts = isinstance(values, list) and all(isinstance(each, str) and each for each in values)
        if not are_texts or len(values) > most:
            raise BadRequest(f"{name} = {shown(value)}: expected up to {most} texts, none of them empty", name)
        return tuple(_utf8(each, name) for each in values)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value not in (None, True, False) or (isinstance(value, int) and not isinstance(value, bool)):
            raise BadRequest(f"{name} = {shown(value)}: expected true or false", name)
        return bool(value)

    def number(self, name: str, default: float, limits: Range, whole: bool = False) -> float:
        value = self.take(name)
        if value is None:
            return default
        if not is_number(value) or value not in limits or (whole and not isinstance(value, int)):
            kind = "a whole number" if whole else "a number"
            raise BadRequest(f"{name} = {shown(value)}: expected {kind} {limits}", name)
        return value

    def end(self) -> None:
        """All fields have been taken."""
        if self._fields:
            name = next(iter(self._fields))
            raise BadRequest(f"there is no field {name[:100]!r}", name[:100])


def shown(value: Any) -> str:
    """A value in an error's message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _utf8(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name} is no text in UTF-8 (at character {error.start})", name) from None
    return text
