"""What every public function owes a caller who gives it something wrong."""

import inspect
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import polars as pl
import pytest

import foretaste as ft
from foretaste.arguments import as_list, checked
from foretaste.config import Config, Seed
from foretaste.data.read_config import ReadConfig, ReadTables

PUBLIC = {name: getattr(ft, name) for name in ft.__all__}
FUNCTIONS = {name: made for name, made in PUBLIC.items() if inspect.isfunction(made)}
SETTINGS = {
    name: made
    for name, made in PUBLIC.items()
    if isinstance(made, type) and issubclass(made, Config) and made is not Config
}
ANYTHING = {"source", "report", "record", "settings", "joint", "single", "calibration"}


def wrong_arguments() -> list[tuple[str, str]]:
    """Return each public function with each argument that has a type of its own."""
    return [
        (name, argument)
        for name, function in FUNCTIONS.items()
        for argument, hint in get_type_hints(function).items()
        if argument not in {"return", *ANYTHING} and hint not in (object, Any)
    ]


@pytest.mark.parametrize(("name", "argument"), wrong_arguments())
def test_a_wrong_object_is_refused_by_the_name_of_its_argument(name: str, argument: str) -> None:
    class Stranger:
        """What no function asks for."""

    with pytest.raises(ft.ForetasteError) as caught:
        only_argument(FUNCTIONS[name], argument, Stranger())
    assert caught.value.name == argument
    assert isinstance(caught.value.value, Stranger)
    assert argument in str(caught.value)


def only_argument(function: Callable[..., object], argument: str, value: object) -> object:
    """Call a function so that this argument is the first that it checks."""
    hints = get_type_hints(function)

    def alone(**given: object) -> None: ...

    parameter = inspect.signature(function).parameters[argument]
    alone.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    )
    alone.__annotations__ = {argument: hints[argument]}
    assert hasattr(function, "__wrapped__"), "the function is not @checked"
    return checked(alone)(**{argument: value})


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_an_unknown_argument_is_refused_by_name(name: str) -> None:
    if name == "parse_settings":
        return  # below the checker, and called by name alone
    with pytest.raises(ft.ConfigError) as caught:
        FUNCTIONS[name](nonsense=1)
    assert caught.value.name == "nonsense"


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_settings_raise_our_error_in_our_words(name: str) -> None:
    for wrong in ({"nonsense": 1}, {next(iter(SETTINGS[name].model_fields)): object()}):
        with pytest.raises(ft.ConfigError) as caught:
            SETTINGS[name](**wrong)
        assert "pydantic" not in str(caught.value)
        assert "Input should" not in str(caught.value)
        assert caught.value.name is not None


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (lambda: ft.SASRecConfig(embeding_dim=8), "embeding_dim", "mean embedding_dim?"),  # type: ignore[call-arg]
        (lambda: ft.TrainingConfig(epochs=0), "epochs", "must be at least 1, not 0"),
        (lambda: ft.TrainingConfig(epochs=True), "epochs", "must be a number, not true"),
        (lambda: ft.TrainingConfig(epochs="3"), "epochs", "not the text '3'"),  # type: ignore[arg-type]
        (lambda: ft.TrainingConfig(epochs=1.5), "epochs", "must be a whole number, not 1.5"),  # type: ignore[arg-type]
        (lambda: ft.RowsConfig(negatives="usal"), "negatives", "did you mean 'usual'?"),  # type: ignore[arg-type]
        (lambda: ft.MFConfig(8), None, "by name"),  # type: ignore[call-arg]
    ],
)
def test_a_wrong_setting_is_said_with_its_fix(
    make: Callable[[], object], name: str | None, words: str
) -> None:
    with pytest.raises(ft.ConfigError) as caught:
        make()
    assert caught.value.name == name
    assert words in str(caught.value)


def test_numpy_values_are_settings_like_pythons() -> None:
    assert ft.MFConfig(embedding_dim=np.int64(8)) == ft.MFConfig(embedding_dim=8)
    made = ft.TrainingConfig(learning_rate=np.float32(0.5))
    assert made == ft.TrainingConfig(learning_rate=0.5)


@checked
def takes(
    path: Path | str = "a",
    *,
    k: int | list[int] = 1,
    share: float = 0.5,
    on: bool = False,
    seed: Seed = 0,
    config: ft.MFConfig | ft.EASEConfig | None = None,
    table: Mapping[str, int] | None = None,
) -> tuple[object, ...]:
    return path, k, share, on, seed, config, table


def test_what_means_the_same_is_taken() -> None:
    home = Path.home() / "x"
    assert takes(Path("~/x"))[0] == home
    assert takes(k=np.array([1, 2]))[1] == [1, 2]  # type: ignore[arg-type]
    assert takes(k=pl.Series([1, 2]))[1] == [1, 2]  # type: ignore[arg-type]
    assert takes(k=range(1, 3))[1] == [1, 2]  # type: ignore[arg-type]
    assert takes(k=np.int32(3))[1] == 3  # type: ignore[arg-type]
    assert takes(share=1)[2] == 1
    assert takes(on=np.True_)[3] is True  # type: ignore[arg-type]
    assert takes(table={"a": np.int64(1)})[6] == {"a": 1}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"k": True}, "a whole number or a list"),
        ({"k": [1.5]}, "whole number"),
        ({"k": "10"}, "not '10'"),
        ({"share": float("nan")}, "must be a number"),
        ({"share": "0.5"}, "must be a number, not '0.5'"),
        ({"on": 1}, "True or False"),
        ({"seed": -1}, "at least 0"),
        ({"seed": 2**63}, "below 9223372036854775808"),
        ({"config": ft.EASEConfig}, "write EASEConfig()"),
        ({"config": "mf"}, "write ft.MFConfig()"),
        ({"path": ""}, "a path"),
        ({"path": b"x"}, "a path"),
        ({"table": [1]}, "a dictionary"),
        ({"table": {"a": "b"}}, "a whole number"),
        ({"embedding_dim": 3}, "it is a setting: config=ft.MFConfig(embedding_dim=…)"),
        ({"sead": 3}, "did you mean 'seed'?"),
    ],
)
def test_a_wrong_argument_is_said_with_its_fix(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ft.ConfigError) as caught:
        takes(**given)
    assert words in str(caught.value)
    assert caught.value.name == next(iter(given))


@pytest.mark.parametrize(
    "values", [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), {1: 0, 2: 0}.keys()]
)
def test_any_collection_is_a_list(values: object) -> None:
    assert as_list(values) == [1, 2]
    assert as_list(one for one in (1, 2)) == [1, 2]


@pytest.mark.parametrize("value", ["ab", b"ab", 7, None, {"a": 1}, pl.DataFrame({"a": [1]})])
def test_a_text_a_table_or_one_value_is_no_list(value: object) -> None:
    assert as_list(value) is None


def test_the_settings_of_reading_are_written_once() -> None:
    arguments = inspect.signature(ft.read_interactions).parameters
    assert list(arguments) == ["source", *ReadTables.model_fields]
    for name, field in ReadTables.model_fields.items():
        assert f"{name}: " in (ft.read_interactions.__doc__ or "")
        assert field.description, name
    assert ReadConfig.model_fields.keys() < ReadTables.model_fields.keys()


def test_an_error_keeps_what_it_names_when_it_is_pickled() -> None:
    error = ft.DataError("row 3 is wrong", column="c", row=3, value="NA")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (str(again), again.column, again.row, again.value) == ("row 3 is wrong", "c", 3, "NA")
