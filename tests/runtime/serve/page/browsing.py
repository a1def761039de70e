"""What the tests of the server's page do in a browser: write, draw, drop, and read what was sent."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from tests.runtime.serve.conftest import until

expect = pytest.importorskip("playwright.sync_api", reason="the extra browser is not installed").expect
PROMPT = "a red circle left of a blue square"
LONG = 1000
"""Steps of a picture that is not waited for."""
PHONE = {"width": 390, "height": 844}


def opened(context: Any, url: str) -> Any:
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(url)
    expect(page.locator("#model")).not_to_have_value("")
    return page


def write(page: Any, **fields: Any) -> None:
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))


def keep_seed(page: Any, seed: int | str) -> None:
    page.check("#keep")
    page.fill("#seed", str(seed))


def draw(page: Any, pictures: int = 1) -> None:
    page.click("#draw")
    expect(page.locator("#status")).to_contain_text(f"{pictures} picture", timeout=20_000)


def downloaded(page: Any) -> bytes:
    with page.expect_download() as download:
        page.click("text=Download")
    return Path(download.value.path()).read_bytes()


def sent(page: Any, pictures: int = 1) -> dict[str, Any]:
    """Draw, and what was asked for."""
    with page.expect_request("**/v1/images/*") as request:
        draw(page, pictures)
    return json.loads(request.value.post_data)


def png(image: Image.Image, name: str = "given.png") -> dict[str, Any]:
    data = BytesIO()
    image.save(data, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": data.getvalue()}


def from_url(url: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))


def drop(page: Any, selector: str, data: bytes, name: str = "dropped.png") -> None:
    transfer = page.evaluate_handle(
        """([text, name]) => {
            const found = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            found.items.add(new File([bytes], name, {type: "image/png"}));
            return found;
        }""",
        [base64.b64encode(data).decode(), name],
    )
    page.dispatch_event(selector, "drop", {"dataTransfer": transfer})


def idle(server: Any) -> None:
    until(lambda: not server.service.drawings(), "nothing is drawn any more")


def generated(server: Any, **body: Any) -> bytes:
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60)
    return base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])


def served_as(page: Any, server: Any, *changes: dict[str, Any]) -> None:
    """Let the page take a served model for others."""
    entry = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    models = [entry | {"id": f"model-{n}", "zimg": entry["zimg"] | change} for n, change in enumerate(changes)]
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": models}))
    page.route(
        "**/v1/images/*",
        lambda route: route.fulfill(status=400, json={"error": {"message": "no such model", "param": "model"}}),
    )
    page.reload()
    expect(page.locator("#model")).to_have_value("model-0")


def asked(page: Any) -> tuple[str, dict[str, Any]]:
    with page.expect_request("**/v1/images/*") as request:
        page.click("#draw")
    expect(page.locator("#error")).to_contain_text("No such model")
    return urlsplit(request.value.url).path, json.loads(request.value.post_data)


def copied(page: Any, label: str) -> str:
    """What a button beside the chosen picture copies."""
    page.click(f"#chosen >> text={label}")
    expect(page.locator("#notice")).to_contain_text("Copied")
    text: str = page.evaluate("() => navigator.clipboard.readText()")
    page.click("#notice >> text=Close")
    return text
