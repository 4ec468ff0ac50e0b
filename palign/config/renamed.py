"""Settings of TRL's configs, past and present, that have another name here or none.

`palign.config.load` answers an unknown setting of such a name with its advice, wherever in the config it stands.
"""

NO_MASK_BY_ID = "remove it: which tokens count is known from lengths, and no id means padding"
ONE_ADAPTER = "remove it: LoRA factors are laid on config.init_from, which is the reference too"

# Last part of the key -> what it is now, as it follows "no such setting; ".
RENAMED: dict[str, str] = {
    # The loss.
    "rpo_alpha": 'set config.objective.loss_type=("dpo", "sft") and config.objective.loss_weights=(1.0, rpo_alpha)',
    "reference_free": "choose a method without a reference in config.objective.loss_type: simpo, orpo, cpo, alphapo",
    "f_divergence_type": "config.objective.loss_type is dpo for reverse_kl, f_dpo_forward_kl, f_dpo_js or f_dpo_alpha",
    "f_alpha_divergence_coef": "it is 1 - config.objective.alpha of f_dpo_alpha: mirrored",
    "use_weighting": "config.objective.loss_type=wpo, with the weight clamped at 1",
    "ld_alpha": "config.objective.loss_type=ld_dpo, and it is config.objective.alpha",
    "discopop_tau": "it is config.objective.temperature of discopop",
    "simpo_gamma": "it is config.objective.gamma of simpo",
    "gamma_beta_ratio": "config.objective.gamma of simpo is gamma_beta_ratio times config.objective.beta",
    "cpo_alpha": "it is config.objective.alpha of cpo; simpo has no supervised term",
    "tpo_alpha": "TPO is not here: there is no third, gold response",
    "center_rewards_coefficient": "it is config.objective.coefficient of bradley_terry_centred",
    "precompute_ref_log_probs": "config.objective.reference=cached",
    "force_use_ref_model": "config.objective.reference is live, cached or none, and config.reference_from says which",
    "use_logits_to_keep": "remove it: logits are made for response tokens only, config.objective.head_chunk at a time",
    "sync_ref_model": "config.objective.reference_sync_every above 0",
    "ref_model_sync_steps": "config.objective.reference_sync_every",
    "ref_model_mixup_alpha": "config.objective.reference_mixup",
    "use_liger_kernel": "remove it: logits are made in parts, config.objective.head_chunk tokens at a time",
    # The model.
    "model_name_or_path": "config.init_from takes a stage or the workdir of a finished run",
    "ref_model_name_or_path": "config.reference_from takes a stage or the workdir of a finished run",
    "model_adapter_name": ONE_ADAPTER,
    "ref_adapter_name": ONE_ADAPTER,
    "use_peft": "config.lora.rank above 0",
    "lora_r": "config.lora.rank",
    "lora_alpha": "config.lora.alpha",
    "lora_target_modules": "config.lora.targets: query, key, value, output, gate, up, down",
    "lora_dropout": "remove it: there is no dropout",
    "gradient_checkpointing": "config.model.remat: none, or full, dots, attention",
    "bf16": "config.model.dtype=bfloat16, or auto",
    "fp16": "config.model.dtype is float32, bfloat16 or auto",
    "disable_dropout": "remove it: there is no dropout",
    # The data.
    "dataset_name": "config.data.path=hf:NAME/SPLIT, or a file, directory or glob",
    "dataset_config": "config.data.path=hf:NAME:CONFIG/SPLIT",
    "dataset_train_split": "it stands behind the last / in config.data.path=hf:NAME/SPLIT",
    "dataset_test_split": "config.data.eval_paths.test=hf:NAME/SPLIT",
    "dataset_streaming": "remove it: the whole of config.data.path is read and checked before training",
    "dataset_num_proc": "remove it: data are read by one process of each host",
    "dataset_text_field": "rename the column to text",
    "datasets": "config.data.mixture is a dict, path -> weight; columns have the names of docs/data.md",
    "data_seed": "config.data.seed",
    "max_completion_length": "config.data.max_length bounds a prompt and one response together",
    "truncation_mode": "config.data.truncation is keep_start, keep_end (of prompts alone) or drop",
    "label_pad_token_id": NO_MASK_BY_ID,
    "padding_value": NO_MASK_BY_ID,
    "padding_free": "config.data.packing=best_fit",
    "per_device_train_batch_size": "config.data.rows_per_step counts the rows of a step over all devices",
    "per_device_eval_batch_size": "config.data.rows_per_step holds for evaluation too",
    "gradient_accumulation_steps": "config.data.micro_batches: the parts a step's config.data.rows_per_step are cut in",
    # The run.
    "output_dir": "it is --workdir of the command",
    "resume_from_checkpoint": "remove it: the same command goes on in its --workdir",
    "num_train_epochs": "config.train.epochs",
    "logging_steps": "config.train.log_every",
    "save_steps": "config.train.checkpoint_every",
    "save_total_limit": "config.train.keep",
    "eval_steps": "config.train.eval_every",
    "eval_strategy": "config.train.eval_every; 0 is at the end only",
    "metric_for_best_model": "config.train.best_metric",
    "greater_is_better": "config.train.best_mode is min or max",
    "generate_during_eval": "remove it: python -m palign.cli.generate samples from a run",
    "report_to": "remove it: metrics are written to the --workdir",
    # The optimizer.
    "optim": "config.optimizer.name",
    "lr_scheduler_type": "config.optimizer.schedule",
    "adam_beta1": "config.optimizer.b1",
    "adam_beta2": "config.optimizer.b2",
    "adam_epsilon": "config.optimizer.eps",
}

# Key -> what its value is now, where that was of another type.
REVALUED: dict[str, str] = {
    "config.model.remat": "a name, full (which True was), none (False), dots or attention",
}
