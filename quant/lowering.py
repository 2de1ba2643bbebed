"""Lowering: the operators of a PIR program as operators of an old-IR program, one by one.

The old IR has the same kernels under other names. Most operators differ in names alone (`_SAME`). Others read as
operands what is an attribute there (sizes, axes, factors): a constant becomes the attribute, what is computed goes
into the slot that the old operator has for it.

Values are named as paddle2onnx names them, by kind, how many of the kind stand before, and result
(`p2o.pd_op.conv2d.3.0`), so that a graph that it made and a lowered program can be put together (`quant.splice`).
Weights, inputs and outputs keep the model's names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quant.errors import InputError
from quant.pir import (
    Document,
    attributes_of,
    inner_operators,
    kind_of,
    list_length,
    operands_of,
    region_arguments,
    results_of,
    written_operators,
)

_TYPES = {"bool": "bool", "i32": "int32", "i64": "int64", "f32": "float32", "f64": "float64"}
_TYPES |= {"i8": "int8", "ui8": "uint8", "f16": "float16"}
"""Element types by PIR's names."""

_LIST = 1000
"""Values of a list that an operator writes have no number in PIR: -(_LIST * number of the list + place)."""


@dataclass(frozen=True)
class Renamed:
    """An operator that the old IR knows under another name.

    Attributes:
        kind: its name there.
        inputs, outputs: slots there, in the order of PIR's operands and results.
        attributes: old names of attributes by PIR's; all others keep theirs.
        fixed: attributes that PIR does not write.
        unused: slots that the old operator writes and nobody reads.
    """

    kind: str
    inputs: tuple[str, ...] = ("X",)
    outputs: tuple[str, ...] = ("Out",)
    attributes: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


