"""What the reward model thinks of a policy: the mean reward of its answers to the newest prompts of a batch.

Asked before and after a run, on the same prompts, it says what the run gained by the reward model's word, which the
learner holds beside what the candidate gained on gold (:mod:`pipelines.overoptimise`).
"""

from __future__ import annotations

import numpy as np

from trainer import gather
from trainer.engine import Engine
from trainer.gather import Sources
from trainer.recipe import Recipe
from trainer.sampling import Sampling

PROMPTS = 100


def proxy(sources: Sources, recipe: Recipe, engine: Engine) -> float | None:
    """-1 to 1; None where there is no judge, or it may judge none of the answers."""
    if sources.judge is None:
        return None
    length = gather.longest(sources, recipe)
    asked = gather.recent_prompts(sources, PROMPTS, length)
    drawn = engine.rollouts(list(asked), Sampling(1, length), 0)
    judged = gather.judged_rollouts(asked, drawn, 1, sources)
    rewards = [answer.reward for answer in judged if answer.weight > 0]
    return float(np.mean(rewards)) if rewards else None
