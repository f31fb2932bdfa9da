# SPDX-License-Identifier: Apache-2.0
"""The named cases are what their names say."""

import torch
from cases import BY_NAME, expert_ids


def test_ids_of_the_cases_are_what_their_names_say():
    assert expert_ids(BY_NAME["all_to_one_expert"]).eq(4).all()
    assert expert_ids(BY_NAME["k_is_M"]).sort(1).values.eq(torch.arange(16)).all()
    dropped = expert_ids(BY_NAME["dropped"])
    assert dropped.eq(-1).any()
    assert dropped.ge(3).any()
    assert dropped.eq(0).any()
