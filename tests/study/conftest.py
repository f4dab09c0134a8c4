"""A small study of somebody's own: a tiny local teacher, an own corpus and an own task, in another language."""

import pytest
import tiny

OVERRIDES = {
    "language": "ceb", "parallel": None, "teacher.max_length": 32,
    "vocabulary.max_rows": 100, "vocabulary.wordlist": False, "student.layers": 2,
    "distill.batch_tokens": 128, "distill.evaluations": 2, "distill.precision": "fp32", "distill.epochs": 1,
    "benchmark.seeds": [0, 1], "benchmark.finetune_epochs": 1, "benchmark.bootstrap": 100,
    "benchmark.latency_runs": 3, "ablations.epochs": 1, "ablations.max_texts": 50, "condition.batch_tokens": 128,
    "benchmark.fewshot": [4], "benchmark.fewshot_steps": 3, "benchmark.finetune_batch": 16,
    "ablations.arms": {
        "fraction": {"half": {"distill.fraction": 0.5}, "all": {"distill.fraction": 1.0}},
        "init": {"alternate": {"student.init": "alternate"}, "random": {"student.init": "random"}},
        "objective": {"attention": {"distill.objectives": {"attention": 1.0}}},
        "conditioning": {"conditioned teacher": {"condition.use": True}},
        "vocabulary": {"whole": {"vocabulary.prune": False}},
        "width": {"16 wide": {"student.hidden": 16}},
    },
    "students": {"shallow": {"student.layers": 1}},
    "probe.train_rows": 40, "probe.test_rows": 20,
}  # fmt: skip


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    tiny.encoder().save(folder / "teacher")
    (folder / "corpus.txt").write_text("\n\n".join("\n".join(tiny.texts(4, seed)) for seed in range(40)))
    rows = [f"{text},{'taas' if len(text.split()) > 3 else 'mubo'}" for text in dict.fromkeys(tiny.texts(150, 99, 7))]
    (folder / "labels.csv").write_text("sentence,gitas-on\n" + "\n".join(rows))
    return folder


@pytest.fixture(scope="session")
def given(sources):
    """The overrides of a profile that make it this study, with others on top."""
    task = {"name": "length", "source": str(sources / "labels.csv"), "text": "sentence", "label": "gitas-on"}
    own = {"teacher.source": str(sources / "teacher"), "corpus.source": str(sources / "corpus.txt"), "tasks": [task]}
    return lambda more=(): OVERRIDES | own | dict(more)
