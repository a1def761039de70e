"""A prompt as token ids, through ``tokenizers`` alone, and which of the text encoder's rows are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import TextConfig
from zimgkit.engines.errors import BundleError, UsageError


class PromptTokenizer:
    """A bundle's tokenizer with its family's prompt template.

    Gives the ids that the reference pipelines give their text encoders for one prompt, without their padding: the
    encoders are causal and padded on the right, so padding never reached a row that is kept.

    Args:
        path: a ``tokenizer.json``.
        text: the template and its limits.

    Raises:
        BundleError: there is no such file, or it is no tokenizer.
    """

    def __init__(self, path: Path, text: TextConfig) -> None:
        from tokenizers import Tokenizer

        self._text, self._path = text, path
        try:
            self._tokenizer = Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # The library raises bare exceptions.
            hint = "copy or build the bundle again"
            raise BundleError(f"{path} is no tokenizer zimgkit can read ({error})", hint) from None
        # Saved files remember the padding and truncation of their last call; every call of the reference sets its own.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(text.max_tokens)

    def encode(self, prompt: str, template: TextConfig | None = None) -> NDArray[np.int64]:
        """Token ids of the prompt within its template, or another, as :meth:`encode_whole` gives them."""
        text = template or self._text
        return self.encode_whole(f"{text.prefix}{prompt}{text.suffix}")

    def encode_whole(self, text: str) -> NDArray[np.int64]:
        """Token ids of a prompt that stands within its template, or of a piece of one, (1, T).

        A prompt too long is cut on the right, and the end of the template with it, as in diffusers'
        ``QwenImagePipeline._get_qwen_prompt_embeds`` and ``ZImagePipeline._encode_prompt``. Strings such as
        ``<|im_end|>`` in the prompt become special tokens, as they do there.

        Raises:
            UsageError: the prompt has characters that are no text (halves of surrogate pairs).
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            hint = "check the encoding of the terminal or file it comes from"
            raise UsageError("the prompt is not valid Unicode text", hint) from None
        return np.array([self._tokenizer.encode(text).ids], np.int64)

    def id_of(self, token: str) -> int:
        """The id of a special token.

        Raises:
            BundleError: the tokenizer has none that is called so.
        """
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise BundleError(f"{self._path} has no token {token}", "copy or build the bundle again")
        return found


def keep_rows(
    hidden_states: NDArray[np.float32], text: TextConfig, max_sequence_length: int | None = None
) -> NDArray[np.float32]:
    """The rows of the text encoder's output that belong to the prompt.

    Args:
        hidden_states: (T, hidden), a row for each token id.
        text: says how many rows of the template come first and are dropped.
        max_sequence_length: rows kept after that at most; the bundle's own number when not given.

    Returns:
        (at most ``max_sequence_length``, hidden).
    """
    length = text.max_sequence_length if max_sequence_length is None else max_sequence_length
    return hidden_states[text.drop :][:length]
