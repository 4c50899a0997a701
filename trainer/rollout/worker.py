"""The thread that decodes: requests join the running batch of their model at any token, and leave when done.

::

    event loop                                     worker thread
      submit ──▶ waiting (bounded, else Overloaded) ──▶ admit: up to ``rows`` answers run at once
      cancel ──▶ flag, read between two tokens ───────▶ leave
      job.news ◀── one call_soon_threadsafe a step ──── step: one token for each running answer, model by model

The event loop never waits for the worker; the worker sleeps where nothing waits or runs, and ``submit`` wakes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from everloop.errors import Overloaded, ServingError

from trainer.rollout.residents import Resident
from trainer.rollout.running import Answer, Running

logger = logging.getLogger(__name__)


class Sampled(NamedTuple):
    """A token of one answer of a job. ``finish`` is None until the last."""

    index: int
    token: int
    logprob: float
    raw_logprob: float
    alternatives: list[tuple[int, float]]
    finish: str | None


News = Sampled | ServingError


@dataclass(eq=False)
class Job:
    """One request in the worker's hands. ``news`` gets every token if ``each_token``, else the last of each answer."""

    resident: Resident
    answers: list[Answer]
    each_token: bool
    loop: asyncio.AbstractEventLoop
    news: asyncio.Queue[News] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    ended: Callable[[], None] = lambda: None


@dataclass
class Counts:
    """What the worker has done, for metrics."""

    waiting: int = 0
    running: int = 0
    steps: int = 0
    sampled_tokens: int = 0
    prompt_tokens: int = 0
    requests: int = 0
    refused: int = 0
    cancelled: int = 0
    failed: int = 0
    busy_seconds: float = 0.0


