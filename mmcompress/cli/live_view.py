"""What a terminal shows of the stage that is under way: a bar, its times, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BAR_WIDTH = 28
"""Columns of the bar."""

MIN_SHARE_FOR_FORECAST = 0.05
"""Share of a stage that must be done before the rest of it is told by its pace."""

FORECAST_STAGE = "time"
"""The stage whose messages say how long the run will take; they stay in view."""

REFRESHES_PER_SECOND = 4
"""Times a second at which the terminal is drawn again."""


@dataclass(frozen=True, kw_only=True)
class LiveState:
    """The stage that is under way."""

    stage: str
    """Its name."""
    message: str
    """What it does."""
    share: float | None
    """Share that is done, 0 .. 1; None where it is not known."""
    stage_seconds: float
    """Seconds that the stage has taken."""
    run_seconds: float
    """Seconds that the command has taken."""
    forecast: str
    """What the run last said of the time it will take; empty before it said anything."""


class LiveView:
    """Draws the stage that is under way at the lower edge of a terminal.

    It asks for the state by itself, so that times go on where a stage is silent.
    """

    def __init__(self, console: Console, describe_state: Callable[[], LiveState]):
        """Make a view; nothing is drawn before it is started.

        Args:
            console: The terminal.
            describe_state: Returns the state of the moment.
        """
        self._live = Live(
            console=console,
            get_renderable=lambda: draw_state(describe_state()),
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
        )

    def start(self) -> None:
        """Draw from now on; a view that draws already goes on."""
        if not self._live.is_started:
            self._live.start()

    def stop(self) -> None:
        """Take the view away; what was printed above it stays."""
        self._live.stop()


def draw_state(state: LiveState) -> RenderableType:
    """Return what is drawn of a state."""
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(f"{state.stage:<12}", style="bold"),
        _draw_bar(state.share),
        Text(_describe_stage_time(state), style="dim"),
    )
    foot = f"{format_duration(state.run_seconds)} since the start"
    if state.forecast:
        foot += f"; {state.forecast}"
    return Group(head, _wrap(state.message), _wrap(foot, style="dim"))


def _wrap(text: str, *, style: str = "") -> RenderableType:
    """Return a text that is broken between words, every line of it indented."""
    return Padding(Text(text, style=style, no_wrap=False, overflow="fold"), (0, 0, 0, 2))


def _draw_bar(share: float | None) -> ProgressBar:
    """Return the bar of a share; a moving one where the share is not known."""
    if share is None:
        return ProgressBar(width=BAR_WIDTH, pulse=True)
    return ProgressBar(total=1.0, completed=share, width=BAR_WIDTH)


def _describe_stage_time(state: LiveState) -> str:
    """Return how long a stage has taken, and how long its rest will take at this pace."""
    passed = format_duration(state.stage_seconds)
    if state.share is None:
        return f"{passed} passed"
    text = f"{state.share:4.0%}, {passed} passed"
    if state.share >= MIN_SHARE_FOR_FORECAST:
        left_seconds = state.stage_seconds * (1 - state.share) / state.share
        text += f", {format_duration(left_seconds)} left"
    return text


def format_duration(seconds: float) -> str:
    """Return a duration as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
