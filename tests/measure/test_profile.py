from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.families import find_slots
from moe_dist.errors import ConversionError
from moe_dist.measure.profile import count_parameters, expert_reads, flops_per_token
from moe_dist.router_spec import RouterSpec
from tests.conversion.dense_models import tiny_model
from tests.inference.moe_students import even, student

SEQ_LEN = 16
# Small, but with FFNs, attention and head all large enough to show up in 2 %.
SIZES: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 60,
        "max_position_embeddings": 32,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 64,
        "vocab_size": 60,
        "n_positions": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "t5": {
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 4,
        "d_kv": 8,
        "d_ff": 64,
        "vocab_size": 60,
        "decoder_start_token_id": 0,
    },
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 60,
        "max_position_embeddings": 32,
    },
}
_BERT = SIZES["bert"] | {"pad_token_id": 0}
SIZES["roberta"] = _BERT
SIZES["deberta-v2"] = _BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
SIZES["modernbert"] = _BERT | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
SIZES["llama"] = _BERT | {"num_key_value_heads": 2}
CASES = [
    ("bert", "BertForSequenceClassification", {}),
    ("bert", "BertForMaskedLM", {}),
    ("bert", "BertForTokenClassification", {}),
    ("gpt2", "GPT2LMHeadModel", {}),
    ("gpt2", "GPT2ForSequenceClassification", {}),
    ("t5", "T5ForConditionalGeneration", {}),
    ("t5", "T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
    ("bart", "BartForConditionalGeneration", {}),
    ("bart", "BartForSequenceClassification", {}),
    ("roberta", "RobertaForQuestionAnswering", {}),
    ("deberta-v2", "DebertaV2ForSequenceClassification", {"conv_kernel_size": 3}),
    ("deberta-v2", "DebertaV2ForTokenClassification", {"share_att_key": True}),
    ("modernbert", "ModernBertForMaskedLM", {}),
    ("llama", "LlamaForSequenceClassification", {}),
]


def build(model_type: str, class_name: str, changes: dict[str, Any]) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SIZES[model_type] | changes))
    # Eager attention consists of matrix products, which the counter knows on every device.
    config._attn_implementation = "eager"
    model = getattr(transformers, class_name)(config).eval()
    # The counter would follow gradients of DeBERTa's places, which there are none of.
    return model.requires_grad_(False)


