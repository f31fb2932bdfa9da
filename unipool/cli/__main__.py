# SPDX-License-Identifier: Apache-2.0
"""`python -m unipool.cli` is the `unipool` command."""

import sys

from unipool.cli import main

sys.exit(main())
