# SPDX-License-Identifier: Apache-2.0
"""Values that arXiv:2605.06665 gives."""

# (M, k, c): equation (3)
CALIBRATION = [
    (96, 1, 4.02),
    (96, 2, 3.03),
    (128, 1, 4.45),
    (192, 1, 5.16),
    (288, 1, 6.02),
    (384, 1, 6.73),
]
