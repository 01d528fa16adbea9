"""What every model owes, whatever it is: one `Case` each.

A model that learns by gradient descent gives a `learn` that trains it for a moment.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foretaste.data.batch import PairBatch, Queries
from foretaste.data.interactions import Interactions
from foretaste.data.plans import plan_pairs, plan_sequences
from foretaste.data.vocabulary import Vocabulary
from foretaste.models.base import Model, Ranker, Retriever
from foretaste.models.baselines import (
    EASEConfig,
    ImplicitALSConfig,
    ItemKNNConfig,
    PopularityConfig,
)
from foretaste.models.bert4rec import BERT4RecConfig
from foretaste.models.catalogue import ModelConfig, TwoStage, TwoStageConfig, build_model, graph_for
from foretaste.models.deepfm import DeepFMConfig
from foretaste.models.din import DINConfig
from foretaste.models.hstu import HSTUConfig
from foretaste.models.lightgcn import LightGCNConfig
from foretaste.models.mf import MFConfig
from foretaste.models.multitask import MMoEConfig, SharedBottomConfig
from foretaste.models.neumf import GMFConfig, MLPConfig, NeuMFConfig
from foretaste.models.pinsage import PinSageConfig
from foretaste.models.sasrec import SASRecConfig
from foretaste.models.two_tower import TwoTowerConfig
from foretaste.training.fit import Fit
from foretaste.training.objectives.pairs import Pairs, PairsConfig
from foretaste.training.objectives.sequences import (
    MaskedItem,
    MaskedItemConfig,
    NextItem,
    NextItemConfig,
)
from foretaste.training.runtime import epoch_generator
from foretaste.training.settings import TrainingConfig
from foretaste.training.trained import Trained


def events_of(histories: list[list[int]], *, num_items: int) -> Interactions:
    lengths = [len(history) for history in histories]
    return Interactions(
        users=Vocabulary(pl.Series(range(len(histories)), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(range(num_items), dtype=pl.Int64)),
        offsets=np.cumsum([0, *lengths]),
        item_idx=np.array([i for h in histories for i in h], dtype=np.int32),
        timestamp_s=np.arange(sum(lengths), dtype=np.int64),
    )


NUM_GROUPS, GROUP_SIZE = 5, 8
NUM_ITEMS = NUM_GROUPS * GROUP_SIZE


def planted_histories(seed: int = 0, num_users: int = 120) -> list[list[int]]:
    """Each user does five of the eight items of one group."""
    rng = np.random.default_rng(seed)
    return [
        (user % NUM_GROUPS * GROUP_SIZE + rng.permutation(GROUP_SIZE)[:5]).tolist()
        for user in range(num_users)
    ]


def learn_at_once(model: Model, events: Interactions) -> None:
    model.learn(events)


def learn_next_item(model: Model, events: Interactions, *, epochs: int = 12) -> None:
    assert isinstance(model, Retriever)
    Fit(
        model,
        TrainingConfig(epochs=epochs, learning_rate=0.01, warmup_steps=10, device="cpu"),
        seed=0,
        plan=lambda epoch: plan_sequences(
            events,
            max_len=model.max_len,
            batch_events=100,
            windows="all",
            generator=epoch_generator(0, epoch),
        ),
        objective=NextItem(NextItemConfig(), events),
    ).run()


def learn_masked_item(model: Model, events: Interactions) -> None:
    assert isinstance(model, Retriever)
    Fit(
        model,
        TrainingConfig(epochs=25, learning_rate=0.01, warmup_steps=10, device="cpu"),
        seed=0,
        plan=lambda epoch: plan_sequences(
            events,
            max_len=model.max_len,
            batch_events=100,
            windows="all",
            generator=epoch_generator(0, epoch),
        ),
        objective=MaskedItem(MaskedItemConfig(mask_ratio=0.4), events),
    ).run()


def learn_pairs(model: Model, events: Interactions) -> None:
    assert isinstance(model, Retriever)
    model.begin(events)
    Fit(
        model,
        TrainingConfig(epochs=20, learning_rate=0.03, warmup_steps=10, device="cpu"),
        seed=0,
        plan=lambda epoch: plan_pairs(
            events,
            batch_events=100,
            generator=epoch_generator(0, epoch),
            reads=model.reads,
            max_len=model.max_len,
        ),
        objective=Pairs(PairsConfig(), events),
    ).run()
    model.learn_new_users(events)
    model.finish()


def learn_two_stage(model: Model, events: Interactions) -> None:
    assert isinstance(model, TwoStage)
    learn_pairs(model.retriever, events)
    learn_rows(model.ranker, events)


def learn_rows(model: Model, events: Interactions, *, learning_rate: float = 0.03) -> None:
    """Learn from each event as a 1 and from four drawn items as 0."""
    assert isinstance(model, Ranker)
    model.begin(events)
    known_X = torch.from_numpy(events.item_count).nonzero().squeeze(1)

    def objective(model: Ranker, batch: PairBatch, _: torch.Generator) -> Tensor:
        drawn_BN = known_X[torch.randint(len(known_X), (len(batch), 4))]
        logit_BC = model(batch.queries, torch.cat([batch.item_B.unsqueeze(1), drawn_BN], dim=1))
        label_BC = torch.zeros_like(logit_BC["click"])
        label_BC[:, 0] = 1.0
        return nn.functional.binary_cross_entropy_with_logits(logit_BC["click"], label_BC)

    Fit(
        model,
        TrainingConfig(epochs=25, learning_rate=learning_rate, warmup_steps=10, device="cpu"),
        seed=0,
        plan=lambda epoch: plan_pairs(
            events,
            batch_events=100,
            generator=epoch_generator(0, epoch),
            reads=model.reads,
            max_len=model.max_len,
        ),
        objective=objective,
    ).run()
    model.learn_new_users(events)


@dataclass(frozen=True)
class Case:
    """How to make a trained model of one kind."""

    config: ModelConfig
    learn: Callable[[Model, Interactions], None] = learn_at_once
    finds_planted: bool = True
    """False for popularity, which knows nothing about anybody."""
    order_matters: bool = False
    """True for models that mind order or repetition."""
    has_users: bool = False
    """True for models with a vector of its own for each user of training."""

    def build(self, events: Interactions, seed: int = 0) -> Model:
        torch.manual_seed(seed)
        config = self.config
        return build_model(
            config,
            num_users=events.num_users,
            num_items=events.num_items,
            graph=graph_for(config, events),
        )

    def trained(self, events: Interactions, seed: int = 0) -> Trained:
        model = self.build(events, seed)
        self.learn(model, events)
        return Trained(config=self.config, model=model.eval(), events=events, seed=seed)


CASES = {
    "sasrec": Case(
        SASRecConfig(embedding_dim=16, max_len=10), learn=learn_next_item, order_matters=True
    ),
    "sasrec, modern": Case(
        SASRecConfig(embedding_dim=16, max_len=10, block="modern"),
        learn=learn_next_item,
        order_matters=True,
    ),
    "bert4rec": Case(
        BERT4RecConfig(embedding_dim=16, max_len=10, output_projection=True, output_bias=True),
        learn=learn_masked_item,
        order_matters=True,
    ),
    "bert4rec, modern": Case(
        BERT4RecConfig(embedding_dim=16, max_len=10, block="modern", hidden_ratio=1),
        learn=learn_masked_item,
        order_matters=True,
    ),
    "hstu": Case(
        HSTUConfig(embedding_dim=16, max_len=10), learn=learn_next_item, order_matters=True
    ),
    "hstu, without times": Case(
        HSTUConfig(embedding_dim=16, max_len=10, times=False),
        learn=learn_next_item,
        order_matters=True,
    ),
    "mf": Case(MFConfig(embedding_dim=16), learn=learn_pairs, order_matters=True, has_users=True),
    "mf, biases and cosine": Case(
        MFConfig(embedding_dim=16, biases=True, similarity="cosine", temperature=0.2),
        learn=learn_pairs,
        order_matters=True,
        has_users=True,
    ),
    "two_tower": Case(
        TwoTowerConfig(embedding_dim=16), learn=learn_pairs, order_matters=True, has_users=True
    ),
    "two_tower, mean": Case(
        TwoTowerConfig(embedding_dim=16, user_id=False, history="mean"),
        learn=learn_pairs,
        order_matters=True,
    ),
    "two_tower, attention and layers": Case(
        TwoTowerConfig(
            embedding_dim=16,
            history="attention",
            reads="others",
            query_hidden=(32,),
            item_hidden=(32,),
            id_dropout=0.2,
        ),
        learn=learn_pairs,
        order_matters=True,
        has_users=True,
    ),
    "two_tower, sasrec and cosine": Case(
        TwoTowerConfig(
            embedding_dim=16,
            user_id=False,
            history="sasrec",
            num_blocks=1,
            max_len=10,
            similarity="cosine",
            temperature=0.2,
        ),
        learn=learn_pairs,
        order_matters=True,
    ),
    "lightgcn": Case(LightGCNConfig(embedding_dim=16), learn=learn_pairs, has_users=True),
    "lightgcn, transformed": Case(
        LightGCNConfig(embedding_dim=16, num_layers=2, transform=True),
        learn=learn_pairs,
        has_users=True,
    ),
    "pinsage": Case(PinSageConfig(embedding_dim=16), learn=learn_pairs, has_users=True),
    "pinsage, uniform": Case(
        PinSageConfig(embedding_dim=16, neighbours="uniform", cold_share=0.1),
        learn=learn_pairs,
        has_users=True,
    ),
    "gmf": Case(GMFConfig(factors=8), learn=learn_rows, order_matters=True, has_users=True),
    "mlp": Case(MLPConfig(factors=8), learn=learn_rows, order_matters=True, has_users=True),
    "neumf": Case(NeuMFConfig(factors=8), learn=learn_rows, order_matters=True, has_users=True),
    "deepfm": Case(
        DeepFMConfig(hidden=(16,)), learn=learn_rows, order_matters=True, has_users=True
    ),
    "shared_bottom": Case(
        SharedBottomConfig(bottom_hidden=(32,), tower_hidden=(), pooling="none"),
        learn=learn_rows,
        order_matters=True,
        has_users=True,
    ),
    "shared_bottom, mean of others": Case(
        SharedBottomConfig(bottom_hidden=(32,), tower_hidden=(), pooling="mean", reads="others"),
        learn=learn_rows,
        order_matters=True,
        has_users=True,
    ),
    "mmoe": Case(
        MMoEConfig(expert_hidden=(16,), pooling="none"),
        learn=learn_rows,
        order_matters=True,
        has_users=True,
    ),
    "mmoe, attention": Case(
        MMoEConfig(expert_hidden=(16,), pooling="attention"),
        learn=learn_rows,
        order_matters=True,
        has_users=True,
    ),
    "mmoe, attention without ids of users": Case(
        MMoEConfig(expert_hidden=(16,), pooling="attention", user_id=False),
        learn=learn_rows,
        order_matters=True,
    ),
    "din": Case(DINConfig(hidden=(16,)), learn=learn_rows, order_matters=True),
    "din, unnormalised and dice": Case(
        DINConfig(
            hidden=(16,), reads="others", weights="unnormalised", activation="dice", user_id=True
        ),
        learn=partial(learn_rows, learning_rate=0.01),  # its weights do not sum to 1
        order_matters=True,
        has_users=True,
    ),
    "two_stage": Case(
        TwoStageConfig(
            retriever=MFConfig(embedding_dim=16), ranker=NeuMFConfig(factors=8), candidates=12
        ),
        learn=learn_two_stage,
        order_matters=True,
        has_users=True,
    ),
    "popularity": Case(PopularityConfig(), finds_planted=False),
    "popularity in a window": Case(PopularityConfig(window_days=0.001), finds_planted=False),
    "item_knn": Case(ItemKNNConfig(neighbours=10)),
    "ease": Case(EASEConfig(l2=10)),
    "als": Case(ImplicitALSConfig(factors=8)),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    assert isinstance(request.param, Case)
    return request.param


EVENTS = events_of(planted_histories(), num_items=NUM_ITEMS)
QUERIES = Queries.of_histories([[0, 1, 2], [], [9], list(range(NUM_ITEMS)), [30, 30, 12]])


@pytest.fixture(scope="module")
def trained(case: Case) -> Trained:
    """What the case learned from EVENTS, once for all tests that only ask it."""
    return case.trained(EVENTS)


def score(trained: Trained, queries: Queries = QUERIES) -> Tensor:
    score_BI = trained.score(queries)
    assert score_BI.shape == (len(queries), trained.events.num_items)
    return score_BI


def test_the_same_seed_gives_the_same_state(case: Case, trained: Trained) -> None:
    first, second = (one.model.state_dict() for one in (trained, case.trained(EVENTS)))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_reaches_every_parameter(trained: Trained) -> None:
    model = trained.model
    parameters = dict(model.named_parameters())
    assert (model.learns_by == "events") != bool(parameters)
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_saved_and_loaded_scores_agree(case: Case, trained: Trained, tmp_path: Path) -> None:
    save_file(trained.model.state_dict(), tmp_path / "weights.safetensors")
    fresh = case.build(EVENTS, seed=1)
    fresh.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(score(replace(trained, model=fresh.eval())), score(trained))


def test_planted_items_are_found(case: Case, trained: Trained) -> None:
    # of the 35 items a user has not done, 3 are of the user's group: by chance, so is each of
    # the three best with probability 3 / 35 = .09
    rng = np.random.default_rng(1)
    groups = np.arange(200) % NUM_GROUPS
    done = [(g * GROUP_SIZE + rng.permutation(GROUP_SIZE)[:5]).tolist() for g in groups]
    score_BI = score(trained, Queries.of_histories(done)).clone()
    score_BI[torch.arange(200).unsqueeze(1), torch.tensor(done)] = -torch.inf
    best_B3 = score_BI.topk(3).indices
    found = (best_B3 // GROUP_SIZE == torch.from_numpy(groups).unsqueeze(1)).float().mean().item()
    assert found > 0.9 if case.finds_planted else found == pytest.approx(3 / 35, abs=0.15)


def test_an_unknown_user_without_history_is_answered(trained: Trained) -> None:
    assert score(trained, Queries.of_histories([[]])).isfinite().all()
    assert score(trained, Queries.of_histories([])).shape == (0, NUM_ITEMS)


def test_the_answer_comes_from_the_history_not_from_the_user(case: Case, trained: Trained) -> None:
    if case.has_users:
        pytest.skip("the user's own vector is part of the answer")
    known = replace(QUERIES, user_B=torch.arange(len(QUERIES)))
    assert torch.equal(score(trained, known), score(trained))


def test_a_neighbour_in_the_block_changes_nothing(trained: Trained) -> None:
    alone = torch.cat(
        [
            score(trained, Queries.of_histories([history]))
            for history in ([0, 1, 2], [], [9], list(range(NUM_ITEMS)), [30, 30, 12])
        ]
    )
    torch.testing.assert_close(alone, score(trained), rtol=1e-5, atol=1e-5)


def test_order_and_repetition_matter_where_they_should(case: Case, trained: Trained) -> None:
    forth, back = (score(trained, Queries.of_histories([h])) for h in ([3, 1, 2], [2, 1, 1, 3]))
    assert torch.equal(forth, back) != case.order_matters


def test_another_history_gets_another_answer(case: Case, trained: Trained) -> None:
    one, other = (score(trained, Queries.of_histories([h])) for h in ([0, 1], [20, 21]))
    assert torch.equal(one, other) != case.finds_planted


def test_an_item_without_training_events_is_not_offered(case: Case) -> None:
    events = events_of(planted_histories(), num_items=NUM_ITEMS + 1)
    score_BI = score(case.trained(events), Queries.of_histories([[0], [NUM_ITEMS], [0, NUM_ITEMS]]))
    assert score_BI[:, NUM_ITEMS].isneginf().all()
    assert score_BI[:, :NUM_ITEMS].isfinite().all()


@pytest.mark.parametrize("histories", [[[0]], [[0, 0]], [[], [0], []]])
def test_one_user_and_one_item_are_enough(case: Case, histories: list[list[int]]) -> None:
    trained = case.trained(events_of(histories, num_items=1))
    assert score(trained, Queries.of_histories([[0], []])).isfinite().all()


def test_the_network_cannot_tell_the_training_flag(trained: Trained) -> None:
    assert not trained.model.training
    assert torch.equal(score(trained), score(trained))


def test_a_kind_picks_its_settings_and_a_misspelt_one_is_named(case: Case) -> None:
    adapter: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)
    assert adapter.validate_python(case.config.model_dump()) == case.config
    with pytest.raises(ValidationError, match="neighbors"):
        adapter.validate_python({"kind": "item_knn", "neighbors": 10})
    with pytest.raises(ValidationError, match="eease"):
        adapter.validate_python({"kind": "eease"})
