"""Adult, the census of 1994: rows of people with two things to predict, and no items.

Becker and Kohavi, "Adult", UCI Machine Learning Repository 1996,
https://doi.org/10.24432/C5XW20. The two tasks are those of Ma et al., "Modeling Task Relationships
in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018, on a larger census.
"""

import polars as pl

from foretaste.data.parts import TEST, TRAIN
from foretaste.data.sources.files import Files
from foretaste.data.sources.tables import Tables

ADULT_FILES = ("adult.data", "adult.test")
_NUMBERS = ("age", "fnlwgt", "education_num", "capital_gain", "capital_loss", "hours_per_week")
_COLUMNS = (
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education_num",
    "marital_status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital_gain",
    "capital_loss",
    "hours_per_week",
    "native_country",
    "income",
)
_LEFT_OUT = ("marital_status", "relationship", "income")


def read_adult(files: Files) -> Tables:
    """Read training and test as parts 0 and 2, with labels `income` and `never_married`.

    Income is 1 above 50,000 dollars. The marital status and the relationship in the household are
    no features, as either gives the second label away. A question mark is a missing value.
    """
    parts = [
        _people(files, name).with_columns(part=pl.lit(code, dtype=pl.UInt8))
        for name, code in zip(ADULT_FILES, (TRAIN, TEST), strict=True)
    ]
    context = tuple(name for name in _COLUMNS if name not in _LEFT_OUT)
    return Tables(events=pl.concat(parts), labels=("income", "never_married"), context=context)


def _people(files: Files, name: str) -> pl.DataFrame:
    """Read lines of values between commas, but for empty ones and the test file's first."""
    lines = [line for line in files.text(name).splitlines() if line.count(",") > 1]
    table = pl.read_csv(
        "\n".join(lines).encode(),
        has_header=False,
        new_columns=_COLUMNS,
        infer_schema=False,
        quote_char=None,
    )
    table = table.with_columns(pl.all().str.strip_chars().replace("?", None))
    return table.with_columns(
        *(pl.col(name).cast(pl.Int64) for name in _NUMBERS),
        income=(pl.col("income").str.strip_suffix(".") == ">50K").cast(pl.Int64),
        never_married=(pl.col("marital_status") == "Never-married").cast(pl.Int64),
    ).drop("marital_status", "relationship")
