"""Reinforcement learning of drawing with TRL: GRPO with prefix tuning, rewarded by the scenes' referee.

    python examples/grpo_scenes.py --model_name_or_path mini --output_dir my_model --max_steps 100 \
        --prefix_scales 4 --suffix_temperature 0 --num_generations 8 --per_device_train_batch_size 64 \
        --learning_rate 1e-4 --loss_type grpo

With LoRA, add `--use_peft --lora_r 16`: the output is then the adapter, as TRL saves it. Without, it is a whole
checkpoint:

    nextflow-hf generate "a red circle" --checkpoint my_model --output circle
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoModelForMultimodalLM, AutoProcessor
from trl import ModelConfig, TrlParser, get_peft_config

from nextflow_hf import BUNDLED
from nextflow_hf.scenes import ScenePrompts, scene_reward
from nextflow_hf.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer


@dataclass
class ScenesArguments:
    """Which prompts.

    Args:
        per_category: Prompts of each category.
        prompt_seed: Different seeds give different prompts.
    """

    per_category: int = field(default=200)
    prompt_seed: int = field(default=0)


def main() -> None:
    parser = TrlParser((ScenesArguments, NextFlowGRPOConfig, ModelConfig))
    scenes, args, model_args = parser.parse_args_and_config()
    model_args.lora_target_modules = model_args.lora_target_modules or LORA_TARGETS
    name = model_args.model_name_or_path or "mini"
    path = BUNDLED.get(name, name)
    model = AutoModelForMultimodalLM.from_pretrained(path)
    trainer = NextFlowGRPOTrainer(
        model,
        scene_reward,
        args=args,
        processing_class=AutoProcessor.from_pretrained(path),
        train_dataset=Dataset.from_list(list(ScenePrompts(scenes.per_category, seed=scenes.prompt_seed))),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(args.output_dir)


# The decoder's layers and the connector. Bare names such as `q_proj` are also those of the frozen image tokenizer.
LORA_TARGETS = r".*language_model\.layers\..*_proj|.*connector\.linear_[12]"

if __name__ == "__main__":
    main()
