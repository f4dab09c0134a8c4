"""Pruning a model in memory."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kdlib.files import new_folder
from kdlib.models.build import save_model, with_state
from kdlib.models.encoder import Encoder
from kdlib.models.families import family_of
from kdlib.models.mlm_head import prune_head, save_head
from kdlib.models.safetensors_files import HEAD_FILE, stored_tensors
from kdlib.models.sentence import save_sentence
from kdlib.pruning.files import check_rows, prune_files, renumbered
from kdlib.pruning.tokenizer import save_pruned_tokenizer
from kdlib.pruning.tokenizer_json import new_ids


def prune_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> PreTrainedModel:
    """A copy of the model with only the embedding rows `ids`.

    Decoder rows and bias are pruned too, and ties stay tied. Hidden states on pruned ids equal the full model's bit for
    bit.

    Args:
        model: the full model.
        tokenizer: the full tokenizer; it names the special ids of the config to renumber.
        ids: token ids to keep, ascending.
    """
    new, family = new_ids(ids), family_of(model.config.model_type)
    rows = torch.tensor(list(new))
    old_rows = len(model.get_input_embeddings().weight)
    check_rows(new, old_rows)
    config = copy.deepcopy(model.config)
    for key, value in renumbered(config.to_dict(), new).items():
        setattr(config, key, value)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    by_row = {id(p) for p in (embedding, *(head.parameters() if head is not None else ())) if len(p) == old_rows}
    ends = ("position_embeddings.weight",) if family.positions_from_pad else ()
    shifted = {name for name in model.state_dict() if name.endswith(ends)}
    shift = model.config.pad_token_id - config.pad_token_id if shifted else 0
    if shift:
        config.max_position_embeddings -= shift
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in by_row or family.has_rows(name):  # a head's bias may be separate from its decoder's
            value = value[rows]
        state[name] = (value[shift:] if name in shifted else value).detach()
    return with_state(type(model), config, state).train(model.training)


def prune_encoder(encoder: Encoder, ids: Sequence[int], target: str | Path, source: Path | None = None) -> None:
    """Write the encoder with only the tokens `ids` as a Hugging Face folder. Its head is pruned with it.

    Args:
        encoder: the full encoder.
        ids: token ids to keep, ascending.
        target: the folder to write; it is complete or absent.
        source: the folder that the encoder was loaded from. Where its files hold the model's unchanged weights, they
            are copied from there (`prune_files`); else the weights in memory are pruned (`prune_model`).

    Example:
        >>> import kdlib, tempfile
        >>> from kdlib.models import embedded_teacher
        >>> from kdlib.pruning.selection import select_tokens
        >>> teacher = kdlib.load_encoder(embedded_teacher.folder())
        >>> selection = select_tokens(teacher.tokenizer, ["Kumain ng mangga ang bata."])
        >>> folder = tempfile.mkdtemp() + "/pruned"
        >>> kdlib.prune_encoder(teacher, selection.ids, folder)
        >>> len(kdlib.load_encoder(folder).tokenizer) == len(selection.ids)
        True
    """
    with new_folder(target) as folder:
        if source is not None and _holds(source, encoder.model):
            prune_files(source, folder, ids, encoder.tokenizer)
        else:
            save_model(prune_model(encoder.model, encoder.tokenizer, ids), folder)
            save_pruned_tokenizer(encoder.tokenizer, ids, folder)
        save_sentence(encoder.sentence, folder, encoder.hidden, encoder.max_length, encoder.prefix)
        if encoder.head is not None:
            save_head(prune_head(encoder.head, ids), folder / HEAD_FILE)


def _holds(source: Path, model: PreTrainedModel) -> bool:
    """Whether the files of a folder hold every weight of the model, unchanged. Biases show whether it was trained."""
    modern = {".gamma": ".weight", ".beta": ".bias"}  # LayerNorm's weights in old files
    tensors = stored_tensors(source)
    stored = {re.sub(r"\.(gamma|beta)$", lambda end: modern[end[0]], name): name for name in tensors}
    vectors: dict[Path, dict[str, torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        found = stored.get(name) or stored.get(f"{model.base_model_prefix}.{name}")
        if found is None:
            return False
        if value.dim() == 1:
            vectors.setdefault(tensors[found].file, {})[found] = value
    for file, values in vectors.items():
        with safe_open(file, "pt") as reader:
            if not all(torch.equal(reader.get_tensor(name).to(v), v) for name, v in values.items()):
                return False
    return True
