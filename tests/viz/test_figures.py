"""Figures: each draws from a tidy table, with labels, twice the same bytes; a table with gaps says what is missing."""

import re
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from kdlib.errors import UserError
from kdlib.study.run import COLUMNS, read_results
from kdlib.viz import comparisons, figures, style, tables

TASKS = {"topic": "accuracy", "sentiment": "accuracy", "dengue": "macro_f1", "entailment": "accuracy", "entities": "f1"}
ITEMS = {"topic": 204, "sentiment": 400, "dengue": 400, "entailment": 400, "entities": 317}
SKILL = {"teacher": 0.80, "pruned teacher": 0.797, "student": 0.76, "no distillation": 0.52, "random weights": 0.45}
LAYERS = 12


def scored(rng, value, n):
    """A score with the interval that n items would give it."""
    value = float(np.clip(value + rng.normal(0, 0.01), 0.05, 0.98))
    half = 1.96 * np.sqrt(value * (1 - value) / n)
    return {"value": value, "low": max(value - half, 0), "high": min(value + half, 1), "n": n}


def make_probe(rng, tasks, languages):
    rows = []
    for i, language in enumerate(languages):
        values = {"fertility": 1.2 + 0.13 * i, "unknown_rate": 0.0002 * i, "split_words": 0.3 + 0.05 * i}
        for metric, value in values.items():
            rows.append({"language": language, "metric": metric, "value": value, "method": "parallel"})
    rows += [{"metric": "vocabulary_share", "value": 0.07}, {"metric": "vocabulary_used", "value": 17012}]
    for k, (task, metric) in enumerate(tasks.items()):
        common = {"task": task, "metric": metric, "method": "layer probe"}
        for layer in range(LAYERS + 1):
            value = 0.5 + 0.05 * k + 0.25 * np.sin(np.pi * (layer + 2) / (LAYERS + 5))
            rows.append(common | {"layer": layer} | scored(rng, value, ITEMS.get(task, 100)))
        rows.append(common | {"model": "majority", "value": 0.2 + 0.08 * k, "n": ITEMS.get(task, 100)})
    for i, language in enumerate(languages[1:]):
        common = {"language": language, "metric": "retrieval"}
        for layer in range(LAYERS + 1):
            value = 0.15 + 0.8 * layer / LAYERS - 0.12 * i * (layer / LAYERS)
            rows.append(common | {"method": "plain", "layer": layer} | scored(rng, value, 500))
            rows.append(common | {"method": "centred", "layer": layer} | scored(rng, value + 0.1, 500))
        rows.append(common | {"model": "word overlap", "method": "baseline"} | scored(rng, 0.1 + 0.08 * i, 500))
    for i in range(LAYERS + 1):
        for j in range(LAYERS + 1):
            rows.append({"metric": "cka", "layer": i, "x": j, "value": float(np.exp(-abs(i - j) / 14))})
    return rows


