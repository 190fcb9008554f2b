"""The playground page in a real Chromium, with a real TorchServe and a real run; axe checks its accessibility.

What the page shows is compared with the answers of the server, the model and the files of the run. `make test-web`
installs what is needed. With BABYBERT_PICTURES=FOLDER the pictures of docs/playground.md are written there, with a
model that was trained on the whole demo.
"""

import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from faulty_proxy import FaultyProxy
from labelled_texts import decidable_texts, write_csv
from processes import start_babybert
from served import ServedModel

from babybert.checkpoint.format import checkpoint_step, find_checkpoint, list_checkpoints
from babybert.config import FinetuneConfig, PrepareConfig, PretrainConfig
from babybert.data.prepare import prepare
from babybert.evaluation.look import attention_weights, neighbours
from babybert.evaluation.preference import compare_sentences
from babybert.playground.run_history import evenly_spaced
from babybert.serving.predictor import Predictor
from babybert.serving.request_schema import NextSentence
from babybert.training.finetuning import finetune
from babybert.training.train import pretrain

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make test-web` brings it")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe is not installed; `make test-web` brings it"
)
expect = playwright.expect
PICTURES = os.environ.get("BABYBERT_PICTURES")
Page = Any  # of playwright, which may be missing
Visit = Callable[..., Page]
Query = Callable[[dict[str, Any]], Any]
DESK, PHONE = {"width": 1000, "height": 800}, {"width": 360, "height": 740}
SENTENCE = "The sheriff rides with a revolver near the [MASK]."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium")
    if not program:
        pytest.skip("chromium is not installed; `make test-web` brings it")
    with playwright.sync_playwright() as started:
        expect.set_options(timeout=20_000)
        # In a container, where tests run as root, Chromium starts without its sandbox only.
        chromium = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    """A run with more checkpoints than the page queries."""
    folder = tmp_path_factory.mktemp("learned")
    settings: dict[str, Any] = {
        **SMALL,
        "data": demo_folder,
        "width": 16,
        "kernels": "plain",
        "epochs": 2,
        "checkpoint_every": "10",
    }
    if PICTURES:
        prepare(PrepareConfig(out=folder / "data"))
        settings = {"data": folder / "data", "metrics": False, "device": "cpu"}
    result = pretrain(PretrainConfig(**{**settings, "out": folder / "run", "keep_checkpoints": 100}))
    assert result is not None
    return result.checkpoint.parent


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor.load(find_checkpoint(run))


def playground(*flags: str, folder: Path) -> Iterator[str]:
    """`babybert playground` until the generator is resumed; yields its address."""
    child = start_babybert("playground", "--port=0", *flags, folder=folder)
    try:
        match = re.search(r"http://\S+/", child.wait_for_line("http://"))
        assert match
        yield match[0]
        child.process.terminate()
        assert child.wait(30) == 0
    finally:
        child.kill()


@pytest.fixture(scope="module")
def checkpoint_page(run: Path) -> Iterator[str]:
    yield from playground(f"--checkpoint={run.name}", folder=run.parent)


@pytest.fixture(scope="module")
def proxy(server: ServedModel) -> Iterator[FaultyProxy]:
    """A proxy in front of TorchServe that can be made to fail."""
    faulty_proxy = FaultyProxy(("127.0.0.1", server.inference_port))
    yield faulty_proxy
    faulty_proxy.close()


@pytest.fixture(scope="module")
def endpoint_page(proxy: FaultyProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from playground(f"--endpoint={proxy.url}", folder=tmp_path_factory.mktemp("page"))


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """A function that opens a page. At the end, no request may have gone elsewhere, and no script may have failed."""
    contexts: list[Any] = []
    foreign_requests: list[str] = []
    errors: list[str] = []

    def visit(url: str, viewport: dict[str, int] = DESK, scheme: str = "light") -> Page:
        context = browser.new_context(
            viewport=viewport, color_scheme=scheme, reduced_motion="reduce", has_touch=viewport is PHONE
        )
        contexts.append(context)
        page = context.new_page()
        page.on(
            "request", lambda request: None if request.url.startswith(url) else foreign_requests.append(request.url)
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        expect(page.locator("#about")).not_to_have_text("Loading.")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert (foreign_requests, errors) == ([], [])


def send(page: Page, name: str) -> Any:
    """Submit a form of the page; returns its status line."""
    page.locator(f"#{name}-form button[type=submit]").click()
    return page.locator(f"#{name}-form .status")


def percent(share: float) -> str:
    """A probability as the page writes it."""
    if share >= 0.001:
        return f"{share:.1%}"
    return "<0.001%" if share < 1e-5 else f"{float(f'{share * 100:.1g}'):g}%"


def bars(place: Any) -> list[tuple[str, ...]]:
    """The texts of a list of bars: name and value of each."""
    return [tuple(row.locator(".value, button, .name").all_text_contents()) for row in place.locator("li").all()]


@pytest.fixture(params=["endpoint", "checkpoint"])
def page_and_model(request: pytest.FixtureRequest) -> tuple[str, Query]:
    """The page's address, and a function that queries the model behind it without the page."""
    if request.param == "endpoint":
        server = request.getfixturevalue("server")
        return request.getfixturevalue("endpoint_page"), lambda body: server.ask(body).body
    predictor = request.getfixturevalue("predictor")

    def answer(body: dict[str, Any]) -> Any:
        if "text" in body:
            return predictor.fill_mask([body["text"]], body.get("top_k", 5), body.get("targets"))[0]
        return predictor.next_sentence([(body["sentence_a"], body["sentence_b"])])[0]

    return request.getfixturevalue("checkpoint_page"), answer


def test_fill_in(visit: Visit, page_and_model: tuple[str, Query]) -> None:
    url, model = page_and_model
    page = visit(url)
    field = page.get_by_label("Sentence with one or more [MASK]s").first
    field.fill("Mary fights  in the.")
    for _ in range(len(" in the.")):
        field.press("ArrowLeft")
    page.get_by_role("button", name="Insert [MASK] at the cursor").click()
    expect(field).to_have_value("Mary fights [MASK] in the.")
    field.press("End")
    field.press("ArrowLeft")
    page.get_by_role("button", name="Insert [MASK] at the cursor").click()
    text = "Mary fights [MASK] in the [MASK]."
    expect(field).to_have_value(text)
    page.get_by_label("Candidates for each mask").fill("3")
    expect(send(page, "fill")).to_have_text("2 masks, 3 candidates each.")
    masks = model({"text": text, "top_k": 3})["masks"]
    columns = page.locator("#fill-masks > div")
    for column, mask in zip(columns.all(), masks, strict=True):
        assert bars(column) == [(candidate["token"], percent(candidate["score"])) for candidate in mask["candidates"]]
    widths = [box["width"] for box in (bar.bounding_box() for bar in columns.first.locator(".bar").all())]
    assert widths == sorted(widths, reverse=True)
    second, first = masks[1]["candidates"][2]["token"], masks[0]["candidates"][0]["token"]
    columns.nth(1).get_by_role("button", name=second, exact=True).click()
    expect(page.locator("#fill-completed")).to_have_text(f"Mary fights [MASK] in the {second}.")
    columns.nth(0).get_by_role("button", name=first, exact=True).click()
    expect(page.locator("#fill-completed")).to_have_text(f"Mary fights {first} in the {second}.")
    page.get_by_role("button", name="Copy it to the text field").click()
    expect(field).to_have_value(f"Mary fights {first} in the {second}.")


def test_a_random_word_is_hidden_and_words_are_compared(visit: Visit, page_and_model: tuple[str, Query]) -> None:
    url, model = page_and_model
    page = visit(url)
    field = page.get_by_label("Sentence with one or more [MASK]s").first
    text = "Mary rides near [MASK] desert."
    field.fill(text)
    page.get_by_role("button", name="Hide a random word").click()
    status = page.locator("#fill-form .status")
    expect(status).to_contain_text("Hidden: ")
    word = status.text_content().removeprefix("Hidden: ")
    hidden = field.input_value()
    assert hidden.count("[MASK]") == 2
    assert word in ("Mary", "rides", "near", "desert")
    assert re.sub(rf"\b{word}\b", "[MASK]", text) == hidden
    page.get_by_label("Only compare these words").fill("saloon, planet  mary")
    page.get_by_label("Candidates for each mask").fill("2")  # all words are shown, however few candidates are asked for
    expect(send(page, "fill")).to_have_text("2 masks, 3 candidates each.")
    candidates = model({"text": hidden, "targets": ["saloon", "planet", "mary"]})["masks"][0]["candidates"]
    assert bars(page.locator("#fill-masks > div").first) == [
        (candidate["token"], percent(candidate["score"])) for candidate in candidates
    ]


def test_does_b_follow_a(visit: Visit, page_and_model: tuple[str, Query]) -> None:
    url, model = page_and_model
    page = visit(url)
    pair = {"sentence_a": "Mary rides near the desert.", "sentence_b": "She fights two zombies."}
    form = page.locator("#follows-form")
    form.get_by_label("Sentence A").fill(pair["sentence_b"])
    form.get_by_label("Sentence B").fill(pair["sentence_a"])
    page.get_by_role("button", name="Swap A and B").click()
    answer = model(pair)
    verdict = "Yes: B follows A." if answer["is_next"] else "No: B does not follow A."
    expect(send(page, "follows")).to_contain_text(
        f'{verdict} The model gives {percent(answer["probability"])} to "B is the next sentence"'
    )
    meter = page.get_by_role("meter", name="Probability that B follows A")
    assert float(meter.get_attribute("aria-valuenow")) == pytest.approx(answer["probability"], abs=1e-6)
    expect(meter.locator(".number")).to_have_text(percent(answer["probability"]))


def test_which_sentence_the_model_prefers(visit: Visit, checkpoint_page: str, predictor: Predictor) -> None:
    page = visit(checkpoint_page)
    a, b = "Mary rides near the desert.", "Mary xyzzies the near desert."
    form = page.locator("#prefers-form")
    form.get_by_label("Sentence A").fill(a)
    form.get_by_label("Sentence B").fill(b)
    comparison = compare_sentences(predictor.model, predictor.tokenizer, a, b)
    preferred = comparison["preferred"].upper()
    expect(send(page, "prefers")).to_have_text(
        f"The model prefers {preferred}, by {comparison['difference']:.4f} nats."
    )
    titles = page.locator("#prefers-result h3").all_text_contents()
    for name, sentence, title in zip("AB", comparison["sentences"], titles, strict=True):
        mark = " (preferred)" if name == preferred else ""
        assert title == f"Sentence {name}: {minus(sentence['score'])}{mark}"
        entries = page.get_by_role("list", name=f"Tokens of sentence {name} with their scores").locator("li").all()
        for entry, token in zip(entries, sentence["tokens"], strict=True):
            shown = f"{token['source']} (unknown word)" if token["unknown"] else token["token"]
            assert entry.locator(".name").text_content() == shown
            assert entry.locator(".value").text_content() == minus(token["log_probability"])
            hint = entry.get_attribute("title")
            assert hint.startswith(f"{percent(math.exp(token['log_probability']))} given the rest of the sentence")
            assert ("in sentence" in hint) == (token["other"] is not None)
    form.get_by_label("Sentence B").fill("Mary rides [MASK].")
    send(page, "prefers")
    expect(page.locator("#prefers-form .error")).to_contain_text("400: 'sentence_b' has the special token [MASK]")
    expect(page.locator("#prefers-result li")).to_have_count(0)


def minus(value: float) -> str:
    """A score as the page writes it."""
    return f"{value:z.2f}".replace("-", "\u2212")


def test_how_the_model_sees_it(visit: Visit, checkpoint_page: str, predictor: Predictor) -> None:
    page = visit(checkpoint_page)
    form = page.locator("#sees-form")
    form.get_by_label("Sentence A").fill("Mary xyzzies near the desert.")
    form.get_by_label("Sentence B (optional)").fill("She fights!")
    encoded = predictor.encode(NextSentence("Mary xyzzies near the desert.", "She fights!"))
    expect(send(page, "sees")).to_have_text(f"{len(encoded.ids)} tokens.")
    rows = [row.locator("th, td").all_text_contents() for row in page.locator("#sees-tokens tbody tr").all()]
    expected = zip(encoded.ids, encoded.segments, predictor.tokenizer.tokens(encoded.ids), strict=True)
    assert [row[:4] for row in rows] == [
        [str(t), token, str(i), str(segment)] for t, (i, segment, token) in enumerate(expected)
    ]
    assert page.locator("#sees-tokens tr.unknown").all_text_contents() == ["2[UNK]41xyzzies (unknown word)"]
    expect(page.locator("#sees-unknown")).to_have_text("Not in the vocabulary, so read as [UNK]: xyzzies.")
    weights_LBHTT = attention_weights(predictor.model, torch.tensor([encoded.ids]), torch.tensor([encoded.segments]))
    for head in (1, 0):
        page.get_by_label("Head").select_option(str(head + 1))
        expect(page.locator("#sees-map caption")).to_contain_text(f"head {head + 1}")
        cells = torch.tensor(
            [
                [int(cell) for cell in row.locator("td").all_text_contents()]
                for row in page.locator("#sees-map tbody tr").all()
            ]
        )
        assert (cells - weights_LBHTT[0, 0, head] * 100).abs().max() < 0.51
    page.get_by_label("Word", exact=True).fill("desert")
    expect(send(page, "near")).to_have_text('6 neighbours of "desert".')
    (near,) = neighbours(predictor.model, predictor.tokenizer, ("desert",), 10_000)
    assert bars(page.locator("#near-result")) == [
        (entry["word"], f"{entry['cosine']:.2f}") for entry in near["neighbours"]
    ]
    page.get_by_label("Word", exact=True).fill("xyzzy")
    send(page, "near")
    expect(page.locator("#near-result")).to_contain_text('"xyzzy" is not one word of the vocabulary')


def test_what_an_endpoint_does_not_expose_is_hidden_with_the_reason(
    visit: Visit, endpoint_page: str, server: ServedModel
) -> None:
    page = visit(endpoint_page)
    send(page, "follows")
    version = server.ask({"text": "[MASK]"}).headers["x-babybert-version"]
    expect(page.locator("#version")).to_have_text(f"The last answer came from version {version}.")
    expect(page.locator("#prefers-why")).to_contain_text("Start the page with --checkpoint PATH")
    expect(page.locator("#prefers form")).to_be_hidden()
    expect(page.locator("#sees-why")).to_contain_text("Start the page with --checkpoint PATH")
    expect(page.locator("#learned-why")).to_contain_text("Start the page with --run PATH")
    expect(page.locator("#sees form, #learned form").first).to_be_hidden()


def test_how_it_learned(visit: Visit, checkpoint_page: str, run: Path) -> None:
    page = visit(checkpoint_page)
    last = [
        line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if line["split"] == "validation"
    ][-1]
    end = f"{last['mlm_loss']:.3f} at step {last['step']}; unigram baseline {last['mlm_unigram_loss']:.3f}"
    end += f"; chance {last['mlm_chance_loss']:.3f}"
    expect(
        page.get_by_role("img", name=re.compile("MLM loss, nats: training from .*" + re.escape(end)))
    ).to_be_visible()
    expect(
        page.get_by_role("img", name=re.compile(rf"NSP loss, nats: .*chance {last['nsp_chance_loss']:.3f}"))
    ).to_be_visible()
    page.get_by_text("MLM loss, nats, held out, as numbers").click()
    expect(page.locator("#learned-charts details[open] tbody tr").last).to_have_text(
        f"{last['step']:,}{last['mlm_loss']:.3f}"
    )
    page.locator("#learned-form").get_by_label("Sentence with one or more [MASK]s").fill("Mary rides near the [MASK].")
    expect(send(page, "learned")).to_have_text("5 checkpoints, early to late.")
    cells = {}
    for row in page.locator("#learned-table tbody tr").all():
        step, cell = row.locator("th, td").all_text_contents()
        cells[int(step.replace(",", ""))] = cell
    steps = sorted(map(checkpoint_step, list_checkpoints(run)))
    assert list(cells) == evenly_spaced(steps, 5)
    for step, cell in cells.items():
        (mask,) = Predictor.load(run / f"step-{step:08d}").fill_mask(["Mary rides near the [MASK]."], 4)[0]["masks"]
        assert cell == ", ".join(
            f"{candidate['token']} {percent(candidate['score'])}" for candidate in mask["candidates"]
        )
    assert len(set(cells.values())) == len(cells)  # the model has changed from each checkpoint to the next


def test_errors_are_shown_as_the_api_words_them(visit: Visit, page_and_model: tuple[str, Query]) -> None:
    page = visit(page_and_model[0])
    error = page.locator("#fill-form .error")
    page.get_by_label("Candidates for each mask").fill("500")
    send(page, "fill")
    expect(error).to_have_text("400: 'top_k' is 500; it must be a whole number from 1 to 100")
    expect(page.locator("#fill-form .status")).to_have_text("")
    page.get_by_label("Candidates for each mask").fill("5")
    send(page, "fill")
    expect(error).to_be_hidden()
    expect(page.locator("#fill-result")).to_be_visible()
    page.locator("#follows-b").fill("")
    send(page, "follows")
    expect(page.locator("#follows-form .error")).to_have_text("400: 'sentence_b' is empty")


def test_damaged_weights_are_an_error(visit: Visit, endpoint_page: str) -> None:
    page = visit(endpoint_page)
    page.locator("#fill-text").fill("The goalkeeper trains in the [MASK].")
    send(page, "fill")
    expect(page.locator("#fill-form .error")).to_contain_text("500: the model gave no finite score for this input")
    expect(page.locator("#banner")).to_be_hidden()  # only this request fails


@pytest.mark.parametrize("mode", ["refuse", "error"])
def test_the_banner_appears_and_disappears(visit: Visit, endpoint_page: str, proxy: FaultyProxy, mode: str) -> None:
    page = visit(endpoint_page)
    banner = page.locator("#banner")
    expect(banner).to_be_hidden()
    proxy.mode = mode
    try:
        send(page, "fill")
        expect(page.locator("#fill-form .error")).to_be_visible()
        # At once: the next check without a request would come later.
        expect(banner).to_contain_text("does not answer" if mode == "refuse" else "answers 500", timeout=10_000)
        assert violations(page) == []
    finally:
        proxy.mode = "pass"
    expect(banner).to_be_hidden()
    expect(page.locator("#recovered")).to_have_text("The model answers again.")
    send(page, "fill")
    expect(page.locator("#fill-result")).to_be_visible()
    expect(page.locator("#fill-form .error")).to_be_hidden()


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_the_banner_moves_nothing(
    visit: Visit, endpoint_page: str, proxy: FaultyProxy, viewport: dict[str, int]
) -> None:
    page = visit(endpoint_page, viewport)
    button = page.locator("#fill-form button[type=submit]")
    before = button.bounding_box()
    proxy.mode = "error"
    try:
        # The next regular check comes too late for this test.
        page.evaluate("import('/page/banner.js').then(({ banner }) => banner.look())")
        expect(page.locator("#banner")).to_be_visible()
        assert button.bounding_box() == before
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        footer, banner = page.locator("footer").bounding_box(), page.locator("#banner").bounding_box()
        assert footer["y"] + footer["height"] <= banner["y"]
        page.evaluate("scrollTo(0, 0)")
    finally:
        proxy.mode = "pass"
    expect(page.locator("#recovered")).to_have_text("The model answers again.")
    assert button.bounding_box() == before


def test_an_old_answer_does_not_hide_the_banner(visit: Visit, endpoint_page: str) -> None:
    page = visit(endpoint_page)
    page.evaluate("""async () => {
        const { banner } = await import("/page/banner.js");
        const { fetch } = window;
        let answer;
        window.fetch = () => new Promise((resolve) => { answer = resolve; });
        const look = banner.look();
        window.fetch = fetch;
        banner.down("A request failed.");
        answer(new Response('{"problem": null}'));
        await look;
    }""")
    assert page.locator("#banner").is_visible()
    expect(page.locator("#recovered")).to_have_text("The model answers again.")  # by the next check


def test_the_keyboard_is_enough(visit: Visit, checkpoint_page: str) -> None:
    page = visit(checkpoint_page)
    focused = "document.activeElement.id || document.activeElement.textContent"
    order = []
    for _ in range(13):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
        if order[-1] == "fill-text":
            page.keyboard.press("Control+A")
            page.keyboard.type("Mary rides near the [MASK].")
    links = ["Skip to the content", "Fill in", "Does B follow A?", "Classify", "Which sentence does the model prefer?"]
    links += ["How the model sees it", "How it learned"]
    assert order == [*links, "fill-text", "fill-insert", "fill-hide", "fill-count", "fill-targets", "Fill in"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#fill-result")).to_be_visible()
    page.keyboard.press("Tab")
    word = page.evaluate(focused)
    page.keyboard.press("Space")
    expect(page.locator("#fill-completed")).to_have_text(f"Mary rides near the {word}.")
    expect(page.get_by_role("button", name=word, exact=True)).to_have_attribute("aria-pressed", "true")


def violations(page: Page) -> list[Any]:
    """All problems that axe reports, of any impact."""
    return [
        (each["id"], each["impact"], [node["html"] for node in each["nodes"]])
        for each in axe.Axe().run(page).response["violations"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_it_is_accessible(visit: Visit, checkpoint_page: str, viewport: dict[str, int], scheme: str) -> None:
    page = visit(checkpoint_page, viewport, scheme)
    page.locator("#sees-a").fill("The sheriff rides near the xyzzy.")
    page.locator("#prefers-b").fill("The sheriff xyzzies near the desert.")
    for name in ("fill", "follows", "prefers", "sees", "near", "learned"):
        expect(send(page, name)).to_have_text(re.compile(r"\d"))
    page.locator("#fill-masks button").first.click()
    page.mouse.move(0, 0)
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    if viewport is PHONE:
        buttons = [button.bounding_box() for button in page.locator("button:visible").all()]
        assert min(box["height"] for box in buttons) >= 24  # WCAG 2.2, 2.5.8
    if PICTURES:
        take_pictures(page, f"{'phone' if viewport is PHONE else 'desk'}-{scheme}")


@pytest.fixture(scope="module")
def classifier_page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a fine-tuned run."""
    folder = tmp_path_factory.mktemp("classifier")
    source = (str(write_csv(folder / "x.csv", decidable_texts(60))),)
    settings: dict[str, Any] = {"corpus": "csv", "source": source, "metrics": False, "device": "cpu", "max_steps": 3}
    assert finetune(FinetuneConfig(checkpoint=str(run), out=folder / "run", log_every=1, **settings))
    yield from playground("--checkpoint=run", folder=folder)


def test_a_classifier_shows_its_classes_and_what_it_cannot_do(visit: Visit, classifier_page: str) -> None:
    page = visit(classifier_page)
    page.locator("#classify-text").fill("The film is superb and wonderful.")
    expect(send(page, "classify")).to_have_text(re.compile(r"The model answers (neg|pos), with a probability of \d"))
    expect(page.locator("#classify-result li")).to_have_count(2)
    for section in ("fill", "follows", "prefers", "sees"):
        expect(page.locator(f"#{section}-why")).to_contain_text("The model is fine-tuned to classify texts.")
        expect(page.locator(f"#{section}-all")).to_be_hidden()
    expect(page.locator("#learned-charts")).to_contain_text("Class loss, nats")
    assert violations(page) == []


def take_pictures(page: Page, kind: str) -> None:
    """Save the sections of the page that the docs show, with few colours."""
    from PIL import Image

    assert PICTURES

    page.evaluate("document.activeElement.blur()")
    sections = {
        "desk-light": ("fill", "prefers", "learned"),
        "desk-dark": ("sees",),
        "phone-light": ("follows",),
        "phone-dark": ("fill",),
    }[kind]
    for section in sections:
        picture = Image.open(io.BytesIO(page.locator(f"#{section}").screenshot()))
        path = Path(PICTURES) / f"playground-{section}-{kind}.png"
        picture.convert("RGB").quantize(128).save(path, optimize=True)
        assert path.stat().st_size < 150_000
