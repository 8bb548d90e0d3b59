import pytest
from tdlm import VocabTree
from tiny import EIGHT_LEAVES, SIX_LEAVES


@pytest.fixture
def eight_leaf_tree() -> VocabTree:
    return VocabTree.from_nested(EIGHT_LEAVES)


@pytest.fixture
def six_leaf_tree() -> VocabTree:
    return VocabTree.from_nested(SIX_LEAVES)
