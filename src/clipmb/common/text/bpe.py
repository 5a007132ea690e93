"""Byte pair encoding: how the bytes of one word are merged into tokens."""

from __future__ import annotations

import heapq
from itertools import pairwise

from clipmb.common.text.vocabulary import SUFFIX

# By hand although `tokenizers` has it: 20,000 unseen captions took 6 times as long by its encode_batch, with all its
# threads, and 1.4 times one by one. Words repeat, so a cache leaves little to merge; what costs there
# is normalising and splitting every text, and an object for each.
_SHORT = 64  # symbols; above, the quadratic way is the slower one


def merge_symbols(symbols: list[str], ranks: dict[str, int]) -> list[str]:
    """Applies byte pair merges to the symbols of one word: the pair of lowest rank first, among equals the leftmost.

    Args:
        symbols: One symbol per byte; not empty.
        ranks: Rank of each merge, by its two symbols with a space between.

    Returns:
        The merged symbols, the last of them ending in ``</w>``.
    """
    symbols = [*symbols[:-1], symbols[-1] + SUFFIX]
    return _merge_short(symbols, ranks) if len(symbols) <= _SHORT else _merge_long(symbols, ranks)


def _merge_short(symbols: list[str], ranks: dict[str, int]) -> list[str]:
    """Quadratic in the length, and the fastest for the words there are."""
    find = ranks.get
    never = len(ranks)
    pairs = [find(f"{left} {right}", never) for left, right in pairwise(symbols)]
    while pairs and (lowest := min(pairs)) < never:
        i = pairs.index(lowest)
        symbols[i] += symbols.pop(i + 1)
        del pairs[i]
        if i:
            pairs[i - 1] = find(f"{symbols[i - 1]} {symbols[i]}", never)
        if i < len(pairs):
            pairs[i] = find(f"{symbols[i]} {symbols[i + 1]}", never)
    return symbols


def _merge_long(symbols: list[str], ranks: dict[str, int]) -> list[str]:
    """O(n log n): a word of a million letters must not stop a server."""
    count = len(symbols)
    after = list(range(1, count + 1))
    before = list(range(-1, count - 1))
    heap = []
    for i, (left, right) in enumerate(pairwise(symbols)):
        rank = ranks.get(f"{left} {right}")
        if rank is not None:
            heap.append((rank, i))
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        right = after[i]
        if right >= count or not symbols[i] or ranks.get(f"{symbols[i]} {symbols[right]}") != rank:
            continue  # a neighbour was merged in the meantime
        symbols[i] += symbols[right]
        symbols[right] = ""
        after[i] = after[right]
        if after[i] < count:
            before[after[i]] = i
        for left in (before[i], i):
            if left >= 0 and after[left] < count:
                rank = ranks.get(f"{symbols[left]} {symbols[after[left]]}")
                if rank is not None:
                    heapq.heappush(heap, (rank, left))
    return [symbol for symbol in symbols if symbol]
