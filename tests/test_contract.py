"""The contract of all models: one `Case` each, trained by `fit` as a user would."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretaste.data.batch import Queries
from foretaste.experiment.fit import fit
from foretaste.experiment.two_stage import FirstStage
from foretaste.models.baselines import (
    EASEConfig,
    ImplicitALSConfig,
    ItemKNNConfig,
    PopularityConfig,
)
from foretaste.models.bert4rec import BERT4RecConfig
from foretaste.models.catalogue import ModelConfig, TwoStageConfig, build_model, graph_for
from foretaste.models.hstu import HSTUConfig
from foretaste.models.lightgcn import LightGCNConfig
from foretaste.models.mf import MFConfig
from foretaste.models.neumf import GMFConfig, MLPConfig, NeuMFConfig
from foretaste.models.pinsage import PinSageConfig
from foretaste.models.rankers import DeepFMConfig, DINConfig, MMoEConfig, SharedBottomConfig
from foretaste.models.sasrec import SASRecConfig
from foretaste.models.two_tower import TwoTowerConfig
from foretaste.training.objectives import (
    MaskedItemConfig,
    NextItemConfig,
    ObjectiveConfig,
    PairsConfig,
)
from foretaste.training.settings import TrainingConfig
from foretaste.training.trained import Trained
from tests.worlds import (
    GROUP_SIZE,
    NUM_GROUPS,
    PLANTED_ITEMS,
    events_of,
    everything,
    planted_histories,
)


def training(epochs: int, learning_rate: float) -> TrainingConfig:
    return TrainingConfig(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_events=100,
        warmup_steps=10,
        ema_decay=0,
        device="cpu",
    )


NEXT_ITEM = (NextItemConfig(), training(12, 0.01))
MASKED_ITEM = (MaskedItemConfig(mask_ratio=0.4), training(25, 0.01))
PAIRS = (PairsConfig(), training(20, 0.03))
ROWS = (None, training(25, 0.03))
AT_ONCE = (None, None)


@dataclass(frozen=True)
class Case:
    """How a model of one kind is trained, and its special properties."""

    config: ModelConfig
    learn: tuple[ObjectiveConfig | None, TrainingConfig | None] = AT_ONCE
    finds_planted: bool = True
    """False for popularity, which gives all users the same list."""
    order_matters: bool = False
    """True for models that read order or repetition."""
    has_users: bool = False
    """True for models with a vector for each user of training."""

    def trained(
        self, histories: list[list[int]], *, num_items: int, epochs: int | None = None
    ) -> Trained:
        objective, loop = self.learn
        if loop is not None and epochs is not None:
            loop = loop.model_copy(update={"epochs": epochs})
        first = FirstStage(objective=PAIRS[0], training=loop or TrainingConfig())
        return fit(
            self.config,
            everything(events_of(histories, num_items=num_items)),
            objective=objective,
            training=loop,
            first_stage=first,
            show=False,
        )


CASES = {
    "sasrec": Case(SASRecConfig(embedding_dim=16, max_len=10), learn=NEXT_ITEM, order_matters=True),
    "sasrec, original": Case(
        SASRecConfig(embedding_dim=16, max_len=10, block="original"),
        learn=NEXT_ITEM,
        order_matters=True,
    ),
    "bert4rec": Case(
        BERT4RecConfig(embedding_dim=16, max_len=10), learn=MASKED_ITEM, order_matters=True
    ),
    "bert4rec, original": Case(
        BERT4RecConfig(
            embedding_dim=16,
            max_len=10,
            block="original",
            output_projection=True,
            output_bias=True,
        ),
        learn=MASKED_ITEM,
        order_matters=True,
    ),
    "hstu": Case(HSTUConfig(embedding_dim=16, max_len=10), learn=NEXT_ITEM, order_matters=True),
    "hstu, without times": Case(
        HSTUConfig(embedding_dim=16, max_len=10, times=False),
        learn=NEXT_ITEM,
        order_matters=True,
    ),
    "mf": Case(MFConfig(embedding_dim=16), learn=PAIRS, order_matters=True, has_users=True),
    "mf, biases and cosine": Case(
        MFConfig(embedding_dim=16, biases=True, similarity="cosine", temperature=0.2),
        learn=PAIRS,
        order_matters=True,
        has_users=True,
    ),
    "two_tower": Case(
        TwoTowerConfig(embedding_dim=16), learn=PAIRS, order_matters=True, has_users=True
    ),
    "two_tower, mean": Case(
        TwoTowerConfig(embedding_dim=16, user_id=False, history="mean"),
        learn=PAIRS,
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
        learn=PAIRS,
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
        learn=PAIRS,
        order_matters=True,
    ),
    "lightgcn": Case(LightGCNConfig(embedding_dim=16), learn=PAIRS, has_users=True),
    "lightgcn, transformed": Case(
        LightGCNConfig(embedding_dim=16, num_layers=2, transform=True),
        learn=PAIRS,
        has_users=True,
    ),
    "pinsage": Case(PinSageConfig(embedding_dim=16), learn=PAIRS, has_users=True),
    "pinsage, uniform": Case(
        PinSageConfig(embedding_dim=16, neighbours="uniform", cold_share=0.1),
        learn=PAIRS,
        has_users=True,
    ),
    "gmf": Case(GMFConfig(factors=8), learn=ROWS, order_matters=True, has_users=True),
    "mlp": Case(MLPConfig(factors=8), learn=ROWS, order_matters=True, has_users=True),
    "neumf": Case(
        NeuMFConfig(factors=8),
        learn=(None, training(25, 0.015)),
        order_matters=True,
        has_users=True,
    ),
    "deepfm": Case(DeepFMConfig(hidden=(16,)), learn=ROWS, order_matters=True, has_users=True),
    "shared_bottom": Case(
        SharedBottomConfig(bottom_hidden=(32,), tower_hidden=(), pooling="none"),
        learn=ROWS,
        order_matters=True,
        has_users=True,
    ),
    "shared_bottom, mean of others": Case(
        SharedBottomConfig(bottom_hidden=(32,), tower_hidden=(), pooling="mean", reads="others"),
        learn=ROWS,
        order_matters=True,
        has_users=True,
    ),
    "mmoe": Case(
        MMoEConfig(expert_hidden=(16,), pooling="none"),
        learn=ROWS,
        order_matters=True,
        has_users=True,
    ),
    "mmoe, attention": Case(
        MMoEConfig(expert_hidden=(16,), pooling="attention"),
        learn=ROWS,
        order_matters=True,
        has_users=True,
    ),
    "mmoe, attention without ids of users": Case(
        MMoEConfig(expert_hidden=(16,), pooling="attention", user_id=False),
        learn=ROWS,
        order_matters=True,
    ),
    "din": Case(DINConfig(hidden=(16,)), learn=ROWS, order_matters=True),
    "din, unnormalised and dice": Case(
        DINConfig(
            hidden=(16,), reads="others", weights="unnormalised", activation="dice", user_id=True
        ),
        learn=(None, training(25, 0.01)),  # its weights do not sum to 1
        order_matters=True,
        has_users=True,
    ),
    "two_stage": Case(
        TwoStageConfig(
            retriever=MFConfig(embedding_dim=16), ranker=NeuMFConfig(factors=8), candidates=12
        ),
        learn=ROWS,
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


QUERIES = Queries.of_histories([[0, 1, 2], [], [9], list(range(PLANTED_ITEMS)), [30, 30, 12]])


@pytest.fixture(scope="module")
def trained(case: Case) -> Trained:
    """The case's model, trained once for all tests; the last item has no training event."""
    return case.trained(planted_histories(), num_items=PLANTED_ITEMS + 1)


