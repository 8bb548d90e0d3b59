import pytest
from tiny import EIGHT_LEAVES, SIX_LEAVES
from transformers_suite import MARKS

from tdlm import VocabTree


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")


@pytest.fixture
def eight_leaf_tree() -> VocabTree:
    return VocabTree.from_nested(EIGHT_LEAVES)


@pytest.fixture
def six_leaf_tree() -> VocabTree:
    return VocabTree.from_nested(SIX_LEAVES)
