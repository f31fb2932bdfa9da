# SPDX-License-Identifier: Apache-2.0
"""What the PTX of these tests is written with: an address per thread, and dtypes."""

import numpy as np

AT = "mad.wide.u32 %rl0, %t, {0}, %rd{1}; "

I32, U32 = np.int32, np.uint32