class Lowering:
    """An old-IR program under construction.

    Attributes:
        feeds, fetches: names of inputs and outputs, in the order of the PIR program.
    """

    def __init__(self, paddle: Any, program: Any, document: Document) -> None:
        self._paddle = paddle
        self._program = program
        self._document = document
        self._names: dict[int, str] = {}
        self._constants: dict[int, Any] = {}
        self._lists: dict[int, list[int]] = {}
        self._counts: Counter[str] = Counter()
        self.feeds: list[str] = []
        self.fetches: list[str] = []
        self._outputs = {
            operands_of(operator)[0]: str(attributes_of(operator)["name"])
            for operator in written_operators(document)
            if kind_of(operator) == "fetch"
        }

    def run(self) -> None:
        """Lower the whole program; raises InputError for an operator that is not known here."""
        for operator in written_operators(self._document):
            self.lower(operator)

    def lower(self, operator: Document) -> None:
        """Append what one operator, a weight or an input means."""
        kind = kind_of(operator)
        if not self._program.current_block().idx:
            self._counts[kind] += 1
        if kind in _SAME:
            self._lower_same(operator, _SAME[kind])
        elif kind in _WRITERS:
            _WRITERS[kind](self, operator)
        else:
            raise unknown(operator, "the old IR's form of it is not known here")

    def emit(
        self,
        kind: str,
        operator: Document,
        inputs: Mapping[str, list[str]],
        outputs: Mapping[str, list[str]],
        **values: Any,
    ) -> None:
        """Append an old-IR operator.

        Args:
            operator: what it stands for; its results get the shapes that PIR knows.
            outputs: names; those that are not declared are results that nobody reads.
        """
        block = self._program.current_block()
        for name in (name for names in outputs.values() for name in names):
            if block._find_var_recursive(name) is None:
                block.create_var(name=name, dtype="float32", persistable=False)
        block.append_op(type=kind, inputs=dict(inputs), outputs=dict(outputs), attrs=values)
        for number, _, shape in results_of(operator):
            if shape is not None and number in self._names:
                block._var_recursive(self._names[number]).desc.set_shape(shape)

    def declare(self, operator: Document, index: int = 0) -> str:
        """Name and declare a value that an operator writes."""
        number, element, _ = results_of(operator)[index]
        return self._declare(number, self._outputs.get(number) or self._named(operator, index), element)

    def _named(self, operator: Document, index: int) -> str:
        """Bodies of loops stand in the middle of what is counted, so their values have their numbers."""
        kind = kind_of(operator)
        if self._program.current_block().idx:
            return f"inner.{kind}.{results_of(operator)[index][0]}"
        return f"p2o.pd_op.{kind}.{self._counts[kind] - 1}.{index}"

    def declare_list(self, operator: Document, count: int) -> list[str]:
        """Name and declare the values of a list that an operator writes."""
        number, element, _ = results_of(operator)[0]
        items = [-(_LIST * number + place) for place in range(count)]
        self._lists[number] = items
        stem = self._named(operator, 0)
        return [self._declare(item, f"{stem}.part{index}", element) for index, item in enumerate(items)]

    def _declare(self, number: int, name: str, element: str) -> str:
        self._program.current_block().create_var(name=name, dtype=_TYPES[element], persistable=False)
        self._names[number] = name
        return name

    def names(self, number: int) -> list[str]:
        """The variables of a value, or of a list of values; none for an operand that is left out."""
        numbers = self._lists.get(number, [number] if number else [])
        return [self._names[item] for item in numbers]

    def operand(self, operator: Document, index: int) -> list[str]:
        return self.names(operands_of(operator)[index])

    def constant(self, operator: Document, index: int) -> Any:
        """The number, or list of numbers, that an operand always is; None where it is computed."""
        return self._constants.get(operands_of(operator)[index])

    def integers(self, operator: Document, index: int) -> list[int]:
        """A list of integers that an operand always is; raises InputError where it is computed."""
        value = self.constant(operator, index)
        if value is None:
            raise unknown(operator, f"its operand {index} must be constant")
        return [int(item) for item in value] if isinstance(value, list) else [int(value)]

    def remember(self, operator: Document, value: Any) -> None:
        """Note what the result of an operator always is."""
        self._constants[results_of(operator)[0][0]] = value

    def element_name(self, name: str) -> str:
        """Name of the element type of a variable."""
        variable = self._program.current_block()._var_recursive(name)
        return str(self._paddle.base.data_feeder.convert_dtype(variable.dtype))

    def element_type(self, name: str) -> int:
        """Paddle's number of an element type, by its name."""
        return int(self._paddle.base.framework.convert_np_dtype_to_dtype_(name))

    def add_weight(self, operator: Document) -> None:
        """A weight under its own name; what is not trained (statistics of batch norm, masks) is no parameter."""
        ((number, element, shape),) = results_of(operator)
        name, (_, _, trained) = operator["A"][3], operator["OA"]
        block, kind = self._program.global_block(), _TYPES[element]
        if trained:
            block.create_parameter(name=name, shape=shape, dtype=kind, trainable=True)
        else:
            block.create_var(name=name, shape=shape, dtype=kind, persistable=True, stop_gradient=True)
        self._names[number] = name

    def add_input(self, operator: Document) -> None:
        values = attributes_of(operator)
        name = str(values["name"])
        block = self._program.global_block()
        variable = block.create_var(name=name, shape=values["shape"], dtype=values["dtype"], is_data=True)
        variable.desc.set_need_check_feed(True)
        self.feeds.append(name)
        self._names[results_of(operator)[0][0]] = name

    def add_output(self, operator: Document) -> None:
        name = str(attributes_of(operator)["name"])
        (source,) = self.operand(operator, 0)
        if source != name:  # an input or a weight, what a loop carries, or one value under two names
            self.emit("assign", operator, {"X": [source]}, {"Out": [name]})
        self.fetches.append(name)

    def gather_list(self, operator: Document) -> None:
        """`combine` makes a list of values."""
        self._lists[results_of(operator)[0][0]] = operands_of(operator)

    def part_list(self, operator: Document) -> None:
        """`split` takes a list apart again."""
        items = self._lists[operands_of(operator)[0]]
        for (number, _, _), item in zip(results_of(operator), items, strict=True):
            self._names[number] = self._names[item]

    def write_loop(self, operator: Document) -> None:
        """`while`: the first operand, and the first value that its body gives, says whether to go on."""
        arguments, (body,) = region_arguments(operator), inner_operators(operator)

        def step(_: Any, *given: Any) -> list[Any]:
            self._names |= {number: value.name for number, value in zip(arguments, given, strict=True)}
            return self._lower_region(body)

        carried = [self._copied(number) for number in operands_of(operator)]
        _, *found = self._paddle.static.nn.while_loop(lambda goes_on, *_: goes_on, step, carried)
        self._name_results(operator, found)

    def write_branch(self, operator: Document) -> None:
        """`if`: both regions are computed, they have no effect but their results, and one is chosen."""
        taken, other = ([value.name for value in self._lower_region(inner)] for inner in inner_operators(operator))
        for index, (one, two) in enumerate(zip(taken, other, strict=True)):
            inputs = {"Condition": self.operand(operator, 0), "X": [one], "Y": [two]}
            self.emit("where", operator, inputs, {"Out": [self.declare(operator, index)]})

    def _lower_region(self, operators: list[Document]) -> list[Any]:
        *inner, last = operators
        for operator in inner:
            self.lower(operator)
        return [self._variable(number) for number in operands_of(last)]

    def _variable(self, number: int) -> Any:
        return self._program.current_block()._var_recursive(self._names[number])

    def _copied(self, number: int) -> Any:
        """A loop writes into what it carries, which others may read."""
        return self._paddle.assign(self._variable(number))

    def _name_results(self, operator: Document, variables: list[Any]) -> None:
        numbers = [number for number, _, _ in results_of(operator)]
        self._names |= {number: value.name for number, value in zip(numbers, variables, strict=True)}

    def _lower_same(self, operator: Document, old: Renamed) -> None:
        operands = zip(old.inputs, operands_of(operator), strict=True)
        inputs = {slot: self.names(number) for slot, number in operands if number}
        outputs = {slot: [self.declare(operator, index)] for index, slot in enumerate(old.outputs)}
        result = outputs[old.outputs[0]][0]
        outputs |= {slot: [f"{result}.{slot}"] for slot in old.unused}
        values = {old.attributes.get(key, key): value for key, value in attributes_of(operator).items()}
        self.emit(old.kind, operator, inputs, outputs, **{**values, **old.fixed})


