# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer with complete-or-absent checkpoints, exact resume, and no hidden NaN.

What is changed, and at which seam:
- `_save_checkpoint`: writes aside, then renames (unipool/files.py);
- `get_train_dataloader`: starts at the resumed position in O(1), draws from no global generator;
- `compute_loss`, `log`: language and balance loss are logged apart, averaged over the same window,
  with the part of the tokens that no expert got; a window that a checkpoint cuts in two is
  restored;
- `training_step`, `_clip_grad_norm`: non-finite loss or gradient raises before a weight changes;
- `create_optimizer`: non-finite weights or moments raise in the step that made them;
- `evaluate`: the exact held-out loss of validation.py.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from unipool import schema
from unipool.data.tokens import TokenData, TrainBlocks, ValBlocks
from unipool.errors import TrainingError
from unipool.files import complete_folder, prune, step_folder, step_of
from unipool.training.config import TrainConfig
from unipool.training.resuming import WINDOW, Window, check_restored
from unipool.training.validation import Validation, validate

WRITE_ERRORS = (
    OSError,
    RuntimeError,
    SafetensorError,
)  # torch.save reports a full disk as the second


def training_arguments(config: TrainConfig, device: str, output_dir: Path) -> TrainingArguments:
    """Trainer's own options for `config`; device is "cpu" or "cuda"."""
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": config.min_lr},
        warmup_steps=math.ceil(config.warmup * config.steps),
        weight_decay=config.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=config.clip,
        bf16=config.precision == "bf16",
        use_cpu=device == "cpu",
        seed=config.seed,
        logging_steps=min(config.log_every, config.steps),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every or config.steps,
        save_total_limit=None,  # pruning is ours, after the rename
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        ignore_data_skip=True,  # the sampler starts where the run stopped
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # or Trainer splits batches over all visible GPUs
    return arguments


class _From(Sampler):
    """Positions start, start + 1, ... of `length`; its len() is that of the whole run."""

    def __init__(self, start: int, length: int):
        self.start, self.length = start, length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.length))

    def __len__(self) -> int:
        return self.length


