"""The page in a real Chromium, by typing and clicking, before a real TorchServe and a real run; axe looks at all of it.

What the page shows is compared with what the server, the model and the run's files say themselves. `make test-web`
installs what is needed; with BABYBERT_PICTURES=FOLDER the pictures of docs/playground.md are taken there, of a model
that has had the time to learn the demo.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from faulty_proxy import FaultyProxy

from babybert.checkpoint.format import checkpoint_step, find_checkpoint, list_checkpoints
from babybert.config import PrepareConfig, PretrainConfig
from babybert.data.prepare import prepare
from babybert.evaluation.look import attention_weights, neighbours
from babybert.playground.history import spread
from babybert.serving.predictor import Predictor
from babybert.serving.request_schema import NextSentence
from babybert.training.train import pretrain

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make test-web` brings it")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe is not installed; `make test-web` brings it"
)
expect = playwright.expect
PICTURES = os.environ.get("BABYBERT_PICTURES")
DESK, PHONE = {"width": 1000, "height": 800}, {"width": 360, "height": 740}
SENTENCE = "The sheriff rides with a revolver near the [MASK]."


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium")
    if not program:
        pytest.skip("chromium is not installed; `make test-web` brings it")
    with playwright.sync_playwright() as started:
        expect.set_options(timeout=20_000)
        chromium = started.chromium.launch(
            executable_path=program, args=["--no-sandbox"]
        )  # in a container, root has no other way
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory, demo_folder):
    """A run with more checkpoints than the page asks."""
    folder = tmp_path_factory.mktemp("learned")
    settings = {**SMALL, "data": demo_folder, "width": 16, "kernels": "plain", "epochs": 2, "checkpoint_every": "10"}
    if PICTURES:
        prepare(PrepareConfig(out=folder / "data"))
        settings = {"data": folder / "data", "metrics": False, "device": "cpu"}
    return pretrain(PretrainConfig(**{**settings, "out": folder / "run", "keep_checkpoints": 100})).checkpoint.parent


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor.load(find_checkpoint(run))


def playground(*flags, folder):
    """`babybert playground` until it is no longer needed; yields its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "babybert.cli", "playground", "--port=0", *flags],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    try:
        line = process.stderr.readline()
        assert "http://" in line, line + process.stderr.read()
        yield re.search(r"http://\S+/", line)[0]
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stderr.close()


@pytest.fixture(scope="module")
def of_checkpoint(run):
    yield from playground(f"--checkpoint={run.name}", folder=run.parent)


@pytest.fixture(scope="module")
def between(server):
    """A proxy in front of TorchServe, that can turn bad."""
    proxy = FaultyProxy(("127.0.0.1", server.inference_port))
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def of_endpoint(between, tmp_path_factory):
    yield from playground(f"--endpoint={between.url}", folder=tmp_path_factory.mktemp("page"))


