"""A small writer of ONNX graphs: operators by name, weights as constants, names that never change from run to run.

Graphs are written operator by operator, not traced: equal branches give equal bytes, ragged shapes need no guessing
by a tracer, and opset and IR version are exactly those that Triton's ONNX Runtime takes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

OPSET = 17  # the first with LayerNormalization; ONNX Runtime 1.19 in Triton 24.10 refuses above 21
IR_VERSION = 8  # the one that belongs to opset 17; ONNX Runtime 1.19 refuses above 10


class Graph:
    """An ONNX graph that grows operator by operator; `dtype` is the type of its weights and hidden states.

    Names inside begin with `prefix`: those of a loop's body must differ from those around it, which it may also use.
    """

    def __init__(self, name: str, dtype: type[np.floating[Any]], prefix: str = "") -> None:
        self.name = name
        self.dtype = np.dtype(dtype)
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
        product = self.op("MatMul", x, self.weight(f"{name}.weight", weight))
        return self.op("Add", product, self.weight(f"{name}.bias", bias))

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
        return helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, self._weights)

    def serialize(self) -> bytes:
        """Return the checked model; equal graphs give equal bytes."""
        model = helper.make_model(
            self._proto(),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="espalier",
        )
        onnx.checker.check_model(model)
        content: bytes = model.SerializeToString(deterministic=True)
        return content


BOOL, INT32, INT64 = TensorProto.BOOL, TensorProto.INT32, TensorProto.INT64
FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE
