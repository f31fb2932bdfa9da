# SPDX-License-Identifier: Apache-2.0
"""Text to train on and to measure with: documents, tokenizers, token files."""
