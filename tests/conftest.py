import pytest
from tiny import EIGHT_LEAVES, SIX_LEAVES

from tdlm import VocabTree


@pytest.fixture
def eight_leaf_tree() -> VocabTree:
    return VocabTree.from_nested(EIGHT_LEAVES)


@pytest.fixture
def six_leaf_tree() -> VocabTree:
    return VocabTree.from_nested(SIX_LEAVES)
