"""The page in a real browser: a drawn T-shirt is classified, and its maps are drawn over it."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nin
from deploy.browser import CHROMIUM, Page, browser
from deploy.server import serve
from helpers import nin as run_nin
from pictures import encode

SHIRT = """(async () => {
  await nin.ready;
  nin.clear();
  nin.fill([[118,40],[106,40],[70,56],[46,104],[76,118],[90,106],[86,236],[194,236],[190,106],[204,118],[234,104],
            [210,56],[174,40],[162,40],[140,54]], "#bbb");
  return await nin.askPad();
})()"""


def draw_shirt(page: Page) -> None:
    """Draws a T-shirt with the mouse, row by row, and waits until it is classified."""
    left, top = page.evaluate("(({x, y}) => [x, y])(document.getElementById('pad').getBoundingClientRect())")
    page.evaluate("nin.clear()")
    for y in range(60, 240, 16):
        # Sleeves, then the body.
        a, b = (60 - (y - 60) // 3, 220 + (y - 60) // 3) if y < 110 else (98, 182)
        page.drag([(left + a, top + y), (left + (a + b) / 2, top + y), (left + b, top + y)])
    requested = "new Promise(done => { const wait = () => document.querySelector('figure') ? done(true)"
    assert page.evaluate(f"{requested} : setTimeout(wait, 50); wait(); }})")
    page.evaluate("nin.askPad()")


def shown(page: Page) -> dict[str, float]:
    """The page's classes and probabilities, in its order."""
    cells = "[...document.querySelectorAll('#classes tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    return {name: float(probability) for name, _, probability in page.evaluate(cells)}


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_shirt_drawn_with_the_mouse_is_recognized_by_a_real_network(real_root: Path, tmp_path: Path) -> None:
    """Takes a minute: one epoch on Fashion-MNIST."""
    overrides = ["experiment=cpu", "trainer.max_epochs=1", "trainer=cpu", "threads=1", "name=first"]
    assert run_nin("train", *overrides, cwd=tmp_path, NIN_DATA=str(real_root)).returncode == 0
    assert run_nin("export", "outputs/runs/first", cwd=tmp_path, NIN_DATA=str(real_root)).returncode == 0
    with serve(tmp_path / "outputs" / "runs" / "first" / "export" / "model.onnx") as server, browser() as page:
        page.open(server.url)
        draw_shirt(page)
        assert next(iter(shown(page))) == "T-shirt/top"
        # Its map is red in the middle of the shirt, which is drawn in gray.
        red, _, blue = page.evaluate(
            "[...document.querySelector('figure canvas').getContext('2d').getImageData(70, 90, 1, 1).data].slice(0, 3)"
        )
        assert red > blue + 40


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_drawn_shirt_is_classified_and_its_maps_are_drawn(export: Path) -> None:
    with serve(export) as server, browser() as page:
        page.open(server.url)
        answer = page.evaluate(f"{SHIRT}.then(answer => shirt = answer)")
        rows = page.evaluate("[...document.querySelectorAll('#classes tr')].map(row => row.innerText.split('\\t')[0])")
        assert rows == list(answer["probabilities"])
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        captions = page.evaluate("[...document.querySelectorAll('figcaption')].map(c => c.textContent)")
        assert [caption.split(":")[0] for caption in captions] == rows[:6]
        # Names that are numbers, as those of data=mnist, are in the order of the probabilities too.
        of_digits = "f => Object.fromEntries([...Array(10).keys()].map(i => [i, f(i)]))"
        page.evaluate(f"(all => show({{probabilities: all(i => i / 45), maps: all(i => [[i]])}}))({of_digits})")
        assert list(shown(page)) == list("9876543210")
        assert page.evaluate("[...document.querySelectorAll('figcaption')].map(c => c.textContent[0])") == list(
            "987654"
        )
        page.evaluate("show(shirt)")
        # The overlay is coloured: somewhere red and blue of a pixel differ.
        coloured = """(() => {
          const canvas = document.querySelector("figure canvas"), pen = canvas.getContext("2d");
          const values = pen.getImageData(0, 0, canvas.width, canvas.height).data;
          return values.filter((v, i) => i % 4 === 0 && Math.abs(v - values[i + 2]) > 40).length;
        })()"""
        assert page.evaluate(coloured) > 100
        draw_shirt(page)
        drawn = base64.b64decode(page.evaluate("document.getElementById('pad').toDataURL()").split(",")[1])
        network = nin.load(export)
        (expected,) = network.predict([Image.open(io.BytesIO(drawn))])
        by_name = dict(zip(network.description.class_names, expected.tolist(), strict=True))
        assert shown(page) == pytest.approx(by_name, abs=1e-4)
        # A picture is drawn as the network sees it: of a wide one the sides are cut off, or it is made narrower.
        wide = """(fit => {
          const picture = new OffscreenCanvas(400, 100), ink = picture.getContext("2d");
          ink.fillStyle = "#fff"; ink.fillRect(0, 0, 100, 100); ink.fillRect(300, 0, 100, 100);
          nin.clear(); nin.look(fit, picture);
          const pen = document.getElementById("pad").getContext("2d");
          return [[140, 140], [20, 140], [20, 20]].map(([x, y]) => pen.getImageData(x, y, 1, 1).data[0]);
        })"""
        assert page.evaluate(f"{wide}('crop')") == [0, 0, 0]
        assert page.evaluate(f"{wide}('pad')") == [0, 255, 0]
        assert page.evaluate(f"{wide}('stretch')") == [0, 255, 255]
        # A dark thing on a light ground: the page says so, and inverts the file itself, not its picture on the page.
        dark = np.full((60, 40), 250, np.uint8)
        dark[15:45, 10:30] = 20
        as_file = f"new File([Uint8Array.from({list(encode(dark))})], 'dark.png', {{type: 'image/png'}})"
        page.evaluate(f"nin.take({as_file})")
        hint = "document.getElementById('hint').textContent"
        assert page.evaluate(hint).startswith("This picture has a light border")
        # Light and dark are swapped on the page too, in the picture and below its maps; padding stays black.
        seen = """(() => {
          const canvas = document.querySelector("figure canvas"), pen = canvas.getContext("2d");
          const green = pen.getImageData(0, 0, 140, 140).data.filter((_, i) => i % 4 === 1);
          const mean = green.reduce((a, b) => a + b) / green.length;
          return [getComputedStyle(document.getElementById("pad")).filter, mean];
        })()"""
        (_, light), toggle = page.evaluate(seen), "document.getElementById('invert').click()"
        page.evaluate(toggle)
        inverted = page.evaluate("nin.again()")["probabilities"]
        assert page.evaluate(hint) == ""
        shown_as, darker = page.evaluate(seen)
        assert (shown_as, darker < light - 50) == ("invert(1)", True)
        assert page.evaluate(f"{wide}('pad')") == [0, 255, 255]
        page.evaluate(f"nin.take({as_file})")
        expected = dict(zip(network.description.class_names, network.predict([255 - dark])[0].tolist(), strict=True))
        assert inverted == pytest.approx(expected, abs=1e-6)
        # On the empty pad there is nothing to classify.
        page.evaluate("document.getElementById('clear').click(), nin.again()")
        assert page.evaluate("document.querySelectorAll('#classes tr, figure').length") == 0
        # Of two pictures at once the later one stays, also if the earlier one is decoded last; and Clear is obeyed.
        at_once = """((second) => (async () => {
          const decode = window.createImageBitmap, white = new OffscreenCanvas(28, 28);
          const ink = white.getContext("2d"); ink.fillStyle = "#fff"; ink.fillRect(0, 0, 28, 28);
          const light = await white.convertToBlob();
          let release; const held = new Promise(done => release = done);
          window.createImageBitmap = async file => {
            const found = await decode(file); if (file === light) await held; return found;
          };
          const first = nin.take(light);
          await second(); release(); await first;
          window.createImageBitmap = decode;
          return document.getElementById("pad").getContext("2d").getImageData(140, 140, 1, 1).data[0];
        })())"""
        page.evaluate(toggle)  # not inverted
        assert page.evaluate(f"{at_once}(() => nin.take({as_file}))") == 20
        assert page.evaluate(f"{at_once}(() => document.getElementById('clear').click())") == 0
        assert page.evaluate("document.querySelectorAll('#classes tr, figure').length") == 0
        # A network of color pictures: choosing one comes first, and the empty pad is hidden.
        layout = """["pad", "file", "how"].map(id => document.getElementById(id)).map(
          (item, i) => i < 2 ? item.getBoundingClientRect().y : item.textContent)"""
        pad, choice, how = page.evaluate(layout)
        assert (pad < choice, how[:24]) == (True, "Draw on the black square")
        about_maps = """[document.querySelector("footer").innerText.includes("map"),
          document.getElementById("inverting").getClientRects().length, document.getElementById("invert").checked]"""
        page.evaluate("document.getElementById('invert').checked = true")
        assert page.evaluate(about_maps) == [True, 1, True]
        page.evaluate("describe({...info, channels: 3, maps: false})")
        assert page.evaluate(about_maps) == [False, 0, False]  # the checkbox of a hidden row would invert unseen
        shown_pad = "document.getElementById('pad').getClientRects().length"
        assert page.evaluate(shown_pad) == 0
        page.evaluate(f"nin.take({as_file})")
        pad, choice, how = page.evaluate(layout)
        assert (page.evaluate(shown_pad), choice < pad, how[:16]) == (1, True, "Choose a picture")
        # Nothing was loaded from elsewhere, and no script failed.
        urls = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
        assert len(urls) >= 4
        assert all(url.startswith((server.url, "data:", "blob:")) for url in urls), urls
        assert not [e for e in page.events if e["method"] == "Runtime.exceptionThrown"]
        page.open(f"{server.url}docs")
        headings = "document.querySelectorAll('h2').length"
        wait = f"function wait() {{ {headings} < 5 ? setTimeout(wait, 50) : done({headings}); }}"
        assert page.evaluate(f"new Promise(done => {{ {wait} wait(); }})") == 5
        assert f"{server.url}predict?top=3" in page.evaluate("document.querySelector('pre').textContent")
