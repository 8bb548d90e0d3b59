"""A terminal view of generation: the draft as it goes down the tree, root -> cluster -> word."""

from typing import Any

import torch
from transformers.generation.streamers import TextDiffusionStreamer

from .vocab_tree_tdlm import VocabTree


class TreeTextStreamer(TextDiffusionStreamer):
    """
    transformers' [`~transformers.TextDiffusionStreamer`] that can read nodes: a token is its text, a cluster `<word>`,
    after its first token, and the root `_`.

    ```python
    model.generate(**prompt, streamer=TreeTextStreamer(tokenizer, model.tree))
    ```

    Args:
        tokenizer: decodes tokens.
        tree ([`VocabTree`]): the model's tree.
        skip_prompt (`bool`, *optional*, defaults to `False`): leave the prompt out.
        sleep_time (`float`, *optional*): seconds to wait after each draft.
        decode_kwargs: for the tokenizer's `decode`.
    """

    def __init__(
        self,
        tokenizer: Any,
        tree: VocabTree,
        skip_prompt: bool = False,
        sleep_time: float | None = None,
        **decode_kwargs: Any,
    ):
        super().__init__(NodeDecoder(tokenizer, tree), skip_prompt, sleep_time, **decode_kwargs)
        self.num_confirmed = 0

    def put(self, value: torch.Tensor) -> None:
        self.num_confirmed += value.shape[-1]
        super().put(value)

    def put_draft(self, value: torch.Tensor, **kwargs: Any) -> None:
        """(1, L) canvas of node ids, of which the confirmed part stands on the screen already."""
        super().put_draft(value[:, self.num_confirmed :], **kwargs)

    def end(self) -> None:
        self.num_confirmed = 0
        super().end()


class NodeDecoder:
    """Decodes node ids as a tokenizer does token ids."""

    def __init__(self, tokenizer: Any, tree: VocabTree):
        self.tokenizer = tokenizer
        self.tree = tree

    def decode(self, node_ids: torch.Tensor | list[int], **kwargs: Any) -> str:
        node_ids = torch.as_tensor(node_ids, dtype=torch.int64, device=self.tree.child_ids.device)
        pieces: list[str] = []
        run: list[int] = []  # tokens side by side are decoded together: one letter may be several of them
        for node_id, leaf in zip(node_ids.tolist(), self.tree.first_leaf(node_ids).tolist(), strict=True):
            if node_id < self.tree.vocab_size:
                run.append(node_id)
                continue
            pieces.append(self.tokenizer.decode(run, **kwargs))
            run = []
            pieces.append(" _" if node_id == self.tree.root_id else f" <{self.tokenizer.decode([leaf]).strip()}>")
        return "".join([*pieces, self.tokenizer.decode(run, **kwargs)])


__all__ = ["NodeDecoder", "TreeTextStreamer"]
