"""Training by several processes compared with one; each part adds its figures to the record.

    python benchmarks/processes.py equality --data-dir ../shared/data --out RECORD.json

`equality`: nine models are trained on MovieLens-100K in 64 bits, by one process and by several; one
start trains all models. The record has the largest relative difference of a step's loss in the
complete fit, and whether all users' lists of ten are equal. `equality32` trains in 32 bits and
records the largest relative difference of the first 20 losses, and NDCG@10 on the test part for
each number of processes, with the 95 % interval of one process.

`table`: the memory of each of two processes for its part of a table of 4 M x 64, and look-ups per
second with backward pass and update, in turns with TorchRec (`make torchrec`) if it is installed.

`moves`: a run of three epochs in 64 bits with sharded tables is begun by 2 processes, continued by
1, 3 or 4, and then by 2 again. The record has the largest relative difference of a loss, and the
largest difference of a final weight, from a run by one process.

`kills`: one of two processes is killed at a random step. The other has to end, the error has to
name the killed one, and 1, 2 or 3 processes have to resume and reach the losses of a run without a
kill. Every other round shards the tables.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import foretaste as ft
from foretaste.evaluation.report import Report
from foretaste.experiment.record import run_facts
from foretaste.models.layers.table import DenseConfig, OwnRows
from foretaste.training import processes
from foretaste.training.checkpoint import Epoch
from foretaste.training.settings import AdamWByRows, make_optimizer
from foretaste.training.sharded import sharding

sys.path.append(str(Path(__file__).parents[1] / "tests"))
PAIRS = ft.PairsConfig(loss="sampled_softmax", in_batch=True, log_q=True, negatives=0)
ROWS = ft.RowsConfig(negatives=1)
TASKS = (ft.Task(name="seen"), ft.Task(name="liked", column="rating", above=3.5))
SMALL: dict[str, Any] = {"embedding_dim": 16}
SEQUENCE: dict[str, Any] = SMALL | {"max_len": 20, "num_blocks": 1}
MODELS: dict[str, tuple[Any, Any]] = {
    "mf": (ft.MFConfig(**SMALL), ft.PairsConfig(negatives=256)),
    "two_tower": (ft.TwoTowerConfig(**SMALL), PAIRS),
    "sasrec": (ft.SASRecConfig(**SEQUENCE), ft.NextItemConfig()),
    "bert4rec": (ft.BERT4RecConfig(**SEQUENCE), ft.MaskedItemConfig(mask_ratio=0.3)),
    "lightgcn": (ft.LightGCNConfig(**SMALL, num_layers=2), ft.PairsConfig(negatives=256)),
    "pinsage": (ft.PinSageConfig(**SMALL), ft.PairsConfig(negatives=256)),
    "deepfm": (ft.DeepFMConfig(embedding_dim=8, hidden=(16,)), ft.RowsConfig(negatives=1)),
    "din": (ft.DINConfig(embedding_dim=8, hidden=(16,)), ft.RowsConfig(negatives=1)),
    "mmoe": (
        ft.MMoEConfig(tasks=TASKS, embedding_dim=8, expert_hidden=(16,)),
        ft.RowsConfig(negatives=1),
    ),
}
MOVED = {"mf": "row_adagrad", "sasrec": "lazy_adamw", "deepfm": "adamw"}
"""Models whose runs are moved, each with a different optimizer for its tables."""
LIST = 10
METRIC, FIRST = f"ndcg_at_{LIST}", 20
ROWS_OF_TABLE, WIDTH = 4_000_000, 64
LOOK_UPS, TURNS = 2**16, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--runs", type=Path, help="keep the runs here, and use existing ones")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--worker", type=Path, help="used by itself")
    options = parser.parse_args()
    if options.worker is not None:
        WORKERS[options.part](options)
        return
    found = PARTS[options.part](options)
    if options.out is None:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    record |= found
    record["facts"] = record.get("facts", {}) | {options.part: run_facts(threads=1)}
    options.out.write_text(json.dumps(record, indent=2) + "\n")


def start(num: int, options: argparse.Namespace, folder: Path) -> None:
    """Start this file in this many processes, even if there are fewer cores."""
    run = ["-m", "torch.distributed.run", "--nproc-per-node", str(num)] if num > 1 else []
    own = [options.part, "--worker", folder, "--data-dir", options.data_dir]
    models = ["--models", *options.models, "--epochs", options.epochs]
    subprocess.run(
        [sys.executable, *run, __file__, *map(str, own), *map(str, models)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )


# --- equality ------------------------------------------------------------------------------------


def equality(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the losses and lists of complete fits by several processes with those of one."""
    with TemporaryDirectory() as place:
        folders = started(options, options.runs or Path(place), written="lists.json")
        alone = folders.pop(1)
        return {
            "equality_float64": {
                name: max(difference(alone, folder, name) for folder in folders.values())
                for name in options.models
            },
            "equal_lists": {
                name: all(
                    (folder / name / "lists.json").read_text()
                    == (alone / name / "lists.json").read_text()
                    for folder in folders.values()
                )
                for name in options.models
            },
            "equality": {
                "processes": options.processes,
                "epochs": options.epochs,
                "steps": {name: len(losses(alone / name)) for name in options.models},
            },
        }