class PoolTrainer(Trainer):
    """Trains `model` on `data` as `config` says, with checkpoints in `checkpoints`.

    tokenizer: a Hugging Face tokenizer to save beside the weights.
    """

    def __init__(
        self,
        model,
        config: TrainConfig,
        data: TokenData,
        checkpoints: Path,
        device: str,
        tokenizer=None,
    ):
        length = config.steps * config.batch_size * config.accumulate
        self.val_blocks = ValBlocks(data.val, config.seq_len, config.eval_tokens)
        super().__init__(
            model=model,
            args=training_arguments(config, device, checkpoints),
            train_dataset=TrainBlocks(data.train, config.seq_len, config.seed, length),
            eval_dataset=self.val_blocks,  # read by our `evaluate` only
            data_collator=default_data_collator,
            callbacks=[_Bookkeeping(self)],
        )
        model.config.use_cache = True  # Trainer switched it off, and would save it so
        self.run_config = config
        self.data = data
        self.tokenizer = tokenizer
        self.checkpoints = Path(checkpoints)
        self.validations: dict[int, Validation] = {}  # by step
        self._first_step = 0
        self.begun = False  # whether a step of this process has
        self._step_loss: torch.Tensor | None = None
        self._window: dict[str, torch.Tensor] = {}
        self._window_seconds = 0.0
        self._window_steps = 0
        self._silent: torch.Tensor | None = None  # [L] int64, of the window's routed tokens
        self._routed = 0
        self.silent_fractions: list[float] = []  # of each layer, in the last window

    # --- data

    def train(self, resume_from_checkpoint: Path | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            self._first_step = step_of(resume_from_checkpoint)
            resume_from_checkpoint = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        config = self.run_config
        loader = DataLoader(
            self.train_dataset,
            batch_size=config.batch_size,
            sampler=_From(
                self._first_step * config.batch_size * config.accumulate, len(self.train_dataset)
            ),
            collate_fn=self.data_collator,
            drop_last=True,
            generator=torch.Generator(),
        )
        return self.accelerator.prepare(loader)

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    # --- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name in ("lm_loss", "aux_loss"):
            term = getattr(outputs, name, None)
            if term is not None:
                self._window[name] = self._window.get(name, 0.0) + term.detach().double()
        if routings := getattr(outputs, "routings", None):
            # Without a wait for the device: added up there until there is a row to log.
            experts = torch.stack([one.experts for one in routings])
            silent = (experts < 0).all(dim=2).sum(dim=1)
            self._silent = silent if self._silent is None else self._silent + silent
            self._routed += routings[0].experts.shape[0]
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        loss, self._step_loss = self._step_loss, None
        # One wait for the device per step; weights and optimizer are those of the step before.
        if not torch.isfinite(torch.stack([loss.float(), torch.as_tensor(norm).to(loss)])).all():
            step = self.state.global_step + 1
            what = f"loss is {loss.item():g}, gradient norm {float(norm):g}"
            raise TrainingError(
                f"step {step}: {what}; stopped before the weights changed "
                "(a lower --lr or --precision fp32 may help)"
            )
        return norm

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if new:
            optimizer.register_step_post_hook(self._check_step)
        return optimizer

    def _check_step(self, optimizer, *_) -> None:
        """A finite gradient may still overflow where it is squared, and lead to a weight that is
        not finite; the loss would tell one step later, after a checkpoint of it."""
        held = {"weight": [], "exp_avg": [], "exp_avg_sq": []}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                held["weight"].append(parameter.detach())
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in optimizer.state.get(parameter, {}):
                        held[name].append(optimizer.state[parameter][name])
        # The greatest magnitude is not finite if one value is not. One wait for the device.
        greatest = [torch.nn.utils.get_total_norm(v, math.inf).float() for v in held.values() if v]
        if torch.isfinite(torch.stack(greatest)).all():
            return
        what = [n for n, v in held.items() if v and not all(t.isfinite().all() for t in v)]
        raise TrainingError(
            f"step {self.state.global_step + 1}: {' and '.join(what)} of AdamW not finite after "
            "it; nothing of the step is kept (a lower --lr or --clip may help)"
        )

    # --- log and validation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {
                name: total.item() / self._window_steps for name, total in self._window.items()
            }
            if self._window_seconds > 0:
                tokens = self._window_steps * self.run_config.tokens_per_step
                logs["tokens_per_second"] = tokens / self._window_seconds
            if self._routed:
                self.silent_fractions = [n / self._routed for n in self._silent.tolist()]
                logs["silent_fraction"] = sum(self.silent_fractions) / len(self.silent_fractions)
            self._reset_window()
        super().log(logs, start_time)

    def _reset_window(self) -> None:
        self._window, self._window_seconds, self._window_steps = {}, 0.0, 0
        self._silent, self._routed = None, 0

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="val"):
        result = self.validation()
        metrics = {
            "val_loss": result.loss,
            "val_bits_per_byte": self.data.bits_per_byte(result.loss),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def validation(self) -> Validation:
        """Held-out loss at the current step; computed once."""
        step = self.state.global_step
        if step not in self.validations:
            config = self.run_config
            self.validations[step] = validate(
                self.model, self.val_blocks, config.batch_size, config.precision
            )
        return self.validations[step]

    # --- checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        step = self.state.global_step
        target = step_folder(self.checkpoints, step)
        usual = self.args.output_dir
        try:
            with complete_folder(target) as staging:
                self.args.output_dir = str(staging)
                super()._save_checkpoint(model, trial)
                written = staging / f"checkpoint-{step}"
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(written)
                (written / WINDOW).write_text(json.dumps(self._window_state()), encoding="utf-8")
                for path in written.iterdir():
                    path.rename(staging / path.name)
                written.rmdir()
        except WRITE_ERRORS as error:
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(f"cannot write checkpoint {target}: {reason}") from error
        finally:
            self.args.output_dir = usual
        prune(self.checkpoints, self.run_config.keep)

    def _window_state(self) -> dict:
        return {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "steps": self._window_steps,
            "seconds": self._window_seconds,
            "terms": {name: total.item() for name, total in self._window.items()},
            "silent": [] if self._silent is None else self._silent.tolist(),
            "routed": self._routed,
        }

    def restore_window(self) -> None:
        """Take up the averages of a logging window that the checkpoint cut in two."""
        folder = step_folder(self.checkpoints, self._first_step)
        state = schema.read(folder / WINDOW, Window, "remove the checkpoint")
        self._tr_loss += state["loss"]
        self._globalstep_last_logged = state["last_logged"]
        self._window_steps = state["steps"]
        self._window_seconds = state["seconds"]
        self._window = {
            name: torch.tensor(total, dtype=torch.float64, device=self.args.device)
            for name, total in state["terms"].items()
        }
        if state.get("routed"):
            self._routed = state["routed"]
            self._silent = torch.tensor(state["silent"], device=self.args.device)

    def check_restored(self) -> None:
        """InputError unless the optimizer and the learning rate are those of the checkpoint."""
        folder = step_folder(self.checkpoints, self._first_step)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper
        check_restored(optimizer, self.lr_scheduler, self._first_step, folder)


class _Bookkeeping(TrainerCallback):
    """Step times, the data epoch, and the restored logging window."""

    def __init__(self, trainer: PoolTrainer):
        self._trainer = trainer
        self._started = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            self._trainer.restore_window()
            self._trainer.check_restored()

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()
        self._trainer.begun = True

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self._trainer
        seconds = time.perf_counter() - self._started
        trainer._window_seconds += seconds
        trainer._window_steps += 1
        sequences = state.global_step * args.train_batch_size * args.gradient_accumulation_steps
        state.epoch = sequences / trainer.train_dataset.blocks
