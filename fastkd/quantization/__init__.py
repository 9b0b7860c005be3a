"""Quantisation-aware training: linear layers compute with NVFP4 values of their weights and inputs.

A chosen layer computes

    y = W̃ x̃ + bias,    W̃ = nvfp4(W, g_W),    x̃ = nvfp4(x, g_x),

with the straight-through gradient of ``fastkd._kernels.nvfp4_ops``. W stays in full precision and is trained. Block
scales follow the values; the two global scales are fixed before training: g_W by the largest weight (``initialise``),
g_x by the largest input on a data sample (``calibrating``: max calibration). q, k and v share theirs, as do gate and
up, because engines run them as one layer. All is ModelOpt's format and rule (``fastkd._kernels.nvfp4``), so what is
exported is what was trained.

The scales are buffers of the layer under their names in a checkpoint, ``weight_scale_2`` and ``input_scale``: training
states hold them. The layer's weight keeps its name, so tensor-parallel styles and FSDP cut it as ever.
``tensor_styles`` calls the quantiser on a rank's part of the layer. That is exact where no block of 16 inputs is cut
(``check_shards``), because a block's scale needs the block alone and g is that of the whole tensor.

Experts that lie in one tensor (``fastkd.experts``) have a g_W each, which gate and up share, and one g_x for all of a
block: engines that run them together use one, and an expert that no token of the sample reached has it too.

Rollouts without NVFP4 hardware are sampled from folded weights W̃ (``fold``).
"""

from __future__ import annotations

from fastkd.quantization.adding import apply, check_shards
from fastkd.quantization.layers import INPUT_SCALE, WEIGHT_SCALE
from fastkd.quantization.model import (
    disabled,
    fold,
    has_quantizers,
    is_scale,
    quantized_layers,
    quantized_tensors,
    quantizers_of,
    resume,
    weights_alone,
    weights_kept,
)
from fastkd.quantization.scales import calibrating, initialise

__all__ = [
    "INPUT_SCALE",
    "WEIGHT_SCALE",
    "apply",
    "calibrating",
    "check_shards",
    "disabled",
    "fold",
    "has_quantizers",
    "initialise",
    "is_scale",
    "quantized_layers",
    "quantized_tensors",
    "quantizers_of",
    "resume",
    "weights_alone",
    "weights_kept",
]
