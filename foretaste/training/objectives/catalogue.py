"""All ways of learning by name."""

from foretaste.training.objectives.next_item import NextItemConfig

ObjectiveConfig = NextItemConfig
