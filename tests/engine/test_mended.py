"""vLLM's kernels for processor cores, with our plugin."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.models


def test_a_row_without_an_adapter_gets_nothing_of_the_last_one() -> None:
    import torch
    from vllm.lora.ops.torch_ops import lora_ops

    from services.engine import mended

    mended.on_processors()
    mended.on_processors()  # once more changes nothing
    slots = torch.ones(3, 2, 4)  # slot, rank, width
    out = torch.full((2, 2), 9.0)
    lora_ops.bgmv_shrink(torch.ones(2, 4), slots, out, torch.tensor([-1, 0]))
    assert out.tolist() == [[0.0, 0.0], [4.0, 4.0]]
