"""foretaste's side of `lightgcn.py`: three propagations or one epoch per turn."""

import polars as pl
import torch
from lightgcn_pairs import arguments, best_of_three, read_rows
from turns import say, say_ready, wait_for_turn

from foretaste.data.graph import graph_of
from foretaste.data.interactions import Interactions
from foretaste.data.reading import read_interactions
from foretaste.data.splitting import given_split
from foretaste.experiment.fit import fit
from foretaste.models.layers.graph_conv import GraphConv
from foretaste.models.lightgcn import LightGCNConfig
from foretaste.training.checkpoint import Epoch
from foretaste.training.objectives import PairsConfig
from foretaste.training.settings import TrainingConfig, keep_memory

EPOCHS = 1000


def propagations(events: Interactions, dim: int, layers: int) -> None:
    keep_memory()
    graph = graph_of(events)
    conv = GraphConv(graph)
    x_VD = torch.randn(graph.num_nodes, dim, requires_grad=True)
    gradient_VD, every_V = torch.randn(graph.num_nodes, dim), torch.arange(graph.num_nodes)

    def work() -> None:
        x_VD.grad = None
        conv(x_VD, every_V, num_layers=layers)[0].backward(gradient_VD)

    work()
    say_ready(["torch"], nodes=graph.num_nodes, edges=len(graph.neighbour_E))
    while True:
        say({"seconds": best_of_three(work)})
        wait_for_turn()


def epochs(events: Interactions, dim: int, layers: int, batch_size: int, loss: str) -> None:
    def tell(epoch: Epoch) -> None:
        say({"seconds": len(events) / epoch.events_per_second, "loss": epoch.loss})
        wait_for_turn()

    negatives = {"negatives": 0, "row_negatives": 1} if loss == "bpr" else {"negatives": 2048}
    say_ready(["torch"], events=len(events), loss=loss, **negatives)
    last = events.select(events.user_idx == 0)  # the test part may not be empty
    fit(
        LightGCNConfig(embedding_dim=dim, num_layers=layers),
        given_split(train=events, test=last),
        training=TrainingConfig(epochs=EPOCHS, batch_events=batch_size, device="cpu"),
        objective=PairsConfig(loss=loss, l2=1e-4, **negatives),
        show=False,
        on_epoch=tell,
    )


def main() -> None:
    parser = arguments("foretaste's LightGCN")
    parser.add_argument("--work", choices=["propagation", "epoch"], required=True)
    parser.add_argument("--loss", choices=["bpr", "sampled_softmax"], default="bpr")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    users, items = read_rows(args.data)
    pairs = pl.DataFrame({"user": users, "item": items})
    events = read_interactions(pairs, user="user", item="item")
    if args.work == "propagation":
        propagations(events, args.dim, args.layers)
    epochs(events, args.dim, args.layers, args.batch_size, args.loss)


if __name__ == "__main__":
    main()
