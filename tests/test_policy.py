"""The student as the learner sees it: adapters, reference, saving, and models that do not fit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from omniopd.config import LoraConfig, StudentConfig
from omniopd.errors import ConfigError, LearnerError
from omniopd.learner.learner import Learner
from omniopd.learner.policy import LanguageModel, Policy, load_frozen
from omniopd.types import TokenSignal

ROLLOUT = tiny.rollout("1+2=3;#3")
AUDIT = TokenSignal(
    rollout=ROLLOUT,
    advantages=(0.5,) * 4 + (0.0,) * 5,
    pg_weights=(1.0,) * 4 + (0.0,) * 5,
    anchor_weights=(0.0,) * 4 + (0.1,) * 5,
)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "student", tied=request.param)


def load(folder: Path, **settings: Any) -> Policy:
    torch.manual_seed(0)
    return Policy.load(StudentConfig(model=str(folder), device="cpu", **settings))


def lora(folder: Path, **settings: Any) -> Policy:
    return load(folder, lora=LoraConfig(rank=4, alpha=8.0), **settings)


def trained(policy: Policy, steps: int = 3) -> Learner:
    made = tiny.learner(student=policy, learning_rate=1e-2)
    for step in range(1, steps + 1):
        made.update(step, [AUDIT])
    return made


def logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=torch.tensor([ROLLOUT.prompt.token_ids + ROLLOUT.token_ids])).logits


def test_full_training_moves_every_weight_and_saves_a_plain_model(folder: Path, tmp_path: Path) -> None:
    policy = load(folder)
    before = logits(policy.model)
    trained(policy)
    policy.model.eval()
    policy.save(tmp_path / "final")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(logits(plain), logits(policy.model))
    assert (logits(plain) - before).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "final").encode("1+2") == tiny.encode("1+2")


def test_adapters_alone_change_and_are_merged_on_saving(folder: Path, tmp_path: Path) -> None:
    policy = lora(folder)
    base = {n: p.clone() for n, p in policy.model.named_parameters() if "lora_" not in n}
    before = logits(policy.model)
    assert base and all("lora_" in name for name in policy.trainable_state())
    trained(policy)
    policy.model.eval()
    after = logits(policy.model)
    assert (after - before).abs().max() > 1e-3
    assert all(torch.equal(p, base[n]) for n, p in policy.model.named_parameters() if n in base)
    policy.save(tmp_path / "final")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(logits(plain), after, rtol=1e-4, atol=1e-5)
    # Saving merges a copy: training can go on.
    assert torch.equal(logits(policy.model), after)
    assert all("lora_" in name for name in policy.trainable_state())


def test_reference_of_adapters_is_the_base_model(folder: Path) -> None:
    policy = lora(folder)
    before = logits(policy.model)
    trained(policy)
    policy.model.eval()
    with policy.reference() as frozen:
        assert torch.equal(logits(frozen.model), before)
    assert not torch.equal(logits(policy.model), before)
    assert all(p.requires_grad for p in policy.trainable) and policy.trainable


def test_adapter_step_equals_brute_force(folder: Path) -> None:
    policy = lora(folder)
    with torch.no_grad():
        for index, parameter in enumerate(policy.trainable):
            parameter.copy_(0.5 * torch.sin(torch.arange(parameter.numel()) + index).view_as(parameter))
    ours = tiny.naive_logprobs(policy.model, ROLLOUT)
    with policy.reference() as frozen, torch.no_grad():
        base = tiny.naive_logprobs(frozen.model, ROLLOUT)
    own = ours.gather(-1, torch.tensor(ROLLOUT.token_ids)[:, None]).squeeze(-1)
    kl = (base.exp() * (base - ours)).sum(-1)
    # Four audited tokens with w = .5, five anchored ones with beta = .1.
    loss = -0.5 * own[:4].sum() + 0.1 * kl[4:].sum()
    loss.backward()
    expected = tiny.gradients(policy.model)
    update = tiny.learner(student=policy, logits_slice_tokens=2).update(1, [AUDIT])
    assert update.loss == pytest.approx(loss.item(), rel=1e-5)
    assert update.metrics["loss/anchor"] > 1e-4
    assert tiny.largest_gap(tiny.gradients(policy.model), expected) < 1e-4


@pytest.mark.parametrize("settings", [{}, {"lora": LoraConfig(rank=4)}], ids=["full", "lora"])
def test_gradient_checkpointing_gives_the_same_gradients(folder: Path, settings: dict[str, Any]) -> None:
    plain, saving = load(folder, **settings), load(folder, gradient_checkpointing=True, **settings)
    assert saving.model.is_gradient_checkpointing and not plain.model.is_gradient_checkpointing
    found = []
    for policy in (plain, saving):
        made = tiny.learner(student=policy)
        # The second step has an anchor and, with adapters, a gradient on both factors.
        updates = [made.update(step, [AUDIT]) for step in (1, 2)]
        found.append((updates, tiny.gradients(policy.model)))
    (told, expected), (told_too, ours) = found
    assert [u.loss for u in told_too] == pytest.approx([u.loss for u in told], rel=1e-6)
    assert tiny.largest_gap(ours, expected) < 1e-5


def test_checkpointed_layers_are_really_run_twice(folder: Path) -> None:
    counts = []
    for recompute in (False, True):
        made = tiny.learner(student=load(folder, gradient_checkpointing=recompute))
        calls: list[int] = []
        # Before the layer: the second run stops as soon as it has all that the backward pass needs.
        layer = made.policy.model.base_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        made.update(1, [AUDIT])
        counts.append(len(calls))
    assert counts == [1, 2]


def test_adapter_state_goes_on_bit_for_bit(folder: Path) -> None:
    straight = trained(lora(folder), steps=2)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = tiny.learner(student=lora(folder), learning_rate=1e-2)
    resumed.load_state_dict(torch.load(file, weights_only=False))
    assert resumed.update(3, [AUDIT]) == straight.update(3, [AUDIT])


def test_state_of_another_student_is_refused(folder: Path) -> None:
    full, adapters = load(folder), lora(folder)
    with pytest.raises(
        LearnerError, match=r"the checkpoint holds other weights than this student, e\.g\. 'lm_head|'model"
    ):
        adapters.load_trainable_state(full.trainable_state())


def test_storage_and_compute_precision(folder: Path) -> None:
    full = load(folder, dtype="bfloat16")
    assert full.compute_dtype == torch.bfloat16
    # Full training keeps float32 weights: a bfloat16 weight cannot take an update of 1e-6 of its size.
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    full.freeze_reference()
    with full.reference() as frozen:
        assert {p.dtype for p in frozen.model.parameters()} == {torch.bfloat16}
    adapters = lora(folder, dtype="bfloat16")
    assert {p.dtype for n, p in adapters.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert {p.dtype for p in adapters.trainable} == {torch.float32}
    assert trained(adapters, steps=1).policy_version == 1
    assert {p.dtype for p in load(folder, dtype="float64").model.parameters()} == {torch.float64}


def test_reference_is_kept_on_request_only(folder: Path) -> None:
    policy = load(folder)
    with pytest.raises(LearnerError, match="the initial student was not kept"), policy.reference():
        pass
    policy.freeze_reference()
    with policy.reference() as first, policy.reference() as second:
        assert first is second
        assert not any(p.requires_grad for p in first.model.parameters())
        assert first.model is not policy.model


def test_model_that_scales_its_logits_is_refused() -> None:
    network = tiny.model()
    network.lm_head.register_forward_hook(lambda module, args, output: output)
    LanguageModel(network, compute_dtype=torch.float64)
    network.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 2))
    with pytest.raises(LearnerError, match="Qwen3ForCausalLM does not compute its logits from the last hidden state"):
        LanguageModel(network, compute_dtype=torch.float64)


def test_capped_logits_are_capped_here_too() -> None:
    network = tiny.model()
    network.config.final_logit_softcapping = 2.0
    network.register_forward_hook(
        lambda module, args, output: setattr(output, "logits", 2.0 * torch.tanh(output.logits / 2.0))
    )
    capped = LanguageModel(network, compute_dtype=torch.float64)
    ids = torch.tensor([[5, 6, 7]])
    expected = torch.log_softmax(network(input_ids=ids).logits[0], -1)
    ours = capped.logprobs(capped.hidden(ids, torch.ones_like(ids))[0])
    assert (ours - expected).abs().max() < 1e-12


def test_chat_template_of_the_user_replaces_the_tokenizers_own(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}=")
    assert load(folder, chat_template=str(template)).tokenizer.chat_template == "{{ messages[0]['content'] }}="
    with pytest.raises(ConfigError, match=r"cannot read the chat template .*nowhere\.jinja"):
        load(folder, chat_template=str(tmp_path / "nowhere.jinja"))


def test_adapters_need_something_to_adapt(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"student\.lora cannot be applied .*no_such_layer"):
        load(folder, lora=LoraConfig(target_modules=["no_such_layer"]))


def test_open_weight_teacher_is_frozen(folder: Path) -> None:
    teacher = load_frozen(str(folder), device="cpu", dtype="float32")
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training
