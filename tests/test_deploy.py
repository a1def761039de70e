"""The files of docs/deploy/ say what the server, its metrics and its commands are."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
import yaml

from zimgkit.runtime.commands.cli import cli

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "docs" / "deploy"
CONTAINERFILES = ("Containerfile", "Containerfile.nvidia")
MANIFESTS = [path.name for path in sorted(DEPLOY.glob("*.yaml"))]


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text("utf-8")))


def instructions(name):
    """A container file's instructions: word and the rest, comments left out and lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", (DEPLOY / name).read_text("utf-8")).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def accepted(arguments):
    """Whether ``zimg-run serve`` takes these; what it would be called with."""
    return cli.commands["serve"].make_context("serve", list(arguments)).params


def containers():
    for name in ("kubernetes.yaml", "rayservice.yaml"):
        for document in documents(name):
            yield from _containers(document)


def _containers(node):
    if isinstance(node, dict):
        yield from node.get("containers", ())
        for value in node.values():
            yield from _containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from _containers(value)


@pytest.fixture(scope="module")
def app():
    """The server with a carried model, and what it told after it has drawn one picture: the names of its metrics."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from tests.runtime.serve.conftest import SECONDS, make_service, serving

    with serving(make_service()) as server:
        body = {"prompt": "a red circle", "num_inference_steps": 1, "size": "32x32"}
        assert httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=SECONDS).status_code == 200
        assert httpx.post(f"{server.url}/v1/images/generations", json={"prompt": ""}, timeout=SECONDS).is_error
        text = httpx.get(f"{server.url}/metrics").text
        yield server, {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_parse(name):
    assert all(isinstance(document, dict) for document in documents(name))


@pytest.mark.parametrize("name", CONTAINERFILES)
def test_a_container_starts_the_server_as_nobody(name):
    steps = instructions(name)
    assert [word for word, _ in steps if word in ("USER", "ENTRYPOINT", "CMD", "HEALTHCHECK", "STOPSIGNAL")]
    said = dict(steps)
    command = json.loads(said["ENTRYPOINT"])
    assert command[:2] == ["zimg-run", "serve"]
    assert accepted(command[2:] + json.loads(said["CMD"]))["host"] == "0.0.0.0"
    assert int(said["USER"]) > 0
    extras = dict(steps)["ARG"].partition("=")[2].split(",")
    known = re.findall(r"(?m)^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"))
    assert "serve" in extras and set(extras) <= set(known)
    for _, files in (step for step in steps if step[0] == "COPY"):
        *sources, _ = files.split()
        assert all(source.startswith(("--from", "/")) or (ROOT / source).exists() for source in sources)
    used = re.search(r"docker run (.*\\\n#.*)", (DEPLOY / name).read_text("utf-8"))[1].replace("\\\n#", "")
    assert accepted(shlex.split(used.partition("zimgkit:")[2])[1:])["api_key_file"] == Path("/run/secrets/keys")


def test_kubernetes_starts_what_there_is_and_waits_for_it(app):
    server, _ = app
    ((container,), pod) = next(
        (one["spec"]["template"]["spec"]["containers"], one["spec"]["template"]["spec"])
        for one in documents("kubernetes.yaml")
        if one["kind"] == "Deployment"
    )
    said = accepted(container["args"])
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert said["grace_seconds"] + pause < pod["terminationGracePeriodSeconds"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert httpx.get(server.url + container[probe]["httpGet"]["path"]).status_code == 200
    mounted = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounted["/models"] and mounted[str(said["api_key_file"].parent)]
    assert container["securityContext"]["readOnlyRootFilesystem"]


def test_every_container_is_bounded_and_has_no_rights():
    found = list(containers())
    assert len(found) == 3
    for container in found:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["resources"]["limits"]["memory"]


def test_a_ray_service_has_arguments_that_there_are():
    """By name alone, for Ray need not be installed."""
    (service,) = documents("rayservice.yaml")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, function = application["import_path"].partition(":")
    tree = ast.parse((ROOT / (module.removeprefix("zimgkit.").replace(".", "/") + ".py")).read_text("utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    (arguments,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Arguments")
    fields = {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}
    assert set(application["args"]) <= fields
    for container in (one for one in containers() if one["name"].startswith("ray")):
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]


def test_the_dashboard_shows_metrics_that_there_are(app):
    _, names = app
    dashboard = json.loads((DEPLOY / "grafana.json").read_text("utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    shown = {name for text in asked for name in re.findall(r"\b(?:zimg:|process_)\w+", text)}
    assert len(shown) >= 12
    assert shown <= names
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})


def test_the_documents_name_the_files_there_are():
    text = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    for path in DEPLOY.iterdir():
        assert f"(deploy/{path.name})" in text, path.name
    for line in re.findall(r"(?m)^zimg-run serve (.*?)(?: +#.*)?$", text):
        accepted(shlex.split(line))
