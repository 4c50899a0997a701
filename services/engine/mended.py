"""A plugin of vLLM (entry point ``vllm.general_plugins``), which every process of it loads: its kernels, mended.

Of a batch in which some have an adapter, vLLM 0.27.1 marks those without one by the index -1, and its kernels for
processor cores take that for the last slot: once as many adapters were loaded as there are slots, the base model
answers with the last one's weights added. Here a row without an adapter gets nothing added.
"""

from __future__ import annotations

from typing import Any


def on_processors() -> None:
    """Mend the kernels of a CPU build; any other is left alone."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    shrink = lora_ops.bgmv_shrink
    if getattr(shrink, "mended", False):
        return

    def bgmv_shrink(
        inputs: Any, lora_b_weights: Any, output_tensor: Any, lora_indices_tensor: Any, scaling: float = 1.0
    ) -> None:
        """What is expanded afterwards is 0 where there is no adapter, and so adds nothing."""
        shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[lora_indices_tensor < 0] = 0

    bgmv_shrink.mended = True  # type: ignore[attr-defined]
    for module in (lora_ops, torch_ops, punica_cpu):
        module.bgmv_shrink = bgmv_shrink
