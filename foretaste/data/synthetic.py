"""Made-up tasks that agree or conflict as much as is asked, and a made-up log of a media site.

Shape legend: E events, D width of the input, M sines, U users, N impressions of each.
"""

from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float64

from foretaste.config import Seed
from foretaste.data.arrays import check_fits
from foretaste.data.interactions import Interactions
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import ConfigError

INPUT = "x"
"""The context column that holds the input, a vector."""


def correlated_tasks(
    num_events: int,
    *,
    correlation: float,
    dim: int = 100,
    scale: float = 1.0,
    frequencies: tuple[float, ...] = (1.0, 2.0, 3.0),
    phases: tuple[float, ...] = (0.0, 1.0, 2.0),
    noise: float = 0.1,
    seed: Seed = 0,
) -> Interactions:
    r"""Make rows of an input and two quantities, columns `first` and `second`.

    .. math:: w_1 = c\,u_1, \quad w_2 = c\,\big(p\,u_1 + \sqrt{1 - p^2}\,u_2\big), \quad
              y_t = w_t \cdot x + \sum_m \sin(\alpha_m w_t \cdot x + \beta_m) + \epsilon

    with x standard normal, u orthogonal and of length 1. Both tasks have the same form, so that
    with :math:`p = 1` they are one and with :math:`p = 0` they read unrelated things.

    Args:
        num_events: Rows; each is a user of its own, all are of one item.
        correlation: :math:`p` in [-1, 1], the cosine between the tasks' weights.
        dim: D, at least 2.
        scale: :math:`c`.
        frequencies: :math:`\alpha`.
        phases: :math:`\beta`, as many.
        noise: Standard deviation of :math:`\epsilon`; no model's RMSE gets below it.
        seed: Decides weights, inputs and noise.

    Raises:
        ConfigError: A number is out of range.
        TooLargeError: The rows would not fit in memory.

    References:
        Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts", KDD 2018, https://doi.org/10.1145/3219819.3220007, section 3.2.
    """
    if not -1 <= correlation <= 1:
        raise ConfigError(
            f"correlation is {correlation}: a cosine lies in [-1, 1]",
            name="correlation",
            value=correlation,
        )
    if dim < 2 or num_events < 1 or len(frequencies) != len(phases):
        raise ConfigError(
            f"{num_events} rows of width {dim}, {len(frequencies)} frequencies and {len(phases)} "
            "phases: give rows, a width of 2 or more, and a phase for each frequency"
        )
    check_fits(
        num_events * dim * 16,
        f"{num_events:,} rows of width {dim:,}",
        "make fewer or narrower ones",
        name="num_events" if num_events > dim else "dim",
        value=max(num_events, dim),
    )
    draw = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(draw.normal(size=(dim, 2)))
    weights_2D = scale * np.array([[1.0, 0.0], [correlation, np.sqrt(1 - correlation**2)]]) @ axes.T
    input_ED = draw.normal(size=(num_events, dim))
    line_E2 = input_ED @ weights_2D.T
    waves_E2 = sum(
        (np.sin(f * line_E2 + phase) for f, phase in zip(frequencies, phases, strict=True)),
        start=np.zeros_like(line_E2),
    )
    label_E2 = line_E2 + waves_E2 + noise * draw.normal(size=line_E2.shape)
    return Interactions(
        users=Vocabulary(pl.Series(range(num_events), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(["row"])),
        offsets=np.arange(num_events + 1, dtype=np.int64),
        item_idx=np.zeros(num_events, np.int32),
        columns={
            name: label_E2[:, place].astype(np.float32)
            for place, name in enumerate(("first", "second"))
        },
        context=_frame(input_ED),
    )


def _frame(input_ED: Float64[np.ndarray, "E D"]) -> pl.DataFrame:
    values = pl.Series(INPUT, input_ED.astype(np.float32))
    return pl.DataFrame({INPUT: values.arr.to_list()})


class MediaLog(NamedTuple):
    """The tables of a made-up media site, as `read_interactions` takes them."""

    events: pl.DataFrame
    """A row an impression: `user`, `item`, `time`, `click`, and of clicks `minutes` and `like`."""
    items: pl.DataFrame
    """The `topic` of each `item`."""


def media_log(
    *,
    history: bool,
    num_users: int = 3_000,
    num_items: int = 1_200,
    num_topics: int = 6,
    impressions: int = 30,
    effect: float = 3.0,
    seed: Seed = 0,
) -> MediaLog:
    """Make a log of impressions whose clicks follow a user's passing interest, or do not.

    A user is interested in one topic for about 20 impressions, then in another. Items of the topic
    are clicked, read for longer and liked more often. Without `history` an interest lasts for one
    impression only, so that nothing a user did before says anything of it; all else is the same.

    Args:
        history: Whether interests last.
        num_users: U.
        num_items: Items; each has a topic and a quality.
        num_topics: Topics, as many items each.
        impressions: N.
        effect: What an interest adds to the logit of a click.
        seed: Decides everything.

    Raises:
        ConfigError: There are too few items for the topics, or a number is below 1.
        TooLargeError: The rows would not fit in memory.
    """
    if min(num_users, num_topics, impressions) < 1 or num_items < num_topics:
        raise ConfigError(
            f"{num_users} users, {num_items} items, {num_topics} topics and {impressions} "
            "impressions: give 1 or more of each, and an item for each topic",
            name="num_items",
            value=num_items,
        )
    num_rows = num_users * impressions
    check_fits(num_rows * 200, f"{num_rows:,} rows", "make fewer", name="num_users")
    draw = np.random.default_rng(seed)
    topic_I, quality_I = np.arange(num_items) % num_topics, draw.normal(0, 0.5, num_items)
    item_UN = (num_items * draw.random((num_users, impressions)) ** 1.5).astype(np.int64)
    changes_UN = draw.random(item_UN.shape) < (0.05 if history else 1.0)
    since_UN = np.maximum.accumulate(np.where(changes_UN, np.arange(impressions), 0), axis=1)
    drawn_UN = draw.integers(num_topics, size=item_UN.shape)
    matches_UN = topic_I[item_UN] == np.take_along_axis(drawn_UN, since_UN, axis=1)
    logit_UN = quality_I[item_UN] + effect * matches_UN
    chance_UN = draw.random((2, *item_UN.shape)) < 1 / (1 + np.exp(1.5 - logit_UN))
    minutes_UN = np.exp(1 + 0.4 * logit_UN + 0.5 * draw.normal(size=item_UN.shape)).round(2)
    times_UN = np.sort(draw.integers(30 * 86_400, size=item_UN.shape), axis=1)
    click_E = chance_UN[0].ravel()
    events = pl.DataFrame(
        {
            "user": np.repeat(np.arange(num_users), impressions),
            "item": item_UN.ravel(),
            "time": 1_700_000_000 + times_UN.ravel(),
            "click": click_E.astype(np.int64),
            "minutes": minutes_UN.ravel(),
            "like": chance_UN[1].ravel().astype(np.int64),
        }
    ).with_columns(pl.when(pl.col("click") == 1).then(pl.col("minutes", "like")))
    topics = [f"topic {topic}" for topic in topic_I]
    return MediaLog(events, pl.DataFrame({"item": np.arange(num_items), "topic": topics}))
