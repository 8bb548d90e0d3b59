"""The HTML report: whole without a network, inert whatever the tokens are, and holding the numbers it was given."""

import json
import math
from html.parser import HTMLParser

import pytest

from tdlm.trainer.report import node_labels, tree_for_report, visible_text, write_report
from tdlm.vocab_tree_tdlm import VocabTree

HOSTILE = "</script><script>alert(1)//<!-- &lt;"
#            10
#        /        \
#      8            9
#    / | \ \     / | \ \
#   0  1  2  3  4  5  6  7
TOKENS = [" the", "a", "\n", HOSTILE, "cat", "dog", "\t", ""]
COUNTS = [50, 70, 60, 1, 5, 9, 0, 7]


class Page(HTMLParser):
    """Collects the page's scripts, by type, and every attribute that could fetch something."""

    def __init__(self, path):
        super().__init__()
        self.scripts, self.links, self.tags, self.open_script, self.headings = {}, [], [], None, ""
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.links += [attributes[name] for name in ("src", "href", "srcset", "action", "data") if name in attributes]
        if tag == "script":
            self.open_script = attributes.get("type", "code")
            assert self.open_script not in self.scripts
            self.scripts[self.open_script] = ""

    def handle_endtag(self, tag):
        self.open_script = None if tag == "script" else self.open_script

    def handle_data(self, data):
        if self.open_script:
            self.scripts[self.open_script] += data
        elif self.tags and self.tags[-1] == "h1":
            self.headings += data

    @property
    def data(self):
        return json.loads(self.scripts["application/json"])


@pytest.fixture
def tree():
    return VocabTree.contiguous([8, 2, 1], 4)


@pytest.fixture
def report(tree):
    nested = tree_for_report(tree, TOKENS.__getitem__, COUNTS)
    steps = [
        {"step": 0, "level": 1, "t": 1.0, "ids": [10, 10]},
        {"step": 1, "level": 1, "t": 0.5, "ids": [8, 9]},
        {"step": 2, "level": 0, "t": 0.0, "ids": [3, 4]},
    ]
    text = {str(node_id): label for node_id, label in node_labels(nested).items()}
    heights = {str(n): int(n >= 8) + int(n >= 10) for n in range(11)}
    return {
        "title": f"A report {HOSTILE}",
        "summary": {"corpus": HOSTILE, "steps": 300, "unigram_entropy": 1.75},
        "models": [{"name": HOSTILE, "nelbo": 1.25, "ppl": math.exp(1.25), "bpb": 0.5, "parameters": 1000}],
        "loss_curves": {"tdlm: loss": [[0, 2.0], [1, 1.5]], "flat: one point": [[0, 2.0]], "flat: empty": []},
        "tree": nested,
        "trajectory": {"steps": steps, "text": text, "vocab_size": 8, "heights": heights},
        "samples": [{"prompt": "", "text": HOSTILE}],
    }


def written(tmp_path, report):
    write_report(tmp_path / "report.html", **report)
    return Page(tmp_path / "report.html")


def test_page_needs_nothing_from_outside(tmp_path, report):
    page = written(tmp_path, report)
    assert page.links == []
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    code = page.text.replace(page.scripts["application/json"], "")
    for fetching in ("http://", "https://", "url(", "@import", "fetch(", "XMLHttpRequest", "WebSocket", "import("):
        assert fetching not in code
    assert "default-src 'none'" in code


def test_page_leaves_no_placeholder_and_no_partial_file(tmp_path, report):
    page = written(tmp_path, report)
    assert "__REPORT_" not in page.text
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_hostile_text_stays_inert(tmp_path, report):
    page = written(tmp_path, report)
    assert page.tags.count("script") == 2
    assert page.text.lower().count("<script") == page.text.lower().count("</script") == 2
    assert not set("<>&") & set(page.scripts["application/json"])
    assert "alert(1)" not in page.scripts["code"]
    assert page.headings.strip() == report["title"]


def test_script_never_writes_markup(tmp_path, report):
    code = written(tmp_path, report).scripts["code"]
    for writer in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert writer not in code


def test_embedded_json_holds_the_values(tmp_path, report):
    assert written(tmp_path, report).data == report


