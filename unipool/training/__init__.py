# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation and reports. Needs the extra `train`; `import unipool` never loads it."""
