"""The command `generate`: reads a prompt or a file into memory, and writes on."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence

from memorizing.batch import text_of
from memorizing.commands import experiment_flags
from memorizing.commands.documents import longest_document, read_text
from memorizing.config.runs import open_run
from memorizing.errors import MOST, Range, UserError
from memorizing.generation.sampling import TEMPERATURE, TOP_K, TOP_P, Sampling
from memorizing.generation.text_model import Session, TextModel, check_amounts
from memorizing.runtime.workdir import resolve

# Without a prompt: so much of a held-out document is read, and so much of that is shown.
DEFAULT_SEGMENTS = 16
SHOWN_CHARACTERS = 400

DESCRIPTION = """\
Reads a prompt, of any length, into the memory of a trained model, and writes on. The text goes to the standard output, what is told about it to the standard error.

  memorizing generate                                              the demo's run goes on with a held-out document
  memorizing generate --workdir=DIR --prompt='def main():'
  memorizing generate --workdir=DIR --prompt_file=BOOK.txt --save_session=BOOK.session
  memorizing generate --workdir=DIR --session=BOOK.session --prompt='And then' --num_samples=3    the book is read once

A session is what the model remembers when it has read the prompt, before it writes. It belongs to the checkpoint that it was read with.
The run's configuration can be changed by bindings: --gin.KNNAttention.memory_size=65536 reads with a larger memory.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    defaults = Sampling()
    parser.description = DESCRIPTION
    experiment_flags.add_run(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="what to go on with")
    prompt.add_argument("--prompt_file", metavar="FILE", help="the same from a file of UTF-8 text")
    parser.add_argument("--session", metavar="FILE", help="go on from what a session remembers")
    parser.add_argument("--save_session", metavar="FILE", help="save what is remembered when the prompt has been read")
    parser.add_argument(
        "--num_tokens",
        type=Range(0, MOST).of(int),
        default=200,
        metavar="N",
        help="length of a sample (default: 200); 0 only reads",
    )
    parser.add_argument(
        "--num_samples",
        type=experiment_flags.SIDE_BY_SIDE.of(int),
        default=1,
        metavar="N",
        help="samples, side by side (default: 1)",
    )
    parser.add_argument(
        "--temperature",
        type=TEMPERATURE.of(float),
        default=defaults.temperature,
        metavar="X",
        help=f"0 always takes the most probable token (default: {defaults.temperature})",
    )
    parser.add_argument(
        "--top_k",
        type=TOP_K.of(int),
        default=defaults.top_k,
        metavar="K",
        help="only the K most probable tokens (default: all)",
    )
    parser.add_argument(
        "--top_p",
        type=TOP_P.of(float),
        default=defaults.top_p,
        metavar="P",
        help=f"only the most probable tokens that together reach this probability (default: {defaults.top_p})",
    )
    parser.add_argument(
        "--seed", type=experiment_flags.SEED.of(int), default=0, metavar="N", help="of the random numbers (default: 0)"
    )


def run(options: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    prompt = _given_prompt(options)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    # Before anything is loaded.
    Sampling(**sampling)
    if options.num_tokens:
        check_amounts(options.num_tokens, options.num_samples, options.seed)
    experiment_flags.use_devices(1)
    model = TextModel(open_run(options.workdir or experiment_flags.DEFAULT_WORKDIR, options.step, bindings))
    _say(f"{model.run.workdir}, step {model.run.step}: {model.memory}")
    session = model.session(options.session)
    if options.session:
        _say(f"{options.session}: {session.num_tokens:,} tokens were read before")
    elif prompt is None:
        prompt = _held_out_text(model)
    if prompt is not None:
        _read(session, prompt)
    if options.save_session:
        session.save(options.save_session)
        _say(f"saved as {options.save_session}: {session.num_tokens:,} tokens")
    if options.num_tokens:
        if prompt is not None:
            _show_end(prompt)
        parts = session.write(options.num_tokens, options.num_samples, options.seed, **sampling)
        try:
            _print_samples(parts, options.num_samples)
        except BrokenPipeError:
            # Whoever reads, such as `head`, has seen enough; Python flushes once more as it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            print(flush=True)
    return 0


def _given_prompt(options: argparse.Namespace) -> str | None:
    """The prompt of the flags, None if there is none."""
    if options.prompt_file is None:
        if options.prompt == "":
            raise UserError("--prompt is empty: give at least one character, or no --prompt for a default")
        try:
            (options.prompt or "").encode()
        except UnicodeEncodeError as error:
            raise UserError(f"--prompt is no text in UTF-8 (at character {error.start})") from None
        return options.prompt
    named = f"--prompt_file={options.prompt_file}"
    text = read_text(
        resolve(options.prompt_file),
        named,
        not_utf8="is not UTF-8 text: byte {place} is 0x{byte:02x}",
        not_text="is not text: byte {place} is 0",
    )
    if not text:
        raise UserError(f"{named} is empty: give at least one character")
    return text


def _held_out_text(model: TextModel) -> str:
    """The beginning of the longest held-out document."""
    experiment = model.run.experiment
    text = text_of(experiment.data)
    # A run of other data is no text model.
    assert text is not None
    index = longest_document(experiment.data)
    num_tokens = DEFAULT_SEGMENTS * experiment.batch.segment_length
    tokens = text.document_tokens(index)[:num_tokens]
    _say(f"no --prompt is given: the beginning of the held-out document {text.document_keys()[index]!r}")
    return model.vocabulary.decode(tokens)


def _read(session: Session, prompt: str) -> None:
    """Reads the prompt, and tells how far it is."""
    start = time.monotonic()
    is_live = sys.stderr.isatty()

    def show(num_tokens: int) -> None:
        if is_live:
            print(f"\rreading: {num_tokens:,} tokens", end="", file=sys.stderr, flush=True)

    score = session.read(prompt, show)
    seconds = time.monotonic() - start
    if is_live:
        print("\r", end="", file=sys.stderr)
    _say(
        f"read {len(score.tokens):,} tokens in {seconds:.1f} s, compiling included: perplexity {score.perplexity:.2f}, "
        f"{score.bits_per_byte:.3f} bits per byte"
    )


def _show_end(prompt: str) -> None:
    """The end of the prompt, dimmed on a terminal; the text goes on from there."""
    shown = prompt[-SHOWN_CHARACTERS:]
    if len(shown) < len(prompt):
        # From the start of a line, if there is one.
        shown = "[...]\n" + shown[shown.find("\n") + 1 :]
    _say("-" * 40)
    is_terminal = sys.stderr.isatty()
    print(f"\033[2m{shown}\033[0m" if is_terminal else shown, end="", file=sys.stderr, flush=True)


def _print_samples(parts: Iterator[list[str]], num_samples: int) -> None:
    """Prints the first sample as it comes, and then the others."""
    start = time.monotonic()
    samples = [""] * num_samples
    num_tokens = 0
    if num_samples > 1:
        print(f"=== sample 1 of {num_samples} ===")
    for texts in parts:
        if num_tokens == 0:
            # The first token compiles.
            start = time.monotonic()
        num_tokens += 1
        print(texts[0], end="", flush=True)
        samples = [sample + text for sample, text in zip(samples, texts, strict=True)]
    for index, sample in enumerate(samples[1:], start=2):
        print(f"\n=== sample {index} of {num_samples} ===\n{sample}", end="")
    print(flush=True)
    seconds = max(time.monotonic() - start, 1e-3)
    _say("-" * 40)
    num_timed = max(num_tokens - 2, 0) * num_samples
    _say(f"{num_timed / seconds:,.0f} tokens/s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
