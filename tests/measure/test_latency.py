from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from moe_dist.measure.latency import (
    Latency,
    OtherWork,
    Rounds,
    measure_in_turn,
    measure_latency,
    watch_other_work,
)


def tiny_bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def test_latency_for_each_batch_size() -> None:
    model = tiny_bert().train()
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = measure_latency(model, batch_sizes=(1, 4), seq_len=8, repeats=3, num_warmups=1)
    assert list(found) == [1, 4]
    assert all(0 < latency.median_ms <= latency.p90_ms for latency in found.values())
    assert shapes == [(1, 8)] * 4 + [(4, 8)] * 4
    assert model.training


def test_passes_run_in_eval_mode_on_the_threads_asked_for() -> None:
    model = tiny_bert().train()
    before = torch.get_num_threads()
    seen: list[tuple[bool, int, bool]] = []
    model.register_forward_hook(
        lambda module, *_: seen.append(
            (module.training, torch.get_num_threads(), torch.is_inference_mode_enabled())
        )
    )
    measure_latency(model, batch_sizes=(1,), seq_len=4, repeats=1, num_warmups=0, threads=2)
    assert seen == [(False, 2, True)]
    assert torch.get_num_threads() == before


def test_random_tokens_avoid_padding() -> None:
    model = tiny_bert()
    ids: list[Any] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True
    )
    measure_latency(model, batch_sizes=(32,), seq_len=32, repeats=1, num_warmups=0)
    assert not (ids[0] == model.config.pad_token_id).any()
    assert len(ids[0].unique()) > 30


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_are_timed(family: str) -> None:
    import transformers

    sizes: dict[str, dict[str, int]] = {
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        "bart": {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
        },
    }
    config = transformers.AutoConfig.for_model(family, vocab_size=50, **sizes[family])
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    found = measure_latency(model, batch_sizes=(2,), seq_len=6, repeats=1, num_warmups=0)
    assert found[2].median_ms > 0


def test_no_repeats_is_an_error() -> None:
    with pytest.raises(ValueError, match="repeats=0"):
        measure_latency(tiny_bert(), repeats=0)


def test_models_take_turns_and_a_budget_ends_the_rounds() -> None:
    models = {name: tiny_bert() for name in ("teacher", "student")}
    order: list[str] = []
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    rounds: list[tuple[int, int]] = []
    found = measure_in_turn(
        models,
        Rounds(5, least=2, budget_s=0.0, repeats=2, num_warmups=1),
        batch_sizes=(1,),
        seq_len=4,
        progress=lambda done, most: rounds.append((done, most)),
    )
    assert order == (["teacher"] * 3 + ["student"] * 3) * 2
    assert rounds == [(1, 5), (2, 5)]
    assert {name: len(timed[1].times_ms) for name, timed in found.items()} == {
        "teacher": 4,
        "student": 4,
    }


def test_a_disturbed_measurement_has_a_wide_spread_and_a_low_quantile_that_holds() -> None:
    calm = Latency((12.0, 12.5, 12.1, 12.2, 12.4, 12.0))
    busy = Latency((12.0, 560.0, 12.1, 700.0, 650.0, 590.0))
    assert calm.spread < 0.1 and busy.spread > 0.5
    assert busy.low_ms == pytest.approx(12.05) and busy.median_ms == 575.0


def test_other_work_disturbs_where_it_needs_the_same_cores() -> None:
    assert not OtherWork(num_cores=4, busy_cores=1.2).disturbs(num_threads=2)
    assert OtherWork(num_cores=2, busy_cores=1.2).disturbs(num_threads=2)
    assert not OtherWork(num_cores=2, busy_cores=0.2).disturbs(num_threads=2)


def test_the_work_of_another_process_is_seen() -> None:
    endless = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", endless], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with watch_other_work() as look:
            time.sleep(1.5)
            seen = look()
        other.kill()
    assert seen.num_cores >= 1 and seen.busy_cores > 0.2