def make_prune(rng):
    rows = []
    for model, count in (("teacher", 250037), ("pruned teacher", 20400)):
        sizes = {"parameters": 21.5e6 + 384 * count, "megabytes": (21.5e6 + 384 * count) * 4 / 1e6, "rows": count}
        rows += [{"model": model, "metric": metric, "value": value} for metric, value in sizes.items()]
    scripts = "Latn Cyrl Hani neutral Arab Hang Deva Grek Thai Hebr Beng Taml Cans".split()
    for i, script in enumerate(scripts):
        kept = {"Latn": 17500, "neutral": 2900}.get(script, 0)
        rows.append({"metric": "rows_kept", "arm": script, "value": kept})
        rows.append({"metric": "rows_cut", "arm": script, "value": int(130000 / (i + 1) ** 1.2) - kept // 9})
    for method, loss in (("corpus", 0.0), ("heldout", 0.02)):
        for count in (500, 1000, 2000, 5000, 10000, 20400, 50000, 250037):
            value = min(1 - loss, 0.45 + 0.4 * np.log10(count / 300) / 1.2)
            rows.append({"metric": "coverage", "method": method, "x": count, "value": value})
    return [{"model": "pruned teacher"} | row for row in rows]


def make_distill(rng):
    rows = []
    for step in range(0, 701, 7):
        for method in ("train", "heldout") if step % 87 < 7 else ("train",):
            hidden = 1.1 * np.exp(-step / 90) + 0.07 + 0.01 * (method == "heldout") + abs(rng.normal(0, 0.004))
            values = {"hidden": hidden, "sentence": hidden * 0.2, "loss": hidden * 1.05}
            common = {"method": method, "x": step * 1.3, "n": step}
            rows += [common | {"metric": metric, "value": value} for metric, value in values.items()]
    return [{"model": "student"} | row for row in [*rows, {"metric": "tokens_per_second", "value": 1900.0}]]


def make_benchmark(rng, tasks, models):
    rows = []
    for m, (model, skill) in enumerate(models.items()):
        for method, gain in (("probe", 0.0), ("finetune", 0.04)):
            for k, (task, metric) in enumerate(tasks.items()):
                for name in dict.fromkeys((metric, "accuracy", "macro_f1")):
                    common = {"model": model, "method": method, "task": task, "metric": name}
                    value, n = skill + gain + 0.03 * (k - 2), ITEMS.get(task, 100)
                    rows += [common | {"seed": seed} | scored(rng, value, n) for seed in (0, 1, 2, None)]
            average = {"model": model, "method": method, "task": "average", "metric": "score"}
            rows += [average | {"seed": seed} | scored(rng, skill + gain, 1700) for seed in (0, 1, 2, None)]
        size = {"teacher": 117.5e6, "pruned teacher": 29.3e6}.get(model, 15.0e6)
        rows.append({"model": model, "metric": "parameters", "value": size})
        rows.append({"model": model, "metric": "megabytes", "value": size * 4e-6})
        for device, speed in (("cpu", 1.0), ("cuda", 0.1)):
            latency = speed * (30 if m < 2 else 11)
            for metric, value in (("latency_ms", latency), ("sentences_per_second", 4000 / latency)):
                spread = {"value": value, "low": value * 0.9, "high": value * 1.15}
                rows.append({"model": model, "method": device, "metric": metric} | spread)
        if model in ("teacher", "student"):
            for task, metric in list(tasks.items())[:2]:
                for x in (16, 64, 256):
                    common = {"model": model, "method": "fewshot", "task": task, "metric": metric, "x": x}
                    rows.append(common | scored(rng, skill - 0.2 + 0.0005 * x, ITEMS.get(task, 100)))
    for other in models:
        for method in ("probe", "finetune") if other != "student" else ():
            value = models.get("student", 0.7) - models[other]
            common = {"model": "student", "arm": other, "method": method, "task": "average", "n": 1700}
            rows.append(common | {"metric": "difference", "value": value, "low": value - 0.02, "high": value + 0.02})
            rows.append(common | {"metric": "difference_90", "value": value, "low": value - 0.01, "high": value + 0.01})
    kept = {model: (skill - 0.3) / 0.5 for model, skill in models.items()}
    for task in [*tasks, "average", "with room"]:
        common = {"method": "probe", "task": task}
        for model, value in kept.items():
            spread = {"value": value, "low": value - 0.1, "high": value + 0.1}
            rows.append(common | {"model": model, "metric": "retention"} | spread)
        if task in tasks:
            room = {"model": "teacher", "arm": "tf-idf", "metric": "room", "value": 0.1, "low": 0.02, "high": 0.2}
            rows += [common | room, common | {"model": "chance", "metric": "chance", "value": 0.3}]
    rows.append({"model": None, "metric": "threads", "value": 2, "arm": "a processor"})
    return [*rows, {"model": "student", "metric": "margin", "value": 0.02}]


def make_condition():
    warm = [{"method": "warm-up", "x": 10.0 * i, "n": i, "value": 900 / (i + 1)} for i in range(5)]
    train = [{"method": "train", "x": 20.0 * i, "n": i, "value": 300 / (i + 1)} for i in range(1, 6)]
    held = [{"method": "heldout", "x": 50.0 * i, "n": i, "value": 250 - 40 * i, "low": 220 - 40 * i} for i in range(3)]
    rows = warm + train + [row | {"high": row["value"] + 30} for row in held]
    return [{"model": "conditioned teacher", "metric": "perplexity"} | row for row in rows]


def make_task(rng, tasks):
    rows = []
    for i, model in enumerate(("tf-idf", "teacher", "student on labels", "student on soft labels")):
        for task, metric in list(tasks.items())[:2]:
            for x in (8, 64):
                common = {"model": model, "method": "task", "task": task, "metric": metric, "x": x}
                rows.append(common | scored(rng, 0.4 + 0.05 * i + 0.002 * x, ITEMS.get(task, 100)))
    return rows


def make_ablations(rng, tasks):
    arms = {
        "fraction": {"10%": 0.1, "30%": 0.3, "50%": 0.5, "100%": 1.0},
        "init": dict.fromkeys(["alternate", "last", "first", "random"]),
        "objective": dict.fromkeys(["hidden", "sentence", "hidden + sentence", "hidden + attention"]),
    }
    chosen = dict(list(tasks.items())[:3]) | {"average": "score"}
    rows = []
    for family, values in arms.items():
        for i, (arm, x) in enumerate(values.items()):
            common = {"model": "student", "method": family, "arm": arm, "x": x}
            for task, metric in chosen.items():
                n = 1000 if task == "average" else ITEMS.get(task, 100)
                for seed in (None,) if task == "average" else (0, 1, None):
                    score = scored(rng, 0.62 + 0.04 * i, n)
                    rows.append(common | {"task": task, "metric": metric, "seed": seed} | score)
            rows.append(common | {"metric": "heldout_loss", "value": 0.2 - 0.02 * i})
            for seed in (0, 1, None):
                rows.append(common | {"metric": "similarity", "value": 0.9 + 0.02 * i, "seed": seed})
            for task in ("average", None) if i else ():
                found = {"difference": 0.04 * i, "p_holm": 0.2 / i**2, "tost_p_holm": 1.0, "detectable": 0.03}
                compared = {"model": "student", "method": family, "arm": arm, "task": task, "n": 1000}
                for metric, value in found.items():
                    spread = {"value": value, "low": value - 0.02, "high": value + 0.02}
                    rows.append(compared | {"metric": metric} | spread)
    for model in ("teacher", "no distillation"):
        for task, metric in chosen.items():
            n = 1000 if task == "average" else ITEMS.get(task, 100)
            common = {"model": model, "method": "reference", "task": task, "metric": metric}
            rows.append(common | scored(rng, SKILL[model], n))
    return rows


def make_table(path, tasks=TASKS, languages=("tgl", "eng", "spa", "ind", "ceb"), models=SKILL):
    """A table of all stages, as `read_results` gives it."""
    rng = np.random.default_rng(0)
    stages = {
        "probe": make_probe(rng, tasks, languages),
        "prune": make_prune(rng),
        "condition": make_condition(),
        "distill": make_distill(rng),
        "benchmark": make_benchmark(rng, tasks, models),
        "task": make_task(rng, tasks),
        "ablations": make_ablations(rng, tasks),
    }
    defaults = {"model": "teacher", "language": languages[0]}
    rows = [defaults | {"stage": stage} | row for stage, rows in stages.items() for row in rows]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(path, index=False)
    return read_results(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return make_table(tmp_path_factory.mktemp("table") / "results.csv")


@pytest.fixture(scope="module")
def drawn(table, tmp_path_factory):
    """What `draw_all` gave for the whole table."""
    return figures.draw_all(table, tmp_path_factory.mktemp("figures"))


@pytest.fixture(scope="module")
def shown(table):
    """Every figure, by name, drawn where somebody has settings of their own."""
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "savefig.bbox": "tight"}):
        found = {name: draw(table) for name, draw in figures.drawers(table).items()}
        assert matplotlib.rcParams["font.size"] == 30
    return found


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible()]


