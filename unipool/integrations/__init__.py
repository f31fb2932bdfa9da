# SPDX-License-Identifier: Apache-2.0
"""The ops under other libraries' models; each module needs its library, this package does not."""
