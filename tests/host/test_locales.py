"""The words that the page shows: locales/ and web/docs/ cover every node and input, and nothing else."""

from __future__ import annotations

import json
import re
import urllib.request
from typing import Any

import pytest

from dev.comfyui import PACK_NAME
from dev.environment import REPOSITORY
from dev.locales import english, keys

pytestmark = pytest.mark.host

LANGUAGES = sorted(path.name for path in (REPOSITORY / "locales").iterdir())
# The page reads these as places to fill in, alternatives and references to other texts.
MEANINGFUL = re.compile(r"[{}|@]")
RENEW = "`python dev.py run -m dev.locales` renews the English; correct the other languages by hand"


def texts(language: str, file: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "locales" / language / file).read_text(encoding="utf-8"))


def leaves(text: Any) -> list[str]:
    return [text] if isinstance(text, str) else [leaf for value in text.values() for leaf in leaves(value)]


@pytest.fixture(scope="module")
def nodes(host) -> dict[str, Any]:
    return {name: node for name, node in host.get("/object_info").items() if name.startswith("LightX2V")}


def test_english_is_what_the_nodes_say(nodes) -> None:
    assert texts("en", "nodeDefs.json") == english(nodes), RENEW


def test_a_missing_text_has_a_name(nodes) -> None:
    one = english({"LightX2VSampler": nodes["LightX2VSampler"]})
    found = keys(one)
    assert {"LightX2VSampler.display_name", "LightX2VSampler.inputs.seed.tooltip"} <= found
    del one["LightX2VSampler"]["inputs"]["seed"]["tooltip"]
    assert found - keys(one) == {"LightX2VSampler.inputs.seed.tooltip"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_and_input_is_covered_and_nothing_is_stale(nodes, language: str) -> None:
    assert {"en", "zh"} <= set(LANGUAGES)
    told, expected = keys(texts(language, "nodeDefs.json")), keys(english(nodes))
    assert (sorted(expected - told), sorted(told - expected)) == ([], []), RENEW
    for text in leaves(texts(language, "nodeDefs.json")):
        assert text.strip() and not MEANINGFUL.search(text), text


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_categories_of_our_own_are_named(nodes, language: str) -> None:
    """The second parts (loaders, sampling, ...) are ComfyUI's words, which it translates itself."""
    ours = {node["category"].split("/")[0] for node in nodes.values()}
    assert set(texts(language, "main.json")["nodeCategories"]) == ours


def test_the_server_hands_them_out(host) -> None:
    served = host.get("/i18n")
    for language in LANGUAGES:
        mine = texts(language, "nodeDefs.json")
        assert {name: served[language]["nodeDefs"][name] for name in mine} == mine
        assert served[language]["nodeCategories"].items() >= texts(language, "main.json")["nodeCategories"].items()


def test_every_node_has_a_help_page_that_explains_every_input(host, nodes) -> None:
    pages = {path.stem for path in (REPOSITORY / "web" / "docs").glob("*.md")}
    assert pages == set(nodes)
    for name, node in nodes.items():
        with urllib.request.urlopen(f"{host.url}/extensions/{PACK_NAME}/docs/{name}.md", timeout=30) as answer:
            page = answer.read().decode()
        assert page.startswith(f"# {node['display_name']}\n")
        # What is explained stands in bold before the colon of its list entry.
        listed = [line.split(":")[0] for line in page.splitlines() if line.startswith("- **")]
        named = {word for line in listed for word in re.findall(r"\*\*(.+?)\*\*", line)}
        inputs = {entry for group in ("required", "optional") for entry in node["input"].get(group, {})}
        assert named == inputs | set(node["output_name"]), name
