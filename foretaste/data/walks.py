"""Random walks with restart, and whom they visit most: approximate personalised PageRank.

Every step of every walk has its own random number, a hash of (seed, node, walk, hop), so results
do not depend on how many threads walk. The walks of a node go forward side by side: while one
waits for memory, the others move.

The loops are compiled by numba and cached; those that take `low` and `high` work on these nodes
alone and release the interpreter. They carry `no_type_check` because numba must see the plain
function.

Shape legend: V nodes, N nodes asked for, T neighbours, E directed edges.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Float64, Int64

from foretaste.data.graph import Graph
from foretaste.data.neighbourhoods import Neighbourhoods
from foretaste.errors import ConfigError, DataError

_BLOCK = 2048
"""Nodes that a thread takes at a time."""
_MOST_VISITS = 2**24
"""Of one node: the table that counts them takes 16 bytes a visit in each thread."""


def most_visited(
    graph: Graph,
    *,
    top: int,
    seed: int,
    walks: int = 200,
    hops: int = 3,
    restart: float = 0.0,
    nodes: Int64[np.ndarray, " N"] | None = None,
    counted: tuple[int, int] | None = None,
    threads: int | None = None,
) -> Neighbourhoods:
    r"""Walk from each node and return the nodes visited most, weighted by how often.

    Before each hop a walk goes back to its start with chance :math:`\alpha` (`restart`); then it
    goes to one of its node's neighbours, each by the weight of the tie (as even as 32 bits are).
    With ever longer walks the share of visits at :math:`v \neq s` tends to personalised PageRank
    up to a constant,

    .. math:: \pi_s \propto \sum_{k \geq 0} (1 - \alpha)^k P^k e_s

    and with `hops` of 3 and no restart it is the mean of the first three steps. Being at the
    start again is no visit.

    Args:
        graph: Who is tied to whom.
        top: T, how many neighbours of a node are kept at most; of equally visited ones, those
            with the lower number.
        seed: Decides all walks.
        walks: Walks from each node.
        hops: Length of a walk.
        restart: Chance in [0, 1) to go back before a hop.
        nodes: Where to start; None for every node.
        counted: First and last-plus-one node whose visits count; others are only walked
            through. None: all count.
        threads: How many walk at a time; None: as many as there are cores.

    Returns:
        A row for each node asked for, most visited first; empty for isolated nodes.

    Raises:
        ConfigError: A number is out of range.
        DataError: A node does not exist.

    References:
        Ying et al., "Graph Convolutional Neural Networks for Web-Scale Recommender Systems", KDD
        2018, https://arxiv.org/abs/1806.01973, section 3.1; Eksombatchai et al., "Pixie", WWW
        2018, https://arxiv.org/abs/1711.07601
    """
    if min(top, walks, hops) < 1 or not 0 <= restart < 1:
        raise ConfigError(
            f"top {top}, walks {walks} and hops {hops} must be 1 or more, and restart {restart} "
            "in [0, 1)"
        )
    if walks * hops > _MOST_VISITS:
        raise ConfigError(
            f"{walks} walks of {hops} hops are {walks * hops} visits a node: take at most "
            f"{_MOST_VISITS}"
        )
    node_N = _start_nodes(graph, nodes)
    first, last = counted or (0, graph.num_nodes)
    found = Neighbourhoods.empty(len(node_N), top)
    threshold = np.uint64(int(restart * 2**32))
    total_E = _running_totals(graph)

    def walk(low: int, high: int) -> None:
        _most_visited(
            node_N,
            low,
            high,
            graph.offsets_V1,
            graph.neighbour_E,
            total_E,
            walks,
            hops,
            threshold,
            np.uint64(seed % 2**64),
            first,
            last,
            found.neighbour_VT,
            found.weight_VT,
        )

    _in_blocks(len(node_N), walk, threads)
    return found


def uniform_neighbours(
    graph: Graph,
    *,
    top: int,
    seed: int,
    nodes: Int64[np.ndarray, " N"] | None = None,
    counted: tuple[int, int] | None = None,
    threads: int | None = None,
) -> Neighbourhoods:
    """Return for each node up to `top` of its direct neighbours, drawn alike and weighted alike.

    Arguments, row order (by number) and errors are those of `most_visited`.

    References:
        Hamilton, Ying and Leskovec, "Inductive Representation Learning on Large Graphs", NeurIPS
        2017, https://arxiv.org/abs/1706.02216. **Departure**: drawn once, not anew in each step.
    """
    if top < 1:
        raise ConfigError(f"top {top} must be 1 or more")
    node_N = _start_nodes(graph, nodes)
    first, last = counted or (0, graph.num_nodes)
    found = Neighbourhoods.empty(len(node_N), top)

    def draw(low: int, high: int) -> None:
        _uniform(
            node_N,
            low,
            high,
            graph.offsets_V1,
            graph.neighbour_E,
            np.uint64(seed % 2**64),
            first,
            last,
            found.neighbour_VT,
            found.weight_VT,
        )

    _in_blocks(len(node_N), draw, threads)
    return found


def _start_nodes(graph: Graph, nodes: np.ndarray | None) -> Int64[np.ndarray, " N"]:
    if nodes is None:
        return np.arange(graph.num_nodes)
    if len(nodes) and not (nodes.min() >= 0 and nodes.max() < graph.num_nodes):
        raise DataError(
            f"walks should start at node {nodes.max()} (or one below 0) of a graph of "
            f"{graph.num_nodes} nodes"
        )
    return nodes


def _running_totals(graph: Graph) -> Float64[np.ndarray, " E"]:
    """Return each edge's weight plus those before it of the same node; empty if all weigh 1."""
    if graph.weight_E is None:
        return np.empty(0)
    total_E1 = np.concatenate([[0.0], np.cumsum(graph.weight_E, dtype=np.float64)])
    begin_E = np.repeat(graph.offsets_V1[:-1], graph.degree_V)
    return total_E1[1:] - total_E1[begin_E]


