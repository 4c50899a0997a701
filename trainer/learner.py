"""The learner: takes a request, trains, and leaves an adapter. Keeps what is slow to load warm between runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from everloop.errors import ConfigError
from everloop.registry import Point

from pipelines.batch import Batch
from reward.encoder import Encoder
from reward.features import Example
from reward.model import Estimate, RewardModel
from trainer import mismatch, synthetic
from trainer import recipe as recipes
from trainer.checkpoint import Checkpoints, Position, Samples
from trainer.engine import Engine
from trainer.engine_torch import EngineSettings, TorchEngine
from trainer.gather import Sources
from trainer.material import Material
from trainer.policy import base
from trainer.policy.base import Policy
from trainer.proxy import proxy
from trainer.recipe import Recipe
from trainer.request import PROGRESS, VALUE_HEAD, Request, Trained, write_json

JUDGED_AT_ONCE = 500  # answers: bounds the features that are held for them


class Training:
    """One run under way, as :func:`trainer.algorithm.train` is given it: checkpoints, material and curves on disk.

    ``samples``: of how many of the newest checkpoints adapter files are kept as well; 0: none.
    """

    def __init__(
        self, engine: Engine, recipe: Recipe, sources: Sources, seed: int, folder: Path, samples: int = 0
    ) -> None:
        self.engine, self.recipe, self.sources, self.seed = engine, recipe, sources, seed
        self.folder = folder
        self.curves: list[Point] = []
        self.position = Position()
        self._checkpoints = Checkpoints(folder / "checkpoints")
        self._samples = Samples(folder, samples) if samples else None

    def resume(self) -> tuple[int, int]:
        self.position, self.curves = self._checkpoints.restore(self.engine)
        return self.position.number, self.position.step

    def material(self, number: int, make: Callable[[], Material]) -> Material:
        path = self.folder / f"round-{number}.parquet"
        if not path.exists():
            self.report({"phase": "rollouts", "round": number})
            make().save(path)
        return Material.load(path)

    def took(self, number: int, step: int, last: bool, metrics: dict[str, float]) -> None:
        taken = self.position.taken + 1
        self.position = Position(number + 1, 0, taken) if last else Position(number, step + 1, taken)
        self.curves += [Point(name, taken, float(value)) for name, value in sorted(metrics.items())]
        if last or taken % self.recipe.checkpoint_every == 0:
            if self._samples is not None:  # first: a checkpoint that a kill leaves has its files
                self._samples.add(self.engine, taken)
            self._checkpoints.save(self.engine, self.position, self.curves)
        self.report({"phase": "steps", "round": number, "step": taken, **metrics})

    def report(self, progress: dict[str, Any]) -> None:
        """What status pages show; not synced, for nothing depends on it."""
        write_json(self.folder / PROGRESS, {**progress, "time": time.time()}, durable=False)


class Learner:
    """Runs requests one after another. Base models and encoders stay loaded between runs."""

    def __init__(self) -> None:
        self._policies: dict[tuple[str, str], Policy] = {}
        self._encoders: dict[str, Encoder] = {}
        self._judges: dict[tuple[str, str], RewardModel] = {}

    def warm(self, name: str, cache: str, encoder: str) -> None:
        """Load what the first run will need."""
        self._policy(name, cache)
        self._encoder(encoder).encode(["warm"])

    def share(self, encoder: Encoder) -> None:
        """Use an encoder that is loaded already, with what it remembers."""
        self._encoders[encoder.name] = encoder

    def estimate(self, snapshot: str, encoder: str, examples: Sequence[Example], threads: int) -> list[Estimate]:
        """What the reward model of a snapshot's folder says of each answer; a run's own judge says the same."""
        torch.set_num_threads(threads)
        judge = self._judge(snapshot, encoder)
        parts = [examples[start : start + JUDGED_AT_ONCE] for start in range(0, len(examples), JUDGED_AT_ONCE)]
        return [estimate for part in parts for estimate in judge.estimate(part)]

    def train(self, request: Request) -> Trained:
        """The whole run, from its last checkpoint if it has one. A run that is done gives its result again."""
        folder = Path(request.folder)
        done = Trained.load(folder)
        if done is not None:
            return done
        torch.set_num_threads(request.threads)
        started = time.monotonic()
        recipe = recipes.parse(request.recipe, request.run)
        sources = self._sources(request, recipe)
        training = Training(self._engine(request, recipe), recipe, sources, request.seed, folder, request.samples)
        if request.store is not None:
            training.sources = replace(
                sources, keep=lambda drawn: synthetic.keep(request, sources.batch, training.position, drawn)
            )
        # The engine has the parent's weights now, also in a run that will go on from a checkpoint.
        apart = mismatch.of_calls(sources.batch, sources.policy, training.engine, mismatch.parent_of(request.parent))
        before = proxy(sources, recipe, training.engine)
        recipes.algorithm(recipe)(training)
        after = proxy(sources, recipe, training.engine)
        metrics = {"seconds": time.monotonic() - started} | (apart.named("calls") if apart else {})
        if before is not None and after is not None:
            metrics |= {"proxy_before": before, "proxy_after": after}
        return self._finish(training, Path(request.adapters), metrics)

    def _finish(self, training: Training, adapters: Path, metrics: dict[str, float]) -> Trained:
        training.engine.save_value_head(training.folder / VALUE_HEAD)
        adapter = training.engine.save_adapter(adapters)
        result = Trained(adapter, {**summary(training), **metrics}, training.curves)
        result.save(training.folder)
        return result

    def _engine(self, request: Request, recipe: Recipe) -> TorchEngine:
        settings = EngineSettings(
            rank=recipe.adapter.rank,
            alpha=recipe.adapter.alpha,
            targets=recipe.adapter.targets,
            learning_rate=recipe.optimizer.learning_rate,
            head_rate=recipe.optimizer.head_rate,
            weight_decay=recipe.optimizer.weight_decay,
            clip_norm=recipe.optimizer.clip_norm,
        )
        return TorchEngine(
            self._policy(request.base, request.cache),
            settings,
            parent=None if request.parent is None else Path(request.parent),
            value_head=None if request.value_head is None else Path(request.value_head),
            seed=request.seed,
        )

    def _sources(self, request: Request, recipe: Recipe) -> Sources:
        judge = None
        if recipe.reward.source == "model" and request.reward is not None:
            judge = self._judge(request.reward, request.encoder)
        if judge is None and recipe.rollouts.prompts > 0:
            raise ConfigError(
                f"recipe {recipe.name} draws rollouts, and there is no reward model to judge them: wait for feedback, "
                "or use a recipe with rollouts.prompts = 0"
            )
        recent = None if request.recent is None else frozenset(request.recent)
        policy = self._policy(request.base, request.cache)
        return Sources(Batch.load(Path(request.batch)), policy, judge, recent, max_tokens=request.max_tokens)

    def _judge(self, snapshot: str, encoder: str) -> RewardModel:
        """The reward model of a snapshot's folder; the one asked for last stays loaded."""
        if self._judges.get((snapshot, encoder)) is None:
            self._judges = {(snapshot, encoder): RewardModel.load(Path(snapshot), self._encoder(encoder))}
        return self._judges[snapshot, encoder]

    def _policy(self, name: str, cache: str) -> Policy:
        if (name, cache) not in self._policies:
            self._policies[name, cache] = base.load(name, Path(cache))
        return self._policies[name, cache]

    def _encoder(self, name: str) -> Encoder:
        if name not in self._encoders:
            self._encoders[name] = Encoder(name)
        return self._encoders[name]


def summary(training: Training) -> dict[str, float]:
    """What people want to know of a run: steps, the means of their last quarter, and what it learned from."""
    steps = training.position.taken
    tail = max(1, steps // 4)
    sums: dict[str, list[float]] = {}
    for name, step, value in training.curves:
        if step > steps - tail:
            sums.setdefault(name, []).append(value)
    told = {name: sum(values) / len(values) for name, values in sums.items()}
    last = max(training.folder.glob("round-*.parquet"), key=lambda path: int(path.stem.removeprefix("round-")))
    answers = Material.load(last).answers
    fresh = [a for a in answers if a.source == "fresh" and a.weight > 0]
    counts = {f"answers_{source}": float(sum(a.source == source for a in answers)) for source in SOURCES}
    samples = sum(a.count for a in fresh)
    reward = sum(a.count * a.reward for a in fresh) / samples if samples else 0.0
    apart = mismatch.of_rollouts(answers)
    counts |= apart.named("rollouts") if apart else {}
    return {**told, **counts, "steps": float(steps), "rollouts": float(samples), "rollout_reward": reward}


SOURCES = ("logged", "fresh", "corrected", "rated", "believed")
