"""Load teachers and other encoders: the embedded one, a hub id, or a local folder. All are in eval mode."""

import functools
import json
import logging as python_logging
import operator
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import normalizers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file

from kdlib import config
from kdlib.data import hub
from kdlib.errors import UserError
from kdlib.models import embedded_teacher
from kdlib.models.encoder import Encoder
from kdlib.models.families import family_of, positions
from kdlib.models.mlm_head import MaskedHead, build_head, head_eps, load_head
from kdlib.models.safetensors_files import HEAD_FILE, stored_tensors, weights_folder
from kdlib.models.sentence import MODULES, PROMPTS, SentenceVector, read_sentence
from kdlib.models.vector_cache import VectorCache, body_key

log = python_logging.getLogger(__name__)
MOST_LAYERS = 1000
TIED_ROWS = 256  # rows of the output matrix compared with the embeddings: if they were trained separately, all differ


def load_teacher(
    spec: config.Teacher, device: torch.device | str = "cpu", bf16: bool = False, cache_root: Path | None = None
) -> Encoder:
    """The teacher that a profile names.

    Args:
        spec: source "embedded", a hub id or a local folder; prefix None takes the prefix that the embedded teacher was
            trained with, and none for other teachers.
        device: as `load_encoder` has it.
        bf16: as `load_encoder` has it.
        cache_root: as `load_encoder` has it.

    Raises:
        UserError: where the source cannot be loaded; the message says what works offline.
    """
    embedded = spec.source == "embedded"
    source = embedded_teacher.folder() if embedded else spec.source
    name = embedded_teacher.NAME.split("/")[1] if embedded else Path(spec.source).name
    return load_encoder(
        source, name, prefix_of(spec), spec.max_length, spec.revision, spec.allow_pickle, device, bf16, cache_root
    )


def prefix_of(spec: config.Teacher) -> str:
    """The prefix of every text: the profile's, else the one the teacher was trained with, if known."""
    if spec.prefix is not None:
        return spec.prefix
    return embedded_teacher.PREFIX if spec.source == "embedded" else default_prompt(spec.source, spec.revision)


@functools.cache
def default_prompt(source: str, revision: str | None = None) -> str:
    """The text that sentence-transformers puts before every text, by the model's own settings. "" where none is set."""
    try:
        repo = hub.Repo() if os.path.isdir(source) else hub.find(source, "model", revision)
        settings = _finder(source, _options(revision, repo))(PROMPTS)
        found = json.loads(settings.read_text("utf-8")) if settings else {}
        return str((found.get("prompts") or {}).get(found.get("default_prompt_name")) or "")
    except (UserError, OSError, ValueError, AttributeError):  # loading the model says what is wrong
        return ""


def _options(revision: str | None, repo: hub.Repo) -> dict[str, Any]:
    """Arguments for reading a model's files."""
    return (dict(revision=revision) if revision else {}) | (dict(local_files_only=True) if repo.silent else {})


def _finder(source: str | Path, options: dict[str, Any]) -> Callable[[str], Path | None]:
    """Gives the local path of a model's file by name, None where it is absent."""

    def file(name: str) -> Path | None:
        if os.path.isdir(source):
            path = Path(source) / name
            return path if path.is_file() else None
        try:
            return Path(cached_file(str(source), name, **options))
        except OSError:
            return None

    return file


