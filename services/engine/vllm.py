"""``serving.url = "vllm"``: a vLLM OpenAI server as a child of the engine's process, which looks after it.

::

    everloop up ─▶ engine (this process: /healthz /readyz /metrics /status on services.engine_port)
                      │ starts; waits for /health; has it answer once
                      ▼
    gateway ───▶ vLLM's API server on serving.port (services/engine/door.py before its routes) ─▶ its engine core
    releaser ──▶

Nobody stands between the gateway and vLLM. Where vLLM ends by itself this process ends too, and whoever started it
starts both anew; adapters come back by the releaser, which sees that they are missing. All of them are one process
group, so none is left behind.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everloop.config import Config
from everloop.home import Home
from prometheus_client import REGISTRY

from services.engine.metrics import VllmCollector
from services.service import Service
from services.supervisor import base_url, die_with_parent
from trainer.policy import servable
from trainer.policy.servable import ATTENTION, Build, Servable

logger = logging.getLogger("services.engine")
POLL = 0.5  # seconds between looks at a vLLM that starts
WARM_UP = {"prompt": "Hello", "max_tokens": 2, "return_token_ids": True, "logprobs": 0}
WARM_UP_LIMIT = 600.0  # seconds: on a busy machine the first answer takes long
KV_CACHE_GIB = "1"  # of a CPU build, where the environment says nothing
LATENT = "kv_lora_rank"  # key of config.json where attention is latent: DeepSeek's and Kimi K2's


class Keeper:
    """Starts vLLM and waits for its end. ``trouble`` says why it should not be asked yet; None: it may."""

    def __init__(self, config: Config, base: str, command: list[str], environment: Mapping[str, str]) -> None:
        self.url = base_url(config.serving.host, config.serving.port)
        self.trouble: str | None = "vLLM is starting"
        self._base = base
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            preexec_fn=die_with_parent,  # made before this process has a second thread
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, service: Service) -> None:
        """Until the service stops. Raises RuntimeError where vLLM ended by itself."""
        try:
            while not service.stop.is_set() and self._process.poll() is None and not self._healthy():
                service.stop.wait(POLL)
            if not service.stop.is_set() and self._process.poll() is None:
                self._warm_up()
            while not service.stop.wait(POLL):
                if self._process.poll() is not None:
                    raise RuntimeError(f"vLLM ended with status {self._process.returncode}; its last lines are above")
        finally:
            self._end(0.6 * service.config.services.drain)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, ValueError):
            return False

    def _warm_up(self) -> None:
        """The first answer pays for what is done once."""
        body = json.dumps({"model": self._base, **WARM_UP}).encode()
        asked = urllib.request.Request(
            f"{self.url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=WARM_UP_LIMIT) as answer:
            answer.read()
        self.trouble = None
        logger.info("vLLM answers on %s, after %.0f s", self.url, time.monotonic() - self._began)

    def _end(self, limit: float) -> None:
        """Nothing is under way any more when the engine is stopped: the gateway has ended before."""
        self.trouble = "vLLM is stopping"
        self._process.terminate()
        try:
            self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(config: Config) -> int:
    """The engine as a service, until it is stopped. Raises ConfigError where vLLM or the base cannot be had."""
    from trainer.policy import base

    tenant, policy = config.policies()[0]
    name = config.policy(tenant, policy).base
    folder = base.folder(name, config.cache.absolute())
    build, can = servable.installed(), servable.of(config.serving, lambda: folder)
    template = _template(folder, Home(config.home))
    service = Service("engine", config, config.services.engine_port)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += arguments(config, name, folder, template, build, can)
    logger.info("starting vLLM %s: %s", build.version, " ".join(command[1:]))
    keeper = Keeper(config, name, command, environment(build, folder, can))
    service.loop("vllm", lambda: keeper.run(service))
    service.ready("vllm", lambda: keeper.trouble)
    service.describe("engine", lambda: _status(keeper, name, build, can))
    REGISTRY.register(VllmCollector(keeper.url))
    return service.run()


def _status(keeper: Keeper, base: str, build: Build, can: Servable) -> dict[str, Any]:
    return {
        "url": keeper.url,
        "pid": keeper.pid,
        "vllm": build.version,
        "build": "cpu" if build.cpu else "accelerator",
        "base": base,
        "adapter_targets": can.groups,
    }


def _template(folder: Path, home: Home) -> Path | None:
    """A file with the chat template to serve the base with; None: it has none."""
    from transformers import AutoTokenizer

    from trainer.policy import template

    text = template.whole(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    if text is None:
        return None
    path = home.folder("state") / "vllm-chat-template.jinja"
    path.write_text(text, encoding="utf-8")
    return path


def arguments(config: Config, name: str, folder: Path, template: Path | None, build: Build, can: Servable) -> list[str]:
    """vLLM's command line. What the configuration names comes last, so that it holds."""
    its = config.serving
    said = [*model_arguments(config, folder, build, can), "--served-model-name", name]
    said += ["--host", its.host, "--port", str(its.port), "--disable-uvicorn-access-log"]
    said += ["--middleware", "services.engine.door.Door"]
    if template is not None:
        said += ["--chat-template", str(template), "--chat-template-content-format", "openai"]
        said += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    return [*said, *its.vllm.arguments]


def model_arguments(config: Config, folder: Path, build: Build, can: Servable) -> list[str]:
    """What of the command line is about the model and how it is computed."""
    its = config.serving
    said = [
        *("--model", str(folder), "--dtype", its.vllm.dtype, "--max-num-seqs", str(its.max_batch)),
        *("--enable-lora", "--max-lora-rank", str(its.vllm.max_lora_rank), "--generation-config", "vllm"),
        *("--max-loras", str(its.resident_adapters), "--max-cpu-loras", str(its.resident_adapters)),
        *("--logprobs-mode", "processed_logprobs"),  # of the distribution that was sampled from: what PPO needs
    ]
    architecture = json.loads((folder / "config.json").read_text())
    said += _overrides(architecture)
    if build.cpu:
        said += ["--enforce-eager", *_on_cpu(architecture, can)]
    return said


def _overrides(architecture: Mapping[str, Any]) -> list[str]:
    """What vLLM reads of DeepSeek's configuration and transformers does not write."""
    if architecture.get("model_type") != "deepseek_v3":
        return []
    missing = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    missing = {key: value for key, value in missing.items() if key not in architecture}
    return ["--hf-overrides", json.dumps(missing)] if missing else []


def _on_cpu(architecture: Mapping[str, Any], can: Servable) -> list[str]:
    said = []
    if LATENT in architecture:
        # The CPU's own kernel turns queries of latent attention, which come with an axis for their heads, by wrong
        # positions: answers are fluent, and their log-probabilities wrong by up to 4. The one in torch is right.
        said += ["--compilation-config", json.dumps({"custom_ops": ["all", "-rotary_embedding"]})]
    if can.groups == ("attention",):
        said += ["--lora-target-modules", *(leaf for leaf in ATTENTION if _has(architecture, leaf))]
    return said


def _has(architecture: Mapping[str, Any], leaf: str) -> bool:
    latent = leaf in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
    return leaf == "o_proj" or latent == (LATENT in architecture)


def environment(build: Build, folder: Path, can: Servable) -> dict[str, str]:
    """Variables of vLLM's process; what a person has set for a CPU build stays."""
    said = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "EVERLOOP_SERVING__TARGETS": json.dumps(can.groups),  # for the door
    }
    if build.cpu:
        said["VLLM_MLA_DISABLE"] = "1"  # latent attention has no backend on the CPU
        said["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", KV_CACHE_GIB)
    return said
