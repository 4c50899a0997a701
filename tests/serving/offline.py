"""``python -m tests.serving.offline <job.json> <out.json>``: vLLM in this process, with the arguments that serve.

A job names a base's folder, the type of its numbers, adapters and prompts; out come, for the base and each adapter,
and for each prompt, the ids that were sampled and their log-probabilities.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from everloop.config import Config

from services.engine import vllm as served
from trainer.policy import servable


def main(job: dict[str, Any]) -> list[list[list[Any]]]:
    folder = Path(job["base"])
    config = Config.model_validate({"serving": {"url": "vllm", "vllm": {"dtype": job["dtype"]}}})
    build, can = servable.installed(), servable.of(config.serving, lambda: folder)
    os.environ.update(served.environment(build, folder, can))
    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = EngineArgs.from_cli_args(parser.parse_args(served.model_arguments(config, folder, build, can)))
    engine = LLM.from_engine_args(arguments)
    sampling = [
        SamplingParams(temperature=1.0, max_tokens=24, seed=at, logprobs=0) for at in range(len(job["prompts"]))
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    said = []
    for at, adapter in enumerate([None, *job["adapters"]]):
        lora = None if adapter is None else LoRARequest(Path(adapter).name, at, adapter)
        answers = engine.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
        said.append([_answer(answer.outputs[0]) for answer in answers])
    return said


def _answer(output: Any) -> list[Any]:
    ids = list(output.token_ids)
    return [ids, [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]]


if __name__ == "__main__":
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
