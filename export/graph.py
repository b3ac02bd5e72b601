"""A small writer of ONNX graphs: operators by name, weights as constants, names that never change from run to run.

Graphs are written operator by operator, not traced: equal branches give equal bytes, ragged shapes need no guessing
by a tracer, and opset and IR version are exactly those that Triton's ONNX Runtime takes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

OPSET = 17  # the first with LayerNormalization; ONNX Runtime 1.19 in Triton 24.10 refuses above 21
IR_VERSION = 8  # the one that belongs to opset 17; ONNX Runtime 1.19 refuses above 10
CONTRIB = "com.microsoft"  # operators that every ONNX Runtime has, but ONNX does not
ZERO = np.array(128, np.uint8)
"""What stands for 0: with signed weights, unsigned rows are what a CPU's 8-bit instructions multiply (VNNI)."""
TINY = 1e-30
"""Least magnitude of a row or column, so that one of zeros is not divided by zero."""


class Graph:
    """An ONNX graph that grows operator by operator; `dtype` is the type of its weights and hidden states.

    With `int8` the products of `linear` and `affine` are of 8-bit integers, scaled by row and by column. No row's scale
    depends on another row, and integers are summed exactly, so that an answer does not depend on its batch, as it does
    where the whole input has one scale (DynamicQuantizeLinear). Without VNNI ONNX Runtime adds pairs in 16 bits, which
    may saturate.

    Names inside begin with `prefix`: those of a loop's body must differ from those around it, which it may also use.
    """

    def __init__(self, name: str, dtype: type[np.floating[Any]], *, int8: bool = False, prefix: str = "") -> None:
        self.name = name
        self.dtype = np.dtype(dtype)
        self._int8 = int8
        self._quantized: dict[str, tuple[str, str]] = {}  # by tensor: its rows as integers, and their scales
        self._prefix = prefix
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._small: dict[tuple[bytes, str, tuple[int, ...]], str] = {}

    @property
    def float_type(self) -> int:
        """ONNX type of weights and hidden states."""
        return int(helper.np_dtype_to_tensor_dtype(self.dtype))

    def input(self, name: str, data_type: int, shape: list[int | str]) -> str:
        """Declare a graph input; a string in `shape` names a variable dimension."""
        name = self._prefix + name
        self._inputs.append(helper.make_tensor_value_info(name, data_type, shape))
        return name

    def output(self, name: str, value: str, data_type: int, shape: list[int | str]) -> None:
        """Declare `value` as the graph output `name`."""
        name = self._prefix + name
        self._nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(helper.make_tensor_value_info(name, data_type, shape))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator with one output and return the output's name."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add an operator with `count` outputs and return their names."""
        node = f"{self._prefix}{kind}_{len(self._nodes)}"
        outputs = [node] if count == 1 else [f"{node}_{i}" for i in range(count)]
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, name=node, **attributes))
        return outputs

    def weight(self, name: str, tensor: Tensor) -> str:
        """Add a weight in the graph's precision and return its name."""
        array = tensor.detach().cpu().contiguous().numpy().astype(self.dtype)
        self._weights.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        """Return a constant int64 vector."""
        return self.constant(np.array(values, dtype=np.int64))

    def integer(self, value: int) -> str:
        """Return a constant int64 scalar."""
        return self.constant(np.array(value, dtype=np.int64))

    def number(self, value: float) -> str:
        """Return a constant scalar in the graph's precision."""
        return self.constant(np.array(value, dtype=self.dtype))

    def constant(self, array: npt.NDArray[Any]) -> str:
        """Return a constant of the array's own type; equal ones are kept once."""
        key = (array.tobytes(), str(array.dtype), array.shape)
        if key not in self._small:
            self._small[key] = f"{self._prefix}const_{len(self._small)}"
            self._weights.append(numpy_helper.from_array(array, self._small[key]))
        return self._small[key]

    def linear(self, name: str, x: str, layer: nn.Linear) -> str:
        """Add x·Wᵀ + b."""
        return self.affine(name, x, layer.weight.T, layer.bias)

    def affine(self, name: str, x: str, weight: Tensor, bias: Tensor) -> str:
        """Add x·W + b."""
        product = self._integer_product(name, x, weight) if self._int8 else self._product(name, x, weight)
        return self.op("Add", product, self.weight(f"{name}.bias", bias))

    def exact_linear(self, name: str, x: str, layer: nn.Linear) -> str:
        """Add x·Wᵀ + b in the graph's own precision, also where other products are of integers."""
        return self.op("Add", self._product(name, x, layer.weight.T), self.weight(f"{name}.bias", layer.bias))

    def _product(self, name: str, x: str, weight: Tensor) -> str:
        return self.op("MatMul", x, self.weight(f"{name}.weight", weight))

    def _integer_product(self, name: str, x: str, weight: Tensor) -> str:
        """Add x·W for x [N,K] and W [K,M]: signed weights with a scale per column, rows of x with a scale each."""
        rows, scales = self._quantized.get(x) or self._quantize(x)
        columns = weight.detach().abs().amax(0).clamp(min=TINY) / 127  # [M]
        integers = (weight.detach() / columns).round().to(torch.int8)
        self._weights.append(numpy_helper.from_array(integers.contiguous().numpy(), f"{name}.weight"))
        product = self.op(
            "MatMulIntegerToFloat", rows, f"{name}.weight", self.number(1.0), self.weight(f"{name}.scale", columns),
            self.constant(ZERO), domain=CONTRIB,
        )  # fmt: skip
        return self.op("Mul", product, scales)

    def _quantize(self, x: str) -> tuple[str, str]:
        """Return x [N,K] as unsigned integers about ZERO, and the scale of each row [N,1]."""
        largest = self.op("ReduceMax", self.op("Abs", x), axes=[-1], keepdims=1)
        scales = self.op("Mul", self.op("Max", largest, self.number(TINY)), self.number(1 / 127))
        rows = self.op("QuantizeLinear", self.op("Div", x, scales), self.number(1.0), self.constant(ZERO))
        self._quantized[x] = rows, scales
        return rows, scales

    def layer_norm(self, name: str, x: str, norm: nn.LayerNorm) -> str:
        """Add a LayerNorm over the last dimension."""
        scale, bias = self.weight(f"{name}.weight", norm.weight), self.weight(f"{name}.bias", norm.bias)
        return self.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=norm.eps)

    def gelu(self, x: str, approximate: str) -> str:
        """Add GELU, exact (erf) or in its tanh form, in the pattern that ONNX Runtime fuses."""
        if approximate == "tanh":
            cube = self.op("Mul", self.op("Mul", x, x), x)
            inner = self.op("Add", x, self.op("Mul", cube, self.number(0.044715)))
            curve = self.op("Tanh", self.op("Mul", inner, self.number((2 / np.pi) ** 0.5)))
        else:
            curve = self.op("Erf", self.op("Div", x, self.number(2**0.5)))
        return self.op("Mul", self.op("Mul", x, self.op("Add", curve, self.number(1.0))), self.number(0.5))

    def cast(self, x: str, data_type: int) -> str:
        """Add a cast to the ONNX type `data_type`."""
        return self.op("Cast", x, to=data_type)

    def body(self, name: str) -> "Graph":
        """Return an empty graph for the body of a loop in this one."""
        return Graph(name, self.dtype.type, prefix=f"{self._prefix}{name}.")

    def scan(
        self, body: "Graph", states: Sequence[str], sequences: Sequence[str], count: int, *, backwards: bool = False
    ) -> list[str]:
        """Add a loop of `body` over the first dimension of `sequences`; return its `count` outputs.

        The body's inputs are the states and one row of each sequence; its outputs are the next states and rows, of
        which the loop returns the last states and all rows stacked. Backwards, rows are read and written from the end.
        """
        return self.ops(
            "Scan", count, *states, *sequences, body=body._proto(), num_scan_inputs=len(sequences),
            scan_input_directions=[int(backwards)] * len(sequences),
            scan_output_directions=[int(backwards)] * (count - len(states)),
        )  # fmt: skip

    def _proto(self) -> onnx.GraphProto:
        """Return the graph without what no output needs: ONNX Runtime would compute it."""
        needed = {output.name for output in self._outputs}
        nodes: list[onnx.NodeProto] = []
        for node in reversed(self._nodes):
            if not needed.isdisjoint(node.output):
                nodes.append(node)
                needed.update(node.input)
                needed.update(name for part in node.attribute for inner in part.g.node for name in inner.input)
        weights = [weight for weight in self._weights if weight.name in needed]
        return helper.make_graph(nodes[::-1], self.name, self._inputs, self._outputs, weights)

    def serialize(self) -> bytes:
        """Return the checked model; equal graphs give equal bytes."""
        model = helper.make_model(
            self._proto(),
            opset_imports=[helper.make_opsetid("", OPSET), *([helper.make_opsetid(CONTRIB, 1)] if self._int8 else [])],
            ir_version=IR_VERSION,
            producer_name="espalier",
        )
        onnx.checker.check_model(model)
        content: bytes = model.SerializeToString(deterministic=True)
        return content


BOOL, INT32, INT64 = TensorProto.BOOL, TensorProto.INT32, TensorProto.INT64
FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE
