"""Every public function refuses wrong arguments with our errors, which name the argument."""

import ast
import inspect
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any, get_args, get_type_hints

import numpy as np
import polars as pl
import pytest
from jaxtyping import Bool, Float32, Int64, Shaped

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
METHODS = {
    f"{owner}.{name}": getattr(made, name)
    for owner, made in PUBLIC.items()
    if isinstance(made, type) and not issubclass(made, Config | Exception | ft.Tracker)
    for name, member in vars(made).items()
    if not name.startswith("_") and isinstance(member, FunctionType | staticmethod | classmethod)
}
"""The methods of public classes that a caller may call."""
for _inner in ("trusted", "find_given", "find_all_given"):  # foretaste calls them for every id
    del METHODS[f"Vocabulary.{_inner}"]
CONSTRUCTORS = {
    name: PUBLIC[name].__init__
    for name in ("Interactions", "Split", "Holdout", "Vocabulary", "Candidates", "SampledNegatives")
}
"""Constructors of classes that a caller makes; settings have their own."""
ANYTHING = {"source", "report", "record", "settings", "joint", "single", "calibration"}


def wrong_arguments() -> list[Any]:
    """Return each public function with each argument that has a type of its own."""
    return [
        pytest.param(function, argument, id=f"{name}-{argument}")
        for name, function in (FUNCTIONS | METHODS | CONSTRUCTORS).items()
        for argument, hint in get_type_hints(function).items()
        if argument not in {"return", *ANYTHING}
        and not any(one in (object, Any) for one in (hint, *get_args(hint)))
    ]


@pytest.mark.parametrize(("function", "argument"), wrong_arguments())
def test_a_wrong_object_is_refused_by_the_name_of_its_argument(
    function: Callable[..., object], argument: str
) -> None:
    class Stranger:
        """A value that no function accepts."""

    with pytest.raises(ft.ForetasteError) as caught:
        only_argument(function, argument, Stranger())
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
    return checked(alone)(**{argument: value})


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_that_is_called_wrongly_says_so_in_our_words(name: str) -> None:
    method = METHODS[name]
    bound = [] if inspect.ismethod(method) else [object()]
    with pytest.raises(ft.ConfigError) as unknown:
        method(*bound, nonsense=1)
    assert (unknown.value.name, unknown.value.value) == ("nonsense", 1)
    with pytest.raises(ft.ConfigError) as too_many:
        method(*bound, *range(9))
    assert "9" not in str(too_many.value)
    assert name.rpartition(".")[2] in str(too_many.value)


def test_an_error_inside_a_rightly_called_method_is_its_own() -> None:
    @checked
    def adds(value: object) -> object:
        return value + 1  # type: ignore[operator]  # what goes wrong

    assert adds(1) == 2
    with pytest.raises(TypeError):
        adds("1")


@pytest.mark.parametrize("name", sorted({one.id.partition("-")[0] for one in wrong_arguments()}))
def test_an_unknown_argument_is_refused_by_name(name: str) -> None:
    if name == "parse_settings":
        return  # below the checker, and called by name alone
    with pytest.raises(ft.ConfigError) as caught:
        (FUNCTIONS | METHODS | CONSTRUCTORS)[name](nonsense=1)
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
        (lambda: ft.TrainingConfig(epochs=0), "epochs", "must be at least 1 or 'auto', not 0"),
        (lambda: ft.TrainingConfig(epochs=True), "epochs", "must be a number, not true"),
        (lambda: ft.TrainingConfig(epochs="3"), "epochs", "a number or 'auto', not the text '3'"),  # type: ignore[arg-type]
        (
            lambda: ft.TrainingConfig(epochs=1.5),
            "epochs",
            "must be a whole number or 'auto', not 1.5",
        ),  # type: ignore[arg-type]
        (lambda: ft.TrainingConfig(patience="3"), "patience", "not the text '3'"),  # type: ignore[arg-type]
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


@pytest.mark.parametrize("name", sorted(CONSTRUCTORS))
def test_a_constructor_is_named_by_its_class(name: str) -> None:
    with pytest.raises(ft.ConfigError, match=rf"^{name} has no argument 'nonsense'") as caught:
        PUBLIC[name](nonsense=1)
    assert caught.value.name == "nonsense"


@checked
def asks_arrays(
    whole: Int64[np.ndarray, " A"] | None = None,
    flags: Bool[np.ndarray, " A"] | None = None,
    numbers: Float32[np.ndarray, "A B"] | None = None,
    anything: Shaped[np.ndarray, " A"] | None = None,
) -> list[np.ndarray]:
    return [one for one in (whole, flags, numbers, anything) if one is not None]


