"""Tokenization equals transformers' fast tokenizer as lerobot calls it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.processing_steps import Tokenize
from quantvla.runtime.text import TaskTokenizer

TEXTS = [
    "pick up the cup",
    "pick up the cup\n",
    "Öffne die Schublade, schnell!",
    "<bos> push <pad> the button",
    "push the button and then open the drawer and then pick up the cup and put it away",
    "开门 🤖",
]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos_eos"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:1], trainer)
    if request.param:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    # Settings saved in the file must not matter: lerobot overrides them on each call.
    tokenizer.enable_padding(length=99, direction="left", pad_id=7)
    tokenizer.enable_truncation(3)
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def _step(max_length: int) -> Tokenize:
    return Tokenize(
        key="task",
        file="tokenizer.json",
        suffix="\n",
        max_length=max_length,
        pad_id=0,
        tokens="tokens",
        mask="mask",
    )


@pytest.mark.parametrize("max_length", [8, 48])
@pytest.mark.parametrize("text", TEXTS)
def test_equals_transformers(directory: Path, text: str, max_length: int) -> None:
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), pad_token="<pad>"
    )
    expected = reference(
        [text if text.endswith("\n") else f"{text}\n"],
        max_length=max_length,
        truncation=True,
        padding="max_length",
        padding_side="right",
        return_tensors="np",
    )
    tokens, mask = TaskTokenizer(_step(max_length), directory)(text)
    assert (tokens.dtype, mask.dtype) == (np.int64, np.bool_)
    np.testing.assert_array_equal(tokens, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"].astype(bool))


def test_cut_text_is_counted_and_warned_of_once(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = TaskTokenizer(_step(8), directory)
    with caplog.at_level(logging.WARNING):
        tokenizer("cup")
        assert tokenizer.truncated == 0 and not caplog.records
        tokenizer(TEXTS[4])
        tokenizer(TEXTS[2])
    assert tokenizer.truncated == 2
    assert [r.getMessage() for r in caplog.records] == [
        f"observation 'task': longer than 8 tokens and cut, got {TEXTS[4]!r}; use a shorter sentence"
    ]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match="tokenizer file is missing"):
        TaskTokenizer(_step(8), tmp_path)


def test_broken_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(QuantVLAError, match="is not a tokenizers JSON file"):
        TaskTokenizer(_step(8), tmp_path)
