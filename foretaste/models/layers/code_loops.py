"""The loops behind scoring by codes: a row's score is a sum of one number for each of its codes.

Compiled by numba and cached; they release the interpreter. They carry `no_type_check` because numba
must see the plain function. Places are unsigned where they can be: numba then looks for none
below 0.

Shape legend: R rows, M codes of a row, C numbers that a code chooses among, N all codes or numbers
in one row, B queries, K list length, X left out, F found.
"""

from typing import no_type_check

import numba
import numpy as np

CODES = 256
BLOCK = 1024
"""Rows scored at a time: their scores stay in the first cache."""
_U = np.uint64


@numba.njit(cache=True, nogil=True)
@no_type_check
def _eight(code_N, part_N, num_parts, m, first, sum_b):
    """Add the numbers of codes m … m + 7 of the rows from `first` on; with m = 0, write them."""
    p = part_N[CODES * m :]
    p1, p2, p3, p4 = p[CODES:], p[2 * CODES :], p[3 * CODES :], p[4 * CODES :]
    p5, p6, p7 = p[5 * CODES :], p[6 * CODES :], p[7 * CODES :]
    n = _U(first * num_parts + m)
    for row in range(sum_b.shape[0]):
        low = p[code_N[n]] + p1[code_N[n + _U(1)]] + (p2[code_N[n + _U(2)]] + p3[code_N[n + _U(3)]])
        high = p4[code_N[n + _U(4)]] + p5[code_N[n + _U(5)]]
        high += p6[code_N[n + _U(6)]] + p7[code_N[n + _U(7)]]
        sum_b[row] = low + high + sum_b[row] if m else low + high
        n += _U(num_parts)


@numba.njit(cache=True, nogil=True)
@no_type_check
def _sum_block(code_RM, part_MC, first, sum_b):
    """Write the sums of the rows from `first` on."""
    num_parts, code_N, part_N = code_RM.shape[1], code_RM.ravel(), part_MC.ravel()
    whole = num_parts // 8 * 8
    if not whole:
        sum_b[:] = 0.0
    for m in range(0, whole, 8):
        _eight(code_N, part_N, num_parts, m, first, sum_b)
    for m in range(whole, num_parts):
        part_C, n = part_N[CODES * m :], _U(first * num_parts + m)
        for row in range(sum_b.shape[0]):
            sum_b[row] += part_C[code_N[n]]
            n += _U(num_parts)


@numba.njit(cache=True, nogil=True)
@no_type_check
def sums(code_RM, part_BMC, sum_BR):
    """Write every row's sum for each query."""
    num_rows = code_RM.shape[0]
    for query in range(part_BMC.shape[0]):
        for first in range(0, num_rows, BLOCK):
            last = min(first + BLOCK, num_rows)
            _sum_block(code_RM, part_BMC[query], first, sum_BR[query, first:last])


@numba.njit(cache=True, nogil=True)
@no_type_check
def best(code_RM, part_BMC, left_out_R, left_out_BX, score_BK, row_BK):
    """Write the best K rows for each query, ties to the lower row, in the order of the rows.

    Where fewer are left, the rest stays as it is. `left_out_R` is changed and changed back.
    """
    for query in range(part_BMC.shape[0]):
        before_X = _leave_out(left_out_R, left_out_BX[query])
        _best(code_RM, part_BMC[query], left_out_R, score_BK[query], row_BK[query])
        for x in range(before_X.shape[0]):
            if not before_X[x]:
                left_out_R[left_out_BX[query, x]] = False


@numba.njit(cache=True, nogil=True)
@no_type_check
def _leave_out(left_out_R, row_X):
    """Mark rows, -1 is none; return which had been marked."""
    before_X = np.ones(row_X.shape[0], np.bool_)
    for x in range(row_X.shape[0]):
        if row_X[x] >= 0:
            before_X[x] = left_out_R[row_X[x]]
            left_out_R[row_X[x]] = True
    return before_X


@numba.njit(cache=True, nogil=True)
@no_type_check
def _best(code_RM, part_MC, left_out_R, score_K, row_K):
    """Write the best K rows: those above the K-th best so far are gathered, and thinned out."""
    num_rows, k = code_RM.shape[0], score_K.shape[0]
    full = max(2 * k, 256)
    found_F, row_F = np.empty(full + BLOCK, np.float32), np.empty(full + BLOCK, np.int64)
    sum_b = np.empty(BLOCK, np.float32)
    num, lowest = 0, np.float32(-np.inf)
    for first in range(0, num_rows, BLOCK):
        last = min(first + BLOCK, num_rows)
        _sum_block(code_RM, part_MC, first, sum_b[: last - first])
        above = 0
        for place in range(last - first):
            above += sum_b[place] > lowest
        for place in range(last - first if above else 0):
            if sum_b[place] > lowest and not left_out_R[first + place]:
                found_F[num], row_F[num] = sum_b[place], first + place
                num += 1
        if num >= full:
            lowest, num = _keep_best(found_F, row_F, num, k), k
    if num > k:
        _keep_best(found_F, row_F, num, k)
        num = k
    score_K[:num], row_K[:num] = found_F[:num], row_F[:num]


@numba.njit(cache=True, nogil=True)
@no_type_check
def _keep_best(found_F, row_F, num, k):
    """Bring the best k of `num` to the front, rows still rising; return the lowest of them."""
    lowest = np.partition(found_F[:num], num - k)[num - k]
    equal = k
    for place in range(num):
        equal -= found_F[place] > lowest
    kept = 0
    for place in range(num):
        take = found_F[place] > lowest
        if not take and equal > 0 and found_F[place] == lowest:
            take, equal = True, equal - 1
        if take:
            found_F[kept], row_F[kept] = found_F[place], row_F[place]
            kept += 1
    return lowest
