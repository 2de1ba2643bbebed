"""Formulas: PaddleX's processing, BLEU, labels, generated formulas."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import yaml
from client_code import code_for, run_clients
from onnx import TensorProto, helper

from calib_data.generator import write_formulas
from calib_data.registry import DatasetFolder, resolve_dataset
from eval.dataset import read_dataset, read_image
from eval.formula_metric import latex_tokens
from eval.metric import make_metric
from eval.statistics import estimate_drop
from quant.errors import InputError
from quant.recipe import load_recipe
from quant.runtime import open_session
from quant.task import FormulaPrediction, make_task

MODEL = "PP-FormulaNet-S"
WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    *(f"\\{name}" for name in ("frac", "alpha", "sum")),
    *"{}abcxy+-=^_0123456789",
]


def tokenizer() -> dict[str, Any]:
    """A tokenizer as PaddleX embeds it in inference.yml."""
    special = [{"id": i, "content": w, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False} for i, w in enumerate(WORDS[:4])]  # fmt: skip
    model = {"type": "WordLevel", "vocab": {word: index for index, word in enumerate(WORDS)}, "unk_token": "<unk>"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": special, **parts, "model": model}


def inference_yml(name: str = MODEL) -> dict[str, Any]:
    document = dict(load_recipe(name).inference)
    files = {"fast_tokenizer_file": tokenizer(), "tokenizer_config_file": {}}
    document["PostProcess"] = {"name": "UniMERNetDecode", "character_dict": files}
    return document


def patch_model(file: Path, side: int) -> None:
    """A model with FormulaNet's contract whose tokens depend on the picture: the brightest place of each strip."""
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 1, 9, len(WORDS)])
    nodes = [
        helper.make_node("Resize", ["x", "", "", "sizes"], ["small"], mode="nearest"),
        helper.make_node("Squeeze", ["small", "axis"], ["strips"]),
        helper.make_node("ArgMin", ["strips"], ["ids"], axis=2, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "patches",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 1, side, side])],
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [None, 9])],
        [sizes, helper.make_tensor("axis", TensorProto.INT64, [1], [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)


@pytest.mark.parametrize(("name", "side"), [("PP-FormulaNet-S", 384), ("PP-FormulaNet-L", 768)])
def test_our_path_equals_the_clients_of_the_card(name: str, side: int, tmp_path: Path) -> None:
    inference = inference_yml(name)
    folder = tmp_path / "deploy" / "artifact"
    folder.mkdir(parents=True)
    (folder / "inference.yml").write_text(yaml.safe_dump(inference, sort_keys=False), encoding="utf-8")
    patch_model(folder / "inference.onnx", side)
    write_formulas(tmp_path / "set", 4, seed=1)
    images = [read_image(path) for path in sorted((tmp_path / "set" / "images").iterdir())]
    left = run_clients(code_for("onnxruntime", "formula_recognition", name), folder, images[-1])
    client = left["PaddleX"]["model"]
    adapter, session = make_task("formula_recognition", inference, name), open_session("onnxruntime", folder, 1)
    texts = set()
    for image in images:
        prepared = adapter.preprocess(image)
        assert prepared.inputs["x"].shape == (1, 1, side, side)
        assert prepared.inputs["x"].dtype == np.float32
        formula = adapter.postprocess(session.run(prepared.inputs), prepared.context)
        assert isinstance(formula, FormulaPrediction)
        assert formula.latex == next(iter(client.predict(image)))["rec_formula"]
        texts.add(formula.latex)
    assert len(texts) == 4  # the outputs do depend on the picture
    assert [names["result"]["rec_formula"] for names in left.values()] == [formula.latex] * 2


def test_reading_stops_at_the_end_token() -> None:
    adapter = make_task("formula_recognition", inference_yml(), MODEL)
    ids = [0, *(WORDS.index(word) for word in ("\\frac", "{", "a", "}", "{", "2", "}")), 2, WORDS.index("x"), 1]
    assert adapter.postprocess([np.array([ids], dtype=np.int64)], None).latex == r"\frac{a}{2}"  # type: ignore


@pytest.mark.parametrize("characters", [None, {"tokenizer_config_file": {}}])
def test_without_a_tokenizer_the_message_says_where_it_is_published(characters: Any) -> None:
    document = {**inference_yml(), "PostProcess": {"name": "UniMERNetDecode", "character_dict": characters}}
    with pytest.raises(InputError, match="whole folder of the official archive"):
        make_task("formula_recognition", document, MODEL)


def test_a_damaged_tokenizer() -> None:
    files = {"fast_tokenizer_file": {"version": "1.0"}}
    document = {**inference_yml(), "PostProcess": {"name": "UniMERNetDecode", "character_dict": files}}
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        make_task("formula_recognition", document, MODEL)


@pytest.mark.parametrize(
    ("latex", "tokens"),
    [
        (r"\frac { a } {b}", [r"\frac", "{", "a", "}", "{", "b", "}"]),
        (r"$$ x^2 $$", ["x", "^", "2"]),
        (r"\[ x \]", ["x"]),
        (r"\{ \alpha_{12}", [r"\{", r"\alpha", "_", "{", "1", "2", "}"]),
        ("$x", ["$", "x"]),
        (" ", []),
    ],
)
def test_tokens_of_latex(latex: str, tokens: list[str]) -> None:
    assert latex_tokens(latex) == tokens


def score(read: str, true: str) -> list[float]:
    return [float(value) for value in make_metric("bleu").score(FormulaPrediction(read), true)[:4]]


def test_scores_of_one_formula() -> None:
    assert score(r"\frac{a}{b}+1", r"$$ \frac { a } { b } + 1 $$") == [1, 1, 1, 1]
    assert score("x", "x") == [1, 1, 1, 1]  # shorter than the longest n-grams
    assert score("", "x") == [0, 0, 0, 1]
    # Matched n-grams of a b c d against a b c e: 3/4, 2/3, 1/2, and 0 of 1, which sacrebleu smooths to 1/2.
    bleu, exact, similarity, _ = score("abcd", "abce")
    assert bleu == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)
    assert (exact, similarity) == (0, 0.75)


def test_the_mean_judges_and_bleu_of_the_set_is_shown() -> None:
    from sacrebleu.metrics import BLEU

    metric = make_metric("bleu")
    pairs = [("a + b = c", "a + b = d"), (r"\frac { a } { b }", r"\frac { a } { b }"), ("x y z u v", "x y z u w")]
    counts = np.array([metric.score(FormulaPrediction(read), true) for read, true in pairs])
    details = metric.details(counts.sum(axis=0))
    assert metric.aggregate(counts.sum(axis=0)) == details["bleu"] == pytest.approx(100 * counts[:, 0].mean())
    spaced = [[" ".join(latex_tokens(text)) for text in texts] for texts in zip(*pairs, strict=True)]
    expected = BLEU(tokenize="none").corpus_score(spaced[0], [spaced[1]]).score
    assert details["corpus_bleu"] == pytest.approx(expected)
    assert details["exact_match"] == pytest.approx(100 / 3)
    other = counts.copy()
    other[1] = metric.score(FormulaPrediction("y"), pairs[1][1])
    estimate = estimate_drop(metric, counts, other)
    assert estimate.drop_upper95 > estimate.drop > 0
    assert estimate.discordance == pytest.approx(100 / 3)


def formula_set(folder: Path) -> DatasetFolder:
    """Three formulas in the layout of UniMER-Test."""
    (folder / "spe").mkdir(parents=True)
    for index in range(3):
        cv2.imwrite(str(folder / "spe" / f"{index:07}.png"), np.full((20, 30, 3), 90 + index, np.uint8))
    (folder / "spe.txt").write_text("a\n\nc\n", encoding="utf-8")
    return DatasetFolder("unimer", folder, (folder / "spe.txt",), folder, "latex_lines", "test", "none")


def test_lines_belong_to_pictures_in_their_order(tmp_path: Path) -> None:
    data = read_dataset(formula_set(tmp_path))
    assert [(sample.image.name, sample.label) for sample in data.samples] == [
        ("0000000.png", "a"),
        ("0000002.png", "c"),
    ]


def test_lists_of_another_length_are_refused(tmp_path: Path) -> None:
    folder = formula_set(tmp_path)
    (tmp_path / "spe" / "0000001.png").unlink()
    with pytest.raises(InputError, match="3 formulas for the 2 pictures"):
        read_dataset(folder)


@pytest.mark.parametrize("name", ["im2latex_formula", "omnidocbench_formula"])
def test_real_sets_where_they_are_installed(name: str) -> None:
    if not (Path(os.environ.get("QUANT_DATA_HOME", "")) / name).is_dir():
        pytest.skip(f"no {name} in QUANT_DATA_HOME")
    data = read_dataset(resolve_dataset(name, "formula_recognition"))
    assert len(data.broken) <= 2
    assert all(latex_tokens(str(sample.label)) for sample in data.samples)


def test_generated_formulas_are_repeatable(tmp_path: Path) -> None:
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        write_formulas(tmp_path / name, 12, seed)
    first, again, other = (
        {str(p.relative_to(tmp_path / n)): p.read_bytes() for p in sorted((tmp_path / n).rglob("*.*"))}
        for n in ("first", "again", "other")
    )
    assert first == again != other
    data = read_dataset(resolve_dataset(tmp_path / "first", "formula_recognition"))
    assert len(data.samples) == 12
    assert len({sample.label for sample in data.samples}) == 12
