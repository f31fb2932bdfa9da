# SPDX-License-Identifier: Apache-2.0
"""What the routers of a trained model do: the routing probe, and an analysis as a report."""