def grouped_mm_flops(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Count rows grouped by expert (T, I) times stacked weights (E, I, O), as experts use on a GPU.

    The counter has no formula for this product and would count it as nothing.
    """
    assert len(a) == 2
    assert len(b) == 3
    return 2 * a[0] * a[1] * b[2]


def counted_flops_per_token(model: Any) -> float:
    ids = torch.arange(3, 3 + SEQ_LEN)[None]
    batch = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id
        batch["decoder_input_ids"] = ids
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(**batch)
    return counter.get_total_flops() / SEQ_LEN


def student_of(model: Any, **changes: Any) -> Any:
    scores = [torch.rand(slot.num_neurons) for slot in find_slots(model)]
    keys = {one.name for one in fields(RouterSpec)}
    router = {key: changes.pop(key) for key in list(changes) if key in keys}
    sizes: dict[str, Any] = {"num_experts": 4, "expert_size": 16, "num_shared_neurons": 8}
    plan = plan_partition(scores, **(sizes | changes))
    return dense_to_moe(model, plan, **({"router": "hash_random"} | router)).eval()


@pytest.mark.parametrize(("model_type", "class_name", "changes"), CASES)
def test_dense_flops_agree_with_torch(
    model_type: str, class_name: str, changes: dict[str, Any]
) -> None:
    model = build(model_type, class_name, changes)
    assert flops_per_token(model, SEQ_LEN).total == pytest.approx(
        counted_flops_per_token(model), rel=0.02
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": "token_gate"},
        {"router": "token_gate", "top_k": 2},
        {"tie_shared": True},
        {"tie_shared": True, "router": "token_gate"},
        {"num_experts": 1, "num_shared_neurons": 0},
        {"layers": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("bert", "BertForSequenceClassification"),
        ("t5", "T5ForConditionalGeneration"),
        ("llama", "LlamaForCausalLM"),
        ("modernbert", "ModernBertForSequenceClassification"),
    ],
)
def test_student_flops_agree_with_torch(
    model_type: str, class_name: str, options: dict[str, Any]
) -> None:
    student = student_of(build(model_type, class_name, {}), **options)
    assert flops_per_token(student, SEQ_LEN).total == pytest.approx(
        counted_flops_per_token(student), rel=0.02
    )


@pytest.mark.parametrize("router", ["merged_task", "merged_sequence", "merged_token"])
@pytest.mark.parametrize(
    "options",
    [{"top_k": 2}, {"top_k": 4}, {"top_k": 2, "tie_shared": True}, {"merge_gates": "one"}],
    ids=str,
)
@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("bert", "BertForSequenceClassification"),
        ("t5", "T5ForConditionalGeneration"),
        ("llama", "LlamaForCausalLM"),
    ],
)
def test_merged_flops_agree_with_torch(
    model_type: str, class_name: str, router: str, options: dict[str, Any]
) -> None:
    student = student_of(build(model_type, class_name, {}), router=router, **options)
    assert flops_per_token(student, SEQ_LEN).total == pytest.approx(
        counted_flops_per_token(student), rel=0.02
    )


def test_a_merge_costs_as_much_as_k_tokens() -> None:
    teacher = build("bert", "BertForSequenceClassification", {})
    student = student_of(teacher, router="merged_sequence", top_k=3)
    dense = flops_per_token(teacher, 128).ffn
    # A quarter of the neurons, once for each token and 3 times for each sequence.
    assert flops_per_token(student, 128).ffn == pytest.approx(dense / 4 * (1 + 3 / 128))
    # Of a few tokens each is given to all 3 experts.
    assert flops_per_token(student, 2).ffn == pytest.approx(dense / 4 * 3)


def test_a_decoder_merges_for_each_segment() -> None:
    teacher = build("llama", "LlamaForCausalLM", {"max_position_embeddings": 128})
    student = student_of(teacher, router="merged_sequence", top_k=2, segment_length=32)
    dense = flops_per_token(teacher, 128).ffn
    assert flops_per_token(student, 128).ffn == pytest.approx(dense / 4 * (1 + 2 * 4 / 128))
    assert flops_per_token(student, 100).ffn == pytest.approx(dense / 4 * (1 + 2 * 4 / 100))


@pytest.mark.parametrize("tie_shared", [False, True])
def test_student_of_a_quarter_has_a_quarter_of_the_ffn_flops(tie_shared: bool) -> None:
    teacher = build("bert", "BertForSequenceClassification", {})
    student = student_of(teacher, tie_shared=tie_shared)
    dense, sparse = flops_per_token(teacher, SEQ_LEN), flops_per_token(student, SEQ_LEN)
    assert dense.ffn == 2 * 2 * 2 * 32 * 64
    assert sparse.ffn == dense.ffn / 4
    assert dense.total - sparse.total == pytest.approx(dense.ffn - sparse.ffn)


def test_gated_ffn_counts_three_products() -> None:
    plain = build("t5", "T5EncoderModel", {})
    gated = build("t5", "T5EncoderModel", {"feed_forward_proj": "gated-gelu"})
    assert flops_per_token(gated, 8).ffn == 1.5 * flops_per_token(plain, 8).ffn


def test_models_without_values_are_counted_alike() -> None:
    model = build("bert", "BertForSequenceClassification", {})
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert flops_per_token(skeleton, SEQ_LEN) == flops_per_token(model, SEQ_LEN)
    assert count_parameters(skeleton) == count_parameters(model)


def test_active_parameters_leave_out_the_idle_experts() -> None:
    teacher = build("bert", "BertForSequenceClassification", {})
    assert count_parameters(teacher).active == count_parameters(teacher).total
    student = student_of(teacher, router="token_gate", top_k=2)
    # Each of 2 layers idles 2 of 4 experts: 16 neurons of 32 + 1 + 32 values, and the output bias.
    idle = 2 * 2 * (16 * 65 + 32)
    counts = count_parameters(student)
    assert counts.total - counts.active == idle
    assert counts.total == sum(parameter.numel() for parameter in student.parameters())


def test_of_merged_experts_one_is_active() -> None:
    teacher = build("bert", "BertForSequenceClassification", {})
    counts = count_parameters(student_of(teacher, router="merged_sequence", top_k=3))
    assert counts.total - counts.active == 2 * 3 * (16 * 65 + 32)


def test_tied_shared_neurons_are_always_active() -> None:
    student = student_of(build("bert", "BertForSequenceClassification", {}), tie_shared=True)
    counts = count_parameters(student)
    assert counts.total - counts.active == 2 * 3 * (8 * 65 + 32)


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"Linear cannot be counted.*\n.*bert"):
        flops_per_token(nn.Linear(2, 2), 8)


@pytest.mark.parametrize(
    ("router", "top_k", "distinct"),
    [
        ("hash_random", 1, 4 * (1 - 0.75**3)),
        ("token_gate", 2, 4 * (1 - 0.5**3)),
        ("sentence_gate", 2, 2),
        ("merged_sequence", 2, 2),
    ],
)
def test_experts_that_a_text_reads(router: str, top_k: int, distinct: float) -> None:
    options: dict[str, Any] = {"router": router, "top_k": top_k}
    if router.startswith("merged"):
        options |= {"method": "full_copy", "expert_size": 32, "num_shared": 0}
    model = student(**options)
    reads = expert_reads(model, 3)
    assert reads is not None
    assert reads.distinct == pytest.approx(distinct)
    assert (reads.num_experts, reads.top_k, reads.num_tokens) == (4, top_k, 3)
    assert reads.once == (router in ("sentence_gate", "merged_sequence"))
    held = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    assert reads.weights_held == held
    assert reads.weights_read == pytest.approx(held * distinct / 4)
    assert reads.weights_of_one_choice == held * top_k / 4


def test_experts_that_are_read_by_their_measured_loads() -> None:
    model = student(router="token_gate")
    reads = expert_reads(model, 3, even(model, 0.5, 0.5, 0.0, 0.0))
    assert reads is not None and reads.distinct == pytest.approx(2 * (1 - 0.5**3))
    # One token reads one, whichever it is.
    alone = expert_reads(model, 1, even(model, 0.5, 0.5, 0.0, 0.0))
    assert alone is not None and alone.distinct == 1
    assert expert_reads(tiny_model("bert"), 3) is None


def test_a_decoder_reads_anew_for_each_segment() -> None:
    options: dict[str, Any] = {"method": "full_copy", "expert_size": 32, "num_shared": 0}
    model = student("gpt2", router="merged_sequence", segment_length=4, **options)
    reads = expert_reads(model, 10)
    assert reads is not None and reads.distinct == pytest.approx(4 * (1 - 0.75**3))
