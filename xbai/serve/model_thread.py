"""A thread that owns a model: its life, its work and its end."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from xbai.errors import UserError
from xbai.serve.errors import ServiceError

logger = logging.getLogger(__name__)

Model = TypeVar("Model")
Answer = TypeVar("Answer")


class ModelThread(ABC, Generic[Model]):
    """Loads a model in a thread of its own, which alone touches it from then on.

    Other threads leave work under `_changed`, the lock of all that they share with it, notify it and await futures that
    it is to `_expect`. When loading or the work fails, the thread ends and each of these fails with 503.

    Attributes:
        error: why the model is dead; None while it is not.
        loading_error: why it could not be loaded, where that is the user's to mend.
    """

    def __init__(self, name: str, load: Callable[[], Model]) -> None:
        self._load = load
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._model: Model | None = None
        self._waiting: set[Future[Any]] = set()
        self._stopping = False
        self.error: BaseException | None = None
        self.loading_error: UserError | None = None

    def start(self) -> None:
        """Begin loading; `ready` turns true at the end of it."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the work at hand and close the model; True when it ended within `timeout_s`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self.running

    def fail(self, error: BaseException) -> None:
        """Take the model for dead, also where its thread hangs in it; callable from any thread."""
        self.error = self.error or error
        self._fail_waiting()

    @property
    def running(self) -> bool:
        """The thread has not ended."""
        return self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Loading or serving."""
        return self.running and self.error is None

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
        model = self._model
        if model is None or not self.alive:
            raise ServiceError(503, "the model is not loaded", retry_after_s=5)
        return model

    def check_ready(self) -> None:
        """Raise what `model` would."""
        _ = self.model

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
            while self._await_work():
                self._work(model)
            self._close(model)
        except BaseException as error:
            logger.exception("the %s thread died", self._thread.name)
            self.fail(error)
        finally:
            self._fail_waiting()

    def _expect(self, future: Future[Any]) -> None:
        """Have a future failed with the thread, unless it is answered before; to be called under the lock.

        Raises:
            ServiceError: 503 when the model is not at work.
        """
        self.check_ready()
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)

    def _answer(self, future: Future[Answer], answer: Answer | ServiceError) -> None:
        """Give what a future waits for, unless it was cancelled, or has failed."""
        with self._changed:
            if future.done() or not future.set_running_or_notify_cancel():
                return
            if isinstance(answer, ServiceError):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _fail_waiting(self) -> None:
        with self._changed:
            self._model = None
            for future in list(self._waiting):
                self._answer(future, ServiceError(503, "the engine stopped"))

    def _await_work(self) -> bool:
        """Whether there is some; False once the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._has_work())
            return not self._stopping

    @abstractmethod
    def _has_work(self) -> bool:
        """Whether anything is to be done; asked under the lock."""

    @abstractmethod
    def _work(self, model: Model) -> None:
        """Advance the work at hand by one batch."""

    def _watch(self, model: Model) -> None:
        """Call `fail` when a process that the model needs dies."""

    def _close(self, model: Model) -> None:
        """Release the model; what still waits is failed afterwards."""
