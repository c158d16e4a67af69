# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Write a calibrated state into an FP32 ONNX file as Q/DQ nodes that the runtime of a profile turns into INT8."""

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from yolo_ext.checkpoint import atomic_write
from yolo_ext.core.errors import CheckFailed, UsageError, refused
from yolo_ext.quantization.qdq_nodes import Editor, Params, fuse_silu, quant_params, transpose_dfl
from yolo_ext.quantization.spec import Profile, State
from yolo_ext.stock import module_path

CONVS = {"Conv", "ConvTranspose"}
LAYERS = {*CONVS, "Gemm", "MatMul"}
# Results have codes of the first input: integer kernels if the same parameters stand before and behind.
PASS = {"Split", "Slice", "MaxPool", "Resize", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Gather"}
WIDE_OPSET = 21  # the first with 16-bit Q/DQ


def write_qdq(fp32: Path, out: Path, state: State, profile: Profile) -> dict[str, Any]:
    """Write the quantized version of an FP32 ONNX file.

    Each site of the state becomes a Q/DQ pair, each weight integer codes with a DQ. Tensors that pass Split, MaxPool,
    Resize and the like on their way to another quantized layer keep their parameters behind it, so that ONNX Runtime
    moves codes only. Everything else, the metadata included, stays as it is.

    Args:
        fp32: File exported by Ultralytics from the fused float model; names of nodes or weights follow module paths.
        out: File to write.
        state: Specs and ranges of the fused or the unfused model.
        profile: What the runtime executes.
    Returns: `{"quantized": [paths], "float": {path: reason}}` over all convolutions and linear layers of the file, and
        as `convs` the path of each convolution by the name of its node.
    Raises: `UsageError`: If the file is missing, not ONNX, not float32 or of too old an opset, or a range is empty.
        CheckFailed: If a layer of `state` is not in the file, or reads a float tensor where it expects a quantized
        one.
    """
    wide = any(entry["bits"] > 8 for sites in state.values() for entry in sites.values())
    model = _load(Path(fp32), wide)
    graph = model.graph
    writer = _Writer(graph, Editor(profile, _constants(graph)), state)
    if missing := [path for path in writer.state if path not in writer.found]:
        remedy = "Export the model that was calibrated, and calibrate again after any change of its structure."
        lacks = f"lacks {len(missing)} layers that have calibrated ranges, such as '{missing[0]}'"
        raise CheckFailed(f"{fp32} {lacks}. {remedy}")
    convs = {graph.node[i].name: path for i, path in writer.layers.items() if graph.node[i].op_type in CONVS}
    nodes = [new for i, node in enumerate(graph.node) for new in writer.rewrite(i, node)]
    nodes = fuse_silu(nodes, graph) if profile.fuse_silu else nodes
    nodes = transpose_dfl(nodes, writer.editor) if profile.transpose_dfl else nodes
    outputs = {o.name for o in graph.output}
    read = outputs.union(*(n.input for n in nodes))
    nodes = [n for n in nodes if n.op_type != "Identity" or n.output[0] in read]
    read = outputs.union(*(n.input for n in nodes))
    initializers = [*(i for i in graph.initializer if i.name in read), *writer.editor.initializers]
    # Shapes of intermediate tensors that the edits made stale go too; runtimes infer them.
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    if profile.fuse_silu and all(o.domain != "com.microsoft" for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.checker.check_model(model, full_check=True)
    atomic_write(Path(out), model.SerializeToString())
    quantized = list(dict.fromkeys(path for path in writer.layers.values() if path in writer.state))
    kept = {path: "no calibrated range" for path in writer.layers.values() if path not in writer.state}
    return {"quantized": quantized, "float": kept, "convs": convs}


def deployed(state: State, present: Collection[str]) -> State:
    """Return the state of a model without that of the one of two heads that is not among the layers of a file."""
    dual = {p for path in state if "one2one_" in path for p in (path, path.replace("one2one_", ""))}
    return {path: sites for path, sites in state.items() if path in present or path not in dual}


def _load(path: Path, wide: bool) -> onnx.ModelProto:
    """Return a file of an opset that has the Q/DQ wanted: per channel, or `wide` of more than 8 bits."""
    if not path.is_file():
        raise UsageError(f"There is no ONNX file '{path}'.")
    with refused(f"Cannot read '{path}' as ONNX: {{e}}."):
        model = onnx.load(path)
    default = next((o for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    opset, needed = default.version if default else 0, 18 if wide else 13
    if default is None or opset < needed:
        what = "Q/DQ of more than 8 bits" if wide else "per-channel Q/DQ"
        raise UsageError(f"'{path}' has opset {opset}; {what} needs {needed} or later. Export again with opset=18.")
    if wide and opset < WIDE_OPSET:
        if any(n.op_type == "GridSample" for n in model.graph.node):  # the one operator here whose meaning changed
            raise UsageError(f"'{path}' samples grids; more than 8 bits need opset {WIDE_OPSET}. Export again with it.")
        default.version, model.ir_version = WIDE_OPSET, max(model.ir_version, 10)
    return model


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    for n in graph.node:  # the exporter merges equal initializers and hands them on through Identity
        if n.op_type == "Identity" and n.input[0] in constants:
            constants[n.output[0]] = constants[n.input[0]]
    return constants


def _layers(graph: onnx.GraphProto, known: Collection[str], constants: Collection[str]) -> dict[int, str]:
    """Return node number -> path of the layers with constant weights; attention products are no layers."""
    layers = {}
    for i, node in enumerate(graph.node):
        if node.op_type not in LAYERS or node.input[1] not in constants:
            continue
        path, by_weight = module_path(node.name).rpartition(".")[0], node.input[1].removesuffix(".weight")
        path = path if path in known or not by_weight or by_weight not in known else by_weight
        if path in known or node.op_type != "MatMul":
            layers[i] = path
    return layers


@dataclass
class _Writer:
    """Knows where in a float graph the sites of a state are."""

    graph: onnx.GraphProto
    editor: Editor
    state: State  # less a head branch that was not exported
    layers: dict[int, str] = field(default_factory=dict)  # by number of the node
    # What is quantized where a node reads it: number of the node -> tensor -> path and site.
    before: dict[int, dict[str, tuple[str, str]]] = field(default_factory=lambda: defaultdict(dict))
    # What is quantized where a node makes it: tensor -> start of names and parameters.
    behind: dict[str, tuple[str, Params]] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=set)  # tensors that some quantized node reads
    quantized: dict[str, Params] = field(default_factory=dict)  # what is quantized already

    def __post_init__(self) -> None:
        self.layers = _layers(self.graph, self.state, self.editor.constants)
        self.state = deployed(self.state, set(self.layers.values()))
        self.paths = [module_path(n.name).rpartition(".")[0] for n in self.graph.node]
        self.found = {path for path in self.layers.values() if path in self.state}
        self.names, calls = dict[int, str](), Counter[str]()  # a layer that runs several times has a node for each
        for i, path in self.layers.items():
            self.names[i] = f"{path}_{calls[path]}" if calls[path] else path
            if path in self.state:
                self._place_layer(i, path, calls[path])
            calls[path] += 1
        for path, sites in self.state.items():
            if "add" in sites or "residual" in sites:
                self._place_sum(path, sites)
        self._want()

    def params(self, path: str, site: str) -> Params:
        """Return scale and zero point of a site."""
        return quant_params(self.state[path][site], self.editor.profile.signed, f"the {site} of '{path}'")

    def _place_layer(self, i: int, path: str, again: int) -> None:
        """Note where the sites of a layer, node number `i`, are, which has run `again` times before."""
        sites, node = self.state[path], self.graph.node[i]
        if "input" in sites:
            self.before[i][node.input[0]] = path, "input"
        if "output" in sites:
            self.behind[node.output[0]] = f"{self.names[i]}.output", self.params(path, "output")
        if "activation" not in sites:
            return
        scope = f"{path.rpartition('.')[0]}.act"
        act = [n for p, n in zip(self.paths, self.graph.node) if p == scope]
        each = len(act) // sum(p == path for p in self.layers.values())
        act = act[again * each : (again + 1) * each]
        if not act:
            raise CheckFailed(f"The file has no activation '{scope}' to quantize. Export the calibrated model.")
        self.behind[act[-1].output[0]] = f"{self.names[i]}.activation", self.params(path, "activation")
        if self.editor.profile.functional and [n.op_type for n in act] == ["Sigmoid", "Mul"]:
            gate = quant_params({**sites["activation"], "lo": 0.0, "hi": 1.0}, self.editor.profile.signed)
            self.behind[act[0].output[0]] = f"{self.names[i]}.gate", gate

    def _place_sum(self, path: str, sites: dict[str, Any]) -> None:
        """Note where the sites of a bottleneck are, which are nowhere if the file has no such sum."""
        inside = [i for i, p in enumerate(self.paths) if p == path or p.startswith(f"{path}.")]
        add = next((i for i in inside if self.graph.node[i].op_type == "Add" and self.paths[i] == path), None)
        if add is None:
            return
        self.found.add(path)
        if "add" in sites:
            self.behind[self.graph.node[add].output[0]] = f"{path}.add", self.params(path, "add")
        if "residual" in sites:
            made = {name for i in inside for name in self.graph.node[i].output}
            residual = next(name for name in self.graph.node[add].input if name not in made)
            for i in inside:
                if residual in self.graph.node[i].input:
                    self.before[i][residual] = path, "residual"

    def _want(self) -> None:
        """Find what must be quantized where it passes, from its readers backwards."""
        joined = {name for reads in self.before.values() for name in reads}
        functional = any({"activation", "add"} & set(sites) for sites in self.state.values())
        for i, node in reversed(list(enumerate(self.graph.node))):
            concatenates = node.op_type == "Concat" and functional and joined & set(node.output)
            if (path := self.layers.get(i, "")) in self.state:
                # Beside a range of its own, codes of the producer would be a second pair, which ONNX Runtime merges.
                self.wanted.update(node.input[:1] if "input" not in self.state[path] else ())
            elif concatenates or (node.op_type == "Add" and node.output[0] in self.behind):
                self.wanted.update(node.input)
            elif node.op_type in PASS and self.wanted & set(node.output):
                self.wanted.add(node.input[0])

    def rewrite(self, i: int, node: NodeProto) -> list[NodeProto]:
        """Return the nodes that replace node number `i`; call in order. Tensors keep their names behind a Q/DQ pair."""
        new, nodes = NodeProto(), []
        new.CopyFrom(node)
        for tensor, (path, site) in self.before.get(i, {}).items():
            params = self.params(path, site)
            own = self.names[i] if self.layers.get(i) == path else path
            name, pair = self.editor.input(tensor, params, f"{own}.{site}")
            self.quantized[name] = params
            new.input[:] = [name if x == tensor else x for x in new.input]
            nodes += pair
        if (path := self.layers.get(i, "")) in self.state:
            nodes += self._quantize_weights(new, path, self.names[i])
        nodes.append(new)
        linear = any(a.name == "mode" and a.s not in (b"nearest", b"") for a in node.attribute)  # makes new values
        keeps = node.op_type in PASS and not (node.op_type == "Resize" and linear)
        passed = self.quantized.get(node.input[0]) if keeps else None
        for k, tensor in enumerate(node.output):
            made = self.behind.get(tensor) or ((tensor, passed) if passed and tensor in self.wanted else None)
            if made is None:
                continue
            base, self.quantized[tensor] = made
            new.output[k] = f"{base}_float"
            nodes += self.editor.qdq(new.output[k], tensor, made[1], base, clip_behind=base.endswith(".output"))
        return nodes

    def _quantize_weights(self, node: NodeProto, path: str, name: str) -> list[NodeProto]:
        """Have a layer read its weights as codes, and return the nodes that dequantize them, named by it."""
        sites, x = self.state[path], self.quantized.get(node.input[0])
        if x is None and "output" in sites and "input" not in sites and self.editor.profile.functional:
            why = f"it should read a quantized tensor, but '{node.input[0]}' is float"
            remedy = "Calibrate again with the same exclude list, or exclude this layer too."
            raise CheckFailed(f"'{path}' has no input range because {why}. {remedy}")
        if "weight" not in sites:
            return []
        node.input[1:], nodes = self.editor.weights(node, name, sites["weight"], x)
        return nodes
