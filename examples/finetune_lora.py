"""Fine-tune a checkpoint with LoRA (needs `pip install peft`): train an adapter, save it, load it, merge it.

    python examples/pretrain.py         # makes runs/pretrain
    python examples/finetune_lora.py    # adapts it to Moby Dick; writes runs/lora and runs/lora/merged
    python examples/finetune_lora.py --model you/model --train_data text.parquet --eval_data held-out.parquet \\
        --rank 32 --max_steps 10000 --per_device_train_batch_size 64 --bf16
"""

from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

import tdlm  # noqa: F401  # registers the model classes
from tdlm.trainer import RandomCrops, TDLMTrainer, TDLMTrainingArguments, evaluation_windows, load_text, tokenize
from tdlm.trainer.data import pad_token_id
from tdlm.trainer.quickstart import corpus_file

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@dataclass
class ScriptArguments:
    model: str = field(default="runs/pretrain", metadata={"help": "Checkpoint to adapt: a folder or a Hub id."})
    train_data: str | None = field(default=None, metadata={"help": "Text file(s) or dataset. Default: Moby Dick."})
    eval_data: str | None = field(default=None, metadata={"help": "The same, held out."})
    rank: int = field(default=8, metadata={"help": "Rank of the adapter."})


def load(source, split):
    if source is not None:
        return load_text(source, split=split)
    return load_text(corpus_file(split)).filter(lambda row: row["source"] == "moby_dick")


def main(argv=None):
    parser = HfArgumentParser((ScriptArguments, TDLMTrainingArguments), description="Fine-tune with LoRA.")
    parser.set_defaults(output_dir="runs/lora", max_steps=300, per_device_train_batch_size=32, learning_rate=2e-3)
    parser.set_defaults(logging_steps=50, per_device_eval_batch_size=64)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_data is None) != (script.eval_data is None):
        parser.error("--train_data and --eval_data: pass both, or neither for Moby Dick")
    set_seed(args.seed)

    base = AutoModelForCausalLM.from_pretrained(script.model)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    length = base.config.max_position_embeddings
    windows = evaluation_windows(load(script.eval_data, "validation"), tokenizer, length)
    model = get_peft_model(
        base, LoraConfig(r=script.rank, lora_alpha=2 * script.rank, target_modules=ATTENTION_AND_MLP)
    )
    model.print_trainable_parameters()

    documents = tokenize(load(script.train_data, "train"), tokenizer)
    crops = RandomCrops(documents, length, pad_token_id(tokenizer), args.seed)
    trainer = TDLMTrainer(model=model, args=args, train_dataset=crops, eval_dataset=windows, processing_class=tokenizer)
    nelbo = {"base": trainer.evaluate()["eval_nelbo"]}  # a new adapter changes nothing yet
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    nelbo["adapter"] = trainer.evaluate()["eval_nelbo"]
    trainer.save_model()  # the adapter alone

    # As whoever gets the adapter: load it onto the base, then merge it to have a model like any other.
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(script.model), args.output_dir)
    merged = loaded.merge_and_unload()
    nelbo["merged"] = TDLMTrainer(merged, args, eval_dataset=windows, processing_class=tokenizer).evaluate()[
        "eval_nelbo"
    ]
    merged.save_pretrained(Path(args.output_dir, "merged"))
    tokenizer.save_pretrained(Path(args.output_dir, "merged"))
    for name, value in nelbo.items():
        print(f"{name:8} NELBO {value:.4f} nats per held-out token")


if __name__ == "__main__":
    main()
