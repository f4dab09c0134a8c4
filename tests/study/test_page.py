"""The page of a student in a real browser: its numbers are Python's, and it asks no other address for anything."""

import functools
import http.server
import shutil
import threading
from importlib.util import find_spec

import numpy as np
import pytest
import tiny
from pruning import pairs

from kdlib.config import load_profile
from kdlib.data.tasks import load_task
from kdlib.errors import UserError
from kdlib.evaluation.probing import classifier
from kdlib.files import read_json, seal
from kdlib.models.encoder import Encoder
from kdlib.models.onnx import load_exported
from kdlib.study import page as page_module
from kdlib.study.page import make_page, page_data
from kdlib.study.run import Run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update".split()
PHONE = dict(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
READY = 60_000  # milliseconds on a busy machine
TEXTS = [
    "Umuulan sa Maynila.", "Magandang umaga, kumusta ka na?", "a", "ÑANDÚ at piña", "n\u0303 e\u0301 ﬁ ½ Ⅷ ＦＵＬＬ",
    "  dalawang   puwang\tat\nlinya ",
    "😀 👩‍👩‍👧 🇵🇭", "中文 日本語 한국어", "العربية हिन्दी ไทย", "<s> [MASK] </s> [SEP]",
    "100,000.50 https://halimbawa.ph/a?b=c #tag @ako", "don’t “sabi” – … ▁x", "\u200ba\u00a0b\u3000c", "x" * 300,
    "<b>hindi</b> & <img src=x onerror=alert(1)>", *tiny.texts(5, seed=3),
]  # fmt: skip

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found (apt-get install chromium)"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm found (apt-get install npm)"),
    pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs pip install 'kdlib[onnx]'"),
]


def wordpiece():
    return tiny.encoder(layers=1)


def unigram():
    tokenizer = pairs.train_unigram([*tiny.texts(100), *pairs.ACCENTED, *pairs.FOREIGN])
    encoder = tiny.encoder(layers=1)
    encoder.model.resize_token_embeddings(len(tokenizer))
    return Encoder(encoder.model, tokenizer, "unigram")


@pytest.fixture(scope="module", params=[wordpiece, unigram])
def made(request, tmp_path_factory):
    """A run with a very small student, and its page."""
    run = Run(tmp_path_factory.mktemp("run"), load_profile("smoke", ["teacher.max_length=32"]))
    request.param().save(run.folder("student"))
    seal(run.path / "student", key="abc")
    run.record("benchmark", [
        dict(model=model, task="topic", metric="accuracy", value=0.5, low=0.25, high=0.75, method="probe", n=1200)
        for model in ("teacher", "student")
    ])  # fmt: skip
    target = run.path / "page"
    size = make_page(run.path, target)
    assert size == pytest.approx(sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6)
    return run.path, target


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(made):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=made[1].parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def visit(browser, server):
    """Open the page in a new context, in which every other address fails; a list holds those that were asked for."""
    contexts = []

    def open_(**options):
        context = browser.new_context(bypass_csp=True, **options)  # playwright evaluates text in the page
        contexts.append(context)
        page, own = context.new_page(), f"http://127.0.0.1:{server.server_port}/"
        page.others, page.failures = [], []
        page.on("pageerror", lambda error: page.failures.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((own, "data:", "blob:")) else page.others.append(r.url))
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(own) else route.abort())
        page.goto(f"{own}page/")
        ready(page)
        return page

    yield open_
    for context in contexts:
        context.close()


def ready(page):
    page.wait_for_function("document.querySelector('#status:not(:empty)').textContent.startsWith('Ready') || "
                           "document.querySelector('#status.failed')", timeout=READY)  # fmt: skip
    assert page.locator("#status").text_content().startswith("Ready")
    page.locator("#ms:not(:empty)").wait_for()


@pytest.fixture(scope="module")
def page(visit):
    return visit()


def alone(encoder, texts):
    """Vectors of texts read one at a time, as a page does."""
    return np.concatenate([encoder.vectors([text]) for text in texts])


def in_page(page, text):
    """Token ids, vector and label probabilities of a text in the browser."""
    return page.evaluate(
        """async (text) => {
            const { ids, vector } = await student.encode(text);
            return [ids, [...vector], student.page().probes.map((task) => student.classify(task, vector))];
        }""",
        text,
    )


