# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What computes with tensors computes where they are: on a GPU that is only played, with the values of the CPU.

`torch._subclasses.FakeTensorMode` knows no values, which ranges, boxes and tables of channels depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from ultralytics.nn.modules import Conv

from yolo_ext import stock
from yolo_ext.core.registry import Need
from yolo_ext.distillation.losses import (
    Align,
    HeadOutput,
    decode,
    feature_losses,
    logit_losses,
    modules,
    regrid,
    standardize,
)
from yolo_ext.distillation.terms import Balance
from yolo_ext.pruning import masks
from yolo_ext.quantization.calibrate import calibrate, inspect
from yolo_ext.quantization.fake_quant import get_state, insert_plan, load_state, set_mode
from yolo_ext.quantization.observers import Histogram, observers, weight_observers
from yolo_ext.quantization.spec import Spec
from yolo_ext.sparsity import layout
from yolo_ext.sparsity.layout import SparseGroup, lay_out
from yolo_ext.sparsity.penalties import Channels, penalties
from yolo_ext.stock import evidence

GPU = torch.device("cuda", 0)
# Operators that take tensors of both: they move values, or index by what lies on the CPU.
BOTH = {"_to_copy", "copy_", "index", "index_put_", "_index_put_impl_", "lift_fresh",
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams"}  # fmt: skip


class OnGpu(torch.Tensor):
    """A tensor that says to be on a GPU; its values are on the CPU, where all operators run."""

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> OnGpu:
        kept = {"dtype": value.dtype, "requires_grad": value.requires_grad, "strides": value.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, storage_offset=value.storage_offset(), **kept)

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value.detach()

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.value})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError("A tensor of the GPU is no array.")

    def tolist(self) -> Any:
        return self.value.tolist()

    def cpu(self) -> torch.Tensor:
        return self.to("cpu")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.new_tensor:
                return OnGpu(func(*args, **kwargs or {}))
            if func not in (torch.Tensor.to, torch.Tensor.type_as):
                return func(*args, **kwargs or {})
            x, *rest = args
            rest += [v for k, v in (kwargs or {}).items() if k in ("device", "dtype")]
            rest += [part for r in rest if isinstance(r, torch.Tensor) for part in (r.device, r.dtype)]
            x = x.to(next((r for r in rest if isinstance(r, torch.dtype)), x.dtype))
            where = next((torch.device(r) for r in rest if isinstance(r, (str, torch.device))), x.device)
            if isinstance(x, OnGpu) == (where.type == "cuda"):
                return x
            return x.value if isinstance(x, OnGpu) else OnGpu(x)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values; refuse tensors of both devices as CUDA does, numbers of no dimension apart."""
    name, tensors = func._schema.name.partition("::")[2], tree_flatten((args, kwargs))[0]
    there = [t for t in tensors if isinstance(t, OnGpu)]
    rest = [t for t in tensors if isinstance(t, torch.Tensor) and not isinstance(t, OnGpu) and t.ndim]
    if there and rest and name not in BOTH and not torch._C._current_graph_task_id() + 1:  # torch's own backward
        raise RuntimeError(f"{name} takes tensors of the GPU and of the CPU")
    device = kwargs.pop("device", None)
    kwargs |= {} if device is None else {"device": "cpu"}
    on_gpu = torch.device(device).type == "cuda" if device is not None else bool(there)
    on_gpu = isinstance(args[0], OnGpu) if name == "copy_" else on_gpu
    out = func(*tree_map(values, args), **tree_map(values, kwargs))
    known = {id(t.value): t for t in there}  # an operator in place returns what it was given

    def placed(t: Any) -> Any:
        return (known[id(t)] if id(t) in known else OnGpu(t)) if on_gpu and isinstance(t, torch.Tensor) else t

    return tree_map(placed, out)


class Played(TorchDispatchMode):
    """Have `device="cuda"` make tensors of the played GPU, and start no real one."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE


