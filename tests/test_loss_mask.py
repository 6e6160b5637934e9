from __future__ import annotations

import torch

from lit_lora.loss_mask import mask_of_latents


def test_mask_of_latents_is_the_share_of_each_pixel() -> None:
    mask = torch.randint(0, 256, (2, 1, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shares = mask_of_latents(mask, (2, 3))
    expected = mask.double().view(2, 1, 2, 8, 3, 8).mean(dim=(3, 5)) / 255
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=1e-7)
    assert shares.dtype == torch.float32
    assert torch.equal(mask_of_latents(shares, (2, 3)), shares)  # as from a cache