@pytest.mark.slow
def test_a_whole_table_gives_every_figure(drawn):
    files, missing = drawn
    assert missing == []
    assert list(files) == [*figures.FIGURES, "ablation_fraction", "ablation_init", "ablation_objective"]
    for name, paths in files.items():
        assert [path.name for path in paths] == [f"{name}.png", f"{name}.pdf"]
        assert paths[0].read_bytes().startswith(b"\x89PNG")
        assert paths[1].read_bytes().startswith(b"%PDF") and b"Date" not in paths[1].read_bytes()
    assert plt.get_fignums() == []


@pytest.mark.slow
def test_the_same_table_gives_the_same_bytes(drawn, shown, tmp_path):
    for name, paths in drawn[0].items():
        for first, second in zip(paths, figures.save(shown[name], tmp_path, name), strict=True):
            assert first.read_bytes() == second.read_bytes(), first.name


@pytest.mark.parametrize("name", [*figures.FIGURES, "ablation_fraction", "ablation_init", "ablation_objective"])
def test_axes_are_labelled_letters_are_large_and_nothing_is_cut(shown, name):
    figure = shown[name]
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_label() == "<colorbar>"
        labels = [label.get_text() for label in axes.get_yticklabels() if label.get_visible()]
        assert axes.get_ylabel() or not any(re.fullmatch(r"[\d.,−-]+", label) for label in labels)
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()) >= 12
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 8 <= width <= 10
    assert drawn.x0 > 0 and drawn.y0 > 0 and drawn.x1 < width and drawn.y1 < height


