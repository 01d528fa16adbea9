"""What training gives back, and all that evaluation and serving need."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foretaste.config import Config
from foretaste.data.batch import Queries
from foretaste.data.features import Features
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError, NonFiniteError
from foretaste.models.interface import CatalogueScorer, PlacesItems, Retriever


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """A model with the vocabularies and histories it was trained on.

    Shape legend: B queries, I items.
    """

    config: Config
    model: nn.Module
    """A `Retriever` or a `CatalogueScorer`, in evaluation mode."""
    events: Interactions
    """The training events; its vocabularies say which row is which id."""
    features: Features | None = None
    """What the model was told of users and items."""
    seed: int
    train_seconds: float = 0.0
    settings: Mapping[str, object] = field(default_factory=dict)
    """Everything that decided the run, as plain JSON values."""
    log: Mapping[str, object] = field(default_factory=dict)
    """What training saw: epochs, the validation metric of each, why it stopped."""

    @property
    def known_I(self) -> Bool[Tensor, " I"]:
        """The catalogue that the model ranks.

        Items with a training event, and others that the model places without one: by their
        features or their edges.
        """
        known_I = torch.from_numpy(self.events.item_count > 0)
        if isinstance(self.model, PlacesItems):
            known_I = known_I | self.model.placed_I().cpu()
        return known_I

    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Score the whole catalogue: higher is better, -inf for items outside of it.

        Raises:
            ConfigError: The model can neither retrieve nor score.
            NonFiniteError: The model gave NaN or infinity for an item of its catalogue.
        """
        return self.scorer()(queries)

    @torch.inference_mode()
    def scorer(self) -> Callable[[Queries], Float[Tensor, "B I"]]:
        """Return `score` for many blocks in a row: the item table is worked out once.

        The weights must not change in between. Each block is a tensor of its own, which an
        inference-mode caller may write into.
        """
        model, unknown_X = self.model, (~self.known_I).nonzero().squeeze(1)
        table_ID = model.item_table().float() if isinstance(model, Retriever) else None

        @torch.inference_mode()
        def score(queries: Queries) -> Tensor:
            if table_ID is not None and isinstance(model, Retriever):
                score_BI = model.encode(queries).float() @ table_ID.T
            elif isinstance(model, CatalogueScorer):
                score_BI = model.score(queries).float().clone()
            else:
                raise ConfigError(f"{type(model).__name__} can neither retrieve nor score")
            score_BI.index_fill_(1, unknown_X.to(score_BI.device), 0.0)
            if score_BI.numel() and not torch.stack(score_BI.aminmax()).isfinite().all():
                raise NonFiniteError(
                    "a score is NaN or infinite: the model is broken, train it anew"
                )
            return score_BI.index_fill_(1, unknown_X.to(score_BI.device), -torch.inf)

        return score
