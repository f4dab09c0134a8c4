"""Tables, figures and HTML that the widgets show.

Some notebook viewers strip styles, so the HTML is readable without them and no information is in a colour alone.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from scipy.special import log_softmax, softmax
from transformers import PreTrainedTokenizerFast

from kdlib.device import autocast
from kdlib.errors import UserError
from kdlib.evaluation.probing import segmentation
from kdlib.models.encoder import Encoder
from kdlib.models.tokenizer_files import token_list
from kdlib.progress import clock
from kdlib.pruning.selection import Selection, count_tokens
from kdlib.pruning.tokenizer import prune_tokenizer
from kdlib.viz import style
from kdlib.viz.html import bar, escape, html_table, mark, page, paragraph, tint
from kdlib.viz.style import GREY, INK, MARKERS, PALETTE, SCORES

GAP = "___"  # what a reader types for the masked word
LONGEST = 300  # tokens shown of one text


def cut(tokenizer: PreTrainedTokenizerFast, text: str) -> pd.DataFrame:
    """Tokenise a text, a row per token: token, id, word (0 = first run of non-space), unknown, source (its text)."""
    encoding = tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    rows = [
        dict(
            token=tokenizer.unk_token
            if index == tokenizer.unk_token_id
            else token,  # some tokenizers give the letters instead
            id=index,
            word=max(0, int(np.searchsorted(starts, end - 1, side="right")) - 1),
            unknown=index == tokenizer.unk_token_id,
            source=text[start:end].strip(),
        )
        for token, index, (start, end) in zip(encoding.tokens, encoding.ids, encoding.offsets)
    ]
    return pd.DataFrame(rows, columns=["token", "id", "word", "unknown", "source"])


def tokens_html(encoders: Mapping[str, Encoder], text: str) -> str:
    """How each tokenizer splits a text: tokens with ids, words in two tints, unknown tokens marked, fertility."""
    cuts = {name: cut(encoder.tokenizer, text) for name, encoder in encoders.items()}
    parts = []
    for name, encoder in encoders.items():
        tokens, facts = cuts[name], segmentation(encoder.tokenizer, [text])
        unknown = int(tokens["unknown"].sum())
        count = f"{unknown} unknown token{'s' if unknown != 1 else ''}"
        parts.append(
            paragraph(
                f"<b>{escape(name)}</b> (vocabulary {len(encoder.tokenizer):,}): {len(tokens)} tokens for "
                f"{len(text.split())} words, <b>{facts['fertility']:.2f} tokens per word</b>, "
                f"{mark(count) if unknown else count}"
            )
        )
        chips = " ".join(_chip(row) for row in tokens.head(LONGEST).itertuples())
        rest = f" … and {len(tokens) - LONGEST:,} more" if len(tokens) > LONGEST else ""
        parts.append(f"<div>{chips}{rest}</div>")
    return page(*parts, paragraph(_compare(cuts)))


def _chip(row) -> str:
    look = "display:inline-block;margin:2px 1px;padding:2px 7px;border-radius:4px;text-align:center;color:#222;"
    if row.unknown:
        look += f"background:#fff;border:2px dashed {PALETTE[3]}"
        label = f"<b>unknown: {escape(row.source)}</b>"
    else:
        look += f"background:{tint(PALETTE[row.word % 2])};border:2px solid {tint(PALETTE[row.word % 2])}"
        label = escape(row.token)
    return f'<span style="{look}">{label}<sub style="display:block;font-size:11px;color:#444">{row.id}</sub></span>'


def _compare(cuts: dict[str, pd.DataFrame]) -> str:
    (first, tokens), *others = cuts.items()
    said = []
    for name, other in others:
        if list(tokens["token"]) == list(other["token"]):
            same = list(tokens["id"]) == list(other["id"])
            ids = "with the same ids" if same else "only the ids differ"
            said.append(f"{escape(name)} splits it as {escape(first)} does, {ids}.")
        else:
            lost = list(dict.fromkeys(token for token in tokens["token"] if token not in set(other["token"])))
            said.append(
                f"{escape(name)} splits it differently: {len(other) - len(tokens):+d} tokens. It does not use "
                f"these tokens of {escape(first)}: {', '.join(f'<code>{escape(token)}</code>' for token in lost[:20])}."
            )
    return " ".join(said)


def size_table(teacher: Encoder, selection: Selection, texts: Sequence[str], points: int = 14) -> pd.DataFrame:
    """Measure what vocabularies of growing size cost on `texts`, each with a tokenizer pruned to that size.

    Args:
        teacher: The encoder whose vocabulary is pruned.
        selection: The rows to keep; each size takes the first of them.
        texts: Texts to measure on, best held-out ones.
        points: Number of sizes.

    Returns:
        A row per size: rows, coverage (share of the teacher's tokens that are kept), parameters, fertility,
        unknown_rate. The last row is the whole vocabulary, the one before it the selection.
    """
    counts = count_tokens(teacher.tokenizer, texts)
    order = _claimed(selection)
    covered = np.cumsum(counts[order]) / max(1, counts.sum())
    base = prune_tokenizer(teacher.tokenizer, selection.ids)
    place = {old: new for new, old in enumerate(selection.ids)}
    embeddings = teacher.model.get_input_embeddings().weight
    least = sum(selection.reason[i] in ("special", "character") for i in order)
    rows = []
    for size in np.unique(np.geomspace(max(1, least), len(order), points).round().astype(int)):
        tokenizer = prune_tokenizer(base, [place[i] for i in order[:size]])
        rows.append((int(size), float(covered[size - 1]), tokenizer))
    if len(order) < len(embeddings):  # a tiny vocabulary may be kept whole
        rows.append((len(embeddings), 1.0, teacher.tokenizer))
    table = []
    for size, coverage, tokenizer in rows:
        facts = segmentation(tokenizer, texts)
        parameters = teacher.parameters - (len(embeddings) - size) * embeddings.size(1)
        table.append(dict(rows=size, coverage=coverage, parameters=parameters) | facts)
    return pd.DataFrame(table)[["rows", "coverage", "parameters", "fertility", "unknown_rate"]]


def _claimed(selection: Selection) -> list[int]:
    """The kept ids: special ones and characters, then by count, then the word list."""
    reason, counts = selection.reason, selection.counts
    first = [i for i in selection.ids if reason[i] in ("special", "character")]
    used = sorted((i for i in selection.ids if reason[i] in ("corpus", "merge")), key=lambda i: -counts[i])
    return first + used + [i for i, why in reason.items() if why == "wordlist"]


@style.styled
def size_figure(table: pd.DataFrame, rows: int) -> Figure:
    """Coverage, fertility, unknown tokens and parameters by rows of the vocabulary; `rows` is marked."""
    panels = {
        "coverage": ("tokens covered (%)", 100),
        "fertility": ("tokens per word", 1),
        "unknown_rate": ("unknown tokens (%)", 100),
        "parameters": ("parameters (millions)", 1e-6),
    }
    title = f"What does a vocabulary of {rows:,} rows give, and what does it cost?"
    figure, axes, _ = style.panels(title, len(panels), 2, 2.5)
    between = np.geomspace(table["rows"].min(), table["rows"].max(), 200)
    for ax, (column, (label, scale)) in zip(axes, panels.items()):
        values = table[column] * scale
        ax.plot(between / 1000, np.interp(between, table["rows"], values), color=PALETTE[0])
        ax.plot(table["rows"] / 1000, values, "o", color=PALETTE[0], markersize=5, clip_on=False)
        ax.axvline(rows / 1000, color=INK, linewidth=1.2, linestyle=":")
        chosen = values[table["rows"] == rows]
        ax.plot([rows / 1000], chosen, "D", color=PALETTE[3], markersize=10, markeredgecolor="white", clip_on=False)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.set(xlabel="rows (thousands, log scale)", ylabel=label)
        ax.set_ylim(0, max(values.max() * 1.1, 0.1))
    handles = [
        Line2D([], [], color=PALETTE[0], marker="o", markersize=5, label="up to the teacher's whole vocabulary"),
        Line2D([], [], color=PALETTE[3], marker="D", linestyle="", markeredgecolor="white", label="chosen"),
    ]
    style.legend(figure, handles)
    return figure


def size_html(table: pd.DataFrame, rows: int) -> str:
    """The chosen size in a sentence, against the whole vocabulary (the last row)."""
    here, whole = table[table["rows"] == rows].iloc[0], table.iloc[-1]
    return page(
        paragraph(
            f"With <b>{rows:,} rows</b> the model has {here['parameters'] / 1e6:.1f} million parameters, "
            f"<b>{here['parameters'] / whole['parameters']:.0%}</b> of the teacher's. "
            f"<b>{here['coverage']:.1%}</b> of the teacher's tokens are kept; the other "
            f"{1 - here['coverage']:.1%} are split into shorter tokens, so a word needs {here['fertility']:.2f} tokens "
            f"(teacher: {whole['fertility']:.2f}), or are unknown: {here['unknown_rate']:.2%} "
            f"(teacher: {whole['unknown_rate']:.2%})."
        )
    )


def layer_curves(table: pd.DataFrame, model: str = "teacher") -> pd.DataFrame:
    """Everything measured layer by layer of a model, from the table of results.

    Returns:
        Rows of curve ("topic (accuracy)", "eng, centred"), kind ("task" or "language"), layer, value, low, high, n.
    """
    rows = table[(table["stage"] == "probe") & (table["model"] == model) & table["layer"].notna()]
    tasks, found = rows[rows["method"] == "layer probe"], rows[rows["metric"] == "retrieval"]
    names = tasks["task"].astype(str) + " (" + tasks["metric"].map(lambda m: SCORES.get(m, m)).astype(str) + ")"
    parts = [
        tasks.assign(curve=names, kind="task"),
        found.assign(curve=found["language"].astype(str) + ", " + found["method"].astype(str), kind="language"),
    ]
    curves = pd.concat(parts).astype(dict.fromkeys(["value", "low", "high", "n"], float) | {"layer": int})
    if curves.empty:
        raise UserError(f"no row of {model!r} by layer in the table of results; run the stage 'probe' first")
    return curves[["curve", "kind", "layer", "value", "low", "high", "n"]].reset_index(drop=True)


@style.styled
def layer_figure(curves: pd.DataFrame, shown: Sequence[str], layer: int) -> Figure:
    """The curves in `shown` against the layer, a panel for tasks and one for languages; `layer` is marked."""
    labels = {"task": "what a linear probe reads (%)", "language": "translation found first (%)"}
    kinds = [kind for kind in labels if kind in set(curves.loc[curves["curve"].isin(shown), "kind"])]
    figure, axes, _ = style.panels(f"What does layer {layer} know?", len(kinds), 2, 4.2, sharex=True, sharey=True)
    handles = []
    looks = {name: (_colour(i), MARKERS[i % 10]) for i, name in enumerate(curves["curve"].unique())}
    for ax, kind in zip(axes, kinds):
        mine = curves[curves["kind"] == kind]
        for name in [name for name in mine["curve"].unique() if name in shown]:
            colour, marker = looks[name]
            style.band(ax, mine[mine["curve"] == name], "layer", colour, marker=marker, markersize=6)
            handles.append(Line2D([], [], color=colour, marker=marker, markersize=6, label=style.wrap(name, 30)))
        ax.axvline(layer, color=INK, linewidth=1.5, linestyle=":")
        style.percent(ax.yaxis, labels[kind])
        style.layer_axis(ax)
    style.legend(figure, [*handles, Patch(color=GREY, alpha=0.3, label="95% interval")])
    return figure


def _colour(i: int) -> str:
    return [colour for colour in PALETTE if colour != GREY][i % 9]


def layer_html(curves: pd.DataFrame, shown: Sequence[str], layer: int) -> str:
    """The chosen curves at one layer: value, interval, n, and the layer where the curve is highest."""
    rows = []
    for name, mine in curves[curves["curve"].isin(shown)].groupby("curve", sort=False):
        here, best = mine[mine["layer"] == layer].iloc[0], mine.loc[mine["value"].idxmax()]
        top = f"layer {best['layer']} ({best['value']:.1%})"
        rows.append([escape(name), f"<b>{here['value']:.1%}</b>", interval_text(here), f"{here['n']:.0f}", top])
    return page(html_table([f"at layer {layer}", "value", "95% interval", "n", "best"], rows))


def interval_text(row: pd.Series, scale: float = 100, unit: str = "%") -> str:
    """A value with its interval, in words."""
    if pd.isna(row["low"]) or pd.isna(row["high"]):
        return ""
    return f"{row['low'] * scale:,.1f} to {row['high'] * scale:,.1f}{unit}"


def with_gap(sentence: str) -> str:
    """The sentence with its (first) longest word hidden."""
    words = sentence.split()
    longest = max(range(len(words)), key=lambda i: len(words[i]), default=None)
    return " ".join(GAP if i == longest else word for i, word in enumerate(words))


@torch.inference_mode()
def masked_logits(encoder: Encoder, text: str) -> tuple[list[str], np.ndarray]:
    """The tokens of the vocabulary and the model's logits for the (first) gap of the text: float [rows].

    Raises:
        UserError: where the model has no masked-language head, the tokenizer no mask token, or the text no gap.
    """
    mask = encoder.tokenizer.mask_token
    if encoder.head is None or not isinstance(mask, str):
        raise UserError(
            f"{encoder.name} has no masked-language head, so it gives no soft targets over its vocabulary. "
            "A student learns from its states. A conditioned teacher has such a head."
        )
    if GAP not in text and mask not in text:
        raise UserError(f"Write {GAP} where a word should be guessed.")
    row = encoder.tokenize([text.replace(GAP, mask)])[0].ids
    if encoder.tokenizer.mask_token_id not in row:
        raise UserError(f"The gap is after the first {encoder.max_length} tokens; the encoder reads no more.")
    states = token_states(encoder, row)
    logits = encoder.head(
        states[row.index(encoder.tokenizer.mask_token_id)], encoder.model.get_input_embeddings().weight
    )
    return token_list(encoder.tokenizer)[: len(logits)], logits.float().cpu().numpy()


def token_states(encoder: Encoder, ids: Sequence[int]) -> torch.Tensor:
    """Last hidden states of one row of ids: [tokens, hidden]."""
    device = next(encoder.model.parameters()).device
    row = torch.tensor([ids], device=device)
    with torch.inference_mode(), autocast(device, encoder.bf16):
        return encoder.model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0].float()


def soft_targets(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature): the soft targets that the student learns (Hinton et al. 2015)."""
    return softmax(np.asarray(logits, float) / temperature)


def entropy(logits: np.ndarray, temperature: float) -> float:
    """Entropy of the soft targets in bits."""
    log = log_softmax(np.asarray(logits, float) / temperature)
    return float(-(np.exp(log) * log).sum() / np.log(2))


def targets_html(tokens: Sequence[str], logits: np.ndarray, temperature: float, count: int = 10) -> str:
    """The most probable tokens with their probability at temperature 1 and at `temperature`."""
    plain, soft = soft_targets(logits, 1), soft_targets(logits, temperature)
    best = np.argsort(-plain, kind="stable")[:count]
    top = max(plain[best].max(), soft[best].max())
    rows = [
        [f"<code>{escape(tokens[i])}</code>"]
        + [bar(p / top, colour, f"{p:.2%}") for p, colour in ((plain[i], GREY), (soft[i], PALETTE[0]))]
        for i in best
    ]
    rest = [
        f"all {len(tokens) - len(best):,} other tokens",
        f"{1 - plain[best].sum():.2%}",
        f"{1 - soft[best].sum():.2%}",
    ]
    return page(
        html_table(["token", "temperature 1", f"temperature {temperature:g}"], [*rows, rest]),
        paragraph(
            f"At temperature {temperature:g} the answer has <b>{entropy(logits, temperature):.2f} bits</b> of entropy "
            f"(at 1: {entropy(logits, 1):.2f}). The order of the tokens never changes."
        ),
    )


def layer_choice_html(layers: Sequence[int]) -> str:
    """How to ask for a student that copies these teacher layers, in a notebook and on the command line."""
    sets = [f"student.layers={len(layers)}", f"student.init={list(layers)}".replace(" ", "")]
    line = " ".join(f'--set "{item}"' for item in sets)
    return page(
        paragraph(f"In a notebook: <code>overrides = {escape(sets)}</code>"),
        paragraph(f"On the command line: <code>kdlib run {escape(line)}</code>"),
    )


@torch.inference_mode()
def attentions(encoder: Encoder, text: str) -> tuple[list[str], np.ndarray]:
    """The tokens that the encoder reads and all its attention probabilities: float32 [layers, heads, from, to]."""
    encoding = encoder.tokenize([text])[0]
    model = encoder.model
    row = torch.tensor([encoding.ids], device=next(model.parameters()).device)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # only eager attention returns the probabilities
    try:
        output = model(input_ids=row, attention_mask=torch.ones_like(row), output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return list(encoding.tokens), torch.stack(output.attentions)[:, 0].float().cpu().numpy()


def shared_attention(a: np.ndarray, b: np.ndarray) -> float:
    """The share of attention that two heads spend on the same tokens, 0 to 1: mean over rows of sum(min(a, b))."""
    return float(np.minimum(a, b).sum(-1).mean())


@style.styled
def attention_figure(maps: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> Figure:
    """Attention of one head each: title -> tokens and probabilities [from, to]. Tokens are numbered along the axes."""
    figure, axes, _ = style.panels("Which token looks at which?", len(maps), 2, 3.4)
    most = max(matrix.max() for _, matrix in maps.values())
    for ax, (title, (tokens, matrix)) in zip(axes, maps.items()):
        # The square root shows small values beside the large attention on the first or last token.
        image = ax.imshow(matrix, cmap="Blues", norm=PowerNorm(0.5, 0, most))
        named = range(0, len(tokens), -(-len(tokens) // 18))
        ax.set_xticks(named, [str(i + 1) for i in named], fontsize=10)
        ax.set_yticks(named, [f"{style.legible(tokens[i])} {i + 1}" for i in named], fontsize=10)
        ax.grid(False)
        ax.set(title=title, xlabel="token that is looked at")
    axes[0].set_ylabel("token that looks")
    ticks = [share for share in (0, 0.01, 0.05, 0.1, 0.2, 0.5, 1) if share <= most]
    figure.colorbar(image, ax=axes, label="attention (%)", shrink=0.8, ticks=ticks, format=lambda x, _: f"{100 * x:g}")
    return figure


def attention_html(maps: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> str:
    """Where each head looks most, and how far two heads agree."""
    rows = []
    for title, (tokens, matrix) in maps.items():
        most = matrix.mean(0).argsort(kind="stable")[::-1][:3]
        named = ", ".join(f"<code>{escape(tokens[i])}</code> {matrix.mean(0)[i]:.0%}" for i in most)
        rows.append([escape(title), named])
    parts = [html_table(["head", "where its attention goes, averaged over the tokens that look"], rows)]
    (first, a), *others = maps.values()
    if others and list(first) == list(others[0][0]):
        shared = shared_attention(a, others[0][1])
        parts.append(paragraph(f"The two heads spend <b>{shared:.0%}</b> of their attention on the same tokens."))
    return page(*parts)


def training_facts(curve: pd.DataFrame, steps: int, tokens: int) -> dict[str, float]:
    """The progress of a training: step, steps, seconds, tokens_per_second, left (seconds).

    Args:
        curve: as `distill` passes it to `on_point`.
        steps: of the whole training.
        tokens: of the whole training.

    Returns:
        The numbers; speed and time left are NaN before the first step.
    """
    last = curve.iloc[-1]
    step, seconds = int(last["step"]), float(last["seconds"])
    rate = step / seconds if step and seconds else np.nan
    return dict(
        step=step, steps=steps, seconds=seconds, tokens_per_second=tokens / steps * rate, left=(steps - step) / rate
    )


def training_html(facts: Mapping[str, float], curve: pd.DataFrame, stopped: bool = False) -> str:
    """The progress of a training, or where it stopped, in a line."""
    held = curve[curve["split"] == "heldout"]["loss"]
    parts = [f"step <b>{facts['step']:,}</b> of {facts['steps']:,}", f"{clock(facts['seconds'])} so far"]
    if np.isfinite(facts["left"]):
        parts.append(f"{facts['tokens_per_second']:,.0f} tokens a second")
        parts += [] if stopped else [f"<b>{clock(facts['left'])} left</b>"]
    if len(held):
        parts.append(f"held-out loss {held.iloc[-1]:.3f}")
    note = "<b>Stopped.</b> Run the cell again to resume from the checkpoint." if stopped else ""
    return page(paragraph(" · ".join(parts)), paragraph(note))