Writer = Callable[[Lowering, Document], None]


def unknown_kinds(document: Document) -> list[str]:
    """Kinds of operators of a program, those inside of loops and branches included, that are not known here."""
    kinds = {kind_of(operator) for operator in _all_operators(written_operators(document))}
    return sorted(kinds - set(_SAME) - set(_WRITERS) - {"yield"})


def _all_operators(operators: list[Document]) -> Iterator[Document]:
    for operator in operators:
        yield operator
        for inner in inner_operators(operator):
            yield from _all_operators(inner)


def unknown(operator: Document, why: str) -> InputError:
    """The error about an operator that cannot be carried over."""
    place = str(attributes_of(operator).get("struct_name", "")) if kind_of(operator) != "p" else ""
    return InputError(f"PIR operator {kind_of(operator)} {place}".strip() + f": {why}")


def _write_full(lowering: Lowering, operator: Document) -> None:
    """One number, repeated."""
    values = attributes_of(operator)
    if values["shape"] in ([], [1]):  # every number is written as a float
        whole = values["dtype"].startswith("int")
        lowering.remember(operator, int(values["value"]) if whole else values["value"])
    _fill(lowering, operator, values["value"], values["dtype"], shape=values["shape"])


def _write_full_with_tensor(lowering: Lowering, operator: Document) -> None:
    value = lowering.constant(operator, 0)
    if value is None:
        raise unknown(operator, "its value must be constant")
    _fill(lowering, operator, value, attributes_of(operator)["dtype"], lowering.operand(operator, 1))


