"""PyG's side of `lightgcn.py`: three propagations of its LightGCN per turn, with their gradient."""

import torch
from lightgcn_pairs import arguments, best_of_three, read_rows
from torch_geometric.nn import LightGCN
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import to_undirected
from turns import say, say_ready, wait_for_turn


def main() -> None:
    parser = arguments("PyG's LightGCN")
    parser.add_argument("--form", choices=["edge_index", "sparse"], required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    user_P, item_P = map(torch.tensor, read_rows(args.data))
    user_P, item_P = (end.unique(return_inverse=True)[1] for end in (user_P, item_P))
    num_users = int(user_P.max()) + 1
    num_nodes = num_users + int(item_P.max()) + 1
    edges_2E = to_undirected(torch.stack([user_P, num_users + item_P]), num_nodes=num_nodes)
    edges_2E, weight_E = gcn_norm(edges_2E, None, num_nodes, add_self_loops=False)
    model = LightGCN(num_nodes, args.dim, args.layers)
    for conv in model.convs:
        conv.normalize = False  # the weights are there already
    if args.form == "sparse":
        matrix = torch.sparse_coo_tensor(edges_2E, weight_E, (num_nodes, num_nodes))
        inputs = (matrix.coalesce().to_sparse_csr(),)
    else:
        inputs = (edges_2E, weight_E)
    gradient_VD = torch.randn(num_nodes, args.dim)

    def work() -> None:
        model.zero_grad(set_to_none=True)
        model.get_embedding(*inputs).backward(gradient_VD)

    work()
    say_ready(["torch", "torch_geometric"], nodes=num_nodes, edges=edges_2E.shape[1])
    while True:
        say({"seconds": best_of_three(work)})
        wait_for_turn()


if __name__ == "__main__":
    main()
