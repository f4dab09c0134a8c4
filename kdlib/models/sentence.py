"""Sentence vectors as sentence-transformers describes them: pooling, dense layers, normalisation and prompts.

They are read from a teacher's folder and written into the student's, in the format of sentence-transformers 6; older
formats are read, too. The library itself is not needed.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kdlib.errors import UserError
from kdlib.files import write_json

MODULES, PROMPTS, LENGTH = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
KINDS = {  # of modules, in the library's words
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}
OLDER = {  # keys of a pooling's config until version 5
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip


def mean_pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the states over real tokens: [batch, tokens, hidden], mask [batch, tokens] -> [batch, hidden]."""
    weights = mask.unsqueeze(1).to(states.dtype)  # a matrix product needs no weighted copy of the states
    return (weights @ states).squeeze(1) / weights.sum(2).clamp(min=1)


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


def _weighted(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return mean_pool(states, mask * torch.arange(1, mask.shape[1] + 1, device=mask.device))


POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {  # padding is on the right
    "mean": mean_pool,
    "cls": lambda states, mask: states[:, 0],
    "lasttoken": _last,
    "max": lambda states, mask: states.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1),
    "weightedmean": _weighted,
    "mean_sqrt_len_tokens": lambda states, mask: mean_pool(states, mask) * mask.sum(1, keepdim=True).sqrt(),
}


class SentenceVector(nn.Module):
    """The way from the last hidden states of a text to its vector. Nothing in it is trained.

    Args:
        pooling: a key of POOLINGS.
        dense: linear layers, each with its activation.
        normalised: whether vectors have length 1.
        prompts: texts before every text, by name.
        default_prompt: the name of the one that is used unless another is named.
        max_length: tokens per text at most.
        lower: whether texts are lower-cased before the tokenizer sees them.
    """

    def __init__(
        self,
        pooling: str = "mean",
        dense: list[nn.Sequential] | None = None,
        normalised: bool = False,
        prompts: dict[str, str] | None = None,
        default_prompt: str | None = None,
        max_length: int | None = None,
        lower: bool = False,
    ):
        super().__init__()
        self.pooling, self.normalised, self.max_length, self.lower = pooling, normalised, max_length, lower
        self.dense = nn.ModuleList(dense or []).requires_grad_(False).eval()
        self.prompts, self.default_prompt = prompts or {}, default_prompt

    @property
    def layers(self) -> list[tuple[nn.Linear, nn.Module]]:
        """The dense layers with their activations."""
        return [(part[0], part[1]) for part in self.dense if isinstance(part, nn.Sequential)]  # type: ignore

    @property
    def width(self) -> int | None:
        """The width of the vectors where dense layers give it."""
        return self.layers[-1][0].out_features if self.layers else None

    @property
    def plain(self) -> bool:
        """Whether a vector is the mean of the states."""
        return self.pooling == "mean" and not self.normalised and not len(self.dense)

    @property
    def described(self) -> str:
        """What is done, in words."""
        parts = [f"{self.pooling} pooling", *(f"a dense layer of {linear.out_features}" for linear, _ in self.layers)]
        return ", ".join(parts + ["length 1"] * self.normalised)

    def pool(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States [batch, tokens, hidden], mask [batch, tokens] -> [batch, hidden]."""
        return POOLINGS[self.pooling](states, mask)

    def finish(self, vectors: torch.Tensor) -> torch.Tensor:
        """Dense layers and normalisation of pooled states [batch, hidden] -> [batch, width]."""
        for part in self.dense:
            vectors = part(vectors)
        return F.normalize(vectors, dim=-1) if self.normalised else vectors

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The vectors of texts: [batch, width]."""
        return self.finish(self.pool(states, mask))

    def after(self, width: int, projection: nn.Linear | None = None) -> "SentenceVector":
        """The same for states of another width.

        The projection to the teacher's states becomes a part of the first dense layer: W (P s + p) + b. Without a
        projection dense layers are left out, since they do not fit.
        """
        if not self.layers or self.layers[0][0].in_features == width:
            return self
        made = copy.deepcopy(self)
        if projection is None:
            made.dense = nn.ModuleList()
            return made
        first, activation = self.layers[0]
        linear = nn.Linear(width, first.out_features)
        linear.weight.data = first.weight.data @ projection.weight.data.to(first.weight)
        linear.bias.data = F.linear(projection.bias.data.to(first.weight), first.weight.data, first.bias)
        made.dense[0] = nn.Sequential(linear, activation).requires_grad_(False)
        return made


def read_sentence(
    file: Callable[[str], Path | None], where: str | Path, allow_pickle: bool = False
) -> SentenceVector | None:
    """The sentence vectors of a model folder. None for a folder that says nothing about them.

    Args:
        file: the local path of a file of the folder by name, None where it is absent.
        where: the folder or hub id, for errors.
        allow_pickle: read dense layers from .bin files where there is no safetensors file.

    Raises:
        UserError: for a module or setting that kdlib does not know, or a damaged file.
    """

    def read(name: str, kind: type = dict) -> Any:
        path = file(name)
        try:
            found = json.loads(path.read_text("utf-8")) if path else kind()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: damaged ({str(error).splitlines()[0]})") from None
        if not isinstance(found, kind):
            raise UserError(f"{path}: not a settings file of sentence-transformers")
        return found

    if file(MODULES) is None:
        return None
    prompts, length = read(PROMPTS), read(LENGTH)
    made: dict[str, Any] = {"dense": []}
    for number, entry in enumerate(read(MODULES, list)):
        kind, path = str(entry.get("type", "")).rpartition(".")[2], entry.get("path", "")
        if kind == "Transformer" and number == 0:
            if path:
                raise UserError(f"{where}: its model is in {path}/, an old format; move these files up")
        elif kind == "Pooling":
            made["pooling"] = _pooling(read(f"{path}/config.json"), where)
        elif kind == "Dense":
            made["dense"].append(_dense(read(f"{path}/config.json"), path, file, where, allow_pickle))
        elif kind == "Normalize":
            made["normalised"] = True
        elif kind != "Dropout":
            raise UserError(f"{where}: a sentence-transformers module {kind!r}; supported are {', '.join(KINDS)}")
        if made.get("normalised") and kind == "Dense":
            raise UserError(f"{where}: a dense layer after the normalisation is not supported")
    return SentenceVector(
        **made, prompts={k: v for k, v in (prompts.get("prompts") or {}).items() if v},
        default_prompt=prompts.get("default_prompt_name"), max_length=length.get("max_seq_length"),
        lower=bool(length.get("do_lower_case")),
    )  # fmt: skip


def _pooling(settings: dict[str, Any], where: str | Path) -> str:
    """The pooling of a config of today or of older versions."""
    modes = settings.get("pooling_mode") or [mode for key, mode in OLDER.items() if settings.get(key)] or "mean"
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) > 1 or modes[0] not in POOLINGS or settings.get("include_prompt") is False:
        what = "that leaves out the prompt" if settings.get("include_prompt") is False else " and ".join(modes)
        raise UserError(f"{where}: a pooling {what}; supported are {', '.join(POOLINGS)}, one at a time")
    return modes[0]


