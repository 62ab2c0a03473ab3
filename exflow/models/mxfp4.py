"""MXFP4, the number format of gpt-oss's experts (OCP Microscaling Formats, version 1.0).

Shape suffixes: O rows, G groups of 32 elements of a row, B bytes of a group.
"""

from __future__ import annotations

import torch

# Two elements a byte, the lower four bits first: a sign, two bits of exponent and one of mantissa.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENT_BIAS = 127


def dequantize(blocks_OGB: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    """The numbers that blocks and scales stand for.

    Args:
        blocks_OGB: uint8 (O, G, 16).
        scales_OG: uint8 (O, G), the exponent of each group's factor.

    Returns:
        (O, 32 * G) float32.

    >>> blocks = torch.tensor([[[0x21] + [0] * 15]], dtype=torch.uint8)
    >>> dequantize(blocks, torch.tensor([[128]], dtype=torch.uint8))[0, :3].tolist()
    [1.0, 2.0, 0.0]
    """
    table = torch.tensor(VALUES, dtype=torch.float32, device=blocks_OGB.device)
    codes = torch.stack([blocks_OGB & 0x0F, blocks_OGB >> 4], dim=-1).long()
    exponents_OG = scales_OG.to(torch.int32) - EXPONENT_BIAS
    return torch.ldexp(table[codes].flatten(2), exponents_OG[..., None]).flatten(1)