@pytest.mark.parametrize(
    "stage, names",
    {
        "probe": ["fertility", "layer_probe", "retrieval", "cka"],
        "prune": ["vocabulary"],
        "condition": ["conditioning"],
        "distill": ["learning_curve"],
        "benchmark": ["benchmark_probe", "benchmark_finetune", "fewshot", "retention", "differences", "efficiency"],
        "task": ["task_students"],
    }.items(),
)
def test_a_missing_stage_is_named(table, stage, names):
    for name in names:
        with pytest.raises(UserError, match=f"run the stage '{stage}' first"):
            figures.FIGURES[name](table[table["stage"] != stage])


def test_a_family_that_was_not_run_is_named(table):
    with pytest.raises(UserError, match="ablation of depth.*run the stage 'ablations' first"):
        comparisons.ablation(table, "depth")


@pytest.mark.slow
def test_every_family_of_arms_is_drawn_also_one_of_ones_own(table):
    arms = table[(table["stage"] == "ablations") & (table["method"] == "fraction")]
    own = arms.assign(method="my own", x=None)
    more = pd.concat([table, own])
    assert comparisons.ablation_families(more)[-1:] == ["my own"]
    names = set(figures.drawers(more)) - set(figures.FIGURES)
    assert names == {f"ablation_{family}" for family in ("fraction", "init", "objective", "my_own")}
    assert "(my own)" in comparisons.ablation(more, "my own").get_suptitle()


def test_the_title_of_an_ablation_tells_which_arms_differ_from_the_first(table):
    title = " ".join(comparisons.ablation(table, "init").get_suptitle().split())
    assert "better than alternate: random (by probe; 3.0 points could have been seen)" in title
    arms = table[(table["stage"] == "ablations") & (table["arm"] == "alternate")]
    assert "one arm alone: alternate" in comparisons.ablation(arms, "init").get_suptitle()


def test_the_title_of_the_differences_tells_the_verdict_on_the_teacher(table):
    assert "is below the teacher (-4.0 points)" in comparisons.differences(table).get_suptitle()
    gap = (table["metric"] == "difference_90") & (table["arm"] == "teacher")
    equal = table.assign(value=table["value"].where(~gap, 0.0), low=table["low"].where(~gap, -0.01))
    equal = equal.assign(high=equal["high"].where(~gap, 0.01))
    assert "on par with the teacher" in comparisons.differences(equal).get_suptitle()


def test_the_main_table_has_a_row_per_model_and_a_column_per_task(table):
    main = tables.main_table(table)
    assert list(main.index) == list(SKILL) and list(main.columns) == ["parameters (M)", *TASKS, "average"]
    rows = table[(table["method"] == "finetune") & (table["task"] == "average") & table["seed"].isna()]
    value = rows[rows["model"] == "student"]["value"].iloc[0]
    assert main.loc["student", "average"].startswith(f"{value * 100:.1f} [")
    with pytest.raises(UserError, match="fine-tuning score"):
        tables.main_table(table[table["method"] != "finetune"])


@pytest.mark.slow
def test_draw_all_draws_what_it_can(table, tmp_path):
    files, missing = figures.draw_all(table[table["stage"] == "distill"], tmp_path)
    assert list(files) == ["learning_curve"]
    assert [name for name, _ in missing] == [name for name in figures.FIGURES if name != "learning_curve"]
    assert dict(missing)["cka"] == "no comparison of layers (CKA) in the table of results; run the stage 'probe' first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learning_curve.pdf", "learning_curve.png"]


def test_an_empty_table_is_refused(tmp_path):
    empty = pd.DataFrame(columns=COLUMNS)
    for use in (*figures.FIGURES.values(), tables.headline, lambda table: figures.draw_all(table, tmp_path)):
        with pytest.raises(UserError, match="table of results is empty"):
            use(empty)