@pytest.fixture
def visit(browser):
    """Opens a page; at the end nothing may have been asked of anybody else, and no script may have failed."""
    contexts, outside, errors = [], [], []

    def visit(url, viewport=DESK, scheme="light"):
        context = browser.new_context(
            viewport=viewport, color_scheme=scheme, reduced_motion="reduce", has_touch=viewport is PHONE
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: None if request.url.startswith(url) else outside.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        expect(page.locator("#about")).not_to_have_text("Loading.")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert (outside, errors) == ([], [])


def send(page, name):
    page.locator(f"#{name}-form button[type=submit]").click()
    return page.locator(f"#{name}-form .status")


def shown(share):
    """A probability as the page writes it."""
    return f"{share:.1%}" if share >= 0.001 else "<0.001%" if share < 1e-5 else f"{float(f'{share * 100:.1g}'):g}%"


def bars(place):
    return [tuple(row.locator(".value, button, .name").all_text_contents()) for row in place.locator("li").all()]


@pytest.fixture(params=["endpoint", "checkpoint"])
def asked(request):
    """The page's address, and the model behind it asked without the page."""
    if request.param == "endpoint":
        server = request.getfixturevalue("server")
        return request.getfixturevalue("of_endpoint"), lambda body: server.ask(body).body
    predictor = request.getfixturevalue("predictor")

    def answer(body):
        if "text" in body:
            return predictor.fill_mask([body["text"]], body.get("top_k", 5), body.get("targets"))[0]
        return predictor.next_sentence([(body["sentence_a"], body["sentence_b"])])[0]

    return request.getfixturevalue("of_checkpoint"), answer


def test_fill_in(visit, asked):
    url, model = asked
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
        assert bars(column) == [(candidate["token"], shown(candidate["score"])) for candidate in mask["candidates"]]
    widths = [box["width"] for box in (bar.bounding_box() for bar in columns.first.locator(".bar").all())]
    assert widths == sorted(widths, reverse=True)
    second, first = masks[1]["candidates"][2]["token"], masks[0]["candidates"][0]["token"]
    columns.nth(1).get_by_role("button", name=second, exact=True).click()
    expect(page.locator("#fill-completed")).to_have_text(f"Mary fights [MASK] in the {second}.")
    columns.nth(0).get_by_role("button", name=first, exact=True).click()
    expect(page.locator("#fill-completed")).to_have_text(f"Mary fights {first} in the {second}.")
    page.get_by_role("button", name="Take it over into the field").click()
    expect(field).to_have_value(f"Mary fights {first} in the {second}.")


def test_a_random_word_is_hidden_and_words_are_compared(visit, asked):
    url, model = asked
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
        (candidate["token"], shown(candidate["score"])) for candidate in candidates
    ]


def test_does_b_follow_a(visit, asked):
    url, model = asked
    page = visit(url)
    pair = {"sentence_a": "Mary rides near the desert.", "sentence_b": "She fights two zombies."}
    form = page.locator("#follows-form")
    form.get_by_label("Sentence A").fill(pair["sentence_b"])
    form.get_by_label("Sentence B").fill(pair["sentence_a"])
    page.get_by_role("button", name="Swap A and B").click()
    answer = model(pair)
    verdict = "Yes: B follows A." if answer["is_next"] else "No: B does not follow A."
    expect(send(page, "follows")).to_contain_text(
        f'{verdict} The model gives {shown(answer["probability"])} to "B is the next sentence"'
    )
    meter = page.get_by_role("meter", name="Probability that B follows A")
    assert float(meter.get_attribute("aria-valuenow")) == pytest.approx(answer["probability"], abs=1e-6)
    expect(meter.locator(".number")).to_have_text(shown(answer["probability"]))


def test_how_the_model_sees_it(visit, of_checkpoint, predictor):
    page = visit(of_checkpoint)
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
    expect(page.locator("#sees-unknown")).to_have_text("Not in the vocabulary, and read as [UNK]: xyzzies.")
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


def test_what_an_endpoint_cannot_tell_is_hidden_and_says_why(visit, of_endpoint, server):
    page = visit(of_endpoint)
    send(page, "follows")
    version = server.ask({"text": "[MASK]"}).headers["x-babybert-version"]
    expect(page.locator("#version")).to_have_text(f"The last answer came from version {version}.")
    expect(page.locator("#sees-why")).to_contain_text("Start the page with --checkpoint PATH")
    expect(page.locator("#learned-why")).to_contain_text("Start the page with --run PATH")
    expect(page.locator("#sees form, #learned form").first).to_be_hidden()


def test_how_it_learned(visit, of_checkpoint, run):
    page = visit(of_checkpoint)
    last = [
        line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if line["split"] == "validation"
    ][-1]
    end = f"{last['mlm_loss']:.3f} at step {last['step']}; word counts {last['mlm_unigram_loss']:.3f}; chance {last['mlm_chance_loss']:.3f}"
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
    found = {}
    for row in page.locator("#learned-table tbody tr").all():
        step, cell = row.locator("th, td").all_text_contents()
        found[int(step.replace(",", ""))] = cell
    steps = sorted(map(checkpoint_step, list_checkpoints(run)))
    assert list(found) == spread(steps, 5)
    for step, cell in found.items():
        (mask,) = Predictor.load(run / f"step-{step:08d}").fill_mask(["Mary rides near the [MASK]."], 4)[0]["masks"]
        assert cell == ", ".join(
            f"{candidate['token']} {shown(candidate['score'])}" for candidate in mask["candidates"]
        )
    assert len(set(found.values())) == len(found)  # it has learned something between each two