def load_encoder(
    source: str | Path,
    name: str | None = None,
    prefix: str | None = None,
    max_length: int = 128,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    cache_root: Path | None = None,
    kept_ids: np.ndarray | None = None,
) -> Encoder:
    """Load a Hugging Face folder or hub id as an `Encoder` in eval mode.

    Its masked-language head is the folder's own (`Encoder.save`), else the checkpoint's. There is none where
    transformers would fill in random weights, as for a base model or an RTD discriminator (mDeBERTa-v3), or where the
    output matrix is not tied to the embeddings.

    Args:
        source: a local folder, or a hub id.
        name: what results call it; None: the last part of `source`.
        prefix: put before every text; None: the default prompt of a sentence-transformers folder, else none.
        max_length: tokens per text, where it is truncated; the model's own limit where that is smaller.
        revision: commit, tag or branch on the hub.
        allow_pickle: read .bin weights where there is no safetensors file.
        device: where the model runs.
        bf16: read texts in bfloat16.
        cache_root: folder of a vector cache, so that no text is read twice; None: without.
        kept_ids: of a pruned encoder, the full vocabulary's id of each token, so that it shares the teacher's cache.

    Raises:
        UserError: where nothing is there, the family is unknown, weights are missing or damaged, or the tokenizer
            does not belong to the model.

    Example:
        >>> import kdlib
        >>> from kdlib.models import embedded_teacher
        >>> encoder = kdlib.load_encoder(embedded_teacher.folder(), prefix="query: ")
        >>> encoder.layers, encoder.hidden
        (12, 384)
    """
    folder = Path(source)
    local = os.path.isdir(folder)  # unlike Path.is_dir, False for any name no folder can have
    if not local and (folder.is_absolute() or str(source).startswith(".") or os.path.exists(source)):
        raise UserError(f"{source}: no folder of a model there")
    repo = hub.Repo(files=os.listdir(folder)) if local else hub.find(str(source), "model", revision)
    if not allow_pickle:
        _refuse_pickles(source, repo.files)
    options = _options(revision, repo)
    trusted = options | {"trust_remote_code": False}  # without this argument the user would be asked
    quiet, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        settings = hub.retried(lambda: AutoConfig.from_pretrained(source, **trusted))
        family_of(settings.model_type, str(source))
        if not 1 <= settings.num_hidden_layers <= MOST_LAYERS:  # every layer is built before any weight is read
            raise UserError(f"{source}: a model of {settings.num_hidden_layers} layers; must be in 1..{MOST_LAYERS}")
        if local:
            _check_sizes(source, settings)
        model, info = hub.retried(
            lambda: AutoModel.from_pretrained(
                source,
                use_safetensors=None if allow_pickle else True,
                dtype=torch.float32,
                output_loading_info=True,
                **trusted,
            )
        )
        tokenizer = hub.retried(lambda: AutoTokenizer.from_pretrained(source, **trusted))
        sentence = None
        if MODULES in repo.files or repo.silent:
            sentence = read_sentence(_finder(source, options), source, allow_pickle)
        if local and (folder / HEAD_FILE).is_file():
            head = load_head(folder / HEAD_FILE, model)
        else:
            head = _checkpoint_head(source, model, info["unexpected_keys"], allow_pickle, options)
    except UserError:
        raise
    except Exception as error:  # the hub client and the readers raise a dozen kinds; people need one line
        lacking = repo.silent and isinstance(error, OSError)
        reason = f"{repo.silent}, and the hub's cache lacks a part of it" if lacking else hub.reason(error)
        if "tiktoken" in reason:  # transformers' message when sentencepiece is missing
            reason = "its tokenizer is a SentencePiece file; install sentencepiece to read it"
        raise UserError(
            f"model {str(source)!r} could not be loaded: {reason}{hub.WAY_ON if lacking or hub.passes(error) else ''}"
        ) from None
    finally:
        logging.set_verbosity(quiet)
        if bars:
            logging.enable_progress_bar()
    if not tokenizer.is_fast:
        raise UserError(f"{source}: no fast tokenizer (tokenizer.json)")
    limit = min(max_length, positions(model.config))
    if sentence is not None:  # version 6 keeps its limit in the tokenizer
        limit = min(limit, sentence.max_length or tokenizer.model_max_length)
    sentence = sentence or SentenceVector()
    if prefix is None:
        prefix = sentence.prompts.get(sentence.default_prompt or "", "")
    if sentence.lower:
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *filter(None, [backend.normalizer])])
    model, name = model.eval().to(device), name or Path(source).name
    encoder = Encoder(
        model, tokenizer, name, prefix, limit, bf16, head.to(device) if head is not None else None,
        sentence=sentence.to(device),
    )  # fmt: skip
    if not prefix and sentence.prompts:
        log.warning(
            "%s: no prefix is set; its prompts are %s (teacher.prefix)", source,
            ", ".join(f"{key}: {text!r}" for key, text in sentence.prompts.items()),
        )  # fmt: skip
    _check(encoder, source, info["missing_keys"])
    for pooler in (name for name in info["missing_keys"] if name.startswith("pooler.")):  # else random at every load
        weight = model.get_parameter(pooler).detach()
        nn.init.eye_(weight) if weight.dim() == 2 else nn.init.zeros_(weight)
    if cache_root is None:
        return encoder
    pooling = [sentence.pooling] if sentence.pooling != "mean" else []
    key = body_key(model, bf16, encoder.token_types, *pooling)
    return replace(encoder, vector_cache=VectorCache(cache_root / f"vectors-{key}", kept_ids))


def _check_sizes(source: str | Path, settings: PreTrainedConfig) -> None:
    """Check that config.json and the weights agree on sizes before memory is used. Raises UserError with the weight."""
    folder = weights_folder(source)
    if folder is None:
        return
    stored = stored_tensors(folder)
    with torch.device("meta"):
        model = AutoModel.from_config(settings)
    for name, value in model.state_dict().items():
        for key in (name, f"{model.base_model_prefix}.{name}"):
            if key in stored and stored[key].shape != list(value.shape):
                sizes = [" x ".join(map(str, shape)) for shape in (stored[key].shape, value.shape)]
                raise UserError(f"{source}: size mismatch, weight {key} is {sizes[0]}, by config.json {sizes[1]}")


