"""Answers that share a prompt, packed into one row: each shared token goes through the model once.

The answers of a group form a tree of tokens. A row holds the tree's nodes, parents before children; a node sees
its ancestors alone and stands at its depth, so every answer gets the very numbers that it would get in a row of
its own. Eight samples of a short answer to a long message cost little more than one.

::

    prompt 5 6, answers [7 8], [7 9], [4]        node    0 1 2 3 4 5
                                                 token   5 6 7 8 9 4
        5 ─ 6 ─┬─ 7 ─┬─ 8                        parent  - 0 1 2 2 1
               │     └─ 9                        depth   0 1 2 3 3 2
               └─ 4
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One answer of a model: ``completion`` token ids (the end token included) after ``prompt`` token ids.

    ``temperature`` is the one that it was sampled at: its log-probabilities are those of the scaled distribution.

    Example: ``Sample(prompt=(1, 5), completion=(7, 2))``
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    temperature: float = 1.0


@dataclass(frozen=True)
class Tree:
    """The tokens of a group of samples. Arrays have shape (nodes,); a parent of -1 is none.

    ``predictors[i]`` are the nodes whose outputs predict the completion tokens of sample i, in order.
    """

    tokens: NDArray[np.int64]
    parents: NDArray[np.int64]
    depths: NDArray[np.int64]
    predictors: tuple[NDArray[np.int64], ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestors(self) -> NDArray[np.bool_]:
        """(nodes, nodes): whether a node sees another; every node sees itself."""
        seen = np.zeros((len(self), len(self)), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] = seen[parent]
            seen[node, node] = True
        return seen


def tree(samples: Iterable[Sample]) -> Tree:
    """The tree of a group. Samples need not share anything: those that do not are branches from the root."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    known: dict[tuple[int, int], int] = {}

    def add(parent: int, token: int) -> int:
        node = known.setdefault((parent, token), len(tokens))
        if node == len(tokens):
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return node

    predictors = []
    for sample in samples:
        at = -1
        for token in sample.prompt:
            at = add(at, token)
        path = []
        for token in sample.completion:
            path.append(at)
            at = add(at, token)
        predictors.append(np.asarray(path, dtype=np.int64))
    return Tree(np.asarray(tokens), np.asarray(parents), np.asarray(depths), tuple(predictors))


@dataclass(frozen=True)
class Packed:
    """Rows of trees as the model takes them: ids and positions (rows, nodes), mask (rows, 1, nodes, nodes).

    ``mask`` is added to the attention scores: 0 where a node is seen, the smallest float where it is not.
    ``at`` (samples, tokens) is the flat index (row · nodes + node) whose output predicts each completion token;
    ``targets`` (samples, tokens) the token that came; ``present`` is False on padding. ``temperatures`` (samples,).
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    at: Tensor
    targets: Tensor
    present: Tensor
    temperatures: Tensor


def pack(groups: Sequence[Sequence[Sample]], trees: Sequence[Tree], *, dtype: torch.dtype = torch.float32) -> Packed:
    """Groups and their trees as one padded batch; samples keep their order, group after group."""
    longest = max(len(one) for one in trees)
    ids = np.zeros((len(trees), longest), dtype=np.int64)
    positions = np.zeros_like(ids)
    seen = np.broadcast_to(np.eye(longest, dtype=bool), (len(trees), longest, longest)).copy()
    for row, one in enumerate(trees):
        ids[row, : len(one)] = one.tokens
        positions[row, : len(one)] = one.depths
        seen[row, : len(one), : len(one)] = one.ancestors()
    at, targets, present = _completions(groups, trees, longest)
    mask = torch.zeros((len(trees), 1, longest, longest), dtype=dtype)
    mask.masked_fill_(~torch.from_numpy(seen)[:, None], torch.finfo(dtype).min)
    temperatures = torch.tensor([sample.temperature for group in groups for sample in group], dtype=dtype)
    return Packed(torch.from_numpy(ids), torch.from_numpy(positions), mask, at, targets, present, temperatures)


def _completions(
    groups: Sequence[Sequence[Sample]], trees: Sequence[Tree], longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``at``, ``targets`` and ``present`` of :class:`Packed`."""
    samples = [sample for group in groups for sample in group]
    width = max(len(sample.completion) for sample in samples)
    at = np.zeros((len(samples), width), dtype=np.int64)
    targets = np.zeros_like(at)
    present = np.zeros(at.shape, dtype=bool)
    paths = [(row, path) for row, one in enumerate(trees) for path in one.predictors]
    for i, ((row, path), sample) in enumerate(zip(paths, samples, strict=True)):
        at[i, : len(path)] = row * longest + path
        targets[i, : len(path)] = sample.completion
        present[i, : len(path)] = True
    return torch.from_numpy(at), torch.from_numpy(targets), torch.from_numpy(present)
