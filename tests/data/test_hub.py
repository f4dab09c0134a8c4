"""The real clients against a hub on loopback: models, data sets, zips, fallbacks, streams, failures, no network."""

import csv
import io
import json
import multiprocessing
import os
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor

import datasets
import numpy as np
import pytest
import tiny
import torch
from hubserver import HubServer
from transformers import BertConfig, BertModel

from kdlib import config
from kdlib.config import Source, load_profile
from kdlib.data import hub, sources
from kdlib.data.corpus import Corpus
from kdlib.data.tasks import check, load_task, origins
from kdlib.errors import UserError
from kdlib.models.encoder import text_vectors
from kdlib.models.loading import load_teacher

CLASS = datasets.ClassLabel(names=["0", "1"])
TAGS = datasets.ClassLabel(names=["O", "B-PER", "I-PER"])
TOPICS = ["politics", "sports", "travel"]
FLAGS = ["absent", "dengue", "health", "mosquito", "sick"]
SHARDS, SHARD_ROWS = 4, 15
NOTHING = Corpus([], [], [])

# -- what the hub holds, in the formats of the real data sets


def hate(start, count):
    return [{"text": f"Tweet bilang {i}.", "label": str(i % 2)} for i in range(start, start + count)]


def nli(start, count):
    return [
        {"premise": f"Una {i}.", "hypothesis": f"Ikalawa {i}.", "label": str(i % 2)}
        for i in range(start, start + count)
    ]


def ner(start, count):
    return [
        {"id": str(i), "tokens": ["si", f"Ana{i}", "Cruz", "."], "ner_tags": ["O", "B-PER", "I-PER", "O"]}
        for i in range(start, start + count)
    ]


def sib(start, count):
    return [
        {"index_id": i, "category": TOPICS[i % 3], "text": f"ประโยค ที่ {i} ครับ"} for i in range(start, start + count)
    ]


def dengue(start, count):
    return [
        {"text": f"Lamok {i}, oo", **{flag: (i >> k) & 1 for k, flag in enumerate(FLAGS)}}
        for i in range(start, start + count)
    ]


FORMATS = {  # rows, features, and the task: the source on the hub first, its columns in full
    "hate speech": (hate, {"label": CLASS}, dict(source="tl/hate", test="test")),
    "nli": (
        nli,
        {"label": CLASS},
        dict(
            source="tl/nli", revision="refs/convert/parquet", test="test", kind="pair", text="premise",
            second="hypothesis",
        ),
    ),
    "ner": (
        ner,
        {"ner_tags": datasets.List(TAGS)},
        dict(source="tl/ner", subset="default", test="test", kind="tokens", text="tokens", label="ner_tags"),
    ),
    "topic": (sib, {}, dict(source="tl/sib", subset="tha_Thai", test="test", label="category")),
    "dengue": (
        dengue, {},
        dict(source="hf://datasets/tl/dengue/dengue_raw.zip", test="test", kind="multilabel", label=FLAGS),
    ),
}  # fmt: skip


