"""The server's page as a file: whole in itself, and speaking the API's words. What it does is tried in a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from importlib import resources

import httpx
import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from zimgkit.runtime.commands.cli import generate
from zimgkit.runtime.controls import NUMBERS, PICTURES
from zimgkit.runtime.serve.bodies import Control, Edit, Generation

TEXT = resources.files("zimgkit.runtime.serve").joinpath("page.html").read_text("utf-8")
MOST_BYTES = 64 << 10


class Elements(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(TEXT)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


ELEMENTS = Elements().found


def test_it_is_one_file_that_loads_nothing_from_elsewhere():
    assert len(TEXT.encode()) < MOST_BYTES
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|@import|\burl\(|\bimport\s*\(|<base|<iframe", TEXT)
    loading = {"src", "href", "srcset", "action", "formaction", "data", "poster"}
    for tag, attributes in ELEMENTS:
        for name in loading & attributes.keys():
            assert attributes[name].startswith("data:"), (tag, attributes)


def test_it_runs_under_a_policy_without_eval_or_event_attributes(server):
    answer = httpx.get(server.url)
    assert answer.text == TEXT
    directives = dict(part.split(maxsplit=1) for part in answer.headers["content-security-policy"].split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["connect-src"] == "'self'"
    assert "unsafe-eval" not in directives["script-src"]
    assert not [name for _, attributes in ELEMENTS for name in attributes if name.startswith("on")]
    assert not re.search(r"\beval\(|new Function|innerHTML|outerHTML|insertAdjacentHTML|document\.write", TEXT)


def test_every_field_is_of_the_api():
    names = {attributes["name"] for tag, attributes in ELEMENTS if "name" in attributes and tag != "meta"}
    assert names >= {"prompt", "seed", "width", "strength"}
    assert names <= Generation.model_fields.keys()
    added = set(re.findall(r"\bpictures\.(\w+) =", TEXT))
    assert added == {"image", "mask_image", "context_image"}
    assert added | {"stream", "progress", "partial_images", "controls"} <= Edit.model_fields.keys()


def test_what_it_says_of_controlnets_is_of_the_api_and_the_command():
    pictures, options, numbers = re.findall(r"const NET_\w+ = \{(.*)\};", TEXT)
    keys = re.compile(r"(\w+): ")
    assert set(keys.findall(pictures)) == set(keys.findall(options)) == set(PICTURES)
    assert set(keys.findall(numbers)) == set(NUMBERS)
    assert {"name", *PICTURES, *NUMBERS} == Control.model_fields.keys()
    usual = {"scale": 1, "start": 0, "end": 1}
    bounds = {key: [usual[key], number.low, number.high] for key, number in NUMBERS.items()}
    assert {key: json.loads(value) for key, value in re.findall(r"(\w+): (\[.*?\])", numbers)} == bounds
    assert set(re.findall(r'"(control[\w-]*)"', options)) <= {
        option.lstrip("-") for parameter in generate.params for option in parameter.opts
    }


def test_ids_are_of_one_element_and_are_all_used():
    ids = [attributes["id"] for _, attributes in ELEMENTS if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"""\$\("([\w-]+)"\)|\bon\("([\w-]+)"|(?:for|aria-\w+)="([\w-]+)"|#([\w-]+)""", TEXT))
    named = {name for names in used for name in names}
    templates = {f"{verb}{name}" for verb in ("add-", "") for name in ("image", "context_image")}
    lists = {"image-list", "context_image-list"}
    assert set(ids) <= named | templates | lists
    assert set(re.findall(r"""\$\("([\w-]+)"\)""", TEXT)) <= {*ids, "error"}


def test_a_model_says_what_the_page_shows_of_it(server):
    models = httpx.get(f"{server.url}/v1/models").json()["data"]
    read = set(re.findall(r"\b(?:zimg|chosen)\.([a-z_]+)\b", TEXT)) - {"files", "url", "fields", "blob", "id"}
    for model in models:
        assert read <= model["zimg"].keys()
