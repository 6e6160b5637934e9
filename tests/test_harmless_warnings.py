from __future__ import annotations

import warnings

import pytest

from lit_lora.harmless_warnings import harmless_ignored


def test_only_what_nobody_can_act_on_is_ignored() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with harmless_ignored():
            warnings.warn("Checkpoint directory runs/a/checkpoints exists and is not empty.", stacklevel=1)
            warnings.warn("The number of training batches (9) is smaller than the logging interval", stacklevel=1)
            warnings.warn(
                "Couldn't infer the batch indices fetched from your dataloader: `RestartingLoader`", stacklevel=1
            )
            warnings.warn("The AccumulateGrad node's stream does not match the stream of the node", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        with pytest.raises(KeyError), harmless_ignored():
            raise KeyError
        warnings.warn("Checkpoint directory runs/a/checkpoints exists and is not empty.", stacklevel=1)
    assert [str(one.message)[:14] for one in shown] == ["something else", "Checkpoint dir"]
