"""The check of a pruned model against the full one."""

import copy

import numpy as np

from kdlib.models.encoder import Encoder
from kdlib.pruning.verify import verify


def encoders(study, pruned):
    full = Encoder(study.model.base_model, study.tokenizer, "full", max_length=32)
    return full, Encoder(pruned.base_model, study.small, "pruned", max_length=32)


def test_proof_holds_for_a_pruned_model(study):
    table = verify(*encoders(study, study.pruned), np.array(study.chosen.ids), study.corpus, states_of=5)
    weights = len(study.pruned.base_model.state_dict())
    assert table[["checked", "holds"]].values.tolist() == [[len(study.corpus)] * 2, [weights] * 2, [5, 5]]


def test_proof_fails_for_rows_and_ids_that_are_wrong(studies):
    study = studies("wordpiece")
    rolled = copy.deepcopy(study.pruned)
    rolled.get_input_embeddings().weight.data = study.pruned.get_input_embeddings().weight.data.roll(1, 0)
    table = verify(*encoders(study, rolled), np.array(study.chosen.ids)[::-1], study.corpus, states_of=5)
    assert table.holds.tolist() == [0, len(study.pruned.base_model.state_dict()) - 1, 0]
