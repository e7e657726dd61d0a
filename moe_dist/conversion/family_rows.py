"""A row for each architecture: under which names it keeps its feed-forward networks.

The one place that knows these names. Module classes are matched by name, so that a family costs no
import until a model is there. Families whose names differ in nothing but a prefix share a
description.

Shapes: F FFN.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilySpec:
    """One architecture's FFN, as paths below the module that holds it.

    Args:
        model_type: the family's name in transformers.
        config_class: the dense configuration class.
        blocks: classes of the modules that hold one FFN each.
        stacks: classes whose forward takes the token ids; routing contexts open around them.
        causal_stacks: those of them in which no token sees a later one, whatever the model's
            configuration says (``is_decoder`` says it of any other).
        linear_in: path of the first linear layer.
        linear_out: path of the second one.
        activation: path of the activation.
        replaced: path where the MoE layer goes.
        activation_keys: configuration entries that name the activation.
        heads: dense model class to the Auto classes that should find its MoE form.
        attention: class of the attention modules.
        attention_width: path, below such a module, of its heads' width in sum.
        emptied: paths that become identities, since the MoE layer does their work.
        gate: path of the activated linear layer beside `linear_in` where the FFN is gated.
        gated_in: path of `linear_in` in a gated FFN, where it has another name there.
        fused_gate: `linear_in` holds both: rows of the activated layer, then as many of the other.
        dropout: path of the dropout between the linear layers (a module or a float), if any.
        transposed: weights are stored (in, out), as in GPT-2's Conv1D.
        first_token_heads: dense model classes whose output depends on no position of the last
            block but the first.
        attention_out: path of the module that attention and residual pass through, summed or
            not, and after which no position sees another; needed for those heads.
        query: path of the query layer below an attention module.
        key: path of the key layer; scores are products of what the two give.
        no_attention: why scores cannot be read that way, where they cannot.
        size_keys: configuration entries that hold F.
        task_head: in a sequence classifier the path of the linear layer that gives the logits.
        no_bf16: why it cannot compute in bfloat16, where it cannot.
        pad_position: what position padding has, where a text's own begin behind it: a number, or
            the configuration entry that holds it; None where they begin at 0.
    """

    model_type: str
    config_class: str
    blocks: tuple[str, ...]
    stacks: tuple[str, ...]
    linear_in: str
    linear_out: str
    activation: str
    replaced: str
    activation_keys: tuple[str, ...]
    heads: dict[str, tuple[str, ...]]
    attention: str
    attention_width: str
    emptied: tuple[str, ...] = ()
    gate: str | None = None
    gated_in: str | None = None
    fused_gate: bool = False
    dropout: str | None = None
    transposed: bool = False
    causal_stacks: tuple[str, ...] = ()
    first_token_heads: tuple[str, ...] = ()
    attention_out: str = ""
    query: str = "query"
    key: str = "key"
    no_attention: str = ""
    size_keys: tuple[str, ...] = ()
    task_head: str = ""
    no_bf16: str = ""
    pad_position: int | str | None = None

    @property
    def folder(self) -> str:
        """The package below transformers.models that has the architecture."""
        return self.model_type.replace("-", "_")

    def module(self, kind: str) -> str:
        """Name the architecture's module of a kind, such as "modeling"."""
        return f"transformers.models.{self.folder}.{kind}_{self.folder}"


# The Auto class of a head, by what follows the architecture's name; ForX has AutoModelForX.
_AUTO_CLASSES = {
    "Model": "AutoModel",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "EncoderModel": "AutoModelForTextEncoding",
}


def _heads(name: str, *kinds: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}{kind}": (_AUTO_CLASSES.get(kind, f"AutoModel{kind}"),) for kind in kinds}


_ENCODER_HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


