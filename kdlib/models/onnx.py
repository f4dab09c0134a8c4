"""ONNX: a student as files in fp32 and with 8-bit weights, which ONNX Runtime runs on a CPU without torch.

The optional packages are installed by `pip install 'kdlib[onnx]'`.
"""

import contextlib
import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from kdlib.batching import budget_batches, model_inputs, tokens_per_batch
from kdlib.errors import UserError
from kdlib.files import new_folder
from kdlib.models.encoder import Encoder
from kdlib.models.sentence import SentenceVector, read_sentence, save_sentence
from kdlib.models.tokenizer_files import save_tokenizer

FOLDER = "onnx"  # inside the student's folder, where other libraries look for these file names too
FILES = {"onnx fp32": "model.onnx", "onnx int8": "model_int8.onnx"}
LARGEST = 2 * 10**9  # bytes that one ONNX file can hold


class _Outputs(nn.Module):
    """The model with the outputs of an ONNX file: the last states, and the vector of the text."""

    def __init__(self, model: nn.Module, sentence: SentenceVector):
        super().__init__()
        self.model, self.sentence = model, sentence

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        return states, self.sentence(states, attention_mask)


def export_student(encoder: Encoder, folder: str | Path, int8: bool = True) -> None:
    """Write a student's ONNX files, config and tokenizer into `folder`/onnx, which is whole or absent.

    Inputs: input_ids, attention_mask and, for a model with token types, token_type_ids, each int64 [batch, tokens].
    Outputs: last_hidden_state [batch, tokens, hidden] and sentence_embedding [batch, width], the
    student's vector with its pooling, dense layers and normalisation. Prefix and max_length are in the files' metadata.

    Args:
        encoder: the student.
        folder: the folder in which onnx/ is written.
        int8: also write model_int8.onnx: 8-bit weights with a scale for each channel, and dynamic activations. 7 of the
            8 bits are used, since sums overflow on processors without VNNI (ONNX Runtime, "Quantize ONNX models").

    Raises:
        UserError: without the optional packages, or for a model too large or without ONNX operations.
    """
    onnx = _packages()[0]
    if encoder.parameters * 4 > LARGEST:
        raise UserError(f"{encoder.name}: {encoder.parameters:,} parameters are too many for an ONNX file (2 GB)")
    with new_folder(Path(folder) / FOLDER) as work:
        file = work / FILES["onnx fp32"]
        write_onnx(encoder, file)
        model = onnx.load(file)
        onnx.helper.set_model_props(model, {"prefix": encoder.prefix, "max_length": str(encoder.max_length)})
        onnx.save(model, file)
        if int8:
            _quantise(file, work / FILES["onnx int8"])
        encoder.model.config.save_pretrained(work)
        save_tokenizer(encoder.tokenizer, work)
        if not encoder.sentence.plain:
            save_sentence(encoder.sentence, work, encoder.hidden, encoder.max_length, encoder.prefix)


def available() -> bool:
    """Whether the optional packages are installed."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))


def _packages() -> tuple[ModuleType, ModuleType]:
    """The modules onnx and onnxruntime; torch also needs onnxscript."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"fast students need the package {error.name}: pip install 'kdlib[onnx]'") from None
    return onnx, onnxruntime


def write_onnx(encoder: Encoder, file: Path) -> None:
    """Write the encoder's graph in 32-bit floats, with free batch size and length."""
    model = _Outputs(copy.deepcopy(encoder.model).cpu().float(), copy.deepcopy(encoder.sentence).cpu()).eval()
    outputs = ["last_hidden_state", "sentence_embedding"]
    _write(model, file, outputs, encoder.token_types, encoder.max_length, encoder.name)


