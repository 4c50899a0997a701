"""Recipes: every shipped one parses, what is wrong is said, and another algorithm is one file away."""

from __future__ import annotations

from pathlib import Path

import pytest
from everloop.errors import ConfigError

from trainer import algorithm, recipe

SHIPPED = sorted(path.stem for path in recipe.SHIPPED.glob("*.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_accepted_and_names_an_algorithm(name: str):
    loaded = recipe.load(name)
    assert loaded.name == name
    assert recipe.algorithm(loaded) is algorithm.train


def test_a_default_and_a_plain_ppo_recipe_are_shipped():
    assert {"ppo-replay", "ppo"} <= set(SHIPPED)
    assert recipe.load("ppo").reward.source == "feedback"
    assert recipe.load("ppo").rollouts.prompts == 0


def test_a_recipe_may_be_any_file(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text("[optimizer]\nepochs = 7\n")
    assert recipe.load(str(path)).optimizer.epochs == 7
    assert recipe.load(str(path)).name == "mine"


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(ConfigError, match="ppo-replay"):
        recipe.load("best")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"optimizer": {"epoch": 3}}, "optimizer.epoch: unknown key; known here: clip_norm, epochs"),
        ({"optimiser": {}}, "optimiser: unknown key"),
        ({"adapter": {"targets": ["router"]}}, "adapter.targets.0"),
        ({"optimizer": {"learning_rate": -1}}, "greater than 0"),
        ({"rollouts": {"prompts": 5}, "reward": {"source": "feedback"}}, "nobody rates fresh rollouts"),
        ({"ppo": {"coefficient": 0}, "replay": {"coefficient": 0}}, "nothing to learn from"),
        ({"ppo": {"logged": False}}, "PPO has no samples"),
        ({"replay": {"believed": 1.0}}, "rollouts.prompts is 0"),
        ({"optimizer": {"rounds": 2}}, "use epochs"),
    ],
)
def test_unknown_and_contradictory_keys_are_refused_in_words(fields: dict[str, object], says: str):
    with pytest.raises(ConfigError, match="recipe here is refused") as refused:
        recipe.parse({"name": "x", **fields}, "here")
    assert says in str(refused.value)


def test_a_recipe_that_is_not_toml_is_refused(tmp_path: Path):
    path = tmp_path / "broken.toml"
    path.write_text("epochs = = 3")
    with pytest.raises(ConfigError, match="not TOML"):
        recipe.load(str(path))


def test_the_algorithm_may_be_a_file_of_ones_own(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("def train(training):\n    training.append('mine')\n")
    made: list[str] = []
    recipe.algorithm(recipe.parse({"name": "x", "algorithm": str(path)}, "here"))(made)
    assert made == ["mine"]


@pytest.mark.parametrize("named", ["trainer.nothing", "trainer.losses", "/nowhere/mine.py"])
def test_an_algorithm_that_is_not_there_is_refused(named: str):
    with pytest.raises(ConfigError, match="is not a module or file"):
        recipe.algorithm(recipe.parse({"name": "x", "algorithm": named}, "here"))


@pytest.mark.parametrize("written", ["train = advantges", "1 / 0", "def train(:", "raise RuntimeError('no')"])
def test_an_algorithm_whose_file_raises_anything_is_refused(written: str, tmp_path: Path):
    path = tmp_path / "own.py"
    path.write_text(written)
    with pytest.raises(ConfigError, match="is not a module or file with a function"):
        recipe.algorithm(recipe.parse({"name": "x", "algorithm": str(path)}, "here"))