@pytest.mark.parametrize(
    ("name", "given", "dtype"),
    [
        *(("whole", one, "int64") for one in ([1, 2], (1, 2), range(1, 3), pl.Series([1, 2]))),
        ("whole", np.array([1, 2], dtype=np.uint8), "int64"),
        ("whole", [], "int64"),
        ("flags", [True, False], "bool"),
        ("flags", pl.Series([True, False]), "bool"),
        ("numbers", [[1, 2]], "float32"),
        ("numbers", np.array([[0.5]]), "float32"),
        ("anything", np.array(["a"]), "<U1"),
    ],
)
def test_what_holds_numbers_is_an_array(name: str, given: Any, dtype: str) -> None:
    (array,) = asks_arrays(**{name: given})
    assert (array.dtype, array.tolist()) == (np.dtype(dtype), np.asarray(given).tolist())


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("whole", [0.5], "an array of whole numbers"),
        ("whole", [True], "an array of whole numbers"),
        ("whole", ["1"], "an array of whole numbers"),
        ("whole", [None], "an array of whole numbers"),
        ("whole", 3, "an array"),
        ("whole", "12", "an array"),
        ("whole", slice(2), "an array"),
        ("whole", pl.DataFrame({"a": [1]}), "an array"),
        ("whole", [[1]], "an array of 1 dimension"),
        ("whole", [[1], [1, 2]], "an array"),
        ("flags", [0, 1], "an array of true and false"),
        ("numbers", [0.5], "an array of 2 dimensions"),
        ("numbers", [["a"]], "an array of numbers"),
    ],
)
def test_what_is_no_such_array_is_refused(name: str, given: Any, words: str) -> None:
    with pytest.raises(ft.ConfigError) as caught:
        asks_arrays(**{name: given})
    assert f"must be {words}, not " in str(caught.value)
    assert caught.value.name == name


@pytest.fixture(scope="module")
def split() -> ft.Split:
    table = pl.DataFrame({"user_id": [1, 1, 1, 2, 2, 2], "item_id": [7, 8, 9, 7, 8, 9], "y": 1.0})
    return ft.leave_last_split(ft.read_interactions(table, columns=["y"]), validation=False)


def test_rows_that_are_not_there_are_refused(split: ft.Split) -> None:
    rows = ft.rows_of(split, "test", tasks=[ft.Task(name="y", column="y")])
    asked: dict[str, Callable[[Any], object]] = {
        "idx": split.events.users.decode,
        "rows": split.test.queries,
        "row_B": rows.batch,
        "user_idx": lambda row: split.events.history(row[0]),
    }
    for name, ask in asked.items():
        ask([1])
        for row in (-1, 2, 10**12):
            with pytest.raises(ft.DataError, match=f"there is no row {row}") as caught:
                ask([row])
            assert (caught.value.name, caught.value.value) == (name, row)


def test_parts_of_other_lengths_are_not_put_together(split: ft.Split) -> None:
    events = split.events
    short: dict[str, Any] = {
        "offsets": events.offsets[:-1],
        "timestamp_s": [1],
        "context": pl.DataFrame({"a": [1]}),
        "user_table": pl.DataFrame({"a": [1]}),
        "item_table": pl.DataFrame({"a": [1]}),
        "columns": {"y": [1.0]},
    }
    for name, part in short.items():
        with pytest.raises(ft.DataError) as caught:
            replace(events, **{name: part})
        assert str(caught.value.name).startswith(name)
    with pytest.raises(ft.DataError) as caught:
        replace(split, part_E=split.part_E[:-1])
    assert caught.value.name == "part_E"
    with pytest.raises(ft.DataError) as caught:
        events.select([True])  # type: ignore[arg-type]
    assert caught.value.name == "keep"


@pytest.mark.parametrize("kind", [ft.Report, ft.RowsReport])
@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "3", '{"format": 1', '{"format": 1}'])
def test_what_is_no_report_is_said_without_the_words_of_python(kind: Any, text: str) -> None:
    with pytest.raises(ft.DataError, match="give what to_json wrote") as caught:
        kind.from_json(text)
    assert caught.value.name == "text"
    assert "Error" not in str(caught.value)
    assert "object" not in str(caught.value)


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


OF_THE_STATE = {
    "data/graph.py": 2,
    "data/tasks.py": 1,
    "data/walks.py": 1,
    "evaluation/row_metrics.py": 2,
    "evaluation/rows.py": 1,
    "experiment/mining.py": 1,
    "models/base.py": 4,
    "models/baselines.py": 1,
    "models/catalogue.py": 3,
    "models/layers/embedding.py": 1,
    "models/layers/nodes.py": 1,
    "models/layers/row_fields.py": 1,
    "models/layers/side_fields.py": 1,
    "models/lightgcn.py": 1,
    "models/pinsage.py": 1,
    "models/two_tower.py": 1,
    "retrieval/choose.py": 2,
    "retrieval/index.py": 1,
    "sampling/negatives.py": 1,
    "sampling/samplers.py": 4,
    "serving/catalogue_search.py": 2,
    "training/trained.py": 2,
}
"""How many errors of each file name no setting, argument, column or row: they are about what a
model or a table is, such as weights that are not finite."""


def test_an_error_carries_what_its_message_names() -> None:
    kinds = {name for name in PUBLIC if name.endswith("Error")}
    found: Counter[str] = Counter()
    package = Path(ft.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if named and node.func.id in kinds and not node.keywords:
                found[path.relative_to(package).as_posix()] += 1
    assert {file: num for file, num in found.items() if num > OF_THE_STATE.get(file, 0)} == {}
