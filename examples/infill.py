"""Fill blanks in a text, in sight of what stands on both sides. Runs without tdlm: a checkpoint brings its code.

python examples/pretrain.py     # makes runs/pretrain
python examples/infill.py
python examples/infill.py "The [BLANK:3] was seen at [BLANK:5], and all was quiet." --num_samples 5
python examples/infill.py --model you/model --revision main "Once [BLANK:40] ever after."
"""

import argparse

import torch
from transformers import pipeline


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fill blanks in a text.")
    parser.add_argument(
        "text",
        nargs="?",
        default="It was a [BLANK:2] morning, and the captain [BLANK:6] with his sister.",
        help="[BLANK:8] is a blank of 8 tokens",
    )
    parser.add_argument("--model", default="runs/pretrain", help="checkpoint folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--num_samples", type=int, default=3)
    parser.add_argument("--num_denoising_steps", type=int, help="default: one for each token of the blanks")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    fill = pipeline("infilling", model=args.model, revision=args.revision, trust_remote_code=True)
    generator = torch.Generator().manual_seed(args.seed)
    settings = {"num_denoising_steps": args.num_denoising_steps, "temperature": args.temperature}
    for _ in range(args.num_samples):
        record = fill(args.text, generator=generator, **settings)
        print(record["text"])
        print(f"    blanks: {record['fills']}")


if __name__ == "__main__":
    main()