class Worker:
    """``rows`` answers run at once, ``queue`` requests may wait; at most ``prefill`` prompt tokens join at a step.

    ``tokens`` bounds memory: rows times the longest that any may become. (SmolLM2 keeps 46 kB a token.)
    """

    def __init__(self, rows: int, queue: int, *, prefill: int = 4096, tokens: int = 65_536, threads: int = 0) -> None:
        self.rows = rows
        self.tokens = tokens
        self.counts = Counts()
        self._queue = queue
        self.prefill = prefill
        self._threads = threads
        self._waiting: deque[Job] = deque()
        self._jobs: dict[int, tuple[Job, int]] = {}  # by id of a running answer: its job, its index
        self._running: dict[int, Running] = {}  # by id of the module
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Raises Overloaded where the queue is full, ServingError where the engine is closed."""
        with self._wake:
            if self._closed or not self.alive:
                raise ServingError("the engine is closed", status=503, code="engine_unavailable")
            if len(self._waiting) >= self._queue:
                self.counts.refused += 1
                raise Overloaded(f"{self._queue} requests wait already: try again soon, or raise serving.queue")
            self._waiting.append(job)
            self.counts.waiting = len(self._waiting)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Give up its place in the queue, or stop its answers before their next token. It is told nothing more."""
        with self._wake:
            job.cancelled = True
            if job not in self._waiting:
                self._wake.notify()
                return
            self._waiting.remove(job)
            self.counts.waiting = len(self._waiting)
            self.counts.cancelled += 1
        job.ended()

    def close(self) -> None:
        """End the thread; what runs or waits fails with 503. Blocks until it has ended."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        while self._wait():
            began = time.monotonic()
            self._drop_cancelled()
            self._admit()
            for key, running in list(self._running.items()):
                self._step(key, running)
            self.counts.running = len(self._jobs)
            self.counts.busy_seconds += time.monotonic() - began
        everyone = [*self._waiting, *{id(job): job for job, _ in self._jobs.values()}.values()]
        for job in everyone:
            self._end(job, ServingError("the engine was closed", status=503, code="engine_unavailable"))

    def _wait(self) -> bool:
        """Until there is something to do. False: closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._waiting or self._jobs)
            return not self._closed

    def _drop_cancelled(self) -> None:
        running = {id(job): job for job, _ in self._jobs.values() if job.cancelled}
        for job in running.values():
            self._leave(job)
            with self._wake:
                self.counts.cancelled += 1
            self._end(job, None)

    def _leave(self, job: Job) -> None:
        key = id(job.resident.module)
        self._running[key].leave(job.answers)
        if not len(self._running[key]):
            del self._running[key]

    def _admit(self) -> None:
        """Take in what waits, in order, as far as there is room; always one if none runs."""
        taken: dict[int, list[Job]] = {}
        room = _Room(self, [answer for job, index in self._jobs.values() for answer in (job.answers[index],)])
        with self._wake:
            while self._waiting and room.take(self._waiting[0].answers):
                job = self._waiting.popleft()
                taken.setdefault(id(job.resident.module), []).append(job)
            self.counts.waiting = len(self._waiting)
        for key, jobs in taken.items():
            self._begin(key, jobs)

    def _begin(self, key: int, jobs: list[Job]) -> None:
        resident = jobs[0].resident
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = Running(resident.module, resident.policy.pad_id)
        for job in jobs:
            self.counts.requests += 1
            self.counts.prompt_tokens += len(job.answers[0].prompt)
            self._jobs |= {id(answer): (job, index) for index, answer in enumerate(job.answers)}
        try:
            running.admit([answer for job in jobs for answer in job.answers])
        except Exception as error:
            self._fail(key, error)

    def _step(self, key: int, running: Running) -> None:
        try:
            took = running.step()
        except Exception as error:
            self._fail(key, error)
            return
        self.counts.steps += 1
        self.counts.sampled_tokens += len(took)
        told: dict[Job, list[News]] = {}
        for answer in took:
            job, index = self._jobs[id(answer)]
            if job.each_token or answer.finish is not None:
                told.setdefault(job, []).append(_sampled(index, answer))
            if answer.finish is not None:
                self.counts.failed += answer.finish == "broken"
                del self._jobs[id(answer)]
        for job in told:
            if all(answer.finish is not None for answer in job.answers):
                job.ended()
        self._tell(told)
        if not len(running):
            self._running.pop(key, None)

    def _fail(self, key: int, error: Exception) -> None:
        """What one model's batch could not do fails for those in it alone."""
        logger.error("decoding failed", exc_info=error)
        self._running.pop(key, None)
        jobs = {id(job): job for job, _ in self._jobs.values() if id(job.resident.module) == key}
        for job in jobs.values():
            self.counts.failed += 1
            self._end(job, ServingError(f"the engine failed: {error}", status=500, code="engine_error"))

    def _end(self, job: Job, error: ServingError | None) -> None:
        for answer in job.answers:
            self._jobs.pop(id(answer), None)
        job.ended()
        if error is not None:
            self._tell({job: [error]})

    def _tell(self, told: dict[Job, list[News]]) -> None:
        """One wake-up a step and event loop, however many answers took a token."""
        for loop in {job.loop for job in told}:
            its = [(job, news) for job, news in told.items() if job.loop is loop]
            with contextlib.suppress(RuntimeError):  # that loop has ended, and with it everybody who listened
                loop.call_soon_threadsafe(_deliver, its)


class _Room:
    """What of the worker's room is left while requests are admitted."""

    def __init__(self, worker: Worker, running: list[Answer]) -> None:
        self._worker = worker
        self._rows = len(running)
        self._longest = max((answer.longest for answer in running), default=0)
        self._prompts = 0

    def take(self, answers: list[Answer]) -> bool:
        """Whether these answers to one prompt still fit; if so their room is taken. Where nothing runs they do."""
        rows = self._rows + len(answers)
        longest = max(self._longest, answers[0].longest)
        prompts = self._prompts + len(answers[0].prompt)
        worker = self._worker
        full = rows > worker.rows or rows * longest > worker.tokens or (self._prompts and prompts > worker.prefill)
        if self._rows and full:
            return False
        self._rows, self._longest, self._prompts = rows, longest, prompts
        return True


def _sampled(index: int, answer: Answer) -> Sampled:
    alternatives = answer.alternatives[-1] if answer.alternatives else []
    return Sampled(index, answer.ids[-1], answer.logprobs[-1], answer.raw_logprobs[-1], alternatives, answer.finish)


def _deliver(told: list[tuple[Job, list[News]]]) -> None:
    for job, news in told:
        for one in news:
            job.news.put_nowait(one)
