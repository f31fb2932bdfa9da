# SPDX-License-Identifier: Apache-2.0
"""Zero-shot evaluation by the tasks, prompts and metrics of lm-evaluation-harness."""
