"""Texts that are written: targets, losses by token, beam search and its figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from torch import Tensor
from torch.nn import functional

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.importance import score_importance
from moe_dist.data.loaders import Encoded, collate, encode, eval_batches
from moe_dist.data.metrics import LabelSpace, compute_metrics
from moe_dist.errors import ConversionError
from moe_dist.inference import load_model, save_model
from moe_dist.inference.generation import save_with_generation, set_generation
from moe_dist.losses.tokens import TokenScores
from moe_dist.losses.total import weighted_total
from moe_dist.measure.evaluation import predict
from moe_dist.tasks import TASK_KINDS, Answered
from moe_dist.tasks.kind import IGNORED
from moe_dist.tasks.seq2seq import read_texts, write
from moe_dist.tasks.token_kind import unread_settings
from moe_dist.training.step import distill_terms, finetune_terms
from tests.conversion.dense_models import random_scores
from tests.tasks.tiny_seq2seq import FAMILIES, columns, tiny_tokenizer, tiny_writer, titled_rows

KIND = TASK_KINDS["seq2seq"]
CPU = torch.device("cpu")
TASK_SPACE = LabelSpace(None, columns=KIND.columns)


def rows_of(rows: list[dict[str, str]]) -> Dataset:
    text = Value("string")
    features = {"text_a": text, "text_b": text, "label": text, "sample_id": Value("int64")}
    return Dataset.from_dict(columns(rows), features=Features(features))


def encoded(family: str, tmp_path: Path, count: int = 9, **options: Any) -> Encoded:
    return encode(
        rows_of(titled_rows(count)),
        tiny_tokenizer(family),
        max_length=12,
        kind=KIND,
        options=options,
        cache_dir=tmp_path,
    )


def batch_of(data: Encoded, rows: list[int], family: str) -> dict[str, Tensor]:
    return collate(data, np.asarray(rows), tiny_tokenizer(family).pad_token_id)


def student_of(model: Any, router: str = "token_gate", num_experts: int = 4) -> Any:
    plan = plan_partition(
        random_scores(model), num_experts=num_experts, expert_size=8, num_shared_neurons=0
    )
    student = dense_to_moe(model, plan, router=router)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in student.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(parameter, generator=generator)
    return student.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_end_as_the_tokenizer_ends_them_and_are_cut_and_counted(
    family: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(family)
    rows = columns([{"text": "the film", "title": "a good film"}, {"text": "it", "title": "dull"}])
    made = KIND.tokens(
        rows, tokenizer, max_length=12, is_training=True, options={"max_target_length": 4}
    )
    assert made.targets is not None and made.num_targets is not None
    begin = ["<s>"] if family == "bart" else []
    whole = [*begin, "a", "good", "film", "</s>"]
    kept = whole if family == "t5" else ["<s>", "a", "good", "</s>"]
    assert tokenizer.convert_ids_to_tokens(list(made.targets[0])) == kept
    assert list(made.full_target_lengths or ()) == [len(whole), 2 + len(begin)]
    assert list(made.num_targets) == [4, 2 + len(begin)]
    assert made.targets[0][-1] == tokenizer.eos_token_id


def test_prefixes_and_two_columns_make_one_source() -> None:
    tokenizer = tiny_tokenizer("t5")
    rows = columns([{"text": "was it good", "title": "a"}], text_b=["the film was fine"])
    options = {"source_prefix": ["question : ", "context : "]}
    made = KIND.tokens(rows, tokenizer, max_length=20, is_training=True, options=options)
    said = tokenizer.decode(made.input_ids[0], skip_special_tokens=True)
    assert said == "question : was it good context : the film was fine"


def test_a_text_that_names_a_special_token_does_not_become_one() -> None:
    tokenizer = tiny_tokenizer("t5")
    rows = columns([{"text": "the </s> film", "title": "a </s> plot"}])
    made = KIND.tokens(rows, tokenizer, max_length=20, is_training=True)
    assert made.targets is not None
    for ids in (made.input_ids[0], made.targets[0]):
        assert list(ids).count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_transformers_and_of_a_loop(family: str, tmp_path: Path) -> None:
    model, data = tiny_writer(family), encoded(family, tmp_path)
    if family == "bart":
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    batch = batch_of(data, [0, 1, 2, 3], family)
    with torch.no_grad():
        predictions = KIND.predictions(model, KIND.run(model, batch), batch)
        whole = model(**KIND.inputs(model, batch)).logits
        own = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["targets"],
        )
    losses_B = KIND.losses(predictions, batch)
    num_targets = int(batch["num_targets"].sum())
    assert float(losses_B.sum() / num_targets) == pytest.approx(float(own.loss), rel=1e-5)
    for row in range(4):
        slow = sum(
            float(functional.cross_entropy(logits_V, target))
            for logits_V, target in zip(whole[row], batch["targets"][row], strict=True)
            if target != IGNORED
        )
        assert float(losses_B[row]) == pytest.approx(slow, rel=1e-5)
    means = KIND.scored_losses(predictions, batch)
    torch.testing.assert_close(means, losses_B / batch["num_targets"])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distances_are_sums_over_target_tokens(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 7, generator=generator) for _ in range(2))
    targets = torch.tensor([[1, 2, 3, 4], [1, 2, IGNORED, IGNORED], [5, *[IGNORED] * 3]])
    batch, real = {"targets": targets}, targets != IGNORED
    expected = torch.zeros(3)
    for row, place in real.nonzero().tolist():
        p, q = (
            torch.softmax(one[row, place].double() / temperature, dim=-1)
            for one in (student, teacher)
        )
        expected[row] += float(temperature**2 * (q * (q / p).log()).sum())
    own, other = (TokenScores(one[real], torch.eye(7), None) for one in (student, teacher))
    torch.testing.assert_close(KIND.prediction_errors(own, other, batch, temperature), expected)
    for total in (KIND.prediction_loss, KIND.soft_target_loss):
        torch.testing.assert_close(total(own, other, batch, temperature), expected.sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["hash_random", "token_gate", "sentence_gate"])
def test_micro_batches_add_up_to_the_step_and_padding_counts_nowhere(
    family: str, router: str, tmp_path: Path
) -> None:
    teacher, data = tiny_writer(family), encoded(family, tmp_path)
    student = student_of(teacher, router)
    options = {"z_loss": router != "hash_random", "entropy": router != "hash_random"}
    objectives = ("prediction_kl", "soft_targets", "hidden_mse")
    counts = {
        "samples": 6,
        "tokens": int(data.lengths[:6].sum()),
        "targets": data.count_targets(np.arange(6)),
        "steps": 1,
    }

    def step(parts: list[list[int]]) -> tuple[dict[str, float], dict[str, Tensor]]:
        sums: dict[str, float] = {}
        experts: dict[str, Tensor] = {}
        for rows in parts:
            found = distill_terms(
                student, teacher, batch_of(data, rows, family), objectives=objectives, **options
            )
            weights = dict.fromkeys(found.terms, 1.0)
            for name, value in weighted_total(found.terms, weights, counts)[1].items():  # type: ignore[arg-type]
                sums[name] = sums.get(name, 0.0) + float(value)
            for name, count_E in found.tokens_per_expert.items():
                experts[name] = experts.get(name, 0) + count_E
        return sums, experts

    whole, experts = step([[0, 1, 2, 3, 4, 5]])
    parts, again = step([[0, 1, 2], [3], [4, 5]])
    assert parts == pytest.approx(whole, rel=1e-5)
    assert len(experts) == 8 // 2
    for name, count_E in experts.items():
        torch.testing.assert_close(again[name], count_E)
        side = "targets" if "decoder" in name.split(".") else "tokens"
        assert int(count_E.sum()) == counts[side], "real tokens alone are counted"  # type: ignore[index]
    if options["z_loss"]:
        assert {"z_loss", "router_entropy"} <= set(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_compared_by_the_mean_over_each_side(family: str, tmp_path: Path) -> None:
    teacher, other = tiny_writer(family), tiny_writer(family, seed=1)
    data = encoded(family, tmp_path)
    batch = batch_of(data, [0, 1, 2, 3], family)
    with torch.no_grad():
        term = distill_terms(other, teacher, batch, objectives=["hidden_mse"]).terms["hidden_mse"]
        outputs = [
            model(**KIND.inputs(model, batch), output_hidden_states=True)
            for model in (other, teacher)
        ]
    expected = 0.0
    masks = {"encoder": batch["attention_mask"].bool(), "decoder": batch["targets"] != IGNORED}
    for side, mask_BS in masks.items():
        for own, match in zip(*(one[f"{side}_hidden_states"] for one in outputs), strict=True):
            gap_TD = (own - match)[mask_BS]
            expected += float(gap_TD.square().mean())
    counts = {
        "tokens": int(batch["attention_mask"].sum()),
        "targets": int(batch["num_targets"].sum()),
    }
    assert float(term.divided(counts)) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_loop_over_samples(family: str, tmp_path: Path) -> None:
    model, data = tiny_writer(family), encoded(family, tmp_path, count=5)
    pad = tiny_tokenizer(family).pad_token_id
    fast = score_importance(model, eval_batches(data, batch_size=5, pad_token_id=pad))
    slow: list[Tensor] = []
    for row in range(5):
        own = eval_batches(data.subset([row]), batch_size=1, pad_token_id=pad)
        scores = score_importance(model, own)
        slow = [a + b for a, b in zip(slow, scores, strict=True)] if slow else scores
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(float(one.sum()) > 0 for one in fast), "of encoder and decoder"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_writing_is_the_search_of_transformers_with_the_recipes_settings(
    family: str, num_beams: int, tmp_path: Path
) -> None:
    model, data = tiny_writer(family), encoded(family, tmp_path)
    batch = batch_of(data, [0, 1, 2, 3, 4], family)
    options = {"max_target_length": 7, "num_beams": num_beams, "no_repeat_ngram_size": 2}
    ids_BL = write(model, batch, options)
    settings: dict[str, Any] = {"forced_eos_token_id": None}
    if num_beams > 1:
        settings |= {"length_penalty": 1.0, "early_stopping": True}
    expected = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=7,
        num_beams=num_beams,
        no_repeat_ngram_size=2,
        use_cache=False,
        **settings,
    )
    assert ids_BL.shape == (5, 7)
    end = model.config.eos_token_id
    for row, wanted in zip(ids_BL.tolist(), expected[:, 1:].tolist(), strict=True):
        stop = wanted.index(end) + 1 if end in wanted else len(wanted)
        assert row == wanted[:stop] + [IGNORED] * (7 - stop)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["hash_random", "token_gate", "sentence_gate"])
def test_routing_follows_the_beams(family: str, router: str, tmp_path: Path) -> None:
    """With a cache, each beam's last token is all that routers see."""
    student, data = student_of(tiny_writer(family), router), encoded(family, tmp_path)
    batch = batch_of(data, [0, 1, 2, 3, 4], family)
    options = {"max_target_length": 6, "num_beams": 3}
    together = write(student, batch, options)
    whole = student.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=6,
        num_beams=3,
        early_stopping=True,
        forced_eos_token_id=None,
        use_cache=False,
    )
    tokenizer = tiny_tokenizer(family)
    assert read_texts(tokenizer, together.numpy()) == [
        text.strip() for text in tokenizer.batch_decode(whole, skip_special_tokens=True)
    ]
    for row in range(5):
        alone = write(student, batch_of(data, [row], family), options)
        assert alone[0].tolist() == together[row].tolist(), "whatever else is in the batch"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", [None, "token_gate", "sentence_gate"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_model_that_is_told_writes_as_it_is_measured_in_plain_use(
    family: str, router: str | None, num_beams: int, tmp_path: Path
) -> None:
    model, batch = tiny_writer(family), batch_of(encoded(family, tmp_path), [0, 1, 2, 3], family)
    model = student_of(model, router) if router else model
    for name, value in {"min_length": 3, "repetition_penalty": 3.0, "max_length": 9}.items():
        setattr(model.generation_config, name, value)
    options: dict[str, Any] = {
        "max_target_length": 5,
        "num_beams": num_beams,
        "no_repeat_ngram_size": 2,
    }
    if num_beams > 1:
        options |= {"length_penalty": 0.5, "early_stopping": False}
    measured = write(model, batch, options)
    source = save_model(model, tmp_path / "model", tiny_tokenizer(family))
    set_generation(model, KIND.generation(model, options))
    told = load_model(save_with_generation(model, source, tmp_path / "told"))
    names = ("input_ids", "attention_mask")
    inputs = {name: batch[name] for name in names}
    texts = read_texts(tiny_tokenizer(family), measured.numpy())
    decode = tiny_tokenizer(family).batch_decode
    plain = [text.strip() for text in decode(told.generate(**inputs), skip_special_tokens=True)]
    assert plain == texts
    own_ids = load_model(source).generate(**inputs, use_cache=False)
    own = decode(own_ids, skip_special_tokens=True)
    assert [text.strip() for text in own] != texts, "it wrote otherwise before"
    weights = [path / "model.safetensors" for path in (source, tmp_path / "told")]
    assert weights[0].samefile(weights[1]), "they take no space of their own"


