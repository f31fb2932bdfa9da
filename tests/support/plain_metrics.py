# SPDX-License-Identifier: Apache-2.0
"""Metrics of routings, written out."""

import math
from itertools import product


def plain_entropy(counts):
    total = sum(counts)
    return -sum(c / total * math.log2(c / total) for c in counts if c > 0)


def plain_gini(counts):
    differences = sum(abs(a - b) for a, b in product(counts, counts))
    return differences / (2 * len(counts) * sum(counts))


def plain_jaccard(a, b):
    values = []
    for left, right in zip(a.tolist(), b.tolist(), strict=True):
        left, right = set(left) - {-1}, set(right) - {-1}
        if left | right:
            values.append(len(left & right) / len(left | right))
    return sum(values) / len(values)


def plain_information(a, b):
    joint = {}
    for left, right in zip(a.tolist(), b.tolist(), strict=True):
        for pair in product(left, right):
            if -1 not in pair:
                joint[pair] = joint.get(pair, 0) + 1
    total = sum(joint.values())
    first, second = {}, {}
    for (i, j), count in joint.items():
        first[i] = first.get(i, 0) + count
        second[j] = second.get(j, 0) + count
    return sum(
        n / total * math.log2(n * total / (first[i] * second[j])) for (i, j), n in joint.items()
    )