def parquet(file, rows, features):
    table = datasets.Dataset.from_list(rows)
    table = table.cast(datasets.Features(table.features | features)) if features else table
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(file)


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def configs(folder, names, pattern):
    listed = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {pattern.format(name=name, split=s)}\n" for s in splits)
        for name, splits in names.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("hub")
    models, sets = root / "models", root / "datasets" / "tl"
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(tiny.tokenizer()), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=40,
        )
    )  # fmt: skip
    for name in ("bert", "pickled", "code"):
        model.save_pretrained(models / "tiny" / name)
        tiny.tokenizer().save_pretrained(models / "tiny" / name)
    (models / "tiny/pickled/model.safetensors").unlink()
    torch.save(model.state_dict(), models / "tiny/pickled/pytorch_model.bin")
    own = json.loads((models / "tiny/code/config.json").read_text())
    own["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (models / "tiny/code/config.json").write_text(json.dumps(own))
    (models / "tiny/code/evil.py").write_text("raise SystemExit('code of the hub was run')")

    for split, start in (("train", 0), ("test", 60)):
        parquet(sets / f"hate/data/{split}-00000-of-00001.parquet", hate(start, 60), {"label": CLASS})
        parquet(sets / f"mirror/data/{split}-00000-of-00001.parquet", hate(0, 60), {"label": CLASS})
        parquet(sets / f"nli@refs/convert/parquet/default/{split}/0000.parquet", nli(start, 60), {"label": CLASS})
        parquet(sets / f"ner/data/{split}-0.parquet", ner(start, 60), {"ner_tags": datasets.List(TAGS)})
        parquet(sets / f"sib/{split}/tha_Thai.parquet", sib(start, 60), {})
    configs(sets / "sib", {"tha_Thai": ["train", "test"]}, "{split}/{name}.parquet")
    configs(sets / "ner", {"default": ["train", "test"]}, "data/{split}-*")
    (sets / "nli").mkdir()
    (sets / "nli/nli.py").write_text("raise SystemExit('code of the hub was run')")
    (sets / "dengue").mkdir()
    (sets / "dengue/dengue.py").write_text("raise SystemExit('code of the hub was run')")
    with zipfile.ZipFile(sets / "dengue/dengue_raw.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dengue/train.csv", as_csv(dengue(0, 60)))
        archive.writestr("dengue/valid.csv", as_csv(dengue(200, 10)))
        archive.writestr("dengue/test.csv", as_csv(dengue(60, 60)))
    for shard in range(SHARDS):
        rows = [
            {"id": str(i), "title": f"Pahina {i}", "text": f"Pahina {i} una. Pahina {i} ikalawa."}
            for i in range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
        ]
        parquet(sets / f"wiki/20231101.tl/train-{shard:05}-of-{SHARDS:05}.parquet", rows, {})
    configs(sets / "wiki", {"20231101.tl": ["train"]}, "{name}/{split}-*")
    return root


@pytest.fixture(scope="module")
def server(root):
    with HubServer(root) as server:
        yield server


# -- clients: processes of their own, because the libraries read their settings when they are imported


def prepare(cache):
    os.environ["KDLIB_CACHE"] = str(cache)
    hub.WAITS = (0.01, 0.01, 0.01)
    hub.SILENCE = 0  # each call asks the hub again


def act(call, *values, **named):
    return call(*values, **named)


class Client:
    def __init__(self, environment, cache):
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, prepare, (cache,))
            self._pool.submit(int)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def __call__(self, call, *values, **named):
        return self._pool.submit(act, call, *values, **named).result()

    def close(self):
        self._pool.shutdown()


