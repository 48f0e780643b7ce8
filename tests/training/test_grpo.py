import asyncio
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from small_models import small_config

from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.processing.tokenization_nextflow import train_tokenizer
from nextflow_hf.training.grpo import (
    GuardedReward,
    NextFlowGRPOConfig,
    NextFlowGRPOTrainer,
    RewardError,
    middle_return,
    region_mask,
    scale_weights,
)
from nextflow_hf.training.recipe import Recipe
from nextflow_hf.training.rewards import SimilarityReward, ocr_score
from nextflow_hf.training.stage_trainer import NonFiniteError
from nextflow_hf.training.stages import run_recipe
from nextflow_hf.training.train_decoder import processor_for

GRIDS = ((1, 1), (2, 2))
PROMPTS = [[{"role": "user", "content": f"draw dot {number}"}] for number in (1, 2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a small model of two codes, so that pictures of two scales can be enumerated."""
    tokenizer = train_tokenizer(["user\ndraw dot 1 which", "assistant\ndot 2"] * 50, 290)
    config = small_config()
    text = {**config.text_config.to_dict(), "vocab_size": 292}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vq = {**config.vq_config.to_dict(), "codebook_size": 2}
    torch.manual_seed(0)
    model = NextFlowForConditionalGeneration(small_config(text_config=text, vq_config=vq, code_start_id=290))
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.mul_(8)
    model.generation_config.update(image_temperature=1.0, image_top_k=0, image_top_p=1.0, image_guidance_scale=0.0)
    folder = tmp_path_factory.mktemp("grpo") / "model"
    model.save_pretrained(folder)
    processor_for(model.config, tokenizer).save_pretrained(folder)
    return folder


def bright(prompts, drawn, **columns):
    """Mean brightness."""
    return [sum(picture.convert("L").getdata()) / (255 * picture.width * picture.height) for picture in drawn]


def trainer_of(checkpoint, folder, reward=bright, dataset=None, peft_config=None, region_func=None, **settings):
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    settings = {
        "image_size": [16, 16],
        "scale_weight_alpha": 0.0,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "loss_type": "grpo",
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **settings,
    }
    dataset = Dataset.from_list([{"prompt": own, "id": f"p{i}"} for i, own in enumerate(PROMPTS)] * 4)
    trainer = NextFlowGRPOTrainer(
        AutoModelForMultimodalLM.from_pretrained(checkpoint),
        reward,
        args=NextFlowGRPOConfig(output_dir=str(folder), **settings),
        processing_class=AutoProcessor.from_pretrained(checkpoint),
        train_dataset=dataset,
        peft_config=peft_config,
        region_func=region_func,
    )
    # Set by `train` otherwise.
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def batch_of(trainer, prompts=PROMPTS):
    """What the trainer makes of a batch of prompts, each for a whole group."""
    trainer.model.train()
    rows = [{"prompt": own, "id": f"p{i}"} for i, own in enumerate(prompts) for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


def gradients(model):
    return {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}


def log_probs_by_hand(model, prompt_ids, codes):
    """Log-probability of each code from the plain logits, one picture at a time: `(codes,)`."""
    config = model.config
    slots = [config.boi_token_id, *[config.image_token_id] * (len(codes) - 1)]
    logits = model(
        input_ids=torch.tensor([[*prompt_ids, *slots]]), image_codes=codes[None], image_grids=torch.tensor([GRIDS])
    ).logits[0, len(prompt_ids) :, config.code_start_id :]
    return logits.log_softmax(dim=-1).gather(-1, codes[:, None])[:, 0]


def test_the_first_step_is_on_policy_and_its_gradient_is_reinforce_with_the_group_baseline(checkpoint, tmp_path):
    trainer = trainer_of(checkpoint, tmp_path, temperature=1.0)
    model = trainer.model
    inputs = batch_of(trainer)
    rewards = torch.tensor(bright(None, trainer._completions[0])).view(2, 4)
    expected = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    torch.testing.assert_close(inputs["advantages"], expected[:, None].expand(-1, 5), atol=1e-5, rtol=1e-5)

    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"])]
    codes = inputs["completion_ids"] - model.config.code_start_id
    by_hand = torch.stack([log_probs_by_hand(model, *own) for own in zip(prompts, codes)])
    with torch.no_grad():
        # What the rollout drew with has the probabilities that the trainer scores.
        scored, entropies, _ = trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            5,
            compute_entropy=True,
        )
    assert (scored - by_hand).exp().sub(1).abs().max() < 1e-5
    assert entropies.min() > 0 and entropies.max() <= math.log(2) + 1e-6

    (-(expected[:, None] * by_hand).mean()).backward()
    wanted = gradients(model)
    model.zero_grad()
    trainer._compute_loss(model, inputs).backward()
    for name, own in gradients(model).items():
        torch.testing.assert_close(own, wanted[name], atol=1e-5, rtol=1e-4)


def test_over_all_pictures_the_gradient_is_that_of_the_expected_reward(checkpoint, tmp_path):
    trainer = trainer_of(checkpoint, tmp_path)
    # In double precision: a sum of 32 pictures' gradients in float32 is off by more than the bound on some CPUs.
    model = trainer.model.double()
    inputs = batch_of(trainer)
    prompt = inputs["prompt_ids"][0][inputs["prompt_mask"][0].bool()].tolist()
    pictures = torch.tensor(list(itertools.product((0, 1), repeat=5)))
    rewards = torch.linspace(0, 1, 32).roll(7) ** 2
    log_probs = torch.stack([log_probs_by_hand(model, prompt, own) for own in pictures]).sum(dim=1)
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    expected_reward = (log_probs.exp() * rewards).sum()
    (-expected_reward).backward()
    wanted = gradients(model)
    model.zero_grad()
    # TRL's loss is a mean over pictures and codes; any baseline gives the same.
    advantages = 32 * 5 * log_probs.detach().exp() * (rewards - 0.3)
    loss = trainer._compute_loss(
        model,
        {
            "prompt_ids": torch.tensor([prompt] * 32),
            "prompt_mask": torch.ones(32, len(prompt), dtype=torch.long),
            "completion_ids": pictures + model.config.code_start_id,
            "completion_mask": torch.ones(32, 5, dtype=torch.long),
            "advantages": advantages[:, None].expand(-1, 5),
        },
    )
    loss.backward()
    for name, own in gradients(model).items():
        torch.testing.assert_close(own, wanted[name], atol=1e-6, rtol=1e-3)


def test_frozen_scales_get_no_gradient_at_all(checkpoint, tmp_path):
    trainer = trainer_of(checkpoint, tmp_path, prefix_scales=1)
    inputs = batch_of(trainer)
    assert inputs["completion_ids"].shape == (8, 1)
    trainer._compute_loss(trainer.model, inputs).backward()
    scales = trainer.model.model.scale_embedding.scale.weight.grad
    assert scales[0].abs().sum() > 0 and not scales[1:].any()
    connector = [own.grad for own in trainer.model.model.connector.parameters()]
    assert all(own is None or not own.any() for own in connector)


def test_a_suffix_update_trains_the_other_scales_on_a_shared_prefix(checkpoint, tmp_path):
    trainer = trainer_of(checkpoint, tmp_path, prefix_scales=1, vmr_completions=2, suffix_every=2)
    batch_of(trainer)
    first, second = trainer._completions
    assert len(first) == len(second) == 8 and any(a.tobytes() != b.tobytes() for a, b in zip(first, second))
    trainer.state.global_step = 1
    inputs = batch_of(trainer)
    assert inputs["tool_mask"].tolist() == [[0, 1, 1, 1, 1]] * 8 and len(trainer._completions) == 1
    prefixes = inputs["completion_ids"][:, 0].view(2, 4)
    assert (prefixes == prefixes[:, :1]).all() and inputs["completion_ids"][:, 1:].unique(dim=0).shape[0] > 1
    trainer._compute_loss(trainer.model, inputs).backward()
    assert trainer.model.model.scale_embedding.scale.weight.grad[1].any()


def test_middle_return_lies_between_the_mean_and_the_largest():
    rewards = torch.tensor([[0.0, 1.0, math.nan], [1.0, 1.0, math.nan], [math.nan, 1.0, math.nan]])
    values = middle_return(rewards, 1.0)
    assert values[0].item() == pytest.approx(math.log((1 + math.e) / 2)) and values[1].item() == pytest.approx(1)
    assert values[2].isnan()
    assert middle_return(rewards, 1e3)[0].item() == pytest.approx(0.5, abs=1e-3)
    assert middle_return(rewards, 1e-3)[0].item() == pytest.approx(1, abs=1e-3)


def test_scale_weights_have_mean_one_over_what_is_trained():
    grids = ((1, 1), (2, 2), (4, 4))
    everything = torch.ones(21, dtype=torch.bool)
    assert torch.equal(scale_weights(grids, 0.0, everything), torch.ones(21))
    weights = scale_weights(grids, 0.5, everything)
    assert weights.mean().item() == pytest.approx(1) and weights[0] / weights[-1] == pytest.approx(4)
    suffix = everything.clone()
    suffix[:5] = False
    assert scale_weights(grids, 0.7, suffix)[5:].tolist() == pytest.approx([1.0] * 16)


def test_regions_go_from_the_finest_scale_to_the_coarsest():
    grids = ((1, 1), (2, 2), (4, 4))
    mask = region_mask([(0, 9, 8, 16)], grids, (32, 32))
    first, second, third = mask.split([1, 4, 16])
    assert first.tolist() == [1] and second.tolist() == [1, 0, 0, 0]
    assert third.nonzero()[:, 0].tolist() == [1]
    assert region_mask(None, grids, (32, 32)).all() and not region_mask([], grids, (32, 32)).any()
    with pytest.raises(ValueError, match="within 32x32"):
        region_mask([(0, 0, 40, 8)], grids, (32, 32))


def test_codes_outside_a_region_have_no_advantage(checkpoint, tmp_path):
    trainer = trainer_of(checkpoint, tmp_path, region_func=lambda prompts, drawn: [[(0, 0, 8, 8)]] * len(drawn))
    advantages = batch_of(trainer)["advantages"]
    assert advantages.abs().sum(dim=0).gt(0).tolist() == [True, True, False, False, False]


def test_a_failure_is_no_reward_of_nothing_beside_others(checkpoint, tmp_path):
    def broken(prompts, drawn, **columns):
        return [math.nan, *[1.0 + place for place in range(len(prompts) - 1)]]

    trainer = trainer_of(checkpoint, tmp_path, reward=[broken, bright], on_reward_error="skip")
    advantages = batch_of(trainer)["advantages"][:, 0]
    # The others of its group are measured by their own mean.
    assert advantages[0] == 0 and advantages[1:4].sum().abs() < 1e-3 and advantages[1:4].abs().min() < 0.1


def test_a_reward_that_hangs_does_not_keep_the_process(tmp_path):
    code = (
        "import time\nfrom nextflow_hf.training.grpo import within\n"
        "try:\n    within(0.1, lambda: time.sleep(100))\nexcept TimeoutError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "no answer within 0.1 s" and done.returncode == 0


def test_an_asynchronous_reward_is_guarded_too():
    async def judge(prompts, **columns):
        await asyncio.sleep(0.01)
        return [1, None, math.inf][: len(prompts)]

    class Judge:
        async def __call__(self, prompts, **columns):
            return await judge(prompts)

    for own in (judge, Judge()):
        assert GuardedReward(own)(prompts=["a", "b"]) == [1, None]
        with pytest.raises(RewardError, match="prompts c"):
            GuardedReward(own)(prompts=["a", "b", "c"])
        reward = GuardedReward(own, "skip", timeout=5)
        assert reward(prompts=["a", "b", "c"]) == [1, None, None] and reward.failed == [False, False, True]
        with pytest.raises(RewardError, match="3 rewards for 4 prompts"):
            GuardedReward(own)(prompts=["a", "b", "c", "d"])


def test_asynchronous_rewards_share_a_loop_whatever_else_runs():
    """A client belongs to the loop in which it was made; a notebook has one of its own."""
    loops = []

    async def judge(prompts, **columns):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(prompts)

    async def notebook():
        return GuardedReward(judge, timeout=5)(prompts=["a"])

    reward = GuardedReward(judge)
    assert reward(prompts=["a"]) == reward(prompts=["b"]) == asyncio.run(notebook()) == [1.0]
    assert len({id(own) for own in loops}) == 1

    async def hangs(prompts, **columns):
        await asyncio.sleep(100)

    with pytest.raises(RewardError, match="no answer within"):
        GuardedReward(hangs, timeout=0.1)(prompts=["a"])


def test_texts_with_pictures_are_refused_before_anything_is_drawn(checkpoint, tmp_path):
    from transformers import AutoModelForMultimodalLM

    rows = Dataset.from_list([{"prompt": "make it blue", "images": ["a.png"]}])
    with pytest.raises(ValueError, match="its prompts are conversations"):
        NextFlowGRPOTrainer(
            AutoModelForMultimodalLM.from_pretrained(checkpoint),
            bright,
            args=NextFlowGRPOConfig(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=rows,
        )


def test_a_reward_that_is_left_out_is_told(caplog):
    def typo(prompts, **columns):
        return undefined  # noqa: F821

    assert GuardedReward(typo, "skip")(prompts=["a"]) == [None]
    assert GuardedReward(lambda prompts, **columns: [math.nan], "skip")(prompts=["b"]) == [None]
    assert "'typo' failed for the prompts a: NameError" in caplog.text and "is [nan] for the prompts b" in caplog.text


@pytest.mark.parametrize("kind", ["raises", "is slow", "is no number"])
def test_a_reward_that_fails_names_its_prompts_or_is_left_out(checkpoint, tmp_path, kind):
    def broken(prompts, drawn, id, **columns):
        rewards = bright(prompts, drawn)
        if "p1" not in id:
            return rewards
        if kind == "raises":
            raise KeyError("no such word")
        if kind == "is slow":
            time.sleep(0.6)
        return [math.nan if own == "p1" else reward for own, reward in zip(id, rewards)]

    limit = {"reward_timeout": 0.3} if kind == "is slow" else {}
    trainer = trainer_of(checkpoint, tmp_path, reward=broken, **limit)
    with pytest.raises(RewardError, match="'broken' .*p1"):
        batch_of(trainer)
    skipping = trainer_of(checkpoint, tmp_path, reward=broken, on_reward_error="skip", **limit)
    advantages = batch_of(skipping)["advantages"]
    assert advantages.isfinite().all() and not advantages[4:].any()
    assert advantages[:4].any() == (kind == "is no number")


def test_a_run_that_was_killed_goes_on_with_the_same_rewards(checkpoint, tmp_path):
    def run(folder, resume=None, **settings):
        trainer = trainer_of(checkpoint, folder, save_strategy="steps", save_steps=2, max_steps=4, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-2"))
    curves = [
        [(own["step"], own["reward"]) for own in trainer.state.log_history if "reward" in own]
        for trainer in (whole, again)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    for first, second in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(first, second)


def test_rewards_rise(checkpoint, tmp_path):
    def ones(prompts, completion_ids, **columns):
        return [sum(own) / len(own) - 290 for own in completion_ids]

    trainer = trainer_of(checkpoint, tmp_path, reward=ones, max_steps=25, learning_rate=1e-3, num_generations=8)
    trainer.train()
    rewards = [own["reward"] for own in trainer.state.log_history if "reward" in own]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_adapters_train_alone(checkpoint, tmp_path, beta):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = trainer_of(checkpoint, tmp_path, peft_config=lora, beta=beta)
    before = {name: own.clone() for name, own in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, own in trainer.model.named_parameters() if not torch.equal(own, before[name])}
    assert changed and all("lora_" in name for name in changed)


def test_a_reference_keeps_the_policy_near(checkpoint, tmp_path):
    trainer = trainer_of(checkpoint, tmp_path, beta=0.1)
    trainer.train()
    kl = [own["kl"] for own in trainer.state.log_history if "kl" in own]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 0


def test_editing_sees_its_picture(checkpoint, tmp_path):
    trainer = trainer_of(checkpoint, tmp_path)
    patterns = np.random.default_rng(0).integers(0, 2, (40, 2, 2, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2) * 255
    codes, _ = trainer.model.model.encode_images(torch.from_numpy(patterns).permute(0, 3, 1, 2) / 127.5 - 1)
    other = next(index for index, own in enumerate(codes) if not torch.equal(own, codes[0]))
    pictures = [Image.fromarray(patterns[index]) for index in (0, other)]
    rows = [{"prompt": PROMPTS[0], "images": [own]} for own in pictures for _ in range(4)]
    trainer.model.train()
    inputs = trainer._generate_and_score_completions(rows)
    loss = trainer._compute_loss(trainer.model, inputs)
    assert loss.isfinite() and inputs["num_images"] == [1] * 8
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    score = trainer._get_per_token_logps_and_entropies
    with torch.no_grad():
        both, _, _ = score(trainer.model, ids, mask, 5, pixel_values=inputs["pixel_values"], num_images=[1] * 8)
        parts, _, _ = score(
            trainer.model, ids, mask, 5, batch_size=3, pixel_values=inputs["pixel_values"], num_images=[1] * 8
        )
        turned, _, _ = score(
            trainer.model, ids, mask, 5, pixel_values=inputs["pixel_values"].flip(0), num_images=[1] * 8
        )
    torch.testing.assert_close(both, parts, atol=1e-5, rtol=1e-5)
    assert (both - turned).abs().max() > 1e-4


def scores_of(trainer, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, inputs["completion_ids"].shape[1], batch_size=3, compute_entropy=True
        )


def text_log_probs(model, ids, first):
    """Log-probabilities of the tokens of `(length,)` ids from the place `first` on, among text."""
    logits = model(input_ids=ids[None]).logits[0, first - 1 : -1, : model.config.code_start_id].clone()
    logits[:, [model.config.image_token_id, model.config.eoi_token_id, model.config.boi_token_id]] = -math.inf
    return logits.log_softmax(dim=-1).gather(-1, ids[first:, None])[:, 0]


def test_answers_in_words_are_scored_among_words(checkpoint, tmp_path):
    def length(prompts, completion_ids, drawn, **columns):
        assert drawn == [None] * len(prompts)
        return [float(len(own)) for own in completion_ids]

    trainer = trainer_of(checkpoint, tmp_path, reward=length, completion="answer", max_completion_length=7)
    inputs = batch_of(trainer)
    log_probs, entropies, _ = scores_of(trainer, inputs)
    for row in range(8):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        said = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
        expected = text_log_probs(trainer.model, torch.cat([prompt, said]), len(prompt))
        torch.testing.assert_close(log_probs[row, : len(said)], expected, atol=1e-5, rtol=1e-4)
        assert not log_probs[row, len(said) :].any() and entropies[row, : len(said)].min() >= 0
    trainer._compute_loss(trainer.model, inputs).backward()
    assert trainer.model.lm_head.weight.grad.isfinite().all()


def test_a_thought_and_its_picture_are_one_trajectory(checkpoint, tmp_path, monkeypatch):
    def varied(prompts, completion_ids, **columns):
        return [float(sum(own) % 7) for own in completion_ids]

    trainer = trainer_of(checkpoint, tmp_path, reward=varied, completion="thought", max_completion_length=9)
    model, boi = trainer.model, trainer.model.config.boi_token_id
    plain = model._text_scores

    def eager(hidden, images):
        """Begins a picture more often than a model of random weights."""
        scores = plain(hidden, images)
        return scores.index_add(-1, torch.tensor([boi]), scores.new_full((*scores.shape[:-1], 1), 6.0))

    from nextflow_hf.modeling import generation_nextflow

    class Eager(generation_nextflow._TextVocabulary):
        def __call__(self, input_ids, scores):
            scores = super().__call__(input_ids, scores)
            scores[:, boi] += 6 * (input_ids is not None)
            return scores

    monkeypatch.setattr(model, "_text_scores", eager)
    monkeypatch.setattr(generation_nextflow, "_TextVocabulary", Eager)
    inputs = batch_of(trainer)
    drawn = [own is not None for own in trainer._completions[0]]
    assert any(drawn)
    log_probs, _, _ = scores_of(trainer, inputs)
    monkeypatch.undo()
    for row in range(8):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        assert trainer.processing_class.tokenizer.decode(prompt).endswith("<think>\n")
        whole = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
        codes = whole[whole >= model.config.code_start_id] - model.config.code_start_id
        text = whole[: len(whole) - len(codes)]
        assert len(codes) == (5 if drawn[row] else 0) and (not drawn[row] or text[-1] == boi)
        if drawn[row]:
            before = [*prompt.tolist(), *text[:-1].tolist()]
            expected = log_probs_by_hand(model, before, codes)
            torch.testing.assert_close(log_probs[row, len(text) : len(whole)], expected, atol=1e-5, rtol=1e-4)
    trainer._compute_loss(model, inputs).backward()
    assert model.model.connector.linear_1.weight.grad.any() and model.lm_head.weight.grad[:290].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix_scales": 3}, "1 to 2"),
        ({"vmr_completions": 2}, "set `prefix_scales`"),
        ({"vmr_completions": 2, "prefix_scales": 1, "completion": "thought"}, "prefix of a picture"),
        ({"vmr_completions": 2, "prefix_scales": 2}, "leave scales to complete"),
        ({"vmr_completions": 2, "prefix_scales": 1, "suffix_temperature": 0.0}, "would be the same"),
        ({"suffix_every": 1}, "0 or at least 2"),
        ({"min_p": 0.1}, "`min_p` has no effect"),
        ({"completion": "song"}, "must be one of"),
        ({"temperature": 0.0}, "above 0"),
        ({"on_reward_error": "ignore"}, "must be one of"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(checkpoint, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(checkpoint, tmp_path, **settings)


def recipe_of(checkpoint, folder):
    return Recipe(
        stage="grpo",
        output_dir=str(folder),
        init_from={"decoder": str(checkpoint)},
        source={"class": "nextflow_hf.scenes:ScenePrompts", "per_category": 1},
        stage_args={"rewards": [{"function": "test_grpo:bright", "weight": 2}]},
        trainer={
            "max_steps": 1,
            "image_size": [32, 32],
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "save_steps": 1,
            "use_cpu": True,
        },
    )


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_its_prompts(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.nn.utils.get_total_norm", lambda gradients: torch.tensor(float("nan")))
    with pytest.raises(NonFiniteError, match="gradient of step 1"):
        run_recipe(recipe_of(checkpoint, tmp_path))
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 1 and len(report["ids"]) == 4 and not (tmp_path / "final").exists()


@pytest.mark.parametrize("completion", ["picture", "answer"])
def test_what_its_model_card_shows_runs(checkpoint, tmp_path, monkeypatch, completion):
    """A pushed model's card: TRL's own asks a language model a question."""
    trainer = trainer_of(checkpoint, tmp_path / "out", completion=completion)
    trainer.save_model()
    trainer.create_model_card(model_name="dots")
    card = (tmp_path / "out/README.md").read_text()
    assert "name: dots" in card and "- grpo" in card and "None" not in card and "## Citations" in card
    (shown,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("picture.png")
    before = Path("picture.png").read_bytes()
    exec(shown, {})
    assert (Path("picture.png").read_bytes() != before) == (completion == "picture")


def test_a_recipe_trains_and_saves_a_checkpoint_that_draws(checkpoint, tmp_path):
    recipe = recipe_of(checkpoint, tmp_path / "run")
    run_recipe(recipe)
    loaded = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "run" / "final")
    assert len(loaded.generate(torch.tensor([[7]]), generation_mode="image", image_size=(16, 16)).images) == 1
    logged = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("train_loss" in own for own in logged) and not (tmp_path / "run" / "README.md").exists()
    # Killed before its result, it takes no step more.
    shutil.rmtree(tmp_path / "run" / "final")
    run_recipe(recipe)
    again = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "run" / "final").state_dict()
    assert all(torch.equal(own, again[name]) for name, own in loaded.state_dict().items())
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"] == logged
    # The same run, whose result lies halfway back.
    start, whole = NextFlowForConditionalGeneration.from_pretrained(checkpoint).state_dict(), loaded.state_dict()
    recipe.output_dir, recipe.stage_args["blend"] = str(tmp_path / "blended"), 0.5
    run_recipe(recipe)
    half = NextFlowForConditionalGeneration.from_pretrained(tmp_path / "blended" / "final").state_dict()
    assert any(not torch.equal(start[name], own) for name, own in whole.items())
    for name, own in whole.items():
        torch.testing.assert_close(half[name], torch.lerp(start[name], own, 0.5), atol=1e-6, rtol=0)
    recipe.stage_args["blend"] = 0
    with pytest.raises(ValueError, match="blend"):
        run_recipe(recipe)
    recipe.stage_args = {"rewards": [{"function": "nextflow_hf.scenes:no_such_reward"}]}
    with pytest.raises(ValueError, match="no_such_reward"):
        run_recipe(recipe)


TWO_PROCESSES = """
import json
import sys

sys.path[:0] = {path!r}
import torch
from test_grpo import trainer_of

torch.set_num_threads(1)
checkpoint, folder, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
# Adam would blow rounding up where a gradient is next to nothing.
trainer = trainer_of(checkpoint, folder, per_device_train_batch_size=8 // processes, max_steps=3, optim="sgd")
assert trainer.accelerator.num_processes == processes
trainer.train()
if trainer.accelerator.is_main_process:
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
    trainer.save_state()
"""


def test_two_processes_give_the_rewards_and_weights_of_one(checkpoint, tmp_path):
    here = Path(__file__).parent
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES.format(path=[str(here), str(here.parent)]))
    rewards, weights = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launch, str(script), str(checkpoint), str(folder), str(processes)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        rewards.append(torch.tensor([own["reward"] for own in log if "reward" in own]))
        weights.append(NextFlowForConditionalGeneration.from_pretrained(folder).state_dict())
    torch.testing.assert_close(rewards[0], rewards[1], atol=1e-5, rtol=0)
    assert len(rewards[0]) == 3
    start = NextFlowForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    assert max((own - start[name]).abs().max() for name, own in weights[0].items()) > 1e-4
    for name, own in weights[0].items():
        torch.testing.assert_close(own, weights[1][name], atol=1e-6, rtol=0)


def test_words_read_are_scored_as_the_paper_does():
    assert ocr_score([("CAT", 1.0)], ["cat"]) == 2
    assert ocr_score([], ["cat"]) == pytest.approx(-0.6)
    # One letter wrong of three: nothing complete, 2/3 similar, bags differ by 2 of 6 letters.
    assert ocr_score([("cut", 0.5)], ["cat"]) == pytest.approx(0.5 * 2 / 3 - 0.6 * 2 / 6)
    assert ocr_score([("cat", 0.9), ("cat", 0.4)], ["cat"]) == pytest.approx(0.4 + 0.9 - 0.6 * 3 / 9)


def test_similarity_is_that_of_the_models_own_embeddings(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 300, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    tokenizer = train_tokenizer(["a red circle", "a blue star"] * 50, 290)
    tokenizer.model_max_length = 16
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(tmp_path)
    reward = SimilarityReward(str(tmp_path), batch_size=2)
    pictures = [Image.new("RGB", (40, 40), color) for color in ("red", "blue", "white")]
    prompts = ["a red circle", "a blue star", [{"role": "user", "content": "a red circle"}]]
    scores = reward(prompts, pictures)
    assert all(-1 <= own <= 1 for own in scores) and len(set(scores)) == 3
    assert scores[2] == pytest.approx(reward(["a red circle"], pictures[2:])[0], abs=1e-5)
