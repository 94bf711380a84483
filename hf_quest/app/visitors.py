"""Whose turn it is: the model runs for one visitor at a time, the others wait in a row that nobody can clog."""

import contextlib
import threading
import time

MAX_WAITING = 20  # visitors
LEASE = 15.0  # seconds after which a run that nobody asks to go on is dropped


class Full(Exception):
    """Why a run cannot wait, in one line."""


class Entry:
    """One run, which waits or has the model."""

    def __init__(self, session):
        self.session = session
        self.stopped = threading.Event()
        self.idle_since = None  # while it waits for the page to ask for more
        self.steps = None

    def is_forgotten(self, now):
        return self.idle_since is not None and now - self.idle_since > LEASE


class Visitors:
    """The entries in their order. The first one has the model."""

    def __init__(self):
        self.lock = threading.Lock()
        self.entries = []

    def enter(self, session):
        with self.lock:
            self.drop_forgotten()
            if any(entry.session == session for entry in self.entries):
                raise Full("A run of this page waits or runs already. Stop it first.")
            if len(self.entries) > MAX_WAITING:
                raise Full(f"{MAX_WAITING} runs wait for the model already. Try again later.")
            self.entries.append(Entry(session))
            return self.entries[-1]

    def ahead(self, entry):
        """How many are before this one."""
        with self.lock:
            self.drop_forgotten()
            return self.entries.index(entry) if entry in self.entries else 0

    def leave(self, entry):
        with self.lock:
            if entry in self.entries:
                self.entries.remove(entry)

    def stop(self, session):
        """Stop what this session runs, or give up its wait."""
        with self.lock:
            for entry in self.entries:
                if entry.session == session:
                    entry.stopped.set()

    def drop_forgotten(self):
        """Drop entries whose page went away without a word, and free what they hold."""
        now = time.monotonic()
        for entry in [each for each in self.entries if each.is_forgotten(now)]:
            self.entries.remove(entry)
            entry.stopped.set()
            with contextlib.suppress(ValueError):  # it was asked to go on at this moment, and sees that it is stopped
                entry.steps.close()

    def steps(self, entry, steps, is_heard=lambda: True):
        """Yield `steps`, and leave when they end, are dropped, or nobody hears them."""
        entry.steps = steps
        try:
            for step in steps:
                entry.idle_since = time.monotonic()
                yield step
                entry.idle_since = None
                if not is_heard():
                    return
        finally:
            steps.close()
            self.leave(entry)