def _fill(
    lowering: Lowering, operator: Document, value: float, kind: str, sizes: list[str] | None = None, **values: Any
) -> None:
    inputs = {"ShapeTensor": sizes} if sizes else {}
    result = {"Out": [lowering.declare(operator)]}
    # The attribute `value` is a float, which cannot hold every int64.
    text = str(int(value)) if kind.startswith("int") else ""
    lowering.emit(
        "fill_constant",
        operator,
        inputs,
        result,
        value=float(value),
        str_value=text,
        dtype=lowering.element_type(kind),
        **values,
    )


def _write_full_int_array(lowering: Lowering, operator: Document) -> None:
    values = attributes_of(operator)
    lowering.remember(operator, values["value"])
    if values["value"]:
        _assign_values(lowering, operator, [len(values["value"])], values["value"], values["dtype"])


def _write_assign_value(lowering: Lowering, operator: Document) -> None:
    values = attributes_of(operator)
    _assign_values(lowering, operator, values["shape"], values["values"], values["dtype"])


def _assign_values(lowering: Lowering, operator: Document, shape: list[int], values: list[Any], kind: str) -> None:
    lowering.emit(
        "assign_value",
        operator,
        {},
        {"Out": [lowering.declare(operator)]},
        shape=shape,
        dtype=lowering.element_type(kind),
        values=[float(value) if kind.startswith("float") else int(value) for value in values],
    )


def _with_numbers(kind: str, numbers: Mapping[str, int]) -> Writer:
    """An operator of one tensor with numbers that are attributes in the old IR.

    Args:
        numbers: place of the operand by attribute.
    """

    def write(lowering: Lowering, operator: Document) -> None:
        values = attributes_of(operator)
        for name, index in numbers.items():
            values[name] = lowering.constant(operator, index)
            if values[name] is None:
                raise unknown(operator, f"its {name} must be constant")
        if isinstance(values.get("dtype"), str):
            values["dtype"] = lowering.element_type(values["dtype"])
        lowering.emit(
            kind, operator, {"X": lowering.operand(operator, 0)}, {"Out": [lowering.declare(operator)]}, **values
        )

    return write


def _with_sizes(kind: str, attribute: str, slot: str, *unused: str) -> Writer:
    """An operator of a tensor and a list of integers: an attribute in the old IR, or a slot where it is computed."""

    def write(lowering: Lowering, operator: Document) -> None:
        inputs, values = {"X": lowering.operand(operator, 0)}, {}
        if lowering.constant(operator, 1) is None:
            inputs[slot] = lowering.operand(operator, 1)
        else:
            values[attribute] = lowering.integers(operator, 1)
        result = lowering.declare(operator)
        outputs = {"Out": [result]} | {name: [f"{result}.{name}"] for name in unused}
        lowering.emit(kind, operator, inputs, outputs, **values)

    return write


def _write_batch_norm(lowering: Lowering, operator: Document) -> None:
    """Mean and variance are written where they are read."""
    values = attributes_of(operator)
    data, mean, variance, scale, bias = (lowering.operand(operator, index) for index in range(5))
    result = lowering.declare(operator)
    outputs = {"Y": [result], "MeanOut": mean, "VarianceOut": variance}
    outputs |= {slot: [f"{result}.{slot}"] for slot in ("SavedMean", "SavedVariance")}
    inputs = {"X": data, "Mean": mean, "Variance": variance, "Scale": scale, "Bias": bias}
    lowering.emit("batch_norm", operator, inputs, outputs, **values, data_layout=values["data_format"])


def _write_conv_transpose(lowering: Lowering, operator: Document) -> None:
    inputs = {"Input": lowering.operand(operator, 0), "Filter": lowering.operand(operator, 1)}
    values = {**attributes_of(operator), "output_size": lowering.integers(operator, 2)}
    lowering.emit(kind_of(operator), operator, inputs, {"Output": [lowering.declare(operator)]}, **values)