def test_placeholder_names_in_the_data_are_left_alone(tmp_path, report):
    report["summary"]["corpus"] = "__REPORT_DATA__ __REPORT_TITLE__ \\1"
    assert written(tmp_path, report).data == report


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_values_that_are_not_finite_are_missing(tmp_path, report, value):
    report["loss_curves"]["tdlm: loss"] = [[0, 2.0], (1, value), [2, 1.0]]
    report["models"][0]["ppl"] = value
    report["summary"]["unigram_entropy"] = value
    data = written(tmp_path, report).data
    assert data["loss_curves"]["tdlm: loss"] == [[0, 2.0], [1, None], [2, 1.0]]
    assert data["models"][0]["ppl"] is None
    assert data["summary"]["unigram_entropy"] is None


def test_parts_may_be_absent(tmp_path):
    empty = {"summary": {}, "models": [], "loss_curves": {}, "tree": None, "trajectory": None, "samples": []}
    assert written(tmp_path, {"title": "", **empty}).data == {"title": "", **empty}


def test_lone_surrogates_can_be_written(tmp_path, report):
    report["samples"] = [{"prompt": "\ud800", "text": "\u2028"}]
    report["title"] = "\udfff"
    assert written(tmp_path, report).data["samples"] == report["samples"]


def test_counts_and_occurrences_add_up(tree):
    nested = tree_for_report(tree, TOKENS.__getitem__, COUNTS)
    stack, leaves = [nested["root"]], []
    while stack:
        node = stack.pop()
        children = node.get("children", [])
        stack += children
        if not children:
            leaves.append(node["id"])
            assert (node["count"], node["occurrences"]) == (1, COUNTS[node["id"]])
            continue
        assert node["count"] == sum(child["count"] for child in children)
        assert node["occurrences"] == sum(child["occurrences"] for child in children)
    assert sorted(leaves) == list(range(8))
    assert (nested["root"]["id"], nested["root"]["count"]) == (tree.root_id, 8)
    assert (nested["branching_factor"], nested["nodes_per_height"]) == (4, [8, 2, 1])


def test_examples_are_the_most_frequent_tokens_below(tree):
    root = tree_for_report(tree, TOKENS.__getitem__, COUNTS)["root"]
    first, second = root["children"]
    assert root["label"] == "a · ⏎ · ␣the"
    assert first["tokens"] == ["a", "⏎", "␣the", HOSTILE.replace(" ", "␣")]
    assert second["tokens"] == ["dog", "⟨empty⟩", "cat", "⇥"]


def test_examples_without_counts_are_the_lowest_ids():
    tree = VocabTree.random(40, 4, seed=0)
    root = tree_for_report(tree, str)["root"]
    assert root["tokens"] == [str(token_id) for token_id in range(12)]
    assert "occurrences" not in root
    below = sorted(token_id for token_id in range(40) if tree.ancestors[1, token_id] == 40)
    assert tree_node(root, 40)["tokens"] == [str(token_id) for token_id in below]


def tree_node(root, node_id):
    stack = [root]
    while (node := stack.pop())["id"] != node_id:
        stack += node.get("children", [])
    return node


def test_children_are_in_slot_order():
    tree = VocabTree.random(40, 4, seed=0)
    root = tree_for_report(tree, str)["root"]
    for row in range(len(tree.child_ids)):
        children = tree_node(root, tree.vocab_size + row)["children"]
        assert [child["id"] for child in children] == [n for n in tree.child_ids[row].tolist() if n >= 0]


def test_labels_of_every_node(tree):
    labels = node_labels(tree_for_report(tree, TOKENS.__getitem__, COUNTS))
    assert sorted(labels) == list(range(tree.num_nodes))
    assert labels[0] == "␣the"
    assert labels[9] == "dog · ⟨empty⟩ · cat"


def test_a_high_tree_is_written(tmp_path, report):
    report["tree"] = tree_for_report(VocabTree.contiguous([2] * 100 + [1], 2), str)
    assert written(tmp_path, report).data["tree"] == report["tree"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" a b", "␣a␣b"), ("\r\n", "␍⏎"), ("\x00\x7f", "␀␡"), ("\u202e", "⟨U+202E⟩"), ("é日", "é日"), ("", "⟨empty⟩")],
)
def test_white_space_and_control_characters_are_visible(text, shown):
    assert visible_text(text) == shown


def test_token_counts_must_be_one_per_token(tree):
    with pytest.raises(ValueError, match="token_counts has 7 entries, the tree has vocab_size=8 tokens"):
        tree_for_report(tree, TOKENS.__getitem__, COUNTS[:7])