def equality_32(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the first losses and the final metrics in 32 bits."""
    with TemporaryDirectory() as place:
        folders = started(options, options.runs or Path(place), written="report.json")
        reports = {
            num: {
                name: Report.from_json((folder / name / "report.json").read_text())
                for name in options.models
            }
            for num, folder in folders.items()
        }
        alone, one = folders.pop(1), reports.pop(1)
        return {
            "first_losses_float32": {
                name: max(difference(alone, folder, name, FIRST) for folder in folders.values())
                for name in options.models
            },
            "test_float32": {
                name: {
                    "one": one[name].metrics[METRIC],
                    "interval": list(one[name].intervals[METRIC]),
                    **{str(num): found[name].metrics[METRIC] for num, found in reports.items()},
                }
                for name in options.models
            },
        }


def started(options: argparse.Namespace, kept: Path, *, written: str) -> dict[int, Path]:
    """Train with each number of processes where it was not done; return the folders."""
    folders = {num: kept / str(num) for num in (1, *options.processes)}
    for num, folder in folders.items():
        if not all((folder / name / written).exists() for name in options.models):
            folder.mkdir(parents=True, exist_ok=True)
            start(num, options, folder)
    return folders


def difference(alone: Path, folder: Path, name: str, first: int | None = None) -> float:
    """Return the largest relative difference of a step's loss, of all steps or the first."""
    both = zip(losses(folder / name), losses(alone / name), strict=True)
    return max(abs(a / b - 1) for a, b in islice(both, first))


def losses(folder: Path) -> list[float]:
    lines = (folder / "steps.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def train_all(options: argparse.Namespace) -> None:
    """Train the models; the first process writes its lists (64 bits) or its report (32 bits)."""
    from test_golden import in_64_bits  # noqa: PLC0415

    events = ft.get_dataset("ml-100k", data_dir=options.data_dir).events
    split = ft.leave_last_split(events)
    training = ft.TrainingConfig(epochs=options.epochs, patience=None, device="cpu")
    is_wide = options.part == "equality"
    with ft.joined_processes() as together, in_64_bits() if is_wide else nullcontext():
        for name in options.models:
            model, objective = MODELS[name]
            folder = options.worker / name
            trained = ft.fit(
                model, split, training=training, objective=objective, folder=folder, show=False
            )
            if not is_wide:
                report = ft.evaluate(trained, split.test, k=LIST)  # its queries are shared
                together.first_goes(partial((folder / "report.json").write_text, report.to_json()))
            elif together.is_first:
                recommender = ft.to_recommender(trained, ft.Reports())
                lists = {str(user): listed(recommender, user) for user in events.users.ids}
                (folder / "lists.json").write_text(json.dumps(lists))


def listed(recommender: ft.Recommender, user: Any) -> list[str]:
    return [str(row.item_id) for row in recommender.recommend(user, k=LIST).rows]


# --- moves ---------------------------------------------------------------------------------------


def moves(options: argparse.Namespace) -> dict[str, Any]:
    """Compare runs continued by other numbers of processes with runs by one process."""
    found: dict[str, float] = {}
    with TemporaryDirectory() as place:
        folder = Path(place)
        for num in (1, 2):
            start(num, options, folder / str(num))
        found["2 from the start"] = moved_difference(folder / "1", folder / "2")
        for num in (1, 3, 4):
            there, back = folder / f"2 to {num}", folder / f"{num} to 2"
            shutil.copytree(folder / "2" / "after 1", there)
            start(num, options, there)
            (there / "after 2").rename(back)
            start(2, options, back)
            found |= {run.name: moved_difference(folder / "1", run) for run in (there, back)}
    return {"moves_float64": found, "moves": {"epochs": 3, "models": MOVED}}


def moved_difference(alone: Path, folder: Path) -> float:
    """Return the largest relative difference of a loss, or difference of a weight."""
    found = [difference(alone, folder, name) for name in MOVED]
    for name in MOVED:
        weights = load_file(folder / name / "weights.safetensors")
        for part, own in load_file(alone / name / "weights.safetensors").items():
            found.append(float((weights[part].double() - own.double()).abs().max()))
    return max(found)


def train_moved(options: argparse.Namespace) -> None:
    """Continue or start runs; keep a copy of each after each epoch."""
    from test_golden import in_64_bits  # noqa: PLC0415

    events = ft.get_dataset("ml-100k", data_dir=options.data_dir).events
    split = ft.leave_last_split(events)
    with ft.joined_processes() as together, in_64_bits():
        for name, tables in MOVED.items():
            run, (model, objective) = options.worker / name, MODELS[name]

            def keep(epoch: Epoch, run: Path = run) -> None:
                if together.is_first:  # for which the others wait in the next step
                    shutil.copytree(run, run.parent / f"after {epoch.epoch}" / run.name)

            training = ft.TrainingConfig(
                epochs=3, patience=None, device="cpu", tables=tables, sharded_from=1
            )
            trained = ft.fit(
                model,
                split,
                training=training,
                objective=objective,
                folder=run,
                resume=True,
                on_epoch=keep,
                show=False,
            )
            if together.is_first:
                weights = {n: t.contiguous() for n, t in trained.model.state_dict().items()}
                save_file(weights, run / "weights.safetensors")


# --- sharded tables -------------------------------------------------------------------------------


def table(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a process's memory for a large table, and how fast two look up, learn and update."""
    with TemporaryDirectory() as place:
        start(2, options, Path(place))
        each = [json.loads((Path(place) / f"{rank}.json").read_text()) for rank in range(2)]
    rates = {
        name: {
            "median": round(2 * LOOK_UPS / statistics.median(seconds)),
            "best": round(2 * LOOK_UPS / min(seconds)),
        }
        for name, seconds in each[0]["seconds"].items()
    }
    return {
        "resident_gib": {
            f"table of {ROWS_OF_TABLE:,} x {WIDTH}, whole": ROWS_OF_TABLE * WIDTH * 4 / 2**30,
            "each process": [round(found["holds"] / 2**30, 3) for found in each],
        },
        "lookups_per_second": rates,
        "table": {"look-ups of each process a step": LOOK_UPS, "steps": TURNS},
    }


def measure_table(options: argparse.Namespace) -> None:
    """Measure in each of several processes; the first one writes."""
    with ft.joined_processes() as together:
        before = resident()
        with sharding(1):
            dealt = DenseConfig().make(ROWS_OF_TABLE, WIDTH)
        holds = resident() - before
        settings = ft.TrainingConfig(tables="row_adagrad", learning_rate=0.01)
        optimizer = make_optimizer(list(dealt.parameters()), settings, tables=[dealt])
        grad_ND = torch.full((LOOK_UPS, WIDTH), 0.1)  # in place of a loss, which costs as much
        steps = {"foretaste": partial(step, dealt, optimizer, grad_ND)}
        if find_spec("torchrec"):
            steps["torchrec"] = torchrec_step(grad_ND)
        seconds = {name: list[float]() for name in steps}
        for _ in range(TURNS):
            for name, take in steps.items():  # in turns, so that both have the same load beside
                row_N = torch.randint(ROWS_OF_TABLE, (LOOK_UPS,))
                processes.wait()
                started = time.perf_counter()
                take(row_N)
                processes.wait()
                seconds[name].append(time.perf_counter() - started)
        found = {"holds": holds, "seconds": seconds}
        (options.worker / f"{processes.share().rank}.json").write_text(json.dumps(found))
        together.first_goes(lambda: None)


def step(table: OwnRows, optimizer: AdamWByRows, grad_ND: Tensor, row_N: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    table(row_N).backward(grad_ND)
    optimizer.step()


def torchrec_step(grad_ND: Tensor) -> Callable[[Tensor], None]:
    """Return the same step by TorchRec: a table by rows, its own plan and fused optimizer."""
    import torchrec  # noqa: PLC0415
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder  # noqa: PLC0415
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology  # noqa: PLC0415
    from torchrec.optim import RowWiseAdagrad  # noqa: PLC0415
    from torchrec.optim.apply_optimizer_in_backward import (  # noqa: PLC0415
        apply_optimizer_in_backward,
    )

    class ByRows(EmbeddingBagCollectionSharder):
        """A sharder that distributes rows on a CPU too."""

        def sharding_types(self, compute_device_type: str) -> list[str]:
            return ["row_wise"]

    table = torchrec.EmbeddingBagConfig(
        name="table", embedding_dim=WIDTH, num_embeddings=ROWS_OF_TABLE, feature_names=["id"]
    )
    tables = torchrec.EmbeddingBagCollection(device=torch.device("meta"), tables=[table])
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": 0.01})
    sharder = ByRows()
    topology = Topology(world_size=processes.share().world, compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology)
    group = torch.distributed.group.WORLD
    model = torchrec.distributed.DistributedModelParallel(
        tables,
        device=torch.device("cpu"),
        plan=planner.collective_plan(tables, [sharder], group),
        sharders=[sharder],
    )
    length_N = torch.ones(LOOK_UPS, dtype=torch.int64)

    def take(row_N: Tensor) -> None:
        ids = torchrec.KeyedJaggedTensor(keys=["id"], values=row_N, lengths=length_N)
        model(ids).wait()["id"].backward(grad_ND)

    return take


def resident() -> int:
    """Return the bytes of memory that this process has in use."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


# --- kills ---------------------------------------------------------------------------------------

KILLED = {"epochs": 20, "batch_events": 512, "checkpoint_seconds": 0, "patience": "none"}
"""Training settings that differ from the recipe of the tests."""


def kills(options: argparse.Namespace) -> dict[str, Any]:
    """Kill a random process at a random step, and resume with a random number of them."""
    from test_processes import RECIPE  # noqa: PLC0415

    random.seed(0)
    with TemporaryDirectory() as place:
        folder = Path(place)
        recipe = folder / "mf.toml"
        recipe.write_text(RECIPE)
        rows = [f"u{user},i{(user * 7 + n * n) % 97},{n}" for user in range(300) for n in range(20)]
        (folder / "events.csv").write_text("\n".join(["user,item,time", *rows]))
        subprocess.run(fit_command(1, recipe, "alone"), check=True, capture_output=True)
        alone = losses(folder / "alone.run")
        rounds = [kill(recipe, alone, number) for number in range(options.rounds)]
    return {
        "kills": {
            "rounds": len(rounds),
            "named": sum(found["named"] for found in rounds),
            "resumed": sum(found["resumed"] for found in rounds),
            "slowest_end_s": max(found["end_s"] for found in rounds),
            "largest_difference_of_a_loss": max(found["difference"] for found in rounds),
            "each": rounds,
        }
    }


def kill(recipe: Path, alone: Sequence[float], number: int) -> dict[str, Any]:
    """Kill one of two processes; return how the other ended and how the run was resumed."""
    name, rank = f"round-{number}", random.randrange(2)
    dealt = number % 2 == 1
    at, again = random.randrange(1, len(alone) - 20), random.choice([1, 2, 3])
    log, said = recipe.parent / f"{name}.run" / "steps.jsonl", recipe.parent / f"{name}.txt"
    with (
        said.open("w") as words,
        subprocess.Popen(
            fit_command(2, recipe, name, dealt=dealt), stdout=words, stderr=words
        ) as launcher,
    ):
        while launcher.poll() is None and not (log.exists() and log.read_text().count("\n") >= at):
            time.sleep(0.01)
        os.kill(process_of(launcher.pid, rank), signal.SIGKILL)
        started = time.perf_counter()
        launcher.wait()
        seconds = time.perf_counter() - started
    its_name = f"process {rank} of 2 ended with signal SIGKILL"
    named = launcher.returncode != 0 and its_name in said.read_text()
    resumed = subprocess.run(
        [*fit_command(again, recipe, name, dealt=dealt), "--resume"],
        capture_output=True,
        check=False,
    )
    found = losses(log.parent)
    same = [abs(a / b - 1) for a, b in zip(found, alone, strict=False)]
    is_whole = resumed.returncode == 0 and len(found) == len(alone)
    return {
        "rank": rank,
        "step": at,
        "tables_dealt": dealt,
        "end_s": round(seconds, 1),
        "named": named,
        "resumed_with": again,
        "resumed": is_whole,
        **({} if is_whole else {"said": resumed.stderr.decode()[-2000:]}),
        "difference": max(same),
    }


def fit_command(num: int, recipe: Path, name: str, *, dealt: bool = True) -> list[str]:
    """Return the command that trains with this many processes, by torchrun if they outnumber the
    cores.
    """
    by_torchrun = ["torch.distributed.run", "--nproc-per-node", str(num), "-m"]
    start = by_torchrun if num > 2 else []
    command = [sys.executable, "-m", *start, "foretaste", "fit", str(recipe)]
    out = ["--out", str(recipe.parent / name), "--data-dir", str(recipe.parent)]
    settings = KILLED | ({"sharded_from": 1} if dealt else {})
    given = [word for n, value in settings.items() for word in ("--set", f"training.{n}={value}")]
    return [*command, *out, *given, *(["--processes", "2"] if num == 2 else [])]


def process_of(launcher: int, rank: int) -> int:
    """Return the process with a rank, which its environment contains."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            given = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in given:
            return int(folder.name)
    raise SystemExit(f"process {rank} of {launcher} is not there")


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "equality": equality,
    "equality32": equality_32,
    "moves": moves,
    "table": table,
    "kills": kills,
}
WORKERS: dict[str, Callable[[argparse.Namespace], None]] = {
    "equality": train_all,
    "equality32": train_all,
    "moves": train_moved,
    "table": measure_table,
}


if __name__ == "__main__":
    main()
