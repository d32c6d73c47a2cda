#!/bin/bash
IMAGE="${1:-someone/hybrid-dpo}"

uv run python mason.py \
    --cluster ai2/jupiter \
    --image "$IMAGE" \
    --pure_docker_mode \
    --num_nodes 4 \
    --gpus 8 -- accelerate launch \
    --mixed_precision bf16 \
    --num_processes 8 \
    --use_deepspeed \
    --deepspeed_config_file configs/ds_configs/stage3_no_offloading_accelerate.conf \
    open_instruct/dpo_tune_cache.py \
    --exp_name "hybrid-7b-DPO" \
    --model_name_or_path allenai/OLMo-3.2-Hybrid-7B-Instruct-SFT \
    --trust_remote_code \
    --mixer_list allenai/Dolci-Instruct-DPO-fixed 259922 \
    --max_seq_length 16384 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --zero_hpz_partition_size 1 \
    --learning_rate 1e-6 \
    --lr_scheduler_type linear \
    --checkpointing_steps 500 \
    --keep_last_n_checkpoints -1 \
    --warmup_ratio 0.1 \
    --weight_decay 0.0 \
    --num_epochs 1 \
    --logging_steps 1 \
    --loss_type dpo_norm \
    --beta 5 \
    --packing \
    --activation_memory_budget 0.5 \
    --chat_template_name olmo123 \
    --with_tracking