def _write_pool(lowering: Lowering, operator: Document) -> None:
    values = {**attributes_of(operator), "ksize": lowering.integers(operator, 1)}
    inputs = {"X": lowering.operand(operator, 0)}
    lowering.emit("pool2d", operator, inputs, {"Out": [lowering.declare(operator)]}, **values)


def _write_shape(lowering: Lowering, operator: Document) -> None:
    """The old operator gives int32."""
    result = lowering.declare(operator)
    lowering.emit("shape", operator, {"Input": lowering.operand(operator, 0)}, {"Out": [f"{result}.int32"]})
    _cast(lowering, operator, f"{result}.int32", "int32", result, "int64")


def _write_cast(lowering: Lowering, operator: Document) -> None:
    (source,) = lowering.operand(operator, 0)
    before = lowering.element_name(source)
    _cast(lowering, operator, source, before, lowering.declare(operator), attributes_of(operator)["dtype"])


def _cast(lowering: Lowering, operator: Document, source: str, before: str, result: str, after: str) -> None:
    types = {"in_dtype": lowering.element_type(before), "out_dtype": lowering.element_type(after)}
    lowering.emit("cast", operator, {"X": [source]}, {"Out": [result]}, **types)


def _write_arange(lowering: Lowering, operator: Document) -> None:
    """The old operator counts in the type of what it reads."""
    kind = attributes_of(operator)["dtype"]
    result = lowering.declare(operator)
    inputs = {}
    for index, slot in enumerate(("Start", "End", "Step")):
        (source,) = lowering.operand(operator, index)
        inputs[slot] = [f"{result}.{slot}"]
        _cast(lowering, operator, source, lowering.element_name(source), inputs[slot][0], kind)
    lowering.emit("range", operator, inputs, {"Out": [result]})


def _write_slice(lowering: Lowering, operator: Document) -> None:
    values = attributes_of(operator)
    inputs = {"Input": lowering.operand(operator, 0)}
    for index, key, slot in ((1, "starts", "StartsTensor"), (2, "ends", "EndsTensor")):
        if lowering.constant(operator, index) is None:
            inputs[slot] = lowering.operand(operator, index)
        else:
            values[key] = lowering.integers(operator, index)
    lowering.emit("slice", operator, inputs, {"Out": [lowering.declare(operator)]}, **values)


def _write_set_value(lowering: Lowering, operator: Document) -> None:
    """Writes into a part of a tensor."""
    values = attributes_of(operator)
    data, value, starts, ends, steps = (lowering.operand(operator, index) for index in range(5))
    if len(values["axes"]) != 1:
        raise unknown(operator, "only a part along one axis is supported")
    inputs = {"Input": data, "ValueTensor": value}
    inputs |= {"StartsTensorList": starts, "EndsTensorList": ends, "StepsTensorList": steps}
    kind = lowering.element_type(lowering.element_name(data[0]))
    lowering.emit("set_value", operator, inputs, {"Out": [lowering.declare(operator)]}, **values, dtype=kind, shape=[])


def _write_concat(lowering: Lowering, operator: Document) -> None:
    inputs, result = {"X": lowering.operand(operator, 0)}, {"Out": [lowering.declare(operator)]}
    lowering.emit("concat", operator, inputs, result, axis=lowering.integers(operator, 1)[0])


def _write_split(lowering: Lowering, operator: Document) -> None:
    """A tensor into parts of given sizes, or into equal ones. The built-in dialect calls it so, too, to part a list."""
    if operator["#"].startswith("0."):
        return lowering.part_list(operator)
    values = attributes_of(operator)
    sections = [] if "num" in values else lowering.integers(operator, 1)
    axis = lowering.integers(operator, -1)[0]
    parts = lowering.declare_list(operator, values.get("num") or len(sections))
    inputs = {"X": lowering.operand(operator, 0)}
    number = values.get("num", 0)
    lowering.emit("split", operator, inputs, {"Out": parts}, axis=axis, num=number, sections=sections)