def _dense(
    settings: dict[str, Any], path: str, file: Callable[[str], Path | None], where: str | Path, allow_pickle: bool
) -> nn.Sequential:
    """A dense layer with its activation."""
    module, _, name = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")
    kind = getattr(nn, name, None) if module.startswith("torch.nn") else None
    if (
        kind is None
        or settings.get("use_residual")
        or settings.get("module_input_name", "sentence_embedding") != ("sentence_embedding")
    ):
        raise UserError(f"{where}: its dense layer {path} has an activation, residual or input that is not supported")
    stored, pickled = file(f"{path}/model.safetensors"), file(f"{path}/pytorch_model.bin")
    try:
        if stored is not None:
            state = load_file(stored)
        elif pickled is not None and allow_pickle:
            state = torch.load(pickled, map_location="cpu", weights_only=True)
        elif pickled is not None:
            raise UserError(
                f"{where}: the weights of {path} are pickled, and reading such a file can run code; "
                "set allow_pickle: true for this model"
            )
        else:
            raise UserError(f"{where}: the weights of {path} are missing")
        weight, bias = state["linear.weight"].float(), state.get("linear.bias")
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{where}: the weights of {path} cannot be read ({str(error).splitlines()[0]})") from None
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data = weight
    linear.bias.data = torch.zeros(len(weight)) if bias is None else bias.float()
    return nn.Sequential(linear, kind())


def save_sentence(sentence: SentenceVector, folder: Path, hidden: int, max_length: int, prefix: str) -> None:
    """Write the files that tell sentence-transformers how a model's vectors are made.

    Args:
        sentence: how.
        folder: the model's.
        hidden: width of the model's states.
        max_length: tokens per text.
        prefix: text before every text, the default prompt.
    """
    folder = Path(folder)
    modules, keys = [("Transformer", "")], ("sentence_embedding", "sentence_embedding")
    modules += [("Pooling", "1_Pooling")] + [("Dense", f"{i + 2}_Dense") for i in range(len(sentence.dense))]
    modules += [("Normalize", f"{len(modules)}_Normalize")] * sentence.normalised
    prompts, default = dict(sentence.prompts), None
    if prefix:
        default = next((name for name, text in prompts.items() if text == prefix), "query")
        prompts[default] = prefix
    files: dict[str, Any] = {
        MODULES: [
            {"idx": i, "name": str(i), "path": path, "type": KINDS[kind]} for i, (kind, path) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "embedding_dimension": hidden, "pooling_mode": sentence.pooling, "include_prompt": True,
        },
        PROMPTS: {
            "model_type": "SentenceTransformer", "prompts": prompts, "default_prompt_name": default,
            "similarity_fn_name": "cosine",
        },
        LENGTH: {"max_seq_length": max_length, "do_lower_case": False},
    }  # fmt: skip
    for (_, path), (linear, activation) in zip(modules[2:], sentence.layers):
        kind = type(activation)
        files[f"{path}/config.json"] = {
            "in_features": linear.in_features, "out_features": linear.out_features, "bias": True,
            "activation_function": f"{kind.__module__}.{kind.__qualname__}",
            "module_input_name": keys[0], "module_output_name": keys[1],
        }  # fmt: skip
    if sentence.normalised:
        files[f"{modules[-1][1]}/config.json"] = {"module_input_name": keys[0], "module_output_name": keys[1]}
    for name, content in files.items():
        write_json(folder / name, content)
    for (_, path), (linear, _) in zip(modules[2:], sentence.layers):
        state = {f"linear.{name}": value.detach().cpu().contiguous() for name, value in linear.state_dict().items()}
        save_file(state, folder / path / "model.safetensors", {"format": "pt"})