def test_letters_that_no_font_has_are_dots_and_the_font_to_install_is_told(monkeypatch):
    monkeypatch.setattr(style, "letters", lambda: frozenset(range(0x250)))
    style.warn_missing_font.cache_clear()
    with pytest.warns(UserWarning, match="Noto Sans Thai"):
        assert style.legible("task กข 1") == "task ·· 1"
    with warnings.catch_warnings(action="error"):
        assert style.legible("ก") == "·"  # told once


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Glyph .* missing from")
@pytest.mark.filterwarnings("ignore:Glyph of")
def test_any_language_task_and_model_can_be_drawn(tmp_path):
    tasks = {"ปัญหา": "accuracy", "主题 分类": "macro_f1", "$x$ and $y": "f1"}
    models = {"teacher": 0.8, "student": 0.75, "somebody/else-base": 0.7}
    table = make_table(tmp_path / "results.csv", tasks, ("ไทย", "中文"), models)
    for draw in (figures.fertility, figures.layer_probe, figures.retrieval, comparisons.retention):
        draw(table)
    comparisons.ablation(table, "init")
    figure = comparisons.benchmark_probe(table)
    figures.save(figure, tmp_path, "benchmark_probe")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*models, "chance"]
    assert style.legible("主题 分类") + "\nmacro F1, n = 100" in texts(figure)


@pytest.mark.slow
def test_a_model_looks_the_same_in_every_table(table):
    def look(rows, model):
        handles = comparisons.benchmark_probe(rows).legends[0].legend_handles
        return next((h.get_color(), h.get_marker()) for h in handles if h.get_label() == model)

    assert look(table[table["model"] != "teacher"], "student") == look(table, "student")
    assert len({look(table, model) for model in SKILL}) == len(SKILL)


def test_the_headline_metric_is_drawn_whatever_the_order_of_rows(table):
    labels = texts(comparisons.benchmark_probe(table.sort_values("metric", kind="stable")))
    assert "dengue\nmacro F1, n = 400" in labels
    assert "entities\nentity F1, n = 317" in labels


def test_curves_go_forward_in_time_whatever_the_order_of_rows(table):
    figure = figures.learning_curve(table.sample(frac=1, random_state=0))
    assert [axes.get_ylabel() for axes in figure.axes] == ["hidden (MSE / teacher's variance)"]
    for line in (line for axes in figure.axes for line in axes.lines):
        assert (np.diff(line.get_xdata()) > 0).all()


def test_the_answer_is_in_the_title(table):
    def title(draw, rows=table):
        return " ".join(draw(rows).get_suptitle().split())

    own = f"A word of Filipino takes {1.2:.2f} tokens"
    assert title(figures.fertility) == own  # the fewest of all languages
    none = table.assign(value=table["value"].where(table["metric"] != "unknown_rate", 0.0))
    assert title(figures.fertility, none) == f"{own} no token is unknown"
    assert "layer 8, 88%" not in title(figures.retrieval) and "layer 12" in title(figures.retrieval)
    assert title(figures.vocabulary).endswith("but for 2.00% of new text")
    unigram = table[table["stage"] == "condition"].iloc[:1].assign(metric="perplexity_unigram", value=500.0)
    assert "better than guessing by word frequency (500)" in title(figures.conditioning, pd.concat([table, unigram]))
    assert "misses 8% of the variance" in title(figures.learning_curve)
    assert "mean of tasks: teacher 8" in title(comparisons.benchmark_probe)
    assert "best with 8 rows per class: student on soft labels" in title(comparisons.task_students)
    assert title(comparisons.efficiency).startswith("The pruned teacher is the smallest")


def test_chance_is_marked_at_every_task(table):
    axes = comparisons.benchmark_probe(table).axes[0]
    marks = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert len(marks) == len(TASKS) and {line.get_xdata()[0] for line in marks} == {0.3}
    assert "with room" not in " ".join(texts(axes.figure))


def test_the_copied_layers_are_marked_in_the_comparison_of_layers(table):
    copied = [{"stage": "distill", "model": "student", "metric": "copied_layer", "x": 1, "value": 3}]
    marked = figures.cka(pd.concat([table, pd.DataFrame(copied)])).axes[0]
    assert [list(line.get_xdata()) for line in marked.lines] == [[3.5]]
    assert not figures.cka(table).axes[0].lines


def test_a_family_with_one_arm_has_no_figure(table):
    alone = table[(table["stage"] != "ablations") | (table["arm"] == "alternate")]
    assert comparisons.ablation_families(alone) == []