def _check(encoder: Encoder, source: str | Path, missing: set[str]) -> None:
    """Raise UserError for missing weights (they would be random), infinite ones, or the tokenizer of another model."""
    if absent := sorted(name for name in missing if not name.startswith("pooler.")):  # the pooler is not used
        raise UserError(f"{source}: {len(absent)} weights are missing, such as {absent[0]}")
    # A sum is finite only if every number is, and is much faster than a check of each.
    if wrong := [name for name, value in encoder.model.named_parameters() if not value.sum().isfinite()]:
        raise UserError(f"{source}: weight {wrong[0]} holds values that are not finite")
    tokenizer, rows = encoder.tokenizer, len(encoder.model.get_input_embeddings().weight)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{source}: its tokenizer has no padding token")
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        raise UserError(
            f"{source}: its tokenizer has ids up to {largest}, the model only {rows} embeddings; "
            "if words were added to the tokenizer, the model needs rows for them (resize_token_embeddings)"
        )
    try:
        encoder.tokenize([("a", "\U0001f600")])
        with torch.inference_mode():
            encoder.model(torch.tensor([encoding.ids for encoding in encoder.tokenize(["a \U0001f600"])]))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # such as a tokenizer without its unknown token; a Rust panic is not an Exception
        raise UserError(f"{source}: loaded, but cannot be used ({hub.reason(error)})") from None


def _refuse_pickles(source: str | Path, files: list[str]) -> None:
    """Raise UserError where there are only pickled weights: reading them runs the code they contain."""
    pickles = [name for name in files if name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)]
    if pickles and not any(name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) for name in files):
        raise UserError(
            f"{source}: its weights are pickled ({pickles[0]}), and reading such a file can run code; name a revision "
            "with safetensors (on the hub often refs/pr/1), or set allow_pickle: true for this model"
        )


def _checkpoint_head(
    source: str | Path, model: PreTrainedModel, beside: set[str], allow_pickle: bool, options: dict[str, Any]
) -> MaskedHead | None:
    """The head among the checkpoint's weights that the base model does not use. None without a usable one."""
    family = family_of(model.config.model_type)
    newer = family.newer_head if not getattr(model.config, "legacy", True) else None
    names = newer or family.head
    if names is None:
        return None
    activation = getattr(model.config, family.activation) if family.activation else "gelu"
    parts = {
        "dense.weight": [f"{names.dense}.weight"],
        "dense.bias": [f"{names.dense}.bias"],
        "norm.weight": [f"{names.norm}.weight"],
        "norm.bias": [f"{names.norm}.bias"],
        "bias": [f"{names.owner}.bias", f"{names.owner}.decoder.bias"],
    }
    output = names.output
    beside = {_modern(name) for name in beside}
    discriminator = any(name.startswith("mask_predictions.") for name in beside)
    tied = getattr(model.config, "tie_word_embeddings", True) or newer is not None
    wanted = {part: found for part, found in parts.items() if not _without_bias(model.config, part)}
    if discriminator or not tied or not all(beside & set(names) for names in wanted.values()):
        return None
    stored = _read_tensors(
        source, {*functools.reduce(operator.iadd, parts.values(), []), output}, output, allow_pickle, options
    )
    embeddings = model.get_input_embeddings().weight.detach()
    if output in stored and not torch.equal(stored[output].float(), embeddings[:TIED_ROWS]):
        return None
    found = {part: next((stored[name] for name in names if name in stored), None) for part, names in parts.items()}
    if any(found[part] is None for part in wanted):  # AutoModel found another file than the ones named here
        return None
    state = {part: value.float() for part, value in found.items() if value is not None}
    for part in parts.keys() - wanted.keys():
        state[part] = torch.zeros(len(state[part.replace("bias", "weight")]))
    try:
        return build_head(state, model, head_eps(model), activation, str(source))
    except UserError:  # a head left over from resized embeddings
        return None


def _without_bias(settings: PreTrainedConfig, part: str) -> bool:
    """Whether the head has no such bias, by ModernBERT's settings."""
    key = {"dense.bias": "classifier_bias", "norm.bias": "norm_bias"}.get(part)
    return key is not None and not getattr(settings, key, True)


def _modern(name: str) -> str:
    """The current name of a weight; the oldest checkpoints say gamma and beta, gte's files have an own name."""
    name = name.replace("lm_head.norm.", "lm_head.layer_norm.")
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))


def _read_tensors(
    source: str | Path, names: set[str], part_of: str, allow_pickle: bool, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors `names` in the checkpoint's files, by their current names. Of `part_of` only the first rows.

    Loading the model has downloaded these files already.
    """
    pickles = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if allow_pickle else ()
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, *pickles):
        try:
            path = Path(cached_file(source, file, **options))
        except OSError:  # no such file there
            continue
        if path.suffix != ".json":
            return _tensors_in(path, names, part_of)
        shards = json.loads(path.read_text("utf-8"))["weight_map"]
        wanted = {shard for name, shard in shards.items() if _modern(name) in names}
        return {
            name: value
            for shard in sorted(wanted)
            for name, value in _tensors_in(Path(cached_file(source, shard, **options)), names, part_of).items()
        }
    return {}


def _tensors_in(path: Path, names: set[str], part_of: str) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as stored:
            found = {_modern(name): name for name in stored.keys() if _modern(name) in names}
            return {
                modern: stored.get_slice(name)[:TIED_ROWS] if modern == part_of else stored.get_tensor(name)
                for modern, name in found.items()
            }
    stored = torch.load(path, map_location="cpu", weights_only=True)
    found = {_modern(name): value for name, value in stored.items() if _modern(name) in names}
    return {name: value[:TIED_ROWS] if name == part_of else value for name, value in found.items()}
