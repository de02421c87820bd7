"""Texts: how they are normalised and identified, and what the language model makes of them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import TextsConfig
from bp_spark.core.errors import PlatformError
from bp_spark.ingest import texts

MODEL = TextsConfig()
ITEMS = (
    "whole milk",
    "skim milk",
    "motor oil",
    "potato chips",
    "tortilla chips",
    "washing powder",
    "laundry detergent",
    "牛奶",
    "a",
    "fluid milk products white only in a carton of one gallon with a screw cap for the whole family and the cat",
)


def normalised(spark: SparkSession, values: list[str | None]) -> list[str | None]:
    rows = spark.createDataFrame(list(enumerate(values)), "n int, text string")
    found = rows.select("n", texts.normalised(F.col("text"))).collect()
    return [row[1] for row in sorted(found)]


def ids(spark: SparkSession, values: list[str | None]) -> list[int | None]:
    rows = spark.createDataFrame(list(enumerate(values)), "n int, text string")
    return [row[1] for row in sorted(rows.select("n", texts.text_id(F.col("text"))).collect())]


def embedded(spark: SparkSession, values: list[str], config: TextsConfig = MODEL) -> dict[str, np.ndarray]:
    rows = spark.createDataFrame(
        [(number, value) for number, value in enumerate(values)], "text_id bigint, text string"
    )
    answers = texts.embed(rows, config).collect()
    assert {row["model_digest"] for row in answers} <= {texts.model_digest(config)}
    return {values[row["text_id"]]: np.array(row["embedding"], np.float64) for row in answers}


@pytest.fixture(scope="module")
def vectors(spark: SparkSession) -> dict[str, np.ndarray]:
    return embedded(spark, list(ITEMS))


# --- normalisation and identity ----------------------------------------------------------------------------------------


def test_case_punctuation_and_space_do_not_matter(spark: SparkSession) -> None:
    same = ["FLUID MILK  WHITE-ONLY", " fluid milk, white only!", "fluid\tmilk\nwhite_only"]
    assert normalised(spark, [*same]) == ["fluid milk white only"] * 3


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("牛奶（低脂）2L", "牛奶 低脂 2l"),
        ("有机，鸡蛋。", "有机 鸡蛋"),
        ("ÄPFEL & Öl", "äpfel öl"),
        ("МОЛОКО 3,2%", "молоко 3 2"),
        ("お茶・コーヒー", "お茶 コーヒー"),
        ("٣ تفاح", "٣ تفاح"),
        ("𠮷野家 🍜 1", "𠮷野家 1"),
    ],
)
def test_letters_and_digits_of_any_script_stay(spark: SparkSession, text: str, plain: str) -> None:
    assert normalised(spark, [text]) == [plain]


@pytest.mark.parametrize("text", ["हिन्दी दूध", "น้ำนม ขวด", "cafe\u0301 noir"], ids=["devanagari", "thai", "decomposed"])
def test_marks_that_belong_to_a_letter_stay(spark: SparkSession, text: str) -> None:
    assert normalised(spark, [text]) == [text]


def test_nothing_left_is_null(spark: SparkSession) -> None:
    assert normalised(spark, [None, "", "   ", "--- !!", "🍜", "❤\ufe0f", "\u0301", "（）"]) == [None] * 8


def test_a_very_long_text_is_cut(spark: SparkSession) -> None:
    assert normalised(spark, ["x" * 5_000]) == ["x" * texts.MAX_CHARACTERS]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(values=["İSTANBUL", "ẞß", "ﬁne", "Ⅻ ½ ²", "\u0000a", "a\u200db", "ΑΣ Σ"])
@given(values=st.lists(st.text(max_size=40), min_size=1, max_size=50))
def test_a_normalised_text_is_normal(spark: SparkSession, values: list[str]) -> None:
    once = normalised(spark, [*values])
    assert normalised(spark, once) == once
    assert all(text is None or text == " ".join(text.split()) != "" for text in once)


def test_an_id_is_that_of_the_text_for_ever(spark: SparkSession) -> None:
    milk, again, tea, nothing = ids(spark, ["fluid milk", "fluid milk", "牛奶", None])
    # pinned: other ids would orphan all embeddings
    assert (milk, tea, nothing) == (-8815811503492930940, 1069007385868088477, None)
    assert again == milk


def test_terms_are_words_pairs_and_runs_of_chinese_characters(spark: SparkSession) -> None:
    rows = spark.createDataFrame([("有机牛奶 coca cola",)], "text string")
    row = rows.select(texts.terms(F.col("text"))).first()
    assert row is not None
    assert len(row[0]) == len(set(row[0]))
    assert {"coca", "cola", "coca cola", "有机牛奶", "有机", "机牛", "牛奶", "有机牛", "机牛奶"} <= set(row[0])
    assert not {"co", "oca", "有奶"} & set(row[0])


def found(spark: SparkSession, *rows: tuple[str, int]) -> DataFrame:
    return spark.createDataFrame([*rows], "text string, ingest_id bigint").repartition(3)


def test_distinct_texts_are_each_there_once_since_they_first_came(spark: SparkSession) -> None:
    delivered = found(spark, ("tea", 3), ("milk", 1), ("tea", 2), ("茶", 2))
    rows = texts.distinct_texts(delivered, None, MODEL).collect()
    assert {row["text"]: row["ingest_id"] for row in rows} == {"tea": 2, "milk": 1, "茶": 2}
    by_text = {row["text"]: row["text_id"] for row in rows}
    assert [by_text[text] for text in ("tea", "milk", "茶")] == ids(spark, ["tea", "milk", "茶"])
    assert len(rows) == 3


def test_words_that_tell_of_price_are_counted_once_each(spark: SparkSession) -> None:
    config = TextsConfig(cheap_words=("cheap", "便宜", "on sale"), premium_words=("Luxury",))
    rows = found(spark, ("cheap tea on sale cheap", 1), ("便宜的手机", 1), ("luxury cheapness", 1), ("tea", 1))
    counted = texts.distinct_texts(rows, None, config).collect()
    assert {row["text"]: (row["cheap_words"], row["premium_words"], row["brand_words"]) for row in counted} == {
        "cheap tea on sale cheap": (2, 0, 0),
        "便宜的手机": (1, 0, 0),
        "luxury cheapness": (0, 1, 0),
        "tea": (0, 0, 0),
    }


def test_no_words_of_price_count_none(spark: SparkSession) -> None:
    config = TextsConfig(cheap_words=(), premium_words=())
    (row,) = texts.distinct_texts(found(spark, ("cheap luxury", 1)), None, config).collect()
    assert (row["cheap_words"], row["premium_words"]) == (0, 0)


def test_brands_count_in_texts_that_came_when_they_were_known(spark: SparkSession) -> None:
    brands = spark.createDataFrame([("coca cola", 2), ("tea", 1), ("茅台", 1)], "brand string, known_from bigint")
    rows = found(spark, ("coca cola tea", 2), ("coca cola", 1), ("贵州茅台酒", 1), ("cola", 3))
    counted = texts.distinct_texts(rows, brands, MODEL).collect()
    assert {row["text"]: row["brand_words"] for row in counted} == {
        "coca cola tea": 2,
        "coca cola": 0,
        "贵州茅台酒": 1,
        "cola": 0,
    }


def test_only_texts_that_this_model_has_not_read_are_unread(spark: SparkSession) -> None:
    known = spark.createDataFrame([(1, "tea"), (2, "milk"), (3, "oil")], "text_id bigint, text string")
    read = spark.createDataFrame([(1, "new"), (2, "old"), (9, "new")], "text_id bigint, model_digest string")
    assert sorted(row["text"] for row in texts.unread(known, read, "new").collect()) == ["milk", "oil"]
    assert texts.unread(known, read, "another").count() == 3
    assert texts.unread(known.filter("text_id = 1"), read, "new").isEmpty()


# --- embeddings --------------------------------------------------------------------------------------------------------


def test_each_text_gets_one_vector_of_unit_length(vectors: dict[str, np.ndarray]) -> None:
    assert set(vectors) == set(ITEMS)
    assert {len(vector) for vector in vectors.values()} == {384}
    np.testing.assert_allclose([np.linalg.norm(vector) for vector in vectors.values()], 1, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_vector_does_not_depend_on_the_other_texts_of_its_batch(
    spark: SparkSession, vectors: dict[str, np.ndarray], batch_size: int
) -> None:
    again = embedded(spark, list(reversed(ITEMS)), TextsConfig(batch_size=batch_size))
    for text in ITEMS:
        np.testing.assert_allclose(again[text], vectors[text], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("whole milk", "skim milk", "motor oil"),
        ("potato chips", "tortilla chips", "washing powder"),
        ("washing powder", "laundry detergent", "whole milk"),
    ],
)
def test_texts_of_like_meaning_are_nearer(vectors: dict[str, np.ndarray], text: str, near: str, far: str) -> None:
    assert vectors[text] @ vectors[near] > vectors[text] @ vectors[far] + 0.1


def test_what_lies_beyond_the_last_token_does_not_count(spark: SparkSession) -> None:
    short = TextsConfig(max_tokens=4)
    found = embedded(spark, ["red apple", "red apple juice", "red apple tree"], short)
    np.testing.assert_allclose(found["red apple juice"], found["red apple tree"], atol=1e-5)


def test_no_texts_give_no_rows_of_the_tables_columns(spark: SparkSession) -> None:
    rows = texts.embed(spark.createDataFrame([], "text_id bigint, text string"), MODEL)
    assert rows.columns == ["text_id", "model_digest", "embedding", "sentiment"]
    assert rows.schema["embedding"].dataType.simpleString() == "array<float>"
    assert rows.isEmpty()


def test_praise_is_above_and_complaint_below_plain_words(spark: SparkSession) -> None:
    said = ["wonderful product my family loves it", "it fell apart after a day awful", "cotton shirt blue size m"]
    rows = spark.createDataFrame(list(enumerate(said)), "text_id bigint, text string")
    praise, complaint, plain = (row["sentiment"] for row in sorted(texts.embed(rows, MODEL).collect()))
    assert -1 <= complaint < plain < praise <= 1


# --- the model's identity ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a model."""
    model = tmp_path / "model"
    (model / "pooling").mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text("{}")
    (model / "pooling/config.json").write_text("{}")
    return model