def test_a_short_range_of_rows_has_numbers_on_its_axis(table):
    few = table[(table["metric"] != "coverage") | table["x"].between(2000, 20400)]
    labels = [text.get_text() for text in figures.vocabulary(few).axes[0].get_xticklabels(which="both")]
    assert {"2,000", "5,000", "10,000", "20,000"} <= set(labels)
    assert not any("$" in label for label in labels)


def test_the_title_of_retention_is_what_the_student_keeps_above_chance(table):
    assert "keeps 92% of the teacher above chance" in comparisons.retention(table).get_suptitle()


def test_an_arm_has_a_dot_for_each_seed(table):
    dots = comparisons.ablation(table, "fraction").axes[2].lines[0].get_xdata()
    assert np.allclose(dots, [0.9, 0.9])


def curve(losses):
    return pd.DataFrame(
        [
            {"split": split, "step": i, "seconds": 60.0 * i, "loss": loss, "hidden": loss / 2, "sentence": loss / 4}
            for i, loss in enumerate(losses)
            for split in ("train", "heldout")
        ]
    )


def test_live_curve_from_the_first_point_on():
    assert len(figures.live_curve(curve([1.0])).axes) == 3
    one_objective = curve([1.0, 0.5]).drop(columns="sentence")
    assert len(figures.live_curve(one_objective).axes) == 1
    with pytest.raises(UserError, match="no learning curve yet"):
        figures.live_curve(curve([]))


def test_live_curve_is_logarithmic_when_the_loss_falls_far():
    assert figures.live_curve(curve([1.0, 0.5])).axes[0].get_yscale() == "linear"
    assert figures.live_curve(curve([1.0, 0.05])).axes[0].get_yscale() == "log"
    assert figures.live_curve(curve([0.0, 1.0])).axes[0].get_yscale() == "linear"  # no logarithm of 0


@pytest.mark.slow
@pytest.mark.parametrize("copied, arrows", [([3, 6, 9, 12], 8), ([9, 10, 11, 12], 8), ([], 4)])
def test_layer_map_has_an_arrow_per_pair(copied, arrows, tmp_path):
    figure = figures.layer_map_figure(12, 4, copied, [3, 6, 9, 12])
    assert len([text for text in figure.axes[0].texts if getattr(text, "arrow_patch", None)]) == arrows
    assert len(figure.axes[0].patches) == 16
    assert all(path.is_file() for path in figures.save(figure, tmp_path, "layers"))


def test_a_notebook_shows_a_figure_without_inline():
    assert figures.layer_map_figure(4, 2, [2, 4], [2, 4])._repr_png_().startswith(b"\x89PNG")


def test_save_says_where_it_cannot_write(tmp_path):
    (tmp_path / "layers.png").mkdir()
    with pytest.raises(UserError, match="layers.png: could not be written"):
        figures.save(figures.layer_map_figure(4, 2, [2, 4], [2, 4]), tmp_path, "layers")
    assert [path.name for path in tmp_path.iterdir()] == ["layers.png"]


def test_headline_has_a_row_per_model(table):
    summary = tables.headline(table)
    assert list(summary.index) == list(SKILL)
    teacher, student = summary.loc["teacher"], summary.loc["student"]
    assert (student["parameters (M)"], student["size (MB)"]) == (15.0, 60.0)
    assert student["latency (ms)"] == 11.0  # on the CPU, though the GPU was timed, too
    assert teacher["of teacher, above chance (%)"] == pytest.approx(100)
    assert student["of teacher, above chance (%)"] == pytest.approx(92)


def test_headline_leaves_open_what_was_not_measured(table):
    sizes = table[(table["stage"] == "benchmark") & table["metric"].isin(["parameters", "megabytes"])]
    summary = tables.headline(sizes)
    assert summary["parameters (M)"].notna().all()
    assert summary[["latency (ms)", "probe score (%)", "of teacher, above chance (%)"]].isna().all(axis=None)


def test_students_of_several_runs_are_compared_by_any_figure(table):
    better = table.assign(value=table["value"].where(table["metric"] != "parameters", table["value"] * 2))
    both = tables.compare({"small": table, "large": better})
    summary = tables.headline(both)
    assert list(summary.index) == ["teacher", "small", "large"]
    assert summary.loc["large", "parameters (M)"] == 2 * summary.loc["small", "parameters (M)"] == 30
    assert {"teacher", "small", "large"} <= {
        text.get_text() for text in comparisons.benchmark_probe(both).findobj(Text)
    }
