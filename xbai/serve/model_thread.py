"""A thread that owns a model: its life, its inbox and its end."""

from __future__ import annotations

import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from xbai.errors import UserError
from xbai.serve.errors import ServiceError

logger = logging.getLogger(__name__)

Model = TypeVar("Model")


class ModelThread(ABC, Generic[Model]):
    """Loads a model in a thread of its own, which alone touches it from then on.

    Other threads put commands into its inbox and await futures. When loading or a command's work fails, the thread
    ends and every waiting future fails with 503.

    Attributes:
        error: why the model is dead; None while it is not.
        loading_error: why it could not be loaded, where that is the user's to mend.
    """

    def __init__(self, name: str, load: Callable[[], Model]) -> None:
        self._load = load
        self._inbox: queue.SimpleQueue[Callable[[Model], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._model: Model | None = None
        self._stopping = False
        self.error: BaseException | None = None
        self.loading_error: UserError | None = None

    def start(self) -> None:
        """Begin loading; `ready` turns true at the end of it."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the work at hand and close the model; True when it ended within `timeout_s`."""
        self._inbox.put(self._stop)
        self._thread.join(timeout_s)
        return not self.running

    def fail(self, error: BaseException) -> None:
        """Take the model for dead, also where its thread hangs in it; callable from any thread."""
        self.error = self.error or error
        self._fail_all(ServiceError(503, "the engine stopped"))

    @property
    def running(self) -> bool:
        """The thread has not ended."""
        return self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Loading or serving."""
        return self.running and self.error is None

    @property
    def loading(self) -> bool:
        """The model is not loaded yet."""
        return self.alive and self._model is None

    @property
    def ready(self) -> bool:
        """The model is loaded and at work."""
        return self.alive and self._model is not None

    @property
    def model(self) -> Model:
        """The loaded model, for its read-only attributes (tokenizer, lengths).

        Raises:
            ServiceError: 503 when it is not loaded.
        """
        if not self.ready:
            raise ServiceError(503, "the model is not loaded", retry_after_s=5)
        return self._model

    def _stop(self, model: Model) -> None:
        self._stopping = True

    def _run(self) -> None:
        try:
            try:
                model = self._load()
            except UserError as error:
                self.loading_error = error
                self.fail(error)
                return
            self._watch(model)
            self._model = model
            while not self._stopping:
                self._take_commands(model)
                self._work(model)
            self._close(model)
        except BaseException as error:
            logger.exception("the %s thread died", self._thread.name)
            self.fail(error)
        finally:
            self._fail_all(ServiceError(503, "the engine stopped"))

    def _take_commands(self, model: Model) -> None:
        block = self._idle(model)
        while True:
            try:
                command = self._inbox.get(block=block)
            except queue.Empty:
                return
            command(model)
            block = False

    @abstractmethod
    def _idle(self, model: Model) -> bool:
        """Whether there is nothing to do until a command comes."""

    @abstractmethod
    def _work(self, model: Model) -> None:
        """Advance the work at hand by one batch."""

    @abstractmethod
    def _fail_all(self, error: ServiceError) -> None:
        """Fail every waiting future."""

    def _watch(self, model: Model) -> None:
        """Call `fail` when a process that the model needs dies."""

    def _close(self, model: Model) -> None:
        """Release the model; what still waits is failed afterwards."""