def digest(model: Path | str, **settings: int) -> str:
    return texts.model_digest(TextsConfig.model_validate({"model": str(model), **settings}))


def test_a_digest_changes_with_the_settings_that_change_vectors_only(folder: Path) -> None:
    assert digest(folder, max_tokens=16) != digest(folder, max_tokens=32)
    assert digest(folder, batch_size=1, vocabulary=5) == digest(folder)
    assert digest("hub/name", max_tokens=16) != digest("hub/name") != digest("hub/other")


def test_a_digest_changes_with_the_files_and_not_with_their_place(folder: Path, tmp_path: Path) -> None:
    before = digest(folder)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert digest(copy) == before
    (copy / "model.safetensors").write_bytes(b"Weights")
    assert digest(copy) != before
    shutil.rmtree(copy)
    shutil.copytree(folder, copy)
    (copy / "pooling/config.json").rename(copy / "config2.json")
    assert digest(copy) != before


def test_the_default_model_is_that_of_its_package() -> None:
    assert (Path(texts.model_folder(MODEL.model)) / "config.json").exists()
    assert texts.model_digest(MODEL) == texts.model_digest(TextsConfig())


def test_a_package_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "some_model", None)
    with pytest.raises(PlatformError, match=r"texts\.model: the package some_model is not installed"):
        texts.model_folder("package:some_model")


def test_a_package_that_holds_no_model_is_told() -> None:
    with pytest.raises(PlatformError, match=r"texts\.model: .*json"):
        texts.model_folder("package:json")


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"texts\.model: .*nowhere"):
        texts.model_folder(str(tmp_path / "nowhere"))