def test_tokens_vectors_and_probabilities_are_those_of_python(made, page):
    run, _ = made
    encoder = load_exported(run / "student")
    task = load_task(Run(run).profile.tasks[0], tiny.corpus_of(Run(run).profile))
    train = task.train.take(50)
    fitted = classifier("classify").fit(alone(encoder, train.texts), np.asarray(train.targets))
    for text, encoding in zip(TEXTS, encoder.tokenize(TEXTS)):
        ids, vector, probabilities = in_page(page, text)
        assert ids == encoding.ids, text
        expected = encoder.vectors([text])[0]
        assert np.abs(np.array(vector) - expected).max() < 0.02 * expected.std(), text  # activations of 8 bits
        assert probabilities[0] == pytest.approx(fitted.predict_proba([vector])[0], abs=1e-4)
    assert len(encoder.tokenize(["x" * 300])[0].ids) <= 32


def test_nearest_sentences_are_those_of_python(made, page):
    data = read_json(made[1] / "data.json")
    encoder, sentences = load_exported(made[0] / "student"), data["sentences"]
    vectors = alone(encoder, sentences)
    centred = vectors - vectors.mean(0)
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    expected = [i for i in np.argsort(-(units @ units[3])) if i != 3][:6]
    found = page.evaluate("async (text) => student.nearest((await student.encode(text)).vector, text)", sentences[3])
    assert [row["cosine"] for row in found] == pytest.approx(units[expected] @ units[3], abs=0.01)
    assert found[0]["sentence"] == sentences[expected[0]] and len(sentences) > 100


def test_page_answers_what_is_typed_and_asks_no_other_address(page):
    page.locator("#sentence").fill("ang bata at ang <img src=x onerror=alert(1)>")
    page.wait_for_function("document.querySelector('#tokens').textContent.includes('bata')")
    assert page.locator("#labels .bar").count() == 7 and page.locator("#labels .best").count() == 1
    assert page.locator("#nearest li").count() == 6
    assert page.locator("#tokens span").count() == int(page.locator("#count").text_content())
    assert page.locator("#scores td").all_text_contents() == [
        "topic", "accuracy", "50.0% [25.0%, 75.0%]", "50.0% [25.0%, 75.0%]", "1,200",
    ]  # fmt: skip
    page.locator("#examples button").last.click()
    assert page.locator("#sentence").input_value() == page.locator("#examples button").last.text_content()
    page.locator("#sentence").fill("")
    page.locator("#nearest").wait_for(state="hidden")
    assert not page.others and not page.failures and page.locator("img").count() == 0


def test_page_fits_a_phone(visit):
    page = visit(**PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = page.evaluate("[...document.querySelectorAll('button')].filter(b => b.offsetHeight < 44).length")
    assert small == 0  # fingers need 44 pixels


def test_dark_device_gets_a_dark_page(visit):
    page = visit(color_scheme="dark")
    look = "getComputedStyle(document.body)"
    ground, ink = page.evaluate(f"[{look}.backgroundColor, {look}.color]")
    assert max(map(int, ground[4:-1].split(","))) < 60 < 180 < min(map(int, ink[4:-1].split(",")))


def test_browser_itself_refuses_other_addresses(browser, server):
    context = browser.new_context()
    page = context.new_page()
    asked, refused = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: refused.append(message.text))
    page.goto(f"http://127.0.0.1:{server.server_port}/page/")
    page.locator("#nearest li").first.wait_for(timeout=READY)  # the model runs under the page's own rules
    page.evaluate("() => fetch('http://127.0.0.2:9/').catch(() => null)")
    assert not [url for url in asked if "127.0.0.2" in url] and any(
        "Content Security Policy" in text for text in refused
    )
    context.close()


def test_page_opens_again_without_a_server(visit, made):
    page = visit()
    page.wait_for_function("document.documentElement.dataset.kept")
    page.unroute_all()
    page.context.set_offline(True)
    page.reload()
    ready(page)
    page.locator("#nearest li").first.wait_for()


def test_older_page_is_replaced_and_other_files_stay(made, tmp_path):
    run, target = made
    before = (target / "data.json").read_bytes()
    (target / "data.json").write_text("{}")
    make_page(run, target)
    assert (target / "data.json").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        make_page(run, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_files_name_the_licences_of_what_they_hold(made):
    licences = (made[1] / "vendor" / "LICENSES.txt").read_text()
    assert "@huggingface/transformers 4" in licences and "onnxruntime-web 1" in licences and "MIT" in licences


def test_without_npm_the_page_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="a page needs npm"):
        page_module.vendor_folder()
    assert not list(tmp_path.iterdir())


def test_without_a_task_of_whole_texts_the_page_only_searches():
    data = page_data(tiny.encoder(layers=1), [tiny.task("tokens"), tiny.task("pair")], tiny.texts(20), None)
    assert data["probes"] == [] and len(data["examples"]) == 4 and len(data["sentences"]) == 20
