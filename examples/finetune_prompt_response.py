"""Fine-tune a checkpoint on prompt and response pairs: the prompt is context, only the response is noised and scored.

    python examples/pretrain.py                    # makes runs/pretrain
    python examples/finetune_prompt_response.py    # what is said and answered in the novels; writes runs/chat
    python examples/finetune_prompt_response.py --model you/model --train_data pairs.jsonl --eval_data held-out.jsonl \\
        --response_length 256 --max_steps 10000 --per_device_train_batch_size 64 --bf16

A file of pairs has the columns `prompt` and `response`.
"""

import itertools
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

import tdlm  # noqa: F401  # registers the model classes
from tdlm.trainer import TDLMTrainer, TDLMTrainingArguments, load_text
from tdlm.trainer.quickstart import corpus_file

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


@dataclass
class ScriptArguments:
    model: str = field(default="runs/pretrain", metadata={"help": "Checkpoint to start from: a folder or a Hub id."})
    train_data: str | None = field(default=None, metadata={"help": "File or dataset of pairs. Default: the novels."})
    eval_data: str | None = field(default=None, metadata={"help": "The same, held out."})
    response_length: int = field(default=24, metadata={"help": "Tokens of a response, end-of-text included."})
    prompt: str = field(default='"Do you like dancing?"', metadata={"help": "Answered after training."})


def load_pairs(source, split):
    if source is not None:
        return load_text(source, split=split, text_column="prompt").select_columns(["prompt", "response"])
    pairs = []
    for document in load_text(corpus_file(split))["text"]:
        paragraphs = (" ".join(paragraph.split()) for paragraph in document.split("\n\n"))
        pairs += [pair for pair in itertools.pairwise(paragraphs) if all(spoken.startswith('"') for spoken in pair)]
    return Dataset.from_list([{"prompt": prompt, "response": response} for prompt, response in pairs])


def encode(pairs, tokenizer, response_length, context_length):
    def encode_pair(pair):
        chat = [{"role": "user", "content": pair["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        response = tokenizer(pair["response"], add_special_tokens=False)["input_ids"]
        # Filled up with end-of-text, which is learnt as well: `generate` makes `response_length` tokens at once.
        response = (response + [tokenizer.eos_token_id] * response_length)[:response_length]
        return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}

    def fits(row):
        return row["input_ids"][-1] == tokenizer.eos_token_id and len(row["input_ids"]) <= context_length

    encoded = pairs.map(encode_pair, remove_columns=pairs.column_names).filter(fits)
    print(f"{len(encoded)} of {len(pairs)} pairs fit in the context of {context_length} tokens")
    if len(encoded) == 0:
        raise ValueError(
            f"no pair has a response below response_length={response_length} tokens and fits in the context of "
            f"{context_length}. Change --response_length, or start from a model with a longer context."
        )
    return encoded


def main(argv=None):
    parser = HfArgumentParser((ScriptArguments, TDLMTrainingArguments), description="Fine-tune on pairs.")
    parser.set_defaults(output_dir="runs/chat", max_steps=300, per_device_train_batch_size=32, logging_steps=50)
    parser.set_defaults(eval_num_samples=4)
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.train_data is None) != (script.eval_data is None):
        parser.error("--train_data and --eval_data: pass both, or neither for the novels")
    set_seed(args.seed)

    model = AutoModelForCausalLM.from_pretrained(script.model)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    lengths = (script.response_length, model.config.max_position_embeddings)
    trainer = TDLMTrainer(
        model=model,
        args=args,
        train_dataset=encode(load_pairs(script.train_data, "train"), tokenizer, *lengths),
        eval_dataset=encode(load_pairs(script.eval_data, "validation"), tokenizer, *lengths),
        processing_class=tokenizer,  # its collator pads on the right; padding is neither seen nor scored
    )
    before = trainer.evaluate()["eval_nelbo"]
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate()["eval_nelbo"]
    # The end-of-text that fills a response up counts too, and is easy: no figure to compare between lengths.
    print(f"NELBO of held-out responses given their prompts, nats per token: {before:.3f} before, {after:.3f} after")
    trainer.save_model()

    chat = [{"role": "user", "content": script.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.eval().generate(**inputs.to(model.device), max_new_tokens=script.response_length)
    response = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"user: {script.prompt}\nassistant: {response}")


if __name__ == "__main__":
    main()
