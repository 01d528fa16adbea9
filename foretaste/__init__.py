"""foretaste: deep-learning recommendation, from a table of events to served answers."""

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from foretaste.version import __version__

if TYPE_CHECKING:
    from foretaste.config import Config, parse_settings
    from foretaste.data.audit import audit_events, audit_split
    from foretaste.data.features import Features, fit_features
    from foretaste.data.features_schema import (
        CategoricalField,
        CrossField,
        FeatureSchema,
        MultiField,
        NumericField,
        TextField,
        VectorField,
        inspect_schema,
        schema_from_toml,
        schema_to_toml,
    )
    from foretaste.data.folder import check_place
    from foretaste.data.graph import GraphConfig
    from foretaste.data.importing import import_events
    from foretaste.data.interactions import Interactions
    from foretaste.data.reading import read_interactions
    from foretaste.data.rows import Rows, rows_of
    from foretaste.data.sources.load import Dataset, get_dataset
    from foretaste.data.splits import Holdout, Split, SplitConfig
    from foretaste.data.splitting import (
        cold_items_split,
        cold_users_split,
        given_split,
        given_split_by_column,
        leave_last_split,
        leave_last_within_training,
        make_split,
        random_split,
        ratio_split,
        temporal_split,
    )
    from foretaste.data.store import open_store, write_store
    from foretaste.data.tasks import Task
    from foretaste.data.vocabulary import Vocabulary
    from foretaste.errors import (
        BundleError,
        ConfigError,
        DataError,
        ForetasteError,
        NonFiniteError,
        ProcessError,
        SourceError,
        TooLargeError,
    )
    from foretaste.evaluation.chart import gates_svg, read_gates, reliability_svg
    from foretaste.evaluation.compare import (
        Comparison,
        RankingGain,
        Reports,
        compare,
        compare_rows,
        transfer,
    )
    from foretaste.evaluation.measure_queries import SampledNegatives
    from foretaste.evaluation.protocol import evaluate
    from foretaste.evaluation.report import Report, RowsReport, calibrate
    from foretaste.evaluation.rows import evaluate_rows
    from foretaste.experiment.compare_models import compare_models, read_recipes
    from foretaste.experiment.compare_plan import family_recipes
    from foretaste.experiment.compare_table import ModelComparison
    from foretaste.experiment.compress import Frontier, compress, compress_tables, frontier_svg
    from foretaste.experiment.fit import fit
    from foretaste.experiment.lists import write_lists
    from foretaste.experiment.plan import plan_size
    from foretaste.experiment.quickstart import Quickstart, run_quickstart
    from foretaste.experiment.recipe import (
        ExperimentConfig,
        override,
        read_experiment,
        recipe_of,
        with_overrides,
    )
    from foretaste.experiment.record import BundleContents, inspect_bundle, record_run, write_record
    from foretaste.experiment.run import (
        Run,
        evaluate_split,
        read_split,
        run_experiment,
        run_folder,
        start_run,
        stopped_after,
        to_recommender,
    )
    from foretaste.experiment.tracking import Tracker, TrackerKind, open_tracker
    from foretaste.experiment.tune import TuneResult, tune
    from foretaste.experiment.two_stage import Candidates, FirstStage, two_stage
    from foretaste.models.baselines import (
        EASEConfig,
        ImplicitALSConfig,
        ItemKNNConfig,
        PopularityConfig,
    )
    from foretaste.models.bert4rec import BERT4RecConfig
    from foretaste.models.catalogue import ModelConfig, TwoStageConfig
    from foretaste.models.hstu import HSTUConfig
    from foretaste.models.lightgcn import LightGCNConfig
    from foretaste.models.mf import MFConfig
    from foretaste.models.neumf import GMFConfig, MLPConfig, NeuMFConfig
    from foretaste.models.pinsage import PinSageConfig
    from foretaste.models.rankers import DeepFMConfig, DINConfig, MMoEConfig, SharedBottomConfig
    from foretaste.models.sasrec import SASRecConfig
    from foretaste.models.two_tower import TwoTowerConfig
    from foretaste.retrieval.changing import ChangingIndex
    from foretaste.serving.answer import Answer, Recommendation
    from foretaste.serving.recommender import Recommender, build_recommender, load
    from foretaste.serving.rules import Condition, Diversity, Rules
    from foretaste.serving.server import serve
    from foretaste.serving.settings import ServerSettings, add_token
    from foretaste.serving.versions import sign_bundle
    from foretaste.training.launcher import start_processes
    from foretaste.training.objectives import (
        MaskedItemConfig,
        NextItemConfig,
        ObjectiveConfig,
        PairsConfig,
        RowsConfig,
    )
    from foretaste.training.processes import joined_processes
    from foretaste.training.settings import TrainingConfig
    from foretaste.training.trained import Trained

