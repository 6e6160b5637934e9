"""A pretended GPU: its tensors say that they are on ``cuda:0`` and are computed on the CPU.

As on a real GPU, an operation on tensors of two devices fails, unless one of them is a single number, and a value comes to the
CPU only by a copy, for which the CPU may have to wait. Such waits are counted. Streams and events do nothing; kernels of CUDA,
autocast, and parameters that go to the other device through ``.data`` are not pretended.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

_AT_ONCE = {"_conj": torch.conj_physical, "_neg_view": torch.neg}

_CPU, _META = torch.device("cpu"), torch.device("meta")


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Context in which there is a pretended GPU."""
    gpu = PretendedGPU()
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "_lazy_init", lambda: None))
        for name in ("Event", "Stream", "current_stream"):
            stack.enter_context(patch.object(torch.cuda, name, _Done))
        stack.enter_context(patch.object(torch.cuda, "stream", lambda _: nullcontext()))
        # Random numbers are drawn on the CPU, whose state is kept too where the GPU's is.
        stack.enter_context(patch.object(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()))
        stack.enter_context(patch.object(torch.cuda, "set_rng_state", lambda *_: None))
        # Others are chosen by the device, in torch's own code.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # torch.tensor(…, device=…) is then made on the CPU, and copied where the mode sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(gpu.asked)
        stack.enter_context(gpu)
        stack.enter_context(patch.object(PretendedGPU, "running", gpu))
        yield gpu


class OneGPU(SingleDeviceStrategy):
    """Lightning's strategy for the pretended GPU."""

    def __init__(self) -> None:
        super().__init__(GPU, CPUAccelerator())

    def setup_environment(self) -> None:
        """Without the accelerator's test that the device is a CPU."""


class OnGPU(Tensor):
    """A tensor on the pretended GPU; ``values`` are its values. To torch's own code it is on ``meta``, which needs no driver."""

    values: Tensor
    device = GPU  # type: ignore[assignment]
    is_cuda, is_meta, is_cpu = True, False, False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> OnGPU:
        made = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=_META,
            requires_grad=requires_grad,
        )
        made.values = values
        return made

    def __init__(self, values: Tensor, requires_grad: bool = False) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGPU({self.values})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=GPU, **options)

    def __getitem__(self, key: Any) -> Any:
        # Torch's own code would make numbers a tensor on ``meta``.
        keys = key if isinstance(key, tuple) else (key,)
        return super().__getitem__(
            tuple(torch.tensor([*k], device=GPU) if isinstance(k, list | range) else k for k in keys)
        )

    def __deepcopy__(self, memo: Any) -> Any:
        copied = OnGPU(self.values.detach().clone(), self.requires_grad)
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert PretendedGPU.running is not None, "the pretended GPU has ended"
        return PretendedGPU.running.compute(func, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """Computes on the CPU what is asked of ``cuda:0``.

    Attributes:
        waits: How often the CPU would have waited for the device, by the file and line that made it wait.
    """

    running: PretendedGPU | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.asked = _AskedForMeta()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation, on the device where it would be."""
        if torch.is_inference_mode_enabled() and func.has_kernel_for_dispatch_key(_COMPOSITE):
            with self:  # torch only takes it apart outside of inference mode
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_pin_memory":
            return args[0]
        tensors: list[Tensor] = []
        plain_args, plain_kwargs = _mapped(partial(_values, tensors), (args, kwargs))
        devices = {one.device for one in tensors if one.ndim}
        if len(devices) > 1 and "copy" not in name:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {devices}")
        target = kwargs.get("device")
        if target == _META and not self.asked.now:
            target = GPU  # torch's own code asks for the device of an OnGPU
        if _waits(name, args, kwargs, target):
            self.waits[_place()] += 1
        on_gpu = any(isinstance(one, OnGPU) for one in tensors) if target is None else target == GPU
        if kwargs.get("pin_memory"):
            plain_kwargs["pin_memory"] = False
        if target == GPU:
            plain_kwargs["device"] = _CPU
        known = {id(one.values): one for one in tensors if isinstance(one, OnGPU)}
        # Below its dispatch, torch does not look at the bits that say conjugate and negative.
        result = _AT_ONCE.get(name, func)(*plain_args, **plain_kwargs)

        def placed(value: Any) -> Any:
            if id(value) in known:  # written in place
                return known[id(value)]
            return OnGPU(value) if on_gpu and isinstance(value, Tensor) else value

        return _mapped(placed, result)


class _AskedForMeta(TorchFunctionMode):
    """Notes whether Python code asks for the device ``meta``; gives a tensor the values of the one that is set as its data."""

    now = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.data.__set__ and isinstance(args[0], OnGPU):  # type: ignore[attr-defined]
            args[0].values = args[1].values
        before, self.now = self.now, any(_is_meta(value) for value in (*args, *kwargs.values()))
        try:
            return func(*args, **kwargs)
        finally:
            self.now = before


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """``function`` of all that is in tuples, lists and dicts; torch's ``tree_map`` takes three times as long."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, one) for one in value])
    if isinstance(value, dict):
        return {name: _mapped(function, one) for name, one in value.items()}
    return function(value)


def _values(tensors: list[Tensor], value: Any) -> Any:
    """What is computed on the CPU for an argument; if it is a tensor, it is added to ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value)
    return value.values if isinstance(value, OnGPU) else value


class _Done:
    """A stream or an event of a GPU that computes at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: True


def _is_meta(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_meta
    return isinstance(value, str | torch.device) and str(value) == "meta"


def _waits(name: str, args: Any, kwargs: dict[str, Any], target: torch.device | None) -> bool:
    """Whether the CPU waits for the device: it needs a value, or copies without leave to go on."""
    if name in ("_to_copy", "copy_"):
        moves = isinstance(args[0], OnGPU) != (isinstance(args[1], OnGPU) if name == "copy_" else target == GPU)
        non_blocking = kwargs.get("non_blocking", name == "copy_" and args[2:] == (True,))
        return moves and (name == "copy_" or target is not None) and not non_blocking
    return name in ("_local_scalar_dense", "nonzero", "equal") and any(isinstance(one, OnGPU) for one in args)


def _place() -> str:
    """The file, with its folder, and the line outside torch that an operation comes from."""
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        assert frame.f_back is not None
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
