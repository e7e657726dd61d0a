from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from moe_dist.inference.serving import TextModel

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the film was good [ ] sep mask".split()


def test_special_tokens_in_a_text_are_text_as_in_training(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    model = TextModel(BertForSequenceClassification(config).eval(), tokenizer, max_length=16)
    texts = ["the film [SEP] was good", "the film [ sep ] was good", "the"]
    scores = model.predict(texts)["score"].tolist()
    assert scores[0] == scores[1]
    # Padding beside a longer text changes nothing but rounding.
    assert abs(model.predict(texts[2:])["score"][0] - scores[2]) < 1e-6