def _write(model: nn.Module, file: Path, outputs: list[str], token_types: bool, longest: int, name: str) -> None:
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * token_types
    length = min(4, longest)
    example = (
        torch.full((2, length), 3),
        torch.ones(2, length, dtype=torch.long),
        torch.zeros(2, length, dtype=torch.long),
    )
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=longest)}
    with _quiet(), torch.no_grad():
        try:
            torch.onnx.export(
                model, example[: len(names)], file, input_names=names, dynamic_shapes=[free] * len(names),
                output_names=outputs, external_data=False, verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{name}: a {type(model.model).__name__} cannot be exported ({reason})") from None


class _Logits(nn.Module):
    """A task's model with the output of an ONNX file: its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits


def export_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, int8: bool = True) -> None:
    """Write a task's model as ONNX files with config and tokenizer into `folder`/onnx, which is whole or absent.

    Inputs as `export_student`. Output: logits [batch, labels], or [batch, tokens, labels] of a token classification.

    Args:
        model: a model for sequence or token classification.
        tokenizer: its `model_max_length` is the longest text.
        folder: the folder in which onnx/ is written.
        int8: also write 8-bit weights.

    Raises:
        UserError: as `export_student`.
    """
    _packages()
    types = "token_type_ids" in tokenizer.model_input_names and getattr(model.config, "type_vocab_size", 0) > 1
    with new_folder(folder / FOLDER) as work:
        file = work / FILES["onnx fp32"]
        inner = _Logits(copy.deepcopy(model).cpu().float()).eval()
        _write(inner, file, ["logits"], types, tokenizer.model_max_length, folder.name)
        if int8:
            _quantise(file, work / FILES["onnx int8"])
        model.config.save_pretrained(work)
        save_tokenizer(tokenizer, work)


def _quantise(file: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(file, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages of exporter and quantiser that are meant for developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class OnnxModel(nn.Module):
    """An ONNX file that is called like the model it was made from. Of the hidden states it has the last one.

    Args:
        file: the ONNX file.
        threads: number of threads; default as torch.
    """

    def __init__(self, file: Path, settings: PreTrainedConfig, threads: int | None = None):
        super().__init__()
        runtime = _packages()[1]
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # Waiting threads would keep the processors busy for a while after each call and slow down other work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self.size = Path(file).stat().st_size
        self.session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.config = settings
        self.names = [entry.name for entry in self.session.get_inputs()]
        self.where = nn.Parameter(torch.empty(0), requires_grad=False)  # callers look at parameters for the device

    def run(self, output: str, **inputs: torch.Tensor) -> np.ndarray:
        """One output of the file for inputs [batch, tokens]; token types are 0 unless given."""
        given = {"token_type_ids": torch.zeros_like(inputs["input_ids"]), **inputs}
        return self.session.run([output], {name: given[name].numpy() for name in self.names})[0]

    def forward(self, output_hidden_states: bool = False, **inputs: torch.Tensor) -> SimpleNamespace:
        """The last hidden states of a batch."""
        states = torch.from_numpy(self.run("last_hidden_state", **inputs))
        return SimpleNamespace(last_hidden_state=states, hidden_states={self.config.num_hidden_layers: states})


@dataclass
class OnnxEncoder(Encoder):
    """An encoder that ONNX Runtime runs on the CPU. It is probed and timed like any other, at its last layer."""

    @property
    def megabytes(self) -> float:
        """Size of the file."""
        return self.model.size / 1e6  # pyright: ignore[reportOperatorIssue] - an int

    def vectors(self, texts: Sequence) -> np.ndarray:
        """Sentence vectors: float32 [texts, width]."""
        encodings = self.tokenize(list(texts))
        out = np.empty((len(encodings), self.sentence.width or self.hidden), np.float32)
        for batch in budget_batches([len(e.ids) for e in encodings], tokens_per_batch()):
            types = [encodings[i].type_ids for i in batch] if self.token_types else None
            inputs = model_inputs([encodings[i].ids for i in batch], types, self.tokenizer.pad_token_id)
            out[batch] = self.model.run("sentence_embedding", **inputs)
        return out


def load_exported(folder: str | Path, kind: str = "onnx int8", threads: int | None = None) -> OnnxEncoder:
    """Load what `export_student` wrote into `folder`.

    Args:
        folder: the folder that holds onnx/.
        kind: "onnx int8" or "onnx fp32".
        threads: number of threads; default as torch.

    Raises:
        UserError: without the optional packages, or where there is no such export.
    """
    _packages()
    folder = Path(folder) / FOLDER
    file = folder / FILES[kind]
    if not file.is_file():
        raise UserError(f"{file}: no exported student there")
    try:
        model = OnnxModel(file, AutoConfig.from_pretrained(folder), threads)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        facts = model.session.get_modelmeta().custom_metadata_map
        prefix, max_length = facts["prefix"], int(facts["max_length"])
        sentence = read_sentence(lambda name: path if (path := folder / name).is_file() else None, folder)
    except Exception as error:  # the readers raise a dozen kinds; people need one line
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: not a student that kdlib exported ({reason})") from None
    return OnnxEncoder(model.eval(), tokenizer, kind, prefix, max_length, sentence=sentence or SentenceVector())