def score(trained: Trained, queries: Queries = QUERIES) -> Tensor:
    score_BI = trained.score(queries)
    assert score_BI.shape == (len(queries), trained.events.num_items)
    return score_BI


def test_the_same_seed_gives_the_same_state(case: Case) -> None:
    first, second = (
        case.trained(planted_histories(num_users=20), num_items=PLANTED_ITEMS, epochs=2).model
        for _ in range(2)
    )
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_the_loss_reaches_every_parameter(trained: Trained) -> None:
    model = trained.model
    parameters = dict(model.named_parameters())
    assert (model.learns_by == "events") != bool(parameters)
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_saved_and_loaded_scores_agree(case: Case, trained: Trained, tmp_path: Path) -> None:
    save_file(trained.model.state_dict(), tmp_path / "weights.safetensors")
    torch.manual_seed(1)
    fresh = build_model(
        case.config,
        num_users=trained.events.num_users,
        num_items=trained.events.num_items,
        graph=graph_for(case.config, trained.events),
    )
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
    assert score(trained, Queries.of_histories([[]]))[:, :PLANTED_ITEMS].isfinite().all()
    assert score(trained, Queries.of_histories([])).shape == (0, PLANTED_ITEMS + 1)


def test_the_answer_comes_from_the_history_not_from_the_user(case: Case, trained: Trained) -> None:
    if case.has_users:
        pytest.skip("the user's own vector is part of the answer")
    known = replace(QUERIES, user_B=torch.arange(len(QUERIES)))
    assert torch.equal(score(trained, known), score(trained))


def test_a_neighbour_in_the_block_changes_nothing(trained: Trained) -> None:
    alone = torch.cat(
        [
            score(trained, Queries.of_histories([history]))
            for history in ([0, 1, 2], [], [9], list(range(PLANTED_ITEMS)), [30, 30, 12])
        ]
    )
    torch.testing.assert_close(alone, score(trained), rtol=1e-5, atol=1e-5)


def test_order_and_repetition_matter_where_they_should(case: Case, trained: Trained) -> None:
    forth, back = (score(trained, Queries.of_histories([h])) for h in ([3, 1, 2], [2, 1, 1, 3]))
    assert torch.equal(forth, back) != case.order_matters


def test_another_history_gets_another_answer(case: Case, trained: Trained) -> None:
    one, other = (score(trained, Queries.of_histories([h])) for h in ([0, 1], [20, 21]))
    assert torch.equal(one, other) != case.finds_planted


def test_an_item_without_training_events_is_never_recommended(trained: Trained) -> None:
    score_BI = score(trained, Queries.of_histories([[0], [PLANTED_ITEMS], [0, PLANTED_ITEMS]]))
    assert score_BI[:, PLANTED_ITEMS].isneginf().all()
    assert score_BI[:, :PLANTED_ITEMS].isfinite().all()


@pytest.mark.parametrize("histories", [[[0]], [[0, 0]], [[], [0], []]])
def test_one_user_and_one_item_are_enough(case: Case, histories: list[list[int]]) -> None:
    trained = case.trained(histories, num_items=1, epochs=1)
    assert score(trained, Queries.of_histories([[0], []])).isfinite().all()


def test_a_trained_model_is_in_evaluation_mode_and_deterministic(trained: Trained) -> None:
    assert not trained.model.training
    assert torch.equal(score(trained), score(trained))


def test_a_kind_picks_its_settings_and_a_misspelt_one_is_named(case: Case) -> None:
    adapter: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)
    assert adapter.validate_python(case.config.model_dump()) == case.config
    with pytest.raises(ValidationError, match="neighbors"):
        adapter.validate_python({"kind": "item_knn", "neighbors": 10})
    with pytest.raises(ValidationError, match="eease"):
        adapter.validate_python({"kind": "eease"})
