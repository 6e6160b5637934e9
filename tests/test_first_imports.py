"""The first imports of the libraries."""

from __future__ import annotations

import gc
import sys

import pytest

from lit_lora.first_imports import first_imports


def test_imports_collect_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    with first_imports():
        assert gc.isenabled()  # torch is imported already
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ImportError), first_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    assert frozen == [False]
