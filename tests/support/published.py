# SPDX-License-Identifier: Apache-2.0
"""Values that arXiv:2605.06665 gives, and those of its calibration for small pools."""

# (M, k, c): equation (3)
CALIBRATION = [
    (96, 1, 4.02),
    (96, 2, 3.03),
    (128, 1, 4.45),
    (192, 1, 5.16),
    (288, 1, 6.02),
    (384, 1, 6.73),
]

# (M, k, c) with norms floored at 1 / sqrt(M), as drawn: the same digits in every process
FLOORED = [(1, 1, 1.0), (2, 1, 1.2177), (4, 1, 1.5933)]
