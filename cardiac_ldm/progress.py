"""Progress where a person sees it: one bar a stage, by tqdm.

Notebooks that papermill runs have nobody before them, and a bar in a cell would be thousands of outputs. So their bars
go to papermill's own standard error, which its kernel inherits. A notebook that somebody has open shows the bar in the
cell, and a script shows it as tqdm does. Where that isn't a terminal but a file or a pipe, a line is written now and
then.
"""

import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TextIO

from tqdm import std

_EVERY = 30.0
"""Seconds between two lines of a log."""
_waiting: list[str] = []
_silent: list[bool] = []


def silence() -> None:
    """Show no bars in this process: one of several that work on parts, of which another shows the whole."""
    _silent.append(True)


@contextmanager
def awaited(name: str) -> Iterator[None]:
    """What is run meanwhile says that this stage comes after it; decorates the functions of stages, too."""
    _waiting.append(name)
    try:
        yield
    finally:
        _waiting.pop()


def tqdm(
    iterable: Iterable[Any] | None = None,
    desc: str | None = None,
    total: int | None = None,
    file: TextIO | None = None,
    **settings: Any,  # noqa: ANN401
) -> "std.tqdm[Any]":
    """A bar with tqdm's `settings`, on the screen of whoever started this, or in the `file` that is given."""
    settings |= {"desc": desc, "total": total} | ({"disable": True} if _silent else {})
    if file:
        return std.tqdm(iterable, file=file, **settings)
    screen, live = _screen()
    after = list(dict.fromkeys(name for name in reversed(_waiting) if name != _waiting[-1]))
    then = f", then {', '.join(after)}" if after else ""
    if live or screen.isatty():
        shown = {"ncols": 100, "mininterval": 0.5} if live else {"dynamic_ncols": True}
        return std.tqdm(iterable, file=screen, bar_format="{l_bar}{bar}{r_bar}" + then, **shown, **settings)
    unit = settings.pop("unit", "step").strip().removesuffix("s")
    settings["unit"] = f" {unit}{'es' if unit.endswith('ch') else 's'}"
    settings["bar_format"] = "{desc}: {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}" + then
    settings |= {"mininterval": _EVERY, "maxinterval": _EVERY, "delay": _EVERY if settings.get("leave") is False else 0}
    return std.tqdm(iterable, file=_Lines(screen), **settings)


class _Lines(io.TextIOBase):
    """Writes what tqdm would draw over the last bar as lines."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._last = file, ""

    def write(self, text: str) -> int:
        line = " ".join(text.split())
        if line and line != self._last:
            print(line, file=self._file, flush=True)
            self._last = line
        return len(text)


def _screen() -> tuple[TextIO, bool]:
    """Where bars go, and whether that is a notebook that somebody has open."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return sys.stderr, False
    if kernel.get_parent().get("content", {}).get("allow_stdin"):  # there's somebody who can be asked
        return sys.stdout, True
    return _inherited(), False


@cache
def _inherited() -> TextIO:
    """The standard error that this kernel was started with, past the stream that ipykernel puts in its place."""
    try:
        return os.fdopen(os.dup(sys.stderr.fileno()), "w")
    except io.UnsupportedOperation:  # where ipykernel leaves the descriptor alone
        return sys.__stderr__ or sys.stderr
