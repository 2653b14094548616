"""Runs a command as a child process, and tells how to go on when the process dies.

When a Ray cluster loses its head, Ray's C++ ends the process of the driver: no Python in it can say
a word. So a command that uses Ray is the child of one that does not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType

import yaml

from mmcompress.cli.program_name import make_resume_line

WATCHED_COMMANDS = ("run", "compare", "ablate")
"""Commands that search, and so may use Ray."""

PIPES_VARIABLE = "MMCOMPRESS_WATCHED"
"""Environment variable of the child: the ends of two pipes, `READ,WRITE`."""

ENDED = "ended "
"""What a child writes when it ends by itself, before its exit code."""

INTERRUPTED_EXIT_CODE = 130
"""Exit code after Ctrl-C: 128 and the number of the signal, as shells have it."""

AT_ONCE = "interrupted at once"
"""How the message begins that a second Ctrl-C tells."""

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that are meant for the command. The child has a process group of its own."""

DIED_EXIT_CODE = 1
"""Exit code when the child died."""


def is_watched(arguments: Sequence[str]) -> bool:
    """Return whether a command line is run as a child: whether its trials run on Ray.

    What can't be read counts as no: the command itself says what is wrong.
    """
    if not arguments or arguments[0] not in WATCHED_COMMANDS or PIPES_VARIABLE in os.environ:
        return False
    words: list[str] = []
    for argument in arguments:
        words += argument.split("=", 1)
    for word, following in pairwise(words):
        if word == "--workers" and following == "0":
            return False
        if word == "search.executor":
            return following == "ray"
    for argument in arguments[1:]:
        if argument.endswith((".yaml", ".yml")):
            return _read_executor(Path(argument)) == "ray"
    return False


def _read_executor(spec: Path) -> str:
    """Return the executor of a spec; empty where the file can't be read."""
    try:
        data = yaml.safe_load(spec.read_text(encoding="utf-8"))
        search = data.get("search") or {}
        return str(search.get("executor", "ray"))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return ""


def run_watched(arguments: Sequence[str], *, flags: Sequence[str] = ()) -> int:
    """Run a command as a child, and wait for it.

    Args:
        arguments: The command line, without the name of the program.
        flags: Flags of the program itself, which stand ahead of it.

    Returns:
        The exit code of the child; `DIED_EXIT_CODE` when it died. A library that crashes after the
        child has ended changes nothing.
    """
    child_lives = os.pipe()
    parent_lives = os.pipe()
    # The child learns from one pipe that this process is gone. By the other it tells that it ended.
    environment = {**os.environ, PIPES_VARIABLE: f"{parent_lives[0]},{child_lives[1]}"}
    child = subprocess.Popen(
        [sys.executable, "-m", "mmcompress.cli", *flags, *arguments],
        env=environment,
        pass_fds=(parent_lives[0], child_lives[1]),
        process_group=0,
    )
    os.close(parent_lives[0])
    os.close(child_lives[1])
    forwarder = SignalForwarder(child)
    with forwarder.forward_all():
        code = child.wait()
    with os.fdopen(child_lives[0], "rb") as pipe:
        told = pipe.read().decode()
    os.close(parent_lives[1])
    if told.startswith(ENDED):
        return int(told.removeprefix(ENDED))
    # What it had started is of no use without it. Ray's own processes would live on for minutes.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    if forwarder.interruptions > 1:
        line = make_resume_line(arguments)
        print(f"{AT_ONCE}; go on with: {line}", file=sys.stderr, flush=True)
        return INTERRUPTED_EXIT_CODE
    print(
        f"the process of the run died ({_describe_death(code)}); nothing that was finished is lost;"
        f" go on with: {make_resume_line(arguments)}",
        file=sys.stderr,
        flush=True,
    )
    return DIED_EXIT_CODE


class SignalForwarder:
    """Sends signals on to a child while it runs. The second Ctrl-C ends the child at once."""

    def __init__(self, child: subprocess.Popen[bytes]):
        self.child = child
        self.interruptions = 0
        """How often Ctrl-C was pressed."""

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Send one signal on."""
        if number == signal.SIGINT:
            self.interruptions += 1
        if self.interruptions > 1:
            # Processes of Ray that the child has started end with it.
            with suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            return
        self.child.send_signal(number)

    @contextmanager
    def forward_all(self) -> Iterator[None]:
        """Send every signal on inside the context."""
        handlers = {number: signal.signal(number, self._forward) for number in FORWARDED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _describe_death(code: int) -> str:
    """Return how a process ended, in words."""
    if code < 0:
        return f"signal {-code}, {signal.strsignal(-code)}"
    return f"exit code {code}, without a word: its Ray cluster is gone, perhaps"


@contextmanager
def tell_watcher() -> Iterator[None]:
    """Tell the process that watches this one when the block ends; end when that one is gone.

    Without such a process, nothing happens.
    """
    pipes = os.environ.pop(PIPES_VARIABLE, "")
    if not pipes:
        yield
        return
    parent_lives, child_lives = map(int, pipes.split(","))
    threading.Thread(target=_end_with_parent, args=(parent_lives,), daemon=True).start()
    exit_code = DIED_EXIT_CODE
    try:
        yield
        exit_code = 0
    except SystemExit as end:
        exit_code = _read_exit_code(end)
        raise
    finally:
        # The process that watches may be gone: nobody reads it then.
        with suppress(BrokenPipeError):
            os.write(child_lives, f"{ENDED}{exit_code}".encode())


def _read_exit_code(end: SystemExit) -> int:
    """Return the exit code of a process that ends so. A message in its place tells an error."""
    if end.code is None:
        return 0
    return end.code if isinstance(end.code, int) else DIED_EXIT_CODE


def _end_with_parent(parent_lives: int) -> None:
    """End this process as SIGTERM does when its parent is gone: nobody could stop it any more."""
    if os.read(parent_lives, 1) == b"":
        os.kill(os.getpid(), signal.SIGTERM)
