"""One bar for a training run."""

from __future__ import annotations

from transformers import TrainerCallback

from sepo.bars import Bar, progress_bar


class ProgressBar(TrainerCallback):
    """One bar for a training run, with the latest loss and accuracy beside it; what remains is in view."""

    def __init__(self, description: str):
        self.description = description
        self.bar: Bar | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            done = state.global_step
            self.bar = progress_bar(
                True, total=state.max_steps, initial=done, desc=f"  {self.description}", unit="step"
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and logs and "loss" in logs:
            shown = {"loss": logs["loss"], "accuracy": logs.get("rewards/accuracies")}
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items() if value is not None})

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