def test_errors_are_shown_as_the_api_says_them(visit, asked):
    page = visit(asked[0])
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


def test_weights_that_are_damaged_are_told(visit, of_endpoint):
    page = visit(of_endpoint)
    page.locator("#fill-text").fill("The goalkeeper trains in the [MASK].")
    send(page, "fill")
    expect(page.locator("#fill-form .error")).to_contain_text("500: the model gave no finite score for this input")
    expect(page.locator("#banner")).to_be_hidden()  # it is this question alone


@pytest.mark.parametrize("mode", ["refuse", "error"])
def test_the_banner_comes_and_goes_by_itself(visit, of_endpoint, between, mode):
    page = visit(of_endpoint)
    banner = page.locator("#banner")
    expect(banner).to_be_hidden()
    between.mode = mode
    try:
        send(page, "fill")
        expect(page.locator("#fill-form .error")).to_be_visible()
        # At once: the page's next look by itself would come later.
        expect(banner).to_contain_text("does not answer" if mode == "refuse" else "answers 500", timeout=10_000)
        assert violations(page) == []
    finally:
        between.mode = "pass"
    expect(banner).to_be_hidden()
    expect(page.locator("#recovered")).to_have_text("The model answers again.")
    send(page, "fill")
    expect(page.locator("#fill-result")).to_be_visible()
    expect(page.locator("#fill-form .error")).to_be_hidden()


def test_the_keyboard_is_enough(visit, of_checkpoint):
    page = visit(of_checkpoint)
    focused = "document.activeElement.id || document.activeElement.textContent"
    order = []
    for _ in range(11):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
        if order[-1] == "fill-text":
            page.keyboard.press("Control+A")
            page.keyboard.type("Mary rides near the [MASK].")
    links = ["Skip to the questions", "Fill in", "Does B follow A?", "How the model sees it", "How it learned"]
    assert order == [*links, "fill-text", "fill-insert", "fill-hide", "fill-count", "fill-targets", "Fill in"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#fill-result")).to_be_visible()
    page.keyboard.press("Tab")
    word = page.evaluate(focused)
    page.keyboard.press("Space")
    expect(page.locator("#fill-completed")).to_have_text(f"Mary rides near the {word}.")
    expect(page.get_by_role("button", name=word, exact=True)).to_have_attribute("aria-pressed", "true")


def violations(page):
    """What axe finds, of whatever weight."""
    return [
        (each["id"], each["impact"], [node["html"] for node in each["nodes"]])
        for each in axe.Axe().run(page).response["violations"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_everybody_can_use_it(visit, of_checkpoint, viewport, scheme):
    page = visit(of_checkpoint, viewport, scheme)
    page.locator("#sees-a").fill("The sheriff rides near the xyzzy.")
    for name in ("fill", "follows", "sees", "near", "learned"):
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


def take_pictures(page, kind):
    """The parts of the page that the docs show, in few colours."""
    from PIL import Image

    page.evaluate("document.activeElement.blur()")
    wanted = {
        "desk-light": ("fill", "learned"),
        "desk-dark": ("sees",),
        "phone-light": ("follows",),
        "phone-dark": ("fill",),
    }[kind]
    for part in wanted:
        picture = Image.open(io.BytesIO(page.locator(f"#{part}").screenshot()))
        path = Path(PICTURES) / f"playground-{part}-{kind}.png"
        picture.convert("RGB").quantize(128).save(path, optimize=True)
        assert path.stat().st_size < 150_000
