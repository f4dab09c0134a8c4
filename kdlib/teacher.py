"""Teachers: the embedded one, a hub id, or a local folder; always in eval mode."""

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

from kdlib import config, embedded
from kdlib.encoder import Encoder
from kdlib.errors import UserError

FAMILIES = ("bert", "xlm-roberta", "roberta", "distilbert", "deberta-v2")


def load_teacher(spec: config.Teacher, device: torch.device | str = "cpu", bf16: bool = False) -> Encoder:
    """The teacher as an Encoder.

    spec.source: "embedded", a hub id, or a local folder of BERT, XLM-R, RoBERTa, DistilBERT or DeBERTa-v2 kind, with a
    fast tokenizer. spec.prefix None takes the embedded teacher's own prefix, and none otherwise.
    Raises UserError when the source cannot be loaded, saying how to go on offline.
    """
    if spec.source == "embedded":
        source, name = embedded.folder(), embedded.NAME.split("/")[1]
    else:
        source, name = spec.source, Path(spec.source).name
    encoder = load_encoder(source, name, prefix_of(spec), spec.max_length, spec.revision, spec.allow_pickle)
    encoder.model.to(device)
    encoder.bf16 = bf16
    return encoder


def prefix_of(spec: config.Teacher) -> str:
    """What goes before every text: as the profile says, else what the teacher was trained with, if that is known."""
    if spec.prefix is not None:
        return spec.prefix
    return embedded.PREFIX if spec.source == "embedded" else ""


def load_encoder(
    source: str | Path,
    name: str,
    prefix: str = "",
    max_length: int = 128,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Encoder:
    """Any Hugging Face folder or hub id as an Encoder in eval mode; weights from safetensors unless `allow_pickle`."""
    folder = Path(source)
    if not folder.is_dir() and (folder.is_absolute() or str(source).startswith(".") or os.path.exists(source)):
        raise UserError(f"{source}: no folder of a model there")
    options = dict(revision=revision) if revision else {}
    quiet, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        kind = AutoConfig.from_pretrained(source, **options).model_type
        if kind not in FAMILIES:
            raise UserError(f"{source}: a model of kind {kind!r}; teachers are of kind {', '.join(FAMILIES)}")
        model = AutoModel.from_pretrained(
            source, use_safetensors=None if allow_pickle else True, dtype=torch.float32, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except UserError:
        raise
    except Exception as error:  # the hub client and the readers raise a dozen kinds; people need one line
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"model {str(source)!r} could not be loaded: {reason} "
            "Offline? Use teacher.source=embedded or a local folder."
        ) from None
    finally:
        logging.set_verbosity(quiet)
        if bars:
            logging.enable_progress_bar()
    if not tokenizer.is_fast:
        raise UserError(f"{source}: no fast tokenizer (tokenizer.json)")
    limit = min(max_length, model.config.max_position_embeddings - (2 if kind in ("xlm-roberta", "roberta") else 0))
    return Encoder(model.eval(), tokenizer, name, prefix, limit)