def test_what_a_model_says_of_generation_is_not_used_and_said() -> None:
    model, tokenizer = tiny_writer("bart"), tiny_tokenizer("bart")
    batch = dict(tokenizer(["the film", "it was"], return_tensors="pt"))
    plain = write(model, batch, {"max_target_length": 6})
    model.generation_config.min_length = 5
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.max_length = 142
    assert set(unread_settings(model)) >= {"min_length", "repetition_penalty", "max_length"}
    assert write(model, batch, {"max_target_length": 6}).tolist() == plain.tolist()
    (line,) = KIND.check_model(model, tokenizer, {})
    assert "min_length=5" in line and "repetition_penalty=3.0" in line


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_without_end_is_cut_and_counted(family: str, tmp_path: Path) -> None:
    model, data = tiny_writer(family), encoded(family, tmp_path, count=4)
    with torch.no_grad():
        # The end of the sequence is never likely.
        if family == "bart":
            model.final_logits_bias[0, model.config.eos_token_id] = -1e4
        else:
            model.lm_head = torch.nn.Linear(16, 28)
            model.lm_head.bias[model.config.eos_token_id] = -1e4
    answers = predict(
        model, data, batch_size=3, pad_token_id=0, device=CPU, options={"max_target_length": 5}
    ).answers
    assert answers.shape == (4, 5) and bool((answers >= 0).all())
    values = figures_of(answers.numpy(), family, titled_rows(4)).values
    assert values[:, KIND.columns.index("unfinished")].tolist() == [1.0] * 4
    (line,) = KIND.remarks(values, {"max_target_length": 5})
    assert line.startswith("4 of 4 outputs had no end after data.max_target_length=5 tokens")


