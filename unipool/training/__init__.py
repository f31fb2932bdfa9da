# SPDX-License-Identifier: Apache-2.0
"""Training runs in folders, and the demo. Needs the extra `train`; `import unipool` never does."""
