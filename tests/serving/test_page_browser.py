"""The page of `serve` in a real browser, against a server that answers as `serve` does."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from tests.serving.page_stub import CLASSES, HOSTILE, StubServer
from tests.serving.page_tab import Open

pytestmark = pytest.mark.browser


def test_a_chosen_image_is_answered_with_bars_and_honest_percentages(
    opened: Open, picture: Any, stub: StubServer
) -> None:
    tab = opened()
    assert tab.wait("#classes li", len(CLASSES)) and tab.page.locator("#history").is_hidden()
    tab.send(picture("roses.png"))
    tab.wait(".entry.done", 1)
    assert tab.texts(".verdict bdi") == ["roses"] and re.fullmatch(r"9\d\.\d%", tab.texts(".verdict b")[0])
    assert len(tab.texts(".bar")) == 5 and tab.texts(".bar bdi")[0] == "roses"
    assert tab.page.locator(".picture img").get_attribute("alt") == "roses.png"
    tab.page.click("[data-key=expand]")
    tab.wait(".bar", len(CLASSES))
    assert (
        stub.stub.asked[0]["top_k"] == str(len(CLASSES))
        and "roses.png: roses, 9" in tab.page.locator("#live").text_content()
    )


def test_no_share_is_rounded_to_what_it_is_not(opened: Open) -> None:
    shares = [1, 0.99999, 0.9994, 0.999, 0.5, 0.0006, 0.00001, 0]
    script = """async (shares) => {
        const { percent } = await import("/page/words.js");
        return shares.map((share) => percent(share).replace(/\\s/g, " "));
    }"""
    assert opened().page.evaluate(script, shares) == [
        "100%",
        "> 99.9%",
        "99.9%",
        "99.9%",
        "50.0%",
        "0.1%",
        "< 0.1%",
        "0%",
    ]
    assert opened(locale="ru-RU").page.evaluate(script, shares)[:3] == ["100 %", "> 99,9 %", "99,9 %"]


def test_an_image_is_pasted_anywhere_and_an_address_only_where_the_server_fetches(
    opened: Open, stub: StubServer
) -> None:
    tab = opened()
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.evaluate("""async () => {
        const canvas = Object.assign(document.createElement("canvas"), { width: 40, height: 40 });
        const blob = await new Promise((resolve) => canvas.toBlob(resolve));
        await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
    }""")
    tab.page.keyboard.press("Control+V")
    tab.wait(".entry.done", 1)
    assert re.fullmatch(r"pasted \d\d\.\d\d\.\d\d\.png", tab.texts(".path")[0])
    tab.page.evaluate('navigator.clipboard.writeText("https://example.org/roses.jpg")')
    tab.page.keyboard.press("Control+V")
    tab.wait("#banner:visible", 1)
    assert "does not open URLs" in tab.texts("#banner-text")[0] and len(stub.stub.asked) == 1
    tab.page.click("#clear")
    tab.page.wait_for_timeout(1500)  # an answer that was saved would come back
    stub.stub.urls = True
    tab.page.reload()
    tab.wait("#address-form:visible", 1)
    tab.page.keyboard.press("Control+V")
    tab.wait(".entry.done", 1)
    tab.page.fill("#address", "https://example.org/tulips.jpg")
    tab.page.keyboard.press("Enter")
    tab.wait(".entry.done", 2)
    assert tab.texts(".verdict bdi") == ["tulips", "roses"] and tab.page.locator("[data-key=explain]").count() == 0


def test_a_folder_is_dropped_and_what_is_no_image_stays_out(opened: Open, picture: Any, tmp_path: Path) -> None:
    for name in ("tree/a/roses.png", "tree/daisy.png", "tree/.hidden.png"):
        picture(name)
    (tmp_path / "tree/notes.txt").write_text("no image")
    tab = opened()
    devtools = tab.context.new_cdp_session(tab.page)
    data = {"items": [], "files": [str(tmp_path / "tree")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})
    tab.wait(".entry.done", 2)
    assert tab.texts(".path") == ["tree/a/roses.png", "tree/daisy.png"] and tab.page.locator("#veil").is_hidden()


def test_files_that_cannot_be_answered_say_why_in_words(
    opened: Open, picture: Any, stub: StubServer, tmp_path: Path
) -> None:
    contents = {
        "photo.heic": b"\0\0\0\x20ftypheic",
        "empty.png": b"",
        "large.jpg": b"\xff\xd8\xff" + bytes(2**20),
        "bad.jpg": b"\xff\xd8\xff",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    tab = opened()
    tab.send(*(tmp_path / name for name in contents), picture("tulips.png"))
    tab.wait(".entry.error", 4)
    tab.wait(".entry.done", 1)
    words = " ".join(tab.texts(".entry.error .words"))
    assert (
        "HEIC is not supported. Use JPEG, PNG" in words
        and "The file is empty." in words
        and "cut off after 12 bytes" in words
    )
    assert re.search(r"The file is [\d.]+.MB; the server accepts up to 1.MB", words)
    assert sorted(name for asked in stub.stub.asked for name in asked["names"]) == ["bad.jpg", "tulips.png"]
    tab.page.click("[data-filter=error]")
    assert tab.wait(".entry", 4) and tab.texts("[data-filter]") == ["All 5", "Not sure 0", "Errors 4"]
    tab.page.locator(".entry .bare").first.press("Enter")
    tab.wait(".entry", 3)
    assert tab.page.evaluate("document.activeElement.dataset.key") == "remove"


def test_many_files_fly_a_few_at_a_time(opened: Open, picture: Any, stub: StubServer) -> None:
    stub.stub.delay_s = 0.3
    tab = opened()
    tab.send(*(picture(f"{number:03d}-{CLASSES[number % 5]}.png") for number in range(70)))
    assert "of 70 done" in tab.wait("#progress-text", 1).text_content()
    tab.wait("#progress:visible", 0)
    assert tab.texts("[data-filter]")[0] == "All 70" and stub.stub.most_together == 2
    assert (
        max(len(asked["names"]) for asked in stub.stub.asked) <= 8
        and sum(len(asked["names"]) for asked in stub.stub.asked) == 70
    )
    assert tab.page.locator(".entry").count() == 60 and tab.texts(".path")[0] == "000-daisy.png"
    assert tab.page.locator(".picture img").count() < 60  # previews only near the window
    tab.page.click("#more")
    tab.wait(".entry.done", 70)
    assert "70 images done" in tab.page.locator("#live").text_content()


def test_cancel_leaves_what_is_answered_and_the_rest_may_be_tried_again(
    opened: Open, picture: Any, stub: StubServer
) -> None:
    stub.stub.delay_s = 0.4
    tab = opened()
    tab.send(*(picture(f"{number:03d}.png") for number in range(30)))
    tab.page.locator(".entry.done").first.wait_for()
    tab.page.click("#cancel")
    tab.wait("#progress:visible", 0)
    done = tab.page.locator(".entry.done").count()
    assert 4 <= done < 30 and tab.wait(".entry.error", 30 - done) and "Cancelled" in tab.texts(".entry.error .words")[0]
    stub.stub.delay_s = 0
    tab.page.locator("[data-key=again]").first.click()
    tab.wait(".entry.done", done + 1)
    tab.page.click("#clear")
    assert tab.page.locator("#history").is_hidden() and tab.page.locator("#intake h1").is_visible()


def test_a_busy_server_is_asked_again_when_it_said(opened: Open, picture: Any, stub: StubServer) -> None:
    stub.stub.refusals = [(503, "queue_full", "1"), (503, "stopping", "30")]
    tab = opened()
    tab.send(picture("roses.png"))
    tab.wait("#banner:visible", 1)
    assert "The server is busy." in tab.texts("#banner")[0] and "Next try in 1 second." in tab.texts("#banner-count")
    tab.wait("#banner-count:text('30 seconds')", 1)
    tab.page.click("#banner-button")
    tab.wait(".entry.done", 1)
    assert tab.page.locator("#banner").is_hidden() and stub.stub.refusals == []


def test_a_server_that_is_away_is_named(opened: Open, picture: Any, stub: StubServer) -> None:
    tab = opened()
    tab.wait("#classes li", len(CLASSES))
    tab.context.set_offline(True)
    tab.send(picture("roses.png"))
    tab.wait("#banner:visible", 1)
    assert tab.texts("#banner-text") == ["The server cannot be reached."]
    tab.context.set_offline(False)
    tab.page.evaluate('dispatchEvent(new Event("online"))')
    tab.wait(".entry.done", 1)
    tab.complaints = [text for text in tab.complaints if "ERR_INTERNET_DISCONNECTED" not in text]


def test_a_key_is_asked_for_kept_for_the_tab_and_refused_in_words(opened: Open, picture: Any, stub: StubServer) -> None:
    stub.stub.key = "the key"
    tab = opened()
    tab.wait("#key-dialog[open]", 1)
    assert tab.page.evaluate("document.activeElement.id") == "key"
    tab.page.keyboard.type("another")
    tab.page.keyboard.press("Enter")
    tab.wait("#key-words.problem", 1)
    tab.page.fill("#key", "the key")
    tab.page.keyboard.press("Enter")
    tab.wait("#classes li", len(CLASSES))
    tab.page.reload()
    tab.wait("#classes li", len(CLASSES))
    tab.send(picture("roses.png"))
    tab.wait(".entry.done", 1)
    stub.stub.key = "a new key"
    tab.send(picture("tulips.png"))
    tab.wait("#key-dialog[open]", 1)
    tab.page.keyboard.press("Escape")
    tab.wait(".entry.error", 1)
    assert "needs an API key" in tab.texts(".entry.error .words")[0]


def test_not_sure_is_no_verdict(opened: Open, picture: Any) -> None:
    tab = opened()
    tab.send(picture("unsure roses.png"), picture("daisy.png"))
    card = tab.wait(".entry.unsure", 1)
    words = card.locator(".words").text_content()
    assert (
        card.locator(".verdict").text_content() == "Not sure"
        and "it answers from 62.0%" in words
        and "but not an answer" in words
    )
    assert card.locator(".chips li").first.text_content() == "roses" and card.locator(".chips li").count() == 2
    tab.page.click("[data-filter=unsure]")
    tab.wait(".entry", 1)


def test_a_heat_map_lies_over_the_picture_for_any_class(opened: Open, picture: Any, stub: StubServer) -> None:
    tab = opened()
    tab.send(picture("roses.png", 120))
    tab.wait(".entry.done", 1)
    tab.page.click("[data-key=explain]")
    canvas = tab.wait(".picture canvas", 1)
    assert (
        canvas.get_attribute("aria-label") == "Heat map of roses.png: the strongest support for roses is at the middle."
    )
    assert canvas.bounding_box() == tab.page.locator(".picture img").bounding_box()
    width, height, pixels = canvas.evaluate(
        """(canvas) => {
            const { width, height } = canvas;
            return [width, height, [...canvas.getContext('2d').getImageData(0, 0, width, height).data]];
        }"""
    )
    places = (int(0.4 * height) * width + int(0.62 * width), int(0.5 * height) * width)
    warm, unseen = (pixels[4 * place : 4 * place + 4] for place in places)
    assert (
        warm[0] > 220
        and warm[3] > 200
        and unseen[:3] == [255, 255, 255]
        and "Pale areas are cut off" in tab.texts(".explanation")[0]
    )
    tab.page.get_by_role("button", name=f"{HOSTILE}, ").click()
    tab.wait(f".explanation:has-text('{HOSTILE}')", 1)
    assert [asked.get("class") for asked in stub.stub.asked] == [None, "roses", HOSTILE]
    tab.page.click("[data-key=explain]")
    tab.wait(".picture canvas", 0)
    assert tab.page.evaluate("document.activeElement.dataset.key") == "explain"


def test_the_answers_are_a_table_that_runs_nothing(opened: Open, picture: Any, tmp_path: Path) -> None:
    tab = opened()
    tab.send(picture("roses, red.png"), picture("=1+1.png"), picture("unsure.png"), picture("bad.png"))
    tab.wait("#progress:visible", 0)
    tab.wait(".entry.done", 3)
    with tab.page.expect_download() as download:
        tab.page.click("#save")
    assert re.fullmatch(r"answers [\d-]{10} [\d.]{8}\.csv", download.value.suggested_filename)
    content = Path(download.value.path()).read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")
    heading, *rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    assert heading[:8] == [
        "path",
        "predicted_class",
        "confidence",
        "decision",
        "reason",
        "model",
        "model_version",
        "sent_as",
    ]
    assert sorted(heading[8:]) == sorted({*CLASSES, "'=1+1"} - {"=1+1"})
    by_path = {row[0]: row for row in rows}
    assert set(by_path) == {"roses, red.png", "'=1+1.png", "unsure.png", "bad.png"}
    assert (
        by_path["'=1+1.png"][1] == "'=1+1"
        and by_path["unsure.png"][3] == "abstain"
        and by_path["unsure.png"][4].startswith("not sure enough")
    )
    assert by_path["bad.png"][1:4] == ["", "", "error"] and "cut off" in by_path["bad.png"][4]
    assert sum(map(float, by_path["roses, red.png"][8:])) == pytest.approx(1)


def test_the_answers_survive_a_reload_until_they_are_cleared(opened: Open, picture: Any) -> None:
    tab = opened()
    tab.send(picture("roses.png", 300), picture("unsure.png"), picture("bad.png"))
    tab.wait("#progress:visible", 0)
    tab.wait(".picture img", 3)
    names = tab.texts(".path")
    tab.page.wait_for_timeout(1500)  # it writes them down a moment later
    tab.page.reload()
    tab.wait(".picture img", 3)
    assert tab.texts(".path") == names and tab.texts("[data-filter]") == ["All 3", "Not sure 1", "Errors 1"]
    assert tab.page.locator("[data-key=explain], [data-key=again]").count() == 0 and tab.texts(".verdict bdi") == [
        "roses"
    ]
    tab.page.click("#clear")
    tab.page.wait_for_timeout(1500)
    tab.page.reload()
    tab.wait("#classes li", len(CLASSES))
    assert tab.page.locator("#history").is_hidden()


def test_hostile_names_are_only_text(opened: Open, picture: Any) -> None:
    tab = opened()
    tab.send(picture("<img src=x onerror=alert(1)>.png"))
    tab.wait(".entry.done", 1)
    assert tab.texts(".verdict bdi") == [HOSTILE] and tab.texts(".path") == [f"{HOSTILE}.png"]
    tab.page.click("#about")
    tab.page.keyboard.press("Escape")
    assert tab.page.locator("img[src=x]").count() == 0


def test_one_of_several_models_answers(opened: Open, picture: Any, stub: StubServer) -> None:
    stub.stub.names = ("flowers", "cats")
    tab = opened()
    tab.wait("#model-choice:visible", 1)
    tab.send(picture("roses.png"))
    tab.wait(".entry.done", 1)
    tab.page.select_option("#model", "cats")
    tab.send(picture("tulips.png"))
    tab.wait(".entry.done", 2)
    tab.page.locator("[data-key=explain]").first.click()
    tab.wait("canvas", 1)
    assert [(asked["path"], asked["model"]) for asked in stub.stub.asked] == [
        ("/predict", "flowers"),
        ("/predict", "cats"),
        ("/explain", "cats"),
    ]
    assert "cats, version 3fa9c1d2" in tab.texts(".entry .words")[0]


def test_a_photo_is_taken_or_its_refusal_told(opened: Open) -> None:
    tab = opened()
    tab.page.click("#photo")
    tab.wait("#camera-words:text('not allowed')", 1)
    tab.page.keyboard.press("Escape")
    tab.context.grant_permissions(["camera"])
    tab.page.click("#photo")
    tab.page.click("#shoot")
    tab.wait(".entry.done", 1)
    assert (
        re.fullmatch(r"photo \d\d\.\d\d\.\d\d\.jpg", tab.texts(".path")[0]) and tab.page.locator("#camera").is_hidden()
    )