def _write_unbind(lowering: Lowering, operator: Document) -> None:
    parts = lowering.declare_list(operator, list_length(operator))
    lowering.emit("unbind", operator, {"X": lowering.operand(operator, 0)}, {"Out": parts}, **attributes_of(operator))


def _write_einsum(lowering: Lowering, operator: Document) -> None:
    """Beside the product stand lists, a value for each operand, that only its gradient reads."""
    operands, result = lowering.operand(operator, 0), lowering.declare(operator)
    unread = {slot: [f"{result}.{slot}{place}" for place in range(len(operands))] for slot in ("InnerCache", "XShape")}
    lowering.emit("einsum", operator, {"Operands": operands}, {"Out": [result]} | unread, **attributes_of(operator))


def _write_topk(lowering: Lowering, operator: Document) -> None:
    values = {**attributes_of(operator), "k": lowering.integers(operator, 1)[0]}
    outputs = {"Out": [lowering.declare(operator)], "Indices": [lowering.declare(operator, 1)]}
    lowering.emit("top_k_v2", operator, {"X": lowering.operand(operator, 0)}, outputs, **values)


def _write_dropout(lowering: Lowering, operator: Document) -> None:
    """`downgrade_in_infer` scales at inference."""
    values = attributes_of(operator)
    result = lowering.declare(operator)
    lowering.emit(
        "dropout",
        operator,
        {"X": lowering.operand(operator, 0)},
        {"Out": [result], "Mask": [f"{result}.Mask"]},
        is_test=True,
        dropout_implementation=values["mode"],
        dropout_prob=float(lowering.constant(operator, 2)),
    )


def _reduction(kind: str) -> Writer:
    def write(lowering: Lowering, operator: Document) -> None:
        values = attributes_of(operator)
        axes = values["axis"] if "axis" in values else lowering.integers(operator, 1)
        inputs, result = {"X": lowering.operand(operator, 0)}, {"Out": [lowering.declare(operator)]}
        lowering.emit(kind, operator, inputs, result, dim=axes or [0], keep_dim=values["keepdim"], reduce_all=not axes)

    return write


def _binary(kind: str) -> Renamed:
    return Renamed(kind, ("X", "Y"), fixed={"axis": -1})


_CONV = ("Input", "Filter")
_SAME: dict[str, Renamed] = {
    "add": _binary("elementwise_add"),
    "subtract": _binary("elementwise_sub"),
    "multiply": _binary("elementwise_mul"),
    "divide": _binary("elementwise_div"),
    "floor_divide": _binary("elementwise_floordiv"),
    "remainder": _binary("elementwise_mod"),
    "maximum": _binary("elementwise_max"),
    "minimum": _binary("elementwise_min"),
    "elementwise_pow": _binary("elementwise_pow"),
    "equal": _binary("equal"),
    "not_equal": _binary("not_equal"),
    "less_than": _binary("less_than"),
    "less_equal": _binary("less_equal"),
    "greater_than": _binary("greater_than"),
    "greater_equal": _binary("greater_equal"),
    "logical_and": _binary("logical_and"),
    "logical_or": _binary("logical_or"),
    "bitwise_and": Renamed("bitwise_and", ("X", "Y")),
    "bmm": Renamed("bmm", ("X", "Y")),
    "conv2d": Renamed("conv2d", _CONV, ("Output",)),
    "depthwise_conv2d": Renamed("depthwise_conv2d", _CONV, ("Output",)),
    "embedding": Renamed("lookup_table_v2", ("Ids", "W"), attributes={"sparse": "is_sparse"}),
    "flatten": Renamed("flatten_contiguous_range", unused=("XShape",)),
    "gather_nd": Renamed("gather_nd", ("X", "Index")),
    "grid_sample": Renamed("grid_sampler", ("X", "Grid"), ("Output",)),
    "hardswish": Renamed("hard_swish", fixed={"threshold": 6.0, "scale": 6.0, "offset": 3.0}),
    "hardsigmoid": Renamed("hard_sigmoid"),
    "layer_norm": Renamed("layer_norm", ("X", "Scale", "Bias"), ("Y", "Mean", "Variance")),
    "leaky_relu": Renamed("leaky_relu", attributes={"negative_slope": "alpha"}),
    "masked_fill": Renamed("masked_fill", ("x", "mask", "value"), ("out",)),
    "matmul": Renamed("matmul_v2", ("X", "Y"), attributes={"transpose_x": "trans_x", "transpose_y": "trans_y"}),
    "multiclass_nms3": Renamed("multiclass_nms3", ("BBoxes", "Scores", "RoisNum"), ("Out", "Index", "NmsRoisNum")),
    "nearest_interp": Renamed("nearest_interp_v2", ("X", "OutSize", "SizeTensor", "Scale")),
    "bilinear_interp": Renamed("bilinear_interp_v2", ("X", "OutSize", "SizeTensor", "Scale")),
    "pow": Renamed("pow", attributes={"y": "factor"}),
    "repeat_interleave": Renamed("repeat_interleave", attributes={"repeats": "Repeats", "axis": "dim"}),
    "stack": Renamed("stack", outputs=("Y",)),
    "swish": Renamed("swish", fixed={"beta": 1.0}),
    "transpose": Renamed("transpose2", attributes={"perm": "axis"}, unused=("XShape",)),
    "where": Renamed("where", ("Condition", "X", "Y")),
    **{kind: Renamed(kind) for kind in ("abs", "assign", "bitwise_not", "erf", "exp", "flip", "floor", "gelu")},
    **{kind: Renamed(kind) for kind in ("log", "logical_not", "relu", "relu6", "rsqrt", "sigmoid", "silu")},
    **{kind: Renamed(kind) for kind in ("softmax", "sqrt", "tanh")},
}
"""Operators whose operands and attributes are the same, by PIR's names."""

