"""Building vocabulary trees and tokenizers: corpus -> tokenizer -> token embeddings -> `VocabTree`."""

from tdlm.tokenization.clustering import build_tree, inertia, unconstrained_inertia
from tdlm.tokenization.embeddings import corpus_embeddings, file_embeddings, model_embeddings
from tdlm.tokenization.outline import format_statistics, tree_outline, tree_statistics
from tdlm.tokenization.tokenizer import train_tokenizer

__all__ = [
    "build_tree",
    "corpus_embeddings",
    "file_embeddings",
    "format_statistics",
    "inertia",
    "model_embeddings",
    "train_tokenizer",
    "tree_outline",
    "tree_statistics",
    "unconstrained_inertia",
]