def dispatch(mode: Played, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return run(func, args, dict(kwargs or {}))


Played.__torch_dispatch__ = dispatch  # type: ignore[method-assign]  # in the class, torch would import its compiler


def values(x: Any) -> Any:
    return x.value if isinstance(x, OnGpu) else x


def put(x: Any) -> Any:
    """Put tensors, or a copy of a module with what it has registered, on the GPU."""
    if not isinstance(x, nn.Module):
        return OnGpu(x) if isinstance(x, torch.Tensor) else x
    x = deepcopy(x)
    for m in x.modules():
        m._parameters.update({k: nn.Parameter(OnGpu(p)) for k, p in m._parameters.items() if p is not None})
        m._buffers.update({k: OnGpu(b) for k, b in m._buffers.items() if b is not None})
    return x


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    with torch.backends.cudnn.flags(enabled=False), Played():
        yield
    torch._C._set_only_lift_cpu_tensors(lifted)


def same(work: Callable[..., Any], *given: Any, on_cpu: bool = False) -> Any:
    """Check that work gives the same on both devices, and there, with the same gradients of its first input."""
    found = []
    for place in (deepcopy, put):
        torch.manual_seed(0)
        own = tree_map(place, given)
        leaves = [t.requires_grad_() for t in tree_flatten(own[0])[0] if isinstance(t, torch.Tensor)]
        out = [t for t in tree_flatten(work(*own))[0] if isinstance(t, torch.Tensor)]
        if losses := [t.sum() for t in out if t.requires_grad]:
            torch.stack(losses).sum().backward()
        assert all(isinstance(t, OnGpu) == (place is put and not on_cpu) for t in out)
        found.append([values(t).detach() for t in (*out, *(leaf.grad for leaf in leaves if leaf.grad is not None))])
    assert found[0] and [t.shape for t in found[0]] == [t.shape for t in found[1]]
    assert all(torch.allclose(b, a, rtol=1e-4, atol=1e-6) for a, b in zip(*found))
    return found[0]


def maps(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 4, 5, 6), generator=torch.Generator().manual_seed(sum(shape)))


# The played GPU ------------------------------------------------------------------------------------------------------
WRONG: dict[str, Callable[[torch.Tensor], Any]] = {
    "a constant of the CPU": lambda x: x + torch.arange(6),
    "an index does not lie there": lambda x: x.gather(0, torch.zeros(1, 4, 5, 6, dtype=torch.long)),
    "a result of the CPU": lambda x: x.cpu() * 2,
    "no array": lambda x: torch.from_numpy(x.detach().numpy()),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_on_a_gpu_is_wrong_here(name):
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        same(WRONG[name], maps())


# Distillation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", feature_losses, ids=lambda r: r.name)
def test_feature_losses(row):
    def loss(student: Any, teacher: Any, module: Any) -> Any:
        return row.fn(student, teacher, **({"module": module} if module else {}))

    module = modules[row.name](4) if Need.MODULE in row.needs else None
    assert same(loss, maps(), maps(2, 4, 5, 6), module)


def head(seed: int) -> dict[str, Any]:
    """Return what a head with 3 classes, 4 bins and two levels gives for two images."""
    random = torch.Generator().manual_seed(seed)
    boxes, scores = (torch.randn(2, n, 20, generator=random) for n in (16, 3))
    return {"boxes": boxes, "scores": scores, "feats": [torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 2, 2)]}


@pytest.mark.parametrize("row", logit_losses, ids=lambda r: r.name)
def test_logit_losses(row):
    def loss(student: Any, teacher: Any, stride: Any) -> Any:
        return row.fn(decode(student, stride, 4), decode(teacher, stride, 4))

    same(loss, head(0), head(1), torch.tensor([8.0, 16.0]))


def test_other_grids_and_classes():
    def other(raw: Any, stride: Any, classes: Any) -> Any:
        out: HeadOutput = decode(regrid(raw, stride, [(6, 6), (3, 3)]), stride, 1, classes)
        return out.scores, out.boxes()

    same(other, head(0), torch.tensor([8.0, 16.0]), torch.tensor([2, 0]))


ADAPTERS = {
    "1x1": Align(4, 6, None), "direct": Align(6, 6, None), "kept channels": Align(3, 6, [0, 2, 5]),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name):
    adapter, width = ADAPTERS[name], {"1x1": 4, "direct": 6}.get(name, 3)
    same(lambda module, s, t: module(s, t), adapter, maps(2, width, 5, 5), maps(2, 6, 5, 5))


def test_an_adapter_shrinks_where_it_is():
    def shrunk(module: Any, student: Any, teacher: Any) -> Any:
        module.shrink([0, 3])
        return module(student, teacher)

    same(shrunk, Align(4, 6, None), maps(2, 2, 5, 5), maps(2, 6, 5, 5))


def test_balance_and_statistics():
    same(lambda m, a, b: (m(a.sum(), b.sum(), 0.5), m.means), Balance(), maps(3), maps(4))
    same(standardize, maps())


