"""Keyed permutations of range(n), forward and backward, at O(1) memory: what the order of samples is made of.

A balanced Feistel network permutes the smallest square of a power of two that holds n; indices that leave range(n) are
sent through it again until they return (cycle walking), so the whole is a bijection.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6  # of the Feistel network; four already look random, two more cost little

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

# Domains keep the keys of different purposes apart.
SHARDS, PIECES, AUGMENT, CYCLES, SOURCES, STAND_INS, STREAMS = 1, 2, 3, 4, 5, 6, 7


def keyed(domain: int, seed: int, *parts: Ints) -> Words:
    """One 64-bit key, (n,), for each row of `parts`, each (n,)."""
    state = _scramble(np.full(parts[0].shape, domain, dtype=np.uint64))
    state = _scramble(state ^ np.uint64(seed))
    for part in parts:
        state = _scramble(state ^ part.astype(np.uint64))
    return state


def permute(index: Ints, size: Ints, key: Words) -> Ints:
    """Image of each `index` under the permutation of range(size) that `key` selects; all (n,), sizes may differ."""
    return _walk(index, size, key, range(ROUNDS))


def restore(image: Ints, size: Ints, key: Words) -> Ints:
    """The index whose `permute` is `image`; all (n,)."""
    return _walk(image, size, key, range(ROUNDS - 1, -1, -1))


def _walk(index: Ints, size: Ints, key: Words, turns: range) -> Ints:
    """Each index sent through the network, its rounds taken in the order of `turns`, until it is below its size."""
    bits = np.frexp((size - 1).astype(np.float64))[1]  # length in bits of the largest index; exact below 2**53
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    limit = size.astype(np.uint64)
    out = _feistel(index.astype(np.uint64), half, key, turns)
    outside = np.flatnonzero(out >= limit)
    while outside.size:
        out[outside] = _feistel(out[outside], half[outside], key[outside], turns)
        outside = outside[out[outside] >= limit[outside]]
    return out.astype(np.int64)


def _feistel(word: Words, half: Words, key: Words, turns: range) -> Words:
    """One pass through the network over words of 2 * `half` bits; all (n,). Reversed `turns` undo it."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = word >> half, word & mask
    if turns.step < 0:  # a round leaves one half as it was: with the halves exchanged it undoes itself
        left, right = right, left
    for turn in turns:
        left, right = right, left ^ (_scramble(right ^ _scramble(key + np.uint64(turn))) & mask)
    if turns.step < 0:
        left, right = right, left
    return (left << half) | right


def _scramble(word: Words) -> Words:
    """The output function of the splitmix64 generator (Steele, Lea and Flood 2014): a bijection of 64-bit words."""
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