def _bert_kind(
    model_type: str,
    name: str,
    *,
    task_head: str = "classifier.out_proj",
    attention: str = "",
    attention_out: str = "attention.output",
    no_attention: str = "",
    no_bf16: str = "",
    multiple_choice: bool = True,
    mixes_after_attention: bool = False,
    pad_position: int | str | None = None,
) -> FamilySpec:
    """Describe BERT and its kin, whose FFN is spread over `intermediate` and `output`."""
    classifier = f"{name}ForSequenceClassification"
    return FamilySpec(
        model_type=model_type,
        config_class=f"{name}Config",
        blocks=(f"{name}Layer",),
        stacks=(f"{name}Model",),
        linear_in="intermediate.dense",
        linear_out="output.dense",
        activation="intermediate.intermediate_act_fn",
        replaced="intermediate",
        emptied=("output.dense",),
        activation_keys=("hidden_act",),
        heads=_heads(name, *_ENCODER_HEADS, *["ForMultipleChoice"] * multiple_choice),
        first_token_heads=() if mixes_after_attention else (classifier,),
        attention_out=attention_out,
        attention=attention or f"{name}SelfAttention",
        attention_width="all_head_size",
        no_attention=no_attention,
        no_bf16=no_bf16,
        size_keys=("intermediate_size",),
        task_head=task_head,
        pad_position=pad_position,
    )


def _llama_kind(model_type: str, name: str) -> FamilySpec:
    """Describe Llama and its kin: gated decoders without dropout in the FFN."""
    return FamilySpec(
        model_type=model_type,
        config_class=f"{name}Config",
        blocks=(f"{name}DecoderLayer",),
        stacks=(f"{name}Model",),
        causal_stacks=(f"{name}Model",),
        linear_in="mlp.up_proj",
        gate="mlp.gate_proj",
        linear_out="mlp.down_proj",
        activation="mlp.act_fn",
        replaced="mlp",
        activation_keys=("hidden_act",),
        heads=_heads(
            name,
            "Model",
            "ForCausalLM",
            "ForSequenceClassification",
            "ForTokenClassification",
            "ForQuestionAnswering",
        ),
        attention=f"{name}Attention",
        attention_width="q_proj.out_features",
        no_attention="queries and keys are rotated by their places before they meet",
        size_keys=("intermediate_size",),
        task_head="score",
    )