# Quantization --------------------------------------------------------------------------------------------------------
SPECS = {
    "asymmetric": (Spec(8), Spec(8, True, True)), "symmetric": (Spec(8, True), Spec(7, True)),
    "sixteen bits": (Spec(16), Spec(16, True, True)),
}  # fmt: skip


def quantized(spec: str) -> nn.Module:
    """Return a quantized model with a layer of each kind, a block with SiLU and an addition in it."""
    torch.manual_seed(0)
    act, weight = SPECS[spec]
    net = nn.Sequential(Conv(3, 4, 3), nn.ConvTranspose2d(4, 4, 2, 2), nn.Flatten(), nn.Linear(400, 3)).eval()
    plain = {"input": act, "weight": weight}
    insert_plan(net, {"0.conv": {**plain, "output": act, "activation": act}, "1": plain, "3": {**plain, "output": act}})
    return net


@pytest.mark.parametrize("spec", SPECS)
def test_quantizers(spec):
    """Calibrated, observed, trained with ranges that follow, and written to a state that another model reads."""

    def work(net: Any, images: Any) -> Any:
        state = calibrate(net, [images.detach()], "minmax")
        rows = torch.tensor([row["used"] for row in inspect(net, [images.detach()])], device=images.device)
        y = net(images)
        set_mode(net, "on", momentum=0.5)
        moved = net.train()(images * 2)
        load_state(net, state)
        assert get_state(net) == state
        return y, moved, rows

    same(work, quantized(spec), maps(2, 3, 5, 5).sigmoid())


def test_histograms():
    def seen(x: Any) -> Any:
        h = Histogram()
        for part in (x, 3 * x, x / 0):
            h.update(part.detach())
        return torch.from_numpy(h.counts), torch.tensor([row.fn(h, Spec(8)) for row in observers])

    same(lambda x: seen(x), maps(), on_cpu=True)


@pytest.mark.parametrize("row", weight_observers, ids=lambda r: r.name)
def test_weight_observers(row):
    same(lambda w: row.fn(w.detach(), 127), maps(4, 20))


# Pruning and sparsity ------------------------------------------------------------------------------------------------
def blocks() -> tuple[nn.Module, list[SparseGroup]]:
    torch.manual_seed(0)
    net = nn.Sequential(Conv(3, 4, 3), Conv(4, 4, 3)).train()
    index = torch.arange(4)[:, None]
    group = SparseGroup("0", 4, [("0.bn.weight", index)], [("0.conv.weight", 0, index), ("1.conv.weight", 1, index)])
    return net, [group]


@pytest.mark.parametrize("row", penalties, ids=lambda r: r.name)
def test_penalties(row):
    net, groups = blocks()

    @torch.no_grad()
    def shrunk(net: Any) -> Any:
        where = lay_out(net, groups, weights=True)
        gammas = layout.read_scales(net, where)
        by_scale = Need.SCALES in row.needs
        norms = layout.scale_norms(gammas, where) if by_scale else layout.weight_norms(net, where)
        channels = Channels(where.group, 1, gammas, where.owner, norms, norms + 1)
        factors = row.fn(channels, 0.3)
        layout.multiply(net, where, *([factors] if by_scale else [factors[where.owner], factors]))
        return factors, [p.detach() for p in net.parameters()]

    same(shrunk, net)


def test_masks_and_statistics():
    @torch.no_grad()
    def work(net: Any, images: Any) -> Any:
        masks.apply(masks.Masks({}, {"0.conv": torch.arange(108).view(4, 3, 3, 3) % 2 == 0}), net)
        assert stock.recalibrate(net, [images.detach()]) == 2
        return [t.detach() for t in net.state_dict().values()]

    same(work, blocks()[0], maps(2, 3, 6, 6))


# Evidence ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sides", [4, 5], ids=["upright", "rotated"])
def test_evidence(sides):
    def kept(boxes: Any, conf: Any) -> Any:
        area = evidence._areas(boxes.detach(), {"ratio_pad": ((0.5, 0.5), (0, 0))})
        row = {"name": "a.jpg", "conf": conf.detach(), "cls": conf.detach().round(), "area": area, "hits": {}}
        found = evidence._of_detector([{**row, "target_cls": conf.detach(), "target_area": area}], {})
        return [torch.from_numpy(v) for v in (area, found.conf, found.cls, found.area, found.target_cls)]

    same(kept, maps(3, sides).sigmoid(), maps(3).sigmoid(), on_cpu=True)
