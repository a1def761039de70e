"""Requests that are copied from the server's page, and draw the same elsewhere."""

from __future__ import annotations

import ast
import base64
import json
import shlex
import shutil
import subprocess
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from tests.runtime.serve.conftest import picture, pixels
from tests.runtime.serve.page.browsing import PROMPT, copied, downloaded, expect, from_url, keep_seed, png, sent, write
from zimgkit.runtime.commands.cli import main as zimg_run


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_copied_draws_the_same(page, tmp_path, monkeypatch, masked):
    page.click("summary")
    write(
        page,
        prompt='it\'s "a" red $HOME circle\nabove -- a square',
        num_inference_steps=2,
        more='{"cfg_normalization": 1, "keep_unmasked": false}' if masked else '{"cfg_truncation": 0.9}',
    )
    keep_seed(page, 12345)
    if masked:
        page.set_input_files("#image", png(picture(), "it's given.png"))
        page.click("#edit-mask")
        page.keyboard.press("Space")
        page.click("#mask-done")
    body = sent(page)
    expected = pixels(Image.open(BytesIO(downloaded(page))))
    (tmp_path / "it's given.png").write_bytes(png(picture())["buffer"])
    if masked:
        from_url(body["mask_image"]).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(copied(page, "Copy command"))
    assert words[:2] == ["zimg-run", "generate"]
    assert invoke(zimg_run, *words[1:], "--quiet").code == 0
    assert np.array_equal(pixels(Image.open("out.png")), expected)
    pytest.importorskip("openai", reason="OpenAI's client is not installed")
    exec(compile(copied(page, "Copy Python"), "copied", "exec"), {})
    assert np.array_equal(pixels(Image.open("picture-0.png")), expected)
    if shutil.which("curl"):
        answer = subprocess.run(["sh", "-c", copied(page, "Copy curl")], capture_output=True, check=True)
        data = base64.b64decode(json.loads(answer.stdout)["data"][0]["b64_json"])
        assert np.array_equal(pixels(Image.open(BytesIO(data))), expected)


def test_values_are_written_as_python_and_curl_read_them(page, tmp_path):
    value = {"a": [1, 2.5, True, None, {"b": "it's \"\n\u00e9"}], "c": False}
    assert ast.literal_eval(page.evaluate("(value) => python(value)", value)) == value
    prompt = 'it\'s "a" $HOME `b` \\ \n\u00e9'
    request = {"fields": {"prompt": prompt, "sigmas": [1, 0.5]}, "files": {}}
    assert json.loads(shlex.split(page.evaluate("(request) => curlOf(request)", request))[-1]) == request["fields"]
    if shutil.which("sh"):
        names = ["it's $HOME.png", 'a"\\b.png']
        for name in names:
            (tmp_path / name).write_bytes(name.encode() * 99)
        controls = [{"name": "canny", "scale": 0.5}]
        request = {
            "fields": {"prompt": prompt, "controls": controls},
            "files": {"image": names, "canny.image": names[:1]},
        }
        command = "curl() { cat; }\n" + page.evaluate("(request) => curlOf(request)", request)
        body = json.loads(subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, check=True).stdout)
        given = [base64.b64encode(name.encode() * 99).decode() for name in names]
        assert body == {"prompt": prompt, "image": given, "controls": [controls[0] | {"image": given[0]}]}
    told = "Copied without sigmas, which no option takes."
    page.click("summary")
    write(page, prompt=PROMPT, more='{"sigmas": [1, 0.5]}')
    page.click("details >> text=Copy command")
    expect(page.locator("#notice")).to_contain_text(told)
