# SPDX-License-Identifier: Apache-2.0
"""Sweeps: many small runs of one text and one budget, and what differs between them."""