_ADDS_PLACES = "they are more than products of queries and keys, since places add to them"
_ONE_LAYER = "queries and keys are one layer"
_PAD = "pad_token_id"
_ROWS = (
    _bert_kind("bert", "Bert", task_head="classifier"),
    _bert_kind("roberta", "Roberta", pad_position=_PAD),
    _bert_kind("xlm-roberta", "XLMRoberta", pad_position=_PAD),
    _bert_kind("camembert", "Camembert", pad_position=_PAD),
    _bert_kind("electra", "Electra"),
    _bert_kind(
        "mpnet",
        "MPNet",
        attention_out="attention.LayerNorm",
        no_attention=_ADDS_PLACES,
        pad_position=1,  # whatever its configuration says of padding
    ),
    _bert_kind(
        "deberta",
        "Deberta",
        task_head="classifier",
        attention="DisentangledSelfAttention",
        no_attention=_ADDS_PLACES,
        no_bf16="DeBERTa masks attention with a number that bfloat16 does not hold",
        multiple_choice=False,
    ),
    _bert_kind(
        "deberta-v2",
        "DebertaV2",
        task_head="classifier",
        attention="DisentangledSelfAttention",
        no_attention=_ADDS_PLACES,
        mixes_after_attention=True,  # the first layer's output may pass a convolution
    ),
    FamilySpec(
        model_type="distilbert",
        config_class="DistilBertConfig",
        blocks=("TransformerBlock",),
        stacks=("DistilBertModel",),
        linear_in="ffn.lin1",
        linear_out="ffn.lin2",
        activation="ffn.activation",
        replaced="ffn.lin1",
        emptied=("ffn.activation", "ffn.lin2"),
        activation_keys=("activation",),
        heads=_heads("DistilBert", *_ENCODER_HEADS, "ForMultipleChoice"),
        first_token_heads=("DistilBertForSequenceClassification",),
        attention_out="sa_layer_norm",
        attention="DistilBertSelfAttention",
        attention_width="dim",
        query="q_lin",
        key="k_lin",
        size_keys=("hidden_dim",),
        task_head="classifier",
    ),
    FamilySpec(
        model_type="modernbert",
        config_class="ModernBertConfig",
        blocks=("ModernBertEncoderLayer",),
        stacks=("ModernBertModel",),
        linear_in="mlp.Wi",
        fused_gate=True,
        linear_out="mlp.Wo",
        activation="mlp.act",
        dropout="mlp.drop",
        replaced="mlp",
        activation_keys=("hidden_activation",),
        heads=_heads("ModernBert", *_ENCODER_HEADS, "ForMultipleChoice"),
        attention="ModernBertAttention",
        attention_width="Wo.in_features",
        no_attention=_ONE_LAYER,
        size_keys=("intermediate_size",),
        task_head="classifier",
    ),
    FamilySpec(
        model_type="gpt2",
        config_class="GPT2Config",
        blocks=("GPT2MLP",),
        stacks=("GPT2Model",),
        linear_in="c_fc",
        linear_out="c_proj",
        activation="act",
        replaced="c_fc",
        emptied=("act", "c_proj"),
        activation_keys=("activation_function",),
        heads=_heads(
            "GPT2",
            "Model",
            "LMHeadModel",
            "ForSequenceClassification",
            "ForTokenClassification",
            "ForQuestionAnswering",
        ),
        transposed=True,
        causal_stacks=("GPT2Model",),
        attention="GPT2Attention",
        attention_width="embed_dim",
        no_attention=_ONE_LAYER,
        size_keys=("n_inner",),
        task_head="score",
    ),
    FamilySpec(
        model_type="t5",
        config_class="T5Config",
        blocks=("T5LayerFF",),
        stacks=("T5Stack",),
        linear_in="DenseReluDense.wi",
        gated_in="DenseReluDense.wi_1",
        gate="DenseReluDense.wi_0",
        linear_out="DenseReluDense.wo",
        activation="DenseReluDense.act",
        dropout="DenseReluDense.dropout",
        replaced="DenseReluDense",
        activation_keys=("feed_forward_proj", "dense_act_fn"),
        heads=_heads(
            "T5",
            "Model",
            "ForConditionalGeneration",
            "ForSequenceClassification",
            "ForTokenClassification",
            "ForQuestionAnswering",
            "EncoderModel",
        ),
        attention="T5Attention",
        attention_width="inner_dim",
        no_attention=_ADDS_PLACES,
        size_keys=("d_ff",),
        task_head="classification_head.out_proj",
    ),
    FamilySpec(
        model_type="bart",
        config_class="BartConfig",
        blocks=("BartEncoderLayer", "BartDecoderLayer"),
        stacks=("BartEncoder", "BartDecoder"),
        linear_in="fc1",
        linear_out="fc2",
        activation="activation_fn",
        dropout="activation_dropout",
        replaced="fc1",
        emptied=("activation_fn", "fc2"),
        activation_keys=("activation_function",),
        heads=_heads(
            "Bart",
            "Model",
            "ForConditionalGeneration",
            "ForSequenceClassification",
            "ForQuestionAnswering",
            "ForCausalLM",
        ),
        causal_stacks=("BartDecoder",),
        attention="BartAttention",
        attention_width="embed_dim",
        no_attention="those of encoder, decoder and between them are not told apart",
        size_keys=("encoder_ffn_dim", "decoder_ffn_dim"),
        task_head="classification_head.out_proj",
    ),
    _llama_kind("llama", "Llama"),
    _llama_kind("mistral", "Mistral"),
    _llama_kind("qwen2", "Qwen2"),
    _llama_kind("qwen3", "Qwen3"),
)

FAMILIES: dict[str, FamilySpec] = {row.model_type: row for row in _ROWS}
