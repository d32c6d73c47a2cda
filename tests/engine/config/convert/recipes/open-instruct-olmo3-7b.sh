#!/bin/bash
IMAGE=${1:-someone/open_instruct_auto}
MODEL_NAME=/models/olmo3-7b-instruct-sft-1115
for LR in 1e-6
do
    EXP_NAME=olmo3-7b-DPO-${LR}
    uv run python mason.py \
        --cluster ai2/jupiter \
        --image $IMAGE --pure_docker_mode \
        --env LD_LIBRARY_PATH=/var/lib/tcpxo/lib64:$LD_LIBRARY_PATH \
        --num_nodes 4 \
        --gpus 8 -- source /var/lib/tcpxo/lib64/nccl-env-profile.sh \&\& accelerate launch \
        --mixed_precision bf16 \
        --num_processes 8 \
        --use_deepspeed \
        --deepspeed_config_file configs/ds_configs/stage3_no_offloading_accelerate.conf \
        open_instruct/dpo_tune_cache.py \
        --exp_name $EXP_NAME \
        --model_name_or_path $MODEL_NAME \
        --tokenizer_name $MODEL_NAME \
        --use_slow_tokenizer False \
        --mixer_list allenai/olmo-3-pref-mix-deltas 125000 \
            allenai/dpo-yolo1-200k 125000 \
            allenai/related-query_qwen_pairs_filtered_lbc100 1250 \
            allenai/self-talk_gpt_pairs_filtered_lbc100 2500 \
        --max_seq_length 16384 \
        --per_device_train_batch_size 1 \
        --gradient_accumulation_steps 4 \
        --zero_hpz_partition_size 1 \
        --learning_rate $LR \
        --lr_scheduler_type linear \
        --warmup_ratio 0.1 \
        --weight_decay 0.0 \
        --num_epochs 1 \
        --logging_steps 1 \
        --loss_type dpo_norm \
        --beta 5 \
        --gradient_checkpointing \
        --chat_template_name olmo123 \
        --with_tracking \
        --oe_eval_tasks "omega_500:0-shot-chat_deepseek,popqa::hamish_zs_reasoning"
done