def _in_blocks(num: int, work: Callable[[int, int], None], threads: int | None) -> None:
    starts = range(0, num, _BLOCK)
    workers = max(1, min(threads or os.cpu_count() or 1, len(starts)))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda low: work(low, min(low + _BLOCK, num)), starts))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@numba.njit(cache=True, nogil=True, inline="always")
@no_type_check
def _mixed(word):
    """Scramble 64 bits: the last steps of SplitMix64 (Steele et al., OOPSLA 2014)."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
@no_type_check
def _most_visited(
    node_N,
    low,
    high,
    offsets_V1,
    neighbour_E,
    total_E,
    walks,
    hops,
    threshold,
    seed,
    first,
    last,
    out_NT,
    weight_NT,
):
    """Fill rows `low … high - 1`.

    Visits are counted in a hash table of twice as many slots, which stays in the core's cache.
    """
    slots = 2
    while slots < 2 * walks * hops:
        slots *= 2
    key_S = np.full(slots, -1, np.int32)
    count_S = np.zeros(slots, np.int32)
    used = np.empty(walks * hops, np.int64)
    here_W = np.empty(walks, np.int32)
    best_T = np.empty(out_NT.shape[1], np.int64)
    times_T = np.empty(out_NT.shape[1], np.int32)
    for row in range(low, high):
        start = node_N[row]
        if offsets_V1[start + 1] == offsets_V1[start]:
            continue
        stream = _mixed(seed + _mixed(np.uint64(start) * _GOLDEN + np.uint64(1)))
        here_W[:] = start
        num_used = 0
        for _hop in range(hops):
            stream = _hop_all(here_W, start, stream, threshold, offsets_V1, neighbour_E, total_E)
            num_used = _count(here_W, start, first, last, key_S, count_S, used, num_used)
        found = _keep_best(key_S, count_S, used[:num_used], best_T, times_T)
        total = times_T[:found].sum()
        for place in range(found):
            out_NT[row, place] = best_T[place]
            weight_NT[row, place] = times_T[place] / total


@numba.njit(cache=True, nogil=True)
@no_type_check
def _hop_all(here_W, start, stream, threshold, offsets_V1, neighbour_E, total_E):
    """Move each walk by one hop; return where the stream of random numbers is then."""
    half, low_bits = np.uint64(32), np.uint64(0xFFFFFFFF)
    for walk in range(here_W.shape[0]):
        stream += _GOLDEN
        random = _mixed(stream)
        here = start if (random & low_bits) < threshold else here_W[walk]
        begin, end = offsets_V1[here], offsets_V1[here + 1]
        if total_E.shape[0] > 0:
            aim = np.float64(random >> half) * 2.0**-32 * total_E[end - 1]
            begin += np.searchsorted(total_E[begin : end - 1], aim, side="right")
        else:
            begin += np.int64((random >> half) * np.uint64(end - begin) >> half)
        here_W[walk] = neighbour_E[begin]
    return stream


@numba.njit(cache=True, nogil=True)
@no_type_check
def _count(here_W, start, first, last, key_S, count_S, used, num_used):
    """Count where the walks are; return how many slots of the table are in use."""
    slots, shift = key_S.shape[0], np.uint64(64)
    while slots > 1:
        slots, shift = slots >> 1, shift - np.uint64(1)
    for walk in range(here_W.shape[0]):
        here = here_W[walk]
        if here == start or here < first or here >= last:
            continue
        slot = np.int64((np.uint64(here) * _GOLDEN) >> shift)
        while key_S[slot] != here and key_S[slot] != -1:
            slot = (slot + 1) & (key_S.shape[0] - 1)
        if key_S[slot] == -1:
            key_S[slot] = here
            used[num_used] = slot
            num_used += 1
        count_S[slot] += 1
    return num_used


@numba.njit(cache=True, nogil=True)
@no_type_check
def _keep_best(key_S, count_S, used, best_T, times_T):
    """Sort the most visited into place and empty the table; return how many there are."""
    top, found = best_T.shape[0], 0
    for slot in used:
        node, times = key_S[slot], count_S[slot]
        key_S[slot], count_S[slot] = -1, 0
        if found == top and not _before(times, node, times_T[top - 1], best_T[top - 1]):
            continue
        found = min(found + 1, top)
        hole = found - 1
        while hole > 0 and _before(times, node, times_T[hole - 1], best_T[hole - 1]):
            best_T[hole], times_T[hole] = best_T[hole - 1], times_T[hole - 1]
            hole -= 1
        best_T[hole], times_T[hole] = node, times
    return found


@numba.njit(cache=True, nogil=True, inline="always")
@no_type_check
def _before(times, node, other_times, other_node):
    """Return whether a node comes first: visited more often, or as often with a lower number."""
    return times > other_times or (times == other_times and node < other_node)


@numba.njit(cache=True, nogil=True)
@no_type_check
def _uniform(node_N, low, high, offsets_V1, neighbour_E, seed, first, last, out_NT, weight_NT):
    """Fill rows `low … high - 1` by selection sampling (Fan et al., JASA 1962)."""
    top = out_NT.shape[1]
    for row in range(low, high):
        node = node_N[row]
        left = 0
        for at in range(offsets_V1[node], offsets_V1[node + 1]):
            if first <= neighbour_E[at] < last:
                left += 1
        wanted = min(top, left)
        state = _mixed(seed + _mixed(np.uint64(node) * _GOLDEN + np.uint64(1)))
        found = 0
        for at in range(offsets_V1[node], offsets_V1[node + 1]):
            if not first <= neighbour_E[at] < last:
                continue
            state += _GOLDEN
            if (_mixed(state) >> np.uint64(32)) * np.uint64(left) < (
                np.uint64(wanted - found) << np.uint64(32)
            ):
                out_NT[row, found] = neighbour_E[at]
                weight_NT[row, found] = 1 / wanted
                found += 1
            left -= 1