__all__ = [
    "Answer",
    "BERT4RecConfig",
    "BundleContents",
    "BundleError",
    "Candidates",
    "CategoricalField",
    "ChangingIndex",
    "Comparison",
    "Condition",
    "Config",
    "ConfigError",
    "CrossField",
    "DINConfig",
    "DataError",
    "Dataset",
    "DeepFMConfig",
    "Diversity",
    "EASEConfig",
    "ExperimentConfig",
    "FeatureSchema",
    "Features",
    "FirstStage",
    "ForetasteError",
    "Frontier",
    "GMFConfig",
    "GraphConfig",
    "HSTUConfig",
    "Holdout",
    "ImplicitALSConfig",
    "Interactions",
    "ItemKNNConfig",
    "LightGCNConfig",
    "MFConfig",
    "MLPConfig",
    "MMoEConfig",
    "MaskedItemConfig",
    "ModelComparison",
    "ModelConfig",
    "MultiField",
    "NeuMFConfig",
    "NextItemConfig",
    "NonFiniteError",
    "NumericField",
    "ObjectiveConfig",
    "PairsConfig",
    "PinSageConfig",
    "PopularityConfig",
    "ProcessError",
    "Quickstart",
    "RankingGain",
    "Recommendation",
    "Recommender",
    "Report",
    "Reports",
    "Rows",
    "RowsConfig",
    "RowsReport",
    "Rules",
    "Run",
    "SASRecConfig",
    "SampledNegatives",
    "ServerSettings",
    "SharedBottomConfig",
    "SourceError",
    "Split",
    "SplitConfig",
    "Task",
    "TextField",
    "TooLargeError",
    "Tracker",
    "TrackerKind",
    "Trained",
    "TrainingConfig",
    "TuneResult",
    "TwoStageConfig",
    "TwoTowerConfig",
    "VectorField",
    "Vocabulary",
    "__version__",
    "add_token",
    "audit_events",
    "audit_split",
    "build_recommender",
    "calibrate",
    "check_place",
    "cold_items_split",
    "cold_users_split",
    "compare",
    "compare_models",
    "compare_rows",
    "compress",
    "compress_tables",
    "evaluate",
    "evaluate_rows",
    "evaluate_split",
    "family_recipes",
    "fit",
    "fit_features",
    "frontier_svg",
    "gates_svg",
    "get_dataset",
    "given_split",
    "given_split_by_column",
    "import_events",
    "inspect_bundle",
    "inspect_schema",
    "joined_processes",
    "leave_last_split",
    "leave_last_within_training",
    "load",
    "make_split",
    "open_store",
    "open_tracker",
    "override",
    "parse_settings",
    "plan_size",
    "random_split",
    "ratio_split",
    "read_experiment",
    "read_gates",
    "read_interactions",
    "read_recipes",
    "read_split",
    "recipe_of",
    "record_run",
    "reliability_svg",
    "rows_of",
    "run_experiment",
    "run_folder",
    "run_quickstart",
    "schema_from_toml",
    "schema_to_toml",
    "serve",
    "sign_bundle",
    "start_processes",
    "start_run",
    "stopped_after",
    "temporal_split",
    "to_recommender",
    "transfer",
    "tune",
    "two_stage",
    "with_overrides",
    "write_lists",
    "write_record",
    "write_store",
]

if not TYPE_CHECKING:  # the type checker reads the imports above

    def __getattr__(name: str) -> object:
        home = _homes().get(name)
        if home is None:
            raise AttributeError(f"module 'foretaste' has no attribute {name!r}")
        globals()[name] = getattr(import_module(home), name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


@cache
def _homes() -> dict[str, str]:
    """Return the module of each public name, which is imported when the name is first used."""
    nodes = ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.name: node.module for node in imports if node.module for name in node.names}
