"""The DPO script of TRL's documentation, with the options of its command."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

NAME = "Qwen/Qwen2-0.5B-Instruct"
ADAPTER = {"r": 32, "lora_alpha": 16}


def main():
    model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(NAME)
    dataset = load_dataset("trl-lib/ultrafeedback_binarized")
    training_args = DPOConfig(
        output_dir="Qwen2-0.5B-DPO",
        learning_rate=5.0e-6,
        beta=0.05,
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        warmup_ratio=0.1,
        logging_steps=25,
        eval_strategy="steps",
        eval_steps=50,
    )
    trainer = DPOTrainer(
        model=model,
        args=training_args,
        processing_class=tokenizer,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        peft_config=LoraConfig(**ADAPTER, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
