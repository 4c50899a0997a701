"""Answers in vLLM's dialect of OpenAI's form: whole ones and chunks, for both routes.

Over OpenAI's own form it has ``prompt_token_ids`` (at the top, in a stream in the first chunk) and ``token_ids`` (in
each choice) where ``return_token_ids`` was asked for. The end token is among the ids and the log-probabilities. One
addition is this engine's own: beside the ids, ``raw_logprobs``, the log-probabilities before temperature and
truncation, which vLLM gives instead of the processed ones or not at all.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from trainer.policy.base import Policy
from trainer.rollout.request import Request
from trainer.rollout.running import Answer
from trainer.rollout.words import Words
from trainer.rollout.worker import Sampled


class Reply:
    """Builds what one request gets. Used by the event loop alone."""

    def __init__(self, request: Request, policy: Policy) -> None:
        self._request = request
        self._policy = policy
        self._chat = request.route == "chat/completions"
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._words = [Words(policy.decode, request.sampling.stop, request.tools) for _ in range(request.n)]
        self._called = [0] * request.n

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        body = {**self._top(chunk=False), "choices": choices, "usage": self.usage(answers)}
        if self._request.token_ids:
            body["prompt_token_ids"] = list(self._request.prompt)
        return body

    def opening(self) -> dict[str, Any]:
        """The first chunk: the roles, and the prompt's ids."""
        choices = [self._chunk_choice(i, {"role": "assistant", "content": ""}, "", []) for i in range(self._request.n)]
        chunk = {**self._top(chunk=True), "choices": choices}
        if self._request.token_ids:
            chunk["prompt_token_ids"] = list(self._request.prompt)
        return chunk

    def chunk(self, news: Sequence[Sampled]) -> dict[str, Any]:
        """What has come since the last chunk, of one or more choices."""
        by_choice: dict[int, list[Sampled]] = {}
        for one in news:
            by_choice.setdefault(one.index, []).append(one)
        return {**self._top(chunk=True), "choices": [self._grown(i, its) for i, its in by_choice.items()]}

    def closing(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk with the usage, which has no choices."""
        return {**self._top(chunk=True), "choices": [], "usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        prompt, completion = len(self._request.prompt), sum(len(answer.ids) for answer in answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _top(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}

    def _whole_choice(self, index: int, answer: Answer) -> dict[str, Any]:
        words = self._words[index]
        words.take(answer.ids)
        words.end()
        text, calls = self._finish(words)
        choice: dict[str, Any] = {"index": index, "finish_reason": "tool_calls" if calls else answer.finish}
        alternatives = answer.alternatives or [[]] * len(answer.ids)
        choice["logprobs"] = self._logprobs(answer.ids, answer.logprobs, alternatives)
        if not self._chat:
            choice["text"] = text
        else:
            message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text}
            choice["message"] = message | ({"tool_calls": calls} if calls else {})
        if self._request.token_ids:
            choice["token_ids"] = list(answer.ids)
            choice["raw_logprobs"] = list(answer.raw_logprobs)
        return choice

    def _finish(self, words: Words) -> tuple[str, list[dict[str, Any]]]:
        text, calls = words.finish()
        return text, calls[: self._request.most_calls]

    def _grown(self, index: int, news: list[Sampled]) -> dict[str, Any]:
        words, finish = self._words[index], news[-1].finish
        words.take([one.token for one in news])
        text = words.show()
        delta: dict[str, Any] = {}
        if finish is not None:
            words.end()
            rest, calls = self._finish(words)
            text += rest
            if calls:
                finish = "tool_calls"
                delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
        if text:
            delta["content"] = text
        return self._chunk_choice(index, delta, text, news, finish)

    def _chunk_choice(
        self, index: int, delta: dict[str, Any], text: str, news: list[Sampled], finish: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": finish}
        choice |= {"delta": delta} if self._chat else {"text": text}
        ids = [one.token for one in news]
        choice["logprobs"] = self._logprobs(ids, [one.logprob for one in news], [one.alternatives for one in news])
        if self._request.token_ids:
            choice["token_ids"] = ids
            choice["raw_logprobs"] = [one.raw_logprob for one in news]
        return choice

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[float], alternatives: Sequence[list[tuple[int, float]]]
    ) -> dict[str, Any] | None:
        if not self._request.logprobs or not ids:
            return None
        if self._chat:
            rows = zip(ids, logprobs, alternatives, strict=True)
            content = [
                {**self._token(i, p), "top_logprobs": [self._token(*one) for one in best]} for i, p, best in rows
            ]
            return {"content": content}
        tokens = [self._spelled(i) for i in ids]
        best = [{self._spelled(i): p for i, p in row} for row in alternatives]
        offsets = [sum(len(token) for token in tokens[:i]) for i in range(len(tokens))]
        return {"tokens": tokens, "token_logprobs": list(logprobs), "top_logprobs": best, "text_offset": offsets}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._spelled(token), "logprob": logprob, "bytes": self._policy.bytes_of(token)}

    def _spelled(self, token: int) -> str:
        """One token as text, control tokens by their name."""
        return str(self._policy.tokenizer.decode([token]))
