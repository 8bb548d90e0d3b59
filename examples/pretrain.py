"""Pretrain a tree diffusion language model: text -> tokenizer -> tree -> model -> Trainer -> checkpoint.

    python examples/pretrain.py                                            # novels that ship with tdlm
    python examples/pretrain.py --law direct --output_dir runs/direct      # from a token to the root in one jump
    python examples/pretrain.py --tokenizer runs/tree --tree runs/tree/tree.safetensors  # those of build_tree.py

For your own data (.txt, .parquet, .jsonl, .csv, a folder of them or a dataset on the Hub) and a larger model:

    python examples/pretrain.py --train_data text.parquet --eval_data held-out.parquet --vocab_size 50000 \\
        --branching_factor 256 --preset small --max_steps 500000 --per_device_train_batch_size 64 --bf16

Every argument of the HF Trainer is a flag. `tdlm train` does the same from a YAML file, and more.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer, HfArgumentParser, set_seed

from tdlm import TDLMConfig, TDLMForDiffusionLM, VocabTree
from tdlm.tokenization import build_tree, corpus_embeddings, train_tokenizer
from tdlm.trainer import RandomCrops, TDLMTrainer, TDLMTrainingArguments, evaluation_windows, load_text, tokenize
from tdlm.trainer.quickstart import corpus_file


@dataclass
class ScriptArguments:
    train_data: str | None = field(default=None, metadata={"help": "One document a row or file. Default: novels."})
    eval_data: str | None = field(default=None, metadata={"help": "The same, held out."})
    tokenizer: str | None = field(default=None, metadata={"help": "Default: train a byte-level BPE on the text."})
    vocab_size: int = field(default=4096, metadata={"help": "Of the tokenizer to train."})
    tree: str | None = field(default=None, metadata={"help": "Tree file. Default: build one from the text."})
    branching_factor: int = field(default=96, metadata={"help": "Most children of a node of the tree to build."})
    preset: str = field(default="tiny", metadata={"help": "Size of the model: tiny, small or base."})
    law: str = field(default="sequential", metadata={"help": "How noise climbs: sequential, concurrent or direct."})


def load(source, split):
    return load_text(corpus_file(split)) if source is None else load_text(source, split=split)


def main(argv=None):
    parser = HfArgumentParser((ScriptArguments, TDLMTrainingArguments), description="Pretrain a model.")
    parser.set_defaults(output_dir="runs/pretrain", max_steps=1200, per_device_train_batch_size=32, learning_rate=2e-3)
    parser.set_defaults(logging_steps=50, per_device_eval_batch_size=64)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_data is None) != (script.eval_data is None):
        parser.error("--train_data and --eval_data: pass both, or neither for the novels")
    set_seed(args.seed)

    text = load(script.train_data, "train")
    if script.tokenizer is None:
        tokenizer = train_tokenizer(text["text"], script.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(script.tokenizer)
    documents = tokenize(text, tokenizer)

    if script.tree is None:
        embeddings = corpus_embeddings(documents["input_ids"], len(tokenizer), seed=args.seed)
        tree = build_tree(embeddings, script.branching_factor, seed=args.seed).bind(tokenizer)
    else:
        tree = VocabTree.load(script.tree)  # the Trainer checks that it is this tokenizer's

    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = TDLMForDiffusionLM(TDLMConfig.for_tree(tree, script.preset, law=script.law, **special), tree)

    length = model.config.max_position_embeddings
    trainer = TDLMTrainer(
        model=model,
        args=args,
        train_dataset=RandomCrops(documents, length, tokenizer.eos_token_id, args.seed),
        eval_dataset=evaluation_windows(load(script.eval_data, "validation"), tokenizer, length),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())  # NELBO, perplexity, bits per byte: upper bounds
    trainer.save_model()
    print(tokenizer.decode(model.eval().generate()[0], skip_special_tokens=True))
    print(f"Saved to {args.output_dir}: weights, tree, tokenizer, code and a model card.")


if __name__ == "__main__":
    main()
