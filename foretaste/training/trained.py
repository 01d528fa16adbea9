"""What training gives back, and all that evaluation and serving need."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foretaste.config import Config
from foretaste.data.batch import Queries
from foretaste.data.interactions import Interactions
from foretaste.errors import ConfigError, NonFiniteError
from foretaste.models.interface import CatalogueScorer, Retriever


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
    seed: int
    train_seconds: float = 0.0
    settings: Mapping[str, object] = field(default_factory=dict)
    """Everything that decided the run, as plain JSON values."""
    log: Mapping[str, object] = field(default_factory=dict)
    """What training saw: epochs, the validation metric of each, why it stopped."""

    @property
    def known_I(self) -> Bool[Tensor, " I"]:
        """Items with a training event: the catalogue that the model ranks."""
        return torch.from_numpy(self.events.item_count > 0)

    @torch.inference_mode()
    def score(self, queries: Queries) -> Float[Tensor, "B I"]:
        """Score the whole catalogue: higher is better, -inf for items never seen in training.

        Raises:
            NonFiniteError: The model gave NaN or infinity for an item of its catalogue.
        """
        match self.model:
            case Retriever():
                score_BI = self.model.encode(queries).float() @ self.model.item_table().float().T
            case CatalogueScorer():
                score_BI = self.model.score(queries).float()
            case _:
                raise ConfigError(f"{type(self.model).__name__} can neither retrieve nor score")
        score_BI = score_BI.masked_fill(~self.known_I, -torch.inf)
        if not score_BI[:, self.known_I].isfinite().all():
            raise NonFiniteError("a score is NaN or infinite: the model is broken, train it anew")
        return score_BI
