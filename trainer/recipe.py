"""Recipes: everything that a run's algorithm can be told, typed, from a TOML file.

A recipe is one of ``trainer/recipes`` by name, or a path to a file. Unknown keys are refused, and so are keys that
contradict each other, before anything is loaded. ``algorithm`` names the module, or the path of the file, that holds
``train(training)``: to change the algorithm, copy ``trainer/algorithm.py``, edit it, and name the copy.
"""

from __future__ import annotations

import importlib
import importlib.util
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from everloop.config import Target
from everloop.errors import ConfigError
from everloop.section import Section
from pydantic import Field, ValidationError, model_validator

SHIPPED = Path(__file__).parent / "recipes"


class AdapterRecipe(Section):
    """LoRA (Hu et al. 2021, arXiv:2106.09685). ``alpha`` / ``rank`` scales the update."""

    rank: int = Field(default=32, ge=1, le=1024)
    alpha: float = Field(default=64, gt=0)
    targets: tuple[Target, ...] = ("attention", "dense", "shared", "experts")


class RolloutRecipe(Section):
    """Fresh answers of the policy as it is now to recent prompts, judged by the reward model."""

    prompts: int = Field(default=0, ge=0, description="newest distinct prompts of the batch; 0: no fresh rollouts")
    samples: int = Field(default=8, ge=2, description="answers a prompt, at temperature 1")
    max_tokens: int | None = Field(
        default=None, ge=1, description="of an answer, at most; not set: as many as the policy's own answers may have"
    )
    spread: float = Field(
        default=0.2, ge=0, le=2, description="prompts whose answers' rewards differ by less teach PPO nothing: left out"
    )


class PpoRecipe(Section):
    coefficient: float = Field(default=1.0, ge=0, description="0: no policy gradient at all")
    logged: bool = Field(default=True, description="whether calls of the batch enter")
    fresh: bool = Field(default=True, description="whether fresh rollouts enter")
    settled: bool = Field(default=True, description="whether rollouts enter whose prompt has an answer in replay")
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0)
    truncate: float = Field(default=2.0, ge=1, description="largest proximal / behaviour ratio")


class RewardRecipe(Section):
    """``feedback``: thumbs and outcomes alone, answers without one are left out; ``model``: every scored answer."""

    source: Literal["model", "feedback"] = "model"
    shuffled: bool = Field(default=False, description="a control: rewards in random order, nothing to learn from")


class ValueRecipe(Section):
    coefficient: float = Field(default=0.5, ge=0)
    discount: float = Field(default=1.0, gt=0, le=1, description="a turn")
    trace: float = Field(default=0.95, ge=0, le=1, description="lambda of GAE")


class KlRecipe(Section):
    coefficient: float = Field(default=0.005, ge=0, description="of the KL to the base, nats a token")


class ReplayRecipe(Section):
    """Likelihood of answers that are known to be good, or believed to be with calibrated confidence."""

    coefficient: float = Field(default=1.0, ge=0)
    corrected: float = Field(default=1.0, ge=0, description="weight of a correction")
    repeats: int = Field(default=1, ge=1, description="times that an epoch comes by a correction not learned yet")
    rated: float = Field(default=1.0, ge=0, description="weight of an answer that people rated well")
    believed: float = Field(default=0.0, ge=0, description="weight of the answers that the judge believes in")
    proposals: int = Field(
        default=0,
        ge=0,
        description="good answers of near prompts, and near known answers, judged beside rollouts; so many of each",
    )
    belief: float = Field(default=0.5, ge=0, lt=1, description="probability of being good below which none is taken")


class OptimizerRecipe(Section):
    learning_rate: float = Field(default=2e-3, gt=0)
    head_rate: float = Field(default=1e-2, gt=0, description="of the value head")
    epochs: int = Field(default=3, ge=1, description="passes over the material of a round, at most")
    steps: int = Field(default=0, ge=0, description="optimizer steps a round, at most; 0: as many as the epochs have")
    rounds: int = Field(default=1, ge=1, description="times that fresh rollouts are drawn; each has its epochs")
    minibatch: int = Field(default=64, ge=1, description="prompts a step")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the run")
    final: float = Field(default=0.1, ge=0, le=1, description="share of the learning rate at the end, by a cosine")
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)


class Recipe(Section):
    """One way to train. ``name`` is the file's."""

    name: str
    algorithm: str = Field(default="trainer.algorithm", description="a module, or the path of a Python file")
    checkpoint_every: int = Field(default=10, ge=1, description="optimizer steps")
    adapter: AdapterRecipe = AdapterRecipe()
    rollouts: RolloutRecipe = RolloutRecipe()
    ppo: PpoRecipe = PpoRecipe()
    reward: RewardRecipe = RewardRecipe()
    value: ValueRecipe = ValueRecipe()
    kl: KlRecipe = KlRecipe()
    replay: ReplayRecipe = ReplayRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        fresh = self.rollouts.prompts > 0
        if fresh and self.reward.source == "feedback":
            raise ValueError("rollouts.prompts: nobody rates fresh rollouts; use reward.source = 'model', or 0 prompts")
        if self.ppo.coefficient == 0 and self.replay.coefficient == 0:
            raise ValueError("ppo.coefficient and replay.coefficient are both 0: there is nothing to learn from")
        if fresh and not (self.ppo.coefficient and self.ppo.fresh) and self.replay.believed == 0:
            raise ValueError(
                "rollouts.prompts: nothing reads the rollouts; let them into PPO, or give replay.believed a weight"
            )
        if not fresh and self.replay.believed > 0:
            raise ValueError("replay.believed takes the best rollout, and rollouts.prompts is 0")
        if self.ppo.coefficient > 0 and not self.ppo.logged and not (fresh and self.ppo.fresh):
            raise ValueError(
                "PPO has no samples: neither logged calls nor fresh rollouts enter; set its coefficient to 0"
            )
        if not fresh and self.optimizer.rounds > 1:
            raise ValueError("optimizer.rounds draws fresh rollouts anew, and rollouts.prompts is 0: use epochs")
        return self


def load(name: str) -> Recipe:
    """The recipe called ``name``, or in the file ``name``.

    Raises ConfigError where there is none, a key is unknown, or keys contradict each other.
    """
    path = Path(name) if name.endswith(".toml") else SHIPPED / f"{name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.toml")))
        raise ConfigError(f"there is no recipe {name!r}: use one of {shipped}, or the path of a .toml file")
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from None
    return parse({"name": path.stem, **fields}, str(path))


def parse(fields: dict[str, Any], source: str) -> Recipe:
    """Raises ConfigError, naming every key that is wrong."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"recipe {source} is refused:\n  " + "\n  ".join(lines)) from None


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where + ': ' if where else ''}{problem['msg'].removeprefix('Value error, ')}"
    section: Any = Recipe
    for part in problem["loc"][:-1]:
        section = section.model_fields[part].annotation
    return f"{where}: unknown key; known here: {', '.join(sorted(section.model_fields))}"


def algorithm(recipe: Recipe) -> Callable[..., Any]:
    """The ``train`` function that a recipe names. Raises ConfigError where there is none."""
    try:
        if recipe.algorithm.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"everloop_algorithm_{recipe.name}", recipe.algorithm)
            if spec is None or spec.loader is None:
                raise ImportError("it cannot be read as Python")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(recipe.algorithm)
        return module.train  # type: ignore[no-any-return]
    except Exception as error:  # an import runs the file, which may raise anything
        raise ConfigError(
            f"recipe {recipe.name}: algorithm {recipe.algorithm!r} is not a module or file with a function "
            f"train(training): {type(error).__name__}: {error}"
        ) from error