def figures_of(raw: np.ndarray, family: str, rows: list[dict[str, str]]) -> Any:
    return KIND.figures(
        Answered(
            raw=raw.astype(np.float32),
            sample_ids=np.arange(len(rows)),
            labels=np.zeros(len(rows), np.int64),
            rows=columns(rows),
            columns={},
            offsets=np.arange(len(rows) + 1),
            tokenizer=tiny_tokenizer(family),
            options={},
        )
    )


def test_figures_compare_the_text_with_its_reference() -> None:
    tokenizer = tiny_tokenizer("bart")
    rows = [{"text": "it", "title": "a good film"}, {"text": "it", "title": "the plot"}]
    written = [tokenizer("a good film")["input_ids"], tokenizer("plot")["input_ids"]]
    raw = np.full((2, 6), IGNORED)
    for row, ids in enumerate(written):
        raw[row, : len(ids)] = ids
    found = figures_of(raw, "bart", rows)
    assert list(found.texts) == ["a good film", "plot"]
    by_name = dict(zip(KIND.columns, found.values.T.tolist(), strict=True))
    assert by_name["exact"] == [1, 1] and by_name["f1"] == [1, 1], "articles do not count"
    assert by_name["rouge1"] == pytest.approx([1, 2 / 3])
    assert by_name["unfinished"] == [0, 0]
    metrics = compute_metrics(list(KIND.metrics), found.values, found.labels, TASK_SPACE)
    assert metrics["rougeL"] == pytest.approx((1 + 2 / 3) / 2)
    assert 0 < metrics["chrf"] < 1 and KIND.remarks(found.values, {}) == []


