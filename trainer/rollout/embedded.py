"""The embedded engine: the serving port on torch, in this process.

One worker thread decodes (see :mod:`trainer.rollout.worker`); this side reads requests, turns tokens into answers,
and keeps adapters resident. All methods belong to one event loop or several; none blocks it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from everloop.config import ServingConfig
from everloop.errors import ServingError
from everloop.serving.base import Route

from trainer.policy.base import Policy
from trainer.rollout import request as requests
from trainer.rollout.reply import Reply
from trainer.rollout.request import Request
from trainer.rollout.residents import Resident, Residents
from trainer.rollout.running import Answer, check_decodable
from trainer.rollout.words import Words
from trainer.rollout.worker import Counts, Job, News, Sampled, Worker

WARM_UP = "Hello"


class EmbeddedServing:
    """Implements ``everloop.serving.base.Serving`` for these policies' bases and the adapters on them."""

    def __init__(self, policies: Sequence[Policy], config: ServingConfig) -> None:
        for policy in policies:
            check_decodable(policy.model.config)
        self.residents = Residents(policies, config.resident_adapters)
        self._worker = Worker(config.max_batch, config.queue, threads=config.threads)

    @property
    def counts(self) -> Counts:
        return self._worker.counts

    async def warm_up(self) -> None:
        """One short answer of each base, so that the first user does not pay for what torch does once."""
        for resident in self.residents.bases:
            await self.complete("completions", {"model": resident.name, "prompt": WARM_UP, "max_tokens": 2})

    async def complete(self, route: Route, body: dict[str, Any]) -> dict[str, Any]:
        job, request = self._ask(route, body, each_token=False)
        try:
            left = len(job.answers)
            while left:
                left -= _finished(await job.news.get())
        finally:
            self._stop(job)
        return Reply(request, job.resident.policy).whole(job.answers)

    async def stream(self, route: Route, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        job, request = self._ask(route, body, each_token=True)
        reply = Reply(request, job.resident.policy)
        try:
            yield reply.opening()
            left = len(job.answers)
            while left:
                news = [await job.news.get()]
                while not job.news.empty():
                    news.append(job.news.get_nowait())
                left -= sum(_finished(one) for one in news)
                yield reply.chunk([one for one in news if isinstance(one, Sampled)])
            if request.usage_chunk:
                yield reply.closing(job.answers)
        finally:
            self._stop(job)

    async def load(self, name: str, folder: Path) -> None:
        await asyncio.to_thread(self.residents.load, name, folder)

    async def unload(self, name: str) -> None:
        self.residents.unload(name)

    async def adapters(self) -> frozenset[str]:
        return frozenset(self.residents.adapters())

    @property
    def alive(self) -> bool:
        """Whether the decoding thread lives."""
        return self._worker.alive

    async def healthy(self) -> bool:
        return self.alive

    async def close(self) -> None:
        await asyncio.to_thread(self._worker.close)

    def _ask(self, route: Route, body: dict[str, Any], *, each_token: bool) -> tuple[Job, Request]:
        """Hand the request to the worker. Raises ServingError: unknown model, bad request, full queue."""
        resident = self.residents.lease(requests.model_of(body))
        try:
            request = requests.read(route, body, resident.policy)
            job = self._job(request, resident, each_token)
            self._worker.submit(job)
        except BaseException:
            self.residents.release(resident)
            raise
        return job, request

    def _job(self, request: Request, resident: Resident, each_token: bool) -> Job:
        answers = request.answers(resident.policy)
        self._check_size(answers)
        if request.sampling.stop:
            for answer in answers:
                words = Words(resident.policy.decode, request.sampling.stop)
                answer.stopped = lambda token, words=words: words.take([token])  # type: ignore[misc]
        job = Job(resident, answers, each_token, asyncio.get_running_loop())
        job.ended = lambda: self.residents.release(resident)
        return job

    def _check_size(self, answers: list[Answer]) -> None:
        rows, tokens = len(answers), len(answers) * answers[0].longest
        if rows > self._worker.rows or tokens > self._worker.tokens:
            raise ServingError(
                f"this engine decodes at most {self._worker.rows} answers of together {self._worker.tokens} tokens at "
                f"once; n, prompt and max_tokens ask for {rows} of together {tokens}",
                status=400,
                code="invalid_value",
            )

    def _stop(self, job: Job) -> None:
        """Where the answer is not whole, nobody waits for it any more."""
        if any(answer.finish is None for answer in job.answers):
            self._worker.cancel(job)


def _finished(news: News) -> int:
    """1 for the last token of an answer. Raises what went wrong."""
    if isinstance(news, ServingError):
        raise news
    if news.finish == "broken":
        raise ServingError("the model's output is not finite: its weights are broken", status=500, code="not_finite")
    return int(news.finish is not None)
