"""The thread between journals and server; it outlasts the server's absence."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from moe_dist.tracking.connection import describe_fault
from moe_dist.tracking.journal import JOURNAL_NAME, NO_PARENT, Journal, load_journal
from moe_dist.tracking.mlflow_store import MlflowStore

logger = logging.getLogger("moe_dist.tracking")

SEND_INTERVAL_S = 2.0
MAX_BACKOFF_S = 60.0
CLOSING_TIME_S = 30.0
CLOSING_POLL_S = 0.5


class Sender:
    """The thread that brings the server up to the journals.

    Args:
        store: the connection.
        chain: the chain's journal, parent of all others.
    """

    def __init__(self, store: MlflowStore, chain: Journal) -> None:
        self.store = store
        self._journals: dict[Path, Journal] = {}
        self._chain = chain
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ends_at: float | None = None
        self._away_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)

    def follow(self, journal: Journal) -> None:
        """Send what this journal gains from now on."""
        directory = journal.directory.absolute()
        with self._lock:
            for other in self._journals.values():
                if other.parent is not None and other.parent.directory.absolute() == directory:
                    other.parent = journal
            self._journals[directory] = journal
        self._wake.set()

    def followed(self, directory: Path) -> Journal | None:
        """Give the one journal that this process may write there; None if there is none."""
        with self._lock:
            return self._journals.get(directory.absolute())

    def start(self) -> None:
        """Send what earlier processes left behind, and go on in the background."""
        for left in self._left_behind():
            self.follow(left)
        self._pass()
        self._thread.start()

    def wake(self) -> None:
        """Send soon."""
        self._wake.set()

    def finish(self) -> None:
        """Send the rest, for a limited time, and say what could not be sent."""
        self._ends_at = time.monotonic() + CLOSING_TIME_S
        self._wake.set()
        deadline = self._ends_at + SEND_INTERVAL_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(CLOSING_POLL_S)
            if self.store.uploading:
                # A model may take minutes; one whose server has gone away raises by itself.
                deadline = max(deadline, time.monotonic() + CLOSING_TIME_S)
        if self._thread.is_alive() or self._away_since is not None:
            with self._lock:
                journals = list(self._journals.values())
            pending = sum(self.store.count_pending(journal) for journal in journals)
            logger.warning(
                "MLflow at %s is still away: %d points wait in the output directory; "
                "the same command sends them when the server is back.",
                self.store.shown_uri,
                pending,
            )

    def _left_behind(self) -> list[Journal]:
        """Load the journals below the chain's that were not sent to their end."""
        home = self._chain.directory.absolute()
        known = {home: self._chain}
        paths = [path.parent for path in home.rglob(JOURNAL_NAME) if path.parent != home]
        for directory in sorted(paths, key=lambda path: len(path.parts)):
            journal = load_journal(directory)
            if journal is None or journal.wanted.parent == NO_PARENT:
                continue  # A search lies below the chain's directory, and is a chain of its own.
            # Journals of earlier versions name no parent: theirs was the chain.
            above = home if not journal.wanted.parent else directory / journal.wanted.parent
            journal.parent = known.get(Path(os.path.normpath(above)))
            if journal.parent is not None:
                known[directory] = journal
        return [left for left in known.values() if left.parent and not left.sent.complete]

    def _work(self) -> None:
        pause_s = SEND_INTERVAL_S
        while True:
            self._wake.wait(pause_s)
            self._wake.clear()
            ends_at = self._ends_at
            whole = self._pass()
            if ends_at is None:
                pause_s = SEND_INTERVAL_S if whole else min(2 * pause_s, MAX_BACKOFF_S)
            elif whole or time.monotonic() + SEND_INTERVAL_S > ends_at:
                return
            else:  # A server that is being started again should get the end of the run too.
                pause_s = SEND_INTERVAL_S

    def _pass(self) -> bool:
        """Bring every journal up to date.

        Returns:
            False if the server is away.
        """
        with self._lock:
            journals = sorted(self._journals.values(), key=lambda journal: journal.depth)
        try:
            for journal in journals:
                if journal.sent.complete:
                    continue
                self.store.sync(journal)
        except Exception as fault:  # Whatever fails here, training goes on.
            if self._away_since is None:
                self._away_since = time.monotonic()
                logger.warning(
                    "MLflow at %s takes nothing now (%s); training goes on, and what it logs is "
                    "sent later.",
                    self.store.shown_uri,
                    describe_fault(fault),
                )
            return False
        if self._away_since is not None:
            away_s = time.monotonic() - self._away_since
            self._away_since = None
            logger.warning("MLflow answers again after %.0f s; nothing was lost.", away_s)
        return True
