"""foretaste's SASRec or BERT4Rec, one epoch per turn, with the peers' data, sizes and loss.

An epoch learns from the same events as a peer's: each user's last `max_len`. Differences: a batch
holds as many events as a peer's batch on average, but from users with histories of similar length,
so that nothing is computed for padding; a batch shares its sampled negatives. `--ours` changes
settings, such as `{"training": {"precision": "bf16"}}`.
"""

import math
from typing import Any

import polars as pl
import torch
from turns import read_pairs, say, say_ready, sequence_arguments, wait_for_turn

from foretaste.data.reading import read_interactions
from foretaste.data.splitting import leave_last_split
from foretaste.experiment.fit import fit
from foretaste.models.bert4rec import BERT4RecConfig
from foretaste.models.sasrec import SASRecConfig
from foretaste.training.checkpoint import Epoch
from foretaste.training.objectives import MaskedItemConfig, NextItemConfig
from foretaste.training.settings import TrainingConfig

KINDS = {
    "sasrec": (SASRecConfig, NextItemConfig),
    "bert4rec": (BERT4RecConfig, MaskedItemConfig),
}


def main() -> None:
    args = sequence_arguments("foretaste's SASRec or BERT4Rec, one epoch per turn")
    torch.set_num_threads(args.threads)
    users, items = read_pairs(args.data, args.users)
    events = read_interactions(
        pl.DataFrame({"user": users, "item": items}), user="user", item="item"
    )
    split = leave_last_split(events)
    lengths = torch.from_numpy(split.train.offsets).diff()
    events_per_epoch = int(lengths.clamp(max=args.max_len).sum())
    mean_length = events_per_epoch / int((lengths > 0).sum())
    model = {"num_blocks": 2, "num_heads": 2, "max_len": args.max_len}
    training = {
        "epochs": args.epochs,
        "batch_events": math.ceil(args.batch_size * mean_length),
        "validate_every": args.evaluate_every or args.epochs,
        "patience": None,
    }
    objective = {"loss": args.loss, "windows": "last"}
    if args.loss != "softmax":
        objective["negatives"] = args.negatives
    if args.model == "bert4rec":
        objective |= {"mask_ratio": args.mask_ratio, "last_share": 0.0}
    seconds = [0.0]  # as `Epoch.seconds` counts them: all epochs and validations so far

    def tell(epoch: Epoch) -> None:
        train_seconds = split_events / epoch.events_per_second
        message: dict[str, Any] = {"epoch": epoch.epoch, "train_seconds": train_seconds}
        if epoch.validation is not None:
            message["ndcg_at_10"] = epoch.validation
            message["evaluation_seconds"] = epoch.seconds - seconds[-1] - train_seconds
        seconds.append(epoch.seconds)
        say(message)
        wait_for_turn()

    model_kind, objective_kind = KINDS[args.model]
    objective_config = objective_kind(**objective | args.ours.get("objective", {}))
    split_events = len(split.train) if objective_config.windows == "all" else events_per_epoch
    say_ready(
        ["torch", "numpy"],
        events=len(split.train),
        settings={"model": model, "training": training, "objective": objective, **args.ours},
    )
    fit(
        model_kind(**model | args.ours.get("model", {})),
        split,
        seed=args.seed,
        training=TrainingConfig(**training | args.ours.get("training", {})),
        objective=objective_config,
        show=False,
        on_epoch=tell,
    )


if __name__ == "__main__":
    main()
