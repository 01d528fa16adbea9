"""A model's attributes decide how it is trained and used; its name does not."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from foretaste.config import Config
from foretaste.data.batch import FieldTable, Queries, SequenceBatch, last_events
from foretaste.errors import ConfigError
from foretaste.experiment.learning import make_learning, usual_objective
from foretaste.models.base import Ranker, Retriever, Scorer
from foretaste.models.baselines import (
    EASEConfig,
    ImplicitALSConfig,
    ItemKNNConfig,
    PopularityConfig,
)
from foretaste.models.catalogue import ModelConfig, TwoStage, TwoStageConfig
from foretaste.models.layers.table import DenseConfig
from foretaste.models.mf import MF, MFConfig
from foretaste.models.neumf import NCF, GMFConfig
from foretaste.models.sasrec import SASRecConfig
from foretaste.training.objectives import NextItemConfig, PairsConfig, RowsConfig
from foretaste.training.trained import Trained
from tests.worlds import GROUP_SIZE, PLANTED_ITEMS, events_of, learn, planted_histories

EVENTS = events_of(planted_histories(), num_items=PLANTED_ITEMS)


class LastItem(Retriever):
    """Predicts the next item from the last one alone; the package has never heard of it."""

    learns_by = "next_item"
    max_len = 10

    def __init__(self) -> None:
        super().__init__()
        self.num_items = PLANTED_ITEMS
        self.item_table = DenseConfig().make(PLANTED_ITEMS, 16)
        self.next = nn.Linear(16, 16)
        self.start = nn.Parameter(torch.zeros(16))
        self.item_table.draw(std=0.1)

    def forward(self, batch: SequenceBatch) -> Tensor:
        start_B1D = self.start.expand(len(batch), 1, -1)
        states: Tensor = self.next(torch.cat([start_B1D, self.item_table(batch.item_BL)], dim=1))
        return states

    def encode(self, queries: Queries) -> Tensor:
        state_BLD = self(last_events(queries, 1))
        has_B1 = (queries.offsets_B1.diff() > 0).unsqueeze(1)
        return state_BLD[:, 1].where(has_B1, state_BLD[:, 0])

    def items(self, item_V: Tensor) -> Tensor:
        vector_VD: Tensor = self.item_table(item_V)
        return vector_VD


def test_a_model_of_an_unknown_class_learns_by_what_it_says() -> None:
    torch.manual_seed(0)
    model = LastItem()
    learning = make_learning(model, NextItemConfig(), EVENTS, batch_events=100, seed=0)
    loss = learning.objective(model, learning.plan(0).batch(0), torch.Generator().manual_seed(0))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_wrong_objective_is_named_with_the_one_of_the_model() -> None:
    with pytest.raises(ConfigError, match="'pairs', but LastItem learns by 'next_item'") as caught:
        make_learning(LastItem(), PairsConfig(), EVENTS, batch_events=100, seed=0)
    assert (caught.value.name, caught.value.value) == ("objective.kind", "pairs")


def test_the_usual_objective_is_the_one_that_the_settings_name() -> None:
    assert isinstance(usual_objective(MFConfig()), PairsConfig)
    assert isinstance(usual_objective(GMFConfig()), RowsConfig)
    assert isinstance(usual_objective(SASRecConfig()), NextItemConfig)
    for closed_form in (EASEConfig(), PopularityConfig()):
        assert not closed_form.usual.objective


def test_a_class_without_its_abstract_methods_cannot_be_made() -> None:
    class NoVectors(Retriever):
        pass

    for owes in (NoVectors, Retriever, Ranker, Scorer):
        with pytest.raises(TypeError, match="abstract"):
            owes()


def test_what_a_model_cannot_do_is_refused_by_its_name() -> None:
    model = MF(MFConfig(), num_users=1, num_items=2)
    with pytest.raises(ConfigError, match="MF does not learn from all events"):
        model.learn(EVENTS)
    none, no_codes = torch.empty(0), torch.empty(1, 0, dtype=torch.long)
    table = FieldTable(
        code_RC=no_codes,
        bag_N=none.long(),
        bag_offsets_RG1=torch.zeros(1, 1, dtype=torch.long),
        number_RM=none.view(1, 0),
        vectors=(),
        present_RF=no_codes.bool(),
    )
    with pytest.raises(ConfigError, match="MF reads no features"):
        model.item_from_features(table)
    ranker = NCF(GMFConfig(), num_users=1, num_items=2)
    nothing = Queries.of_histories([[]]), torch.zeros(1, 1, dtype=torch.long)
    for ask_ranker in (ranker.attention_weights, ranker.gates):
        with pytest.raises(ConfigError, match="NCF"):
            ask_ranker(*nothing)


def test_two_stages_say_what_either_says(monkeypatch: pytest.MonkeyPatch) -> None:
    retriever, ranker = LastItem(), NCF(GMFConfig(), num_users=1, num_items=PLANTED_ITEMS)
    both = TwoStage(retriever, ranker, num_candidates=3)
    assert (both.first_stage, both.second_stage) == (retriever, ranker)
    assert (ranker.first_stage, ranker.second_stage) == (ranker, ranker)
    assert not both.reads_profiles
    assert not both.reads_context
    monkeypatch.setattr(LastItem, "reads_profiles", True)
    assert both.reads_profiles
    monkeypatch.setattr(NCF, "reads_context", True)
    assert both.reads_context


def test_a_model_of_an_unknown_class_is_trained_and_answers_like_any_other() -> None:
    torch.manual_seed(0)
    model = LastItem()
    learn(model, EVENTS, NextItemConfig(windows="all"), epochs=30, learning_rate=0.01)
    trained = Trained(config=Config(), model=model.eval(), events=EVENTS, seed=0)
    # the seven other items of the group of item 9; by chance, 7 of 39
    score_I = trained.score(Queries.of_histories([[30, 9]]))[0].index_fill(
        0, torch.tensor([9]), -torch.inf
    )
    assert (score_I.topk(7).indices // GROUP_SIZE == 1).float().mean() > 0.8


CONFIGS = [config for config in get_args(get_args(ModelConfig)[0]) if config != TwoStageConfig]
WITHOUT_TABLES = (ImplicitALSConfig, EASEConfig, ItemKNNConfig, PopularityConfig)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_a_setting_of_tables_is_taken_by_models_that_keep_ids_and_refused_by_name_by_others(
    config: type[Config],
) -> None:
    assert ("table" in config.model_fields) == (config not in WITHOUT_TABLES)
    with pytest.raises(ConfigError) as caught:
        config(table={"kind": "of another version"})
    assert caught.value.name == "table"
