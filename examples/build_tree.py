"""Build a vocabulary tree for your tokenizer, from any model's embeddings or from a corpus, and look at it.

    python examples/build_tree.py                                # a new tokenizer and its tree, from the novels
    python examples/build_tree.py --tokenizer runs/pretrain      # a tokenizer that you have, and the novels
    python examples/build_tree.py --model gpt2 --branching_factor 256    # from the Hub: its tokenizer and embeddings
    python examples/build_tree.py --tokenizer gpt2 --corpus text.parquet --branching_factor 256

`python examples/pretrain.py --tokenizer runs/tree --tree runs/tree/tree.safetensors` trains a model on it.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from tdlm.tokenization import (
    build_tree,
    corpus_embeddings,
    format_statistics,
    model_embeddings,
    train_tokenizer,
    tree_outline,
    tree_statistics,
)
from tdlm.trainer import load_text, tokenize
from tdlm.trainer.quickstart import corpus_file


def main(argv=None):
    parser = argparse.ArgumentParser(description="Build a vocabulary tree for a tokenizer.")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: that of --model, or train one on the corpus)")
    parser.add_argument("--model", help="cluster the input embeddings of this Hugging Face model, not the corpus")
    parser.add_argument("--corpus", default=corpus_file("train"), help="text file(s) or dataset (default: novels)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of the tokenizer to train")
    parser.add_argument("--branching_factor", type=int, default=96, help="most children of a node")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="runs/tree", help="gets tree.safetensors and the tokenizer")
    args = parser.parse_args(argv)

    name = args.tokenizer or args.model
    if name is None:
        tokenizer = train_tokenizer(load_text(args.corpus)["text"], args.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)

    if args.model is not None:
        embeddings = model_embeddings(args.model)
    else:
        documents = tokenize(load_text(args.corpus), tokenizer)
        embeddings = corpus_embeddings(documents["input_ids"], len(tokenizer), seed=args.seed)
    tree = build_tree(embeddings, args.branching_factor, seed=args.seed).bind(tokenizer)

    tokenizer.save_pretrained(args.output_dir)
    tree.save(Path(args.output_dir, "tree.safetensors"))
    print(format_statistics(tree_statistics(tree, embeddings)))
    print(tree_outline(tree, tokenizer, max_depth=2, max_children=8))
    print(f"Saved to {args.output_dir}: tree.safetensors and the tokenizer that it belongs to.")


if __name__ == "__main__":
    main()