@pytest.fixture(scope="module")
def clients(server, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    found = [Client(server.environment(home, offline), home / "kdlib") for offline in (False, True)]
    yield found
    for client in found:
        client.close()


@pytest.fixture
def online(clients):
    return clients[0]


@pytest.fixture
def offline(clients):
    return clients[1]


def table(split=None, **source):
    rows, commit = sources.read_table(Source(**source), ["text"], split)
    return rows.to_dict("records"), commit


def task(**spec):
    found = load_task(config.Task(**{"name": "mine"} | spec), NOTHING)
    check(found, set())
    return found


def corpus(**spec):
    return tiny.corpus_of(load_profile("workshop", {f"corpus.{key}": value for key, value in spec.items()}))


def vectors(**spec):
    return text_vectors(load_teacher(config.Teacher(**spec)), ["ang aso", "pusa ay natulog"])


def alone(call, **spec):
    """The call with a hub that is not there; only what is asked first notices."""
    there, hub.constants.ENDPOINT = hub.constants.ENDPOINT, "http://127.0.0.1:9"
    try:
        return call(**spec)
    finally:
        hub.constants.ENDPOINT = there


def refusal(client, *call, **named):
    with pytest.raises(UserError) as caught:
        client(*call, **named)
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


# -- models


def test_model_of_the_hub_is_the_model_in_the_folder(online, root):
    from_hub = online(vectors, source="tiny/bert")
    np.testing.assert_array_equal(from_hub, vectors(source=str(root / "models/tiny/bert")))


def test_pickled_weights_of_the_hub_need_to_be_allowed(online, server, root):
    text = refusal(online, vectors, source="tiny/pickled")
    assert "pytorch_model.bin" in text and "allow_pickle" in text
    assert not any("pytorch_model.bin" in line for line in server.log)
    allowed = online(vectors, source="tiny/pickled", allow_pickle=True)
    np.testing.assert_array_equal(allowed, online(vectors, source="tiny/bert"))


def test_code_in_a_model_repository_is_not_run(online, server):
    assert online(vectors, source="tiny/code").shape == (2, 1, 16)
    assert not any("evil.py" in line for line in server.log)


@pytest.mark.parametrize("more, word", [({"source": "tiny/none"}, "not on the hub"), ({"revision": "v9"}, "'v9'")])
def test_model_that_the_hub_has_not(online, more, word):
    assert word in refusal(online, vectors, **{"source": "tiny/bert"} | more)


# -- data sets


@pytest.mark.parametrize("name", FORMATS)
def test_every_task_format_is_the_same_from_the_hub_and_from_files(online, server, tmp_path, name):
    rows, features, spec = FORMATS[name]
    from_hub = online(task, **spec)
    assert (len(from_hub.train), len(from_hub.test), from_hub.kind) == (60, 60, spec.get("kind", "classify"))
    repo = spec["source"].removeprefix("hf://datasets/").removesuffix("/dengue_raw.zip")
    origin = from_hub.origin
    assert origin.revision == server.commit("datasets", repo, spec.get("revision", "main"))
    assert (origin.source, origin.rows, origin.removed) == (spec["source"], {"train": 60, "test": 60}, 0)

    columns = {key: spec[key] for key in ("kind", "text", "second", "label") if key in spec}
    for split, start in (("train", 0), ("test", 60)):
        parquet(tmp_path / f"{split}.parquet", rows(start, 60), features)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(start, 60))
        (tmp_path / f"{split}.jsonl").write_text(lines, "utf-8")
        flat = [{k: " ".join(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows(start, 60)]
        (tmp_path / f"{split}.csv").write_text(as_csv(flat), "utf-8")
    for kind in ("parquet", "jsonl", "csv"):
        local = task(source=str(tmp_path / f"train.{kind}"), test=str(tmp_path / f"test.{kind}"), **columns)
        assert local == from_hub and local.origin.sha256 == origin.sha256 and local.origin.revision is None


def test_names_of_classes_come_from_the_features(online):
    rows, _ = online(table, source="tl/hate")
    assert rows == hate(0, 60)
    assert online(task, **FORMATS["ner"][2]).labels == ["O", "B-PER", "I-PER"]


def test_another_branch_is_read_at_its_own_commit(online, server):
    commit = server.commit("datasets", "tl/nli", "refs/convert/parquet")
    spec = FORMATS["nli"][2] | {"revision": commit}
    assert online(task, **spec).origin.revision == commit != server.commit("datasets", "tl/nli")


def test_new_files_make_a_new_commit(online, server, root):
    for count in (20, 30):
        parquet(root / "datasets/tl/growing/train.parquet", hate(0, count), {})
        rows, commit = online(table, source="tl/growing")
        assert len(rows) == count and commit == server.commit("datasets", "tl/growing")


def test_loading_script_is_refused_and_never_loaded(online, server):
    text = refusal(online, table, source="tl/dengue")
    assert "script" in text and "hf://datasets/tl/dengue/dengue_raw.zip" in text
    assert "refs/convert/parquet" in refusal(online, table, source="tl/nli")
    assert not any(line.startswith("GET") and ".py" in line for line in server.log)


@pytest.mark.parametrize(
    "more, word",
    [
        ({"source": "tl/none"}, "not on the hub"),
        ({"revision": "v9"}, "no revision 'v9'"),
        ({"split": "dev"}, "'train', 'test'"),
        ({"source": "tl/sib", "subset": "tgl_Latn"}, "tha_Thai"),
        ({"source": "tl/nli", "revision": "refs/convert/parquet"}, "'premise', 'hypothesis', 'label'"),
        ({"source": "hf://datasets/tl/dengue/dengue.zip"}, "dengue_raw.zip"),
        ({"source": "hf://datasets/tl/dengue/dengue.py"}, "cannot read this kind"),
    ],
)
def test_what_the_hub_has_not_is_told_with_what_it_has(online, more, word):
    assert word in refusal(online, table, **{"source": "tl/hate"} | more)


def test_zip_by_address(online, server, tmp_path):
    address = f"{server.url}/datasets/tl/dengue/resolve/main/dengue_raw.zip"
    spec = FORMATS["dengue"][2] | {"source": address, "test": "dengue/test.csv"}
    found = online(task, **spec)
    assert found == online(task, **FORMATS["dengue"][2]) and found.origin.revision is None
    assert "answers 404" in refusal(online, task, **spec | {"source": f"{server.url}/nothing.zip"})


# -- fallbacks


def test_zip_and_local_file_stand_in_for_what_fails(online, server, tmp_path):
    (tmp_path / "a.csv").write_text(as_csv(dengue(0, 60)))
    zipped = {"source": "hf://datasets/tl/dengue/dengue_raw.zip", "test": "test"}
    local = {"source": str(tmp_path / "a.csv")}
    spec = dict(source="tl/dengue", kind="multilabel", label=FLAGS)
    found = online(task, **spec, fallbacks=[zipped, local])
    assert found == online(task, **FORMATS["dengue"][2])
    assert found.origin.source == zipped["source"] and found.origin.revision == server.commit("datasets", "tl/dengue")
    assert len(found.origin.passed_over) == 1 and "script" in found.origin.passed_over[0]
    found = online(task, **spec, fallbacks=[zipped | {"revision": "v9"}, local])
    assert found.origin.source == local["source"] and len(found.test) + len(found.train) == 60
    assert ["script" in found.origin.passed_over[0], "'v9'" in found.origin.passed_over[1]] == [True, True]


def test_fallback_may_name_other_columns(online, tmp_path):
    (tmp_path / "a.csv").write_text("tweet,hate\n" + "".join(f"t{i},{i % 2}\n" for i in range(40)))
    other = {"source": str(tmp_path / "a.csv"), "text": "tweet", "label": "hate"}
    found = online(task, source="tl/none", test="test", fallbacks=[other])
    assert len(found.train) + len(found.test) == 40


def test_mirror_whose_test_is_train_is_passed_over(online):
    text = refusal(online, task, source="tl/mirror", test="test")
    assert "60 test rows are also in train, 100%" in text
    found = online(task, source="tl/mirror", test="test", fallbacks=[{"source": "tl/hate", "test": "test"}])
    assert found.origin.source == "tl/hate" and "100%" in found.origin.passed_over[0]


def test_all_places_failing_are_one_line_with_each_reason(online):
    text = refusal(
        online, task, source="tl/none", fallbacks=[{"source": "tl/mirror", "split": "dev"}, {"source": "./no.zip"}]
    )
    words = ("task mine", "3 sources", "(1) data set 'tl/none'", "not on the hub", "(2) data set 'tl/mirror'")
    for word in (*words, "(3) ./no.zip: no such"):
        assert word in text
    assert text.count("source=embedded") == 1


def test_corpus_falls_back_too(online, server):
    other = {"source": "tl/wiki", "subset": "20231101.tl", "text": "text"}
    found = online(corpus, source="tl/none", text="body", fallbacks=[other])
    assert len(found.train) + len(found.heldout) == SHARDS * SHARD_ROWS
    assert found.origin.revision == server.commit("datasets", "tl/wiki") and "tl/none" in found.origin.passed_over[0]


def test_origins_are_plain_values(online):
    found = online(task, **FORMATS["hate speech"][2])
    text = online(corpus, source="tl/wiki", subset="20231101.tl")
    listed = json.loads(json.dumps(origins(text, [found])))
    assert listed["tasks"]["mine"]["revision"] == found.origin.revision
    assert listed["corpus"]["rows"] == {"train": 58, "heldout": 2, "test": 0}


# -- streams


def test_stream_leaves_the_rest_on_the_hub(online, server):
    start = len(server.log)
    found = online(corpus, source="tl/wiki", subset="20231101.tl", streaming=True, max_documents=SHARD_ROWS)
    assert len(found.train) + len(found.heldout) == SHARD_ROWS
    assert {s.split()[1] for d in found.train + found.heldout for s in d.sentences} == set(map(str, range(SHARD_ROWS)))
    assert found.origin.revision == server.commit("datasets", "tl/wiki")
    read = {line.rsplit("/", 1)[1] for line in server.log[start:] if line.endswith(".parquet")}
    assert read == {f"train-00000-of-{SHARDS:05}.parquet"}


def test_stream_crosses_shards_and_ends(online):
    found = online(corpus, source="tl/wiki", subset="20231101.tl", streaming=True, max_documents=1000)
    whole = online(corpus, source="tl/wiki", subset="20231101.tl")
    assert found == whole and found.origin.sha256 == whole.origin.sha256


def test_stream_goes_on_where_the_hub_failed(online, server):
    server.fail(1, path="GET .*train-00001-of")
    found = online(corpus, source="tl/wiki", subset="20231101.tl", streaming=True, max_documents=20)
    assert len(found.train) + len(found.heldout) == 20


def test_stream_that_breaks_is_told(online, server):
    server.fail(1, 403, "GET .*train-00001-of")
    text = refusal(online, corpus, source="tl/wiki", subset="20231101.tl", streaming=True, max_documents=20)
    assert "reading stopped" in text and "403" in text


def test_stream_without_the_column(online):
    text = refusal(
        online, corpus, source="tl/wiki", subset="20231101.tl", streaming=True, max_documents=10, text="body"
    )
    assert "no column 'body'" in text and "'title'" in text


# -- failures


@pytest.mark.parametrize("path", ["GET /api/datasets", "HEAD .*parquet", "GET .*parquet"])
def test_a_hub_that_fails_twice_is_asked_again(online, server, root, path):
    name = f"tl/twice{len(server.log)}"  # a new one, not in the cache
    parquet(root / f"datasets/{name}/train.parquet", hate(0, 20), {})
    server.fail(2, path=path)
    assert len(online(table, source=name)[0]) == 20


def test_a_model_file_that_fails_once_is_asked_for_again(online, server, root):
    (root / "models/tiny/again").mkdir(exist_ok=True)
    for file in (root / "models/tiny/bert").iterdir():
        (root / "models/tiny/again" / file.name).write_bytes(file.read_bytes())
    server.fail(1, path="GET .*/tiny/again/.*safetensors")
    assert online(vectors, source="tiny/again").shape == (2, 1, 16)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_answer_is_not_asked_for_again(online, server, status):
    server.fail(1, status, "/api/datasets/tl/hate")
    start = len(server.log)
    refusal(online, table, source="tl/hate")
    assert len(server.log) == start + 1


def test_a_hub_that_keeps_failing_leaves_what_is_cached(online, server):
    rows, commit = online(table, source="tl/hate")
    server.fail(4, path="/api/datasets/tl/hate")
    assert online(table, source="tl/hate") == (rows, commit)
    server.fail(4, path="/api/datasets/tl/fresh")
    text = refusal(online, table, source="tl/fresh")
    assert "does not answer (Server error '503" in text and "cache" in text and "local file" in text


def test_fetched_address_serves_when_the_server_fails(online, server, root):
    parquet(root / "datasets/tl/web/a.parquet", hate(0, 20), {})
    address = f"{server.url}/datasets/tl/web/resolve/main/a.parquet?download=true"
    rows, _ = online(table, source=address)
    server.fail(4, path="web")
    assert online(table, source=address)[0] == rows == hate(0, 20)
    server.fail(4, path="web")
    assert "there is no earlier download" in refusal(online, table, source=address.replace("a.parquet", "b.parquet"))


def test_no_hub_at_all_is_one_line_that_says_how_to_go_on(online, server):
    known = online(table, source="tl/hate")
    start = len(server.log)
    for call, source in ((table, "tl/away"), (table, "hf://datasets/tl/away/a.csv"), (vectors, "tiny/away")):
        text = refusal(online, alone, call, source=source)
        assert "127.0.0.1:9 does not answer" in text and "embedded" in text and "local file or folder" in text
    assert online(alone, table, source="tl/hate") == known
    assert len(server.log) == start


# -- no network by choice


def test_offline_reads_what_was_read_before(online, offline, server):
    wanted = [online(task, **spec) for _, _, spec in FORMATS.values()]
    model = online(vectors, source="tiny/bert")
    text = online(corpus, source="tl/wiki", subset="20231101.tl")
    start = len(server.log)
    for (_, _, spec), expected in zip(FORMATS.values(), wanted):
        found = offline(task, **spec)
        assert found == expected and found.origin == expected.origin
    np.testing.assert_array_equal(offline(vectors, source="tiny/bert"), model)
    assert offline(corpus, source="tl/wiki", subset="20231101.tl").origin == text.origin
    streamed = offline(corpus, source="tl/wiki", subset="20231101.tl", streaming=True, max_documents=20)
    assert len(streamed.train) + len(streamed.heldout) == 20
    assert len(server.log) == start


@pytest.mark.parametrize(
    "call, source",
    [
        (table, "tl/never"),
        (table, "hf://datasets/tl/never/a.csv"),
        (table, "https://example.org/never.zip"),
        (vectors, "tiny/never"),
    ],
)
def test_offline_refuses_at_once_what_was_not(offline, call, source):
    offline(int)
    start = time.monotonic()
    text = refusal(offline, call, source=source)
    assert "HF_HUB_OFFLINE is set" in text and source in text and "embedded" in text
    assert time.monotonic() - start < 2


def test_offline_does_not_take_another_commit_for_the_one_asked_for(online, offline):
    online(task, **FORMATS["nli"][2])
    assert "not its main branch" in refusal(offline, table, source="tl/nli")
    assert f"not revision '{'0' * 40}'" in refusal(offline, table, source="tl/hate", revision="0" * 40)
