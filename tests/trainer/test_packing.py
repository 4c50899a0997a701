"""Token trees: the module's own example by hand, and packed numbers equal to those of rows of their own."""

from __future__ import annotations

import pytest
import torch

from trainer import packing
from trainer.engine_torch import EngineSettings, TorchEngine
from trainer.packing import Sample
from trainer.policy.base import Policy

GROUP = (Sample((5, 6), (7, 8)), Sample((5, 6), (7, 9)), Sample((5, 6), (4,)))


def test_the_tree_of_the_example():
    tree = packing.tree(GROUP)
    assert tree.tokens.tolist() == [5, 6, 7, 8, 9, 4]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 2, 1]
    assert tree.depths.tolist() == [0, 1, 2, 3, 3, 2]
    assert [path.tolist() for path in tree.predictors] == [[1, 2], [1, 2], [1]]
    assert tree.ancestors()[4].tolist() == [True, True, True, False, True, False]


def test_a_turn_that_extends_another_shares_its_tokens():
    later = Sample((5, 6, 7, 8, 3), (9,))
    assert len(packing.tree([GROUP[0], later])) == 6


def test_padding_sees_itself_alone():
    groups = [GROUP, (Sample((1,), (2,)),)]
    packed = packing.pack(groups, [packing.tree(group) for group in groups])
    assert packed.ids.shape == (2, 6)
    seen = packed.mask[1, 0] == 0
    assert seen[5].tolist() == [False, False, False, False, False, True]
    assert packed.at.tolist() == [[1, 2], [1, 2], [1, 0], [6, 0]]
    assert packed.present.sum(1).tolist() == [2, 2, 1, 1]


@pytest.mark.models
def test_packed_log_probabilities_are_those_of_rows_of_their_own(policy: Policy):
    samples = (
        Sample((5, 6, 9, 11), (70, 80, 2)),
        Sample((5, 6, 9, 11), (70, 81)),
        Sample((5, 6, 9, 11), (40,), temperature=0.7),
        Sample((5, 6), (9, 12)),
    )
    engine = TorchEngine(policy, EngineSettings(rank=2), seed=3)
    together = engine.estimates([samples]).logprobs
    for sample, found in zip(samples, together, strict=True):
        ids = torch.tensor([sample.prompt + sample.completion])
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, len(sample.prompt) - 1 : -1]
        alone = torch.log_softmax(logits / sample.temperature, -1).gather(1, ids[0, len(sample.prompt) :, None])[:, 0]
        assert found == pytest.approx(alone.numpy(), abs=1e-5)
