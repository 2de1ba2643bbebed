"""What a PIR program says: the format of `inference.json`, which Paddle 3 writes in place of `inference.pdmodel`.

A program is JSON: operators in order, each with a kind (`1.conv2d`, `p` for a weight), attributes `A` (name `N`,
value `AT.D`), operands `I` and results `O`. A value is known by its number `%`; its type `TT` holds the shape.
Weights bear names, and `inference.pdiparams` holds them in the sorted order of these names.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]


@dataclass(frozen=True)
class PirOperator:
    """One operator.

    Attributes:
        kind: without the dialect, for example `conv2d`.
        place: where it stands in the network's code, as `struct_name` says; empty where nothing says it.
        result: number of its first value, None where it has none.
    """

    kind: str
    place: str
    result: int | None


def check_pir(document: Document) -> None:
    """Raises KeyError, TypeError or ValueError where a JSON document is no PIR program."""
    if document["base_code"]["magic"] != "pir" or not _written(document):
        raise ValueError("no PIR program")


def all_kinds(document: Document) -> set[str]:
    """Kinds of all operators, those inside of loops and branches among them."""
    waiting: list[Any] = [document["program"]["regions"]]
    kinds: set[str] = set()
    while waiting:
        for region in waiting.pop():
            for block in region["blocks"]:
                kinds.update(_kind(operator) for operator in block["ops"])
                waiting += [operator["regions"] for operator in block["ops"] if "regions" in operator]
    return kinds


def parameter_shapes(document: Document) -> dict[str, tuple[int, ...]]:
    """Shape of each weight by its name, in the order of `inference.pdiparams`."""
    weights = [operator for operator in _written(document) if operator["#"] == "p"]
    return dict(sorted((operator["A"][3], tuple(operator["O"]["TT"]["D"][1])) for operator in weights))


def operators(document: Document) -> list[PirOperator]:
    """The operators of the main block, in order, weights left out."""
    return [_operator(operator) for operator in _written(document) if operator["#"] != "p"]


def written_operators(document: Document) -> list[Document]:
    """The operators of the main block as they are written, weights among them."""
    return _written(document)


def inner_operators(operator: Document) -> list[list[Document]]:
    """The operators of each region of a loop or a branch, as they are written."""
    return [region["blocks"][0]["ops"] for region in operator.get("regions", [])]


def region_arguments(operator: Document) -> list[int]:
    """Numbers under which the body of a loop knows what it was given."""
    return [argument["#"] for argument in operator["regions"][0]["blocks"][0]["args"]]


def kind_of(operator: Document) -> str:
    """Kind of a written operator without the dialect; `p` for a weight."""
    return _kind(operator)


def operands_of(operator: Document) -> list[int]:
    """Numbers of what a written operator reads; 0 where an optional operand is left out."""
    return [value["%"] for value in operator["I"]]


def results_of(operator: Document) -> list[tuple[int, str, list[int] | None]]:
    """Number, element type (`f32`, `i64`, `bool`, ...) and shape (-1: open) of what a written operator writes.

    A list of values has the type of its first one, and no shape.
    """
    return [(value["%"], *_type_of(value["TT"])) for value in _results(operator)]


def list_length(operator: Document) -> int:
    """How many values the list holds that a written operator writes."""
    return len(_results(operator)[0]["TT"]["D"])


def attributes_of(operator: Document) -> dict[str, Any]:
    """Attributes of a written operator as plain values."""
    return {attribute["N"]: _plain(attribute["AT"]) for attribute in operator["A"]}


def with_fetches(document: Document, kinds: Collection[str]) -> tuple[Document, list[PirOperator]]:
    """A copy of a program that also fetches the first value of every operator of these kinds.

    Paddle's executor cannot fetch inner values of a PIR program that was loaded, so the program itself has to.

    Returns:
        The copy, whose fetched values stand behind those of the original, and the operators they are of.
    """
    traced = copy.deepcopy(document)
    written = _written(traced)
    fetches = [operator for operator in written if _kind(operator) == "fetch"]
    number = max(value["%"] for operator in written for value in _results(operator))
    found: list[PirOperator] = []
    for operator in list(written):
        if operator["#"] == "p" or _kind(operator) not in kinds:
            continue
        number += 1
        written.append(_fetch(fetches[0], operator["O"][0], number, len(fetches) + len(found)))
        found.append(_operator(operator))
    return traced, found


def _fetch(pattern: Document, value: Document, number: int, column: int) -> Document:
    fetch = copy.deepcopy(pattern)
    fetch["I"] = [{"%": value["%"]}]
    fetch["O"] = [{"%": number, "TT": value["TT"]}]
    for attribute in fetch["A"]:
        if attribute["N"] in ("name", "col"):
            attribute["AT"]["D"] = {"name": f"fetch_name_{column}", "col": column}[attribute["N"]]
    return fetch


def _written(document: Document) -> list[Document]:
    written: list[Document] = document["program"]["regions"][0]["blocks"][0]["ops"]
    return written


def _operator(operator: Document) -> PirOperator:
    places = [attribute["AT"]["D"] for attribute in operator["A"] if attribute["N"] == "struct_name"]
    results = _results(operator)
    return PirOperator(_kind(operator), places[0] if places else "", results[0]["%"] if results else None)


def _kind(operator: Document) -> str:
    return str(operator["#"]).partition(".")[2] or str(operator["#"])


def _results(operator: Document) -> list[Document]:
    results = operator["O"]
    return results if isinstance(results, list) else [results]


def _type_of(kind: Document) -> tuple[str, list[int] | None]:
    listed = kind["#"].endswith("t_vec")
    element, shape = (kind["D"][0] if listed else kind)["D"][:2]
    return str(element["#"]).rpartition("_")[2], None if listed else list(shape)


def _plain(value: Any) -> Any:
    """The value of an attribute: `{"#": type, "D": value}`, where a list holds such pairs again."""
    if not isinstance(value, dict):
        return value
    inner = value.get("D")
    return [_plain(item) for item in inner] if isinstance(inner, list) else inner
