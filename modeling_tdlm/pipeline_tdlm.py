"""Infilling: text with blanks -> the same text with the blanks filled by generated tokens, in sight of both sides."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers.pipelines.base import GenericTensor, Pipeline

BLANK = re.compile(r"\[BLANK:(\d+)\]")


class TDLMInfillingPipeline(Pipeline):
    """
    Fills blanks in a text: `"The [BLANK:8] sat on the mat"` gets 8 tokens in the place of the brackets.

    ```python
    fill = pipeline("infilling", model=repo, trust_remote_code=True)
    fill("The [BLANK:8] sat on the [BLANK:2].")
    fill({"text": "The cat sat on the mat", "spans": [[4, 7]], "lengths": [3]})
    ```

    A text is a string with `[BLANK:n]` marks, or a dictionary: `text`, `spans` as (start, end) offsets of characters to
    replace, and how many tokens to replace each with, `lengths` (default: as many as it has). Several texts make a
    list. The text around the blanks is never changed. Any argument of `generate` may be given: `num_denoising_steps`,
    `temperature`, `suppress_tokens`, `generator`; with `num_return_sequences` there are several results a text.

    Returns, for each text, `{"text": ..., "fills": [one string a blank]}`, or a list of them.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, **generate_kwargs):
        if "max_new_tokens" in generate_kwargs:
            raise ValueError(
                f"max_new_tokens={generate_kwargs['max_new_tokens']}: infilling appends nothing, and a blank says "
                "itself how long it is ([BLANK:8])."
            )
        return {}, generate_kwargs, {}

    def __call__(self, inputs, **kwargs):
        return super().__call__(inputs, **kwargs)

    def preprocess(self, input_: str | dict[str, Any], **preprocess_parameters) -> dict[str, GenericTensor]:
        fixed, lengths = self._parse(input_)
        rows: list[int] = []
        is_hole: list[bool] = []
        for number, text in enumerate(fixed):
            # The space before a blank belongs to the blank's first token, as byte-level tokenizers write words.
            seen = text.removesuffix(" ") if number < len(lengths) else text
            token_ids = self.tokenizer(seen, add_special_tokens=False, verbose=False)["input_ids"] if seen else []
            length = lengths[number] if number < len(lengths) else 0
            rows += [*token_ids, *[0] * length]
            is_hole += [*[False] * len(token_ids), *[True] * length]
        return {
            "input_ids": torch.tensor([rows]),
            "attention_mask": torch.ones(1, len(rows), dtype=torch.int64),
            "infill_mask": torch.tensor([is_hole]),
            "fixed": fixed,  # type: ignore[dict-item]  # what is carried along
            "lengths": lengths,  # type: ignore[dict-item]
        }

    def _parse(self, input_: str | dict[str, Any]) -> tuple[list[str], list[int]]:
        """-> the fixed pieces of the text, one more than there are blanks, and the length of each blank in tokens."""
        if isinstance(input_, str):
            pieces = BLANK.split(input_)
            fixed, lengths = pieces[::2], [int(length) for length in pieces[1::2]]
        else:
            if not {"text", "spans"} <= set(input_) <= {"text", "spans", "lengths"}:
                raise ValueError(f"a text to fill in has text, spans and maybe lengths, not {sorted(input_)}.")
            fixed, lengths = self._cut_out(**input_)
        if not lengths:
            raise ValueError(f"no blank in {input_!r}. Mark where to fill in, and how much: [BLANK:8] is 8 tokens.")
        if min(lengths) < 1:
            raise ValueError(f"a blank has {min(lengths)} tokens in {input_!r}; it needs at least 1.")
        return fixed, lengths

    def _cut_out(
        self, text: str, spans: Sequence[Sequence[int]], lengths: Sequence[int] | None = None
    ) -> tuple[list[str], list[int]]:
        bounds = [0, *(offset for span in spans for offset in span), len(text)]
        if any(len(span) != 2 for span in spans) or bounds != sorted(bounds):
            raise ValueError(
                f"spans={spans} must be (start, end) offsets into the {len(text)} characters, in order and apart."
            )
        fixed = [text[start:end] for start, end in zip(bounds[::2], bounds[1::2], strict=True)]
        if lengths is None:
            removed = [text[start:end] for start, end in spans]
            lengths = [len(self.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in removed]
        if len(lengths) != len(spans):
            raise ValueError(f"{len(lengths)} lengths for {len(spans)} spans. Give one length a span.")
        return fixed, list(lengths)

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters) -> dict[str, Any]:
        carried = {name: input_tensors.pop(name) for name in ("fixed", "lengths")}
        sequences = self.model.generate(**input_tensors, **forward_parameters)
        sequences = getattr(sequences, "sequences", sequences).cpu()
        masks = input_tensors["infill_mask"].bool().cpu()
        filled = [
            copies[:, mask].tolist() for copies, mask in zip(sequences.tensor_split(len(masks)), masks, strict=True)
        ]
        is_batch = isinstance(carried["lengths"][0], list)  # with batch_size > 1 each entry is a list of texts'
        return {"filled": filled if is_batch else filled[0], **carried}

    def postprocess(self, model_outputs: dict[str, Any], **postprocess_parameters) -> Any:
        records = [
            self._record(model_outputs["fixed"], torch.tensor(filled).split(model_outputs["lengths"]))
            for filled in model_outputs["filled"]
        ]
        return records[0] if len(records) == 1 else records

    def _record(self, fixed: list[str], fills: Sequence[torch.Tensor]) -> dict[str, Any]:
        texts = [self.tokenizer.decode(fill, skip_special_tokens=True) for fill in fills]
        text = fixed[0]
        for filled, after in zip(texts, fixed[1:], strict=True):
            text += filled.removeprefix(" ") if text.endswith(" ") else filled
            text += after
        return {"text": text, "fills": texts}


__all__ = ["TDLMInfillingPipeline"]