def test_loads_are_those_of_the_rows_and_not_of_what_a_search_tried(tmp_path: Path) -> None:
    data = encoded("t5", tmp_path, count=5)
    student = student_of(tiny_writer("t5"))
    found = predict(student, data, batch_size=2, pad_token_id=0, device=CPU)
    for name, count_E in found.tokens_per_expert.items():
        real = data.count_targets(np.arange(5)) if "decoder" in name else data.num_tokens
        assert int(count_E.sum()) == real


def test_a_step_is_divided_by_targets(tmp_path: Path) -> None:
    model, data = tiny_writer("t5"), encoded("t5", tmp_path)
    batch = batch_of(data, [0, 1], "t5")
    term = finetune_terms(model, batch).terms["task"]
    assert term.count_kind == "targets" and math.isfinite(float(term.sum.detach()))


def test_models_that_cannot_begin_or_end_a_text_are_refused() -> None:
    model, tokenizer = tiny_writer("t5"), tiny_tokenizer("t5")
    model.config.decoder_start_token_id = None
    with pytest.raises(ConversionError, match="names no decoder_start_token_id"):
        KIND.check_model(model, tokenizer, {})
    model = tiny_writer("t5")
    model.config.eos_token_id = 7
    with pytest.raises(ConversionError, match="nothing it learns to write would end"):
        KIND.check_model(model, tokenizer, {})
    with pytest.raises(ConversionError, match=r"length: 65 is more than the 64"):
        KIND.check_model(tiny_writer("bart"), tiny_tokenizer("bart"), {"max_target_length": 65})