_WRITERS: dict[str, Writer] = {
    "p": Lowering.add_weight,
    "data": Lowering.add_input,
    "fetch": Lowering.add_output,
    "combine": Lowering.gather_list,
    "while": Lowering.write_loop,
    "if": Lowering.write_branch,
    "all": _reduction("reduce_all"),
    "any": _reduction("reduce_any"),
    "max": _reduction("reduce_max"),
    "mean": _reduction("reduce_mean"),
    "min": _reduction("reduce_min"),
    "sum": _reduction("reduce_sum"),
    "arange": _write_arange,
    "argmax": _with_numbers("arg_max", {"axis": 1}),
    "assign_value_": _write_assign_value,
    "batch_norm_": _write_batch_norm,
    "cast": _write_cast,
    "clip": _with_numbers("clip", {"min": 1, "max": 2}),
    "concat": _write_concat,
    "conv2d_transpose": _write_conv_transpose,
    "cumsum": _with_numbers("cumsum", {"axis": 1}),
    "dropout": _write_dropout,
    "einsum": _write_einsum,
    "expand": _with_sizes("expand_v2", "shape", "Shape"),
    "full": _write_full,
    "full_int_array": _write_full_int_array,
    "full_like": _with_numbers("fill_any_like", {"value": 1}),
    "full_with_tensor": _write_full_with_tensor,
    "one_hot": _with_numbers("one_hot_v2", {"depth": 1}),
    "pad": _with_numbers("pad", {"pad_value": 1}),
    "pool2d": _write_pool,
    "reshape": _with_sizes("reshape2", "shape", "Shape", "XShape"),
    "scale": _with_numbers("scale", {"scale": 1}),
    "set_value_with_tensor_": _write_set_value,
    "shape64": _write_shape,
    "slice": _write_slice,
    "split": _write_split,
    "split_with_num": _write_split,
    "squeeze": _with_sizes("squeeze2", "axes", "AxesTensor", "XShape"),
    "tile": _with_sizes("tile", "repeat_times", "RepeatTimes"),
    "topk": _write_topk,
    "unbind": _write_unbind,
    "unsqueeze": _with_sizes("unsqueeze2", "axes", "AxesTensor", "XShape"),
}
"""Operators that differ in more than names."""
